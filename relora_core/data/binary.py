"""Ids one after the other in a file, as nanoGPT's `train.bin` (uint16) and llm.c's, with a header.

Row j holds ids [j * seq_len, (j + 1) * seq_len]: as stored, so the seed changes nothing. Not for:
rows of ids in parquet (`parquet.py`).
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from relora_core.config import ConfigError, DataConfig
from relora_core.data.base import DataError, DataInfo, RowStream

SCANNED_IDS = 2**24
"""Ids that planning looks at; the others are checked as they are served."""
HEADERS = {20240520: np.dtype("<u2"), 20240801: np.dtype("<u4")}
"""llm.c's magic numbers, and the type of the ids after 256 int32 of header."""


def is_binary(files: list[Path] | None) -> bool:
    return bool(files) and files[0].suffix == ".bin"  # type: ignore[index]


def inspect(data: DataConfig, file: Path, *, vocab_size: int) -> DataInfo:
    """Check size and ids; the fingerprint stays None."""
    ids = _ids(file)
    if len(ids) <= data.seq_len:
        raise ConfigError(
            f"data.seq_len must be in [1, {len(ids) - 1}] ({file} holds {len(ids)} ids), got "
            f"{data.seq_len}; nearest valid: {len(ids) - 1}"
        )
    largest = int(ids[:SCANNED_IDS].max())
    if largest >= vocab_size:
        raise ConfigError(
            f"data.vocab_size={vocab_size}: {file} holds id {largest}, expected ids in "
            f"[0, {vocab_size}); nearest valid: {largest + 1}"
        )
    order = "its windows come in the file's order, not drawn at random as nanoGPT does"
    later = [f"ids beyond the first {SCANNED_IDS:,} are checked when read"]
    return DataInfo(
        vocab_size=vocab_size,
        fingerprint=None,
        rows=(len(ids) - 1) // data.seq_len,
        notes=[order, *(later if len(ids) > SCANNED_IDS else [])],
    )


def _ids(file: Path) -> np.ndarray:
    """The file's ids, memory-mapped. Raises ConfigError."""
    size = file.stat().st_size
    with open(file, "rb") as stream:
        magic = int.from_bytes(stream.read(4), "little")
    dtype, start = HEADERS.get(magic, np.dtype("<u2")), 1024 if magic in HEADERS else 0
    if size - start < 2 * dtype.itemsize or (size - start) % dtype.itemsize:
        raise ConfigError(
            f"data.path: {file} must hold ids of {dtype.itemsize} bytes ({dtype.name}), got "
            f"{size - start} bytes"
        )
    return np.memmap(file, dtype=dtype, mode="r", offset=start)


class BinaryStream(RowStream):
    """Windows of the ids in stored order, again from the first when they end."""

    def __init__(
        self, file: Path, *, seq_len: int, vocab_size: int, rank: int = 0, world: int = 1
    ) -> None:
        super().__init__(rank=rank, world=world)
        self._file, self._ids = file, _ids(file)
        self._seq_len, self._vocab_size = seq_len, vocab_size
        self._rows = (len(self._ids) - 1) // seq_len
        if not self._rows:
            raise DataError(f"{file} holds {len(self._ids)} ids, expected more than {seq_len}")

    def next_rows(self, n: int) -> np.ndarray:
        first = self._row + self._rank
        starts = (first + np.arange(n) * self._world) % self._rows * self._seq_len
        rows = self._ids[starts[:, None] + np.arange(self._seq_len + 1)].astype(np.int64)
        if rows.size and rows.max() >= self._vocab_size:
            i, j = np.argwhere(rows >= self._vocab_size)[0]
            raise DataError(
                f"{self._file}: id {rows[i, j]} at position {starts[i] + j}, expected ids in "
                f"[0, {self._vocab_size}) (model.vocab_size)"
            )
        self._row += n * self._world
        return rows
