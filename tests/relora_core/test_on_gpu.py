"""What a GPU alone can show: code that was compiled for it, real waits, sums in its own order.

What can be shown without one is in `test_gpu_path*.py`. `make test` runs these where there is one.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from training import build, run

from experiments.identity import config_to_json
from relora_core import graphs, head, train
from relora_core.config import RunConfig
from relora_core.graphs import Graphs

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here"),
    # Dynamo's and Inductor's advice, and that finding of waits is a prototype.
    pytest.mark.filterwarnings("ignore::UserWarning"),
]
ROOT = Path(__file__).resolve().parents[2]
DEVICE = "cuda"
Nano = Callable[..., RunConfig]


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def on_gpu(nano: Nano, **changes: Any) -> RunConfig:
    """Heads of 8 columns as tiny has them, 4 reading 2, and a vocabulary of the grammar's size."""
    runtime = {"device": DEVICE, "log_every_steps": 1, **changes.pop("runtime", {})}
    model = {"vocab_size": 301, **changes.pop("model", {})}
    return nano(model=model, runtime=runtime, **changes)


# compiled blocks ---------------------------------------------------------------------------------
class Passes:
    """A model on the GPU and gradients of its passes, compiled or not."""

    def __init__(self, config: RunConfig, *, mode: str) -> None:
        self.config = config
        self.model, self.method, self.optimizer = build(config)
        self.model.to(DEVICE)
        self.method.prepare_graphs(self.model)
        self.model.graphs = Graphs(mode)
        with torch.no_grad():  # an adapter that adds nothing would hide its dropout
            for name, parameter in self.model.named_parameters():
                if "lora_B" in name:
                    drawn = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0))
                    parameter.copy_(drawn / 10)

    def gradients(self, step: int) -> dict[str, Tensor]:
        draws = torch.Generator().manual_seed(step)
        ids = torch.randint(0, 301, (4, 65), generator=draws).to(DEVICE)
        self.model.zero_grad(set_to_none=True)
        self.method.before_pass(step, first=step, stride=2)
        half = self.config.train.precision == "bf16"
        with torch.autocast(DEVICE, dtype=torch.bfloat16, enabled=half):
            loss = self.model(ids[:, :-1], ids[:, 1:])
        loss.backward()
        gradients = {n: p.grad for n, p in self.model.named_parameters() if p.grad is not None}
        return {"loss": loss.detach(), **{name: g.clone() for name, g in gradients.items()}}


@pytest.mark.parametrize("mode", ["blocks", "cudagraphs"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("method", ["full_rank", "relora", "switchlora", "sltrain"])
def test_compiled_gradients_are_those_of_eager_passes(
    nano: Nano, method: str, precision: str, mode: str
) -> None:
    """Dropout included. In bf16 a compiler rounds at other places than eager kernels do."""
    changes = {"relora": {"dropout": 0.1}} if method == "relora" else {}
    config = on_gpu(nano, method=method, train={"precision": precision}, **changes)
    one = Passes(config, mode=mode)
    for step in range(4):  # CUDA graphs are recorded in the second, and replayed from then on
        compiled = one.gradients(step)
        with graphs.without(one.model):
            plain = one.gradients(step)
        assert compiled.keys() == plain.keys()
        for name, gradient in plain.items():
            distance = (compiled[name] - gradient).norm() / gradient.norm().clamp(min=1e-12)
            assert distance < (1e-3 if precision == "fp32" else 0.1), (step, name)


def test_a_change_of_phase_is_compiled_anew(nano: Nano, tmp_path: Path) -> None:
    """Losses of each step as without graphs, through a start at full rank and two restarts."""
    relora = {"warm_start_steps": 3, "dropout": 0.1}
    config = on_gpu(nano, relora=relora)
    config.runtime.compile = "off"
    plain = run(config, tmp_path / "off").metrics()
    config.runtime.compile = "blocks"
    compiled = run(config, tmp_path / "blocks").metrics()
    assert_same_losses(compiled, plain, steps=config.train.steps)


@pytest.mark.parametrize("micro_batch", [None, 2])
def test_cuda_graphs_outlast_restarts(nano: Nano, tmp_path: Path, micro_batch: int | None) -> None:
    """They hold the addresses of weights, which a restart changes in place: three of them here."""
    config = on_gpu(nano, relora={"dropout": 0.1}, train={"micro_batch_size": micro_batch})
    records = {}
    for mode in ("off", "cudagraphs"):
        config.runtime.compile = mode
        records[mode] = run(config, tmp_path / mode)
    assert records["cudagraphs"].events[0].data["compile"] == "cudagraphs"
    assert len(records["cudagraphs"].of("restart")) >= 2
    made = records["cudagraphs"].metrics()
    assert_same_losses(made, records["off"].metrics(), steps=config.train.steps)
    changes = [v for (_, name), v in made.items() if name == "restart/logit_change_max"]
    assert max(changes) < 1e-3


def assert_same_losses(
    metrics: dict[tuple[int, str], float], others: dict[tuple[int, str], float], *, steps: int
) -> None:
    for step in range(1, steps + 1):
        own, its = (m[step, "train/loss"] for m in (metrics, others))
        assert own == pytest.approx(its, rel=2e-3), step


# waits -------------------------------------------------------------------------------------------
@pytest.mark.parametrize("compiled", ["off", "blocks", "cudagraphs"])
@pytest.mark.parametrize("method", ["full_rank", "relora", "galore", "switchlora"])
def test_steps_between_logs_never_wait_for_the_gpu(
    nano: Nano, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str, compiled: str
) -> None:
    """Of twelve updates 3 to 10, torch itself raises where one does."""
    changes: dict[str, Any] = {"relora": {"reset_frequency": 11, "dropout": 0.1}}
    if method == "galore":
        changes = {"galore": {"r": 4, "update_gap": 100}}
    elif method == "switchlora":
        changes = {}
    runtime = {"log_every_steps": 11, "compile": compiled}
    config = on_gpu(
        nano,
        method=method,
        train={"steps": 12, "precision": "bf16", "grad_clip": 1.0, "micro_batch_size": 2},
        runtime=runtime,
        checkpoint={"every_steps": 100},
        **changes,
    )
    build_method, watched = train.build_method, []

    def build_watched(config: RunConfig) -> Any:
        made = build_method(config)
        multiplier = made.lr_multiplier

        def watch(step: int) -> float:  # begins each update
            watched.append(step)
            torch.cuda.set_sync_debug_mode("error" if 2 <= step < 10 else "default")
            return multiplier(step)

        made.lr_multiplier = watch  # type: ignore[method-assign]
        return made

    monkeypatch.setattr(train, "build_method", build_watched)
    try:
        assert run(config, tmp_path).state == "finished"
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert set(watched) >= set(range(12))


# head --------------------------------------------------------------------------------------------
@pytest.mark.parametrize("width", [96, 384])
@pytest.mark.parametrize("half", [False, True])
def test_the_compiled_head_is_near_float64(width: int, half: bool) -> None:
    """At the paper's vocabulary, in more than one chunk of rows; certain targets among them."""
    draws = torch.Generator().manual_seed(0)
    tokens, vocabulary = head.CHUNK_ROWS + 64, 50304
    hidden = torch.randn(tokens, width, generator=draws)
    weight = torch.randn(vocabulary, width, generator=draws) * width**-0.5
    targets = torch.randint(0, vocabulary, (tokens,), generator=draws)
    hidden[:16] = weight[targets[:16]] * 20
    if half:  # as the products get them
        hidden, weight = hidden.bfloat16().float(), weight.bfloat16().float()
    hidden, weight, targets = (x.to(DEVICE) for x in (hidden, weight, targets))

    def gradients() -> list[Tensor]:
        h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        with torch.autocast(DEVICE, dtype=torch.bfloat16, enabled=half):
            loss = head.fused_head_loss(h, w, targets)
        return [loss.detach(), *torch.autograd.grad(loss, (h, w))]

    made, again, exact = gradients(), gradients(), exact_in_chunks(hidden, weight, targets)
    torch.testing.assert_close(made[0].double(), exact[0], rtol=1e-3 if half else 1e-5, atol=1e-5)
    for mine, its in zip(made[1:], exact[1:], strict=True):
        assert (mine - its).norm() / its.norm() < (1e-2 if half else 1e-4)
    for mine, its in zip(made, again, strict=True):
        assert torch.equal(mine, its)  # no sum depends on which thread comes first


def exact_in_chunks(hidden: Tensor, weight: Tensor, targets: Tensor) -> list[Tensor]:
    """(loss, by hidden, by weight) in float64, some rows at a time."""
    total, w = hidden.new_zeros((), dtype=torch.float64), weight.double().requires_grad_()
    by_hidden, by_weight = [], torch.zeros_like(w)
    for rows, ids in zip(hidden.double().split(1024), targets.split(1024), strict=True):
        own = rows.clone().requires_grad_()
        loss = F.cross_entropy(own @ w.T, ids, reduction="sum") / len(hidden)
        d_own, d_w = torch.autograd.grad(loss, (own, w))
        by_hidden.append(d_own)
        by_weight += d_w
        total += loss.detach()
    return [total, torch.cat(by_hidden), by_weight]


# runs --------------------------------------------------------------------------------------------
RESUMES = """
import sys
from pathlib import Path
from experiments.identity import config_from_json
from training import Undisturbed, resumes_exactly

folder = Path(sys.argv[1])
config = config_from_json((folder / "config.json").read_text())
undisturbed = Undisturbed(lambda: folder / "whole")
parts, at = folder / "parts", ("checkpoint", 6)
assert resumes_exactly(config, parts, die_at=at, undisturbed=undisturbed)
"""


@pytest.mark.parametrize(
    ("method", "compiled", "vocabulary"),
    [
        ("full_rank", "off", 301),
        ("relora", "off", 301),
        ("full_rank", "blocks", 301),
        ("relora", "blocks", 301),
        ("relora", "blocks", 50257),  # long sums of an odd size, as Inductor tries several ways
    ],
)
def test_a_resumed_run_is_the_same_bit_for_bit(
    nano: Nano, tmp_path: Path, method: str, compiled: str, vocabulary: int
) -> None:
    """With runtime.deterministic, which a process must begin with; killed after step 6."""
    config = on_gpu(
        nano,
        method=method,
        model={"vocab_size": vocabulary},
        train={"precision": "bf16"},
        checkpoint={"every_steps": 3},
        runtime={"compile": compiled, "deterministic": True},
    )
    (tmp_path / "config.json").write_text(config_to_json(config))
    path = os.pathsep.join([str(ROOT), str(Path(__file__).parent)])
    words = [sys.executable, "-c", RESUMES, str(tmp_path)]
    subprocess.run(words, env=os.environ | {"PYTHONPATH": path}, check=True)


@pytest.mark.slow
def test_the_benchmark_measures_every_variant(tmp_path: Path) -> None:
    words = ["--models", "nano", "--length", "64", "--turns", "2", "--seconds", "0.1"]
    words += ["--only", "train;small batches;head;eval", "--into", str(tmp_path)]
    subprocess.run([sys.executable, "benchmarks/gpu.py", *words], cwd=ROOT, check=True)
    rows = json.loads((tmp_path / "gpu.json").read_text())["rows"]
    assert [(row["variant"], row["note"]) for row in rows if not row["rates"]] == []
    for row in rows:
        assert min(row["rates"]) > 0
        if row["loss"] is not None:
            assert row["loss"] == pytest.approx(math.log(304), rel=0.1)
        if row["variant"].endswith(("blocks", "cudagraphs", "compiled")):
            assert row["compile_s"] > 0
