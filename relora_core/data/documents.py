"""Documents of txt and jsonl files, plain or packed. Not for: their tokens (`text.py`).

A `.txt` file is one document, a line of a `.jsonl` file another; either may be packed (.gz, .xz,
.zst).
"""

from __future__ import annotations

import contextlib
import functools
import glob
import gzip
import hashlib
import io
import json
import lzma
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, cast

import pyarrow as pa

from relora_core.config import ConfigError, nearest
from relora_core.data import places
from relora_core.data.base import DataError

KINDS = (".txt", ".jsonl")
PACKINGS = ("", ".gz", ".xz", ".zst")
_EXPECTED = "a folder, file or glob of txt or jsonl (.gz, .xz, .zst)"
_UNREADABLE = (OSError, EOFError, zlib.error, lzma.LZMAError, pa.ArrowInvalid)


def find_files(path: str) -> list[tuple[str, Path]]:
    """(name relative to the folder or to the glob's fixed part, file), sorted by name."""
    place = Path(path).expanduser()
    if place.is_file():
        if not _is_text(place):
            raise ConfigError(f"data.path must be {_EXPECTED}, got {path!r}")
        return [(place.name, place)]
    if place.is_dir():
        root, found = place, [p for p in place.rglob("*") if not _hidden(p.relative_to(place))]
    elif glob.has_magic(path):
        fixed = [part for part in place.parts if not glob.has_magic(part)]
        first = next(i for i, part in enumerate(place.parts) if glob.has_magic(part))
        root = Path(*fixed[:first])
        found = [Path(p) for p in glob.glob(str(place), recursive=True)]
    else:
        raise places.missing("data.path", source=path, expected=_EXPECTED)
    files = sorted(
        (p.relative_to(root).as_posix(), p) for p in found if p.is_file() and _is_text(p)
    )
    if not files:
        endings = sorted({"".join(p.suffixes[-2:]) or p.name for p in found if p.is_file()})
        there = f"only {', '.join(endings[:5])}" if endings else "no file"
        raise ConfigError(f"data.path must be {_EXPECTED}, got {path!r}: it holds {there}")
    return files


def _hidden(relative: Path) -> bool:
    return any(part.startswith(".") for part in relative.parts)


def _is_text(path: Path) -> bool:
    return path.name.lower().endswith(tuple(k + p for k in KINDS for p in PACKINGS))


def fingerprint(files: list[tuple[str, Path]], *, text_field: str, tokenizer_digest: str) -> str:
    """sha256 over relative names, sizes and contents (as packed), text_field and tokenizer."""
    digest = hashlib.sha256(f"text 1 {tokenizer_digest} {text_field}".encode())
    for name, file in files:
        with _naming(file):
            content = _content(*places.looks([file]))
        digest.update(f"\n{name}\0{file.stat().st_size}\0".encode() + content)
    return digest.hexdigest()


@functools.lru_cache(maxsize=4096)
def _content(look: places.Look) -> bytes:
    """Kept while the file looks the same: a plan and its launch ask for it in turn."""
    with open(look[0], "rb") as stream:
        return hashlib.file_digest(stream, "sha256").digest()


@contextlib.contextmanager
def _naming(file: Path) -> Iterator[None]:
    """Turn whatever reading `file` raises into one line that names it."""
    try:
        yield
    except _UNREADABLE as error:
        raise DataError(f"{file} is damaged or unreadable: {places.first_line(error)}") from None


# documents --------------------------------------------------------------------------------------
def read(file: Path, *, text_field: str) -> Iterator[str]:
    """The documents of one file, in order. Raises DataError, naming file and line."""
    if not file.stat().st_size:
        raise DataError(f"{file} is empty (0 bytes)")
    count = 0
    with _naming(file), _unpacked(file) as stream:
        if _kind(file) == ".txt":
            found: Iterable[str] = [_decoded(stream.read(), file=file)]
        else:
            found = _records(stream, file=file, text_field=text_field)
        for count, text in enumerate(found, 1):  # noqa: B007 (read after the loop)
            yield text
    if not count:
        raise DataError(f"{file} holds no document")


def _kind(file: Path) -> str:
    name = file.name.lower()
    return next(k for k in KINDS if name.endswith(tuple(k + p for p in PACKINGS)))


def _unpacked(file: Path) -> BinaryIO:
    packing = file.suffix.lower()
    if packing == ".gz":
        return cast(BinaryIO, gzip.open(file, "rb"))
    if packing == ".xz":
        return cast(BinaryIO, lzma.open(file, "rb"))
    if (
        packing == ".zst"
    ):  # Arrow's reader refuses a truncated frame, zstandard's takes it for the end
        return cast(BinaryIO, io.BufferedReader(pa.input_stream(str(file), compression="zstd")))
    return open(file, "rb")


def _decoded(raw: bytes, *, file: Path) -> str:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise DataError(
            f"{file} line {line}: byte 0x{raw[error.start]:02x} is not UTF-8 ({error.reason})"
        ) from None


def _records(stream: Iterable[bytes], *, file: Path, text_field: str) -> Iterator[str]:
    """The texts of a jsonl file; blank lines are passed over."""
    for number, line in enumerate(stream, 1):
        if not line.strip():
            continue
        where = f"{file} line {number}"
        try:
            record = json.loads(line)
        except UnicodeDecodeError as error:
            raise DataError(f"{where}: bytes that are not UTF-8 ({error.reason})") from None
        except (ValueError, RecursionError) as error:
            raise DataError(f"{where}: no valid JSON: {places.first_line(error)}") from None
        yield _text(record, where=where, text_field=text_field)


def _text(record: Any, *, where: str, text_field: str) -> str:
    if not isinstance(record, dict):
        raise DataError(f"{where}: expected a JSON object, got {type(record).__name__}")
    if text_field not in record:
        raise DataError(
            f"{where}: no key {text_field!r} (data.text_field), got keys {', '.join(record)}."
            f"{nearest(text_field, list(record))}"
        )
    text = record[text_field]
    if not isinstance(text, str):
        raise DataError(f"{where}: {text_field!r} must be a string, got {type(text).__name__}")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise DataError(f"{where}: {text_field!r} holds half a surrogate pair") from None
    return text
