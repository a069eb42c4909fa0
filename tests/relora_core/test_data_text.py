"""Text tokenised once: the stream is the documents, each followed by EOS, in a seeded order."""

from __future__ import annotations

import gzip
import json
import lzma
import multiprocessing
import resource
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import zstandard
from data_files import write_bpe, write_words
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from relora_core.config import ConfigError, DataConfig
from relora_core.data import DataError, inspect, open_stream, prepare, prepared_rows, text
from relora_core.data.tokenizer import HFTokenizer

DOCUMENTS = [
    "the cat sat",
    "on the mat\nand",
    "",
    "the dog sat too " * 5,
    "Grüße\u2028世界",
    "a",
] + [f"document number {i} " + "the cat " * (i % 7) for i in range(40)]
PACK = {
    "": bytes,
    ".gz": lambda raw: gzip.compress(raw, mtime=0),
    ".xz": lzma.compress,
    ".zst": zstandard.compress,
}


def jsonl(documents: list[str], key: str = "text") -> bytes:
    lines = [json.dumps({"id": i, key: d}) for i, d in enumerate(documents)]
    return ("\n".join(lines) + "\n").encode()


def write_corpus(folder: Path) -> Path:
    """DOCUMENTS over every kind of file: one per txt, the others in jsonl of each packing."""
    (folder / "more").mkdir(parents=True)
    (folder / "a.txt").write_bytes(DOCUMENTS[1].encode())
    rest = [d for i, d in enumerate(DOCUMENTS) if i != 1]
    for i, (ending, pack) in enumerate(PACK.items()):
        (folder / "more" / f"part{i}.jsonl{ending}").write_bytes(pack(jsonl(rest[i::4])))
    (folder / "README.md").write_text("no document")
    return folder


@pytest.fixture(scope="session")
def corpus(tmp_path_factory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpus") / "texts")


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory) -> Path:
    return write_bpe(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="session")
def cache(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def config(corpus, tokenizer):
    def make(path: Path | str = corpus, **changes) -> DataConfig:
        fields = {"kind": "text", "path": str(path), "tokenizer": str(tokenizer), "seq_len": 16}
        return DataConfig(**{**fields, **changes})

    return make


def stream(data: DataConfig, cache: Path, *, seed: int = 0, rank: int = 0, world: int = 1):
    return open_stream(data, seed=seed, vocab_size=384, rank=rank, world=world, cache_dir=cache)


def one_pass(data: DataConfig, cache: Path, *, seed: int = 0, epoch: int = 0) -> np.ndarray:
    """All tokens of an epoch in order, read two at a time."""
    pairs = stream(DataConfig(**{**as_dict(data), "seq_len": 1}), cache, seed=seed)
    info = inspect(data, cache_dir=cache)
    assert info.fingerprint
    total = text.Tokens(text.cache_folder(cache, info.fingerprint)).meta.tokens
    pairs.next_rows((total - 1) * epoch)
    rows = pairs.next_rows(total - 1)
    assert (rows[1:, 0] == rows[:-1, 1]).all()
    return np.concatenate([rows[:, 0], rows[-1:, 1]])


def as_dict(data: DataConfig) -> dict:
    return {name: getattr(data, name) for name in DataConfig.__dataclass_fields__}


def error_line(data: DataConfig, **options) -> str:
    with pytest.raises(ConfigError) as caught:
        inspect(data, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# the stream -------------------------------------------------------------------------------------
def split_at(tokens: np.ndarray, eos: int) -> Counter:
    ends = np.flatnonzero(tokens == eos) + 1
    assert ends[-1] == len(tokens)
    return Counter(tuple(part.tolist()) for part in np.split(tokens, ends[:-1]))


@pytest.mark.parametrize("epoch", [0, 1, 2])
def test_each_epoch_holds_every_encoded_document_and_its_eos_once(config, cache, tokenizer, epoch):
    own = HFTokenizer(str(tokenizer))
    tokens = one_pass(config(), cache, seed=3, epoch=epoch)
    want = Counter((*own.encode(d), own.eos_id) for d in DOCUMENTS)
    assert split_at(tokens, own.eos_id) == want


def test_the_order_follows_seed_and_epoch(config, cache):
    first = one_pass(config(), cache, seed=0)
    assert (first == one_pass(config(), cache, seed=0)).all()
    assert (first != one_pass(config(), cache, seed=1)).any()
    assert (first != one_pass(config(), cache, seed=0, epoch=1)).any()


@pytest.mark.slow
@settings(
    max_examples=min(40, settings.default.max_examples),
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
@given(
    steps=st.lists(st.tuples(st.integers(0, 60), st.booleans()), min_size=1, max_size=5),
    seq_len=st.integers(1, 300),
    world=st.sampled_from([1, 2, 4]),
)
def test_resumed_anywhere_on_any_rank_its_rows_are_windows_of_the_pass(
    config, cache, steps, seq_len, world
):
    data = config(seq_len=seq_len)
    passes = [one_pass(data, cache, epoch=e) for e in range(3)]
    per_pass = (len(passes[0]) - 1) // seq_len
    rank, position = len(steps) % world, 0
    source = stream(data, cache, rank=rank, world=world)
    for n, resume in steps:
        if resume:
            state = json.loads(json.dumps(source.state_dict()))
            source = stream(data, cache, rank=rank, world=world)
            source.load_state_dict(state)
        rows = source.next_rows(n)
        assert rows.shape == (n, seq_len + 1)
        assert rows.dtype == np.int64
        for row, got in zip(range(position + rank, position + n * world, world), rows, strict=True):
            epoch, j = divmod(row, per_pass)
            if epoch < len(passes):
                want = passes[epoch][j * seq_len : j * seq_len + seq_len + 1]
                np.testing.assert_array_equal(got, want)
        position += n * world
        assert source.state_dict() == {"row": position}


@pytest.mark.parametrize("epoch", [0, 1])
def test_shuffled_rows_are_the_rows_of_the_pass_in_an_order_of_seed_and_epoch(config, cache, epoch):
    plain, shuffled = config(), config(shuffle_rows=True)
    per_pass = (len(one_pass(plain, cache)) - 1) // plain.seq_len

    def rows(data, seed=0):
        source = stream(data, cache, seed=seed)
        source.next_rows(per_pass * epoch)
        return source.next_rows(per_pass)

    one, other = rows(plain), rows(shuffled)
    assert sorted(map(tuple, one)) == sorted(map(tuple, other))
    assert (one != other).any()
    np.testing.assert_array_equal(other, rows(shuffled))
    assert (other != rows(shuffled, seed=1)).any()
    resumed = stream(shuffled, cache)
    resumed.load_state_dict({"row": per_pass * epoch + 5})
    np.testing.assert_array_equal(resumed.next_rows(4), other[5:9])


# the cache --------------------------------------------------------------------------------------
def folders(cache: Path) -> list[str]:
    return sorted(p.name for p in cache.iterdir() if not p.name.endswith(".lock"))


@pytest.mark.parametrize(("words", "dtype"), [(65_535, "uint16"), (65_536, "uint32")])
def test_ids_take_two_bytes_while_they_fit(tmp_path, config, words, dtype):
    names = [f"w{i}" for i in range(words)]  # and <eos>, the last id
    source = write_words(tmp_path / "tokenizer", names)
    (tmp_path / "a.txt").write_text(f"w3 {names[-1]} w0")
    data = config(tmp_path / "a.txt", tokenizer=str(source), seq_len=3)
    prepare(data, cache_dir=tmp_path / "cache")
    rows = open_stream(data, seed=0, vocab_size=words + 1, cache_dir=tmp_path / "cache")
    assert rows.next_rows(1).tolist() == [[3, words - 1, 0, words]]
    (meta,) = (tmp_path / "cache").glob("*/meta.json")
    assert json.loads(meta.read_text())["dtype"] == dtype


def test_text_is_tokenised_once_and_only_in_prepare(config, tmp_path, monkeypatch):
    lines: list[str] = []
    monkeypatch.setattr(text.time, "monotonic", iter(range(0, 10**6, 3)).__next__)
    data = config()
    prepare(data, cache_dir=tmp_path, progress=lines.append)
    assert any("part3.jsonl.zst (5/5)" in line for line in lines)
    monkeypatch.setattr(HFTokenizer, "encode_batch", None)
    prepare(data, cache_dir=tmp_path)
    data.fingerprint = inspect(data, cache_dir=tmp_path).fingerprint
    stream(data, tmp_path).next_rows(3)


def test_planning_says_the_rows_of_a_small_text_and_of_one_that_is_in_the_cache(
    config, cache, tmp_path, monkeypatch
):
    data = config(seq_len=20)
    rows = (len(one_pass(config(), cache)) - 1) // 20
    assert inspect(data, cache_dir=cache).rows == rows
    assert inspect(data, cache_dir=tmp_path / "none").rows == rows
    monkeypatch.setattr(text, "COUNTED_CHARACTERS", 10)  # a large one is counted once, by `prepare`
    info = inspect(data, cache_dir=tmp_path / "none")
    assert info.rows is None
    data.fingerprint = info.fingerprint
    assert prepared_rows(data, cache_dir=tmp_path / "none") is None
    assert prepared_rows(data, cache_dir=cache) == rows


def build_one(data: DataConfig, cache: Path) -> None:
    prepare(data, cache_dir=cache)


def test_two_processes_at_once_leave_one_good_cache(config, tmp_path, cache):
    data = config()
    context = multiprocessing.get_context("fork")
    both = [context.Process(target=build_one, args=(data, tmp_path)) for _ in range(2)]
    for process in both:
        process.start()
    for process in both:
        process.join()
    assert [p.exitcode for p in both] == [0, 0]
    assert len(folders(tmp_path)) == 1
    assert (one_pass(data, tmp_path) == one_pass(data, cache)).all()


def test_what_a_killed_process_left_is_swept_and_not_used(config, tmp_path):
    info = inspect(config())
    assert info.fingerprint
    left = tmp_path / f".{text.cache_folder(tmp_path, info.fingerprint).name}.abc.tmp"
    left.mkdir()
    (left / "ids.bin").write_bytes(b"half")
    prepare(config(), cache_dir=tmp_path)
    assert folders(tmp_path) == [text.cache_folder(tmp_path, info.fingerprint).name]


def test_a_full_disk_is_one_line_and_leaves_nothing(config, tmp_path):
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(
        resource.RLIMIT_FSIZE, (512, old[1])
    )  # writes beyond fail, as on a full disk
    try:
        with pytest.raises(ConfigError, match=r"token cache .* cannot be written") as caught:
            prepare(config(), cache_dir=tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
    assert "\n" not in str(caught.value)
    assert folders(tmp_path) == []


def test_a_cache_folder_that_cannot_be_made_is_one_line(config, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot be written"):
        prepare(config(), cache_dir=tmp_path / "file" / "cache")


@pytest.mark.parametrize("name", ["ids.bin", "documents.npy", "meta.json"])
def test_a_damaged_cache_is_named(config, tmp_path, name):
    prepare(config(), cache_dir=tmp_path)
    (file,) = tmp_path.glob(f"*/{name}")
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises((ConfigError, DataError), match=r"is damaged .* delete it"):
        stream(config(), tmp_path)


def test_ids_beyond_the_models_vocabulary_are_refused(config, cache):
    prepare(config(), cache_dir=cache)
    with pytest.raises(DataError, match=r"\[0, 200\)"):
        open_stream(config(), seed=0, vocab_size=200, cache_dir=cache)


# identity ---------------------------------------------------------------------------------------
def test_fingerprint_goes_with_the_content_and_not_with_the_place(config, tmp_path, tokenizer):
    before = inspect(config()).fingerprint
    moved = write_corpus(tmp_path / "elsewhere")
    assert inspect(config(moved)).fingerprint == before
    assert inspect(config(f"{moved}/**/*")).fingerprint == before
    assert inspect(config(moved, eos_id=5)).fingerprint != before
    other = write_bpe(tmp_path / "tokenizer", vocab_size=265)
    assert inspect(config(moved, tokenizer=str(other))).fingerprint != before
    (moved / "a.txt").write_bytes(DOCUMENTS[1].swapcase().encode())
    assert inspect(config(moved)).fingerprint != before


def test_files_that_change_after_the_plan_are_refused(config, tmp_path):
    data = config(write_corpus(tmp_path / "texts"))
    data.fingerprint = inspect(data).fingerprint
    (tmp_path / "texts" / "a.txt").write_text("something else")
    with pytest.raises(ConfigError, match="changed since the run was planned"):
        prepare(data, cache_dir=tmp_path / "cache")


# bad input --------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.jsonl", b'{"text": "a"}\n{"text": "b"\n', "line 2: no valid JSON"),
        ("a.jsonl", b'{"text": "a"}\n\n{"txt": "b"}\n', "line 3: no key 'text'"),
        ("a.jsonl", b'{"text": "a"}\n{"text": 3}\n', "line 2: 'text' must be a string, got int"),
        ("a.jsonl", b'["text"]\n', "line 1: expected a JSON object, got list"),
        ("a.jsonl", b'{"text": "\xff"}\n', "line 1: bytes that are not UTF-8"),
        ("a.jsonl", b'{"text": "\\ud800"}\n', "line 1: 'text' holds half a surrogate pair"),
        ("a.jsonl", b"[" * 100_000 + b"\n", "line 1: no valid JSON"),
        ("a.jsonl", b"", "is empty (0 bytes)"),
        ("a.jsonl", b"\n\n", "holds no document"),
        ("a.txt", b"one\ntwo \xff\n", "line 2: byte 0xff is not UTF-8"),
        ("a.txt", b"", "is empty (0 bytes)"),
        ("a.jsonl.gz", gzip.compress(jsonl(DOCUMENTS))[:-30], "is damaged or unreadable"),
        ("a.jsonl.gz", b"not gzip", "is damaged or unreadable"),
        ("a.jsonl.xz", lzma.compress(jsonl(DOCUMENTS))[:-30], "is damaged or unreadable"),
        ("a.jsonl.xz", b"not xz at all", "is damaged or unreadable"),
        ("a.jsonl.zst", zstandard.compress(jsonl(DOCUMENTS))[:-30], "is damaged or unreadable"),
        ("a.jsonl.zst", b"not zstandard", "is damaged or unreadable"),
    ],
)
def test_bad_documents_are_named_by_file_and_line(config, tmp_path, name, content, says):
    file = tmp_path / "texts" / name
    file.parent.mkdir()
    file.write_bytes(content)
    (file.parent / "b.txt").write_text("this one is good " * 20)
    line = error_line(config(file.parent))
    assert str(file) in line
    assert says in line
    with pytest.raises(ConfigError, match=r"data\.path"):
        prepare(config(file.parent), cache_dir=tmp_path / "cache")
    assert folders(tmp_path / "cache") == []


def test_text_shorter_than_a_sequence_names_the_longest_there_is(config, tmp_path, cache):
    (tmp_path / "a.txt").write_text("abc" * 3)
    tokens = len(HFTokenizer(config().tokenizer).encode("abc" * 3)) + 1
    line = error_line(config(tmp_path, seq_len=tokens))
    assert line.startswith("data.seq_len must be")
    assert f"nearest valid: {tokens - 1}" in line
    assert inspect(config(tmp_path, seq_len=tokens - 1)).fingerprint
    with pytest.raises(ConfigError, match=r"data\.seq_len"):
        prepare(config(tmp_path, seq_len=tokens), cache_dir=tmp_path / "cache")


def test_paths_without_text_are_named(config, corpus, tmp_path):
    assert "Did you mean" in error_line(config(corpus.parent / "text"))
    assert "it holds no file" in error_line(config(tmp_path))
    assert "it holds no file" in error_line(config(f"{tmp_path}/*.jsonl"))
    (tmp_path / "rows.npy").write_bytes(b"x")
    assert "it holds only .npy" in error_line(config(tmp_path))
    (tmp_path / "train.bin").write_bytes(b"x")
    assert error_line(config(tmp_path)).endswith("Ids in train.bin are data=pretokenized")
    assert "got" in error_line(config(tmp_path / "rows.npy"))


@pytest.mark.parametrize("many", [False, True])
def test_a_tokenizer_without_unk_is_one_line_that_names_the_file(
    config, tmp_path, monkeypatch, many
):
    source = write_words(tmp_path / "tokenizer", ["a", "b"]) / "tokenizer.json"
    source.write_text(source.read_text().replace('"unk_token": "a"', '"unk_token": "[UNK]"'))
    assert "[UNK]" in source.read_text()
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text("a b " * 20)
    (tmp_path / "texts" / "b.txt").write_text("a c b " * 20)
    data = config(tmp_path / "texts", tokenizer=str(source))
    if many:  # too much to be tokenised by a plan
        monkeypatch.setattr(text, "COUNTED_CHARACTERS", 10)
        assert inspect(data).fingerprint
        with pytest.raises(ConfigError, match=r"^data\.path: b\.txt: data\.tokenizer cannot") as at:
            prepare(data, cache_dir=tmp_path / "cache")
        assert folders(tmp_path / "cache") == []
        line = str(at.value)
    else:
        line = error_line(data)
    assert line.startswith("data.path: b.txt: data.tokenizer cannot encode the text that begins")
    assert "[UNK]" in line


def test_characters_that_a_tokenizer_drops_are_said(config, tmp_path):
    file = write_bpe(tmp_path / "tokenizer") / "tokenizer.json"
    assert not [note for note in inspect(config(tokenizer=str(file))).notes if "unk" in note]
    record = json.loads(file.read_text())
    record["pre_tokenizer"] = None
    file.write_text(json.dumps(record))
    (note,) = inspect(config(tokenizer=str(file))).notes
    assert "characters that it does not know are left out of the text" in note


def test_another_text_field_can_be_named(config, tmp_path, tokenizer):
    (tmp_path / "a.jsonl").write_bytes(jsonl(["the cat"] * 9, key="content"))
    assert "got keys id, content" in error_line(config(tmp_path))
    data = config(tmp_path, text_field="content")
    own = HFTokenizer(str(tokenizer))
    assert one_pass(data, tmp_path / "c").tolist() == [*own.encode("the cat"), own.eos_id] * 9


# real data --------------------------------------------------------------------------------------
def test_real_text_gives_the_counted_tokens(shared_data, tmp_path):
    files = tmp_path / "docs"
    files.mkdir()
    shutil.copyfile(
        shared_data / "corpus" / "train_core" / "docs.jsonl.xz", files / "docs.jsonl.xz"
    )
    data = DataConfig(
        kind="text", path=str(files), tokenizer=str(shared_data / "tokenizer"), seq_len=1024
    )
    prepare(data, cache_dir=tmp_path / "cache")
    info = inspect(data, cache_dir=tmp_path / "cache")
    assert info.vocab_size == 50_304
    assert info.rows == (182_542 - 1) // 1024  # the count in the data's own README


def test_another_grammar_is_another_data_set(monkeypatch):
    from relora_core.data import grammar

    data = DataConfig(seq_len=64)
    before = inspect(data).fingerprint
    assert before == inspect(data).fingerprint
    rows = grammar.GrammarStream.next_rows
    monkeypatch.setattr(grammar.GrammarStream, "next_rows", lambda self, n: rows(self, n)[::-1])
    assert inspect(data).fingerprint != before
