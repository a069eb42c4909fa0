"""Every kernel against float64 and plain autograd, forward and backward."""

import math

import pytest
import torch
import torch.nn.functional as F

from relora_core import kernels
from relora_core.config import ReLoRAConfig
from relora_core.kernels import adapted_linear, causal_attention, keep_mask, swiglu
from relora_core.methods.adapter import ReLoRALinear


def draw(*shapes, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) for shape in shapes]


def gradients(function, inputs, upstream):
    """(output, gradients) of fresh leaves with the values and type of `inputs`."""
    leaves = [x.clone().requires_grad_() for x in inputs]
    out = function(*leaves)
    return out.detach(), torch.autograd.grad(out, leaves, upstream.to(out.dtype))


def plain_attention(q, k, v):
    """Every score, a mask, keys and values repeated for each query head."""
    groups, length = q.shape[2] // k.shape[2], q.shape[1]
    k, v = k.repeat_interleave(groups, dim=2), v.repeat_interleave(groups, dim=2)
    scores = torch.einsum("bthd,bshd->bhts", q, k) / math.sqrt(q.shape[3])
    scores = scores.masked_fill(torch.ones(length, length).triu(1).bool(), -math.inf)
    return torch.einsum("bhts,bshd->bthd", scores.softmax(dim=-1), v)


def relative(got, want):
    return ((got.double() - want).norm() / want.norm()).item()


@pytest.mark.parametrize("rows", [1, 5, 32])
@pytest.mark.parametrize(("heads", "kv", "size"), [(6, 2, 8), (4, 4, 32), (3, 1, 2)])
def test_attention_equals_float64(monkeypatch, rows, heads, kv, size):
    monkeypatch.setattr(kernels, "TILE_ELEMENTS", rows * heads * 23)  # 23 is no multiple of 5 or 32
    shapes = (2, 23, heads, size), (2, 23, kv, size), (2, 23, kv, size)
    *inputs, upstream = draw(*shapes, shapes[0])
    want, grads = gradients(plain_attention, [x.double() for x in inputs], upstream)
    for scale in (1.0, 6.0):  # nearly uniform and nearly one-hot rows
        inputs[0], first = inputs[0] * scale, inputs[0]
        want, grads = gradients(plain_attention, [x.double() for x in inputs], upstream)
        got, found = gradients(causal_attention, inputs, upstream)
        assert relative(got, want) < 1e-6
        assert max(relative(g, w) for g, w in zip(found, grads, strict=True)) < 2e-6
        inputs[0] = first


@pytest.mark.parametrize("size", [8, 32])
def test_attention_of_bf16_is_as_near_as_its_inputs(size):
    """Whatever is computed in bf16, the softmax is not: 256 keys would leave no digit."""
    shapes = (1, 256, 6, size), (1, 256, 2, size), (1, 256, 2, size)
    *inputs, upstream = (x.bfloat16() for x in draw(*shapes, shapes[0], seed=1))
    want, grads = gradients(plain_attention, [x.double() for x in inputs], upstream)
    got, found = gradients(causal_attention, inputs, upstream)
    assert got.dtype == torch.bfloat16
    assert relative(got, want) < 6e-3
    assert max(relative(g, w) for g, w in zip(found, grads, strict=True)) < 1.2e-2


def test_attention_survives_scores_beyond_exp():
    q, k, v = draw((1, 16, 2, 8), (1, 16, 1, 8), (1, 16, 1, 8))
    want = plain_attention(300 * q.double(), k.double(), v.double())
    torch.testing.assert_close(causal_attention(300 * q, k, v).double(), want, atol=1e-3, rtol=0)


def test_attention_under_autocast_keeps_float32_inputs():
    shapes = (1, 9, 2, 8), (1, 9, 1, 8), (1, 9, 1, 8)
    inputs = draw(*shapes)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = causal_attention(*inputs)
    assert torch.equal(got, causal_attention(*inputs))


def test_swiglu_equals_float64():
    *inputs, upstream = draw((5, 7), (5, 7), (5, 7))
    want, grads = gradients(lambda a, b: F.silu(a) * b, [x.double() for x in inputs], upstream)
    got, found = gradients(swiglu, inputs, upstream)
    assert relative(got, want) < 1e-6
    assert max(relative(g, w) for g, w in zip(found, grads, strict=True)) < 1e-6


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_adapted_linear_equals_float64(dropout):
    x, weight, a, b, upstream = draw((2, 9, 6), (5, 6), (3, 6), (5, 3), (2, 9, 5))
    torch.manual_seed(1)
    kept, share = keep_mask(x.flatten(0, 1), dropout) if dropout else (torch.ones(18, 6), 1.0)

    def plain(x, a, b):
        dropped = x * kept.view(x.shape) / share
        return x @ weight.double().T + 1.5 * dropped @ a.T @ b.T

    def fast(x, a, b):
        torch.manual_seed(1)
        return adapted_linear(x, weight, a, b, scale=1.5, dropout=dropout)

    want, grads = gradients(plain, [x.double(), a.double(), b.double()], upstream)
    got, found = gradients(fast, [x, a, b], upstream)
    assert relative(got, want) < 1e-6
    assert max(relative(g, w) for g, w in zip(found, grads, strict=True)) < 1e-6


@pytest.mark.parametrize("dropout", [1e-7, 0.1, 0.5, 0.999])
def test_dropout_keeps_the_share_that_it_says(dropout):
    """Each lane of the 64-bit words alike, entries and draws independent of each other."""
    torch.manual_seed(0)
    (first, share), (second, _) = (keep_mask(torch.empty(501, 403), dropout) for _ in range(2))
    assert share == pytest.approx(1 - dropout, abs=2**-16)
    flat, variance = first.flatten().double(), share * (1 - share)
    for lane in range(4):
        assert flat[lane::4].mean().item() == pytest.approx(share, abs=5 * variance**0.5 / 224)
    neighbours = ((flat[1:] - share) * (flat[:-1] - share)).mean().item()
    draws = ((flat - share) * (second.flatten() - share)).mean().item()
    assert neighbours == pytest.approx(0, abs=5 * variance / 449)
    assert draws == pytest.approx(0, abs=5 * variance / 449)


def test_dropout_follows_the_generator_of_torch():
    masks = []
    for _ in range(2):
        torch.manual_seed(3)
        masks.append([keep_mask(torch.empty(64, 96), 0.1)[0] for _ in range(2)])
    assert masks[0][0].equal(masks[1][0])
    assert masks[0][1].equal(masks[1][1])
    assert not masks[0][0].equal(masks[0][1])


def test_adapted_linear_under_autocast_is_near_float64():
    x, weight, a, b, upstream = draw((4, 64, 48), (40, 48), (8, 48), (40, 8), (4, 64, 40))

    def fast(x, a, b):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return adapted_linear(x, weight, a, b, scale=2.0, dropout=0.0)

    want, grads = gradients(
        lambda x, a, b: x @ weight.double().T + 2 * x @ a.T @ b.T,
        [x.double(), a.double(), b.double()],
        upstream,
    )
    got, found = gradients(fast, [x, a, b], upstream)
    assert got.dtype == torch.bfloat16
    assert [g.dtype for g in found] == [torch.float32] * 3
    assert relative(got, want) < 6e-3
    assert max(relative(g, w) for g, w in zip(found, grads, strict=True)) < 1e-2


@pytest.mark.parametrize("changes", [{"scaling": "trainable"}, {"nested_rank": True}, {}])
def test_a_frozen_weight_gets_no_gradient_and_a_trained_one_does(changes):
    adapter = ReLoRALinear(torch.nn.Linear(6, 5, bias=False), ReLoRAConfig(r=4, **changes))
    adapter.draw_(torch.Generator().manual_seed(0))
    for trained in (False, True):
        adapter.weight.requires_grad_(trained)
        adapter.zero_grad()
        adapter(torch.ones(2, 6)).sum().backward()
        assert (adapter.weight.grad is not None) is trained
        assert adapter.lora_B.grad is not None
