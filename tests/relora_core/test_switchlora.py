"""SwitchLoRA against an independent float64 reference, and what a switch must leave alone."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from training import assert_processes_equal_one, batch, build, resumes_exactly, run, weights

from experiments.identity import essential, run_id
from relora_core import checkpoint, costs, export
from relora_core.config import ConfigError, linear_shapes, validate
from relora_core.data.grammar import VOCAB_SIZE
from relora_core.methods import build_method
from relora_core.model import Decoder
from relora_core.redraws import notices
from relora_core.schedule import expected_switches, switch_rate
from relora_core.seeds import named_generator, named_seed
from tests.conftest import nano_config

BUSY = {"r": 6, "alpha": 3.0, "interval": 7, "decay": None, "freeze_steps": 3}
"""A switch in most steps: 6 / 7 vectors."""


@pytest.fixture
def config(nano):
    def make(**changes):
        knobs = {**BUSY, **changes.pop("switchlora", {})}
        train = {"steps": 60, "weight_decay": 0.0, **changes.pop("train", {})}
        return nano(method="switchlora", switchlora=knobs, train=train, **changes)

    return make


def update(model, method, optimizer, step):
    """The update after `step` others, without what follows it."""
    model(*batch(step)).backward()
    method.before_update(step, model)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def advance(model, method, optimizer, *, steps, start=0):
    for step in range(start, start + steps):
        update(model, method, optimizer, step)
        assert method.after_step(step + 1, model, optimizer) == {}


def adapters(model, method):
    return dict(method.adapters(model))


# the rule ----------------------------------------------------------------------------------------
class Toy(torch.nn.Module):
    """Linears with the names of a decoder's, in float64; the loss is sum((tanh(X W^T) - Y)^2)."""

    def __init__(self, shapes):
        super().__init__()
        draws = torch.Generator().manual_seed(5)
        self.data = {}
        for name, (rows, columns) in shapes.items():
            owner = self
            *path, last = name.split(".")
            for part in path:
                if not hasattr(owner, part):
                    owner.add_module(part, torch.nn.Module())
                owner = getattr(owner, part)
            linear = torch.nn.Linear(columns, rows, bias=False, dtype=torch.float64)
            torch.nn.init.normal_(linear.weight, std=0.2, generator=draws)
            owner.add_module(last, linear)
            self.data[name] = [
                torch.randn(9, size, dtype=torch.float64, generator=draws)
                for size in (columns, rows)
            ]

    def loss(self):
        pairs = ((self.get_submodule(name)(x).tanh() - y) for name, (x, y) in self.data.items())
        return sum(difference.square().sum() for difference in pairs)


def slope(weight, x, y):
    """dL/dW of the toy's loss, by hand."""
    out = np.tanh(x @ weight.T)
    return (2 * (out - y) * (1 - out**2)).T @ x


class Vector:
    """A trained vector of a factor with Adam's state of its place."""

    def __init__(self, values):
        self.values, self.m, self.v, self.step, self.frozen = values, 0.0, 0.0, 0, 0

    def reset(self, freeze):
        self.m, self.v, self.step, self.frozen = 0.0, 0.0, 0, freeze

    def move(self, gradient, train):
        if self.frozen > 0:
            gradient = np.zeros_like(gradient)
            self.frozen -= 1
        self.step += 1
        self.m = train.beta1 * self.m + (1 - train.beta1) * gradient
        self.v = train.beta2 * self.v + (1 - train.beta2) * gradient**2
        m = self.m / (1 - train.beta1**self.step)
        v = self.v / (1 - train.beta2**self.step)
        decayed = (1 - train.lr * train.weight_decay) * self.values
        self.values = decayed - train.lr * m / (np.sqrt(v) + train.eps)


class Reference:
    """The paper's rule for one linear, a vector at a time, in numpy."""

    def __init__(self, config, name, adapter, data):
        knobs = config.switchlora
        self.config, self.name = config, name
        self.w = adapter.weight.detach().numpy().copy()
        self.a = [Vector(row.copy()) for row in adapter.lora_A.detach().numpy()]
        self.b = [Vector(column.copy()) for column in adapter.lora_B.detach().numpy().T]
        self.spare_a = [row.copy() for row in adapter.pool_A.numpy()]
        self.spare_b = [row.copy() for row in adapter.pool_B.numpy()]
        self.s, self.x, self.y = knobs.alpha / knobs.r, *(d.numpy() for d in data)
        self.turn, self.counts = 0, []

    def effective(self):
        return self.w + self.s * sum(
            np.outer(b.values, a.values) for a, b in zip(self.a, self.b, strict=True)
        )

    def update(self):
        g = slope(self.effective(), self.x, self.y)
        of_a = [self.s * g.T @ b.values for b in self.b]
        of_b = [self.s * g @ a.values for a in self.a]
        for vectors, gradients in ((self.a, of_a), (self.b, of_b)):
            for vector, gradient in zip(vectors, gradients, strict=True):
                vector.move(gradient, self.config.train)

    def switch(self, k):
        knobs, r = self.config.switchlora, len(self.a)
        fall = 1.0
        if knobs.decay is not None:
            fall = 0.3 ** ((k + 1) / (knobs.decay * self.config.train.steps))
        x = r / knobs.interval * fall
        drawn = named_seed(self.config.seed, k, f"{self.name}/switch") / 2**63
        count = math.floor(x) + (drawn < x - math.floor(x))
        lately = sum(self.counts[len(self.counts) - knobs.freeze_steps + 1 :])
        count = min(count, r // 2 - lately, len(self.spare_a))
        self.counts.append(count)
        for factor in "AB":
            order = range(self.turn, self.turn + count)
            if knobs.order == "random":
                draws = named_generator(self.config.seed, k, f"{self.name}/{factor}")
                order = torch.randperm(len(self.spare_a), generator=draws)[:count].tolist()
            for i, spare in zip(range(self.turn, self.turn + count), order, strict=True):
                if factor == "A":
                    self.switch_one(
                        self.a, self.spare_a, self.b, i % r, spare, lambda b, a: np.outer(b, a)
                    )
                else:
                    i += r // 2
                    self.switch_one(
                        self.b, self.spare_b, self.a, i % r, spare, lambda a, b: np.outer(b, a)
                    )
        self.turn += count

    def switch_one(self, vectors, pool, others, i, spare, outer):
        spare %= len(pool)
        assert others[i].frozen == 0
        assert vectors[i].frozen == 0
        old, new = vectors[i].values, pool[spare]
        self.w = self.w + self.s * outer(others[i].values, old - new)
        vectors[i].values, pool[spare] = new, old
        others[i].reset(self.config.switchlora.freeze_steps)


@pytest.mark.parametrize(
    "knobs",
    [
        {},
        {"order": "random"},
        {"r": 7, "interval": 2, "freeze_steps": 1},
        {"interval": 1, "freeze_steps": 0},
        {"decay": 0.6, "interval": 6},
        {"r": 14, "interval": 10, "freeze_steps": 5, "order": "random"},
    ],
    ids=str,
)
def test_fifty_steps_are_those_of_the_papers_rule(config, knobs):
    """Wide, tall and square targets beside linears that plain Adam trains, in float64."""
    setting = config(
        switchlora={"target_modules": ["k_proj", "w_0", "q_proj"], **knobs},
        train={"steps": 50, "weight_decay": 0.1, "lr": 0.02},
    )
    toy = Toy({n: s for n, s in linear_shapes(setting.model).items() if n.startswith("layers.0")})
    setting.model.n_layers = 1
    method = build_method(setting)
    method.adapt(toy)
    toy.double()
    optimizer = method.build_optimizer(toy)
    references = {
        name: Reference(setting, name, adapter, toy.data[name])
        for name, adapter in method.adapters(toy)
    }
    plain = {
        name: Vector(toy.get_submodule(name).weight.detach().numpy().copy())
        for name in toy.data
        if name not in references
    }
    assert len(references) == 3
    assert len(plain) == 4
    for step in range(50):
        toy.loss().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        method.after_step(step + 1, toy, optimizer)
        for reference in references.values():
            reference.update()
            if step + 1 < 50:
                reference.switch(step + 1)
        for name, vector in plain.items():
            x, y = (part.numpy() for part in toy.data[name])
            vector.move(slope(vector.values, x, y), setting.train)
    assert all(reference.turn > 5 for reference in references.values())
    effective = dict(method.effective_weights(toy))
    for name, adapter in method.adapters(toy):
        reference = references[name]
        pairs = [
            (adapter.weight, reference.w),
            (adapter.lora_A, np.stack([a.values for a in reference.a])),
            (adapter.lora_B, np.stack([b.values for b in reference.b], axis=1)),
            (adapter.pool_A, np.stack(reference.spare_a)),
            (adapter.pool_B, np.stack(reference.spare_b)),
            (effective[name], reference.effective()),
            (optimizer.state[adapter.lora_A]["step"][:, 0], [a.step for a in reference.a]),
            (optimizer.state[adapter.lora_B]["frozen"][0], [b.frozen for b in reference.b]),
        ]
        for ours, theirs in pairs:
            torch.testing.assert_close(
                ours.detach().double(), torch.tensor(np.array(theirs)).double(), atol=1e-9, rtol=0
            )
    for name, vector in plain.items():
        ours = toy.get_submodule(name).weight.detach()
        torch.testing.assert_close(ours, torch.tensor(vector.values), atol=1e-9, rtol=0)


# the start ---------------------------------------------------------------------------------------
def test_adapting_changes_logits_by_rounding_alone(config):
    setting = config()
    torch.manual_seed(setting.seed)
    plain = Decoder(setting.model).eval()
    model, method, _ = build(setting)
    ids, _ = batch()
    torch.testing.assert_close(model.eval().logits(ids), plain.logits(ids), atol=5e-6, rtol=0)
    for _, adapter in method.adapters(model):
        assert adapter.lora_A.abs().min() > 0
        assert adapter.lora_B.abs().min() > 0


def test_vectors_are_drawn_as_published(config):
    """Deviations of the paper, and of s B A as of a Kaiming draw; pools are drawn like factors."""
    model, method, _ = build(config(switchlora={"r": 8, "alpha": 1.0}))
    gain = torch.nn.init.calculate_gain("leaky_relu", math.sqrt(5))
    for _, adapter in method.adapters(model):
        (m, n), r = adapter.weight.shape, 8
        of_a = (math.sqrt(m) * r / (n * math.sqrt(n))) ** 0.25 * math.sqrt(gain)
        of_b = (r / math.sqrt(m * n)) ** 0.25 * math.sqrt(gain)
        for factor, pool, deviation in (
            (adapter.lora_A, adapter.pool_A, of_a),
            (adapter.lora_B.T, adapter.pool_B, of_b),
        ):
            every = torch.cat((factor.detach(), pool))
            assert len(every) == min(m, n)
            assert every.std().item() == pytest.approx(deviation, rel=0.1)
            assert every.abs().max().item() == pytest.approx(deviation * 3**0.5, rel=0.05)
        product = (adapter.lora_B @ adapter.lora_A).detach() / r
        assert product.std().item() == pytest.approx(gain / math.sqrt(n), rel=0.2)


def test_what_is_drawn_depends_on_seed_and_name_alone(config):
    one, _, _ = build(config())
    torch.manual_seed(1)
    torch.rand(3)
    two, _, _ = build(config())
    other, _, _ = build(config(seed=1))
    name = "layers.1.swiglu.w_0.pool_A"
    assert torch.equal(one.state_dict()[name], two.state_dict()[name])
    assert not torch.equal(one.state_dict()[name], other.state_dict()[name])
    assert not torch.equal(
        one.state_dict()[name], one.state_dict()[name.replace("layers.1", "layers.0")]
    )


def test_without_switches_it_is_lora_from_the_same_start_bit_for_bit(config, nano):
    setting = config(switchlora={"interval": None}, train={"weight_decay": 0.1})
    model, method, optimizer = build(setting)
    lora = nano(method="lora", relora={"r": 6, "alpha": 3.0}, train=vars_of(setting.train))
    torch.manual_seed(lora.seed)
    twin = Decoder(lora.model)
    plain = build_method(lora)
    plain.adapt(twin)
    start = {n: t.clone() for n, t in model.state_dict().items() if "pool" not in n}
    twin.load_state_dict(start)
    theirs = plain.build_optimizer(twin)
    for step in range(8):
        update(model, method, optimizer, step)
        method.after_step(step + 1, model, optimizer)
        update(twin, plain, theirs, step)
        plain.after_step(step + 1, twin, theirs)
    now = model.state_dict()
    assert all(torch.equal(now[name], tensor) for name, tensor in twin.state_dict().items())
    assert not torch.equal(now["layers.0.swiglu.w_0.lora_A"], start["layers.0.swiglu.w_0.lora_A"])


def vars_of(section):
    return {name: getattr(section, name) for name in section.__slots__}


# a switch ----------------------------------------------------------------------------------------
def test_a_switch_changes_no_logit_beyond_rounding(config):
    model, method, optimizer = build(config())
    advance(model, method, optimizer, steps=12)
    ids, _ = batch(99)
    for step in range(12, 24):
        update(model, method, optimizer, step)
        before = {n: a.weight.clone() for n, a in method.adapters(model)}
        effective = dict(method.effective_weights(model))
        logits = model.logits(ids)
        method.after_step(step + 1, model, optimizer)
        torch.testing.assert_close(model.logits(ids), logits, atol=5e-6, rtol=0)
        moved = [not torch.equal(a.weight, before[n]) for n, a in method.adapters(model)]
        assert any(moved)
        for name, weight in method.effective_weights(model):
            torch.testing.assert_close(weight, effective[name], atol=5e-7, rtol=0)


@pytest.mark.parametrize("order", ["sequential", "random"])
def test_no_vector_is_lost(config, order):
    """At learning rate 0: what factors and pools hold together is what was drawn."""

    def every(adapter):
        for factor, pool in (
            (adapter.lora_A, adapter.pool_A), (adapter.lora_B.T, adapter.pool_B)
        ):  # fmt: skip
            yield sorted(map(tuple, torch.cat((factor.detach(), pool)).tolist()))

    model, method, optimizer = build(config(switchlora={"order": order}, train={"lr": 1e-30}))
    optimizer.param_groups[0]["lr"] = 0.0
    before = {name: list(every(a)) for name, a in method.adapters(model)}
    first = {name: a.lora_A.detach().clone() for name, a in method.adapters(model)}
    advance(model, method, optimizer, steps=30)
    for name, adapter in method.adapters(model):
        assert list(every(adapter)) == before[name]
        assert not torch.equal(adapter.lora_A, first[name])


def test_in_sequence_a_vector_comes_back_after_all_others_have_been_in(config):
    model, method, optimizer = build(
        config(switchlora={"interval": 1, "freeze_steps": 0, "r": 6}, train={"lr": 1e-30})
    )
    optimizer.param_groups[0]["lr"] = 0.0
    adapter = adapters(model, method)["layers.0.attention.k_proj"]  # 16 x 32: 10 to spare
    names = {
        tuple(v): i for i, v in enumerate(torch.cat((adapter.lora_A, adapter.pool_A)).tolist())
    }
    update(model, method, optimizer, 0)
    seen = []
    for step in range(1, 20):
        before = adapter.lora_A.detach().tolist()
        method.after_step(step, model, optimizer)
        after = adapter.lora_A.detach().tolist()
        seen += [names[tuple(b)] for a, b in zip(before, after, strict=True) if a != b]
    assert len(seen) == 19 * 3  # half of the vectors a step
    rounds = [seen[i : i + 16] for i in range(0, 48, 16)]
    assert all(sorted(one) == list(range(16)) for one in rounds)


def test_a_counterpart_begins_anew_and_no_other_vector_does(config):
    """Moments and step count; the switched vector's own place keeps them, bit for bit."""
    model, method, optimizer = build(config())
    advance(model, method, optimizer, steps=20)
    update(model, method, optimizer, 20)
    kinds = ("exp_avg", "exp_avg_sq", "step")
    old = {
        name: [
            (getattr(a, f"lora_{f}").detach().clone(), *(state[k].clone() for k in kinds))
            for f, state in ((f, optimizer.state[getattr(a, f"lora_{f}")]) for f in "AB")
        ]
        for name, a in method.adapters(model)
    }
    method.after_step(21, model, optimizer)
    switched = 0
    for name, adapter in method.adapters(model):
        factors = adapter.lora_A.detach(), adapter.lora_B.detach().T
        befores = old[name][0], [t.mT if t.ndim == 2 else t for t in old[name][1]]
        moved = [
            (now != before[0]).any(dim=1) for now, before in zip(factors, befores, strict=True)
        ]
        assert int(moved[0].sum()) == int(moved[1].sum())
        assert not (moved[0] & moved[1]).any()
        switched += int(moved[0].sum())
        for side, factor in enumerate((adapter.lora_A, adapter.lora_B)):
            state = optimizer.state[factor]
            for kind, before in zip(kinds, befores[side][1:], strict=True):
                now = state[kind] if side == 0 else state[kind].mT
                assert not now[moved[1 - side]].any()
                assert torch.equal(now[~moved[1 - side]], before[~moved[1 - side]])
    assert 0 < switched < 6 * 14


@pytest.mark.parametrize("freeze", [0, 1, 3])
def test_a_counterpart_is_frozen_for_exactly_so_many_updates(config, freeze):
    """All others move at every update; without weight decay frozen ones do not."""
    model, method, optimizer = build(config(switchlora={"freeze_steps": freeze}))
    adapter = adapters(model, method)["layers.0.swiglu.w_0"]
    waits = {f: torch.zeros(6, dtype=torch.long) for f in "AB"}
    seen = 0
    for step in range(40):
        before = adapter.lora_A.detach().clone(), adapter.lora_B.detach().clone()
        update(model, method, optimizer, step)
        for side, factor in enumerate("AB"):
            still = (getattr(adapter, f"lora_{factor}") == before[side]).all(dim=1 - side)
            assert torch.equal(still, waits[factor] > 0), step
            seen += int(still.sum())
            waits[factor] = (waits[factor] - 1).clamp(min=0)
        before = adapter.lora_A.detach().clone(), adapter.lora_B.detach().clone()
        method.after_step(step + 1, model, optimizer)
        for side, (factor, other) in enumerate(("AB", "BA")):
            changed = (getattr(adapter, f"lora_{factor}") != before[side]).any(dim=1 - side)
            assert not (changed & (waits[factor] > 0)).any()
            waits[other][changed] = freeze
    assert (seen > 0) == (freeze > 0)


def test_the_first_move_after_a_freeze_is_half_a_rate_as_its_code_has_it(config):
    """The step count of a frozen vector goes on: of six steps, one has a gradient."""
    setting = config(switchlora={"interval": 20, "freeze_steps": 5}, train={"lr": 1e-3})
    model, method, optimizer = build(setting)
    adapter = adapters(model, method)["layers.0.swiglu.w_0"]
    update(model, method, optimizer, 0)
    optimizer.reset_(adapter.lora_A, torch.tensor([2]), dim=0, freeze=5)
    start = adapter.lora_A[2].detach().clone()
    for step in range(1, 6):
        update(model, method, optimizer, step)
        assert torch.equal(adapter.lora_A[2], start)
    update(model, method, optimizer, 6)
    moved = (adapter.lora_A[2] - start).abs().median().item()
    want = 0.1 / (1 - 0.9**6) / math.sqrt(0.001 / (1 - 0.999**6))
    assert moved / 1e-3 == pytest.approx(want, rel=1e-3)
    assert want == pytest.approx(0.52, abs=0.01)


@given(
    r=st.integers(2, 15),
    freeze=st.integers(0, 6),
    slack=st.integers(0, 9),
    seed=st.integers(0, 9),
)
def test_no_frozen_vector_is_switched(r, freeze, slack, seed):
    """Whatever the knobs allow, by the method's own counts."""
    interval = max(1, 2 * freeze + slack)
    knobs = {"r": r, "interval": interval, "decay": None, "freeze_steps": freeze}
    setting = nano_config(method="switchlora", switchlora=knobs, train={"steps": 99}, seed=seed)
    validate(setting)
    method = build_method(setting)
    name = "layers.0.attention.k_proj"
    adapter = type("Adapter", (), {"rank": r, "pool_A": range(16 - r)})()
    waits, turn = np.zeros((2, r), dtype=int), 0
    for step in range(1, 40):
        count = method._count(step, name, adapter)
        places = [(np.arange(turn, turn + count) + ahead) % r for ahead in (0, r // 2)]
        assert len(set(places[0])) == count <= 16 - r
        for side in (0, 1):
            assert not waits[side][places[side]].any()
        for side in (0, 1):
            waits[1 - side][places[side]] = freeze
        assert not waits[0][places[0]].any()
        waits, turn = np.maximum(waits - 1, 0), turn + count
    assert turn > 0 or r / interval < 0.3


# how often ---------------------------------------------------------------------------------------
def test_the_frequency_falls_as_published(config):
    """r / interval a step at first, 0.3 of it at decay * N, and so on."""
    setting = config(switchlora={"r": 8, "interval": 40, "decay": 0.1}, train={"steps": 1000})
    assert switch_rate(-1, config=setting) == pytest.approx(8 / 40)
    assert switch_rate(99, config=setting) == pytest.approx(0.3 * 8 / 40)
    assert switch_rate(999, config=setting) == pytest.approx(0.3**10 * 8 / 40)
    assert expected_switches(setting) == pytest.approx(
        sum(switch_rate(k, config=setting) for k in range(1, 1000))
    )
    steady = config(switchlora={"r": 8, "interval": 40, "decay": None}, train={"steps": 1000})
    assert {switch_rate(k, config=steady) for k in (0, 500, 999)} == {8 / 40}
    assert expected_switches(steady) == pytest.approx(999 * 8 / 40)


@pytest.mark.parametrize("decay", [None, 0.3, 1000.0])
def test_as_many_are_switched_as_the_frequency_says(config, decay):
    """Over 14 adapters and 600 steps, to three deviations."""
    setting = config(
        switchlora={"r": 8, "interval": 21, "decay": decay, "freeze_steps": 0},
        train={"steps": 600},
    )
    method = build_method(setting)
    adapter = type("Adapter", (), {"rank": 8, "pool_A": range(8)})()
    counts = [
        method._count(step, name, adapter)
        for step in range(1, 600)
        for name in setting.switchlora.targets(setting)
    ]
    expected = 14 * expected_switches(setting)
    assert abs(sum(counts) - expected) < 3 * math.sqrt(expected)


def test_a_run_too_short_to_switch_is_noted(nano):
    (line,) = notices(nano(method="switchlora", switchlora={"r": 4}))
    assert "method=switchlora does nearly what method=lora does: of an adapter's 4 vectors" in line
    assert "switchlora.decay=0.1" in line
    (line,) = notices(nano(method="switchlora", train={"steps": 1000}))  # r = 16
    assert line.startswith("4 of 14 adapters switch nothing: with switchlora.r=16 their B·A has")
    assert notices(nano(method="switchlora", switchlora={"interval": None})) == []
    assert notices(nano(method="switchlora", switchlora={"r": 4}, train={"steps": 1000})) == []


# a run -------------------------------------------------------------------------------------------
@pytest.fixture
def whole_run(config):
    """Switches at most steps; checkpoints at 3, 6, 9 and 12."""

    def make(**changes):
        changes["train"] = {"steps": 12, **changes.get("train", {})}
        changes.setdefault("checkpoint", {"every_steps": 3})
        return config(model={"vocab_size": VOCAB_SIZE}, **changes)

    return make


@pytest.mark.parametrize("order", ["sequential", "random"])
@pytest.mark.parametrize("die_at", [("train", 5), ("checkpoint", 6), ("train", 10)])
def test_a_killed_and_resumed_run_equals_an_undisturbed_one(
    whole_run, undisturbed, tmp_path, order, die_at
):
    """Bit for bit: losses, weights, pools, moments, step counts and what is left of freezes."""
    often = {"interval": 4, "freeze_steps": 2}  # so that frozen vectors hold switches up
    setting = whole_run(
        switchlora={"order": order, **often}, train={"micro_batch_size": 2, "grad_clip": 0.5}
    )
    assert resumes_exactly(setting, tmp_path, die_at=die_at, undisturbed=undisturbed)
    assert any(name.endswith("pool_B") for name in weights(tmp_path))
    ends = [
        checkpoint.read_progress(checkpoint.complete(folder / "checkpoints")[-1]).method
        for folder in (undisturbed(setting)[1], tmp_path)
    ]
    assert ends[0] == ends[1]
    assert sum(ends[0]["switched"].values()) > 14


def test_a_run_learns_and_a_diverging_one_says_so(whole_run, tmp_path):
    losses = run(whole_run(switchlora={"alpha": 6.0}), tmp_path / "learns").metrics()
    assert losses[12, "train/loss"] < losses[1, "train/loss"] - 0.1
    wild = whole_run(train={"lr": 1e30, "steps": 8})
    assert run(wild, tmp_path / "wild").events[-1].kind == "diverged"


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 4])
def test_several_processes_equal_one(whole_run, tmp_path, world):
    setting = whole_run(train={"micro_batch_size": 1, "lr": 1e-3})
    assert_processes_equal_one(setting, tmp_path, processes=world, atol=2e-4)


def test_an_export_is_the_effective_weight(config, tmp_path):
    setting = config()
    model, method, optimizer = build(setting)
    advance(model, method, optimizer, steps=8)
    progress = checkpoint.Progress(step=8, method=method.state_dict())
    with checkpoint.Writer(tmp_path, keep_last=1) as writer:
        writer.save(model=model, optimizer=optimizer, progress=progress, rng=[])
    (path,) = checkpoint.complete(tmp_path)
    plain = Decoder(setting.model)
    plain.load_state_dict(export.merged_state(setting, checkpoint=path))
    ids, _ = batch(7)
    torch.testing.assert_close(plain.logits(ids), model.logits(ids), atol=5e-6, rtol=0)


# what planning says ------------------------------------------------------------------------------
@pytest.mark.parametrize("knobs", [{}, {"interval": None}, {"target_modules": ["w_2", "k_proj"]}])
def test_costs_are_those_of_the_model(config, knobs):
    setting = config(switchlora=knobs)
    model, method, optimizer = build(setting)
    advance(model, method, optimizer, steps=20)
    counted = costs.parameters(setting)
    assert counted.total == sum(p.numel() for p in model.parameters())
    assert counted.trainable == sum(p.numel() for p in model.parameters() if p.requires_grad)
    sizes = {n: t.numel() for n, t in model.state_dict().items() if "pool" in n}
    pools = sum(sizes.values())
    if "interval" in knobs:
        assert pools == 0
    memory = costs.memory_bytes(setting)
    assert memory["weights"] == 4 * (counted.total + pools)
    states = [
        {n: t for n, t in state.items() if n != "step" or t.ndim}
        for state in optimizer.state.values()
    ]
    assert memory["moments"] == 4 * sum(t.numel() for s in states for t in s.values())
    full = nano_config(method="full_rank")
    assert memory["moments"] < costs.memory_bytes(full)["moments"]


def test_flops_are_those_of_lora_of_the_same_rank(config, nano):
    lora = nano(method="lora", relora={"r": 6})
    assert costs.flops_per_token(config()) == costs.flops_per_token(lora)


def test_names_say_what_was_chosen(config):
    assert run_id(config()).startswith("nano-switchlora-r6-i7-dNone-f3-grammar-s0-")


KNOBS = {"r": 3, "alpha": 2.0, "interval": 50, "decay": 0.2, "freeze_steps": 4}


def test_its_knobs_name_its_runs_and_no_others(nano):
    changes = [{key: value} for key, value in KNOBS.items()]
    changes += [{"order": "random"}, {"target_modules": ["w_2"]}]
    for change in changes:
        for method in ("full_rank", "lora", "relora", "galore"):
            assert run_id(nano(method=method)) == run_id(nano(method=method, switchlora=change))
        assert run_id(nano(method="switchlora")) != run_id(
            nano(method="switchlora", switchlora=change)
        )
    assert run_id(nano(method="switchlora")) == run_id(nano(method="switchlora", relora={"r": 3}))


def test_without_switches_their_knobs_say_nothing(nano):
    never = {"interval": None}
    same = {**never, "decay": 0.7, "freeze_steps": 9, "order": "random"}
    one, two = (nano(method="switchlora", switchlora=knobs) for knobs in (never, same))
    assert essential(one) == essential(two)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"r": 17}, r"switchlora.r must be in \[2, 16\] .*k_proj, 16 x 32.* got 17; .* valid: 16"),
        (
            {"r": 16, "target_modules": ["k_proj", "v_proj"]},
            r"switchlora.r must be <= 15 \(each of \['k_proj', 'v_proj'\] has 16 .* valid: 15",
        ),
        ({"r": 1}, "switchlora.r must be >= 2, got 1; nearest valid: 2"),
        ({"alpha": 0.0}, "switchlora.alpha must be > 0, got 0.0"),
        ({"interval": 9}, r"interval must be >= 2 \* switchlora.freeze_steps = 10 .* got 9; .* 10"),
        ({"interval": 0}, "switchlora.interval must be >= 1, got 0"),
        ({"decay": 0.0}, "switchlora.decay must be > 0 and <= 1000, got 0.0"),
        ({"freeze_steps": -1}, "switchlora.freeze_steps must be >= 0, got -1"),
        ({"order": "randm"}, "switchlora.order must be one of .* Did you mean 'random'"),
        ({"target_modules": []}, "switchlora.target_modules must name at least one of attention"),
        ({"target_modules": ["swiglo"]}, "got 'swiglo'. Did you mean 'swiglu'"),
    ],
)
def test_bad_knobs_are_one_line(nano, change, words):
    with pytest.raises(ConfigError, match=words) as caught:
        validate(nano(method="switchlora", switchlora={"r": 4, **change}))
    assert "\n" not in str(caught.value)
    if "k_proj" in words:  # other targets have more vectors, and it is this method's rule alone
        validate(nano(method="switchlora", switchlora={**change, "target_modules": ["q_proj"]}))
        validate(nano(method="full_rank", switchlora=change))
    if "15" in words:
        validate(nano(method="switchlora", switchlora={**change, "interval": None}))


def test_muon_is_refused_in_one_line(nano):
    with pytest.raises(ConfigError, match=r"optimizer must be adamw with method=switchlora .*muon"):
        validate(nano(method="switchlora", train={"optimizer": "muon"}))


def test_a_target_without_a_vector_to_spare_switches_none(config):
    """B A has full rank there, so nothing is lost: k_proj and v_proj are 16 x 32."""
    model, method, optimizer = build(config(switchlora={"r": 16}))
    advance(model, method, optimizer, steps=6)
    switched = {
        n.rpartition(".")[2] for n, count in method.state_dict()["switched"].items() if count
    }
    assert switched == {"q_proj", "o_proj", "w_0", "w_1", "w_2"}
