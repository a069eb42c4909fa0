"""train.micro_batch_tokens: no more sequences a pass than gain something, as many as fit."""

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st
from training import run, run_in_processes

import relora_core.train as train_module
from experiments import schema
from experiments.disk.run_dir import RunDir
from experiments.identity import run_id
from experiments.run.runner import run_experiment
from relora_core.config import DataConfig, TrainConfig
from relora_core.costs import MEMORY_SHARE, memory_bytes, micro_batch
from relora_core.data.grammar import VOCAB_SIZE
from tests.conftest import nano_config

AUTO = {"micro_batch_tokens": 8 * 16}


@pytest.fixture
def auto(nano):
    """A run of seconds, by default with passes of 8 sequences, half of its batch."""

    def make(micro=None, **train):
        train = {"batch_size": 16, "steps": 4, "micro_batch_size": micro, **(train or AUTO)}
        return nano(model={"vocab_size": VOCAB_SIZE}, train=train, checkpoint={"every_steps": 2})

    return make


def sized(*, batch, seq_len, suffices):
    train = TrainConfig(steps=1, batch_size=batch, micro_batch_tokens=suffices)
    return dataclasses.replace(nano_config(), train=train, data=DataConfig(seq_len=seq_len))


def total(config, micro):
    train = dataclasses.replace(config.train, micro_batch_size=micro)
    return memory_bytes(dataclasses.replace(config, train=train))["total"]


@given(
    batch=st.integers(1, 2048), seq_len=st.integers(1, 2048), world=st.integers(1, 8),
    tokens=st.integers(1, 10**5), memory=st.none() | st.integers(0, 10**11),
)  # fmt: skip
def test_it_is_the_smallest_that_suffices_or_the_largest_that_fits(
    batch, seq_len, world, tokens, memory
):
    config, share = sized(batch=batch * world, seq_len=seq_len, suffices=tokens), batch
    chosen = micro_batch(config, processes=world, memory=memory)
    divisors = [n for n in range(1, share + 1) if share % n == 0]
    fits = [n for n in divisors if memory is None or total(config, n) <= MEMORY_SHARE * memory]
    suffices = [n for n in divisors if n * seq_len >= tokens]
    if not fits:
        assert chosen == 1
    elif suffices and suffices[0] in fits:
        assert chosen == suffices[0]
    else:
        assert chosen == max(fits)


def test_the_papers_batch_takes_passes_of_16_where_they_fit():
    words = ["experiment=paper", "model=small", "model.vocab_size=50304", "data.seq_len=2048"]
    config = schema.compose(words)
    assert [micro_batch(config, memory=gb * 10**9) for gb in (80, 40, 8)] == [16, 16, 8]


@pytest.mark.parametrize("tokens", [None, 8 * 16])
def test_a_number_means_what_it_did_and_none_without_tokens_the_whole_share(auto, tokens):
    assert micro_batch(auto(4, micro_batch_tokens=tokens), memory=1) == 4
    assert micro_batch(auto(micro_batch_tokens=None), memory=1) == 16


def test_it_is_no_part_of_the_identity(auto):
    assert run_id(auto(4)) == run_id(auto()) == run_id(auto(micro_batch_tokens=None))


def test_a_run_computes_what_it_does_with_that_number_and_says_which(auto, tmp_path):
    named, chosen = run(auto(8), tmp_path / "8"), run(auto(), tmp_path / "auto")
    assert chosen.metrics() == named.metrics()
    assert "micro_batch_size" not in named.events[0].data
    assert chosen.events[0].data["micro_batch_size"] == 8
    other = run(auto(2), tmp_path / "2")
    assert other.metrics() != named.metrics()  # or the test would show nothing


def test_a_gpus_memory_decides(auto, tmp_path, monkeypatch):
    enough_for_4 = int(total(auto(), 4) / MEMORY_SHARE) + 1
    monkeypatch.setattr(train_module, "memory_of", lambda device: enough_for_4)
    assert run(auto(), tmp_path).events[0].data["micro_batch_size"] == 4


def test_a_resumed_run_keeps_what_it_began_with(auto, tmp_path, monkeypatch):
    full = run(auto(), tmp_path / "full")
    run(auto(), tmp_path / "killed", die_at=("train", 3))
    monkeypatch.setattr(train_module, "memory_of", lambda device: 1)
    again = run(auto(), tmp_path / "killed")
    assert again.events[0].data["micro_batch_size"] == 8
    assert again.metrics(after=2) == full.metrics(after=2)


def test_a_run_that_began_with_a_number_goes_on_with_it(auto, tmp_path):
    """As of an experiment that named one when it began."""
    run_dir = RunDir(tmp_path / "runs" / "a")
    run_dir.create(auto(2))
    run_experiment(auto(), run_dir)
    assert "micro_batch_size" not in run_dir.events()[0]["data"]
    named = run(auto(2), tmp_path / "2").metrics()
    losses = [
        (e["step"], e["metrics"]["train/loss"]) for e in run_dir.events() if e["kind"] == "train"
    ]
    assert losses == [(step, v) for (step, name), v in named.items() if name == "train/loss"]


UNEQUAL = """
import os
import relora_core.train as t
choose, sizes = t.choose_micro_batch, {sizes}
t.memory_of = lambda device: sizes[int(os.environ["RANK"])]
def checked(*args, **options):
    passes = choose(*args, **options)
    assert passes == 4, passes
    return passes
t.choose_micro_batch = checked
"""


@pytest.mark.slow
def test_the_smallest_gpu_of_a_group_decides_for_all(auto, tmp_path):
    sizes = [10**12, int(total(auto(), 2) / MEMORY_SHARE) + 1]
    run_in_processes(auto(), tmp_path, processes=2, prelude=UNEQUAL.format(sizes=sizes))
