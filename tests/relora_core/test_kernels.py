"""Every kernel against float64 and plain autograd, forward and backward."""

import math

import pytest
import torch
import torch.nn.functional as F

from relora_core.config import ReLoRAConfig
from relora_core.dropout import Dropout
from relora_core.kernels import adapted_linear, causal_attention, rms_norm, rotate, swiglu
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


def errors(got, want, got_grads, grads):
    """Relative errors of an output and of the gradients."""
    return [relative(got, want), *(relative(g, w) for g, w in zip(got_grads, grads, strict=True))]


LENGTHS = [1, 23, 300]
"""Below one lane; no multiple of any; more keys than are in work at a time."""


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize(
    ("heads", "kv", "size"), [(6, 2, 8), (4, 4, 16), (4, 1, 32), (2, 1, 64), (3, 1, 2)]
)
def test_attention_equals_float64(kernels, length, heads, kv, size):
    shapes = (2, length, heads, size), (2, length, kv, size), (2, length, kv, size)
    *inputs, upstream = draw(*shapes, shapes[0])
    for scale in (1.0, 6.0):  # nearly uniform and nearly one-hot rows
        given = [inputs[0] * scale, *inputs[1:]]
        want, grads = gradients(plain_attention, [x.double() for x in given], upstream)
        got, got_grads = gradients(causal_attention, given, upstream)
        assert relative(got, want) < 1e-6
        for one, other in zip(got_grads, grads, strict=True):
            assert (one - other).norm() < 3e-6 * max(other.norm(), upstream.norm())


def test_attention_does_not_depend_on_threads(kernels):
    shapes = (3, 130, 6, 8), (3, 130, 2, 8), (3, 130, 2, 8)
    *inputs, upstream = draw(*shapes, shapes[0])
    threads, results = torch.get_num_threads(), []
    for count in (1, 3):
        torch.set_num_threads(count)
        try:
            results.append(gradients(causal_attention, inputs, upstream))
        finally:
            torch.set_num_threads(threads)
    (first, d_first), (second, d_second) = results
    assert all(map(torch.equal, (first, *d_first), (second, *d_second)))


@pytest.mark.parametrize("size", [8, 32])
def test_attention_of_bf16_is_as_near_as_its_inputs(kernels, size):
    """Whatever is computed in bf16, the softmax is not: 256 keys would leave no digit."""
    shapes = (1, 256, 6, size), (1, 256, 2, size), (1, 256, 2, size)
    *inputs, upstream = (x.bfloat16() for x in draw(*shapes, shapes[0], seed=1))
    want, grads = gradients(plain_attention, [x.double() for x in inputs], upstream)
    got, got_grads = gradients(causal_attention, inputs, upstream)
    assert got.dtype == torch.bfloat16
    assert relative(got, want) < 6e-3
    assert max(relative(g, w) for g, w in zip(got_grads, grads, strict=True)) < 1.2e-2


def test_attention_survives_scores_beyond_exp(kernels):
    q, k, v = draw((1, 16, 2, 8), (1, 16, 1, 8), (1, 16, 1, 8))
    want = plain_attention(300 * q.double(), k.double(), v.double())
    torch.testing.assert_close(causal_attention(300 * q, k, v).double(), want, atol=1e-3, rtol=0)


def test_attention_under_autocast_keeps_float32_inputs(kernels):
    shapes = (1, 9, 2, 8), (1, 9, 1, 8), (1, 9, 1, 8)
    inputs = draw(*shapes)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = causal_attention(*inputs)
    assert torch.equal(got, causal_attention(*inputs))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_no_number_does_not_pass_unseen(kernels, bad):
    q, k, v = draw((1, 20, 2, 8), (1, 20, 1, 8), (1, 20, 1, 8))
    q[0, 7, 0, 3] = bad
    assert causal_attention(q, k, v)[0, 7, 0].isnan().all()
    gate = torch.full((40,), bad)
    assert not swiglu(gate, torch.ones(40)).isfinite().any()
    assert not rms_norm(gate, torch.ones(40), eps=1e-6).isfinite().any()


@pytest.mark.parametrize("scale", [1.0, 100.0])  # silu's exponential overflows beyond 88
def test_swiglu_equals_float64(kernels, scale):
    *inputs, upstream = draw((5, 7), (5, 7), (5, 7))
    inputs[0] *= scale
    want, grads = gradients(lambda a, b: F.silu(a) * b, [x.double() for x in inputs], upstream)
    got, got_grads = gradients(swiglu, inputs, upstream)
    assert max(errors(got, want, got_grads, grads)) < 1e-6


def test_swiglu_of_bf16_is_as_near_as_its_inputs(kernels):
    *inputs, upstream = (x.bfloat16() for x in draw((9, 70), (9, 70), (9, 70)))
    want, grads = gradients(lambda a, b: F.silu(a) * b, [x.double() for x in inputs], upstream)
    got, got_grads = gradients(swiglu, inputs, upstream)
    assert got.dtype == torch.bfloat16
    assert max(errors(got, want, got_grads, grads)) < 6e-3


@pytest.mark.parametrize("shape", [(2, 9, 7), (150, 96)])  # more than one piece of rows, and one
def test_rms_norm_equals_float64(kernels, shape):
    x, weight, upstream = draw(shape, shape[-1:], shape)
    x[0] = 1e-4  # where eps counts

    def plain(x, weight):
        return x / (x.square().mean(dim=-1, keepdim=True) + 1e-6).sqrt() * weight

    want, grads = gradients(plain, [x.double(), weight.double()], upstream)
    got, got_grads = gradients(lambda x, w: rms_norm(x, w, eps=1e-6), [x, weight], upstream)
    assert max(errors(got, want, got_grads, grads)) < 1e-6


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
def test_rotation_equals_float64(kernels, kind):
    x, upstream = (x.to(kind) for x in draw((2, 11, 3, 8), (2, 11, 3, 8)))
    angle = torch.outer(torch.arange(11.0), torch.tensor([1.0, 0.3, 0.1, 0.03]))
    table = torch.stack((angle.cos(), angle.sin()), dim=-1)

    def plain(x):
        even, odd = x[..., 0::2], x[..., 1::2]
        c, s = (t[:, None].double() for t in table.unbind(-1))
        return torch.stack((even * c - odd * s, even * s + odd * c), dim=-1).flatten(-2)

    want, grads = gradients(plain, [x.double()], upstream)
    got, got_grads = gradients(lambda x: rotate(x, table), [x], upstream)
    assert got.dtype == torch.float32
    assert max(errors(got, want, got_grads, grads)) < (1e-6 if kind == torch.float32 else 4e-3)


@pytest.mark.parametrize("dropout", [None, Dropout(0.3, seed=1, first=5, stride=3)])
@pytest.mark.parametrize(("columns", "out", "rank"), [(6, 5, 3), (48, 96, 16), (80, 16, 20)])
def test_adapted_linear_equals_float64(kernels, columns, out, rank, dropout):
    rows = 75  # twice: more than one piece, and no multiple of one
    shapes = (2, rows, columns), (out, columns), (rank, columns), (out, rank), (2, rows, out)
    x, weight, a, b, upstream = draw(*shapes)

    def plain(x, a, b):
        dropped = x * dropout.mask(x) * dropout.gain if dropout else x
        return x @ weight.double().T + 1.5 * dropped @ a.T @ b.T

    def fast(x, a, b):
        return adapted_linear(x, weight, a, b, scale=1.5, dropout=dropout)

    want, grads = gradients(plain, [x.double(), a.double(), b.double()], upstream)
    got, got_grads = gradients(fast, [x, a, b], upstream)
    assert max(errors(got, want, got_grads, grads)) < 2e-6


@pytest.mark.parametrize("share", [1e-7, 0.1, 0.5, 0.999])
def test_dropout_keeps_the_share_that_it_says(share):
    """Each lane of the 64-bit words alike, entries and draws independent of each other."""
    first, second = (Dropout(share, seed=seed).mask(torch.empty(501, 403)) for seed in (3, 4))
    rate = 1 / Dropout(share, seed=0).gain
    assert rate == pytest.approx(1 - share, abs=2**-16)
    flat, variance = first.flatten().double(), rate * (1 - rate)
    for lane in range(4):
        assert flat[lane::4].mean().item() == pytest.approx(rate, abs=5 * variance**0.5 / 224)
    neighbours = ((flat[1:] - rate) * (flat[:-1] - rate)).mean().item()
    rows = ((first[1:] - rate) * (first[:-1] - rate)).mean().item()
    draws = ((flat - rate) * (second.flatten() - rate)).mean().item()
    assert [neighbours, rows, draws] == pytest.approx([0] * 3, abs=5 * variance / 449)


def test_dropout_draws_the_numbers_of_split_mix():
    """Those that Java's SplittableRandom gives for the seed 1234567, cut into 16 bits."""
    numbers = 6457827717110365317, 3203168211198807973, 9817491932198370423
    lanes = [number >> shift & 0xFFFF for number in numbers for shift in (0, 16, 32, 48)]
    for share in (0.2, 0.5, 0.9):
        dropout = Dropout(share, seed=1234567)
        assert dropout.mask(torch.empty(1, 12)).tolist() == [[lane < dropout.cut for lane in lanes]]


@pytest.mark.parametrize("shape", [(12, 7, 48), (12, 5, 3), (12, 5)])
def test_dropout_is_the_same_however_a_batch_is_divided(shape):
    """Into passes of four or two, over two processes that take rows in turn, on other devices."""
    x = torch.empty(shape)
    mask = Dropout(0.4, seed=9).mask(x)
    for first in range(0, 12, 4):
        part = Dropout(0.4, seed=9, first=first).mask(x[first : first + 4])
        assert part.equal(mask[first : first + 4])
    for rank in (0, 1):
        for index in range(3):
            first = rank + 2 * 2 * index
            part = Dropout(0.4, seed=9, first=first, stride=2).mask(x[:2])
            assert part.equal(mask[[first, first + 2]])
    if torch.cuda.is_available():
        assert Dropout(0.4, seed=9).mask(x.cuda()).cpu().equal(mask)


def test_adapted_linear_under_autocast_is_near_float64(kernels):
    x, weight, a, b, upstream = draw((4, 64, 48), (64, 48), (8, 48), (64, 8), (4, 64, 64))

    def fast(x, a, b):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return adapted_linear(x, weight, a, b, scale=2.0, dropout=None)

    want, grads = gradients(
        lambda x, a, b: x @ weight.double().T + 2 * x @ a.T @ b.T,
        [x.double(), a.double(), b.double()],
        upstream,
    )
    got, got_grads = gradients(fast, [x, a, b], upstream)
    assert got.dtype == torch.bfloat16
    assert [g.dtype for g in got_grads] == [torch.float32] * 3
    assert relative(got, want) < 6e-3
    assert max(relative(g, w) for g, w in zip(got_grads, grads, strict=True)) < 1e-2


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
