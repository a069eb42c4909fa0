"""Perplexity per source and domain of texts in Paloma's layout (Magnusson et al. 2023).

Two definitions stand side by side, and their numbers must not be compared with each other:

- Paloma's own. Each document alone, after one end-of-document id; every token is scored once, no
  end token is. Perplexity is exp(-sum of log p / tokens), pooled over a domain's or source's
  documents.
- `paper_perplexity`, as Weiss et al. (2025) report it: the arithmetic mean, over rows of max_len
  tokens, of each row's exp(mean NLL). A source's documents are shuffled (seed 42), joined by end
  ids and cut into rows, 100 per source at most; a row's first token is context only. It is the
  larger of the two as a rule: an average of exponentials is ruled by the hardest rows. Rows cross
  document borders, and sources weigh by their rows. The published pipeline decodes the rows and
  tokenises them again; here the ids are scored.

Not for: when it runs, and registry (`evals/__init__.py`).
"""

from __future__ import annotations

import functools
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Unpack

import numpy as np

from relora_core.config import (
    GRAMMAR_DOCUMENTS,
    ConfigError,
    ModelConfig,
    PalomaConfig,
    RunConfig,
    nearest,
)
from relora_core.data.base import DataError, Tokenizer
from relora_core.data.places import expand, read_stamps, shorten, walk
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

KEY = "eval.paloma.path"
PERPLEXITY = Metric(
    key="eval/paloma/perplexity",
    title="perplexity",
    label="Paloma perplexity",
    column="perplexity",
    scale="log",
)
PAPER_PERPLEXITY = Metric(
    key="eval/paloma/paper_perplexity",
    title="paper's perplexity",
    label="Paloma perplexity,\nas published",
    scale="log",
    charted=False,
)
BITS_PER_BYTE = Metric(
    key="eval/paloma/bits_per_byte",
    title="bits per byte",
    label="Paloma, bits per byte",
    charted=False,
)
"""Shown where models of different tokenizers are compared."""
ENDINGS = (".jsonl", ".jsonl.gz", ".jsonl.xz", ".jsonl.zst", ".json.gz")
"""Of the files that are read."""
MAX_LEN = 2048
"""Paloma's guideline for the longest window."""
PAPER_ROWS = 100
"""Rows per source in the paper's figure."""
PAPER_SEED = 42
"""Order of a source's documents in the paper's rows."""
GRAMMAR_SEED = 0
"""Held-out documents of the grammar; the stream draws from another seed space."""


class Document(NamedTuple):
    """One text that is evaluated alone."""

    source: str
    """Folder it lies in."""
    domain: str
    """The record's `subdomain`, or the source where a source has none."""
    text: str
    id: str

    def texts(self) -> list[str]:
        return [self.text]


def inspect(config: PalomaConfig) -> str | None:
    """Digest of the documents; None without a path. ConfigError, one line, for any bad input."""
    if config.path is None:
        return None
    stamps, root = read_stamps(local_files(config)), expand(config.path)
    return digest_files(stamps, _documents, root=root, split=config.split)


def local_files(config: PalomaConfig) -> list[Path]:
    """The files that `load` reads; ConfigError where there are none."""
    return _files(require_path(str(config.path), key=KEY), split=config.split)


def load(config: PalomaConfig) -> list[Document]:
    """The documents in order of files and lines, the first `max_documents` of each domain."""
    if config.path is None:
        raise ValueError("no path to load from: the grammar has grammar_documents")
    root = require_path(config.path, key=KEY)
    counts: dict[tuple[str, str], int] = defaultdict(int)
    chosen = []
    for document in _documents(root, split=config.split):
        counts[document.source, document.domain] += 1
        if counts[document.source, document.domain] <= (config.max_documents or math.inf):
            chosen.append(document)
    return chosen


def grammar_documents(count: int) -> list[Document]:
    """`count` held-out documents of each register of the grammar; the register is the source."""
    from relora_core.data.grammar import REGISTERS, documents

    return [
        Document(register, register, text, f"{register}-{i}")
        for register in REGISTERS
        for i, text in enumerate(documents(register, count, seed=GRAMMAR_SEED))
    ]


def notes(config: PalomaConfig) -> list[str]:
    """Lines on files that are not read; macro averages are over the sources that are read."""
    root = require_path(str(config.path), key=KEY)
    names = {file.relative_to(root) for file in _files(root, split=config.split)}
    sources = {name.parts[0] for name in names}
    candidates, skips = walk(root)
    data = [Path(name) for name, _ in candidates if name.lower().endswith(ENDINGS)]
    missing = sorted({name.parts[0] for name in data if len(name.parts) > 1} - sources)
    unread = [
        name.as_posix()
        for name in data
        if name.parts[0] in sources or len(name.parts) == 1
        if name not in names and (len(name.parts) != 3 or name.parts[1] == config.split)
    ]
    lines = []
    if missing:
        lines.append(f"sources without a split {config.split}, left out: {shorten(missing)}")
    if unread:
        lines.append(f"no <source>/<split>/FILE, or there twice, not read: {shorten(unread)}")
    return lines + skips


def check(
    config: PalomaConfig, *, tokenizer: Tokenizer, knows_all: bool, model: ModelConfig
) -> None:
    """DataError where a text has no tokens, or a domain none at all."""
    del model  # texts are cut to any length
    empty: dict[tuple[str, str], bool] = {}
    for document in load(config):
        key = document.source, document.domain
        if not knows_all:
            has_tokens = bool(tokenizer.encode(document.text))
        else:  # a text has tokens if its beginning has
            has_tokens = not empty.get(key, True) or bool(tokenizer.encode(document.text[:1000]))
        empty[key] = empty.get(key, True) and not has_tokens
    for (source, domain), is_empty in empty.items():
        if is_empty:
            raise DataError(f"domain {source}/{domain} must hold tokens, got none")


def _files(root: Path, *, split: str) -> list[Path]:
    """<source>/<split>/*.jsonl, packed or not; a source without that split is left out."""
    from relora_core.data.documents import drop_doubles  # loads pyarrow

    if not root.is_dir():
        raise ConfigError(f"{KEY} must be a folder of <source>/<split>/*.jsonl.gz, got {root}")
    candidates = [
        file
        for file in sorted(root.glob("*/*/*"))
        if file.name.lower().endswith(ENDINGS) and file.is_file()
        if not any(part.startswith(".") for part in file.relative_to(root).parts)
    ]
    files = [file for file in candidates if file.parent.name == split]
    if not files:
        splits = sorted({file.parent.name for file in candidates})
        if splits:
            raise ConfigError(
                f"eval.paloma.split must be one of {', '.join(splits)} (the splits in {root}), got "
                f"{split!r}.{nearest(split, splits)}"
            )
        raise ConfigError(f"{KEY} must hold <source>/{split}/*.jsonl.gz, found none in {root}")
    try:
        named = [(file.relative_to(root).as_posix(), file) for file in files]
        return [file for _, file in drop_doubles(named)[0]]
    except DataError as error:
        raise ConfigError(f"{KEY}: {error}") from None


def _documents(root: Path, *, split: str) -> Iterator[Document]:
    """Every document that has a text; an empty one has nothing to predict."""
    for file in _files(root, split=split):
        source, where = file.parent.parent.name, f"{KEY}: {file.relative_to(root)}"
        has_text = False
        for record in read_records(_lines(file, where=where), where=where, fields=["text"]):
            if record["text"]:
                has_text = True
                domain = record.get("subdomain") or source
                yield Document(source, str(domain), record["text"], str(record.get("id", "")))
        if not has_text:
            raise ConfigError(f"{where} must hold at least one document, got none")


def _lines(file: Path, *, where: str) -> Iterator[bytes]:
    from relora_core.data.documents import UNREADABLE, open_unpacked

    number = 0
    try:
        with open_unpacked(file) as lines:
            for number, line in enumerate(lines, 1):  # noqa: B007 (read where reading fails)
                yield line
    except UNREADABLE as error:
        what = "broken gzip file" if file.suffix == ".gz" else "unreadable"
        raise ConfigError(f"{where} line {number + 1}: {what} ({error})") from None


def longest_window(config: RunConfig) -> int:
    """Tokens of a window, and of the paper's rows.

    Positions that training never reached would measure how RoPE extrapolates, not the language.
    """
    return min(config.model.max_seq_len, config.data.seq_len, MAX_LEN)


def build(config: RunConfig, tokenizer: Tokenizer) -> Callable[..., EvalResult]:
    """`evaluate` with the run's documents and their ids, a function of (model, **Work)."""
    section = config.eval.paloma
    if section.path is None:
        count = min(GRAMMAR_DOCUMENTS, section.max_documents or GRAMMAR_DOCUMENTS)
        documents = grammar_documents(count)
    else:
        documents = load(section)
    return functools.partial(
        evaluate,
        documents=documents,
        ids=encode([d.text for d in documents], tokenizer),
        eos_id=tokenizer.eos_id,
        prefix=start_id(tokenizer),
        max_len=longest_window(config),
        precision=section.precision,
    )


def document_windows(ids: np.ndarray, *, prefix: int, max_len: int) -> Iterator[Window]:
    """Windows that score each token of a document once, as OLMo-Eval cuts them.

    The first holds up to max_len tokens after `prefix`; each full one after it sees exactly one
    token before its own; the last, shorter one keeps the max_len tokens before its last as context.
    """
    tokens = np.concatenate(([prefix], ids)).astype(np.int32)  # tokens[i + 1] = ids[i]
    for start in range(0, len(ids), max_len):
        stop = min(start + max_len, len(ids))
        yield Window(tokens[max(0, stop - max_len) : stop + 1], stop - start)


def paper_rows(ids: Sequence[np.ndarray], *, eos_id: int, length: int) -> Iterator[Window]:
    """Up to PAPER_ROWS rows of `length` >= 2 tokens of one source, the first token unscored."""
    # numpy may change what this draws, and RandomState, which is frozen, would change every number
    # so far: a test pins the order instead.
    order = np.random.default_rng(PAPER_SEED).permutation(len(ids))
    pieces, count = [], 0
    for i in order:
        if count >= PAPER_ROWS * length:
            break
        pieces += [ids[i], np.array([eos_id], dtype=np.int32)]
        count += len(ids[i]) + 1
    tokens = np.concatenate(pieces).astype(np.int32)
    for row in range(min(PAPER_ROWS, count // length)):
        yield Window(tokens[row * length : (row + 1) * length], length - 1)


@dataclass(slots=True)
class _Sum:
    """Counts over some documents, and the nats that their tokens cost."""

    documents: int = 0
    tokens: int = 0
    bytes: int = 0
    nats: float = 0.0

    @property
    def perplexity(self) -> float:
        return _exp(self.nats / self.tokens)

    @property
    def bits_per_byte(self) -> float:
        return self.nats / (self.bytes * math.log(2))


def _exp(nats: float) -> float:
    return math.exp(nats) if not nats > 700 else math.inf


def _total(sums: Iterable[_Sum]) -> _Sum:
    total = _Sum()
    for s in sums:
        total.documents += s.documents
        total.tokens += s.tokens
        total.bytes += s.bytes
        total.nats += s.nats
    return total


def evaluate(
    model: LanguageModel,
    *,
    documents: Sequence[Document],
    ids: Sequence[np.ndarray],
    eos_id: int,
    prefix: int | None = None,
    max_len: int | None = None,
    precision: str = "fp32",
    **work: Unpack[Work],
) -> EvalResult:
    """Both perplexities of `documents`, with tokens `ids`. Metrics, under `eval/paloma/`:

    perplexity, bits_per_byte: pooled over all tokens and bytes.
    <source>/perplexity, <source>/bits_per_byte: pooled over a source.
    macro_perplexity: domains averaged within each source, then sources (all sources weigh the same,
        and within a source all domains do); the paper's macro average.
    macro_domains_perplexity: all domains of all sources weigh the same.
    macro_sources_perplexity: mean of the sources' pooled perplexities.
    paper_perplexity: see the module; absent where no source fills one row of max_len >= 2.

    prefix: id that documents begin after; None: eos_id.
    max_len: longest input; None: the model's max_seq_len, 2048 at most. Table `paloma_domains`.
    """
    prefix = eos_id if prefix is None else prefix
    max_len = max_len or min(model.max_seq_len, MAX_LEN)
    cut = [list(document_windows(x, prefix=prefix, max_len=max_len)) for x in ids]
    by_source = defaultdict(list)
    for document, tokens in zip(documents, ids, strict=True):
        by_source[document.source].append(tokens)
    rows = [
        row
        for own in by_source.values()
        for row in paper_rows(own, eos_id=eos_id, length=max_len)
        if max_len > 1
    ]
    windows = [window for pieces in cut for window in pieces]
    nats = -score(model, windows + rows, precision=precision, **work)
    owner = np.repeat(np.arange(len(cut)), [len(pieces) for pieces in cut])
    per_document = np.bincount(owner, weights=nats[: len(windows)], minlength=len(cut))
    metrics, table = _summary(documents, ids, per_document)
    if rows:
        means = nats[len(windows) :] / (max_len - 1)
        metrics["paper_perplexity"] = float(np.mean([_exp(m) for m in means]))
    return EvalResult(
        metrics={f"eval/paloma/{name}": value for name, value in metrics.items()},
        tables={"paloma_domains": table},
    )


def _summary(
    documents: Sequence[Document], ids: Sequence[np.ndarray], nats: np.ndarray
) -> tuple[dict[str, float], list[dict[str, str | int | float]]]:
    domains: dict[tuple[str, str], _Sum] = defaultdict(_Sum)
    for document, tokens, cost in zip(documents, ids, nats, strict=True):
        own = _Sum(1, len(tokens), len(document.text.encode()), float(cost))
        key = document.source, document.domain
        domains[key] = _total([domains[key], own])
    for (source, domain), s in domains.items():
        if not s.tokens:
            raise DataError(f"eval.paloma: domain {source}/{domain} must hold tokens, got none")
    sources: dict[str, list[_Sum]] = defaultdict(list)
    for (source, _), s in sorted(domains.items()):
        sources[source].append(s)
    total = _total(domains.values())
    metrics = {
        "perplexity": total.perplexity,
        "bits_per_byte": total.bits_per_byte,
        "macro_perplexity": mean(mean(s.perplexity for s in own) for own in sources.values()),
        "macro_domains_perplexity": mean(s.perplexity for s in domains.values()),
        "macro_sources_perplexity": mean(_total(own).perplexity for own in sources.values()),
    }
    for source, own in sources.items():
        metrics[f"{source}/perplexity"] = _total(own).perplexity
        metrics[f"{source}/bits_per_byte"] = _total(own).bits_per_byte
    table = [
        {
            "source": source,
            "domain": domain,
            "documents": s.documents,
            "tokens": s.tokens,
            "perplexity": s.perplexity,
            "bits_per_byte": s.bits_per_byte,
        }
        for (source, domain), s in sorted(domains.items())
    ]
    return metrics, table


SPEC = EvalSpec(
    name="paloma",
    headline=(PERPLEXITY, PAPER_PERPLEXITY),
    load=load,
    local_files=local_files,
    inspect=inspect,
    notes=notes,
    check=check,
    build=build,
)
