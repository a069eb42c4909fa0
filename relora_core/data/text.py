"""Documents in txt or jsonl files, tokenised once into a memory-mapped cache, served as rows.

    CACHE_DIR/tokens-<fingerprint>/
        ids.bin         every document's ids and its EOS, one after the other; uint16 or uint32
        documents.npy   where each document starts, int64, and the end of the last
        meta.json       counts and types, to know a damaged cache by
        digests.json    sha256 of both arrays, and how their files looked when it was taken

Not for: rows that are already ids (`pretokenized.py`).
"""

from __future__ import annotations

import array
import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from relora_core import atomic, shared
from relora_core.config import ConfigError, DataConfig
from relora_core.data import documents, places
from relora_core.data.base import DataError, DataInfo, RowStream
from relora_core.data.tokenizer import HFTokenizer

BATCH_CHARACTERS = 2**21
"""Text encoded at a time; bounds the memory that building a cache takes to some 100 MB."""
CHECKED_CHARACTERS = 2**28
"""Text that planning reads at most (some seconds); the rest is checked when it is tokenised."""
COUNTED_CHARACTERS = 2**20
"""Text up to which planning counts the tokens, to tell data that are shorter than one sequence."""


def inspect(
    data: DataConfig,
    *,
    vocab_size: int,
    tokenizer: HFTokenizer,
    tokenizer_digest: str,
    full: bool,
    cache_dir: Path | None,
) -> DataInfo:
    """Check the files and their documents; see `relora_core.data.inspect`."""
    files, notes = documents.find(str(data.path))
    info = DataInfo(vocab_size=vocab_size, fingerprint=None, notes=notes)
    if not full:
        return info
    try:
        info.fingerprint = documents.fingerprint(
            files, text_field=data.text_field, tokenizer_digest=tokenizer_digest
        )
        if cache_dir is not None and (folder := cache_folder(cache_dir, info.fingerprint)).exists():
            tokens = Tokens(folder)
            info.rows = tokens.rows(data.seq_len)
            info.notes += _null_notes(tokens.meta.nulls)
        else:
            more, tokens = _check_documents(files, data=data, tokenizer=tokenizer)
            info.notes += more
            info.rows = tokens and (tokens - 1) // data.seq_len
    except DataError as error:
        raise ConfigError(f"data.path: {error}") from None
    return info


def _check_documents(
    files: list[tuple[str, Path]], *, data: DataConfig, tokenizer: HFTokenizer
) -> tuple[list[str], int | None]:
    """Read the documents, up to a budget; ConfigError where they are shorter than one sequence.
    Also the tokens of them all, where they are few."""
    characters, skipped = 0, Counter()
    texts: list[tuple[str, str]] = []
    for name, file in files:
        for document in documents.read(file, text_field=data.text_field, skipped=skipped):
            for piece in documents.pieces(document):
                characters += len(piece) + 1
                if characters <= COUNTED_CHARACTERS:
                    texts.append((name, piece))
                if characters > CHECKED_CHARACTERS:
                    later = f"documents from {name} on are checked when they are tokenised"
                    return [*_null_notes(skipped["null"]), later], None
    tokens = None
    if not characters:
        nulls = f": {skipped['null']} null texts under {data.text_field!r} (data.text_field)"
        raise ConfigError(f"data.path holds no document{nulls if skipped['null'] else ''}")
    if characters <= COUNTED_CHARACTERS:
        tokens = sum(len(ids) + 1 for ids in _encode_batch(texts, tokenizer=tokenizer))
        check_length(tokens, seq_len=data.seq_len)
    return _null_notes(skipped["null"]), tokens


def _null_notes(count: int) -> list[str]:
    return [f"{count:,} records without a text (null) are left out"] if count else []


def check_length(tokens: int, *, seq_len: int) -> None:
    """ConfigError unless `tokens` (with EOS) give one row."""
    if tokens < 2:
        raise ConfigError(f"data.path must hold text of at least 2 tokens, got {tokens}")
    if tokens - 1 < seq_len:
        raise ConfigError(
            f"data.seq_len must be in [1, {tokens - 1}] (data.path holds {tokens} tokens in all), "
            f"got {seq_len}; nearest valid: {tokens - 1}"
        )


# cache ------------------------------------------------------------------------------------------
@dataclass(kw_only=True, slots=True)
class _Meta:
    documents: int
    tokens: int
    """With one EOS per document."""
    dtype: str
    largest_id: int
    eos_id: int
    version: int = 1
    nulls: int = 0
    """Records without a text."""


def cache_folder(cache_dir: Path, fingerprint: str) -> Path:
    return cache_dir / f"tokens-{fingerprint[:32]}"


class Tokens:
    """A complete cache, memory-mapped: the `ids`, and where documents start (and the last ends)."""

    def __init__(self, folder: Path) -> None:
        try:
            self.meta = _Meta(**json.loads((folder / "meta.json").read_text(encoding="utf-8")))
            self.ids = np.memmap(folder / "ids.bin", dtype=self.meta.dtype, mode="r")
            self.starts: np.ndarray = np.load(folder / "documents.npy", mmap_mode="r")
        except (OSError, ValueError, TypeError, RecursionError) as error:
            raise DataError(_damage(folder, places.first_line(error))) from None
        if len(self.ids) != self.meta.tokens or len(self.starts) != self.meta.documents + 1:
            raise DataError(_damage(folder, f"{len(self.ids)} of {self.meta.tokens} tokens"))
        _check_digests(folder)

    def rows(self, seq_len: int) -> int:
        """Rows of seq_len + 1 in one pass; ConfigError where there is none."""
        check_length(self.meta.tokens, seq_len=seq_len)
        return (self.meta.tokens - 1) // seq_len


def _damage(folder: Path, what: str) -> str:
    return f"the token cache {folder} is damaged ({what}); delete it, and it is made again"


def _write_digests(folder: Path, digests: dict[str, str]) -> None:
    stamps = {name: list(places.read_stamps([folder / name])[0][1:]) for name in digests}
    atomic.write_json(folder / "digests.json", {"sha256": digests, "looks": stamps})


def _check_digests(folder: Path) -> None:
    """DataError if an array has changed since it was written; read only if its file looks new.

    Caches of earlier versions have no digests: only their sizes are checked.
    """
    try:
        stored = json.loads((folder / "digests.json").read_text(encoding="utf-8"))
        digests, stamps = stored["sha256"], stored["looks"]
        if all(stamps.get(n) == list(places.read_stamps([folder / n])[0][1:]) for n in digests):
            return
        for name, digest in digests.items():
            with open(folder / name, "rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() != digest:
                    raise DataError(_damage(folder, f"{name} has other content than was written"))
    except FileNotFoundError:
        return
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise DataError(_damage(folder, f"digests.json: {places.first_line(error)}")) from None
    with contextlib.suppress(OSError):  # a copy, or touched; somebody else's may be read-only
        _write_digests(folder, digests)


def build(
    folder: Path,
    *,
    files: list[tuple[str, Path]],
    text_field: str,
    tokenizer: HFTokenizer,
    progress: Callable[[str], None] | None = None,
) -> None:
    """Tokenise `files` into `folder`, unless it is there. All of it appears at once, or nothing.

    Two processes may build at once: the second waits for the first. Raises DataError for bad input,
    ConfigError where the cache cannot be written (a full disk, a read-only folder).
    """
    try:
        shared.make_folder(folder.parent)
        with _lock(folder) as has_lock:
            if folder.exists():
                return
            if has_lock:  # left by a killed process; without the lock a running one may own it
                for leftover in folder.parent.glob(f".{folder.name}.*.tmp"):
                    shutil.rmtree(leftover, ignore_errors=True)
            temporary = Path(
                tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}.", suffix=".tmp")
            )
            try:
                skipped: Counter[str] = Counter()
                texts = _all_documents(
                    files, text_field=text_field, skipped=skipped, progress=progress
                )
                _write(temporary, texts=texts, tokenizer=tokenizer, skipped=skipped)
                _publish(temporary, folder)
            finally:
                shutil.rmtree(temporary, ignore_errors=True)
    except OSError as error:
        raise ConfigError(
            f"the token cache {folder} cannot be written: {error.strerror or error}"
        ) from None


@contextlib.contextmanager
def _lock(folder: Path) -> Iterator[bool]:
    """Wait until no other process builds `folder`; False where the file system has no locks."""
    with shared.open_file(folder.with_name(f"{folder.name}.lock"), "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError:  # then both build, and the first rename wins
            yield False
        else:
            yield True  # the lock goes with the file, also when the process dies


def _publish(temporary: Path, folder: Path) -> None:
    for file in temporary.iterdir():
        with open(file, "rb") as stream:
            os.fsync(stream.fileno())
    try:
        shared.open_up(temporary)
        temporary.rename(folder)
    except OSError:
        if not folder.exists():
            raise
    atomic.sync_folder(folder.parent)


def _all_documents(
    files: list[tuple[str, Path]],
    *,
    text_field: str,
    skipped: Counter[str],
    progress: Callable[[str], None] | None,
) -> Iterator[tuple[str, documents.Document]]:
    """(name of its file, document)."""
    reported_at, characters = time.monotonic(), 0

    def count(piece: str, name: str, i: int) -> str:
        nonlocal reported_at, characters
        characters += len(piece)
        if progress is not None and time.monotonic() - reported_at > 2:
            reported_at = time.monotonic()
            progress(f"tokenising {name} ({i}/{len(files)}): {characters / 1e6:.0f} MB of text")
        return piece

    for i, (name, file) in enumerate(files, 1):
        for document in documents.read(file, text_field=text_field, skipped=skipped):
            if isinstance(document, str):
                yield name, count(document, name, i)
            else:
                yield name, (count(piece, name, i) for piece in document)


def _batches(
    texts: Iterable[tuple[str, documents.Document]],
) -> Iterator[list[tuple[str, str]] | tuple[str, Iterator[str]]]:
    """Documents to encode at a time: short ones together, a long one alone."""
    batch, characters = [], 0
    for name, text in texts:
        if isinstance(text, str):
            batch.append((name, text))
            characters += len(text)
        if batch and (characters >= BATCH_CHARACTERS or not isinstance(text, str)):
            yield batch
            batch, characters = [], 0
        if not isinstance(text, str):
            yield name, text
    if batch:
        yield batch


def _encode_all(
    texts: Iterable[tuple[str, documents.Document]], *, tokenizer: HFTokenizer
) -> Iterator[tuple[list[int], bool]]:
    """(ids, whether they end a document), in order. Raises DataError that names the file."""
    for batch in _batches(texts):
        if isinstance(batch, list):
            yield from ((ids, True) for ids in _encode_batch(batch, tokenizer=tokenizer))
            continue
        name, pieces = batch
        with _name_errors(name):
            yield from ((ids, False) for ids in tokenizer.encode_long(pieces))
        yield [], True


def _encode_batch(batch: list[tuple[str, str]], *, tokenizer: HFTokenizer) -> list[list[int]]:
    try:
        return tokenizer.encode_batch([text for _, text in batch])
    except DataError:
        for name, text in batch:
            with _name_errors(name):
                tokenizer.encode(text)
        raise


@contextlib.contextmanager
def _name_errors(name: str) -> Iterator[None]:
    try:
        yield
    except DataError as error:
        raise DataError(f"{name}: {error}") from None


def _write(
    folder: Path,
    *,
    texts: Iterable[tuple[str, documents.Document]],
    tokenizer: HFTokenizer,
    skipped: Counter[str],
) -> None:
    dtype = np.dtype(np.uint16 if tokenizer.vocab_size <= 2**16 else np.uint32)
    starts = array.array("q", [0])  # a list would take four times as much
    largest = tokens = 0
    digest = hashlib.sha256()
    with open(folder / "ids.bin", "wb") as file:
        for ids, ended in _encode_all(texts, tokenizer=tokenizer):
            part = np.array([*ids, tokenizer.eos_id] if ended else ids, dtype=dtype)
            file.write(part.data)
            digest.update(part.data)
            tokens += len(part)
            largest = max(largest, int(part.max(initial=0)))
            if ended:
                starts.append(tokens)
    np.save(folder / "documents.npy", np.asarray(starts, dtype=np.int64))
    meta = _Meta(
        documents=len(starts) - 1,
        tokens=tokens,
        dtype=dtype.name,
        largest_id=largest,
        eos_id=tokenizer.eos_id,
        nulls=skipped["null"],
    )
    record = asdict(meta)
    if not meta.nulls:  # as earlier versions wrote and read it
        del record["nulls"]
    (folder / "meta.json").write_text(json.dumps(record) + "\n", encoding="utf-8")
    with open(folder / "documents.npy", "rb") as file:
        digests = {
            "ids.bin": digest.hexdigest(),
            "documents.npy": hashlib.file_digest(file, "sha256").hexdigest(),
        }
    _write_digests(folder, digests)


# streaming --------------------------------------------------------------------------------------
class TextStream(RowStream):
    """Rows of the documents joined in an order that (seed, epoch) alone decides.

    Row j of a pass holds tokens [j * seq_len, (j + 1) * seq_len] of that order; the tail that fills
    no row is left out of the pass. With `shuffle_rows` the rows of a pass come in an order that
    (seed, epoch) decides as well. Any row is found directly, so the state is a number.
    """

    def __init__(
        self,
        tokens: Tokens,
        *,
        seq_len: int,
        seed: int,
        vocab_size: int,
        shuffle_rows: bool = False,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        if tokens.meta.largest_id >= vocab_size:
            raise DataError(
                f"data.path holds id {tokens.meta.largest_id}, expected ids in [0, {vocab_size}) "
                f"(model.vocab_size)"
            )
        super().__init__(rank=rank, world=world)
        self._tokens, self._seq_len, self._seed = tokens, seq_len, seed
        self._shuffle_rows = shuffle_rows
        self._rows = tokens.rows(seq_len)
        self._order_of = -1  # the epoch that order and ends are of

    def next_rows(self, n: int) -> np.ndarray:
        first = self._row + self._rank
        rows = [self._read(first + i * self._world) for i in range(n)]
        self._row += n * self._world
        return np.stack(rows) if rows else np.empty((0, self._seq_len + 1), dtype=np.int64)

    def _shuffle(self, epoch: int) -> None:
        """Order of the documents in `epoch`, and where each ends in it."""
        if epoch == self._order_of:
            return
        # RandomState, because numpy has frozen what it draws; the newer generators may change
        generator = np.random.RandomState([self._seed, epoch])
        self._order = generator.permutation(self._tokens.meta.documents)
        self._row_order = generator.permutation(self._rows) if self._shuffle_rows else None
        self._ends = np.cumsum(np.diff(self._tokens.starts)[self._order])
        self._order_of = epoch

    def _read(self, row: int) -> np.ndarray:
        """Global row `row`, int64, shape (seq_len + 1,)."""
        epoch, j = divmod(row, self._rows)
        self._shuffle(epoch)
        if self._row_order is not None:
            j = int(self._row_order[j])
        out = np.empty(self._seq_len + 1, dtype=np.int64)
        position, filled = j * self._seq_len, 0
        place = int(np.searchsorted(self._ends, position, side="right"))
        while filled < len(out):
            end = int(self._tokens.starts[self._order[place] + 1])
            remaining = int(self._ends[place]) - position  # of this document's tokens
            take = min(remaining, len(out) - filled)
            out[filled : filled + take] = self._tokens.ids[end - remaining : end - remaining + take]
            filled, position, place = filled + take, position + take, place + 1
        return out
