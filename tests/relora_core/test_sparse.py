"""Sparse Optimization against a literal float64 reference, its limits, and the seam."""

import math

import pytest
import torch
from test_galore import gradients, trajectory
from torch.optim import AdamW
from training import (
    assert_processes_equal_one,
    batch,
    build,
    one_step,
    resumes_exactly,
    run,
    weights,
)

from experiments.identity import run_id
from relora_core import costs, export
from relora_core.checkpoint import complete
from relora_core.config import ConfigError, validate
from relora_core.data.grammar import VOCAB_SIZE
from relora_core.methods.sparse import SparseAdamW
from relora_core.model import Decoder
from relora_core.seeds import named_generator

SHAPE = (6, 10)
OPTIONS = {"lr": 0.03, "eps": 1e-8}
CHOICES = [
    {"select": select, "keep": keep, "bias_correction": correction}
    for select in ("random", "gradient")
    for keep in ("importance", "support")
    for correction in ("global", "entry")
]


def optimizer_of(
    weight,
    *,
    density,
    gap=7,
    select="random",
    keep="importance",
    bias_correction="global",
    weight_decay=0.0,
    betas=(0.9, 0.99),
    name="w",
):
    group = {
        "params": [weight],
        "sparse_names": [name],
        "sparse_entries": [int(density * weight.numel())],
        "sparse_seed": 3,
        "sparse_update_gap": gap,
        "sparse_select": select,
        "sparse_keep": keep,
        "sparse_bias_correction": bias_correction,
    }
    return SparseAdamW([group], weight_decay=weight_decay, betas=betas, **OPTIONS)


def published(start, given, *, density, gap, select, keep, bias_correction, betas, weight_decay):
    """Mrabah et al. 2025, an entry at a time: moments in a dict by place, as (m, v, age)."""
    w, (beta1, beta2) = start.flatten().tolist(), betas
    k, state = int(density * len(w)), {}
    for t, gradient in enumerate(given):
        g = gradient.flatten().tolist()
        if t == 0 or (gap and t % gap == 0):
            if select == "random":
                generator = named_generator(3, t, "w/support")
                drawn = set(torch.randperm(len(w), generator=generator)[:k].tolist())
            else:
                drawn = set(sorted(range(len(w)), key=lambda i: -abs(g[i]))[:k])
        for i in {*state, *drawn}:
            m, v, age = state.get(i, (0.0, 0.0, 0))
            new = g[i] if i in drawn else 0.0
            m, v, age = beta1 * m + (1 - beta1) * new, beta2 * v + (1 - beta2) * new**2, age + 1
            steps = t + 1 if bias_correction == "global" else age
            adam = (m / (1 - beta1**steps)) / (math.sqrt(v / (1 - beta2**steps)) + OPTIONS["eps"])
            w[i] -= OPTIONS["lr"] * (adam + weight_decay * w[i])
            state[i] = m, v, age
        largest = sorted(state, key=lambda i: -abs(state[i][0]))[:k]
        state = {i: state[i] for i in (largest if keep == "importance" else drawn)}
        yield torch.tensor(w, dtype=torch.float64).view_as(start)


@pytest.mark.parametrize("choice", CHOICES, ids=lambda c: "-".join(c.values()))
@pytest.mark.parametrize("density", [0.05, 0.3, 0.8])
@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.4, 0.999)])
def test_fifty_updates_are_those_of_the_algorithm(choice, density, betas):
    setting = {"density": density, "gap": 7, "betas": betas, "weight_decay": 0.1, **choice}
    start, *given = gradients(SHAPE, 51)
    weight = torch.nn.Parameter(start.clone())
    actual = trajectory(optimizer_of(weight, **setting), weight, given)
    expected = torch.stack(list(published(start, given, **setting)))
    torch.testing.assert_close(actual, expected, atol=1e-9, rtol=0)


@pytest.mark.parametrize("choice", CHOICES, ids=lambda c: "-".join(c.values()))
@pytest.mark.parametrize("gap", [3, None])
def test_at_density_1_it_is_adamw(choice, gap):
    start, *given = gradients(SHAPE, 51)
    ours, theirs = (torch.nn.Parameter(start.clone()) for _ in range(2))
    sparse = optimizer_of(ours, density=1, gap=gap, weight_decay=0.1, **choice)
    dense = AdamW([theirs], weight_decay=0.1, betas=(0.9, 0.99), **OPTIONS)
    torch.testing.assert_close(
        trajectory(sparse, ours, given), trajectory(dense, theirs, given), atol=1e-12, rtol=0
    )


@pytest.mark.parametrize("choice", CHOICES, ids=lambda c: "-".join(c.values()))
def test_without_redraws_it_is_static_sparse_training(choice):
    """AdamW on the entries drawn; no other one ever moves, not even by weight decay."""
    start, *given = gradients(SHAPE, 51)
    ours = torch.nn.Parameter(start.clone())
    sparse = optimizer_of(ours, density=0.2, gap=None, weight_decay=0.1, **choice)
    moved = trajectory(sparse, ours, given)
    mask = torch.zeros(60, dtype=torch.bool)
    mask[sparse.state[ours]["support"].long()] = True
    assert mask.sum() == 12
    theirs = torch.nn.Parameter(start.flatten()[mask].clone())
    dense = AdamW([theirs], weight_decay=0.1, betas=(0.9, 0.99), **OPTIONS)
    expected = trajectory(dense, theirs, [g.flatten()[mask] for g in given])
    moved = moved.flatten(1)
    torch.testing.assert_close(moved[:, mask], expected, atol=1e-12, rtol=0)
    assert torch.equal(moved[-1, ~mask], start.flatten()[~mask])


def test_a_support_is_drawn_every_update_gap_steps_by_seed_step_and_name():
    drawn = {}
    for name, noise in (("a", 0), ("a", 1), ("b", 0)):
        torch.manual_seed(noise)
        weight = torch.nn.Parameter(torch.zeros(SHAPE, dtype=torch.float64))
        optimizer, seen = optimizer_of(weight, density=0.3, gap=3, name=name), []
        for gradient in gradients(SHAPE, 7):
            trajectory(optimizer, weight, gradient[None])
            seen.append(optimizer.state[weight]["support"].tolist())
        assert seen[0] == seen[1] == seen[2] != seen[3] == seen[5] != seen[6]
        drawn[name, noise] = seen
    assert drawn["a", 0] == drawn["a", 1]
    assert drawn["a", 0][0] != drawn["b", 0][0]


@pytest.mark.parametrize(("correction", "rates"), [("global", 0.1 / 0.001**0.5), ("entry", 1.0)])
def test_an_entry_drawn_late_begins_as_its_bias_correction_says(correction, rates):
    """In learning rates, under a constant gradient, after 20,000 updates."""
    weight = torch.nn.Parameter(torch.zeros(SHAPE, dtype=torch.float64))
    ones, betas = torch.ones(1, *SHAPE, dtype=torch.float64), (0.9, 0.999)
    optimizer = optimizer_of(weight, density=0.1, gap=1, bias_correction=correction, betas=betas)
    trajectory(optimizer, weight, ones)
    state = optimizer.state[weight]
    state["step"].fill_(20_000.0)
    old, before = set(state["support"].tolist()), weight.detach().clone()
    trajectory(optimizer, weight, ones)
    new = [i for i in state["support"].tolist() if i not in old]
    moved = (before - weight.detach()).flatten()[new] / OPTIONS["lr"]
    torch.testing.assert_close(moved, torch.full_like(moved, rates), rtol=1e-5, atol=0)
    assert len(new) > 2


def test_places_survive_a_state_dict_beyond_what_floats_count():
    """torch makes state the parameter's type; 2^24 + 1 is no float32."""
    weight = torch.nn.Parameter(torch.zeros(SHAPE))
    one, two = (optimizer_of(weight, density=0.3) for _ in range(2))
    trajectory(one, weight, torch.ones(1, *SHAPE))
    one.state[weight]["indices"][-1] = 2**24 + 1
    two.load_state_dict(one.state_dict())
    for name in ("support", "indices"):
        assert two.state[weight][name].dtype == torch.int32
        assert torch.equal(two.state[weight][name], one.state[weight][name])


def test_other_parameters_move_as_under_full_rank_bit_for_bit(nano):
    start, sparse, full = (
        build(nano(method=m, sparse={"target_modules": ["swiglu"]}))
        for m in ("full_rank", "sparse", "full_rank")
    )
    for model, _, optimizer in (sparse, full):
        model(*batch()).backward()
        optimizer.step()
    theirs, before = dict(full[0].named_parameters()), dict(start[0].named_parameters())
    for name, weight in sparse[0].named_parameters():
        assert torch.equal(weight, theirs[name]) == (".swiglu." not in name), name
        share = (weight != before[name]).double().mean().item()
        if ".swiglu." in name:
            assert share == pytest.approx(0.1, abs=1 / weight.numel()), name
        assert weight.grad is not None


@pytest.mark.parametrize("correction", ["global", "entry"])
def test_its_state_is_as_large_as_costs_say(nano, correction):
    config = nano(method="sparse", sparse={"density": 0.2, "bias_correction": correction})
    model, _, optimizer = build(config)
    one_step(model, optimizer)
    size = sum(
        tensor.nbytes
        for state in optimizer.state.values()
        for name, tensor in state.items()
        if name != "step"
    )
    assert costs.memory_bytes(config)["moments"] == size
    full_rank = nano(method="full_rank")
    assert size < costs.memory_bytes(full_rank)["moments"]
    assert costs.parameters(config) == costs.parameters(full_rank)
    assert costs.flops_per_token(config) == costs.flops_per_token(full_rank)


def test_its_knobs_name_sparse_runs_and_no_others(nano):
    changes = [{"density": 0.3}, {"update_gap": 7}, {"update_gap": None}, {"select": "gradient"}]
    changes += [{"keep": "support"}, {"bias_correction": "entry"}, {"target_modules": ["w_2"]}]
    for change in changes:
        for method in ("full_rank", "lora", "relora", "galore"):
            assert run_id(nano(method=method)) == run_id(nano(method=method, sparse=change))
        assert run_id(nano(method="sparse")) != run_id(nano(method="sparse", sparse=change))
    assert run_id(nano(method="sparse")).startswith("nano-sparse-d0.1-grammar-s0-")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"density": 0.0}, "sparse.density must be > 0 and <= 1, got 0.0"),
        ({"density": 1.5}, "sparse.density must be > 0 and <= 1, got 1.5; nearest valid: 1"),
        (
            {"density": 1e-4},
            r"sparse.density must be >= 0.001953125 \(one entry of layers.0.attention.k_proj\), "
            "got 0.0001; nearest valid: 0.001953125",
        ),
        ({"update_gap": 0}, "sparse.update_gap must be >= 1, got 0; nearest valid: 1"),
        ({"select": "gradients"}, "sparse.select must be one of .* Did you mean 'gradient'"),
        ({"keep": "important"}, "sparse.keep must be one of .* Did you mean 'importance'"),
        ({"bias_correction": "x"}, "sparse.bias_correction must be one of global, entry, got 'x'"),
        ({"target_modules": ["atention"]}, "got 'atention'. Did you mean 'attention'"),
    ],
)
def test_bad_knobs_are_one_line(nano, change, words):
    with pytest.raises(ConfigError, match=words) as caught:
        validate(nano(method="sparse", sparse=change))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("d_ff", [48, 50, 11, 2048])
def test_the_nearest_density_is_valid_and_the_least(nano, d_ff):
    def config(density):
        model, targets = {"d_ff": d_ff}, ["w_2"]
        return nano(
            method="sparse", model=model, sparse={"density": density, "target_modules": targets}
        )

    with pytest.raises(ConfigError) as caught:
        validate(config(1e-7))
    nearest = config(float(str(caught.value).rpartition(" ")[2]))
    validate(nearest)
    assert set(nearest.sparse.entries(nearest).values()) == {1}


@pytest.fixture
def config(nano):
    """Supports at updates 1, 6 and 11; checkpoints at 3, 6, 9 and 12."""

    def make(**changes):
        return nano(
            method="sparse",
            model={"vocab_size": VOCAB_SIZE},
            sparse={"density": 0.2, "update_gap": 5, **changes.pop("sparse", {})},
            checkpoint={"every_steps": 3},
            **changes,
        )

    return make


@pytest.mark.slow
@pytest.mark.parametrize("choice", CHOICES[:2] + CHOICES[6:], ids=lambda c: "-".join(c.values()))
@pytest.mark.parametrize("die_at", [("train", 5), ("train", 7), ("checkpoint", 9)])
def test_a_killed_and_resumed_run_equals_an_undisturbed_one(
    config, undisturbed, tmp_path, choice, die_at
):
    """Before, at and after a new support, places included."""
    setting = config(sparse=choice, train={"micro_batch_size": 2, "grad_clip": 0.5})
    assert resumes_exactly(setting, tmp_path, die_at=die_at, undisturbed=undisturbed)


def test_a_run_learns_and_a_diverging_one_says_so(config, tmp_path):
    losses = run(config(), tmp_path / "learns").metrics()
    assert losses[12, "train/loss"] < losses[1, "train/loss"] - 0.1
    wild = config(train={"lr": 1e30, "steps": 8})
    assert run(wild, tmp_path / "wild").events[-1].kind == "diverged"


def test_an_export_is_the_model_itself(config, tmp_path):
    setting = config(train={"steps": 3})
    run(setting, tmp_path)
    state = export.merged_state(setting, checkpoint=complete(tmp_path / "checkpoints")[-1])
    assert all(torch.equal(tensor, state[name]) for name, tensor in weights(tmp_path).items())
    Decoder(setting.model).load_state_dict(state)


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 4])
def test_several_processes_equal_one(config, tmp_path, processes):
    setting = config(train={"micro_batch_size": 1, "steps": 7, "lr": 1e-3})
    assert_processes_equal_one(setting, tmp_path, processes=processes, atol=2e-4)
