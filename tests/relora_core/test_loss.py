import pytest
import torch
import torch.nn.functional as F

from relora_core import loss as loss_module
from relora_core.loss import head_loss, target_log_probs


@pytest.fixture
def problem():
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(70, 16, generator=generator)
    weight = torch.randn(211, 16, generator=generator) * 0.5
    targets = torch.randint(0, 211, (70,), generator=generator)
    return hidden, weight, targets


def reference(hidden, weight, targets):
    """Loss and gradients in float64 from full logits."""
    h = hidden.double().requires_grad_()
    w = weight.double().requires_grad_()
    value = F.cross_entropy(h @ w.T, targets)
    value.backward()
    return value, h.grad, w.grad


@pytest.mark.parametrize("block", [(1, 211), (7, 50), (70, 1), (32, 210), (1000, 1000)])
def test_loss_and_gradients_equal_float64(kernels, problem, monkeypatch, block):
    monkeypatch.setitem(loss_module.HEAD_BLOCK, "cpu", block)
    hidden, weight, targets = problem
    want, want_h, want_w = reference(*problem)
    h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    value = head_loss(h, w, targets)
    (3 * value).backward()
    assert value.item() == pytest.approx(want.item(), abs=1e-6)
    torch.testing.assert_close(h.grad.double(), 3 * want_h, atol=1e-7, rtol=1e-5)
    torch.testing.assert_close(w.grad.double(), 3 * want_w, atol=1e-7, rtol=1e-5)


def test_large_logits_neither_overflow_nor_lose_the_target(kernels, problem):
    hidden, weight, targets = problem
    args = hidden * 40, weight, targets
    want, want_h, _ = reference(*args)
    h = args[0].clone().requires_grad_()
    value = head_loss(h, weight, targets)
    value.backward()
    assert value.item() == pytest.approx(want.item(), rel=1e-6)
    torch.testing.assert_close(h.grad.double(), want_h, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("block", [(7, 50), (512, 1024)])
def test_bf16_autocast_stays_near_float64(kernels, problem, monkeypatch, block):
    """`linear_cross_entropy` is off by 2.8 nats here; a bf16 matmul with float32 sums is not."""
    monkeypatch.setitem(loss_module.HEAD_BLOCK, "cpu", block)
    want, want_h, want_w = reference(*problem)
    hidden, weight, targets = problem
    h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = head_loss(h, w, targets)
    value.backward()
    assert value.dtype == torch.float32
    assert value.item() == pytest.approx(want.item(), abs=5e-3)
    for got, exact in ((h.grad, want_h), (w.grad, want_w)):
        assert (got - exact).norm() / exact.norm() < 1e-2


def test_bf16_keeps_the_gradient_of_what_is_nearly_certain(kernels):
    """p - 1 of a target with p = 0.9999: rounding p to bf16 first would leave 0 or four percent."""
    hidden, weight = torch.eye(4), 10.5 * torch.eye(4)
    targets = torch.arange(4)
    want, want_h, _ = reference(hidden, weight, targets)
    h = hidden.clone().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = head_loss(h, weight, targets)
    value.backward()
    assert value.item() == pytest.approx(want.item(), rel=0.1)
    diagonal = h.grad.double().diagonal(), want_h.diagonal()
    torch.testing.assert_close(*diagonal, atol=0, rtol=0.1)


def test_a_frozen_head_gets_no_gradient_and_costs_none(kernels, problem):
    hidden, weight, targets = problem
    h = hidden.clone().requires_grad_()
    head_loss(h, weight, targets).backward()
    torch.testing.assert_close(h.grad.double(), reference(*problem)[1], atol=1e-7, rtol=1e-5)


def test_no_gradient_is_made_without_need(kernels, problem):
    hidden, weight, targets = problem
    with torch.no_grad():
        value = head_loss(hidden, weight.clone().requires_grad_(), targets)
    assert not value.requires_grad
    assert value.item() == pytest.approx(reference(*problem)[0].item(), abs=1e-6)


@pytest.mark.parametrize("block", [(1, 1), (13, 50), (512, 1024)])
def test_log_probs_equal_log_softmax(kernels, problem, monkeypatch, block):
    for blocks in (loss_module.LOG_PROB_BLOCK, loss_module.HEAD_BLOCK):
        monkeypatch.setitem(blocks, "cpu", block)
    hidden, weight, targets = problem
    for scale in (1.0, 60.0):  # logits near 0, and far beyond what exp can hold
        logits = scale * hidden.double() @ weight.double().T
        want = F.log_softmax(logits, dim=1).gather(1, targets[:, None])[:, 0]
        got = target_log_probs(scale * hidden, weight, targets)
        torch.testing.assert_close(got.double(), want, atol=3e-6 * scale, rtol=1e-6)
    assert target_log_probs(hidden[:0], weight, targets[:0]).shape == (0,)


def test_several_targets_of_a_row_share_its_softmax(kernels, problem):
    hidden, weight, targets = problem
    rows = torch.arange(len(targets)).flip(0) // 2
    got = target_log_probs(hidden, weight, targets, rows=rows)
    want = target_log_probs(hidden[rows], weight, targets)
    torch.testing.assert_close(got, want, atol=2e-6, rtol=1e-6)


def test_log_probs_with_bf16_matmuls_are_near(kernels, problem):
    hidden, weight, targets = problem
    exact = target_log_probs(hidden, weight, targets)
    rough = target_log_probs(hidden, weight.bfloat16(), targets)
    assert 0 < (rough - exact).abs().max() < 0.05


def test_log_probs_of_what_is_not_finite_are_not_a_number(kernels, problem):
    hidden, weight, targets = problem
    hidden = hidden.clone()
    hidden[1] = float("nan")
    log_probs = target_log_probs(hidden, weight, targets)
    assert log_probs.isnan().nonzero().flatten().tolist() == [1]
