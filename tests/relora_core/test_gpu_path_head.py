"""The head's operator: right against float64, registered as torch asks, and few bytes a logit."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._inductor.utils import run_and_get_code
from torch.library import opcheck
from training import resumed, run

from relora_core import gpu, head, loss, native, train
from relora_core.config import ConfigError, RunConfig, validate

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def eager(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Compiling takes seconds; what is compiled has a test of its own."""
    monkeypatch.setattr(head, "_compiled", lambda: head.exponentials_)
    with native.restore_choice():
        native.choose("torch")
        yield


def problem(tokens: int = 40, width: int = 96, vocabulary: int = 300) -> tuple[Tensor, ...]:
    draws = torch.Generator().manual_seed(0)
    hidden = torch.randn(tokens, width, generator=draws)
    weight = torch.randn(vocabulary, width, generator=draws) / 4
    targets = torch.randint(0, vocabulary, (tokens,), generator=draws)
    return hidden, weight, targets


def gradients(function: Callable[..., Tensor], hidden: Tensor, weight: Tensor) -> list[Tensor]:
    """(loss, by hidden, by weight)."""
    h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    value = function(h, w)
    return [value.detach(), *torch.autograd.grad(value, (h, w))]


def exact(hidden: Tensor, weight: Tensor, targets: Tensor) -> list[Tensor]:
    def plain(h: Tensor, w: Tensor) -> Tensor:
        return F.cross_entropy(h @ w.T, targets)

    return gradients(plain, hidden.double(), weight.double())


@pytest.mark.parametrize("rows", [8192, 16, 7])
def test_loss_and_gradients_equal_float64_and_those_of_a_cpu(
    rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In one chunk of rows, in equal ones, and in unequal ones."""
    monkeypatch.setattr(head, "CHUNK_ROWS", rows)
    hidden, weight, targets = problem()
    made = gradients(lambda h, w: head.fused_head_loss(h, w, targets), hidden, weight)
    others = gradients(lambda h, w: loss.head_loss(h, w, targets), hidden, weight)
    for mine, its, true in zip(made, others, exact(hidden, weight, targets), strict=True):
        assert mine.dtype == torch.float32
        torch.testing.assert_close(mine.double(), true, rtol=1e-5, atol=1e-7)
        torch.testing.assert_close(mine, its, rtol=1e-5, atol=1e-7)


def hard(case: str, width: int) -> tuple[Tensor, ...]:
    """Rows that a softmax in few digits gets wrong."""
    hidden, weight, targets = problem(width=width)
    match case:
        case "equal":
            weight = weight[:1].expand_as(weight).contiguous()
        case "certain":
            weight = weight.clone()
            weight[targets] += hidden * 0.3
        case "huge":
            hidden = hidden * 5  # logits of 75
        case "last":
            targets = torch.full_like(targets, len(weight) - 1)
    return hidden, weight, targets


@pytest.mark.parametrize("width", [96, 384])
@pytest.mark.parametrize("case", ["drawn", "equal", "certain", "huge", "last"])
def test_products_in_bf16_stay_near_float64(width: int, case: str) -> None:
    """Against float64 with the inputs that bf16 has. Where gradients cancel, as for equal rows of
    the weight, against what they consist of."""
    hidden, weight, targets = hard(case, width)
    hidden, weight = hidden.bfloat16().float(), weight.bfloat16().float()

    def half(h: Tensor, w: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return head.fused_head_loss(h, w, targets)

    value, *made = gradients(half, hidden, weight)
    true_value, *true = exact(hidden, weight, targets)
    torch.testing.assert_close(value.double(), true_value, rtol=4e-3, atol=1e-3)
    for mine, its, term in zip(made, true, (weight[targets], hidden), strict=True):
        assert (mine - its).norm() <= 2e-2 * its.norm() + 1e-4 * term.norm() / len(hidden)


def test_the_passes_of_a_step_add_up_to_its_loss() -> None:
    hidden, weight, targets = problem()
    whole = gradients(lambda h, w: head.fused_head_loss(h, w, targets), hidden, weight)

    def parts(h: Tensor, w: Tensor) -> Tensor:
        halves = zip(h.chunk(2), targets.chunk(2), strict=True)
        return sum(head.fused_head_loss(x, w, t, parts=2) for x, t in halves)  # type: ignore[return-value]

    for mine, its in zip(gradients(parts, hidden, weight), whole, strict=True):
        torch.testing.assert_close(mine, its)


def test_an_upstream_gradient_counts_and_a_frozen_head_gets_none() -> None:
    hidden, weight, targets = problem()
    h = hidden.clone().requires_grad_()
    (head.fused_head_loss(h, weight, targets) * 3).backward()
    torch.testing.assert_close(h.grad, exact(hidden, weight, targets)[1].float() * 3)
    assert weight.grad is None


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("needs", [(True, True), (True, False)])
def test_the_operator_is_registered_as_torch_asks(half: bool, needs: tuple[bool, bool]) -> None:
    hidden, weight, targets = problem(tokens=8, width=16, vocabulary=30)
    hidden.requires_grad_(needs[0])
    weight.requires_grad_(needs[1])
    opcheck(head.head_loss, (hidden, weight, targets, 2, half, *needs))


def test_compiled_it_computes_the_same_in_one_kernel_and_14_bytes_a_logit() -> None:
    """Of them the product that makes a logit writes 2, and those of the gradients read 4. On a GPU
    torch's compiler finds largest value and sum in one pass, which makes 12."""
    logits = torch.randn(64, 4096, generator=torch.Generator().manual_seed(0)).bfloat16()
    targets = torch.arange(64)
    compiled = torch.compile(head.exponentials_, fullgraph=True, dynamic=False)
    torch.compiler.reset()
    expected, made = logits.clone(), logits.clone()
    sums = head.exponentials_(expected, targets)
    with torch.no_grad():
        results, [code] = run_and_get_code(compiled, made, targets)
    torch.testing.assert_close(results, sums)
    torch.testing.assert_close(made, expected)
    assert code.count("async_compile.cpp") == 1
    reads = re.findall(r"Vectorized<at::BFloat16>::loadu\((\w+)", code)
    if not reads:
        pytest.skip("the compiler makes no vector code for this processor, which is what is read")
    [place] = set(reads)
    writes = re.findall(rf"\.store\({place} ", code)
    assert 2 + 2 * len(reads) + 2 * len(writes) + 4 <= 14


@pytest.mark.parametrize(("width", "vocabulary"), [(96, 50304), (384, 50304)])
def test_a_gpu_is_asked_for_no_wait_and_no_sum_in_any_order(
    fake_run: Callable[[Any], Any], width: int, vocabulary: int
) -> None:
    """At the paper's sizes, 65,536 tokens a pass: all on the device, gradients in float32."""
    run = fake_run(f"65536 {width} {vocabulary}")
    assert run["waits"] == {}
    by_hidden, by_weight = [65536, width], [vocabulary, width]
    shapes = [by_hidden, by_weight, by_hidden, by_weight]
    assert run["gradients"] == [["cuda:0", "torch.float32", shape] for shape in shapes]
    operations = run["operations"]
    atomic = ("index_add", "scatter_add", "scatter_reduce", "index_put", "bincount")
    assert not [name for name in operations if any(word in name for word in atomic)]
    assert operations["aten.mm.dtype"] == 2 * 8  # two gradients of eight chunks, not rounded
    assert operations["aten.mm.default"] == 8


# somebody else's head -----------------------------------------------------------------------------
@pytest.fixture
def cce(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A module with the interface of cut-cross-entropy; the ways that it was asked for."""
    asked = []

    def linear_cross_entropy(e: Tensor, c: Tensor, targets: Tensor, *, impl: str) -> Tensor:
        assert e.dtype == c.dtype == torch.bfloat16
        asked.append(impl)
        return F.cross_entropy(e.float() @ c.float().T, targets)

    module = ModuleType(head.CCE)
    module.__dict__.update(linear_cross_entropy=linear_cross_entropy)
    module.__spec__ = ModuleSpec(head.CCE, None)
    monkeypatch.setitem(sys.modules, head.CCE, module)
    return asked


def test_the_head_of_cut_cross_entropy_is_the_same_loss(cce: list[str]) -> None:
    hidden, weight, targets = problem()
    rounded = exact(hidden.bfloat16(), weight.bfloat16(), targets)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        made = gradients(lambda h, w: head.cce_loss(h, w, targets, parts=4), hidden, weight)
    for own, other in zip(made, rounded, strict=True):
        assert own.dtype == torch.float32
        torch.testing.assert_close(4 * own.double(), other, rtol=1e-2, atol=1e-4)
    assert cce == ["cce_kahan_full_c"]


def test_where_cut_cross_entropy_cannot_be_had(
    cce: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    cpu, there = torch.device("cpu"), torch.device("cuda")
    assert head.choose("chunked", device=cpu) == "chunked"
    assert head.choose("cce", device=there) == "cce"
    with pytest.raises(ConfigError, match=r"runtime\.head must be chunked here \(no GPU\)"):
        head.choose("cce", device=cpu)
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    assert head.choose("cce", device=there, resumed=True) == "chunked"
    assert "without runtime.head=cce: runtime.deterministic=true" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, head.CCE, None)
    with pytest.raises(ConfigError, match="not installed: pip install cut-cross-entropy"):
        head.choose("cce", device=there)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"runtime": {"device": "cpu"}}, "runtime.device=cpu"),
        ({"train": {"precision": "fp32"}}, "train.precision=fp32"),
        ({"runtime": {"deterministic": True}}, "runtime.deterministic=true"),
    ],
)
def test_what_cut_cross_entropy_does_not_go_with_is_refused_before_a_run(
    nano: Callable[..., RunConfig], changes: dict[str, dict[str, Any]], reason: str
) -> None:
    train = {"precision": "bf16", **changes.get("train", {})}
    runtime = {"device": "auto", "head": "cce", **changes.get("runtime", {})}
    with pytest.raises(ConfigError, match=f"must be chunked with {re.escape(reason)}"):
        validate(nano(train=train, runtime=runtime))
    validate(nano(train={"precision": "bf16"}, runtime={"device": "auto", "head": "cce"}))


def test_a_resumed_run_keeps_its_head(
    cce: list[str],
    nano: Callable[..., RunConfig],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(train, "head", SimpleNamespace(choose=lambda asked, **_: asked))
    monkeypatch.setattr(gpu, "needs_gpu", lambda config: None)

    def config(kind: str) -> RunConfig:
        return nano(
            model={"vocab_size": 301},
            train={"steps": 4, "precision": "bf16"},
            checkpoint={"every_steps": 2},
            runtime={"head": kind},
        )

    for began, then in (("cce", "chunked"), ("chunked", "cce")):
        cce.clear()
        run(config(began), tmp_path / began)
        (tmp_path / f"{began}-on" / "checkpoints").mkdir(parents=True)
        again = resumed(config(then), tmp_path / f"{began}-on", source=tmp_path / began, at=2)
        assert again.events[0].data.get("head", "chunked") == began
        assert len(cce) == (6 if began == "cce" else 0)
