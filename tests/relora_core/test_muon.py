"""Muon against an independent float64 reference, and beside AdamW in one optimizer."""

import math
from copy import deepcopy

import numpy as np
import pytest
import torch
from test_galore import trajectory
from torch.optim import AdamW, Muon
from training import assert_processes_equal_one, build, one_step, resumes_exactly, run

from relora_core import costs
from relora_core.config import ConfigError, muon_shapes, validate
from relora_core.data.grammar import VOCAB_SIZE
from relora_core.optim import build_muon, set_lr_

ADAMW = {"step", "exp_avg", "exp_avg_sq"}
SHAPES = [(24, 40), (40, 24), (32, 32)]
LR = 0.02


def optimizer_of(matrix, nano, **changes):
    """Muon for a matrix, AdamW for a vector of zeros that has no say in it."""
    config = nano(**changes)
    group = {"params": [matrix, torch.nn.Parameter(torch.zeros(3))]}
    return build_muon([group], matrices=[matrix], config=config)


def gradients(shape, count):
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(count, *shape, generator=generator)


def published(start, given, *, lr, momentum, nesterov, adjust_lr, weight_decay):
    """Jordan et al. 2024 in numpy and float64, with Liu et al. 2025's scale."""
    w, buffer = start.double().numpy().copy(), 0.0
    m, n = w.shape
    factor = 0.2 * math.sqrt(max(m, n)) if adjust_lr != "original" else math.sqrt(max(1, m / n))
    for g in given.double().numpy():
        buffer = momentum * buffer + g
        x = g + momentum * buffer if nesterov else buffer
        x = x / np.sqrt((x**2).sum())
        x = x if m <= n else x.T
        for _ in range(5):
            a = x @ x.T
            x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
        x = x if m <= n else x.T
        w = (1 - lr * weight_decay) * w - lr * factor * x
        yield torch.from_numpy(w.copy())


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("adjust_lr", ["match_rms_adamw", "original"])
def test_fifty_updates_are_those_of_the_published_algorithm(nano, shape, nesterov, adjust_lr):
    """The iterations are in bfloat16, hence a distance of up to 2 % of the way."""
    given = gradients(shape, 51)
    start, given = given[0], given[1:]
    matrix = torch.nn.Parameter(start.clone())
    own = {"momentum": 0.9, "nesterov": nesterov, "adjust_lr": adjust_lr}
    optimizer = optimizer_of(matrix, nano, muon=own, train={"lr": LR, "weight_decay": 0.1})
    moved = trajectory(optimizer, matrix, given).double()
    want = torch.stack(list(published(start, given, lr=LR, weight_decay=0.1, **own)))
    way = (want - start.double()).flatten(1).norm(dim=1)
    error = (moved - want).flatten(1).norm(dim=1)
    assert (error < 0.02 * way).all()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("adjust_lr", ["match_rms_adamw", "original"])
def test_an_update_is_nearly_orthogonal_and_as_large_as_its_rule_says(nano, shape, adjust_lr):
    """Whatever the gradient's singular values: five iterations take all of them near 1. Entries are
    then about 0.2 learning rates of AdamW's, whose entries are known to be of 0.2 to 0.4."""
    left, _, right = torch.linalg.svd(gradients(shape, 1)[0], full_matrices=False)
    gradient = left @ torch.diag(torch.logspace(-1, 1, min(shape))) @ right
    matrix = torch.nn.Parameter(torch.zeros(shape))
    optimizer = optimizer_of(matrix, nano, muon={"adjust_lr": adjust_lr}, train={"lr": LR})
    update = -trajectory(optimizer, matrix, gradient[None])[0] / LR
    m, n = shape
    largest = 0.2 * max(m, n) ** 0.5 if adjust_lr != "original" else max(1, m / n) ** 0.5
    values = torch.linalg.svdvals(update) / largest
    assert values.min() > 0.6
    assert values.max() < 1.25
    turned = left.T @ update @ right.T / largest  # its singular vectors are the gradient's
    torch.testing.assert_close(turned, turned.diag().diag(), atol=0.05, rtol=0)
    if adjust_lr != "original":
        assert update.square().mean().sqrt() == pytest.approx(0.2, rel=0.25)


def test_a_gradient_of_zero_or_none_moves_nothing_but_by_decay(nano):
    matrix = torch.nn.Parameter(torch.ones(6, 4))
    optimizer = optimizer_of(matrix, nano, train={"lr": 0.1, "weight_decay": 0.5})
    assert torch.equal(trajectory(optimizer, matrix, torch.zeros(1, 6, 4))[0], matrix * 0 + 0.95)
    matrix.grad = None
    optimizer.step()
    assert torch.equal(matrix, torch.full((6, 4), 0.95))


# beside AdamW -----------------------------------------------------------------------------------
@pytest.mark.parametrize("method", ["full_rank", "lora", "relora"])
def test_matrices_of_blocks_are_muons_and_all_else_is_adamws(nano, method):
    relora = {"scaling": "trainable", "full_rank_modules": ["w_2"]}
    config = nano(method=method, relora=relora, train={"optimizer": "muon"})
    model, _, optimizer = build(config)
    one_step(model, optimizer)
    adamw, muon = optimizer.parts
    assert (type(adamw), type(muon)) == (AdamW, Muon)
    names = {id(p): name for name, p in model.named_parameters()}
    of = [{names[id(p)] for g in part.param_groups for p in g["params"]} for part in (adamw, muon)]
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert of[0] | of[1] == trained
    assert of[1] == muon_shapes(config).keys()
    assert of[1] == {
        n for n in trained if n.startswith("layers.") and model.get_parameter(n).ndim == 2
    }
    if method != "full_rank":
        assert {"layers.1.swiglu.w_2.weight", "layers.0.attention.q_proj.lora_A"} <= of[1]
        assert "layers.0.attention.q_proj.scalar" in of[0]
    for name in trained:
        state = optimizer.state[model.get_parameter(name)]
        assert state.keys() == ({"momentum_buffer"} if name in of[1] else ADAMW)


def test_what_adamw_updates_moves_as_without_muon_bit_for_bit(nano):
    plain, mixed = (
        build(nano(method="full_rank", train={"optimizer": name})) for name in ("adamw", "muon")
    )
    one_step(plain[0], plain[2])
    one_step(mixed[0], mixed[2])
    theirs = dict(plain[0].named_parameters())
    for name, weight in mixed[0].named_parameters():
        is_matrix = name.startswith("layers.") and "norm" not in name
        assert torch.equal(weight, theirs[name]) != is_matrix, name


def test_learning_rates_are_the_schedules_times_every_ratio(nano):
    """One rate for both by default; relora's ratio of B counts for Muon's B too."""
    config = nano(relora={"lr_ratio_b": 4.0}, muon={"lr_ratio": 3.0}, train={"optimizer": "muon"})
    _, _, optimizer = build(config)
    set_lr_(optimizer, 0.5)
    assert [group["lr"] for group in optimizer.param_groups] == [0.5, 1.5, 6.0]
    assert [group["lr"] for part in optimizer.parts for group in part.param_groups] == [
        0.5,
        1.5,
        6.0,
    ]
    _, _, optimizer = build(nano(train={"optimizer": "muon"}))
    set_lr_(optimizer, 0.5)
    assert {group["lr"] for group in optimizer.param_groups} == {0.5}


def test_a_loaded_optimizer_goes_on_as_the_saved_one(nano):
    """A load replaces groups and state, which both parts must then see."""
    config = nano(method="full_rank", train={"optimizer": "muon"})
    one, two = build(config), build(config)
    one_step(one[0], one[2])
    two[0].load_state_dict(one[0].state_dict())
    two[2].load_state_dict(deepcopy(one[2].state_dict()))
    for model, _, optimizer in (one, two):
        set_lr_(optimizer, 0.003)
        one_step(model, optimizer, seed=1)
    theirs = dict(one[0].named_parameters())
    for name, weight in two[0].named_parameters():
        assert torch.equal(weight, theirs[name]), name


@pytest.mark.parametrize("method", ["full_rank", "lora", "relora"])
def test_state_has_the_size_that_costs_says(nano, method):
    config = nano(method=method, relora={"scaling": "trainable"}, train={"optimizer": "muon"})
    model, _, optimizer = build(config)
    one_step(model, optimizer)
    one_step(model, optimizer, seed=1)
    values = [s for state in optimizer.state.values() for k, s in state.items() if k != "step"]
    size = sum(4 * tensor.numel() for tensor in values)
    assert costs.memory_bytes(config)["moments"] == size
    matrices = sum(math.prod(shape) for shape in muon_shapes(config).values())
    plain = nano(method=method, relora={"scaling": "trainable"}, train={"optimizer": "adamw"})
    assert costs.memory_bytes(plain)["moments"] == size + 4 * matrices


# restarts and phases ----------------------------------------------------------------------------
@pytest.mark.parametrize(("policy", "share"), [("zero", 1.0), ("random", 0.9), ("magnitude", 0.9)])
def test_a_restart_prunes_the_moments_of_adapters_and_no_others(nano, policy, share):
    relora = {"optimizer_state": policy, "prune_ratio": 0.9}
    model, method, optimizer = build(nano(relora=relora, train={"optimizer": "muon"}))
    for seed in range(4):
        one_step(model, optimizer, seed)
    adapters = {id(p) for _, m in method.adapters(model) for p in (m.lora_A, m.lora_B)}
    before = {p: {k: v.clone() for k, v in s.items()} for p, s in optimizer.state.items()}
    metrics = method.after_step(4, model, optimizer)
    left = total = 0
    for parameter, state in optimizer.state.items():
        if id(parameter) not in adapters:
            assert all(torch.equal(state[k], v) for k, v in before[parameter].items())
            continue
        (buffer,), (old,) = state.values(), before[parameter].values()
        alive = buffer != 0
        assert torch.equal(buffer[alive], old[alive])
        left += int(alive.sum())
        total += buffer.numel()
    assert left / total == pytest.approx(1 - share, abs=0.03)
    assert metrics["restart/state_zeroed"] == pytest.approx(share, abs=0.03)


def test_a_changed_rank_drops_one_moment_and_trains_on(nano):
    relora = {"rank_schedule": [[4, 2]], "optimizer_state": "keep"}
    model, method, optimizer = build(nano(relora=relora, train={"optimizer": "muon"}))
    for seed in range(4):
        one_step(model, optimizer, seed)
    assert method.after_step(4, model, optimizer)["restart/state_zeroed"] == 1.0
    before = [m.lora_B.clone() for _, m in method.adapters(model)]
    one_step(model, optimizer, 4)
    for old, (_, adapter) in zip(before, method.adapters(model), strict=True):
        assert adapter.rank == 2
        assert not torch.equal(adapter.lora_B, old)
        assert optimizer.state[adapter.lora_B]["momentum_buffer"].shape == old.shape


# runs -------------------------------------------------------------------------------------------
@pytest.fixture
def config(nano):
    def make(**changes):
        changes.setdefault("checkpoint", {"every_steps": 3})
        changes["train"] = {"optimizer": "muon", **changes.get("train", {})}
        return nano(model={"vocab_size": VOCAB_SIZE}, **changes)

    return make


@pytest.mark.slow
@pytest.mark.parametrize("die_at", [("train", 4), ("train", 8), ("checkpoint", 9)])
@pytest.mark.parametrize(
    "changes",
    [
        {"method": "full_rank"},
        {"method": "lora", "relora": {"warm_start_steps": 5}},
        {"relora": {"optimizer_state": "random", "prune_ratio": 0.5}},
        {"relora": {"rank_schedule": [[4, 2]], "lr_ratio_b": 2.0}},
    ],
    ids=str,
)
def test_a_killed_and_resumed_run_equals_an_undisturbed_one(
    config, undisturbed, tmp_path, changes, die_at
):
    """Bit for bit: losses, weights and moments; restarts at 4 and 8."""
    setting = config(**changes, train={"micro_batch_size": 2, "grad_clip": 0.5})
    assert resumes_exactly(setting, tmp_path, die_at=die_at, undisturbed=undisturbed)


def test_a_run_learns_and_a_diverging_one_says_so(config, tmp_path):
    losses = run(config(method="full_rank"), tmp_path / "learns").metrics()
    assert losses[12, "train/loss"] < losses[1, "train/loss"] - 0.2
    wild = config(method="full_rank", train={"lr": 1e30, "steps": 8})
    assert run(wild, tmp_path / "wild").events[-1].kind == "diverged"


@pytest.mark.slow
@pytest.mark.parametrize("method", ["full_rank", "relora"])
def test_two_processes_equal_one(config, tmp_path, method):
    """Up to the bfloat16 of the iterations, which turns other sums into other digits."""
    setting = config(method=method, train={"micro_batch_size": 1, "steps": 7, "lr": 1e-3})
    assert_processes_equal_one(setting, tmp_path, processes=2, atol=2e-4)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"method": "galore"}, "train.optimizer must be adamw with method=galore .*, got 'muon'"),
        ({"method": "lora", "relora": {"r": 0}}, "must be adamw with relora.r=0 .* left to Muon"),
        ({"muon": {"momentum": 1.0}}, "muon.momentum must be >= 0 and < 1, got 1.0"),
        ({"muon": {"ns_steps": 0}}, "muon.ns_steps must be >= 1 and <= 99, got 0"),
        ({"muon": {"lr_ratio": 0.0}}, "muon.lr_ratio must be > 0, got 0.0"),
        ({"muon": {"adjust_lr": "orig"}}, "muon.adjust_lr must be one of .* mean 'original'"),
        ({"train": {"optimizer": "moun"}}, "train.optimizer must be one of .* mean 'muon'"),
    ],
)
def test_what_does_not_go_with_muon_is_one_line(nano, changes, words):
    with pytest.raises(ConfigError, match=words) as caught:
        validate(nano(**{"train": {"optimizer": "muon"}, **changes}))
    assert "\n" not in str(caught.value)


def test_a_frozen_body_with_a_linear_left_to_train_is_taken(nano):
    relora = {"r": 0, "target_modules": ["attention"]}
    validate(nano(method="lora", relora=relora, train={"optimizer": "muon"}))
