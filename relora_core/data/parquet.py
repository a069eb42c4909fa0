"""Parquet files of rows of ids: find them, read their footers, check rows against these.

Not for: serving rows to a trainer (`pretokenized.py`).
"""

from __future__ import annotations

import functools
import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from relora_core.config import ConfigError, DataConfig, nearest
from relora_core.data import places
from relora_core.data.base import DataError

CHUNK_ROWS = 256
"""Stored rows decoded at a time: 2 MB of int32 as published."""
SCANNED_IDS = 2**24
"""Ids that planning decodes at most, about half a second; the rest is checked as it is served."""
HASHED_WHOLE = 256 * 2**20
"""Bytes up to which the fingerprint covers the files' contents; beyond, their footers."""

SAMPLED_BLOCKS, SAMPLED_BYTES = 2048, 4096
"""Of files beyond that, what `sample` reads at most: blocks, and bytes of each."""

EXPECTED = "a local folder or file of parquet, or the name of a hub data set"
COLUMN = "input_ids"
DAMAGED = (pa.ArrowInvalid, pa.ArrowNotImplementedError, OSError)


# files ------------------------------------------------------------------------------------------
def find_files(data: DataConfig) -> list[Path] | None:
    """The local files that hold the split, in order, or None where data.path is nothing local.

    Raises ConfigError for a folder without parquet files of that split.
    """
    path = places.expand(str(data.path))
    if path.is_file():
        return [path]
    if not path.is_dir():
        return None
    for folder in (path / "data", path):
        names = sorted(p.name for p in folder.glob("*.parquet") if not p.name.startswith("."))
        if names:
            break
    else:
        ids = path / f"{data.split}.bin"
        return [ids] if ids.is_file() else _find_below(path, data=data)
    chosen = [n for n in names if n == f"{data.split}.parquet" or n.startswith(f"{data.split}-")]
    splits = sorted({s for n in names if (s := places.split_of(n))})
    if not splits:  # files that name no split are all of the one there is
        splits, chosen = ["train"], names if data.split == "train" else []
    if not chosen:
        raise ConfigError(
            f"data.split must be one of {', '.join(splits)} (in {folder}), got {data.split!r}."
            f"{nearest(data.split, splits)}"
        )
    return [folder / n for n in chosen]


def _find_below(path: Path, *, data: DataConfig) -> list[Path]:
    """Files in the hub's other layouts: `default/train/0000.parquet`, `split=train/0.parquet`."""
    candidates = [(name, file) for name, file in places.walk(path)[0] if name.endswith(".parquet")]
    if not candidates and (ids := sorted(file.stem for file in path.glob("*.bin"))):
        raise ConfigError(
            f"data.split must be one of {', '.join(ids)} (*.bin in {path}), got {data.split!r}."
            f"{nearest(data.split, ids)}"
        )
    if not candidates:
        raise ConfigError(f"data.path must be {EXPECTED}, got {data.path!r}: no *.parquet in it")
    split_by_name = {name: places.split_of(name) for name, _ in candidates}
    splits = sorted({split for split in split_by_name.values() if split}) or ["train"]
    if data.split not in splits:
        raise ConfigError(
            f"data.split must be one of {', '.join(splits)} (below {path}), got {data.split!r}."
            f"{nearest(data.split, splits)}"
        )
    chosen = {
        n
        for n, split in split_by_name.items()
        if split == data.split or not any(split_by_name.values())
    }
    configs = {n.split("/")[0] for n in chosen if data.split in n.split("/")[1:]}
    if len(configs) > 1:
        raise ConfigError(
            f"data.path must name one configuration of {data.path!r}, which holds "
            f"{places.shorten(configs)}; for example {str(path / min(configs))!r}"
        )
    return [file for name, file in candidates if name in chosen]


def note_unread(data: DataConfig, files: list[Path]) -> list[str]:
    """One line on the files of this split, or of no named split, that are not read."""
    path = places.expand(str(data.path))
    if not path.is_dir():
        return []
    candidates, skips = places.walk(path)
    unread = [
        name
        for name, file in candidates
        if name.endswith(".parquet") and file not in files
        if places.split_of(name) in (None, data.split)
    ]
    if unread:
        skips.append(f"parquet files that are not read: {places.shorten(unread)}")
    return skips


# rows -------------------------------------------------------------------------------------------
class BadRow(ValueError):
    """Row `row` of a block (counted from 0) is wrong."""

    def __init__(self, row: int, what: str) -> None:
        super().__init__(what)
        self.row = row


def _matrix(block: Any, *, stored: int, vocab_size: int) -> np.ndarray:
    """(rows, stored) ids of a block of lists, without a copy; BadRow at the first wrong row."""
    if pa.types.is_list_view(block.type) or pa.types.is_large_list_view(block.type):
        block = block.cast(pa.large_list(block.type.value_type))  # these may share ids: a copy
    lengths = pc.call_function("list_value_length", [block]).fill_null(-1)
    lengths = lengths.to_numpy(zero_copy_only=False)
    if (wrong := lengths != stored).any():
        row = int(wrong.argmax())
        what = f"holds {lengths[row]} ids, expected {stored}" if lengths[row] >= 0 else "is null"
        raise BadRow(row, what)
    flat = block.flatten()
    if flat.null_count:
        place = flat.is_null().to_numpy(zero_copy_only=False).argmax()
        raise BadRow(int(place) // stored, "holds a null id")
    ids = flat.to_numpy(zero_copy_only=True).reshape(-1, stored)
    if ids.size and (ids.min() < 0 or ids.max() >= vocab_size):
        outside = (ids < 0) | (ids >= vocab_size)
        row, column = np.argwhere(outside)[0]
        raise BadRow(
            int(row),
            f"holds id {ids[row, column]} at position {column}, expected ids in [0, {vocab_size}) "
            f"(data.vocab_size)",
        )
    return ids


def windows_per_row(stored: int, *, seq_len: int) -> int:
    """Windows of seq_len + 1 ids, overlapping by one, that a stored row is cut into."""
    return (stored - 1) // seq_len


def first_length(table: pa.Table) -> int:
    length = pc.call_function("list_value_length", [table.column(COLUMN)])[0].as_py()
    return int(length or 0)


def table_matrix(table: pa.Table, *, stored: int, vocab_size: int) -> np.ndarray:
    parts, row = [], 0
    for block in table.column(COLUMN).chunks:
        try:
            parts.append(_matrix(block, stored=stored, vocab_size=vocab_size))
        except BadRow as bad:
            raise BadRow(row + bad.row, str(bad)) from None
        row += len(block)
    return parts[0] if len(parts) == 1 else np.concatenate(parts)


# planning ---------------------------------------------------------------------------------------
@dataclass(slots=True)
class Footer:
    """What a parquet file's footer tells of `input_ids`, by row group."""

    file: Path
    rows: list[int]
    ids: list[int]
    """Ids per row group; a null or empty row counts as one."""
    ranges: list[tuple[int, int] | None]
    """(smallest, largest) id per row group, None where the writer left it out."""


def read_footer(file: Path) -> Footer:
    """Raises ConfigError for a file that is empty, damaged, or of another schema."""
    try:
        if not file.stat().st_size:
            raise ConfigError(f"data.path: {file} is empty (0 bytes), expected a parquet file")
        with pq.ParquetFile(file) as parquet:
            schema, meta = parquet.schema_arrow, parquet.metadata
    except DAMAGED as error:
        raise ConfigError(
            f"data.path: {file} is no readable parquet file: {places.first_line(error)}"
        ) from None
    if not meta.num_rows and COLUMN in schema.names:
        return Footer(file, [], [], [])  # of an empty shard's column the type may be null
    check_schema(file, schema)
    leaves = [
        i for i in range(meta.num_columns) if meta.schema.column(i).path.split(".")[0] == COLUMN
    ]
    footer = Footer(file, [], [], [])
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


def check_schema(file: Path, schema: pa.Schema) -> None:
    if COLUMN not in schema.names:
        raise ConfigError(
            f"data.path: {file} must have a column {COLUMN}, got columns "
            f"{', '.join(schema.names) or '(none)'}.{nearest(COLUMN, schema.names)}"
        )
    kind = schema.field(COLUMN).type
    lists = (
        *(pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list),
        *(pa.types.is_list_view, pa.types.is_large_list_view),
    )
    if not any(is_list(kind) for is_list in lists) or not pa.types.is_integer(kind.value_type):
        raise ConfigError(
            f"data.path: column {COLUMN} of {file} must hold lists of integers, got {kind}"
        )


def stored_length(footers: list[Footer], *, seq_len: int) -> int:
    """Ids per stored row, from the footers' counts; ConfigError unless one length fits all."""
    length = None
    for footer in footers:
        for rows, ids in zip(footer.rows, footer.ids, strict=True):
            if not rows:
                continue
            length = length or ids / rows
            if ids != rows * length or length != int(length):
                raise ConfigError(
                    f"data.path: rows of {COLUMN} must all have one length, got {ids} ids in a "
                    f"group of {rows} rows of {footer.file}, expected {length:g} per row"
                )
    assert length, "the caller has seen rows"
    check_seq_len(int(length), seq_len=seq_len)
    return int(length)


def check_seq_len(stored: int, *, seq_len: int) -> None:
    if stored < 2:
        raise ConfigError(f"data.path: rows of {COLUMN} must hold at least 2 ids, got {stored}")
    if seq_len > stored - 1:
        raise ConfigError(
            f"data.seq_len must be in [1, {stored - 1}] (the stored rows hold {stored} ids), got "
            f"{seq_len}; nearest valid: {stored - 1}"
        )


def length_notes(stored: int, *, seq_len: int) -> list[str]:
    windows = windows_per_row(stored, seq_len=seq_len)
    tail = stored - 1 - windows * seq_len
    if stored - 1 == seq_len:
        return []
    return [
        f"each stored row of {stored} ids gives {windows} sequences of data.seq_len={seq_len}"
        + (f"; its last {tail} ids are not used" if tail else "")
    ]


def check_ids(footer: Footer, *, vocab_size: int) -> None:
    for low, high in filter(None, footer.ranges):
        if low < 0 or high >= vocab_size:
            bad = low if low < 0 else high
            raise ConfigError(
                f"data.vocab_size={vocab_size}: {footer.file} holds id {bad}, expected ids in "
                f"[0, {vocab_size})" + (f"; nearest valid: {high + 1}" if low >= 0 else "")
            )


def scan(footers: list[Footer], *, stored: int, vocab_size: int) -> list[str]:
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


def _scan_group(footer: Footer, group: int, *, stored: int, vocab_size: int) -> None:
    row = sum(footer.rows[:group])
    try:
        with pq.ParquetFile(footer.file) as parquet:
            batches = parquet.iter_batches(CHUNK_ROWS, row_groups=[group], columns=[COLUMN])
            for batch in batches:
                _matrix(batch.column(0), stored=stored, vocab_size=vocab_size)
                row += len(batch)
    except BadRow as bad:
        raise DataError(f"{footer.file}: row {row + bad.row} {bad}") from None
    except DAMAGED as error:
        raise DataError(
            f"{footer.file} is damaged near row {row}: {places.first_line(error)}"
        ) from None


def fingerprint(files: list[Path], *, tokenizer_digest: str | None) -> str:
    """sha256 over names and sizes, and contents (or footers, where there is too much to read).

    Kept while the files look the same: a plan and its launch ask for it in turn.
    """
    return _fingerprint(places.read_stamps(files), tokenizer_digest, contents=_hashes_whole(files))


@functools.lru_cache(maxsize=64)
def _fingerprint(
    stamps: tuple[places.Stamp, ...], tokenizer_digest: str | None, *, contents: bool
) -> str:
    files = [Path(stamp[0]) for stamp in stamps]
    digest = hashlib.sha256(f"pretokenized 1 {tokenizer_digest}".encode())
    for file in files:
        size = file.stat().st_size
        digest.update(f"\n{file.name}\0{size}\0".encode())
        with open(file, "rb") as stream:
            if contents:
                digest.update(hashlib.file_digest(stream, "sha256").digest())
            elif file.suffix == ".bin":  # no footer: its ends stand for it
                digest.update(stream.read(2**20))
                stream.seek(-(2**20), 2)
                digest.update(stream.read())
            else:
                stream.seek(-8, 2)  # the footer's length and the magic number end the file
                stream.seek(-8 - int.from_bytes(stream.read(4), "little"), 2)
                digest.update(stream.read())
    return digest.hexdigest()


def _hashes_whole(files: list[Path]) -> bool:
    return sum(f.stat().st_size for f in files) <= HASHED_WHOLE


def sample(files: list[Path]) -> str | None:
    """sha256 over blocks spread evenly over the files; None where the fingerprint covers them all.

    A footer does not show every change: ids of equal number, range and packed size may differ. At
    most SAMPLED_BLOCKS are read, so a change of a few rows between them escapes; that of a file or
    a row group as a whole does not.
    """
    if _hashes_whole(files):
        return None
    digest = hashlib.sha256(b"blocks 1")
    step = max(SAMPLED_BYTES, sum(f.stat().st_size for f in files) // SAMPLED_BLOCKS)
    begin = 0  # of the file, in all files joined
    for file in files:
        size = file.stat().st_size
        with open(file, "rb") as stream:
            for at in range(-begin % step, size, step):
                stream.seek(at)
                digest.update(stream.read(SAMPLED_BYTES))
        begin += size
    return digest.hexdigest()
