"""MFU in both conventions: figures worked out by hand, or none."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from training import build, run

from experiments.identity import config_to_json
from relora_core import costs, utilisation
from relora_core.config import RunConfig
from relora_core.data.grammar import VOCAB_SIZE
from relora_core.utilisation import Mfu, Utilisation
from tests import warm

A100, H100, ODD = "NVIDIA A100-SXM4-40GB", "NVIDIA H100 PCIe", "NVIDIA A100-SXM4-40GB MIG 1g.5gb"
"""bf16: 312e12 FLOP/s, 756e12, not known."""

# The nano model by hand: 2 blocks of 7,680 weights, 97 words of 32 numbers, 16 tokens, rank 4.
LINEARS, HEAD, NORMS, ADAPTERS, ATTENTION = 15_360, 3_104, 160, 3_712, 12 * 2 * 32 * 16
SIX_N = 6 * (LINEARS + HEAD + NORMS) + ATTENTION  # 124,032
FULL_RANK = 6 * (LINEARS + HEAD) + ATTENTION  # 123,072
RELORA = 4 * LINEARS + 6 * (HEAD + ADAPTERS) + ATTENTION  # 114,624
PHASE = 6 * (LINEARS + HEAD) + 4 * ADAPTERS + ATTENTION  # 137,920: of ReLoRA at full rank
FIRST = range(4)

Nano = Callable[..., RunConfig]


def use_of(config: RunConfig, *gpus: str, sequences: int = 4) -> Utilisation:
    return Utilisation(config, gpus=gpus, sequences=sequences)


@pytest.fixture
def bf16(nano: Nano) -> Nano:
    """The nano run in bf16."""

    def make(**changes: Any) -> RunConfig:
        return nano(**changes | {"train": {"precision": "bf16"} | changes.get("train", {})})

    return make


@pytest.mark.parametrize(("method", "flops"), [("full_rank", FULL_RANK), ("relora", RELORA)])
def test_mfu_is_what_a_token_takes_over_the_peak(bf16: Nano, method: str, flops: int) -> None:
    mfu = use_of(bf16(method=method), A100).mfu(1e6, steps=FIRST)
    assert mfu == pytest.approx(Mfu(1e6 * flops / 312e12, 1e6 * SIX_N / 312e12))


def test_by_6n_the_124m_of_others_has_the_mfu_that_they_publish(bf16: Nano) -> None:
    """llm.c: 231k tokens/s of GPT-2 124M on an A100 are some 63 %, at 857 MFLOPs a token."""
    gpt2 = {"d_model": 768, "d_ff": 2048, "n_layers": 12, "n_heads": 12, "n_kv_heads": 12}
    config = bf16(model=gpt2 | {"vocab_size": 50_304}, data={"seq_len": 1024})
    assert costs.flops_per_token_6n(config) == pytest.approx(857e6, rel=0.01)
    mfu = use_of(config, A100).mfu(231e3, steps=FIRST)
    assert mfu is not None
    assert mfu.six_n == pytest.approx(0.63, abs=0.01)


def test_a_phase_at_full_rank_takes_what_it_trains(bf16: Nano) -> None:
    use = use_of(bf16(relora={"warm_start_steps": 2}), A100)
    for steps, flops in ((range(2), PHASE), (range(2, 9), RELORA), (FIRST, (PHASE + RELORA) / 2)):
        mfu = use.mfu(1e6, steps=steps)
        assert mfu == pytest.approx(Mfu(1e6 * flops / 312e12, 1e6 * SIX_N / 312e12))


def test_knobs_of_another_method_make_no_phase(bf16: Nano) -> None:
    plain, odd = bf16(method="switchlora"), bf16(method="switchlora", relora={"full_rank_steps": 9})
    assert use_of(odd, A100).mfu(1e6, steps=FIRST) == use_of(plain, A100).mfu(1e6, steps=FIRST)


def test_flops_of_a_phase_at_full_rank_are_those_that_torch_counts(bf16: Nano) -> None:
    """Of a block's SwiGLU: three linears, whose adapters take part and are not trained."""
    config = bf16(relora={"warm_start_steps": 2, "dropout": 0.0})
    model, method, _ = build(config)
    method.set_phase(0, model)
    with FlopCounterMode(display=False) as counter:
        model.layers[0].swiglu(torch.randn(4, 16, 32, requires_grad=True)).sum().backward()
    assert counter.get_total_flops() == 64 * (6 * 3 * 48 * 32 + 4 * 3 * 4 * (48 + 32))


@pytest.mark.parametrize(
    ("gpus", "peak"),
    [((A100, A100), 624e12), ((A100, H100), 1068e12), ((A100, ODD), None), ((), None)],
)
def test_of_several_gpus_all_count_or_none(
    bf16: Nano, gpus: tuple[str, ...], peak: float | None
) -> None:
    use = use_of(bf16(), *gpus)
    expected = peak and pytest.approx(Mfu(1e6 * RELORA / peak, 1e6 * SIX_N / peak))
    assert use.mfu(1e6, steps=FIRST) == expected


@pytest.mark.parametrize(
    ("name", "precision", "peak"),
    [
        (A100, "fp32", 19.5e12),
        (A100, "tf32", 156e12),
        ("NVIDIA B200", "bf16", 2250e12),
        ("NVIDIA B200", "fp32", None),
        ("Tesla V100-SXM2-16GB", "bf16", None),
    ],
)
def test_the_peak_is_that_of_the_precision(
    bf16: Nano, name: str, precision: str, peak: float | None
) -> None:
    use = use_of(bf16(train={"precision": precision}), name)
    assert use.peak == peak
    assert (use.mfu(1e6, steps=FIRST) is None) == (peak is None)
    expected = {"flops_per_s": peak or "unknown", "precision": precision, "gpus": {name: 1}}
    assert use.facts() == {"peak": expected}


def test_a_weight_built_in_each_pass_costs_more_where_passes_are_shorter(bf16: Nano) -> None:
    config = bf16(method="sltrain")
    shares = [use_of(config, A100, sequences=n).mfu(1e6, steps=FIRST) for n in (2, 4)]
    build_weights = 2 * config.sltrain.r * LINEARS
    more = 3 * (build_weights // 32 - build_weights // 64)
    assert shares[0].executed - shares[1].executed == pytest.approx(1e6 * more / 312e12)  # type: ignore[union-attr]


# a run --------------------------------------------------------------------------------------------
def test_a_cpu_has_no_peak(bf16: Nano, tmp_path: Path) -> None:
    record = run(bf16(model={"vocab_size": VOCAB_SIZE}, train={"steps": 2}), tmp_path)
    assert "peak" not in record.events[0].data
    keys = {key for event in record.events for key in event.metrics}
    assert {key for key in keys if key.startswith("perf/")} == {
        "perf/tokens_per_s",
        "perf/train_seconds",
    }


def test_events_have_the_mfu_of_their_own_speed(
    bf16: Nano, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the GPU that a CPU passes for; where a run goes on, too."""

    def measure(accelerator: Any, *, config: RunConfig, micro_batches: int) -> Utilisation:
        assert (accelerator.num_processes, micro_batches) == (1, 2)
        return use_of(config, A100)

    monkeypatch.setattr(utilisation, "measure", measure)
    config = bf16(
        model={"vocab_size": VOCAB_SIZE},
        train={"steps": 5, "micro_batch_size": 2},
        runtime={"log_every_steps": 2},
        checkpoint={"every_steps": 3},
    )
    six_n = 6 * (LINEARS + NORMS + VOCAB_SIZE * 32) + ATTENTION
    for ending, logs in ((("checkpoint", 3), [2]), (None, [4, 5])):
        record = run(config, tmp_path, die_at=ending)
        assert record.events[0].data["peak"]["flops_per_s"] == 312e12
        train = {e.step: e.metrics for e in record.events if e.kind == "train"}
        assert [step for step in train if step in logs] == logs
        for metrics in train.values():
            rate = metrics["perf/tokens_per_s"]
            assert metrics["perf/mfu_6n"] == pytest.approx(rate * six_n / 312e12)
            assert 0 < metrics["perf/mfu"] < metrics["perf/mfu_6n"]  # the base is frozen


TWO = """
import json, sys
from pathlib import Path
from types import SimpleNamespace
import torch
from experiments.identity import config_from_json
from relora_core import ranks, shell, train, utilisation

config = config_from_json((Path(sys.argv[1]) / "config.json").read_text())
place = shell.take_group()
assert ranks.form_group(place, ranks.facts(config, run="one"), backend="gloo", stop=train.never)
world = train.make_accelerator(config).num_processes
names = ["NVIDIA A100-SXM4-40GB", "NVIDIA H100 PCIe"]
torch.cuda.get_device_name = lambda device: names[place.rank]
gpus = SimpleNamespace(device=torch.device("cuda"), num_processes=world)
use = utilisation.measure(gpus, config=config, micro_batches=1)
print(json.dumps([use.facts(), use.mfu(1e6, steps=range(4))]))
"""


@pytest.mark.slow
def test_two_processes_agree_on_the_peak_of_both_gpus(bf16: Nano, tmp_path: Path) -> None:
    config = bf16()
    (tmp_path / "config.json").write_text(config_to_json(config))
    both = {"flops_per_s": 1068e12, "precision": "bf16", "gpus": {A100: 1, H100: 1}}
    for rank in warm.ranks(2, ["-c", TWO, tmp_path], cwd=tmp_path):
        facts, mfu = json.loads(rank.stdout.splitlines()[-1])
        assert facts == {"peak": both}
        assert mfu == pytest.approx([1e6 * RELORA / 1068e12, 1e6 * SIX_N / 1068e12])
