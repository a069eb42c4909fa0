"""Rows of ids in parquet, the schema of pico-lm/pretokenized-dolma, from a folder or the hub.

A column `input_ids` of lists of one length (2049 = 2048 + 1 as published), already shuffled: rows
are served in stored order, so the seed changes nothing here. Not for: making such rows from text.
"""

from __future__ import annotations

import copy
import glob
import hashlib
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from relora_core.config import ConfigError, DataConfig, nearest
from relora_core.data import places
from relora_core.data.base import DataError, DataInfo

CHUNK_ROWS = 256
"""Stored rows decoded at a time: 2 MB of int32 as published."""
SCANNED_IDS = 2**24
"""Ids that planning decodes at most, about half a second; the rest is checked as it is served."""
HASHED_WHOLE = 256 * 2**20
"""Bytes up to which the fingerprint covers the files' contents; beyond, their footers."""

_EXPECTED = "a local folder or file of parquet, or the name of a hub data set"
_COLUMN = "input_ids"


# files ------------------------------------------------------------------------------------------
@dataclass(slots=True)
class Layout:
    """The parquet files of one split: what `folder/pattern` matches, in order."""

    folder: Path
    pattern: str
    files: list[Path]


def find_layout(data: DataConfig) -> Layout | None:
    """The local files that hold the split, or None where data.path names nothing local.

    Raises ConfigError for a folder without parquet files of that split.
    """
    path = Path(str(data.path)).expanduser()
    if path.is_file():
        return Layout(path.parent, glob.escape(path.name), [path])
    if not path.is_dir():
        return None
    for folder in (path / "data", path):
        names = sorted(
            p.name for p in folder.glob("*.parquet") if not p.name.startswith((".", "__"))
        )
        if names:
            break
    else:
        raise ConfigError(
            f"data.path must be {_EXPECTED}, got {data.path!r}: no *.parquet in it or in its data/"
        )
    if f"{data.split}.parquet" in names:
        pattern, chosen = f"{glob.escape(data.split)}.parquet", [f"{data.split}.parquet"]
    else:
        pattern = f"{glob.escape(data.split)}-*.parquet"
        chosen = [n for n in names if n.startswith(f"{data.split}-")]
    splits = sorted({s for n in names if (s := _split_name(n))}) or ["train"]
    if not chosen and data.split == "train" == splits[0] and not _split_name(names[0]):
        pattern, chosen = "*.parquet", names  # files that name no split are all of the one there is
    if not chosen:
        raise ConfigError(
            f"data.split must be one of {', '.join(splits)} (in {folder}), got {data.split!r}."
            f"{nearest(data.split, splits)}"
        )
    return Layout(folder, pattern, [folder / n for n in chosen])


def _split_name(file_name: str) -> str | None:
    """`train` of `train-00000-of-00004.parquet` or `train.parquet`; None where none is named."""
    stem = file_name.removesuffix(".parquet")
    name, *rest = stem.split("-")
    numbered = len(rest) == 3 and rest[0].isdigit() and rest[1] == "of" and rest[2].isdigit()
    known = name in ("train", "validation", "val", "valid", "dev", "test")
    return name if numbered or (known and len(rest) <= 1) else None


# rows -------------------------------------------------------------------------------------------
class _BadRow(ValueError):
    """Row `row` of a block (counted from 0) is not what it must be."""

    def __init__(self, row: int, what: str) -> None:
        super().__init__(what)
        self.row = row


def _matrix(block: Any, *, stored: int, vocab_size: int) -> np.ndarray:
    """(rows, stored) ids of a block of lists, without a copy; _BadRow at the first wrong row."""
    lengths = pc.call_function("list_value_length", [block])
    wrong = pc.call_function("not_equal", [lengths, pa.scalar(stored, lengths.type)])
    wrong = pc.call_function("fill_null", [wrong, pa.scalar(True)]).to_numpy(zero_copy_only=False)
    if wrong.any():
        row = int(wrong.argmax())
        length = lengths[row].as_py()
        raise _BadRow(
            row, "is null" if length is None else f"holds {length} ids, expected {stored}"
        )
    flat = block.flatten()
    if flat.null_count:
        place = flat.is_null().to_numpy(zero_copy_only=False).argmax()
        raise _BadRow(int(place) // stored, "holds a null id")
    ids = flat.to_numpy(zero_copy_only=True).reshape(-1, stored)
    if ids.size and (ids.min() < 0 or ids.max() >= vocab_size):
        outside = (ids < 0) | (ids >= vocab_size)
        row, column = np.argwhere(outside)[0]
        raise _BadRow(
            int(row),
            f"holds id {ids[row, column]} at position {column}, expected ids in [0, {vocab_size}) "
            f"(data.vocab_size)",
        )
    return ids


def windows_per_row(stored: int, *, seq_len: int) -> int:
    """Windows of seq_len + 1 ids, overlapping by one, that a stored row is cut into."""
    return (stored - 1) // seq_len


# planning ---------------------------------------------------------------------------------------
@dataclass(slots=True)
class _Footer:
    """What a parquet file's footer tells of `input_ids`, by row group."""

    file: Path
    rows: list[int]
    ids: list[int]
    """Ids per row group; a null or empty row counts as one."""
    ranges: list[tuple[int, int] | None]
    """(smallest, largest) id per row group, None where the writer left it out."""


def _footer(file: Path) -> _Footer:
    """Raises ConfigError for a file that is empty, damaged, or of another schema."""
    try:
        if not file.stat().st_size:
            raise ConfigError(f"data.path: {file} is empty (0 bytes), expected a parquet file")
        with pq.ParquetFile(file) as parquet:
            schema, meta = parquet.schema_arrow, parquet.metadata
    except (pa.ArrowException, OSError) as error:
        raise ConfigError(
            f"data.path: {file} is no readable parquet file: {places.first_line(error)}"
        ) from None
    _check_schema(file, schema)
    leaves = [
        i for i in range(meta.num_columns) if meta.schema.column(i).path.split(".")[0] == _COLUMN
    ]
    footer = _Footer(file, [], [], [])
    for g in range(meta.num_row_groups):
        leaf = meta.row_group(g).column(leaves[0])
        stats = leaf.statistics
        footer.rows.append(meta.row_group(g).num_rows)
        footer.ids.append(leaf.num_values)
        if stats is not None and stats.has_min_max:
            footer.ranges.append((int(stats.min), int(stats.max)))
        else:
            footer.ranges.append(None)
    return footer


def _check_schema(file: Path, schema: pa.Schema) -> None:
    if _COLUMN not in schema.names:
        raise ConfigError(
            f"data.path: {file} must have a column {_COLUMN}, got columns "
            f"{', '.join(schema.names) or '(none)'}.{nearest(_COLUMN, schema.names)}"
        )
    kind = schema.field(_COLUMN).type
    lists = (pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list)
    if not any(is_list(kind) for is_list in lists) or not pa.types.is_integer(kind.value_type):
        raise ConfigError(
            f"data.path: column {_COLUMN} of {file} must hold lists of integers, got {kind}"
        )


def inspect(
    data: DataConfig, *, vocab_size: int, full: bool, tokenizer_digest: str | None
) -> DataInfo:
    """Check layout, schema, row length and ids; see `relora_core.data.inspect`."""
    layout = find_layout(data)
    if layout is None:
        return _inspect_hub(data, vocab_size=vocab_size, tokenizer_digest=tokenizer_digest)
    footers = [_footer(file) for file in layout.files]
    rows = sum(sum(f.rows) for f in footers)
    if not rows:
        raise ConfigError(f"data.path must hold rows, got 0 in {len(footers)} files: {data.path}")
    stored = _stored_length(footers, seq_len=data.seq_len)
    for footer in footers:
        _check_ids(footer, vocab_size=vocab_size)
    info = DataInfo(
        vocab_size=vocab_size,
        fingerprint=None,
        rows=rows * windows_per_row(stored, seq_len=data.seq_len),
        notes=_length_notes(stored, seq_len=data.seq_len),
    )
    if full:
        info.notes += _scan(footers, stored=stored, vocab_size=vocab_size)
        info.fingerprint = _fingerprint(layout.files, tokenizer_digest=tokenizer_digest)
    return info


def _stored_length(footers: list[_Footer], *, seq_len: int) -> int:
    """Ids per stored row, from the footers' counts; ConfigError unless one length fits all."""
    length = None
    for footer in footers:
        for rows, ids in zip(footer.rows, footer.ids, strict=True):
            if not rows:
                continue
            length = length or ids / rows
            if ids != rows * length or length != int(length):
                raise ConfigError(
                    f"data.path: rows of {_COLUMN} must all have one length, got {ids} ids in a "
                    f"group of {rows} rows of {footer.file}, expected {length:g} per row"
                )
    assert length, "the caller has seen rows"
    _check_seq_len(int(length), seq_len=seq_len)
    return int(length)


def _check_seq_len(stored: int, *, seq_len: int) -> None:
    if stored < 2:
        raise ConfigError(f"data.path: rows of {_COLUMN} must hold at least 2 ids, got {stored}")
    if seq_len > stored - 1:
        raise ConfigError(
            f"data.seq_len must be in [1, {stored - 1}] (the stored rows hold {stored} ids), got "
            f"{seq_len}; nearest valid: {stored - 1}"
        )


def _length_notes(stored: int, *, seq_len: int) -> list[str]:
    windows = windows_per_row(stored, seq_len=seq_len)
    tail = stored - 1 - windows * seq_len
    if stored - 1 == seq_len:
        return []
    return [
        f"each stored row of {stored} ids gives {windows} sequences of data.seq_len={seq_len}"
        + (f"; its last {tail} ids are not used" if tail else "")
    ]


def _check_ids(footer: _Footer, *, vocab_size: int) -> None:
    for low, high in filter(None, footer.ranges):
        if low < 0 or high >= vocab_size:
            bad = low if low < 0 else high
            raise ConfigError(
                f"data.vocab_size={vocab_size}: {footer.file} holds id {bad}, expected ids in "
                f"[0, {vocab_size})" + (f"; nearest valid: {high + 1}" if low >= 0 else "")
            )


def _scan(footers: list[_Footer], *, stored: int, vocab_size: int) -> list[str]:
    """Decode row groups, those without statistics first, up to a budget; notes on what is left."""
    groups = [(f, g) for f in footers for g in range(len(f.rows))]
    groups.sort(key=lambda group: group[0].ranges[group[1]] is not None)  # stable: else in order
    budget = SCANNED_IDS
    for i, (footer, g) in enumerate(groups):
        if budget <= 0:
            unknown = sum(f.rows[g] for f, g in groups[i:] if f.ranges[g] is None)
            if not unknown:
                return []
            return [f"{unknown} stored rows without statistics: their ids are checked when read"]
        budget -= footer.ids[g]
        try:
            _scan_group(footer, g, stored=stored, vocab_size=vocab_size)
        except DataError as error:
            raise ConfigError(f"data.path: {error}") from None
    return []


def _scan_group(footer: _Footer, group: int, *, stored: int, vocab_size: int) -> None:
    row = sum(footer.rows[:group])
    try:
        with pq.ParquetFile(footer.file) as parquet:
            batches = parquet.iter_batches(CHUNK_ROWS, row_groups=[group], columns=[_COLUMN])
            for batch in batches:
                _matrix(batch.column(0), stored=stored, vocab_size=vocab_size)
                row += len(batch)
    except _BadRow as bad:
        raise DataError(f"{footer.file}: row {row + bad.row} {bad}") from None
    except (pa.ArrowException, OSError) as error:
        raise DataError(
            f"{footer.file} is damaged near row {row}: {places.first_line(error)}"
        ) from None


def _fingerprint(files: list[Path], *, tokenizer_digest: str | None) -> str:
    """sha256 over names and sizes, and contents (or footers, where there is too much to read)."""
    whole = sum(f.stat().st_size for f in files) <= HASHED_WHOLE
    digest = hashlib.sha256(f"pretokenized 1 {tokenizer_digest}".encode())
    for file in files:
        size = file.stat().st_size
        digest.update(f"\n{file.name}\0{size}\0".encode())
        with open(file, "rb") as stream:
            if whole:
                digest.update(hashlib.file_digest(stream, "sha256").digest())
            else:
                stream.seek(-8, 2)  # the footer's length and the magic number end the file
                stream.seek(-8 - int.from_bytes(stream.read(4), "little"), 2)
                digest.update(stream.read())
    return digest.hexdigest()


# hub --------------------------------------------------------------------------------------------
def _hub_commit(data: DataConfig) -> str:
    source = str(data.path)
    try:
        return places.hub_commit(source, repo_type="dataset")
    except LookupError as error:
        raise places.missing(
            "data.path", source=source, expected=_EXPECTED, why=str(error)
        ) from None


def _hub_fingerprint(data: DataConfig, commit: str, *, tokenizer_digest: str | None) -> str:
    name, _ = places.hub_name(str(data.path)) or ("", None)
    text = f"pretokenized 1 {tokenizer_digest}\nhub {name} {data.split} {commit}"
    return hashlib.sha256(text.encode()).hexdigest()


def _check_same(data: DataConfig, fingerprint: str) -> None:
    """The hub moves on; a run must go on with the commit that it was planned with."""
    if data.fingerprint not in (None, fingerprint):
        raise ConfigError(
            f"data.path={data.path} has another commit (or tokenizer) than when the run was "
            f"planned; name the old one as data.path=owner/name@commit"
        )


def _inspect_hub(data: DataConfig, *, vocab_size: int, tokenizer_digest: str | None) -> DataInfo:
    """Check a hub data set by its first rows; the others are checked as they are served."""
    commit = _hub_commit(data)
    try:
        rows = _load_hub(data, commit, cache_dir=None)
        _check_schema(Path(str(data.path)), rows.features.arrow_schema)
        table = next(iter(rows.with_format("arrow").iter(batch_size=CHUNK_ROWS)), None)
    except ConfigError:
        raise
    except Exception as error:  # the library's, the file system's and the HTTP client's
        raise ConfigError(
            f"data.path={data.path} cannot be read with data.split={data.split}: "
            f"{places.first_line(error)}"
        ) from None
    if table is None or not len(table):
        raise ConfigError(f"data.path must hold rows, got 0 in {data.path}")
    stored = _first_length(table)
    _check_seq_len(stored, seq_len=data.seq_len)
    try:
        _table_matrix(table, stored=stored, vocab_size=vocab_size)
    except _BadRow as bad:
        raise ConfigError(f"data.path: row {bad.row} of {data.path} {bad}") from None
    return DataInfo(
        vocab_size=vocab_size,
        fingerprint=_hub_fingerprint(data, commit, tokenizer_digest=tokenizer_digest),
        notes=[
            *_length_notes(stored, seq_len=data.seq_len),
            f"{data.path} is streamed at commit {commit[:12]}; rows are checked when read",
        ],
    )


def _load_hub(data: DataConfig, commit: str, *, cache_dir: Path | None) -> Any:
    import datasets

    name, _ = places.hub_name(str(data.path)) or ("", None)
    return datasets.load_dataset(
        name,
        split=data.split,
        revision=commit,
        streaming=True,
        columns=[_COLUMN],
        cache_dir=str(cache_dir) if cache_dir else None,
    )


def _load_local(layout: Layout, *, cache_dir: Path | None) -> Any:
    import datasets

    files = f"{glob.escape(str(layout.folder.absolute()))}/{layout.pattern}"
    rows = datasets.load_dataset(
        "parquet",
        data_files={"train": files},
        split="train",
        streaming=True,
        columns=[_COLUMN],
        cache_dir=str(cache_dir) if cache_dir else None,
    )
    assert rows.n_shards == len(layout.files), (rows.n_shards, layout.files)
    return rows


def _first_length(table: pa.Table) -> int:
    length = pc.call_function("list_value_length", [table.column(_COLUMN)])[0].as_py()
    return int(length or 0)


def _table_matrix(table: pa.Table, *, stored: int, vocab_size: int) -> np.ndarray:
    parts, row = [], 0
    for block in table.column(_COLUMN).chunks:
        try:
            parts.append(_matrix(block, stored=stored, vocab_size=vocab_size))
        except _BadRow as bad:
            raise _BadRow(row + bad.row, str(bad)) from None
        row += len(block)
    return parts[0] if len(parts) == 1 else np.concatenate(parts)


# streaming --------------------------------------------------------------------------------------
class PretokenizedStream:
    """Windows of the stored rows in stored order, again from the first when the data end.

    Every rank decodes every row (about 40 million ids/s) and keeps its own. The state is the
    reader's position before the newest chunk of stored rows, and the global row within it; which
    chunks there are depends on the global position alone, so all ranks say the same.
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
        self._layout = find_layout(data)
        if self._layout is None:
            commit = _hub_commit(data)
            _check_same(data, _hub_fingerprint(data, commit, tokenizer_digest=tokenizer_digest))
            rows = _load_hub(data, commit, cache_dir=cache_dir)
        else:
            rows = _load_local(self._layout, cache_dir=cache_dir)
        self._reader = rows.with_format("arrow")
        self._first = copy.deepcopy(self._reader.state_dict())
        self._stored = 0  # ids per stored row, known from the first one on
        self.load_state_dict({"row": 0, "epoch": 0, "chunk_row": 0, "reader": self._first})

    @property
    def epoch(self) -> int:
        """Passes over the data that are complete."""
        return self._epoch

    def next_rows(self, n: int) -> np.ndarray:
        length = self._data.seq_len + 1
        out = np.empty((n, length), dtype=np.int64)
        end = self._row + n * self._world
        mine, filled = self._row + self._rank, 0
        while True:
            chunk_end = self._chunk_row + self._chunk_windows
            rows = np.arange(mine, min(end, chunk_end), self._world)
            if rows.size:
                out[filled : filled + rows.size] = self._cut(rows - self._chunk_row)
                filled += rows.size
                mine += rows.size * self._world
            if chunk_end >= end:  # also the other ranks' rows: all stop at the same chunk
                break
            self._next_chunk()
        self._row = end
        return out

    def state_dict(self) -> dict[str, Any]:
        return {
            "row": self._row,
            "epoch": self._epoch,
            "chunk_row": self._chunk_row,
            "reader": copy.deepcopy(self._chunk_state),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._row, self._epoch = int(state["row"]), int(state["epoch"])
        self._chunk_row = int(state["chunk_row"])
        self._chunk = np.empty((0, 0), dtype=np.int32)
        self._chunk_state = copy.deepcopy(state["reader"])
        self._seek(self._chunk_state)

    @property
    def _chunk_windows(self) -> int:
        """Windows in the chunk at hand."""
        if not len(self._chunk):
            return 0
        return len(self._chunk) * windows_per_row(self._stored, seq_len=self._data.seq_len)

    def _cut(self, windows: np.ndarray) -> np.ndarray:
        """(len(windows), seq_len + 1) ids of the chunk's windows of these numbers."""
        per_row = windows_per_row(self._stored, seq_len=self._data.seq_len)
        start = windows % per_row * self._data.seq_len
        columns = start[:, None] + np.arange(self._data.seq_len + 1)
        return self._chunk[(windows // per_row)[:, None], columns]

    def _seek(self, reader_state: dict[str, Any]) -> None:
        self._reader.load_state_dict(copy.deepcopy(reader_state))
        self._tables: Iterator[pa.Table] = self._reader.iter(batch_size=CHUNK_ROWS)
        self._upcoming = copy.deepcopy(reader_state)

    def _next_chunk(self) -> None:
        """Replace the chunk by the next one, which may be the first of the next epoch."""
        start = self._chunk_row + self._chunk_windows
        epoch = self._epoch
        table = self._next_table()
        if table is None:
            self._seek(self._first)
            epoch, table = epoch + 1, self._next_table()
        if table is None:
            raise DataError(f"{self._data.path} holds no rows of split {self._data.split}")
        if not self._stored:
            self._stored = _first_length(table)
            _check_seq_len(self._stored, seq_len=self._data.seq_len)
        state, self._upcoming = self._upcoming, copy.deepcopy(self._reader.state_dict())
        try:
            chunk = _table_matrix(table, stored=self._stored, vocab_size=self._vocab_size)
        except _BadRow as bad:
            raise DataError(f"{self._place(start, bad.row)} {bad}") from None
        self._chunk, self._chunk_row, self._chunk_state, self._epoch = chunk, start, state, epoch

    def _next_table(self) -> pa.Table | None:
        """The next stored rows, None at the end of the data."""
        try:
            return next((t for t in self._tables if len(t)), None)
        except Exception as error:  # the library's, the file system's and the HTTP client's
            start = self._chunk_row + self._chunk_windows
            raise DataError(
                f"{self._place(start, 0)} or after it cannot be read: {places.first_line(error)}"
            ) from error

    def _place(self, window: int, row: int) -> str:
        """`FILE: row N` of the stored row that lies `row` after that of global window `window`."""
        per_row = windows_per_row(self._stored, seq_len=self._data.seq_len) if self._stored else 1
        row += window // per_row
        if self._layout is None:
            return f"{self._data.path} ({self._data.split}): row {row}, counted over all passes,"
        counts = [pq.read_metadata(f).num_rows for f in self._layout.files]
        row %= max(1, sum(counts))
        ends = list(itertools.accumulate(counts))
        i = next(i for i, end in enumerate(ends) if row < end)
        return f"{self._layout.files[i]}: row {row - ends[i] + counts[i]}"
