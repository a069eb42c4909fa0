"""What the trainer and the evals ask of data: a stream of rows with a position, and a tokenizer."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from relora_core.config import printable

if TYPE_CHECKING:
    import numpy as np


class Tokenizer(Protocol):
    """Text to ids. `eos_id` ends a document and is the start token of evals that want one."""

    vocab_size: int
    eos_id: int

    def encode(self, text: str) -> list[int]:
        """Ids of `text`, without any special token added."""
        ...

    def encode_batch(self, texts: list[str]) -> list[list[int]]: ...


class TokenStream(Protocol):
    """Rows of `seq_len + 1` ids: inputs are row[:-1], labels row[1:].

    A stream knows its rank and the number of ranks: of the next `n * world` global rows, rank i
    takes rows i, i + world, ... The state counts global rows, so a run may resume on another number
    of ranks.
    """

    notes: list[str]
    """What it leaves out of the data, one line each, for the run's record."""

    def next_rows(self, n: int) -> np.ndarray:
        """The next n rows of this rank, int64, shape (n, seq_len + 1). Raises DataError."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """JSON-serialisable position, the same on every rank after equal numbers of `next_rows`."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class RowStream:
    """What `TokenStream`s share whose state is the number of the next global row."""

    def __init__(self, *, rank: int, world: int) -> None:
        self.notes: list[str] = []
        self._row, self._rank, self._world = 0, rank, world

    def state_dict(self) -> dict[str, Any]:
        return {"row": self._row}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._row = int(state["row"])


class DataError(RuntimeError):
    """Data that turned out bad while reading: one line naming file, row and what was expected."""

    def __init__(self, message: str) -> None:
        super().__init__(printable(message))


@dataclass(kw_only=True, slots=True)
class DataInfo:
    """What planning learns of a data set without training on it, and without torch."""

    vocab_size: int
    """Rows that embedding and head need: the ids' range, padded as the data says."""
    fingerprint: str | None
    """Digest that stands for the data, not their path, in the run's identity."""
    rows: int | None = None
    """Rows of seq_len + 1 in one pass; None: unbounded or unknown."""
    notes: list[str] = field(default_factory=list)
    """Things the user should know, one line each; shown at planning and by `describe`."""
