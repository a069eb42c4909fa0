"""Fira against an independent float64 reference, and where it must equal GaLore, AdamW and SGD."""

import numpy as np
import pytest
import torch
from test_galore import OPTIONS, SHAPES, gradients, trajectory
from test_galore import optimizer_of as galore_of
from torch.optim import AdamW

from relora_core.config import ConfigError, validate
from relora_core.methods.fira import FiraAdamW
from relora_core.methods.galore import projector


def optimizer_of(
    weight, *, r, gap=3, scale=0.25, residual="paper", growth=1.01, weight_decay=0.0, **options
):
    group = {
        "params": [weight],
        "galore_r": r,
        "galore_update_gap": gap,
        "galore_scale": scale,
        "galore_moments": "keep",
        "fira_residual": residual,
        "fira_norm_growth": growth,
    }
    return FiraAdamW([group], weight_decay=weight_decay, **{**OPTIONS, **options})


def published(weight, given, *, r, gap, scale, residual, growth, weight_decay):
    """Chen et al. 2024 with AdamW, in numpy, column by column."""
    (beta1, beta2), lr, w = OPTIONS["betas"], OPTIONS["lr"], weight.numpy().copy()
    m = v = last = None
    wide = w.shape[0] <= w.shape[1]
    for t, gradient in enumerate(given.numpy(), start=1):
        g = gradient if wide else gradient.T
        if t % gap == 1:
            p = np.linalg.eigh(g @ g.T)[1][:, ::-1][:, :r]
            p = p * np.sign([column[np.abs(column).argmax()] for column in p.T])
        low = p.T @ g
        m = (1 - beta1) * low if t == 1 else beta1 * m + (1 - beta1) * low
        v = (1 - beta2) * low**2 if t == 1 else beta2 * v + (1 - beta2) * low**2
        psi = (m / (1 - beta1**t)) / (np.sqrt(v / (1 - beta2**t)) + OPTIONS["eps"])
        back = p @ low if residual == "paper" else scale * (p @ low)
        s = np.zeros_like(g)
        for j in range(g.shape[1]):
            phi = np.sqrt(np.sum(psi[:, j] ** 2)) / np.sqrt(np.sum(low[:, j] ** 2))
            s[:, j] = phi * (g[:, j] - back[:, j])
        size = np.sqrt(np.sum(s**2))
        if growth is not None and last is not None and size / last > growth:
            s *= growth * last / size
        last = np.sqrt(np.sum(s**2))
        full = scale * (p @ psi) + s
        w = (1 - lr * weight_decay) * w - lr * (full if wide else full.T)
        yield torch.from_numpy(w.copy())


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("residual", ["paper", "code"])
@pytest.mark.parametrize("growth", [1.01, None])
def test_updates_are_those_of_the_paper(shape, residual, growth):
    """50 updates under five projectors, in float64."""
    setting = {"r": 3, "gap": 11, "scale": 0.4, "residual": residual, "growth": growth}
    given = gradients(shape, 51)
    start, given = given[0], given[1:]
    weight = torch.nn.Parameter(start.clone())
    seen = trajectory(optimizer_of(weight, weight_decay=0.1, **setting), weight, given)
    want = torch.stack(list(published(start, given, weight_decay=0.1, **setting)))
    torch.testing.assert_close(seen, want, atol=1e-9, rtol=0)


def both(make, other, given):
    """Two trajectories from the same start."""
    first, second = (torch.nn.Parameter(given[0].clone()) for _ in range(2))
    return trajectory(make(first), first, given[1:]), trajectory(other(second), second, given[1:])


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("growth", [1.01, None])
def test_at_full_rank_it_is_galore(shape, growth):
    """Nothing is discarded; with the code's residual something is."""
    same = {"r": min(shape), "scale": 0.4, "weight_decay": 0.1}
    for residual in ("paper", "code"):
        fira, galore = both(
            lambda w, residual=residual: optimizer_of(w, residual=residual, growth=growth, **same),
            lambda w: galore_of(w, **same),
            gradients(shape, 50),
        )
        assert torch.allclose(fira, galore, atol=1e-9, rtol=0) == (residual == "paper")


@pytest.mark.parametrize("shape", SHAPES)
def test_at_full_rank_under_one_projector_it_is_adamw_in_the_projectors_basis(shape):
    """W = P V, where AdamW updates V by P^T G: not AdamW on W, unless P permutes and signs axes."""
    given = gradients(shape, 50)
    basis, wide = projector(given[1], r=min(shape)), shape[0] <= shape[1]
    turned = torch.stack([basis.T @ g if wide else g @ basis for g in given])
    options = {"weight_decay": 0.1, **OPTIONS}
    fira, adamw = (
        torch.nn.Parameter(given[0].clone()),
        torch.nn.Parameter(turned[0].clone()),
    )
    ours = trajectory(
        optimizer_of(fira, r=min(shape), gap=99, scale=1.0, weight_decay=0.1), fira, given[1:]
    )
    theirs = trajectory(AdamW([adamw], **options), adamw, turned[1:])
    theirs = torch.stack([basis @ v if wide else v @ basis.T for v in theirs])
    torch.testing.assert_close(ours, theirs, atol=1e-9, rtol=0)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("r", [1, 3])
def test_where_adam_is_proportional_to_the_gradient_it_is_full_rank_sgd(shape, r):
    """With beta1 = 0 and eps beyond all gradients psi(R) = R / eps, so phi = 1 / eps, and
    P psi(R) + phi (G - P R) = G / eps, whatever P."""
    eps = 1e12
    knobs = {"scale": 1.0, "growth": None, "betas": (0.0, 0.9), "lr": 0.05 * eps, "eps": eps}
    ours, sgd = both(
        lambda w: optimizer_of(w, r=r, **knobs),
        lambda w: torch.optim.SGD([w], lr=0.05),
        gradients(shape, 50),
    )
    torch.testing.assert_close(ours, sgd, atol=1e-9, rtol=0)


@pytest.mark.parametrize("shape", SHAPES)
def test_an_update_has_full_rank_and_a_column_without_projection_none_of_it(shape):
    given = gradients(shape, 2)[1:]
    weight = torch.nn.Parameter(torch.zeros(shape, dtype=torch.float64))
    moved = trajectory(optimizer_of(weight, r=2, scale=1.0), weight, given)[0]
    assert int(torch.linalg.matrix_rank(moved)) == min(shape)
    given[0].T[0].zero_() if shape[0] <= shape[1] else given[0][0].zero_()
    weight = torch.nn.Parameter(torch.zeros(shape, dtype=torch.float64))
    moved = trajectory(optimizer_of(weight, r=2, scale=1.0), weight, given)[0]
    assert moved.isfinite().all()
    assert not (moved.T[0] if shape[0] <= shape[1] else moved[0]).any()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"r": 17}, r"fira.r must be in \[1, 16\] .*k_proj.* got 17; nearest valid: 16"),
        ({"r": 0}, "fira.r must be >= 1, got 0; nearest valid: 1"),
        ({"update_gap": 0}, "fira.update_gap must be >= 1, got 0; nearest valid: 1"),
        ({"scale": 0.0}, "fira.scale must be > 0, got 0.0"),
        ({"residual": "papers"}, "fira.residual must be one of .* Did you mean 'paper'"),
        ({"norm_growth": 0.9}, "fira.norm_growth must be >= 1, got 0.9; nearest valid: 1"),
        ({"target_modules": ["swigl", "atention"]}, "got 'atention'. Did you mean 'attention'"),
    ],
)
def test_bad_knobs_are_one_line(nano, change, words):
    with pytest.raises(ConfigError, match=words) as caught:
        validate(nano(method="fira", fira=change))
    assert "\n" not in str(caught.value)
    if "got 17" in words:  # it is fira's rule alone
        validate(nano(method="galore", fira=change))
