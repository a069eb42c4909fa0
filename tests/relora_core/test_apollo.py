"""APOLLO against an independent float64 reference, and where it must equal AdamW and SGD."""

import hashlib

import numpy as np
import pytest
import torch
from test_galore import OPTIONS, SHAPES, gradients, trajectory
from torch.optim import AdamW
from training import build, one_step

from experiments.schema import compose
from relora_core.config import ConfigError, get, validate
from relora_core.methods import apollo
from relora_core.methods.apollo import ApolloAdamW, random_basis
from relora_core.seeds import named_generator

NAME = "layers.0.some.linear"


def optimizer_of(
    weight,
    *,
    r,
    gap=3,
    scaling="channel",
    scale=1.0,
    growth=1.01,
    weight_decay=0.0,
    seed=5,
    **options,
):
    group = {
        "params": [weight],
        "apollo_r": r,
        "apollo_update_gap": gap,
        "apollo_scaling": scaling,
        "apollo_scale": scale,
        "apollo_norm_growth": growth,
        "apollo_seed": seed,
        "apollo_names": [NAME],
    }
    return ApolloAdamW([group], weight_decay=weight_decay, **{**OPTIONS, **options})


def drawn(size, r, *, done, seed=5):
    """P^T of `done` updates, by hand."""
    digest = hashlib.sha256(f"{seed}/{done}/{NAME}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
    return (torch.randn(size, r, generator=generator) / r**0.5).double().numpy()


def published(weight, given, *, r, gap, scaling, scale, growth, weight_decay):
    """Zhu et al. 2024 with AdamW, in numpy, column by column; limiter after the scale."""
    (beta1, beta2), lr, w = OPTIONS["betas"], OPTIONS["lr"], weight.numpy().copy()
    m = v = last = None
    wide = w.shape[0] <= w.shape[1]
    for t, gradient in enumerate(given.numpy(), start=1):
        g = gradient if wide else gradient.T
        if t % gap == 1:
            p = drawn(len(g), r, done=t - 1).T
        low = p @ g
        m = (1 - beta1) * low if t == 1 else beta1 * m + (1 - beta1) * low
        v = (1 - beta2) * low**2 if t == 1 else beta2 * v + (1 - beta2) * low**2
        psi = (m / (1 - beta1**t)) / (np.sqrt(v / (1 - beta2**t)) + OPTIONS["eps"])
        step = np.zeros_like(g)
        for j in range(g.shape[1]):
            one = (slice(None), slice(None) if scaling == "tensor" else j)
            s = np.sqrt(np.sum(psi[one] ** 2)) / np.sqrt(np.sum(low[one] ** 2))
            step[:, j] = np.sqrt(scale) * s * g[:, j]
        size = np.sqrt(np.sum(step**2))
        if growth is not None and last is not None and size / last > growth:
            step *= growth * last / size
        last = np.sqrt(np.sum(step**2))
        w = (1 - lr * weight_decay) * w - lr * (step if wide else step.T)
        yield torch.from_numpy(w.copy())


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("scaling", "r"), [("channel", 3), ("tensor", 3), ("tensor", 1)])
@pytest.mark.parametrize("growth", [1.01, None])
def test_updates_are_those_of_the_paper(shape, scaling, r, growth):
    """50 updates under five projections, in float64."""
    setting = {"r": r, "gap": 11, "scaling": scaling, "scale": 3.0, "growth": growth}
    given = gradients(shape, 51)
    start, given = given[0], given[1:]
    weight = torch.nn.Parameter(start.clone())
    seen = trajectory(optimizer_of(weight, weight_decay=0.1, **setting), weight, given)
    want = torch.stack(list(published(start, given, weight_decay=0.1, **setting)))
    torch.testing.assert_close(seen, want, atol=1e-9, rtol=0)


def steps_of(make, given):
    """The updates that an optimizer makes of these gradients."""
    weight = torch.nn.Parameter(given[0].clone())
    return trajectory(make(weight), weight, given[1:]).diff(dim=0, prepend=given[:1])


@pytest.fixture
def unprojected(monkeypatch):
    """P = 1, so that at full rank R = G."""
    monkeypatch.setattr(apollo, "random_basis", lambda size, *, r, generator: torch.eye(size, r))


@pytest.mark.usefixtures("unprojected")
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("scaling", ["channel", "tensor"])
def test_without_projection_it_moves_as_far_as_adamw_along_the_gradient(shape, scaling):
    """The structured AdamW that the paper begins with: of each column, or of the matrix."""
    given = gradients(shape, 50)
    knobs = {"r": min(shape), "scaling": scaling, "growth": None}
    ours = steps_of(lambda w: optimizer_of(w, **knobs), given)
    adamw = steps_of(lambda w: AdamW([w], weight_decay=0.0, **OPTIONS), given)
    axis = (1, 2) if scaling == "tensor" else 1 if shape[0] <= shape[1] else 2
    torch.testing.assert_close(ours.norm(dim=axis), adamw.norm(dim=axis), atol=1e-12, rtol=0)
    along = -given[1:] / given[1:].norm(dim=axis, keepdim=True)
    torch.testing.assert_close(ours / ours.norm(dim=axis, keepdim=True), along, atol=1e-12, rtol=0)


@pytest.mark.parametrize("shape", [(1, 10), (10, 1)])
def test_of_a_vector_without_momentum_it_is_adamw_over_p(shape):
    """R = p G: a column's factor is |psi(G)_j| / |p G_j|, and Adam without momentum keeps signs."""
    given, betas = gradients(shape, 50), {"betas": (0.0, 0.99), "eps": 1e-30}
    knobs = {"r": 1, "gap": 99, "growth": None}
    ours = steps_of(lambda w: optimizer_of(w, **knobs, **betas), given)
    adamw = steps_of(lambda w: AdamW([w], weight_decay=0.0, lr=0.03, **betas), given)
    p = abs(drawn(1, 1, done=0).item())
    torch.testing.assert_close(ours * p, adamw, atol=1e-12, rtol=0)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("scaling", "r"), [("channel", 3), ("tensor", 1)])
def test_where_adam_is_proportional_to_the_gradient_it_is_sgd(shape, scaling, r):
    """With beta1 = 0 and eps beyond all gradients psi(R) = R / eps, so s = 1 / eps, whatever P."""
    eps, given = 1e12, gradients(shape, 50)
    knobs = {"betas": (0.0, 0.9), "lr": 0.05 * eps, "eps": eps, "growth": None, "scale": 4.0}
    ours = steps_of(lambda w: optimizer_of(w, r=r, scaling=scaling, **knobs), given)
    sgd = steps_of(lambda w: torch.optim.SGD([w], lr=2 * 0.05), given)
    torch.testing.assert_close(ours, sgd, atol=1e-9, rtol=0)


@pytest.mark.parametrize("scaling", ["channel", "tensor"])
def test_the_size_of_the_gradients_does_not_matter(scaling):
    given = gradients((6, 10), 50)
    one, other = (
        steps_of(
            lambda w: optimizer_of(w, r=3, scaling=scaling, eps=1e-300),
            torch.cat([given[:1], factor * given[1:]]),
        )
        for factor in (1.0, 2.0**-20)
    )
    torch.testing.assert_close(one, other, atol=1e-13, rtol=0)


# draws --------------------------------------------------------------------------------------------
@pytest.mark.parametrize("r", [1, 8, 64])
def test_a_projection_keeps_squared_norms_on_average(r):
    """Of 2000 draws: the mean has standard deviation sqrt(2 / r / 2000), at most 0.032."""
    x = torch.randn(16, generator=torch.Generator().manual_seed(1))
    draws = torch.Generator().manual_seed(2)
    sizes = [(random_basis(16, r=r, generator=draws).T @ x).square().sum() for _ in range(2000)]
    ratio = torch.stack(sizes) / x.square().sum()
    assert ratio.mean().item() == pytest.approx(1.0, abs=0.1)
    assert ratio.var().item() == pytest.approx(2 / r, rel=0.3)


def test_projections_are_drawn_anew_at_the_gap_by_seed_step_and_name(nano):
    """So that every rank, and every resumed run, has the same."""
    config = nano(method="apollo", seed=3, apollo={"r": 4, "update_gap": 2})
    bases = []
    for noise in (1, 2):
        model, _, optimizer = build(config)
        torch.manual_seed(noise)
        for _ in range(3):
            one_step(model, optimizer)
            names = ("layers.0.attention.q_proj", "layers.1.attention.q_proj")
            weights = [model.get_parameter(f"{name}.weight") for name in names]
            bases.append([optimizer.state[weight]["projector"].clone() for weight in weights])
    first, second, third, *again = bases
    for one, two in zip([first, second, third], again, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
    for done, basis in ((0, first[1]), (0, second[1]), (2, third[1])):
        generator = named_generator(3, done, "layers.1.attention.q_proj")
        assert torch.equal(basis, random_basis(32, r=4, generator=generator))
    assert not torch.equal(first[0], first[1])


def test_the_options_are_the_paper_and_its_mini():
    plain, mini = (compose([f"method={name}"]) for name in ("apollo", "apollo_mini"))
    assert plain.method == mini.method == "apollo"
    keys = ("apollo.r", "apollo.scaling", "apollo.scale")
    assert [get(plain, key) for key in keys] == [16, "channel", 1.0]
    assert [get(mini, key) for key in keys] == [1, "tensor", 128.0]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"r": 17}, r"apollo.r must be in \[1, 16\] .*k_proj.* got 17; nearest valid: 16"),
        ({"r": 0}, "apollo.r must be >= 1, got 0; nearest valid: 1"),
        ({"update_gap": 0}, "apollo.update_gap must be >= 1, got 0; nearest valid: 1"),
        ({"scale": -1.0}, "apollo.scale must be > 0, got -1.0"),
        ({"scaling": "tensors"}, "apollo.scaling must be one of .* Did you mean 'tensor'"),
        ({"norm_growth": 0.0}, "apollo.norm_growth must be >= 1, got 0.0; nearest valid: 1"),
        ({"target_modules": []}, "apollo.target_modules must name at least one of attention"),
    ],
)
def test_bad_knobs_are_one_line(nano, change, words):
    with pytest.raises(ConfigError, match=words) as caught:
        validate(nano(method="apollo", apollo=change))
    assert "\n" not in str(caught.value)
    if "got 17" in words:  # it is apollo's rule alone
        validate(nano(method="fira", apollo=change))
