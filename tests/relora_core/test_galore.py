"""GaLore against an independent float64 reference, and through the seam that it proves."""

import itertools

import numpy as np
import pytest
import torch
from torch.optim import AdamW
from training import batch, build, one_step

from relora_core.config import ConfigError, validate
from relora_core.methods import galore
from relora_core.methods.galore import GaLoreAdamW

SHAPES = [(6, 10), (10, 6), (7, 7)]
OPTIONS = {"lr": 0.03, "betas": (0.9, 0.99), "eps": 1e-8}


def optimizer_of(weight, *, r, gap=3, scale=0.25, policy="keep", weight_decay=0.0):
    group = {
        "params": [weight],
        "galore_r": r,
        "galore_update_gap": gap,
        "galore_scale": scale,
        "galore_moments": policy,
    }
    return GaLoreAdamW([group], weight_decay=weight_decay, **OPTIONS)


def gradients(shape, count):
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(count, *shape, dtype=torch.float64, generator=generator)


def trajectory(optimizer, weight, given):
    """The weight after each update with the given gradients."""
    seen = []
    for gradient in given:
        weight.grad = gradient.clone()
        optimizer.step()
        seen.append(weight.detach().clone())
    return torch.stack(seen)


def published(weight, given, *, r, gap, scale, policy, weight_decay):
    """Zhao et al. 2024, Algorithm 2 with AdamW, in numpy; vectors from an eigendecomposition."""
    (beta1, beta2), lr, w = OPTIONS["betas"], OPTIONS["lr"], weight.numpy().copy()
    wide = w.shape[0] <= w.shape[1]
    for t, gradient in enumerate(given.numpy()):
        g = gradient if wide else gradient.T
        if t % gap == 0:
            p = np.linalg.eigh(g @ g.T)[1][:, ::-1][:, :r]
            p = p * np.sign([column[np.abs(column).argmax()] for column in p.T])
            if t == 0 or policy == "reset":
                m, v, start = 0.0, 0.0, t
        low = p.T @ g
        m = beta1 * m + (1 - beta1) * low
        v = beta2 * v + (1 - beta2) * low**2
        age = t - start + 1
        step = (m / (1 - beta1**age)) / (np.sqrt(v / (1 - beta2**age)) + OPTIONS["eps"])
        full = scale * p @ step
        w = (1 - lr * weight_decay) * w - lr * (full if wide else full.T)
        yield torch.from_numpy(w.copy())


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("policy", ["keep", "reset"])
@pytest.mark.parametrize("r", [1, 3, None])
def test_updates_are_those_of_the_papers_algorithm(shape, policy, r):
    """Eight updates under three projectors, in float64; r = None is the full rank."""
    setting = {"r": r or min(shape), "gap": 3, "scale": 0.4, "weight_decay": 0.1}
    given = gradients(shape, 9)
    start, given = given[0], given[1:]
    weight = torch.nn.Parameter(start.clone())
    moved = trajectory(optimizer_of(weight, policy=policy, **setting), weight, given)
    want = torch.stack(list(published(start, given, policy=policy, **setting)))
    torch.testing.assert_close(moved, want, atol=1e-9, rtol=0)


@pytest.mark.parametrize("shape", SHAPES)
def test_in_the_standard_basis_it_is_adamw(shape, monkeypatch):
    monkeypatch.setattr(
        galore, "projector", lambda g, *, r: torch.eye(min(g.shape), r, dtype=g.dtype)
    )
    given = gradients(shape, 8)
    ours, theirs = (torch.nn.Parameter(given[0].clone()) for _ in range(2))
    low = optimizer_of(ours, r=min(shape), scale=1.0, weight_decay=0.1)
    full = AdamW([theirs], weight_decay=0.1, **OPTIONS)
    torch.testing.assert_close(
        trajectory(low, ours, given[1:]),
        trajectory(full, theirs, given[1:]),
        atol=1e-12,
        rtol=0,
    )


@pytest.mark.parametrize("shape", SHAPES)
def test_the_first_update_at_full_rank_depends_on_singular_vectors_alone(shape):
    """Adam's first step is the sign of its gradient U^T G = S V^T, and S > 0 has no say in it."""
    gradient = gradients(shape, 1)[0]
    left, s, right = torch.linalg.svd(gradient, full_matrices=False)
    other = left @ torch.diag(s**2 + 1) @ right
    moved = []
    for g in (gradient, other):
        weight = torch.nn.Parameter(torch.zeros(shape, dtype=torch.float64))
        moved.append(trajectory(optimizer_of(weight, r=min(shape), scale=1.0), weight, g[None])[0])
    want = left @ right.sign() if shape[0] <= shape[1] else left.sign() @ right
    for update in moved:
        torch.testing.assert_close(update, -OPTIONS["lr"] * want, atol=1e-6, rtol=0)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("r", [1, 2, 4])
def test_one_update_has_rank_r_and_two_projectors_more(shape, r):
    weight = torch.nn.Parameter(torch.zeros(shape, dtype=torch.float64))
    moved = trajectory(optimizer_of(weight, r=r, gap=3), weight, gradients(shape, 4))
    assert [int(torch.linalg.matrix_rank(w)) for w in moved[:3]] == [r, r, r]
    assert int(torch.linalg.matrix_rank(moved[2] - moved[1])) == r
    assert int(torch.linalg.matrix_rank(moved[3])) == min(2 * r, *shape)


@pytest.mark.parametrize("shape", SHAPES)
def test_a_projector_is_orthonormal_and_the_best_of_its_rank(shape):
    """Eckart-Young: what projection loses of G is the energy of the singular values left out."""
    gradient = gradients(shape, 1)[0]
    values = torch.linalg.svdvals(gradient)
    for r in range(1, min(shape) + 1):
        basis = galore.projector(gradient, r=r)
        assert basis.shape == (min(shape), r)
        torch.testing.assert_close(basis.T @ basis, torch.eye(r, dtype=torch.float64))
        low = galore.project(gradient, basis=basis)
        assert low.shape == ((r, shape[1]) if shape[0] <= shape[1] else (shape[0], r))
        lost = gradient - galore.project_back(low, basis=basis, like=gradient)
        assert lost.square().sum() == pytest.approx(values[r:].square().sum().item(), abs=1e-9)


def test_a_projector_is_the_same_for_a_gradient_rounded_otherwise():
    """Its signs are a convention, not what the SVD happens to return."""
    gradient = gradients((6, 10), 1)[0]
    noisy = gradient * (1 + 1e-9 * gradients((6, 10), 2)[1])
    torch.testing.assert_close(
        galore.projector(gradient, r=6), galore.projector(noisy, r=6), atol=1e-7, rtol=0
    )
    assert torch.equal(galore.projector(-gradient, r=6), galore.projector(gradient, r=6))


def test_projectors_change_every_update_gap_steps_and_only_then():
    weight = torch.nn.Parameter(torch.zeros(6, 10, dtype=torch.float64))
    optimizer = optimizer_of(weight, r=2, gap=3)
    bases = []
    for gradient in gradients((6, 10), 7):
        trajectory(optimizer, weight, gradient[None])
        bases.append(optimizer.state[weight]["projector"].clone())
    changed = [not torch.equal(a, b) for a, b in itertools.pairwise(bases)]
    assert changed == [False, False, True, False, False, True]


def test_a_step_leaves_the_gradients_where_they_are(nano):
    model, _, optimizer = build(nano(method="galore", galore={"r": 4}))
    model(*batch()).backward()
    optimizer.step()
    assert all(p.grad is not None for p in model.parameters())


def test_the_state_has_the_projected_shape(nano):
    model, _, optimizer = build(nano(method="galore", galore={"r": 4}))
    one_step(model, optimizer)
    state = optimizer.state[model.get_parameter("layers.0.swiglu.w_0.weight")]  # 48 x 32
    assert state["exp_avg"].shape == state["exp_avg_sq"].shape == (48, 4)
    assert state["projector"].shape == (32, 4)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"r": 17}, r"galore.r must be in \[1, 16\] .*k_proj.* got 17; nearest valid: 16"),
        ({"r": 0}, "galore.r must be >= 1, got 0; nearest valid: 1"),
        ({"update_gap": 0}, "galore.update_gap must be >= 1, got 0"),
        ({"scale": 0.0}, "galore.scale must be > 0, got 0.0"),
        ({"moments": "rest"}, "galore.moments must be one of .* Did you mean 'reset'"),
        ({"target_modules": []}, "galore.target_modules must name at least one of attention"),
        ({"target_modules": ["swigl", "atention"]}, "got 'atention'. Did you mean 'attention'"),
    ],
)
def test_bad_knobs_are_one_line(nano, change, words):
    with pytest.raises(ConfigError, match=words) as caught:
        validate(nano(method="galore", galore=change))
    assert "\n" not in str(caught.value)
    if "got 17" in words:  # it is galore's rule alone
        validate(nano(method="full_rank", galore=change))
