"""Rows of ids in parquet: each once and in order, wherever a run stops, on any number of ranks."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from data_files import STORED, random_rows, write_bpe, write_rows
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from relora_core import data as data_package
from relora_core.config import ConfigError, DataConfig
from relora_core.data import DataError, inspect, open_stream, parquet, pretokenized

FILES = (300, 7, 410)
"""Rows per file: one chunk of 256 ends inside the first file, the next spans all three."""


@pytest.fixture(scope="session")
def rows() -> np.ndarray:
    return random_rows(sum(FILES))


@pytest.fixture(scope="session")
def folder(rows: np.ndarray, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("rows [1] of 'it'")  # names that a glob would misread
    done = 0
    for i, (count, group) in enumerate(zip(FILES, (64, 5, 100), strict=True)):
        file = path / "data" / f"train-{i:05d}-of-00003.parquet"
        write_rows(file, rows[done : done + count], group=group)
        done += count
    write_rows(path / "data" / "validation-00000-of-00001.parquet", rows[:4])
    return path


def config(path: Path | str, *, seq_len: int = STORED - 1, **changes) -> DataConfig:
    fields = {"kind": "pretokenized", "path": str(path), "vocab_size": 500, "seq_len": seq_len}
    return DataConfig(**{**fields, **changes})


def stream(data: DataConfig, *, rank: int = 0, world: int = 1, vocab_size: int = 500):
    return open_stream(data, seed=0, vocab_size=vocab_size, rank=rank, world=world)


def expected(rows: np.ndarray, seq_len: int, *, start: int, count: int) -> np.ndarray:
    """Global rows start..start+count, cut by hand from the stored rows, over and over."""
    cuts = [row[i : i + seq_len + 1] for row in rows for i in range(0, len(row) - seq_len, seq_len)]
    return np.stack([cuts[i % len(cuts)] for i in range(start, start + count)])


def error_line(data: DataConfig, **options) -> str:
    with pytest.raises(ConfigError) as caught:
        inspect(data, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# position ---------------------------------------------------------------------------------------
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    steps=st.lists(st.tuples(st.integers(1, 400), st.booleans()), min_size=1, max_size=6),
    seq_len=st.sampled_from([32, 16, 15, 7]),
    world=st.sampled_from([1, 2, 4]),
)
def test_resumed_at_any_position_on_any_rank_it_serves_the_rows_as_stored(
    folder, rows, steps, seq_len, world
):
    data = config(folder, seq_len=seq_len)
    rank = len(steps) % world
    source, position = stream(data, rank=rank, world=world), 0
    for n, resume in steps:
        if resume:  # a new process, from what JSON keeps of the state
            state = json.loads(json.dumps(source.state_dict()))
            source = stream(data, rank=rank, world=world)
            source.load_state_dict(state)
            assert source.state_dict() == state
        got = source.next_rows(n)
        assert got.dtype == np.int64
        want = expected(rows, seq_len, start=position, count=n * world)
        np.testing.assert_array_equal(got, want[rank::world])
        position += n * world


@pytest.mark.parametrize(
    "position", [1, 255, 256, 257, 299, 300, 306, 307, 308, 512, 716, 717, 718]
)
def test_every_border_of_chunk_file_and_epoch_can_be_resumed_at(folder, rows, position):
    data = config(folder)
    first = stream(data)
    first.next_rows(position)
    second = stream(data)
    second.load_state_dict(first.state_dict())
    np.testing.assert_array_equal(
        second.next_rows(300), expected(rows, 32, start=position, count=300)
    )


def test_a_run_goes_on_with_another_number_of_ranks(folder, rows):
    data = config(folder)
    four = stream(data, rank=3, world=4)
    four.next_rows(70)
    two = stream(data, rank=1, world=2)
    two.load_state_dict(four.state_dict())
    np.testing.assert_array_equal(two.next_rows(20), expected(rows, 32, start=280, count=40)[1::2])


def test_epochs_are_counted(folder):
    source = stream(config(folder))
    source.next_rows(717)
    assert source.state_dict()["epoch"] == 0
    source.next_rows(1)
    assert source.state_dict()["epoch"] == 1


def test_python_ends_in_silence_with_a_stream_half_read(folder):
    code = (
        "from relora_core.config import DataConfig\n"
        "from relora_core.data import open_stream\n"
        f"data = DataConfig(kind='pretokenized', path={str(folder)!r}, seq_len=32)\n"
        "stream = open_stream(data, seed=0, vocab_size=500)\n"
        "stream.next_rows(3)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr == ""


# planning ---------------------------------------------------------------------------------------
def test_inspect_counts_windows_and_says_what_is_not_used(folder):
    assert inspect(config(folder)).rows == sum(FILES)
    info = inspect(config(folder, seq_len=15))
    assert info.rows == 2 * sum(FILES)
    assert "2 sequences" in info.notes[0]
    assert "last 2 ids" in info.notes[0]


def test_fingerprint_goes_with_the_content_and_not_with_the_place(folder, tmp_path):
    moved = tmp_path / "elsewhere"
    shutil.copytree(folder, moved)
    before = inspect(config(folder)).fingerprint
    assert before is not None
    assert inspect(config(moved)).fingerprint == before
    assert inspect(config(moved, split="validation")).fingerprint != before
    file = moved / "data" / "train-00001-of-00003.parquet"
    changed = pq.read_table(file).column("input_ids").to_pylist()
    changed[0][0], changed[0][1] = changed[0][1], changed[0][0]  # same size, same statistics
    write_rows(file, changed, group=5)
    assert inspect(config(moved)).fingerprint != before


@pytest.mark.parametrize("hashed_whole", [0, 2**20])
def test_fingerprint_sees_a_file_less_with_footers_alone_too(
    folder, tmp_path, monkeypatch, hashed_whole
):
    monkeypatch.setattr(parquet, "HASHED_WHOLE", hashed_whole)
    moved = tmp_path / "moved"
    shutil.copytree(folder, moved)
    before = inspect(config(folder)).fingerprint
    assert inspect(config(moved)).fingerprint == before
    (moved / "data" / "train-00001-of-00003.parquet").unlink()
    assert inspect(config(moved)).fingerprint != before


def test_the_tokenizer_is_part_of_the_fingerprint_and_gives_the_vocabulary(folder, tmp_path):
    small = write_bpe(tmp_path / "a", vocab_size=265)
    large = write_bpe(tmp_path / "b", vocab_size=270)
    infos = [inspect(config(folder, vocab_size=512, tokenizer=str(t))) for t in (small, large)]
    assert infos[0].fingerprint != infos[1].fingerprint
    write_rows(tmp_path / "rows" / "train-0.parquet", random_rows(4, vocab_size=200))
    info = inspect(config(tmp_path / "rows", vocab_size=None, tokenizer=str(small)))
    assert info.vocab_size == 384  # 265 ids, padded to 3 * 128


@pytest.mark.parametrize("layout", ["data/train-0.parquet", "train-0.parquet", "part.parquet"])
def test_the_usual_layouts_are_found(tmp_path, layout):
    written = random_rows(5)
    write_rows(tmp_path / layout, written)
    assert inspect(config(tmp_path)).rows == 5
    np.testing.assert_array_equal(stream(config(tmp_path)).next_rows(5), written)
    np.testing.assert_array_equal(stream(config(tmp_path / layout)).next_rows(5), written)


# bad input --------------------------------------------------------------------------------------
def test_a_path_that_is_nowhere_is_named_with_its_nearest_neighbour(folder, tmp_path):
    assert "'/nowhere'" in error_line(config("/nowhere"))
    (tmp_path / "dolma-mini").mkdir()
    line = error_line(config(tmp_path / "dolma-mimi"))
    assert line.startswith("data.path must be")
    assert f"Did you mean '{tmp_path / 'dolma-mini'}'?" in line
    assert "no *.parquet" in error_line(config(tmp_path / "dolma-mini"))


def test_a_split_that_is_not_there_lists_those_that_are(folder, tmp_path):
    line = error_line(config(folder, split="validaton"))
    assert "data.split must be one of train, validation" in line
    assert "Did you mean 'validation'?" in line
    write_rows(tmp_path / "part.parquet", random_rows(3))
    assert "one of train" in error_line(config(tmp_path, split="val"))


def test_seq_len_beyond_the_stored_rows_names_the_nearest_valid(folder):
    assert "nearest valid: 32" in error_line(config(folder, seq_len=33))


def test_vocabulary_must_be_known_and_hold_the_tokenizer(folder, tmp_path):
    assert "data.vocab_size must be set" in error_line(config(folder, vocab_size=None))
    tokenizer = str(write_bpe(tmp_path / "t"))
    line = error_line(config(folder, vocab_size=128, tokenizer=tokenizer))
    assert "data.vocab_size must be >=" in line
    assert "got 128; nearest valid: 384" in line
    assert "data.eos_id" in error_line(config(folder, eos_id=500))


def rewritten(*rows, **options):
    return lambda file: write_rows(file, rows, **options)


def column(name, values):
    return lambda file: pq.write_table(pa.table({name: values}), file)


def pages(file: Path) -> None:
    raw = bytearray(file.read_bytes())
    raw[4:400] = b"\xff" * 396  # the footer stays as it was
    file.write_bytes(bytes(raw))


NO_PARQUET = b"no parquet at all, but long enough to look for a footer"
SPOILT = {
    "empty": (lambda file: file.write_bytes(b""), "is empty (0 bytes)"),
    "text": (lambda file: file.write_bytes(NO_PARQUET), "no readable parquet file"),
    "truncated": (
        lambda file: file.write_bytes(file.read_bytes()[:-100]),
        "no readable parquet file",
    ),
    "pages": (pages, "is damaged near row 0"),
    "column": (column("inputs_id", [[1, 2]]), "got columns inputs_id. Did you mean 'inputs_id'?"),
    "type": (column("input_ids", ["a b", "c"]), "must hold lists of integers, got string"),
    "length": (rewritten(range(STORED), range(STORED - 1)), "one length"),
    "length with the same mean": (
        rewritten(range(STORED), range(STORED - 1), range(STORED + 1)),
        "row 1 holds 32 ids, expected 33",
    ),
    "null": (rewritten(range(STORED), None, range(2 * STORED - 1)), "row 1 is null"),
    "id": (
        rewritten(range(STORED), [500, *range(STORED - 1)]),
        "holds id 500, expected ids in [0, 500)",
    ),
    "id without statistics": (
        rewritten(range(STORED), [-1, *range(STORED - 1)], statistics=False),
        "row 1 holds id -1 at position 0",
    ),
}


@pytest.mark.parametrize("what", SPOILT)
def test_a_bad_file_is_named_before_anything_runs(folder, tmp_path, what):
    spoil, says = SPOILT[what]
    path = tmp_path / "rows"
    shutil.copytree(folder, path)
    file = path / "data" / "train-00001-of-00003.parquet"
    spoil(file)
    line = error_line(config(path))
    assert str(file) in line
    assert says in line


def test_a_folder_without_rows_is_refused(tmp_path):
    write_rows(tmp_path / "train-0.parquet", [])
    assert "must hold rows, got 0" in error_line(config(tmp_path))


def test_ids_beyond_the_models_vocabulary_stop_the_stream_at_file_and_row(folder, rows):
    row = int(np.argmax(rows.max(axis=1) >= 499))
    with pytest.raises(DataError, match=r"row \d+ holds id 499 .*\[0, 499\)") as caught:
        stream(config(folder), vocab_size=499).next_rows(717)
    assert f"train-00000-of-00003.parquet: row {row} " in str(caught.value)


@pytest.mark.parametrize("stored_row", [0, 299, 306, 500])
def test_a_row_spoilt_after_planning_is_found_where_it_lies(tmp_path, folder, rows, stored_row):
    path = tmp_path / "rows"
    shutil.copytree(folder, path)
    changed = rows.copy()
    changed[stored_row, 5] = -3
    ends = np.cumsum(FILES)
    i = int(np.searchsorted(ends, stored_row, side="right"))
    start = int(ends[i]) - FILES[i]
    file = path / "data" / f"train-{i:05d}-of-00003.parquet"
    write_rows(file, changed[start : ends[i]])
    with pytest.raises(DataError) as caught:
        stream(config(path, seq_len=8)).next_rows(717 * 4)
    assert f"{file}: row {stored_row - start} holds id -3 at position 5" in str(caught.value)


# layouts and types --------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("names", "other"),
    [
        (["default/train/0000.parquet", "default/train/0001.parquet"], "default/test/0000.parquet"),
        (["split=train/0.parquet", "split=train/1.parquet"], "split=test/0.parquet"),
        (["dump=a/0.parquet", "dump=b/0.parquet"], None),
        (["en/train-00000-of-00002.parquet", "en/train-00001-of-00002.parquet"], "en/test.parquet"),
    ],
)
def test_the_hubs_other_layouts_are_read_in_order(tmp_path, names, other):
    rows = random_rows(20)
    for name, part in zip(names, (rows[:10], rows[10:]), strict=True):
        write_rows(tmp_path / name, part)
    if other:
        write_rows(tmp_path / other, random_rows(5, seed=1))
        assert "data.split must be one of test, train" in error_line(config(tmp_path, split="tset"))
    assert inspect(config(tmp_path)).rows == 20
    np.testing.assert_array_equal(stream(config(tmp_path)).next_rows(20), rows)
    if other and other.startswith("default"):
        write_rows(tmp_path / "fr" / "train" / "0.parquet", random_rows(5))
        assert "one configuration" in error_line(config(tmp_path))
        assert inspect(config(tmp_path / "fr")).rows == 5


def test_parquet_that_is_not_read_is_said(tmp_path):
    write_rows(tmp_path / "train-0.parquet", random_rows(20))
    before = inspect(config(tmp_path))
    for name in ("part.parquet", "deep/train-0.parquet", "test-0.parquet"):
        write_rows(tmp_path / name, random_rows(20))
    after = inspect(config(tmp_path))
    assert after.fingerprint == before.fingerprint
    assert set(after.notes) - set(before.notes) == {
        "parquet files that are not read: deep/train-0.parquet, part.parquet"
    }


@pytest.mark.parametrize(
    "kind",
    [
        *(pa.list_(pa.int32()), pa.list_(pa.uint16()), pa.list_(pa.int64())),
        *(pa.list_(pa.uint64()), pa.large_list(pa.int32()), pa.list_(pa.int32(), 33)),
        *(pa.list_view(pa.int32()), pa.large_list_view(pa.int64())),
    ],
    ids=str,
)
def test_every_type_of_list_and_of_whole_number_is_read(tmp_path, kind):
    rows = random_rows(600)
    table = pa.table({"input_ids": pa.array(rows.tolist(), type=kind)})
    pq.write_table(table, tmp_path / "train-0.parquet", row_group_size=400)
    assert inspect(config(tmp_path)).rows == 600
    np.testing.assert_array_equal(stream(config(tmp_path)).next_rows(600), rows)


@pytest.mark.parametrize("kind", [pa.null(), pa.list_(pa.null()), pa.list_(pa.int32())], ids=str)
def test_empty_shards_are_passed_over(tmp_path, kind):
    rows = random_rows(20)
    write_rows(tmp_path / "train-0.parquet", rows[:10])
    pq.write_table(pa.table({"input_ids": pa.array([], kind)}), tmp_path / "train-1.parquet")
    write_rows(tmp_path / "train-2.parquet", rows[10:])
    assert inspect(config(tmp_path)).rows == 20
    np.testing.assert_array_equal(stream(config(tmp_path)).next_rows(20), rows)
    nulls = pa.table({"input_ids": pa.array([None], pa.null())})
    pq.write_table(nulls, tmp_path / "train-3.parquet")
    assert "must hold lists of integers, got null" in error_line(config(tmp_path))


@pytest.mark.parametrize("header", [None, (20240520, np.uint16), (20240801, np.uint32)])
def test_a_file_of_bare_ids_is_read_in_order(tmp_path, header):
    """nanoGPT's train.bin, and llm.c's with a header."""
    ids = np.random.default_rng(0).integers(0, 500, 1001)
    magic, dtype = header or (None, np.uint16)
    start = np.array([magic, 1, 1001] + [0] * 253, dtype=np.int32).tobytes() if magic else b""
    (tmp_path / "train.bin").write_bytes(start + ids.astype(dtype).tobytes())
    data = config(tmp_path, seq_len=10)
    info = inspect(data)
    assert info.rows == 100
    assert info.fingerprint == inspect(config(tmp_path / "train.bin", seq_len=10)).fingerprint
    want = np.stack([ids[10 * j : 10 * j + 11] for j in range(100)] * 2)
    np.testing.assert_array_equal(stream(data).next_rows(200), want)
    ranks = [stream(data, rank=rank, world=2) for rank in range(2)]
    for rank, source in enumerate(ranks):
        source.next_rows(30)
        resumed = stream(data, rank=rank, world=2)
        resumed.load_state_dict(json.loads(json.dumps(source.state_dict())))
        np.testing.assert_array_equal(resumed.next_rows(50), want[60 + rank : 160 : 2])


def test_a_bad_file_of_ids_is_one_line(tmp_path):
    file = tmp_path / "train.bin"
    file.write_bytes(np.arange(100, dtype=np.uint16).tobytes())
    assert "holds id 99, expected ids in [0, 50)" in error_line(config(file, vocab_size=50))
    assert "data.seq_len must be in [1, 99]" in error_line(config(file, seq_len=100))
    with pytest.raises(DataError, match=r"id 50 at position 50, expected ids in \[0, 50\)"):
        stream(config(file, seq_len=9), vocab_size=50).next_rows(9)
    file.write_bytes(b"odd")
    assert "must hold ids of 2 bytes (uint16), got 3 bytes" in error_line(config(file))
    before = (tmp_path / "val.bin").write_bytes(bytes(200))
    assert before
    assert inspect(config(tmp_path, split="val")).rows == 3
    line = error_line(config(tmp_path, split="valid"))
    assert "data.split must be one of train, val (*.bin in " in line
    assert line.endswith("got 'valid'. Did you mean 'val'?")


# hub --------------------------------------------------------------------------------------------
@pytest.fixture
def hub(folder, tmp_path, monkeypatch):
    """The hub's two answers, from the local folder: the commit of a name, and the data set."""
    import datasets
    import huggingface_hub

    load, state = datasets.load_dataset, SimpleNamespace(sha="a" * 40, asked=[])
    shutil.copytree(folder, tmp_path / "hub")

    def load_dataset(name, *, revision, **options):
        assert name == "owner/rows"
        state.asked.append(revision)
        return load(str(tmp_path / "hub"), **options)

    def repo_info(self, name, *, revision, repo_type, timeout):
        assert (name, repo_type) == ("owner/rows", "dataset")
        return SimpleNamespace(sha=revision or state.sha)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(huggingface_hub.HfApi, "repo_info", repo_info)
    return state


@pytest.fixture
def no_wait(monkeypatch):
    """The half second that a stream of the hub takes to end matters when Python exits only."""
    monkeypatch.setattr(pretokenized.time, "sleep", lambda seconds: None)


@pytest.mark.slow
@settings(
    max_examples=15,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
@given(
    steps=st.lists(st.tuples(st.integers(1, 400), st.booleans()), min_size=1, max_size=5),
    world=st.sampled_from([1, 2]),
)
def test_a_hub_name_serves_the_same_rows_and_resumes_at_any_position(
    hub, no_wait, rows, steps, world
):
    data = config("owner/rows")
    ranks, position = [stream(data, rank=r, world=world) for r in range(world)], 0
    for n, resume in steps:
        if resume:
            state = json.loads(json.dumps(ranks[0].state_dict()))
            ranks = [stream(data, rank=r, world=world) for r in range(world)]
            for rank in ranks:
                rank.load_state_dict(state)
        want = expected(rows, 32, start=position, count=n * world)
        for r, rank in enumerate(ranks):
            np.testing.assert_array_equal(rank.next_rows(n), want[r::world])
        position += n * world
        assert len({json.dumps(rank.state_dict()) for rank in ranks}) == 1


@pytest.mark.parametrize("position", [1, 255, 256, 257, 300, 307, 512, 716, 717, 718])
def test_every_border_of_a_hub_stream_can_be_resumed_at(hub, no_wait, rows, position):
    data = config("owner/rows")
    first, second = stream(data), stream(data)
    first.next_rows(position)
    second.load_state_dict(first.state_dict())
    want = expected(rows, 32, start=position, count=300)
    np.testing.assert_array_equal(second.next_rows(300), want)


@pytest.mark.slow
def test_a_hub_stream_left_open_lets_python_end(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "hub")
    code = (
        "import datasets\n"
        "from relora_core.data import pretokenized\n"
        f"rows = datasets.load_dataset({str(tmp_path / 'hub')!r}, split='train', streaming=True)\n"
        "reader = pretokenized._HubReader(rows.with_format('arrow'), name='owner/rows')\n"
        "reader.read()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_the_commit_that_was_planned_is_the_one_that_is_read(hub, no_wait):
    data = config("owner/rows")
    data.fingerprint = inspect(data).fingerprint
    stream(data).next_rows(1)
    assert set(hub.asked) == {"a" * 40}


def test_a_hub_data_set_that_moved_on_is_refused_unless_the_commit_is_named(hub, no_wait):
    data = config("owner/rows")
    data.fingerprint = inspect(data).fingerprint
    hub.sha = "b" * 40
    with pytest.raises(ConfigError, match="another commit"):
        stream(data)
    data.path = "owner/rows@" + "a" * 40
    stream(data).next_rows(1)
    assert hub.asked[-1] == "a" * 40


def test_a_hub_split_that_is_not_there_is_one_line(hub, no_wait):
    assert "data.split=nosuch" in error_line(config("owner/rows", split="nosuch"))
    assert "nearest valid: 32" in error_line(config("owner/rows", seq_len=100))
    assert "holds id" in error_line(config("owner/rows", vocab_size=400))


def test_an_unreachable_hub_is_one_line(monkeypatch):
    import huggingface_hub

    def repo_info(self, *args, **options):
        raise ConnectionError("no route\nto host")

    monkeypatch.setattr(huggingface_hub.HfApi, "repo_info", repo_info)
    line = error_line(config("owner/rows"))
    assert "no such local path, and the hub could not be reached" in line


# real data --------------------------------------------------------------------------------------
def test_real_rows_are_counted_and_served_as_stored(shared_data):
    folder = shared_data / "pretokenized" / "dolma-mini"
    data = config(folder, seq_len=2048, vocab_size=None, tokenizer=str(shared_data / "tokenizer"))
    info = inspect(data)
    assert (info.rows, info.vocab_size, info.notes) == (2048, 50_304, [])
    assert inspect(config(folder, seq_len=1024, vocab_size=50_304)).rows == 4096
    tokenizer = data_package.load_tokenizer(data)
    assert tokenizer is not None
    assert tokenizer.eos_id == 50_279
    source = stream(data, vocab_size=info.vocab_size)
    file = folder / "data" / "train-00001-of-00004.parquet"
    stored = pq.read_table(file, columns=["input_ids"]).column(0)
    served = source.next_rows(514)
    np.testing.assert_array_equal(served[512], stored[0].as_py())
    np.testing.assert_array_equal(served[513], stored[1].as_py())
