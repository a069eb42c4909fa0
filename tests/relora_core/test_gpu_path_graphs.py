"""Compiled blocks: how many graphs there are and when, and that they compute what blocks do.

Mostly with the backend `aot_eager`, which differs from a GPU's in the code made for a graph alone.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from training import batch, build, resumed, run, run_in_processes, weights

from relora_core import dropout, graphs, kernels, native, train
from relora_core.config import ConfigError, RunConfig
from relora_core.graphs import Graphs

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor"),  # Dynamo's own
]
CPU, GPU = torch.device("cpu"), torch.device("cuda")
Nano = Callable[..., RunConfig]


@pytest.fixture(autouse=True)
def torch_kernels() -> Iterator[None]:
    with native.restore_choice():
        native.choose("torch")
        torch.compiler.reset()
        yield
        torch.compiler.reset()


class Compared:
    """A model and its gradients, compiled and not."""

    def __init__(self, config: RunConfig) -> None:
        self.model, self.method, self.optimizer = build(config)
        self.counter = CompileCounterWithBackend("aot_eager")
        self.method.prepare_graphs(self.model)
        self.graphs = Graphs("blocks", backend=self.counter)
        self.model.graphs = self.graphs
        with torch.no_grad():  # an adapter that adds nothing would hide its dropout
            for name, parameter in self.model.named_parameters():
                if "lora_B" in name:
                    parameter.normal_(std=0.1, generator=torch.Generator().manual_seed(0))

    def gradients(self, step: int) -> dict[str, torch.Tensor]:
        self.model.zero_grad(set_to_none=True)
        self.method.before_pass(step, first=step, stride=2)
        self.model(*batch(step)).backward()
        trained = {n: p for n, p in self.model.named_parameters() if p.requires_grad}
        return {name: p.grad.clone() for name, p in trained.items() if p.grad is not None}

    def check(self, step: int) -> None:
        """Gradients of a pass equal those of one without graphs."""
        compiled = self.gradients(step)
        with graphs.without(self.model):
            plain = self.gradients(step)
        assert compiled.keys() == plain.keys()
        for name, gradient in plain.items():
            torch.testing.assert_close(compiled[name], gradient, rtol=1e-4, atol=1e-6)

    def update(self, step: int) -> None:
        """As the loop does."""
        self.gradients(step)
        self.method.before_update(step, self.model)
        self.optimizer.step()
        self.method.after_step(step + 1, self.model, self.optimizer)
        self.method.set_phase(step + 1, self.model)


@pytest.mark.parametrize(
    "changes",
    [
        {"relora": {"dropout": 0.1}},
        {"relora": {"nested_rank": True}},
        {"relora": {"scaling": "trainable", "dropout": 0.5}},
        {"method": "full_rank"},
        {"method": "switchlora"},
        {"method": "sltrain"},
    ],
    ids=["dropout", "nested", "trainable", "full rank", "switchlora", "sltrain"],
)
def test_one_graph_serves_all_blocks_and_steps(nano: Nano, changes: dict[str, Any]) -> None:
    """Its pass differs from the others in dropout's seeds, places and ranks; restarts are in it."""
    one = Compared(nano(model={"n_layers": 3}, **changes))
    for step in range(6):
        one.check(step)
        one.update(step)
    assert one.counter.frame_count == 1


@pytest.mark.parametrize(
    ("relora", "graphs_at_step"),
    [
        ({"warm_start_steps": 2}, [1, 1, 2, 2, 2]),
        ({"rank_schedule": [[4, 2]]}, [1, 1, 1, 1, 2]),
    ],
    ids=["phase", "rank"],
)
def test_a_change_of_phase_or_rank_compiles_once_more(
    nano: Nano, relora: dict[str, Any], graphs_at_step: list[int]
) -> None:
    one, counts = Compared(nano(relora=relora)), []
    for step in range(5):
        one.check(step)
        counts.append(one.counter.frame_count)
        one.update(step)
    assert counts == graphs_at_step


def test_no_graph_outlives_what_it_was_made_for(
    nano: Nano, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where nobody says that a weight is trained now: all are dropped, whatever torch's guards
    would have seen."""
    reset, dropped = torch.compiler.reset, []
    monkeypatch.setattr(torch.compiler, "reset", lambda: dropped.append(reset()))
    one, name = Compared(nano(method="full_rank")), "layers.1.attention.q_proj.weight"
    one.check(0)
    one.update(0)
    one.check(1)
    assert len(dropped) == 0
    for count, change in enumerate((False, True), 1):
        one.model.get_parameter(name).requires_grad_(change)
        one.check(1)
        assert (name in one.gradients(1)) is change
        assert len(dropped) == count


@pytest.mark.parametrize("cuda_graphs", [True, False])
def test_gradients_in_the_memory_of_cuda_graphs_are_kept_from_the_next_pass(
    nano: Nano, cuda_graphs: bool
) -> None:
    """Which writes its own there: here other numbers lie where the first pass's were."""
    model, _, _ = build(nano(method="full_rank"))
    expected, overwritten = {}, False

    def backward(loss: torch.Tensor) -> None:
        nonlocal first
        loss.backward()
        first = first or [p.grad for p in model.parameters() if p.grad is not None]

    def before_pass(**_: int) -> None:
        for gradient in first if overwritten else []:
            gradient.fill_(torch.nan)

    accelerator = SimpleNamespace(
        device=CPU,
        process_index=0,
        num_processes=1,
        no_sync=lambda _: contextlib.nullcontext(),
        backward=backward,
    )
    ids = torch.cat((batch()[0], batch(1)[0]))
    for overwritten in (False, True):
        first: list[torch.Tensor] = []
        model.zero_grad(set_to_none=True)
        model.graphs = SimpleNamespace(cuda_graphs=cuda_graphs, run=run_blocks)
        train.accumulate_gradients(
            accelerator,
            model,
            before_pass=before_pass,
            ids=ids,
            micro_batches=4,
            precision="fp32",
        )
        made = {name: p.grad for name, p in model.named_parameters()}
        expected = expected or made
        same = all(torch.equal(made[name], gradient) for name, gradient in expected.items())
        assert same is (cuda_graphs or not overwritten)


def run_blocks(blocks: Any, x: torch.Tensor) -> torch.Tensor:
    for block in blocks:
        x = block(x)
    return x


def test_evals_and_measured_gradients_run_without_graphs(nano: Nano) -> None:
    one = Compared(nano())
    ids, labels = batch()
    with torch.no_grad():
        one.model(ids, labels)
    one.model.eval()
    one.model(ids, labels)
    one.model.train()
    with graphs.without(one.model):
        one.model(ids, labels)
    assert one.counter.frame_count == 0
    one.model(ids, labels)
    assert one.counter.frame_count == 1


def test_a_block_is_few_operations(nano: Nano) -> None:
    """Each product once, one attention, no complex number, nothing that a compiler cannot see."""
    one = Compared(nano(relora={"dropout": 0.1}))
    one.gradients(0)
    [graph] = one.counter.graphs
    targets = [node.target for node in graph.graph.nodes if node.op == "call_function"]
    names = [getattr(target, "__name__", str(target)) for target in targets]
    assert names.count("linear") == 3 * 7  # W, A and B of each matrix
    assert names.count("scaled_dot_product_attention") == 1
    assert not [n for n in names if "complex" in n or "apply" in n]
    assert len(targets) < 330  # of which the masks of 7 matrices are 210


@pytest.mark.parametrize("columns", [6, 32])
@pytest.mark.parametrize("stride", [1, 3])
def test_masks_in_a_graph_are_those_of_other_passes(columns: int, stride: int) -> None:
    x = torch.empty(3, 5, columns)
    for seed in (1, 2**62 + 12345):
        expected = dropout.Dropout(0.3, seed=seed, first=2, stride=stride).mask(x)
        numbers = torch.tensor([seed, 2, 0, 0])
        compiled = torch.compile(dropout.mask_in_graph, fullgraph=True, dynamic=False)
        for mask in (dropout.mask_in_graph, compiled):
            kept = mask(x, share=0.3, numbers=numbers, stride=stride)
            assert torch.equal(kept, expected.bool())


def test_real_rotation_equals_the_complex_one() -> None:
    draws = torch.Generator().manual_seed(0)
    x = torch.randn(2, 5, 3, 8, generator=draws)
    table = torch.randn(5, 4, 2, generator=draws)
    compiled = torch.compile(kernels.rotate, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x, table), kernels.rotate(x, table))


# runs --------------------------------------------------------------------------------------------
def test_a_compiled_run_learns_what_another_does(nano: Nano, tmp_path: Path) -> None:
    """With restarts, a phase at full rank and evals of the probe; code by the C++ compiler here."""
    changes = {"model": {"vocab_size": 301}, "relora": {"dropout": 0.1, "warm_start_steps": 2}}
    changes["train"] = {"steps": 6}
    plain = run(nano(**changes), tmp_path / "plain")
    compiled = run(nano(**changes, runtime={"compile": "blocks"}), tmp_path / "compiled")
    assert plain.state == compiled.state == "finished"
    assert compiled.events[0].data["compile"] == "blocks"
    assert "compile" not in plain.events[0].data
    for key, value in plain.metrics().items():
        # The largest change by a restart is rounding alone.
        assert compiled.metrics()[key] == pytest.approx(value, rel=1e-3, abs=1e-4), key
    times = [
        e.metrics["perf/compile_seconds"]
        for e in compiled.events
        if e.kind == "train"
        if "perf/compile_seconds" in e.metrics
    ]
    assert min(times) > 0
    assert len(times) == 2  # the first step's and the new phase's
    assert not any("perf/compile_seconds" in e.metrics for e in plain.events)


@pytest.mark.slow
def test_processes_share_a_compiled_run(nano: Nano, tmp_path: Path) -> None:
    """Blocks are compiled inside DDP's forward pass, which a change of phase wraps again."""
    changes = {"model": {"vocab_size": 301}, "train": {"steps": 5}}
    changes["relora"] = {"dropout": 0.1, "warm_start_steps": 2}
    alone = run(nano(**changes), tmp_path / "alone").metrics()
    config = nano(**changes, runtime={"compile": "blocks"})
    events = run_in_processes(config, tmp_path / "two", processes=2)
    losses = {step: metrics["train/loss"] for kind, step, metrics in events if kind == "train"}
    assert set(losses) == {1, 2, 3, 4, 5}
    for step, value in losses.items():
        assert value == pytest.approx(alone[step, "train/loss"], rel=1e-4)


def test_a_resumed_run_stays_compiled_or_not(
    nano: Nano, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(graphs, "Graphs", lambda _: Graphs("blocks", backend="aot_eager"))
    changes = {
        "model": {"vocab_size": 301},
        "train": {"steps": 6},
        "checkpoint": {"every_steps": 3},
    }
    for began, then in (("blocks", "off"), ("off", "blocks")):
        whole = tmp_path / began
        run(nano(**changes, runtime={"compile": began}), whole)
        (tmp_path / f"{began}-on" / "checkpoints").mkdir(parents=True)
        config = nano(**changes, runtime={"compile": then})
        again = resumed(config, tmp_path / f"{began}-on", source=whole, at=3)
        assert again.events[0].data.get("compile", "off") == began
        for name, weight in weights(whole).items():
            assert torch.equal(weight, weights(tmp_path / f"{began}-on")[name]), name


def able(monkeypatch: pytest.MonkeyPatch) -> None:
    """A compiler, a GPU and triton are there."""
    monkeypatch.setattr(graphs.shutil, "which", lambda _: "/usr/bin/cc")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 0))
    monkeypatch.setattr(graphs.importlib.util, "find_spec", lambda _: SimpleNamespace())


@pytest.mark.parametrize("device", [CPU, GPU], ids=str)
def test_no_graphs_without_the_header_that_their_launchers_need(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path, device: Any
) -> None:
    """As on a node of a cluster, with a compiler and without python3-dev."""
    able(monkeypatch)
    schemes = []

    def paths(scheme: str) -> dict[str, str]:
        schemes.append(scheme)
        return {"include": str(tmp_path / "include")}

    monkeypatch.setattr(graphs.sysconfig, "get_default_scheme", lambda: "posix_local")
    monkeypatch.setattr(graphs.sysconfig, "get_paths", paths)
    for name in ("CPATH", "C_INCLUDE_PATH"):
        monkeypatch.delenv(name, raising=False)
    assert graphs.choose("auto", device=device) == "off"
    line = "no compiled graphs, training is slower: no Python.h"
    assert (line in capsys.readouterr().err) is (device == GPU)
    with pytest.raises(ConfigError, match=r"must be auto or off here \(no Python\.h, .* 'blocks'"):
        graphs.choose("blocks", device=device)
    (tmp_path / "include").mkdir()
    (tmp_path / "include" / "Python.h").touch()
    assert graphs.choose("blocks", device=device) == "blocks"
    assert set(schemes) == {"posix_prefix"}
    (tmp_path / "include").rename(tmp_path / "other")
    monkeypatch.setenv("CPATH", f"/nowhere:{tmp_path / 'other'}")
    assert graphs.choose("blocks", device=device) == "blocks"


def test_where_graphs_cannot_be_had(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert graphs.choose("auto", device=CPU) == "off"
    assert graphs.choose("off", device=GPU) == "off"
    with pytest.raises(ConfigError, match="CUDA graphs are a GPU's"):
        graphs.choose("cudagraphs", device=CPU)
    able(monkeypatch)
    monkeypatch.setattr(graphs, "_has_header", lambda: True)
    assert graphs.choose("auto", device=GPU) == "blocks"
    assert graphs.choose("cudagraphs", device=GPU) == "cudagraphs"
    monkeypatch.setattr(graphs.importlib.util, "find_spec", lambda _: None)
    assert capsys.readouterr().err == ""
    assert graphs.choose("auto", device=GPU) == "off"
    assert "training is slower: no triton" in capsys.readouterr().err
    with pytest.raises(ConfigError, match=r"runtime\.compile must be auto or off here \(no triton"):
        graphs.choose("blocks", device=GPU)
    assert graphs.choose("blocks", device=GPU, resumed=True) == "off"


@pytest.mark.parametrize("switch", graphs.SWITCHES)
def test_a_shell_that_switches_compiling_off_is_told(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], switch: str
) -> None:
    able(monkeypatch)
    monkeypatch.setattr(graphs, "_has_header", lambda: True)
    for name in graphs.SWITCHES:
        monkeypatch.delenv(name, raising=False)
    assert graphs.choose("auto", device=GPU) == "blocks"
    monkeypatch.setenv(switch, "1")
    assert graphs.choose("auto", device=GPU) == "off"
    assert f"training is slower: {switch}=1" in capsys.readouterr().err
    with pytest.raises(ConfigError, match=rf"auto or off here \({switch}=1\), got 'blocks'"):
        graphs.choose("blocks", device=GPU)
    assert graphs.choose("blocks", device=GPU, resumed=True) == "off"
