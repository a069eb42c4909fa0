"""Documents of txt, jsonl and parquet files, plain or packed. Not for: their tokens (`text.py`).

A `.txt` file is one document, or several with `<|endoftext|>` between them; a line of a `.jsonl`
file is one, a row of a `.parquet` file another. txt and jsonl may be packed (.gz, .xz, .zst).
No more than a few MB of a document are in memory at once, except for the one line of a jsonl file.
"""

from __future__ import annotations

import codecs
import contextlib
import fnmatch
import functools
import glob
import gzip
import hashlib
import io
import itertools
import json
import lzma
import re
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, cast

import pyarrow as pa
import pyarrow.parquet as pq
import zstandard

from relora_core.config import ConfigError, nearest
from relora_core.data import places
from relora_core.data.base import DataError

KINDS = (".txt", ".jsonl", ".ndjson", ".json", ".parquet")
PACKINGS = ("", ".gz", ".xz", ".zst")
ENDINGS = (
    tuple(kind + packing for kind in (".txt", ".jsonl") for packing in PACKINGS),
    tuple(kind + packing for kind in (".ndjson", ".json") for packing in PACKINGS[1:]),
    (".ndjson", ".parquet"),
    (".json",),  # often a note beside data; taken where it alone is named
)
"""Endings of data files, by preference. A folder's first match is read; a note names the rest."""
OTHERS = (".arrow", ".bz2", ".csv", ".tsv", ".json", ".parquet", ".zip", ".tar", ".tgz", ".7z")
"""Endings that may well be data, in a folder where they are not read."""

SEPARATOR = "<|endoftext|>"
LONG = 2**20
"""Characters beyond which a document comes in pieces."""
LONGEST_LINE = 2**28
"""Bytes of one jsonl record; reading it takes some times that."""
ROWS = 256
"""Parquet rows decoded at a time."""

Document = str | Iterator[str]
"""Its text, or the pieces of a long one."""

_EXPECTED = "a folder, file or glob of txt, jsonl (.gz, .xz, .zst), json.gz or parquet"
UNREADABLE = (
    *(OSError, EOFError, zlib.error, lzma.LZMAError, zstandard.ZstdError),
    *(pa.ArrowInvalid, pa.ArrowNotImplementedError),
)


class DataFiles(NamedTuple):
    """The files of a path, and one line for each kind that was left out or comes twice."""

    files: list[tuple[str, Path]]
    notes: list[str]


# files ------------------------------------------------------------------------------------------
def find_files(path: str) -> list[tuple[str, Path]]:
    """(name relative to the folder or to the glob's fixed part, file), sorted by name."""
    return find(path).files


def find(path: str) -> DataFiles:
    """`find_files` with notes on them. Raises ConfigError."""
    place = places.expand(path)
    if place.is_file():
        if not _has_ending(place.name, itertools.chain(*ENDINGS)):
            raise ConfigError(f"data.path must be {_EXPECTED}, got {path!r}")
        return DataFiles([(place.name, place)], [])
    if place.is_dir():
        candidates, notes = places.walk(place)
    elif glob.has_magic(path):
        candidates, notes = _match_glob(place)
    else:
        raise places.path_error("data.path", source=path, expected=_EXPECTED)
    named = not place.is_dir() and place.suffix.lower() == ".json"
    for endings in ENDINGS if named else ENDINGS[:-1]:
        if files := [(name, file) for name, file in candidates if _has_ending(name, endings)]:
            break
    else:
        endings = sorted({"".join(file.suffixes[-2:]) or file.name for _, file in candidates})
        has = f"only {', '.join(endings[:5])}" if endings else "no file"
        has += ". Ids in train.bin are data=pretokenized" if ".bin" in endings else ""
        raise ConfigError(f"data.path must be {_EXPECTED}, got {path!r}: it holds {has}")
    try:
        files, doubles = drop_doubles(files)
    except DataError as error:
        raise ConfigError(f"data.path: {error}") from None
    chosen = {name for name, _ in files}
    data = (*itertools.chain(*ENDINGS), *OTHERS)
    unread = [
        n for n, _ in candidates if n not in chosen and n not in doubles and _has_ending(n, data)
    ]
    if unread:
        notes.append(
            f"not read beside {_kinds(chosen)}: {places.shorten(unread)} (a glob can name them)"
        )
    if doubles:
        notes.append(
            f"left out, as the same text lies unpacked or packed beside: {places.shorten(doubles)}"
        )
    _check_splits(files, path=path)
    return DataFiles(files, [*notes, *_remarks(files)])


def _has_ending(name: str, endings: Iterable[str]) -> bool:
    return name.lower().endswith(tuple(endings))


def _unescape(part: str) -> str:
    """Inverse of glob.escape."""
    return re.sub(r"\[([*?[])\]", r"\1", part)


def _is_literal(part: str) -> bool:
    """Whether this part of a glob stands for one name."""
    return glob.escape(_unescape(part)) == part


def _kinds(names: Iterable[str]) -> str:
    return " and ".join(sorted({_kind(name).lstrip(".") for name in names}))


def _kind(name: str) -> str:
    """`.txt` of `a.TXT.gz`."""
    return next(k for k in KINDS if _has_ending(name, (k + packing for packing in PACKINGS)))


def _match_glob(pattern: Path) -> tuple[list[tuple[str, Path]], list[str]]:
    """(name, file) of what a glob matches, and notes on what was skipped. A file is taken once.

    glob itself would follow circles of links without an end at `**`.
    """
    parts, notes = pattern.parts, []
    root = Path(*map(_unescape, itertools.takewhile(_is_literal, parts[:-1])))
    depth = parts.index("**") if "**" in parts else len(parts)
    paths = [Path(p) for p in sorted(glob.glob(str(Path(*parts[:depth]))))]
    if depth < len(parts):
        walks = [places.walk(folder) for folder in paths if folder.is_dir()]
        notes = list(dict.fromkeys(note for _, skips in walks for note in skips))
        paths = [f for files, _ in walks for n, f in files if _matches(n.split("/"), parts[depth:])]
    ways: dict[Path, Path] = {}
    for file in filter(Path.is_file, paths):
        place = file.parent.resolve() / file.name
        if place not in ways or root.resolve() / file.relative_to(root) == place:
            ways[place] = file
    unique = set(ways.values())
    doubles = [f.relative_to(root).as_posix() for f in paths if f.is_file() and f not in unique]
    if doubles:
        notes.append(f"reached by a second way, read once: {places.shorten(doubles)}")
    return sorted((file.relative_to(root).as_posix(), file) for file in unique), notes


def _matches(names: list[str], pattern: tuple[str, ...]) -> bool:
    """`**` matches any number of folders; at the end, everything below."""
    if not pattern or not names:
        return not pattern and not names
    if pattern[0] == "**":
        return len(pattern) == 1 or any(_matches(names[k:], pattern[1:]) for k in range(len(names)))
    return fnmatch.fnmatchcase(names[0], pattern[0]) and _matches(names[1:], pattern[1:])


def drop_doubles(
    files: list[tuple[str, Path]],
) -> tuple[list[tuple[str, Path]], list[str]]:
    """(files without those that repeat another's text in other packing, names of the repeats)."""
    packed: dict[str, list[tuple[str, Path]]] = {}
    for name, file in files:
        stem = re.sub(r"\.(gz|xz|zst)$", "", name, flags=re.IGNORECASE)
        packed.setdefault(stem, []).append((name, file))
    doubles = []
    for group in packed.values():
        contents = set()
        for name, file in group if len(group) > 1 else []:  # the unpacked one sorts first
            with _name_errors(file):
                content = _hash_unpacked(places.read_stamps([file])[0])
            doubles += [name] if content in contents else []
            contents.add(content)
    return [(name, file) for name, file in files if name not in doubles], doubles


@functools.lru_cache(maxsize=1024)
def _hash_unpacked(stamp: places.Stamp) -> bytes:
    with open_unpacked(Path(stamp[0])) as stream:
        return hashlib.file_digest(stream, "sha256").digest()  # type: ignore[arg-type]


def _remarks(files: list[tuple[str, Path]]) -> list[str]:
    """Notes on files that are read, but perhaps by mistake."""
    remarks, by_place = [], {}
    stems = Counter(re.sub(r"\.(gz|xz|zst)$", "", n, flags=re.IGNORECASE) for n, _ in files)
    if pairs := [stem for stem, count in stems.items() if count > 1]:
        remarks.append(
            f"packed and unpacked files of one name that differ, both read: {places.shorten(pairs)}"
        )
    for name, file in files:
        at = file.stat()
        by_place.setdefault((at.st_dev, at.st_ino), []).append(name)
    if aliases := [" = ".join(names) for names in by_place.values() if len(names) > 1]:
        remarks.append(
            f"names of one and the same file, read once for each: {places.shorten(aliases)}"
        )
    splits = {word for name, _ in files for word in re.split("[^a-z]+", name.lower())}
    if "train" in splits and len(splits := sorted(splits & {*places.SPLITS})) > 1:
        remarks.append(
            f"{' and '.join(splits)} by their names, all read: a glob can name one split"
        )
    return remarks


def _check_splits(files: list[tuple[str, Path]], *, path: str) -> None:
    """A hub data set has its splits side by side; a test set must not be trained on."""
    tables = [name for name, file in files if file.suffix == ".parquet"]
    splits = sorted({split for name in tables if (split := places.split_of(name))})
    if len(splits) > 1:
        wanted = "train" if "train" in splits else splits[0]
        file = next(file for name, file in files if places.split_of(name) == wanted)
        start = wanted if file.name.startswith(wanted) else ""
        raise ConfigError(
            f"data.path must name one split, got {path!r} with {', '.join(splits)}; a glob does, "
            f"such as '{file.parent}/{start}*.parquet'"
        )


def fingerprint(files: list[tuple[str, Path]], *, text_field: str, tokenizer_digest: str) -> str:
    """sha256 over relative names, sizes and contents (as packed), text_field and tokenizer.

    Features that earlier versions read differently (a byte order mark, separators) count too, so
    that no run continues with other documents.
    """
    digest = hashlib.sha256(f"text 1 {tokenizer_digest} {text_field}".encode())
    for name, file in files:
        with _name_errors(file):
            stamp = places.read_stamps([file])[0]
            digest.update(f"\n{name}\0{stamp[1]}\0".encode() + _hash_content(stamp))
            if _kind(name) == ".txt":
                digest.update(_find_marks(stamp))
    return digest.hexdigest()


@functools.lru_cache(maxsize=4096)
def _hash_content(stamp: places.Stamp) -> bytes:
    """Kept while the file looks the same: a plan and its launch ask for it in turn."""
    with open(stamp[0], "rb") as stream:
        return hashlib.file_digest(stream, "sha256").digest()


@functools.lru_cache(maxsize=4096)
def _find_marks(stamp: places.Stamp) -> bytes:
    """What is special about reading a txt file; empty for most."""
    mark, separator = codecs.BOM_UTF8, SEPARATOR.encode()
    special, tail, start = b"", b"", True
    with open_unpacked(Path(stamp[0])) as stream:
        while block := stream.read(LONG):
            special += b"\0mark" if start and block.startswith(mark) else b""
            if separator in tail + block:
                return special + b"\0separated"
            tail, start = block[-len(separator) :], False
    return special


@contextlib.contextmanager
def _name_errors(file: Path) -> Iterator[None]:
    """Turn any error while reading `file` into one line that names it."""
    try:
        yield
    except UNREADABLE as error:
        raise DataError(f"{file} is damaged or unreadable: {places.first_line(error)}") from None


# documents --------------------------------------------------------------------------------------
def read(file: Path, *, text_field: str, skipped: Counter[str] | None = None) -> Iterator[Document]:
    """The documents of one file, in order. Raises DataError, naming file and line.

    The pieces of a long document must be taken before the next one. `skipped` counts the records
    with a null text. A file may hold only such records; a parquet file may have no rows.
    """
    if not file.stat().st_size:
        raise DataError(f"{file} is empty (0 bytes)")
    skipped = Counter() if skipped is None else skipped
    count, nulls = 0, skipped["null"]
    kind = _kind(file.name)
    with _name_errors(file), contextlib.ExitStack() as stack:
        if kind == ".parquet":
            texts = _slice(_rows(file, text_field=text_field, skipped=skipped))
        else:
            stream = stack.enter_context(open_unpacked(file))
            _check_encoding(stream, file=file)
            if kind == ".txt":
                texts = _group_pieces(_split(stream, file=file))
            else:
                texts = _slice(_records(stream, file=file, text_field=text_field, skipped=skipped))
        for count, text in enumerate(texts, 1):  # noqa: B007 (read after the loop)
            yield text
    if not count and kind != ".parquet" and skipped["null"] == nulls:
        raise DataError(f"{file} holds no document")


def pieces(document: Document) -> Iterator[str]:
    return iter([document]) if isinstance(document, str) else document


def _slice(texts: Iterable[str]) -> Iterator[Document]:
    for text in texts:
        if len(text) <= LONG:
            yield text
        else:
            yield (text[i : i + LONG] for i in range(0, len(text), LONG))


def _group_pieces(flat: Iterator[tuple[str, bool]]) -> Iterator[Document]:
    """Documents of (piece, whether it is its document's last)."""
    for text, last in flat:
        if last:
            yield text
            continue
        rest = _take_document(flat)
        yield itertools.chain([text], rest)
        for _ in rest:  # what was not taken
            pass


def _take_document(flat: Iterator[tuple[str, bool]]) -> Iterator[str]:
    for text, last in flat:
        yield text
        if last:
            return


def open_unpacked(file: Path) -> BinaryIO:
    """The file's content. Reading raises one of UNREADABLE where it is damaged."""
    packing = file.suffix.lower()
    if packing == ".gz":
        return cast(BinaryIO, gzip.open(file, "rb"))
    if packing == ".xz":
        return cast(BinaryIO, lzma.open(file, "rb"))
    if packing == ".zst":
        return cast(BinaryIO, io.BufferedReader(_Zstandard(file), 2**17))
    return open(file, "rb")


class _Zstandard(io.RawIOBase):
    """Frames of any window (`zstd --long`), one after the other; EOFError where one is cut short.

    Arrow's reader refuses long windows; zstandard's own mistakes a cut for the end.
    """

    def __init__(self, file: Path) -> None:
        self._file = open(file, "rb")  # noqa: SIM115 (closed with this)
        self._frame: Any = None
        self._packed = self._ready = b""

    def readable(self) -> bool:
        return True

    def close(self) -> None:
        self._file.close()
        super().close()

    def readinto(self, buffer: Any) -> int:
        while not self._ready:
            self._packed = self._packed or self._file.read(2**12)  # 128 MB at most
            if not self._packed:
                if self._frame is not None:
                    raise EOFError("the file ends within a zstandard frame")
                return 0
            if self._frame is None:
                unpack = zstandard.ZstdDecompressor(max_window_size=2**31)
                self._frame = unpack.decompressobj()
            self._ready = self._frame.decompress(self._packed)
            self._packed = self._frame.unused_data if self._frame.eof else b""
            self._frame = None if self._frame.eof else self._frame
        count = min(len(buffer), len(self._ready))
        buffer[:count], self._ready = self._ready[:count], self._ready[count:]
        return count


def _check_encoding(stream: BinaryIO, *, file: Path) -> None:
    """Refuse UTF-16 and UTF-32: read as UTF-8 they would only cause confusing errors later."""
    start = cast(io.BufferedReader, stream).peek(4)[:4]
    if start.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE, codecs.BOM_UTF32_BE)):
        raise DataError(
            f"{file} is UTF-16 or UTF-32 by its byte order mark, expected UTF-8: "
            f"`iconv -t UTF-8` converts it"
        )


# txt --------------------------------------------------------------------------------------------
def _split(stream: BinaryIO, *, file: Path) -> Iterator[tuple[str, bool]]:
    """(piece, whether it is the last of its document). Line breaks beside a separator are its own.

    A file without separators is one document, unchanged.
    """
    text, begun, several = "", False, False  # begun: a piece of this document is out
    for block in _decode(stream, file=file):
        text += block
        *ended, text = text.split(SEPARATOR)
        for part in ended:
            part = part.rstrip("\r\n")
            part = part.lstrip("\r\n") if several and not begun else part
            if begun or part.strip():
                yield part, True
            begun, several = False, True
        while len(text) > LONG:  # what stays may hold the beginning of a separator
            text = text.lstrip("\r\n") if several and not begun else text
            cut = _cut(text)
            yield text[:cut], False
            text, begun = text[cut:], True
    text = text.lstrip("\r\n") if several and not begun else text
    if begun or not several or text.strip():
        yield text, True


def _cut(text: str) -> int:
    """Where a piece may end: before the white space after a letter or digit, where most
    tokenizers begin anew."""
    first, last = LONG // 2, LONG * 3 // 4
    for space in "\n ":
        at = text.rfind(space, first, last)
        while at > 0 and not text[at - 1].isalnum():
            at = text.rfind(space, first, at)
        if at > 0:
            return at
    return last


def _decode(stream: BinaryIO, *, file: Path) -> Iterator[str]:
    """Text of a file without its byte order mark, some at a time."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    line, start, ended = 1, True, False
    while not ended:
        block = stream.read(LONG // 4)
        ended = not block
        try:
            text = decoder.decode(block, final=ended)
        except UnicodeDecodeError as error:
            line += error.object.count(b"\n", 0, error.start)
            byte = error.object[error.start]
            raise DataError(
                f"{file} line {line}: byte 0x{byte:02x} is not UTF-8 ({error.reason})"
            ) from None
        yield text.removeprefix("\ufeff") if start else text
        line += text.count("\n")
        start = start and not text


# jsonl and parquet ------------------------------------------------------------------------------
def _records(
    stream: BinaryIO, *, file: Path, text_field: str, skipped: Counter[str]
) -> Iterator[str]:
    """The texts of a jsonl file; blank lines and null texts are passed over."""
    for number in itertools.count(1):
        line = stream.readline(LONGEST_LINE + 1)
        where = f"{file} line {number}"
        if not line:
            return
        if len(line) > LONGEST_LINE:
            raise DataError(f"{where}: more than {LONGEST_LINE >> 20} MiB in one line of jsonl")
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except UnicodeDecodeError as error:
            raise DataError(f"{where}: bytes that are not UTF-8 ({error.reason})") from None
        except (ValueError, RecursionError) as error:
            raise DataError(f"{where}: no valid JSON: {places.first_line(error)}") from None
        del line
        if (text := _text(record, where=where, text_field=text_field)) is None:
            skipped["null"] += 1
        else:
            yield text


def _text(record: Any, *, where: str, text_field: str) -> str | None:
    """The record's text: under that key, else along its parts (`a.b`); None where it is null."""
    if not isinstance(record, dict):
        raise DataError(f"{where}: expected a JSON object, got {type(record).__name__}")
    text, parts = record, [text_field] if text_field in record else text_field.split(".")
    for part in parts:
        if text is None:
            return None
        if not isinstance(text, dict) or part not in text:
            keys = list(text) if isinstance(text, dict) else list(record)
            raise DataError(
                f"{where}: no key {text_field!r} (data.text_field), got keys {', '.join(keys)}."
                f"{nearest(part, keys)}"
            )
        text = text[part]
    if text is None:
        return None
    if not isinstance(text, str):
        raise DataError(f"{where}: {text_field!r} must be a string, got {type(text).__name__}")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise DataError(f"{where}: {text_field!r} holds half a surrogate pair") from None
    return text


def _rows(file: Path, *, text_field: str, skipped: Counter[str]) -> Iterator[str]:
    """The texts of a parquet file's column, or of a field within a column (`a.b`)."""
    with pq.ParquetFile(file) as parquet:
        names = parquet.schema_arrow.names
        parts = [text_field] if text_field in names else text_field.split(".")
        if not parquet.metadata.num_rows:
            return
        if parts[0] not in names:
            raise DataError(
                f"{file}: no column {text_field!r} (data.text_field), got columns "
                f"{', '.join(names)}.{nearest(parts[0], names)}"
                + (" Rows of ids are data=pretokenized." if "input_ids" in names else "")
            )
        start = 0
        for batch in parquet.iter_batches(ROWS, columns=[text_field], use_threads=False):
            values = batch.column(0).to_pylist()
            for number, value in enumerate(values, start):
                where = f"{file} row {number}"
                text = _text({parts[0]: value}, where=where, text_field=text_field)
                if text is None:
                    skipped["null"] += 1
                else:
                    yield text
            start += len(values)
