"""What a GPU is asked to do, on a CPU build of torch: fake CUDA tensors, and what needs no GPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from relora_core import kernels
from relora_core.config import ConfigError, RunConfig
from relora_core.optim import clip_by_wide_, wide_norm

pytestmark = pytest.mark.slow


# attention ---------------------------------------------------------------------------------------
def heads(kind: torch.dtype, *, n_kv: int = 2) -> tuple[torch.Tensor, ...]:
    """q (2, 24, 4, 8), k and v of n_kv heads."""
    draws = torch.Generator().manual_seed(0)
    return tuple(torch.randn(2, 24, n, 8, generator=draws).to(kind) for n in (4, n_kv, n_kv))


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("n_kv", [1, 2, 4])
def test_fused_attention_equals_float64(kind: torch.dtype, n_kv: int) -> None:
    q, k, v = (x.requires_grad_() for x in heads(kind, n_kv=n_kv))
    exact = [x.detach().double().requires_grad_() for x in (q, k, v)]
    wide = [x.repeat_interleave(4 // x.shape[2], dim=2).transpose(1, 2) for x in exact]
    expected = F.scaled_dot_product_attention(*wide, is_causal=True).transpose(1, 2)
    y = kernels.fused_attention(q, k, v)
    assert y.dtype == kind
    near = {"rtol": 0, "atol": 1e-5 if kind == torch.float32 else 0.05}
    torch.testing.assert_close(y.double(), expected, **near)
    own = torch.autograd.grad(y.sum(), (q, k, v))
    others = torch.autograd.grad(expected.sum(), exact)
    for mine, its in zip(own, others, strict=True):
        torch.testing.assert_close(mine.double(), its, **near)


def test_fused_attention_never_takes_the_kernel_that_writes_all_scores(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Float32 and masks ask for no grouped heads, and that kernel is switched off meanwhile."""
    grouped = []

    def seen(*args: Any, **kwargs: Any) -> torch.Tensor:
        assert not torch.backends.cuda.math_sdp_enabled()
        grouped.append(kwargs["enable_gqa"])
        return attention(*args, **kwargs)

    attention = F.scaled_dot_product_attention
    monkeypatch.setattr(F, "scaled_dot_product_attention", seen)
    kernels.fused_attention(*heads(torch.float32))
    kernels.fused_attention(*heads(torch.bfloat16))
    mask = torch.zeros(2, 1, 24, 24, dtype=torch.bfloat16)
    kernels.fused_attention(*heads(torch.bfloat16), mask=mask)
    assert grouped == [False, True, False]
    assert torch.backends.cuda.math_sdp_enabled()


def test_the_kernel_of_a_run_is_named_before_it_begins(
    nano: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    cpu = torch.device("cpu")
    assert kernels.attention_names(nano(), device=cpu) == {}
    assert kernels._attention_name(nano(), torch.float32, device=cpu) == "flash"
    monkeypatch.setattr(torch, "_fused_sdp_choice", lambda *_, **__: 0)
    with pytest.raises(ConfigError, match=r"got 8 columns in torch\.float32"):
        kernels._attention_name(nano(), torch.float32, device=cpu)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_run_on_a_gpu_asks_for_kernels_that_are_there(
    fake_run: Callable[[RunConfig], Any], nano: Callable[..., RunConfig], precision: str
) -> None:
    """In training and around restarts; 4 query heads read 2 key heads."""
    run = fake_run(nano(model={"vocab_size": 301}, train={"steps": 5, "precision": precision}))
    assert run["ended"] == "finished"
    kinds = {kind for kind, *_ in run["attention"]}
    assert kinds == {"torch.float32"} | ({"torch.bfloat16"} if precision == "bf16" else set())
    for kind, grouped, masked, types in run["attention"]:
        assert (grouped, masked, types) == (kind == "torch.bfloat16", False, 1)


@pytest.mark.parametrize(("precision", "peak"), [("fp32", 19.5e12), ("bf16", 312e12)])
def test_every_log_of_a_run_on_a_gpu_has_both_mfus(
    fake_run: Callable[[RunConfig], Any],
    nano: Callable[..., RunConfig],
    precision: str,
    peak: float,
) -> None:
    run = fake_run(nano(model={"vocab_size": 301}, train={"steps": 5, "precision": precision}))
    names = {"NVIDIA A100-SXM4-40GB": 1}
    assert run["peak"] == {"flops_per_s": peak, "precision": precision, "gpus": names}
    assert len(run["logged"]) == 5
    assert all({"perf/mfu", "perf/mfu_6n"} <= set(names) for names in run["logged"])


# clipping ----------------------------------------------------------------------------------------
def test_gradients_are_scaled_in_one_kernel(
    fake_run: Callable[[RunConfig], Any], nano: Callable[..., RunConfig]
) -> None:
    """Which torch has for a factor of their own type alone; the norm is float64."""
    train = {"steps": 5, "precision": "bf16", "grad_clip": 1.0}
    run = fake_run(nano(model={"vocab_size": 301}, train=train))
    assert run["factors"] == ["torch.float32 by torch.float32"]


@pytest.mark.parametrize("size", [1e-3, 1.0, 1e30, 3e37])
def test_gradients_are_scaled_as_torch_does_it(size: float) -> None:
    """Also where their squares are beyond float32."""
    draws = torch.Generator().manual_seed(0)
    given = [torch.randn(n, generator=draws) * size for n in (1, 7, 64, 1000)]
    norm = wide_norm(given)
    parameters = [torch.nn.Parameter(torch.empty_like(g)) for g in given]
    for parameter, gradient in zip(parameters, given, strict=True):
        parameter.grad = gradient.clone()
    torch.nn.utils.clip_grads_with_norm_(parameters, 0.5, norm)
    clip_by_wide_(given, limit=0.5, norm=norm)
    for parameter, gradient in zip(parameters, given, strict=True):
        assert parameter.grad is not None
        assert torch.equal(parameter.grad, gradient)
