"""Small parquet folders and tokenizers that the data tests share."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

STORED = 33
"""Ids per stored row of `write_rows`' data sets: 32 + 1."""


def random_rows(count: int, *, stored: int = STORED, vocab_size: int = 500, seed: int = 0):
    """(count, stored) int32 ids."""
    rng = np.random.default_rng(seed)
    return rng.integers(0, vocab_size, (count, stored), dtype=np.int32)


def write_rows(file: Path, rows: Iterable, *, group: int = 100, statistics: bool = True) -> None:
    """Parquet with a column input_ids and one more, as published."""
    file.parent.mkdir(parents=True, exist_ok=True)
    rows = [None if r is None else list(r) for r in rows]
    table = pa.table(
        {
            "input_ids": pa.array(rows, type=pa.list_(pa.int32())),
            "idx": pa.array(range(len(rows)), type=pa.int64()),
        }
    )
    pq.write_table(table, file, row_group_size=group, write_statistics=statistics)


def write_bpe(folder: Path, *, eos: str = "<|endoftext|>", vocab_size: int = 270) -> Path:
    """A byte-level BPE trained on a few words; encodes any text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[eos],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["the cat sat on the mat and the dog sat too"] * 9, trainer)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def write_words(folder: Path, words: list[str]) -> Path:
    """One id per word, by position; `<eos>` comes after them."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    vocabulary = {word: i for i, word in enumerate([*words, "<eos>"])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=words[0]))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder
