"""What an eval is, and what evals share: results, windows that are scored, reading of records.

Imports no eval and no torch. Not for: scoring windows (`scoring.py`).
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, TypedDict

import numpy as np

from relora_core.config import ConfigError, ModelConfig, RunConfig
from relora_core.data.base import Tokenizer
from relora_core.data.places import Stamp, expand, path_error
from relora_core.events import Metric

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

PORTION = 2**20
"""Characters encoded at a time; a longer text alone, in windows."""


@dataclass(kw_only=True, slots=True)
class EvalResult:
    """What one evaluation found."""

    metrics: dict[str, float]
    """Name under `eval/` -> value."""
    tables: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    """Table name -> rows, JSON-serialisable."""


class Work(TypedDict, total=False):
    """How an evaluation is shared and watched. By default one process does it all, silently."""

    rank: int
    world: int
    reduce: Callable[[Tensor], Tensor] | None
    """Sum of a float64 tensor over the ranks; needed where world > 1."""
    progress: Callable[[int, int], None] | None
    """Called with (done, total) sequences."""


class LanguageModel(Protocol):
    """What an eval asks of a model: anything that maps ids to logits can give it.

    A torch module, so that its modes can be put back after an eval. `model.Decoder` is one, and so
    is any causal model of transformers behind `foreign.ForeignModel`.
    """

    @property
    def max_seq_len(self) -> int:
        """Longest input in tokens."""
        ...

    @property
    def device(self) -> torch.device: ...

    @property
    def shares_prefixes(self) -> bool:
        """Whether it has `prefix_states` and `head`, of which `tree.sums` makes scores."""
        ...

    def log_probs(
        self, ids: Tensor, at: Tensor, targets: Tensor, *, precision: str = "fp32"
    ) -> Tensor:
        """log p(targets) in nats, (N,), of the N next tokens at the positions `at` (B, T) of ids
        (B, T), row by row. Ids beyond a sequence's end are 0, and no such position is asked for.
        """
        ...

    def modules(self) -> Iterator[nn.Module]: ...

    def eval(self) -> Any: ...


class Item(Protocol):
    """What an eval reads from its files, one at a time."""

    def texts(self) -> list[str]: ...


class Check(Protocol):
    """Raises DataError or ConfigError if items give no tokens that can be scored.

    `knows_all`: no text holds a character that the tokenizer does not know.
    """

    def __call__(
        self, section: Any, /, *, tokenizer: Tokenizer, knows_all: bool, model: ModelConfig
    ) -> None: ...


def _no_notes(section: Any) -> list[str]:
    return []


@dataclass(frozen=True, kw_only=True, slots=True)
class EvalSpec:
    """One eval, as its file describes it. `section` is its part of the config, with a path set.

    What it computes is `build`'s; the rest serves planning, which loads no torch.
    """

    name: str
    """Its section of `config.EvalConfig`, and the first part of its metrics after `eval/`."""
    headline: tuple[Metric, ...]
    """Its metrics that tables, figures and MLflow's pages show; the first one matters most."""
    load: Callable[[Any], Sequence[Item]]
    """The items of a section; ConfigError, one line with file and line number, for a bad one."""
    local_files: Callable[[Any], list[Path]]
    """The files that `load` reads; ConfigError where there are none."""
    inspect: Callable[[Any], str | None]
    """Digest of every item, whatever the limits; None without a path. Raises as `load` does."""
    check: Check
    build: Callable[[RunConfig, Tokenizer], Callable[..., EvalResult]]
    """Load and tokenise; gives the function of (model, **Work)."""
    notes: Callable[[Any], list[str]] = _no_notes
    """One line for each kind of file in the folder that the eval does not read."""


class Window(NamedTuple):
    """A sequence of which the last `scored` tokens are predicted, each from all before it."""

    ids: np.ndarray
    """(n,) int32; scored < n."""
    scored: int


def start_id(tokenizer: Tokenizer) -> int:
    """The id that a text begins after where nothing precedes it: as in lm-eval the BOS, of a
    tokenizer that has one (`foreign.ForeignTokenizer`), else the id that ends a document."""
    return getattr(tokenizer, "start_id", tokenizer.eos_id)


def pad(batch: Sequence[Window]) -> tuple[np.ndarray, np.ndarray]:
    """ids (B, T + 1) int64, padded with 0 on the right, and which of the T targets are scored."""
    width = max(2, max(len(w.ids) for w in batch))
    ids = np.zeros((len(batch), width), dtype=np.int64)
    scored = np.zeros((len(batch), width - 1), dtype=bool)
    for row, (tokens, count) in enumerate(batch):
        ids[row, : len(tokens)] = tokens
        scored[row, len(tokens) - 1 - count : max(0, len(tokens) - 1)] = True
    return ids, scored


def require_path(path: str, *, key: str) -> Path:
    """`path`, or a ConfigError that names the nearest entry of the folder where it should be."""
    place = expand(path)
    if not place.exists():
        raise path_error(key, source=path, expected="an existing folder or file")
    return place


def read_records(
    lines: Iterable[bytes], *, where: str, fields: Sequence[str]
) -> Iterator[dict[str, Any]]:
    """One dict per line that is not blank. ConfigError, with file and line, for a broken one.

    Each of `fields` must be a string that can be written as UTF-8.
    """
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            # JSONDecodeError's own text counts lines within this one.
            what = error.msg if isinstance(error, json.JSONDecodeError) else error
            raise ConfigError(f"{where} line {number}: not JSON ({what})") from None
        if not isinstance(record, dict):
            raise ConfigError(f"{where} line {number}: expected an object, got {line[:40]!r}")
        for name in fields:
            _check_string(record, name, where=f"{where} line {number}")
        yield record


def _check_string(record: dict[str, Any], name: str, *, where: str) -> None:
    if name not in record:
        names = ", ".join(sorted(record)) or "nothing"
        raise ConfigError(f"{where}: expected a field '{name}', got {names}")
    if not isinstance(record[name], str):
        raise ConfigError(f"{where}: '{name}' must be a string, got {record[name]!r:.40}")
    try:
        record[name].encode()
    except UnicodeEncodeError:
        raise ConfigError(f"{where}: '{name}' must be Unicode text, got a lone surrogate") from None


def digest(items: Iterable[tuple[Any, ...]]) -> str:
    """sha256 of what is evaluated, in order: independent of folders, archives and compression."""
    total = hashlib.sha256()
    for item in items:
        total.update(json.dumps(item).encode() + b"\n")
    return total.hexdigest()


@functools.lru_cache(maxsize=16)
def digest_files(stamps: tuple[Stamp, ...], read: Callable[..., Any], **arguments: Any) -> str:
    """`digest` of `read(**arguments)`, kept per version of its files, which `stamps` tell: the
    points of a grid mostly share their evals."""
    del stamps
    return digest(read(**arguments))


def mean(values: Iterable[float]) -> float:
    return float(np.mean(list(values)))


def encode(texts: Sequence[str], tokenizer: Tokenizer) -> list[np.ndarray]:
    """int32 ids of each text, a portion at a time: encoding takes 100 times a text's memory."""
    return [
        np.array(ids, dtype=np.int32)
        for portion in _portions(texts)
        for ids in tokenizer.encode_batch(portion)
    ]


def _portions(texts: Sequence[str]) -> Iterator[list[str]]:
    portion, characters = [], 0
    for text in texts:
        if portion and characters + len(text) > PORTION:
            yield portion
            portion, characters = [], 0
        portion.append(text)
        characters += len(text)
    if portion:
        yield portion
