"""Minimal-pair accuracy on BLiMP (Warstadt et al. 2020), or on pairs in its jsonl fields.

Two ways of scoring a sentence are in use, and both are given by name:

- `no_bos`, as Weiss et al. (2025): the bare sentence, so its first token is context only; a pair
  is right where log p(good) > log p(bad).
- `eos_prefix`, as lm-eval 0.4.13: the end-of-document id is the context of a space and the
  sentence, so every token is scored; a tie counts as right.

They differ most where a pair differs in its first word (eight of BLiMP's paradigms). The log p of
tokens are summed, not averaged. Not for: cadence and registry (`evals/__init__.py`).
"""

from __future__ import annotations

import functools
import re
import tarfile
import zlib
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from lzma import LZMAError
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, NamedTuple, Unpack

import numpy as np

from relora_core.config import BlimpConfig, ConfigError
from relora_core.data.base import Tokenizer
from relora_core.data.places import Look, looks
from relora_core.evals import EvalResult, Window, Work, digest, encode, existing, records, score

if TYPE_CHECKING:
    from relora_core.model import Decoder

KEY = "eval.blimp.path"
FIELDS = ("sentence_good", "sentence_bad", "field", "linguistics_term", "UID", "pairID")
MAX_BYTES = 1 << 30
"""Of an archive's files in memory; BLiMP has 40 MB."""
GRAMMAR_SEED = 0
"""Pairs of the grammar."""


class Pair(NamedTuple):
    """A sentence and its ungrammatical neighbour."""

    uid: str
    """Paradigm."""
    phenomenon: str
    """One of the paper's twelve, for BLiMP's own files."""
    field: str
    """morphology, syntax, semantics or syntax_semantics."""
    good: str
    bad: str
    pair_id: str

    def texts(self) -> list[str]:
        return [self.good, self.bad]


def inspect(config: BlimpConfig) -> str | None:
    """Digest of the pairs, the same for a folder and an archive of it; None without a path.

    ConfigError, one line with file and line number, for any bad input.
    """
    if config.path is None:
        return None
    return _digest(config.path, looks(local_files(config)))


def local_files(config: BlimpConfig) -> list[Path]:
    """The files that `load` reads; ConfigError where there are none."""
    root = existing(str(config.path), key=KEY)
    return sorted(_folder(root).glob("*.jsonl")) if root.is_dir() else [root]


@functools.lru_cache(maxsize=8)
def _digest(path: str, looks: tuple[Look, ...]) -> str:
    """Kept per version of the files: the points of a grid mostly share their evals."""
    return digest(_pairs(Path(path).expanduser()))


def load(config: BlimpConfig) -> list[Pair]:
    """The pairs by file name and line, the first `max_pairs` of each paradigm."""
    if config.path is None:
        raise ValueError("no path to load from: the grammar has grammar_pairs")
    kept, counts = [], defaultdict(int)
    for pair in _pairs(existing(config.path, key=KEY)):
        counts[pair.uid] += 1
        if config.max_pairs is None or counts[pair.uid] <= config.max_pairs:
            kept.append(pair)
    return kept


def grammar_pairs(count: int) -> list[Pair]:
    """`count` pairs of each paradigm of the grammar."""
    from relora_core.data.grammar import minimal_pairs

    return [_pair(r) for r in minimal_pairs(pairs_per_paradigm=count, seed=GRAMMAR_SEED)]


def _pair(record: dict[str, Any]) -> Pair:
    """The files spell the twelve phenomena in thirteen ways, and one field in two."""
    phenomenon = re.sub(r"[^a-z0-9_]", "_", record["linguistics_term"].lower())
    return Pair(
        uid=record["UID"],
        # As in the paper's tables, animate_subject_* belong to argument structure.
        phenomenon="argument_structure" if phenomenon == "s_selection" else phenomenon,
        field=re.sub(r"[^a-z0-9_]", "_", record["field"].lower()),
        good=record["sentence_good"],
        bad=record["sentence_bad"],
        pair_id=record["pairID"],
    )


def _pairs(root: Path) -> Iterator[Pair]:
    for uid, where, content in _files(root):
        found = False
        for record in records(content.splitlines(), where=where, fields=FIELDS):
            pair = _pair(record)
            if pair.uid != uid:
                raise ConfigError(f"{where}: UID must be the file's name {uid!r}, got {pair.uid!r}")
            if not (pair.good.strip() and pair.bad.strip()):
                raise ConfigError(f"{where}: pair {pair.pair_id} must be two sentences, got none")
            found = True
            yield pair
        if not found:
            raise ConfigError(f"{where} must hold at least one pair, got none")


def _files(root: Path) -> Iterator[tuple[str, str, bytes]]:
    """(UID, words for an error, content) of each <UID>.jsonl, by name."""
    if root.is_dir():
        for file in sorted(_folder(root).glob("*.jsonl")):
            yield file.stem, f"{KEY}: {file.relative_to(root)}", file.read_bytes()
        return
    for member, content in sorted(_archive(root).items()):
        yield PurePosixPath(member).stem, f"{KEY}: {member}", content


def _folder(root: Path) -> Path:
    """The folder with the jsonl files: root itself, or where BLiMP's repository has them."""
    folders = [root, root / "data", root / "blimp" / "data"]
    for folder in folders:
        if any(folder.glob("*.jsonl")):
            return folder
    raise ConfigError(
        f"{KEY} must hold <UID>.jsonl or blimp/data/<UID>.jsonl, found none in {root}"
    )


def _archive(root: Path) -> dict[str, bytes]:
    """Member name -> content of a tar file, compressed or not, read without unpacking to disk."""
    try:
        with tarfile.open(root) as archive:
            members: dict[str, bytes] = {}
            left = MAX_BYTES
            for member in archive:
                if member.isfile() and re.fullmatch(r"(.*/)?[^./][^/]*\.jsonl", member.name):
                    left -= member.size
                    if left < 0:
                        raise tarfile.TarError(f"more than {MAX_BYTES} bytes unpacked")
                    members[member.name] = archive.extractfile(member).read()  # type: ignore[union-attr]
            # tarfile takes a damaged header for the end; the checksums of xz and gzip tell.
            while archive.fileobj is not None and archive.fileobj.read(1 << 20):
                pass
    except (tarfile.TarError, LZMAError, EOFError, OSError, zlib.error) as error:
        raise ConfigError(
            f"{KEY} must be a folder or a readable .tar.xz or .tar.gz of <UID>.jsonl, got {root} "
            f"({str(error).splitlines()[0].rstrip(':')})"
        ) from None
    data = {name: c for name, c in members.items() if PurePosixPath(name).parent.name == "data"}
    if not members:
        raise ConfigError(f"{KEY} must hold blimp/data/<UID>.jsonl, found none in {root}")
    return data or members


def windows(pairs: Sequence[Pair], *, tokenizer: Tokenizer) -> dict[str, list[Window]]:
    """Variant -> the sequences of good and bad in turn, 2 * len(pairs) of them."""
    texts = [text for pair in pairs for text in pair.texts()]
    start = np.array([tokenizer.eos_id], dtype=np.int32)
    return {
        "no_bos": [Window(ids, max(0, len(ids) - 1)) for ids in encode(texts, tokenizer)],
        "eos_prefix": [
            Window(np.concatenate((start, ids)), len(ids))
            for ids in encode([f" {text}" for text in texts], tokenizer)
        ],
    }


def evaluate(
    model: Decoder,
    *,
    pairs: Sequence[Pair],
    windows: Mapping[str, Sequence[Window]],
    precision: str = "fp32",
    **work: Unpack[Work],
) -> EvalResult:
    """Accuracy of both variants on `pairs`, from the `windows` that the function above makes.

    `eval/blimp/<variant>/accuracy` is the unweighted mean over paradigms, and
    `eval/blimp/<variant>/<phenomenon>` that over the phenomenon's paradigms. Table
    `blimp_paradigms`: both accuracies of each paradigm; `ties` counts equal scores in eos_prefix.
    """
    _check_lengths(model, windows)
    both = [*windows["no_bos"], *windows["eos_prefix"]]
    scores = score(model, both, share_prefixes=True, precision=precision, **work)
    (bare_good, bare_bad), (good, bad) = scores.reshape(2, len(pairs), 2).transpose(0, 2, 1)
    right = {"no_bos": bare_good > bare_bad, "eos_prefix": good >= bad}
    places: dict[str, list[int]] = defaultdict(list)
    for i, pair in enumerate(pairs):
        places[pair.uid].append(i)
    table = [
        {
            "uid": uid,
            "phenomenon": pairs[at[0]].phenomenon,
            "field": pairs[at[0]].field,
            "pairs": len(at),
            **{variant: float(r[at].mean()) for variant, r in right.items()},
            "ties": int((good == bad)[at].sum()),
        }
        for uid, at in places.items()
    ]
    metrics = {}
    for variant in right:
        metrics[f"eval/blimp/{variant}/accuracy"] = _mean(row[variant] for row in table)
        for phenomenon in sorted({row["phenomenon"] for row in table}):
            own = (row[variant] for row in table if row["phenomenon"] == phenomenon)
            metrics[f"eval/blimp/{variant}/{phenomenon}"] = _mean(own)
    return EvalResult(metrics=metrics, tables={"blimp_paradigms": table})


def _mean(values: Iterator[float]) -> float:
    return float(np.mean(list(values)))


def _check_lengths(model: Decoder, windows: Mapping[str, Sequence[Window]]) -> None:
    longest = max(len(w.ids) - 1 for sequences in windows.values() for w in sequences)
    if longest > model.config.max_seq_len:
        raise ConfigError(
            f"model.max_seq_len must be >= {longest} (the longest sentence of {KEY}), got "
            f"{model.config.max_seq_len}; nearest valid: {longest}"
        )
