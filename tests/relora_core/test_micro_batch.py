"""train.micro_batch_tokens: no more sequences a pass than gain something, as many as fit."""

import dataclasses
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from training import run, run_in_processes

import relora_core.train as train_module
from experiments import schema
from experiments.disk.run_dir import RunDir
from experiments.identity import run_id
from experiments.run.runner import run_experiment
from relora_core import costs, head, loss
from relora_core.checkpoint import Progress
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
    return memory_bytes(dataclasses.replace(config, train=train), compiled=False)["total"]


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


@pytest.mark.parametrize(("compiled", "least"), [(True, 8), (False, 4)])
def test_the_papers_batch_takes_passes_of_16_where_they_fit(compiled, least):
    """The head without compiled blocks takes 1.6 GB more."""
    words = ["experiment=paper", "model=small", "model.vocab_size=50304", "data.seq_len=2048"]
    config = schema.compose(words)
    sizes = [gb * 10**9 for gb in (80, 40, 8)]
    chosen = [micro_batch(config, memory=size, compiled=compiled) for size in sizes]
    assert chosen == [16, 16, least]


@pytest.mark.parametrize(
    ("vocab", "tokens", "precision", "compiled", "logits"),
    [
        (301, 64, "bf16", True, 64 * 301 * 2),
        (301, 64, "bf16", False, 64 * 301 * 6),
        (301, 64, "fp32", True, 64 * 301 * 4),
        (301, 64, "tf32", False, 64 * 301 * 8),
        (50304, 16384, "bf16", True, 824_180_736),  # 8192 rows of 50,304 x 2
        (50304, 16384, "bf16", False, 2_472_542_208),
        (128256, 16384, "fp32", True, 4_202_692_608),
        (128256, 16384, "fp32", False, 4185 * (128256 + 50304) * 4),  # 2 GiB hold 4185 rows
        (50304, 16384, "bf16", None, 128 * 50304 * 4),  # a CPU's, as described and planned
    ],
)
def test_memory_counts_the_head_of_the_device(vocab, tokens, precision, compiled, logits):
    """And on a GPU the weights of products in bf16: here 2 blocks of 7680 and the head."""
    config = nano_config(
        method="full_rank", model={"vocab_size": vocab}, data={"seq_len": tokens // 4},
        train={"precision": precision},
    )  # fmt: skip
    memory = memory_bytes(config, compiled=compiled)
    assert memory["head"] == logits + vocab * 32 * 4
    copies = memory.get("bf16_weights", 0)
    here = compiled is not None and precision == "bf16"
    assert copies == (2 * (2 * 7680 + vocab * 32) if here else 0)
    assert memory["total"] == sum(n for name, n in memory.items() if name != "total")
    shared = ("weights", "gradients", "moments", "activations")
    assert all(memory[name] == memory_bytes(config)[name] for name in shared)


def test_a_gpus_blocks_of_logits_are_those_that_are_counted():
    assert head.CHUNK_ROWS == costs.GPU_HEAD_ROWS
    assert loss.HEAD_BLOCK["cuda"] == (costs.GPU_HEAD_ROWS, costs.GPU_HEAD_COLUMNS)
    assert loss.HEAD_BYTES["cuda"] == costs.GPU_HEAD_BYTES


@pytest.mark.parametrize("mode", [None, "off", "blocks", "cudagraphs"])
def test_a_run_counts_the_head_that_it_has(auto, monkeypatch, mode):
    asked = []
    monkeypatch.setattr(train_module, "gather_object", lambda sizes: sizes)
    monkeypatch.setattr(costs, "micro_batch", lambda *_, **options: asked.append(options) or 8)
    alone = SimpleNamespace(num_processes=1, device=torch.device("cpu"))
    progress = Progress(compile=mode)
    assert train_module.choose_micro_batch(progress, config=auto(), accelerator=alone) == 2
    assert [options["compiled"] for options in asked] == [mode in ("blocks", "cudagraphs")]


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
