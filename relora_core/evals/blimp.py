"""Minimal-pair accuracy on BLiMP (Warstadt et al. 2020), or on pairs in its jsonl fields.

Two ways of scoring a sentence are in use, and both are given by name:

- `no_bos`, after Weiss et al. (2025): the bare sentence, so its first token is context only; a pair
  is right where log p(good) > log p(bad). Their repository does not hold the code of their metric
  (`pico-lm/blimp`); a notebook in it sums so, but has ties right (`compare_blimp`: `first >=
  second`).
- `eos_prefix`, as lm-eval 0.4.13: the end-of-document id is the context of a space and the
  sentence, so every token is scored; a tie counts as right.

They differ most where a pair differs in its first word (eight of BLiMP's paradigms). The log p of
tokens are summed, not averaged. Not for: when it runs, and registry (`evals/__init__.py`).
"""

from __future__ import annotations

import functools
import json
import re
import tarfile
import zipfile
import zlib
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from lzma import LZMAError
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple, Unpack

import numpy as np

from relora_core.config import GRAMMAR_PAIRS, BlimpConfig, ConfigError, ModelConfig, RunConfig
from relora_core.data.base import DataError, Tokenizer
from relora_core.data.places import SPLITS, expand, first_line, read_stamps, shorten, split_of, walk
from relora_core.evals.base import (
    EvalResult,
    EvalSpec,
    LanguageModel,
    Window,
    Work,
    digest_files,
    encode,
    mean,
    read_records,
    require_path,
    start_id,
)
from relora_core.evals.scoring import score
from relora_core.events import Metric

KEY = "eval.blimp.path"
ACCURACY = Metric(
    key="eval/blimp/no_bos/accuracy",
    title="BLiMP no_bos, %",
    label="BLiMP accuracy",
    column="BLiMP",
    better="higher",
    chance=0.5,
    percent=True,
)
ACCURACY_EOS = Metric(
    key="eval/blimp/eos_prefix/accuracy",
    title="BLiMP eos_prefix, %",
    label="BLiMP accuracy,\neos_prefix",
    better="higher",
    chance=0.5,
    percent=True,
)
FIELDS = ("sentence_good", "sentence_bad", "field", "linguistics_term", "UID")
MAX_BYTES = 1 << 30
"""Of an archive's files in memory; BLiMP has 40 MB."""
_MEMBER = r"(.*/)?[^./][^/]*\.jsonl"
_ZIP = (zipfile.BadZipFile, NotImplementedError, RuntimeError)  # the last: encrypted
RULES = {"no_bos": np.greater, "eos_prefix": np.greater_equal}
"""Variant -> whether a pair is right, of log p(good) and log p(bad)."""
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
    stamps, root = read_stamps(local_files(config)), expand(config.path)
    return digest_files(stamps, _pairs, root=root)


def local_files(config: BlimpConfig) -> list[Path]:
    """The files that `load` reads; ConfigError where there are none."""
    root = require_path(str(config.path), key=KEY)
    return [file for _, file in _find_in_folder(root)] if root.is_dir() else [root]


def notes(config: BlimpConfig) -> list[str]:
    """Lines on files in the folder that are not read."""
    root = require_path(str(config.path), key=KEY)
    if not root.is_dir():
        return []
    files = {file for _, file in _find_in_folder(root)}
    candidates, skips = walk(root)
    others = [(n, file) for n, file in candidates if file not in files]
    if unread := [n for n, file in others if file.suffix in (".jsonl", ".parquet")]:
        skips.append(f"not read beside {len(files)} files: {shorten(unread)}")
    return skips


def check(
    config: BlimpConfig, *, tokenizer: Tokenizer, knows_all: bool, model: ModelConfig
) -> None:
    """DataError if a sentence cannot be tokenised or has no tokens, ConfigError if it is too long.

    With a tokenizer that knows every character only sentences that may be too long are encoded.
    """
    pairs = load(config)
    if knows_all:  # hardly any makes more than two tokens of a byte
        longest = model.max_seq_len // 2 - 1
        pairs = [pair for pair in pairs if max(len(t.encode()) for t in pair.texts()) > longest]
    if pairs:
        _check_lengths(windows(pairs, tokenizer=tokenizer), max_seq_len=model.max_seq_len)


def load(config: BlimpConfig) -> list[Pair]:
    """The pairs by file name and line, the first `max_pairs` of each paradigm."""
    if config.path is None:
        raise ValueError("no path to load from: the grammar has grammar_pairs")
    chosen, counts = [], defaultdict(int)
    for pair in _pairs(require_path(config.path, key=KEY)):
        counts[pair.uid] += 1
        if config.max_pairs is None or counts[pair.uid] <= config.max_pairs:
            chosen.append(pair)
    return chosen


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
        pair_id=_pair_id(record),
    )


def _pair_id(record: dict[str, Any]) -> str:
    """`pairID` of the original files; the hub's call it `pair_id` and make it a number."""
    return str(record.get("pairID", record.get("pair_id", "")))


def _pairs(root: Path) -> Iterator[Pair]:
    for names, where, rows in _files(root):
        empty = True
        for record in rows:
            pair = _pair(record)
            if names and pair.uid not in names:
                name = names[0] if len(names) == 1 else " or ".join(names)
                raise ConfigError(
                    f"{where}: UID must be the file's name {name!r}, got {pair.uid!r}"
                )
            if not (pair.good.strip() and pair.bad.strip()):
                raise ConfigError(f"{where}: pair {pair.pair_id} must be two sentences, got none")
            empty = False
            yield pair
        if empty:
            raise ConfigError(f"{where} must hold at least one pair, got none")


def _files(root: Path) -> Iterator[tuple[list[str], str, Iterator[dict[str, Any]]]]:
    """(names that its UID may have, words for an error, records) of each file, by name."""
    if root.is_dir():
        for name, file in _find_in_folder(root):
            where = f"{KEY}: {file.relative_to(root)}"
            if file.suffix == ".parquet":
                rows = _read_rows(file, where=where)
            else:
                rows = file.read_bytes().splitlines()
            yield _allowed_uids(name), where, _read_records(rows, where=where)
        return
    for member, content in sorted(_read_archive(root).items()):
        where = f"{KEY}: {member}"
        yield [PurePosixPath(member).stem], where, _read_records(content.splitlines(), where=where)


def _read_records(rows: Iterable[bytes], *, where: str) -> Iterator[dict[str, Any]]:
    for number, record in enumerate(read_records(rows, where=where, fields=FIELDS), 1):
        name = "pairID" if "pairID" in record else "pair_id"
        if not isinstance(pair_id := record.get(name), str | int):
            raise ConfigError(
                f"{where} pair {number}: '{name}' must be a string, got {pair_id!r:.40}"
            )
        yield record


def _read_rows(file: Path, *, where: str) -> list[bytes]:
    """A parquet file's rows as lines of jsonl."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return [json.dumps(row).encode() for row in pq.read_table(file).to_pylist()]
    except (pa.ArrowException, OSError, TypeError, ValueError) as error:
        raise ConfigError(f"{where}: no readable parquet file ({first_line(error)})") from None


def _allowed_uids(name: str) -> list[str]:
    """UIDs that a file of this relative name may be of: `<UID>.jsonl`, `<UID>/train.jsonl`,
    `<UID>/train/0000.parquet`; none where the file is all there is to go by."""
    *folders, file = PurePosixPath(name).with_suffix("").parts
    own = [] if split_of(f"{file}.parquet") or file.isdigit() else [file]
    return own or [part for part in folders if part not in SPLITS and part != "data"]


def _find_in_folder(root: Path) -> list[tuple[str, Path]]:
    """(relative name, file): `<UID>.jsonl` in root or where BLiMP's repository has them, else the
    hub's files, a folder for each UID."""
    for folder in (root, root / "data", root / "blimp" / "data"):
        flat = sorted(f for f in folder.glob("*.jsonl") if not f.name.startswith("."))
        if flat:
            return [(file.name, file) for file in flat]
    candidates, _ = walk(root)
    for ending in (".parquet", ".jsonl"):
        if files := [(name, file) for name, file in candidates if name.endswith(ending)]:
            return files
    raise ConfigError(
        f"{KEY} must hold <UID>.jsonl, blimp/data/<UID>.jsonl or <UID>/*.parquet, found none in "
        f"{root}"
    )


def _read_archive(root: Path) -> dict[str, bytes]:
    """Member name -> content of a tar or zip file, read without unpacking to disk."""
    members: dict[str, bytes] = {}
    budget = MAX_BYTES
    try:
        if zipfile.is_zipfile(root):
            with zipfile.ZipFile(root) as archive:
                for entry in archive.infolist():
                    if re.fullmatch(_MEMBER, entry.filename):
                        budget = _deduct(budget, entry.file_size)
                        members[entry.filename] = archive.read(entry)
        else:
            with tarfile.open(root) as archive:
                for member in archive:
                    if member.isfile() and re.fullmatch(_MEMBER, member.name):
                        budget = _deduct(budget, member.size)
                        members[member.name] = archive.extractfile(member).read()  # type: ignore[union-attr]
                # tarfile takes a damaged header for the end; the checksums of xz and gzip tell.
                while archive.fileobj is not None and archive.fileobj.read(1 << 20):
                    pass
    except (tarfile.TarError, LZMAError, EOFError, OSError, zlib.error, *_ZIP) as error:
        raise ConfigError(
            f"{KEY} must be a folder or a readable .tar.xz, .tar.gz or .zip of <UID>.jsonl, got "
            f"{root} ({first_line(error).rstrip(':')})"
        ) from None
    data = {name: c for name, c in members.items() if PurePosixPath(name).parent.name == "data"}
    if not members:
        raise ConfigError(f"{KEY} must hold blimp/data/<UID>.jsonl, found none in {root}")
    return data or members


def _deduct(budget: int, size: int) -> int:
    if size > budget:
        raise tarfile.TarError(f"more than {MAX_BYTES} bytes unpacked")
    return budget - size


def build(config: RunConfig, tokenizer: Tokenizer) -> Callable[..., EvalResult]:
    """`evaluate` with the run's pairs and their windows, a function of (model, **Work)."""
    section = config.eval.blimp
    if section.path is None:
        pairs = grammar_pairs(min(GRAMMAR_PAIRS, section.max_pairs or GRAMMAR_PAIRS))
    else:
        pairs = load(section)
    return functools.partial(
        evaluate,
        pairs=pairs,
        windows=windows(pairs, tokenizer=tokenizer),
        precision=section.precision,
    )


def windows(pairs: Sequence[Pair], *, tokenizer: Tokenizer) -> dict[str, list[Window]]:
    """Variant -> the sequences of good and bad in turn, 2 * len(pairs) of them.

    DataError for a sentence without tokens, as where a tokenizer drops every character of it.
    """
    texts = [text for pair in pairs for text in pair.texts()]
    bare = encode(texts, tokenizer)
    for text, ids in zip(texts, bare, strict=True):
        if not len(ids):
            raise DataError(f"a sentence must hold tokens, got none of {text[:40]!r}")
    start = np.array([start_id(tokenizer)], dtype=np.int32)
    return {
        "no_bos": [Window(ids, len(ids) - 1) for ids in bare],
        "eos_prefix": [
            Window(np.concatenate((start, ids)), len(ids))
            for ids in encode([f" {text}" for text in texts], tokenizer)
        ],
    }


def evaluate(
    model: LanguageModel,
    *,
    pairs: Sequence[Pair],
    windows: Mapping[str, Sequence[Window]],
    precision: str = "fp32",
    **work: Unpack[Work],
) -> EvalResult:
    """Accuracy of each variant on `pairs`, from the `windows` that the function above makes, or
    from those of one variant.

    `eval/blimp/<variant>/accuracy` is the unweighted mean over paradigms, and
    `eval/blimp/<variant>/<phenomenon>` that over the phenomenon's paradigms. Table
    `blimp_paradigms`: the accuracies of each paradigm; `<variant>_ties` counts its pairs of
    equal scores, and `ties`, which earlier versions had alone, those of the last variant. One score
    that is NaN makes every mean over it NaN.
    """
    _check_lengths(windows, max_seq_len=model.max_seq_len)
    sequences = [window for own in windows.values() for window in own]
    scores = score(model, sequences, share_prefixes=True, precision=precision, **work)
    good, bad = scores.reshape(len(windows), len(pairs), 2).transpose(2, 0, 1)
    # Both rules give False of NaN: a model that diverged would be one that has all pairs wrong.
    unknown = np.isnan(good) | np.isnan(bad)
    right = {
        name: np.where(unknown[i], np.nan, RULES[name](good[i], bad[i]))
        for i, name in enumerate(windows)
    }
    ties = {f"{name}_ties": good[i] == bad[i] for i, name in enumerate(windows)}
    ties["ties"] = (good == bad)[-1]
    places: dict[str, list[int]] = defaultdict(list)
    for i, pair in enumerate(pairs):
        places[pair.uid].append(i)
    table = [
        {
            "uid": uid,
            "phenomenon": pairs[indices[0]].phenomenon,
            "field": pairs[indices[0]].field,
            "pairs": len(indices),
            **{variant: float(r[indices].mean()) for variant, r in right.items()},
            **{name: int(tied[indices].sum()) for name, tied in ties.items()},
        }
        for uid, indices in places.items()
    ]
    metrics = {}
    for variant in right:
        metrics[f"eval/blimp/{variant}/accuracy"] = mean(row[variant] for row in table)
        for phenomenon in sorted({row["phenomenon"] for row in table}):
            own = (row[variant] for row in table if row["phenomenon"] == phenomenon)
            metrics[f"eval/blimp/{variant}/{phenomenon}"] = mean(own)
    return EvalResult(metrics=metrics, tables={"blimp_paradigms": table})


def _check_lengths(windows: Mapping[str, Sequence[Window]], *, max_seq_len: int) -> None:
    longest = max(len(w.ids) - 1 for sequences in windows.values() for w in sequences)
    if longest > max_seq_len:
        raise ConfigError(
            f"model.max_seq_len must be >= {longest} (the longest sentence of {KEY}), got "
            f"{max_seq_len}; nearest valid: {longest}"
        )


SPEC = EvalSpec(
    name="blimp",
    headline=(ACCURACY, ACCURACY_EOS),
    load=load,
    local_files=local_files,
    inspect=inspect,
    notes=notes,
    check=check,
    build=build,
)
