"""Token streams by kind of data: `inspect` to plan, `prepare` once, `open_stream` in each rank.

Not for: anything that needs torch; planning imports this package. What reads files of one kind
is imported where it is used: pyarrow takes longer to load than `--help` takes to print.

    base.py          what a stream and a tokenizer are
    grammar.py       the embedded generator, its entropy, its minimal pairs
    pretokenized.py  rows of ids from parquet, local or on the hub
    parquet.py       parquet files: layout, footers, checks
    binary.py        ids in a bare file, as nanoGPT's train.bin
    text.py          documents, tokenised once into a cache
    documents.py     documents out of txt, jsonl, parquet and packed files
    tokenizer.py     tokenizer.json, folder or hub name
    places.py        local path, hub name, or one clear line
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from relora_core.config import ConfigError, DataConfig
from relora_core.data.base import DataError, DataInfo, Tokenizer, TokenStream
from relora_core.data.tokenizer import HFTokenizer, padded_vocab

__all__ = [
    "DataError",
    "DataInfo",
    "TokenStream",
    "Tokenizer",
    "fingerprint",
    "inspect",
    "is_cached",
    "load_tokenizer",
    "local_files",
    "open_stream",
    "prepare",
    "prepared_rows",
    "sample",
    "tokenizer_digest",
]


def inspect(data: DataConfig, *, full: bool = True, cache_dir: Path | None = None) -> DataInfo:
    """What planning needs to know of the data. Any fault of the data raises ConfigError here.

    `full=False` reads no contents: names, schema, vocabulary and row length are checked, the
    fingerprint stays None. With `cache_dir`, text that `prepare` has tokenised is not read again.
    """
    if data.kind == "grammar":
        return _inspect_grammar()
    from relora_core.data import pretokenized, text

    if data.kind == "pretokenized":
        pretokenized.check_place(data)  # before the tokenizer: a wrong path is the likelier mistake
    tokenizer = _named_tokenizer(data)
    vocab_size = _vocabulary(data, tokenizer)
    digest = _tokenizer_digest(tokenizer)
    if data.kind == "pretokenized":
        return pretokenized.inspect(data, vocab_size=vocab_size, full=full, tokenizer_digest=digest)
    assert tokenizer is not None
    assert digest is not None
    info = text.inspect(
        data,
        vocab_size=vocab_size,
        tokenizer=tokenizer,
        tokenizer_digest=digest,
        full=full,
        cache_dir=cache_dir,
    )
    if tokenizer.unknown == "dropped":
        info.notes.append(
            f"data.tokenizer={data.tokenizer} has no unk token and not every byte: characters that "
            f"it does not know are left out of the text"
        )
    return info


def fingerprint(data: DataConfig, *, tokenizer: str | None = None) -> str:
    """What `inspect` would give as the fingerprint now; no row is looked at. Raises ConfigError.

    `tokenizer` replaces data.tokenizer: a copy stored earlier.
    """
    if data.kind == "grammar":
        return _grammar_fingerprint()
    from relora_core.data import documents, parquet, pretokenized

    digest = tokenizer_digest(replace(data, tokenizer=tokenizer or data.tokenizer))
    try:
        if data.kind == "text":
            named_files = documents.find_files(str(data.path))
            field = data.text_field
            return documents.fingerprint(
                named_files, text_field=field, tokenizer_digest=digest or ""
            )
        pretokenized.check_place(data)
        if (files := parquet.find_files(data)) is None:
            return pretokenized.hub_fingerprint(data, tokenizer_digest=digest)
        return parquet.fingerprint(files, tokenizer_digest=digest)
    except (DataError, OSError) as error:
        raise ConfigError(f"data.path: {error}") from None


def local_files(data: DataConfig) -> list[Path]:
    """The files of the data, in order; empty for the grammar and for the hub."""
    if data.kind == "grammar":
        return []
    from relora_core.data import documents, parquet

    if data.kind == "text":
        return [file for _, file in documents.find_files(str(data.path))]
    return parquet.find_files(data) or []


def sample(data: DataConfig) -> str | None:
    """Digest of what the fingerprint leaves out of files too large to be read; None: nothing."""
    if data.kind != "pretokenized":
        return None
    from relora_core.data import parquet

    files = parquet.find_files(data)
    return parquet.sample(files) if files else None


def is_cached(data: DataConfig, *, cache_dir: Path) -> bool:
    """Whether a run reads tokens that are in `cache_dir` already, and no file of the data."""
    if data.kind != "text" or not data.fingerprint:
        return False
    from relora_core.data import text

    return text.cache_folder(cache_dir, data.fingerprint).exists()


def tokenizer_digest(data: DataConfig) -> str | None:
    """Digest of the ids' meaning: the file, and the EOS that its folder or the config names."""
    return _tokenizer_digest(_named_tokenizer(data))


def prepare(
    data: DataConfig, *, cache_dir: Path, progress: Callable[[str], None] | None = None
) -> None:
    """Work done once before any worker starts: tokenise text into `cache_dir`. Raises ConfigError.

    Does nothing for other kinds of data, or if the cache exists. Several processes may call it at
    once.
    """
    if data.kind == "text":
        _token_cache(data, cache_dir=cache_dir, progress=progress)


def prepared_rows(data: DataConfig, *, cache_dir: Path) -> int | None:
    """Rows in one pass over text that `prepare` has tokenised; None where it had nothing to do."""
    if not is_cached(data, cache_dir=cache_dir):
        return None
    from relora_core.data import text

    assert data.fingerprint is not None
    return text.Tokens(text.cache_folder(cache_dir, data.fingerprint)).rows(data.seq_len)


def load_tokenizer(data: DataConfig) -> Tokenizer | None:
    """The tokenizer of the data, for evals on text; None where pretokenized data name none."""
    if data.kind == "grammar":
        from relora_core.data import grammar

        return grammar.GrammarTokenizer()
    return _named_tokenizer(data)


def open_stream(
    data: DataConfig,
    *,
    seed: int,
    vocab_size: int,
    rank: int = 0,
    world: int = 1,
    cache_dir: Path | None = None,
) -> TokenStream:
    """The stream of rank `rank` of `world`, at its first row.

    `vocab_size` is the model's: a row with an id beyond it raises DataError. The seed orders text
    and draws from the grammar; pretokenized rows come as stored. Text needs `cache_dir`, and is
    tokenised now where `prepare` was not called.
    """
    if data.kind == "grammar":
        from relora_core.data import grammar

        if vocab_size < grammar.VOCAB_SIZE:
            raise ConfigError(
                f"model.vocab_size must be >= {grammar.VOCAB_SIZE} for data=grammar, got "
                f"{vocab_size}; nearest valid: {grammar.VOCAB_SIZE}"
            )
        return grammar.GrammarStream(seq_len=data.seq_len, seed=seed, rank=rank, world=world)
    if data.kind == "pretokenized":
        from relora_core.data import binary, parquet, pretokenized

        files = parquet.find_files(data)
        if files and binary.is_binary(files):
            return binary.BinaryStream(
                files[0], seq_len=data.seq_len, vocab_size=vocab_size, rank=rank, world=world
            )
        on_hub = files is None
        return pretokenized.PretokenizedStream(
            data,
            vocab_size=vocab_size,
            rank=rank,
            world=world,
            cache_dir=cache_dir / "datasets" if cache_dir else None,
            tokenizer_digest=_tokenizer_digest(_named_tokenizer(data)) if on_hub else None,
        )
    from relora_core.data import text

    assert cache_dir is not None, "text is read from its cache"
    folder = _token_cache(data, cache_dir=cache_dir, progress=None)
    return text.TextStream(
        text.Tokens(folder),
        seq_len=data.seq_len,
        seed=seed,
        vocab_size=vocab_size,
        shuffle_rows=data.shuffle_rows,
        rank=rank,
        world=world,
    )


def _inspect_grammar() -> DataInfo:
    from relora_core.data import grammar

    return DataInfo(
        vocab_size=grammar.VOCAB_SIZE,
        fingerprint=_grammar_fingerprint(),
    )


def _grammar_fingerprint() -> str:
    """Digest of some of its text: another grammar is another data set."""
    from relora_core.data import grammar

    sample = grammar.GrammarStream(seq_len=64, seed=0).next_rows(64)
    return hashlib.sha256(sample.tobytes()).hexdigest()


def _named_tokenizer(data: DataConfig) -> HFTokenizer | None:
    return HFTokenizer(data.tokenizer, eos_id=data.eos_id) if data.tokenizer else None


def _tokenizer_digest(tokenizer: HFTokenizer | None) -> str | None:
    return f"{tokenizer.digest} {tokenizer.eos_id}" if tokenizer else None


def _vocabulary(data: DataConfig, tokenizer: HFTokenizer | None) -> int:
    """Vocabulary size of the model; ConfigError if it is not set, or the tokenizer has more."""
    size = data.vocab_size if data.kind == "pretokenized" else None
    if tokenizer is None:
        if size is None:
            raise ConfigError(
                f"data.vocab_size must be set (or data.tokenizer, whose size it then is) for "
                f"data={data.kind}, got neither"
            )
        if data.eos_id is not None and data.eos_id >= size:
            raise ConfigError(
                f"data.eos_id must be in [0, data.vocab_size={size}), got {data.eos_id}; "
                f"nearest valid: {size - 1}"
            )
        return size
    padded = padded_vocab(tokenizer.vocab_size)
    if size is not None and size < tokenizer.vocab_size:
        raise ConfigError(
            f"data.vocab_size must be >= {tokenizer.vocab_size} (the ids of data.tokenizer="
            f"{data.tokenizer}), got {size}; nearest valid: {padded}"
        )
    return size or padded


def _token_cache(
    data: DataConfig, *, cache_dir: Path, progress: Callable[[str], None] | None
) -> Path:
    """The complete cache of text data, made now if need be. Raises ConfigError."""
    from relora_core.data import documents, text

    if data.fingerprint and (folder := text.cache_folder(cache_dir, data.fingerprint)).exists():
        return folder
    tokenizer = _named_tokenizer(data)
    assert tokenizer is not None, "validate() asks for one"
    digest = _tokenizer_digest(tokenizer) or ""
    try:
        files = documents.find_files(str(data.path))
        current = documents.fingerprint(files, text_field=data.text_field, tokenizer_digest=digest)
        if data.fingerprint not in (None, current):
            raise ConfigError(
                f"data.path={data.path} (or data.tokenizer) has changed since the run was planned; "
                f"plan it again, or put the old files back"
            )
        folder = text.cache_folder(cache_dir, current)
        text.build(
            folder,
            files=files,
            text_field=data.text_field,
            tokenizer=tokenizer,
            progress=progress,
        )
        text.Tokens(folder).rows(data.seq_len)
    except DataError as error:
        raise ConfigError(f"data.path: {error}") from None
    return folder
