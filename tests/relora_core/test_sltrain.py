"""SLTrain against a float64 reference, the methods that its limits are, and what it costs."""

import math

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
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
from relora_core import checkpoint, costs, export
from relora_core.config import ConfigError, SLTrainConfig, linear_shapes, validate
from relora_core.data.grammar import VOCAB_SIZE
from relora_core.methods.sltrain import SLTrain, SLTrainLinear
from relora_core.model import Decoder
from relora_core.optim import build_adamw
from relora_core.seeds import named_generator

ROWS, COLUMNS = 5, 7
LOW_RANK = {"delta": 0.0, "init": "spectral"}
SPARSE = {"r": 0, "delta": 0.2}
BOTH = {"r": 4, "delta": 0.2}


def linear_of(*, r=2, delta=0.3, alpha=3.0, dense=None):
    """A linear of its own, drawn, in float64."""
    sltrain = SLTrainConfig(r=r, alpha=alpha, delta=delta)
    plain = torch.nn.Linear(COLUMNS, ROWS, bias=False, dtype=torch.float64)
    linear = SLTrainLinear(plain, sltrain, entries=int(delta * ROWS * COLUMNS))
    linear.draw_(3, "w", dense=dense)
    return linear


def noise(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, dtype=torch.float64, generator=generator)


# the update ---------------------------------------------------------------------------------------
class Adam:
    """AdamW of one array, in numpy."""

    def __init__(self, train):
        self.train, self.t, self.m, self.v = train, 0, 0.0, 0.0

    def moved(self, w, g):
        train, self.t = self.train, self.t + 1
        self.m = train.beta1 * self.m + (1 - train.beta1) * g
        self.v = train.beta2 * self.v + (1 - train.beta2) * g * g
        m, v = self.m / (1 - train.beta1**self.t), self.v / (1 - train.beta2**self.t)
        return w - train.lr * (m / (np.sqrt(v) + train.eps) + train.weight_decay * w)


def published(linear, x, y, *, train, every, balance):
    """Effective weights of least squares by SLTrain's equations, the sparse part as a mask."""
    mask = np.zeros((ROWS, COLUMNS))
    s = np.zeros((ROWS, COLUMNS))
    if linear.places is not None:
        for place, value in zip(linear.places.tolist(), linear.values.tolist(), strict=True):
            mask[divmod(place, COLUMNS)], s[divmod(place, COLUMNS)] = 1, value
    r = 0 if linear.lora_A is None else len(linear.lora_A)
    a = linear.lora_A.detach().numpy().copy() if r else np.zeros((1, COLUMNS))
    b = linear.lora_B.detach().numpy().copy() if r else np.zeros((ROWS, 1))
    adams = [Adam(train) for _ in range(3)]
    for step in range(train.steps):
        w = linear.scale * b @ a + s
        g = 2 * (w @ x.numpy() - y.numpy()) @ x.numpy().T
        da, db = linear.scale * b.T @ g, linear.scale * g @ a.T
        if r:
            a, b = adams[0].moved(a, da), adams[1].moved(b, db)
        s = mask * adams[2].moved(s, mask * g)
        if every and (step + 1) % every == 0 and step + 1 < train.steps:
            adams[:2] = Adam(train), Adam(train)
            if balance:
                u, d, v = np.linalg.svd(b @ a)
                b, a = u[:, :r] * np.sqrt(d[:r]), np.sqrt(d[:r])[:, None] * v[:r]
        yield linear.scale * b @ a + s


@pytest.mark.parametrize(("r", "delta"), [(2, 0.3), (5, 0.1), (0, 0.5), (3, 0.0), (2, 1.0)])
@pytest.mark.parametrize(("every", "refactor"), [(None, "balance"), (9, "balance"), (9, "moments")])
def test_fifty_updates_are_those_of_the_equations(nano, r, delta, every, refactor):
    knobs = {"r": r, "delta": delta, "refactor_every": every, "refactor": refactor}
    train = {"steps": 50, "lr": 0.03, "weight_decay": 0.1}
    config = nano(method="sltrain", sltrain=knobs, train=train)
    dense = noise(ROWS, COLUMNS, seed=1) if delta == 0 else None
    model = torch.nn.Sequential(linear_of(r=r, delta=delta, dense=dense))
    x, y = noise(COLUMNS, 20, seed=2), noise(ROWS, 20, seed=3)
    method = SLTrain(config)
    groups = [{"params": list(model.parameters())}]
    optimizer = build_adamw(groups, train=config.train)
    balance = refactor == "balance"
    expected = published(model[0], x, y, train=config.train, every=every, balance=balance)
    for step, want in enumerate(expected, start=1):
        optimizer.zero_grad()
        (model(x.T) - y.T).square().sum().backward()
        optimizer.step()
        method.after_step(step, model, optimizer)
        torch.testing.assert_close(
            model[0].effective_weight(), torch.from_numpy(want), atol=1e-9, rtol=0
        )


# its limits ---------------------------------------------------------------------------------------
def take(model, method, optimizer, *, steps):
    """Losses of so many updates."""
    losses = []
    for step in range(steps):
        loss = model(*batch(step))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        method.after_step(step + 1, model, optimizer)
        losses.append(loss.item())
    return losses


def test_a_full_sparse_part_alone_is_full_rank_training(nano):
    train = {"lr": 1e-3}
    sparse = build(nano(method="sltrain", sltrain={"r": 0, "delta": 1.0}, train=train))
    full = build(nano(method="full_rank", train=train))
    with torch.no_grad():
        for name, linear in sparse[1].targets(sparse[0]):
            linear.values.copy_(full[0].get_submodule(name).weight.flatten())
    assert take(*sparse, steps=6) == pytest.approx(take(*full, steps=6), abs=1e-6)
    ours, theirs = (dict(m.effective_weights(model)) for model, m, _ in (sparse, full))
    for name, weight in theirs.items():
        torch.testing.assert_close(ours[name], weight, atol=1e-5, rtol=0)


def test_without_factors_only_the_drawn_entries_are_ever_other_than_zero(nano):
    model, method, optimizer = build(nano(method="sltrain", sltrain=SPARSE))
    before = dict(method.effective_weights(model))
    take(model, method, optimizer, steps=5)
    for name, weight in method.effective_weights(model):
        assert int((weight != 0).sum()) == int(0.2 * weight.numel()), name
        assert torch.equal(weight != 0, before[name] != 0)
        assert not torch.equal(weight, before[name])


def test_without_a_sparse_part_every_weight_is_of_rank_r(nano):
    model, method, optimizer = build(nano(method="sltrain", sltrain={"r": 4, **LOW_RANK}))
    take(model, method, optimizer, steps=3)
    for name, weight in method.effective_weights(model):
        assert int(torch.linalg.matrix_rank(weight.double(), rtol=1e-5)) == 4, name


@pytest.mark.parametrize("r", [4, 16])
def test_a_spectral_start_is_what_is_nearest_to_the_dense_one(nano, r):
    """At the full rank of k_proj and v_proj (16 x 32) it is the dense one."""
    model, method, _ = build(nano(method="sltrain", sltrain={"r": r, "alpha": 3.0, **LOW_RANK}))
    dense = build(nano(method="full_rank"))[0]
    for name, weight in method.effective_weights(model):
        other = dense.get_submodule(name).weight.detach().double()
        left_out = torch.linalg.svdvals(other)[r:].square().sum().sqrt().item()
        assert (weight.double() - other).norm().item() == pytest.approx(left_out, abs=1e-5), name


def test_a_low_rank_part_alone_cannot_learn_from_the_published_start(nano):
    """Why it is refused: with B = 0 everywhere no block's parameter has a gradient."""
    config = nano(method="sltrain", sltrain={"delta": 0.0})
    with pytest.raises(ConfigError, match=r"sltrain.init must be spectral with sltrain\.delta=0"):
        validate(config)
    for setting, learns in ((config, False), (nano(method="sltrain", sltrain=BOTH), True)):
        model, method, optimizer = build(setting)
        take(model, method, optimizer, steps=3)
        model(*batch(9)).backward()
        factors = [p for _, t in method.targets(model) for p in (t.lora_A, t.lora_B)]
        assert [bool(p.grad.any()) for p in factors] == [learns] * len(factors)


# draws and refactorisations -----------------------------------------------------------------------
def test_a_start_is_as_published_and_a_function_of_seed_and_name_alone(nano):
    drawn = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        linear = linear_of(r=3, delta=0.5)
        drawn.append(linear)
        assert not linear.lora_B.any()
        bound = 1 / math.sqrt(COLUMNS)
        for values in (linear.lora_A, linear.values):
            assert bound / 2 < values.abs().max() <= bound
    generator = named_generator(3, 0, "w/sparse")
    places = torch.randperm(ROWS * COLUMNS, generator=generator)[: ROWS * COLUMNS // 2]
    assert sorted(places.tolist()) == drawn[0].places.tolist()
    for one, two in zip(drawn[0].state_dict().items(), drawn[1].state_dict().items(), strict=True):
        assert one[0] == two[0]
        assert torch.equal(one[1], two[1])
    other = SLTrainLinear(
        torch.nn.Linear(COLUMNS, ROWS, dtype=torch.float64), SLTrainConfig(r=3), entries=17
    )
    other.draw_(3, "v", dense=None)
    assert not torch.equal(other.places, drawn[0].places)
    assert not torch.equal(other.lora_A, drawn[0].lora_A)


def test_every_linear_has_a_draw_of_its_own(nano):
    model, method, _ = build(nano(method="sltrain", sltrain=BOTH))
    one, two = (
        linear for name, linear in method.targets(model) if name.endswith("attention.q_proj")
    )
    assert not torch.equal(one.places, two.places)
    assert not torch.equal(one.lora_A, two.lora_A)
    assert not torch.equal(one.values, two.values)


def test_other_weights_are_drawn_as_under_full_rank(nano):
    ours, theirs = (build(nano(method=m))[0] for m in ("sltrain", "full_rank"))
    there = dict(theirs.named_parameters())
    names = [n for n, _ in ours.named_parameters() if n in there]
    assert len(names) == len(there) - 14
    assert all(torch.equal(ours.get_parameter(name), there[name]) for name in names)


def test_a_refactorisation_balances_the_factors_and_keeps_their_product():
    linear = linear_of(r=3, delta=0.3)
    with torch.no_grad():
        linear.lora_B.copy_(9 * noise(ROWS, 3))
    before, ratio = linear.effective_weight(), linear.lora_B.norm() / linear.lora_A.norm()
    assert linear.balance_() == pytest.approx(ratio.item())
    torch.testing.assert_close(linear.effective_weight(), before, atol=1e-12, rtol=0)
    of_b, of_a = linear.lora_B.T @ linear.lora_B, linear.lora_A @ linear.lora_A.T
    d = torch.linalg.svdvals((before - linear.sparse_weight()) / linear.scale)[:3]
    for gram in (of_b, of_a):
        torch.testing.assert_close(gram, torch.diag(d), atol=1e-11, rtol=0)


@pytest.mark.parametrize("value", [0.0, math.nan, math.inf])
def test_a_product_without_factors_stays_as_it_is(value):
    """A product of 0 would make A 0, too, and neither could ever learn."""
    linear = linear_of(r=2)
    with torch.no_grad():
        linear.lora_B.fill_(value)
    before = linear.lora_A.detach().clone()
    linear.balance_()
    assert torch.equal(linear.lora_A, before)


@pytest.mark.parametrize("refactor", ["balance", "moments"])
@pytest.mark.parametrize("optimizer_name", ["adamw", "muon"])
def test_moments_of_the_factors_are_dropped_and_no_others(nano, refactor, optimizer_name):
    knobs = {**BOTH, "refactor_every": 3, "refactor": refactor}
    train = {"optimizer": optimizer_name}
    model, method, optimizer = build(nano(method="sltrain", sltrain=knobs, train=train))
    take(model, method, optimizer, steps=2)
    one_step(model, optimizer)
    effective = dict(method.effective_weights(model))
    names = {p: name for name, p in model.named_parameters()}
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    metrics = method.after_step(3, model, optimizer)
    assert metrics["refactor/count"] == 1
    assert ("refactor/norm_ratio" in metrics) == (refactor == "balance")
    assert {names[p] for p in optimizer.state} == {n for n in before if ".lora_" not in n}
    for name, p in model.named_parameters():
        moved = refactor == "balance" and ".lora_" in name
        assert torch.equal(p, before[name]) != moved, name
    for name, weight in method.effective_weights(model):
        torch.testing.assert_close(weight, effective[name], atol=1e-6, rtol=0)
    one_step(model, optimizer)
    assert all(optimizer.state[p] for p in model.parameters())
    assert method.after_step(4, model, optimizer) == {}
    assert method.after_step(12, model, optimizer) == {}  # the end


# what it is and costs -----------------------------------------------------------------------------
@pytest.mark.parametrize("knobs", [BOTH, SPARSE, {"r": 4, **LOW_RANK}], ids=str)
@pytest.mark.parametrize("optimizer_name", ["adamw", "muon"])
def test_counts_are_those_of_the_model_and_its_optimizer(nano, knobs, optimizer_name):
    targets = ["swiglu", "q_proj"]
    config = nano(
        method="sltrain",
        sltrain={**knobs, "target_modules": targets},
        train={"optimizer": optimizer_name},
    )
    model, method, optimizer = build(config)
    one_step(model, optimizer)
    counted = costs.parameters(config)
    assert counted.total == counted.trainable == sum(p.numel() for p in model.parameters())
    targets = dict(method.targets(model))
    assert len(targets) == 8
    assert counted.by_group["swiglu"] == 0
    assert counted.by_group["adapters"] == sum(
        p.numel() for linear in targets.values() for p in linear.parameters()
    )
    size = sum(t.nbytes for s in optimizer.state.values() for k, t in s.items() if k != "step")
    memory = costs.memory_bytes(config)
    assert memory["moments"] == size
    of_model = [*model.parameters(), *(t.places for t in targets.values() if t.places is not None)]
    assert memory["weights"] == sum(t.nbytes for t in of_model)
    assert memory["total"] < costs.memory_bytes(nano(method="full_rank"))["total"]


@pytest.mark.parametrize("knobs", [BOTH, SPARSE, {"r": 4, **LOW_RANK}], ids=str)
def test_flops_are_those_that_torch_counts(nano, knobs):
    """But for attention, which torch's own kernels count otherwise, or not at all."""
    config = nano(method="sltrain", sltrain=knobs, train={"batch_size": 4}, data={"seq_len": 16})
    model, _, _ = build(config)
    with FlopCounterMode(display=False) as counter:
        hidden = model.layers[0].swiglu(torch.randn(4, 16, 32, requires_grad=True))
        forward = counter.get_total_flops()
        hidden.sum().backward()
    shapes = [s for n, s in linear_shapes(config.model).items() if n.startswith("layers.0.swiglu")]
    rank = knobs["r"]
    per_pass = sum(2 * rank * math.prod(s) for s in shapes)
    assert forward == 2 * sum(map(math.prod, shapes)) * 64 + per_pass
    assert counter.get_total_flops() == 3 * forward
    everywhere = sum(2 * rank * math.prod(s) for s in linear_shapes(config.model).values())
    ours, full = costs.flops_per_token(config), costs.flops_per_token(nano(method="full_rank"))
    assert ours.forward - full.forward == everywhere // 64
    assert ours.train - full.train == 3 * everywhere // 64


def test_its_parts_are_what_dynamics_measure(nano):
    model, method, optimizer = build(nano(method="sltrain", sltrain=BOTH))
    take(model, method, optimizer, steps=3)
    base, effective = dict(method.base_weights(model)), dict(method.effective_weights(model))
    assert set(base) == set(effective) == set(linear_shapes(method.config.model))
    for name, b, a in method.adapter_factors(model):
        scale = method.config.sltrain.alpha / 4
        torch.testing.assert_close(effective[name], base[name] + scale * b @ a, atol=1e-6, rtol=0)
        assert int((base[name] != 0).sum()) == int(0.2 * base[name].numel())
    sparse = build(nano(method="sltrain", sltrain=SPARSE))
    assert list(sparse[1].adapter_factors(sparse[0])) == []


def test_its_knobs_name_its_runs_and_no_others(nano):
    changes = [{"r": 3}, {"alpha": 3.0}, {"delta": 0.3}, {"init": "spectral"}]
    changes += [{"refactor_every": 3}, {"target_modules": ["w_2"]}]
    for change in changes:
        for method in ("full_rank", "lora", "relora", "sparse"):
            assert run_id(nano(method=method)) == run_id(nano(method=method, sltrain=change))
        assert run_id(nano(method="sltrain")) != run_id(nano(method="sltrain", sltrain=change))
    assert run_id(nano(method="sltrain")).startswith("nano-sltrain-r16-d0.03-grammar-s0-")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"r": 17}, r"sltrain.r must be in \[0, 16\] .*k_proj.* got 17; nearest valid: 16"),
        ({"r": -1}, "sltrain.r must be >= 0, got -1; nearest valid: 0"),
        ({"delta": 1.5}, "sltrain.delta must be >= 0 and <= 1, got 1.5; nearest valid: 1"),
        (
            {"delta": 1e-4},
            r"sltrain.delta must be >= 0.001953125 \(one entry of layers.0.attention.k_proj\), "
            "got 0.0001; nearest valid: 0.001953125",
        ),
        (
            {"r": 0, "delta": 0.0},
            r"sltrain.r and sltrain.delta must not both be 0 .* got 0 and 0; nearest valid: sltr",
        ),
        ({"delta": 0.0}, "sltrain.init must be spectral .* got 'published'; nearest valid: spec"),
        ({"init": "spectrum"}, "sltrain.init must be one of .* Did you mean 'spectral'"),
        ({"refactor_every": 0}, "sltrain.refactor_every must be >= 1, got 0; nearest valid: 1"),
        ({"refactor": "moment"}, "sltrain.refactor must be one of .* Did you mean 'moments'"),
        (
            {"r": 0, "train": {"optimizer": "muon"}},
            r"train.optimizer must be adamw with sltrain.r=0 .* \(no matrix is left to Muon\)",
        ),
        ({"alpha": 0.0}, "sltrain.alpha must be > 0, got 0.0"),
        ({"target_modules": ["atention"]}, "got 'atention'. Did you mean 'attention'"),
    ],
)
def test_bad_knobs_are_one_line(nano, change, words):
    with pytest.raises(ConfigError, match=words) as caught:
        validate(nano(method="sltrain", train=change.pop("train", {}), sltrain=change))
    assert "\n" not in str(caught.value)


# in a run -----------------------------------------------------------------------------------------
SETTINGS = {
    "both": BOTH,
    "low rank": {"r": 4, **LOW_RANK},
    "sparse": SPARSE,
    "balanced": {**BOTH, "refactor_every": 5},
    "muon": {**BOTH, "refactor_every": 5},
    "without moments": {**BOTH, "refactor_every": 5, "refactor": "moments"},
}


@pytest.fixture
def config(nano):
    """Refactorisations, if any, after 5 and 10 updates; checkpoints at 3, 6, 9 and 12."""

    def make(name, **changes):
        model, policy = {"vocab_size": VOCAB_SIZE}, {"every_steps": 3}
        knobs = SETTINGS[name]
        if name == "muon":
            changes["train"] = {"optimizer": "muon", **changes.get("train", {})}
        return nano(method="sltrain", sltrain=knobs, model=model, checkpoint=policy, **changes)

    return make


@pytest.mark.slow
@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("die_at", [("train", 4), ("train", 7), ("checkpoint", 9)])
def test_a_killed_and_resumed_run_equals_an_undisturbed_one(
    config, undisturbed, tmp_path, name, die_at
):
    setting = config(name, train={"micro_batch_size": 2, "grad_clip": 0.5})
    assert resumes_exactly(setting, tmp_path, die_at=die_at, undisturbed=undisturbed)


@pytest.mark.parametrize("name", SETTINGS)
def test_a_run_learns_and_a_diverging_one_says_so(config, tmp_path, name):
    record = run(config(name), tmp_path / "learns")
    losses = record.metrics()
    assert losses[12, "train/loss"] < losses[1, "train/loss"] - 0.1
    assert record.of("method") == ([5, 10] if "refactor_every" in SETTINGS[name] else [])
    wild = config(name, train={"lr": 1e30, "steps": 8})
    assert run(wild, tmp_path / "wild").events[-1].kind == "diverged"


@pytest.mark.parametrize("name", ["both", "low rank", "sparse"])
def test_an_export_has_the_logits_of_the_run(config, tmp_path, name):
    setting = config(name, train={"steps": 3})
    run(setting, tmp_path)
    state = export.merged_state(
        setting, checkpoint=checkpoint.complete(tmp_path / "checkpoints")[-1]
    )
    plain, (model, _, _) = Decoder(setting.model), build(setting)
    plain.load_state_dict(state)
    model.load_state_dict(weights(tmp_path))
    torch.testing.assert_close(plain.logits(batch()[0]), model.logits(batch()[0]), atol=0, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 4])
@pytest.mark.parametrize("name", ["low rank", "sparse", "balanced"])
def test_several_processes_equal_one(config, tmp_path, name, processes):
    setting = config(name, train={"micro_batch_size": 1, "steps": 7, "lr": 1e-3})
    assert_processes_equal_one(setting, tmp_path, processes=processes, atol=2e-4)
