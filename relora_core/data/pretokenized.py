"""Rows of ids in parquet, the schema of pico-lm/pretokenized-dolma, from a folder or the hub.

A column `input_ids` of lists of one length (2049 = 2048 + 1 as published), already shuffled: rows
are served in stored order, so the seed changes nothing here. Not for: making such rows from text.
"""

from __future__ import annotations

import bisect
import copy
import hashlib
import itertools
import time
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from relora_core.config import ConfigError, DataConfig
from relora_core.data import binary, parquet, places
from relora_core.data.base import DataError, DataInfo


def inspect(
    data: DataConfig, *, vocab_size: int, full: bool, tokenizer_digest: str | None
) -> DataInfo:
    """Check layout, schema, row length and ids; see `relora_core.data.inspect`."""
    files = parquet.find_files(data)
    if files is None:
        return _inspect_hub(data, vocab_size=vocab_size, tokenizer_digest=tokenizer_digest)
    if binary.is_binary(files):
        info = binary.inspect(data, files[0], vocab_size=vocab_size)
        if full:
            info.fingerprint = parquet.fingerprint(files, tokenizer_digest=tokenizer_digest)
        return info
    footers = [parquet.read_footer(file) for file in files]
    rows = sum(sum(f.rows) for f in footers)
    if not rows:
        raise ConfigError(f"data.path must hold rows, got 0 in {len(footers)} files: {data.path}")
    stored = parquet.stored_length(footers, seq_len=data.seq_len)
    for footer in footers:
        parquet.check_ids(footer, vocab_size=vocab_size)
    info = DataInfo(
        vocab_size=vocab_size,
        fingerprint=None,
        rows=rows * parquet.windows_per_row(stored, seq_len=data.seq_len),
        notes=[
            *parquet.length_notes(stored, seq_len=data.seq_len),
            *parquet.note_unread(data, files),
        ],
    )
    if full:
        info.notes += parquet.scan(footers, stored=stored, vocab_size=vocab_size)
        info.fingerprint = parquet.fingerprint(files, tokenizer_digest=tokenizer_digest)
    return info


def check_place(data: DataConfig) -> None:
    """ConfigError if `data.path` does not exist here and is no possible name on the hub."""
    source = str(data.path)
    if parquet.find_files(data) is None and places.hub_name(source) is None:
        why = "it is no hub name (owner/name) either"
        raise places.path_error("data.path", source=source, expected=parquet.EXPECTED, why=why)


# hub --------------------------------------------------------------------------------------------
def _hub_commit(data: DataConfig) -> str:
    source = str(data.path)
    try:
        return places.hub_commit(source, repo_type="dataset")
    except LookupError as error:
        raise places.path_error(
            "data.path", source=source, expected=parquet.EXPECTED, why=str(error)
        ) from None


def _hub_fingerprint(data: DataConfig, commit: str, *, tokenizer_digest: str | None) -> str:
    name, _ = places.hub_name(str(data.path)) or ("", None)
    text = f"pretokenized 1 {tokenizer_digest}\nhub {name} {data.split} {commit}"
    return hashlib.sha256(text.encode()).hexdigest()


def hub_fingerprint(data: DataConfig, *, tokenizer_digest: str | None) -> str:
    """Of the commit that the name refers to now."""
    return _hub_fingerprint(data, _hub_commit(data), tokenizer_digest=tokenizer_digest)


def _check_same(data: DataConfig, fingerprint: str) -> None:
    """The hub's data may change; a run must use the commit that it was planned with."""
    if data.fingerprint not in (None, fingerprint):
        raise ConfigError(
            f"data.path={data.path} has another commit (or tokenizer) than when the run was "
            f"planned; name the old one as data.path=owner/name@commit"
        )


def _inspect_hub(data: DataConfig, *, vocab_size: int, tokenizer_digest: str | None) -> DataInfo:
    """Check a hub data set by its first rows; the others are checked as they are served."""
    commit = _hub_commit(data)
    rows = _load_hub(data, commit, cache_dir=None)
    try:
        table = _HubReader(rows, name=str(data.path)).read()
    except Exception as error:  # the library's, the file system's and the HTTP client's
        raise ConfigError(
            f"data.path={data.path}: its first rows cannot be read: {places.first_line(error)}"
        ) from None
    if table is None:
        raise ConfigError(f"data.path must hold rows, got 0 in {data.path}")
    parquet.check_schema(Path(str(data.path)), table.schema)
    stored = parquet.first_length(table)
    parquet.check_seq_len(stored, seq_len=data.seq_len)
    try:
        parquet.table_matrix(table, stored=stored, vocab_size=vocab_size)
    except parquet.BadRow as bad:
        raise ConfigError(f"data.path: row {bad.row} of {data.path} {bad}") from None
    return DataInfo(
        vocab_size=vocab_size,
        fingerprint=_hub_fingerprint(data, commit, tokenizer_digest=tokenizer_digest),
        notes=[
            *parquet.length_notes(stored, seq_len=data.seq_len),
            f"{data.path} is streamed at commit {commit[:12]}; rows are checked when read",
        ],
    )


def _load_hub(data: DataConfig, commit: str, *, cache_dir: Path | None) -> Any:
    name, _ = places.hub_name(str(data.path)) or ("", None)
    try:
        import datasets

        datasets.disable_progress_bars()
        rows = datasets.load_dataset(
            name,
            split=data.split,
            revision=commit,
            streaming=True,
            columns=[parquet.COLUMN],
            cache_dir=str(cache_dir) if cache_dir else None,
        )
        return rows.with_format("arrow")
    except Exception as error:  # the library's, the file system's and the HTTP client's
        raise ConfigError(
            f"data.path={data.path} cannot be read with data.split={data.split}: "
            f"{places.first_line(error)}"
        ) from None


class _Reader(Protocol):
    """Stored rows in order, a chunk at a time, from a position that is JSON."""

    def seek(self, position: dict[str, Any]) -> None: ...

    def position(self) -> dict[str, Any]:
        """Of the chunk that `read` gives next."""
        ...

    def read(self) -> pa.Table | None:
        """The next chunk, None at the end of the data."""
        ...

    def place(self, row: int) -> str:
        """Where stored row `row`, counted over all passes, lies: for error messages."""
        ...


class _LocalReader:
    """Files read directly, in the thread that asks.

    `datasets` reads local files as well, but from threads that outlive it: of eight processes that
    ended within a file three were aborted at exit.
    """

    def __init__(self, files: list[Path]) -> None:
        self._files = files
        self.footers = [parquet.read_footer(file) for file in files]
        self._ends = list(itertools.accumulate(sum(footer.rows) for footer in self.footers))
        self.seek({"row": 0})

    def notes(self, *, seq_len: int) -> list[str]:
        if not self._ends[-1]:
            return []
        stored = parquet.stored_length(self.footers, seq_len=seq_len)
        return parquet.length_notes(stored, seq_len=seq_len)

    def seek(self, position: dict[str, Any]) -> None:
        self._row = int(position["row"])
        self._tables = self._read_from(self._row)

    def position(self) -> dict[str, Any]:
        return {"row": self._row}

    def read(self) -> pa.Table | None:
        table = next(self._tables, None)
        self._row += len(table) if table is not None else 0
        return table

    def place(self, row: int) -> str:
        row %= max(1, self._ends[-1])
        i = bisect.bisect_right(self._ends, row)
        return f"{self._files[i]}: row {row - (self._ends[i - 1] if i else 0)}"

    def _read_from(self, row: int) -> Iterator[pa.Table]:
        """Chunks from stored row `row` on; a chunk ends with its row group."""
        first = bisect.bisect_right(self._ends, row)
        skip = row - (self._ends[first - 1] if first else 0)
        for file in self._files[first:]:
            with pq.ParquetFile(file) as rows:
                for group in range(rows.num_row_groups):
                    count = rows.metadata.row_group(group).num_rows
                    if skip >= count:
                        skip -= count
                        continue
                    for batch in rows.iter_batches(
                        parquet.CHUNK_ROWS,
                        row_groups=[group],
                        columns=[parquet.COLUMN],
                        use_threads=False,
                    ):
                        rest = batch.slice(min(skip, len(batch)))
                        skip -= len(batch) - len(rest)
                        if len(rest):
                            yield pa.Table.from_batches([rest])


class _HubReader:
    """A hub data set through `datasets`; the library's state is the position."""

    def __init__(self, rows: Any, *, name: str) -> None:
        self._rows, self._name = rows, name
        self._tables: list[Iterator[pa.Table]] = []  # the current one
        self.seek(copy.deepcopy(rows.state_dict()))
        weakref.finalize(self, _stop_reading, self._tables)

    def seek(self, position: dict[str, Any]) -> None:
        self._rows.load_state_dict(copy.deepcopy(position))
        self._tables[:] = [self._rows.iter(batch_size=parquet.CHUNK_ROWS)]
        self._position = copy.deepcopy(position)

    def position(self) -> dict[str, Any]:
        return self._position

    def read(self) -> pa.Table | None:
        table = next((t for t in self._tables[0] if len(t)), None)
        self._position = copy.deepcopy(self._rows.state_dict())
        return table

    def place(self, row: int) -> str:
        return f"{self._name}: row {row}, counted over all passes,"


def _stop_reading(tables: list[Iterator[pa.Table]]) -> None:
    """Stop reading ahead: threads that still read when Python exits would abort the process."""
    tables.clear()
    time.sleep(0.5)  # there is nothing to wait on


# streaming --------------------------------------------------------------------------------------
class PretokenizedStream:
    """Windows of the stored rows in stored order, again from the first when the data end.

    Every rank decodes every row and keeps its own. The state is the global row, and the reader's
    position before the newest chunk of stored rows; which chunks there are depends on the global
    row alone, so all ranks say the same.
    """

    def __init__(
        self,
        data: DataConfig,
        *,
        vocab_size: int,
        rank: int = 0,
        world: int = 1,
        cache_dir: Path | None = None,
        tokenizer_digest: str | None = None,
    ) -> None:
        self._data, self._vocab_size = data, vocab_size
        self._rank, self._world = rank, world
        self._reader: _Reader
        if (files := parquet.find_files(data)) is not None:
            self._reader = local = _LocalReader(files)
            self.notes = local.notes(seq_len=data.seq_len)
        else:
            commit = _hub_commit(data)
            _check_same(data, _hub_fingerprint(data, commit, tokenizer_digest=tokenizer_digest))
            rows = _load_hub(data, commit, cache_dir=cache_dir)
            self._reader = _HubReader(rows, name=str(data.path))
            self.notes = [f"{data.path} is streamed at commit {commit[:12]}"]
        self._first = self._reader.position()
        self._stored = 0  # ids per stored row, set by the first one
        self.load_state_dict({"row": 0, "epoch": 0, "chunk_row": 0, "reader": self._first})

    def next_rows(self, n: int) -> np.ndarray:
        out = np.empty((n, self._data.seq_len + 1), dtype=np.int64)
        end = self._row + n * self._world
        mine, filled = self._row + self._rank, 0
        while True:
            chunk_end = self._chunk_row + len(self._chunk) * self._per_row
            rows = np.arange(mine, min(end, chunk_end), self._world)
            if rows.size:
                out[filled : filled + rows.size] = self._cut(rows - self._chunk_row)
                filled += rows.size
                mine += rows.size * self._world
            if chunk_end >= end:  # also the other ranks' rows: all stop at the same chunk
                break
            self._next_chunk(chunk_end)
        self._row = end
        return out

    def state_dict(self) -> dict[str, Any]:
        return {
            "row": self._row,
            "epoch": self._epoch,
            "chunk_row": self._chunk_row,
            "reader": copy.deepcopy(self._chunk_position),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._row, self._epoch = int(state["row"]), int(state["epoch"])
        self._chunk_row = int(state["chunk_row"])
        self._chunk = np.empty((0, 0), dtype=np.int32)  # read again when rows are asked for
        self._chunk_position = copy.deepcopy(state["reader"])
        self._reader.seek(self._chunk_position)

    @property
    def _per_row(self) -> int:
        return parquet.windows_per_row(self._stored, seq_len=self._data.seq_len)

    def _cut(self, windows: np.ndarray) -> np.ndarray:
        """(len(windows), seq_len + 1) ids of the chunk's windows of these numbers."""
        length = self._data.seq_len
        view = np.lib.stride_tricks.sliding_window_view(self._chunk, length + 1, axis=1)
        view = view[:, ::length]  # (rows, windows, ids)
        return view[windows // view.shape[1], windows % view.shape[1]]

    def _next_chunk(self, start: int) -> None:
        """Read the chunk whose first window is global row `start`, maybe the next epoch's first."""
        epoch, position = self._epoch, self._reader.position()
        table = self._read(start)
        if table is None:
            self._reader.seek(self._first)
            epoch, position, table = epoch + 1, self._first, self._read(start)
        if table is None:
            raise DataError(f"{self._data.path} holds no rows of split {self._data.split}")
        if not self._stored:
            self._stored = parquet.first_length(table)
            parquet.check_seq_len(self._stored, seq_len=self._data.seq_len)
        try:
            chunk = parquet.table_matrix(table, stored=self._stored, vocab_size=self._vocab_size)
        except parquet.BadRow as bad:
            where = self._reader.place(start // self._per_row + bad.row)
            raise DataError(f"{where} {bad}") from None
        self._chunk, self._chunk_row = chunk, start
        self._chunk_position, self._epoch = position, epoch

    def _read(self, start: int) -> pa.Table | None:
        try:
            return self._reader.read()
        except Exception as error:  # the libraries', the file system's and the HTTP client's
            where = self._reader.place(start // max(1, self._per_row))
            raise DataError(
                f"{where} or after cannot be read: {places.first_line(error)}"
            ) from error
