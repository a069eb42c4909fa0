"""The published procedures and each knob that leads from one to another (conf/relora)."""

import dataclasses
import math
from statistics import median

import pytest
import torch
from torch.optim import AdamW
from training import batch, build

from experiments import schema
from relora_core.config import METHODS, ConfigError, ReLoRAConfig, validate
from relora_core.methods import build_method
from relora_core.methods.adapter import ReLoRALinear
from relora_core.model import Decoder
from relora_core.optim import build_adamw, prune_state_, set_lr_
from relora_core.schedule import is_full_rank, lr_factor, restart_steps

MODES = ("corrected", "as_described", "as_coded", "as_executed")
SMALL = {"r": 4, "alpha": 8.0, "dropout": 0.0, "reset_frequency": 4, "restart_warmup_steps": 1}


def mode_knobs(mode):
    return dataclasses.asdict(schema.compose([f"relora={mode}", "relora.r=4"]).relora)


@pytest.fixture
def trained(nano):
    """A run of `mode` after `steps` updates, by hand: model, method, optimizer."""

    def make(steps, *, mode="corrected", **changes):
        knobs = {**mode_knobs(mode), **SMALL, **changes.pop("relora", {})}
        config = nano(relora=knobs, **changes)
        torch.manual_seed(config.seed)
        model = Decoder(config.model)
        method = build_method(config)
        method.adapt(model)
        optimizer = build_adamw(method.param_groups(model), train=config.train)
        method.set_phase(0, model)
        history = []
        for step in range(steps):
            history.append(one_step(step, model, method, optimizer))
        return model.eval(), method, optimizer, history

    return make


def one_step(step, model, method, optimizer):
    set_lr_(optimizer, method.config.train.lr * method.lr_multiplier(step))
    model.train()
    method.before_pass(step, first=0, stride=1)
    model(*batch(step)).backward()
    method.before_update(step, model)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    metrics = method.after_step(step + 1, model, optimizer)
    method.set_phase(step + 1, model)
    return metrics


def adapters(method, model):
    return dict(method.adapters(model))


def test_the_modes_are_the_table():
    rows = {mode: mode_knobs(mode) for mode in MODES}
    keys = ("init_a", "merge", "after_merge", "base_dtype", "prune_ratio", "joint_mask")
    table = {mode: tuple(rows[mode][k] for k in keys) for mode in MODES}
    assert table == {
        "corrected": ("kaiming", "scaled", "reinit", "float32", 0.99, True),
        "as_described": ("kaiming", "scaled", "reinit", "float32", 0.99, False),
        "as_coded": ("zero", "unscaled", "reinit", "float32", 0.999, False),
        "as_executed": ("zero", "unscaled", "restore", "bfloat16", 0.999, False),
    }
    assert [rows[m]["reset_adam_step"] for m in MODES] == [True, False, False, False]
    assert [rows[m]["restart_offset"] for m in MODES] == [0, 0, 1, 1]
    horizons = [schema.compose([f"relora={m}"]).schedule.total_steps for m in MODES]
    assert horizons == [None, None, 200_000, 200_000]


@pytest.mark.parametrize("mode", ["as_coded", "as_executed"])
def test_published_adapters_are_inert_in_the_first_cycle(trained, mode):
    """A = B = 0: both gradients are exactly 0 until the first restart draws an A."""
    model, method, _, history = trained(4, mode=mode)
    assert history == [{}] * 4
    for adapter in adapters(method, model).values():
        assert not adapter.lora_A.any()
        assert not adapter.lora_B.any()


@pytest.mark.parametrize("mode", MODES)
def test_first_restart_comes_where_the_mode_says(trained, mode):
    _, _, _, history = trained(9, mode=mode)
    restarts = [step + 1 for step, metrics in enumerate(history) if "restart/count" in metrics]
    assert restarts == ([4, 8] if mode in ("corrected", "as_described") else [5, 9])


@pytest.mark.parametrize(("mode", "coefficient"), [("corrected", 2.0), ("as_coded", 1.0)])
def test_the_merge_coefficient(trained, mode, coefficient):
    """Published: 1 where s is 2."""
    model, method, optimizer, _ = trained(7, mode=mode)
    before = {n: (m.weight.clone(), m.lora_B @ m.lora_A) for n, m in method.adapters(model)}
    step = 8 if mode == "corrected" else 9
    method.after_step(step, model, optimizer)
    for name, adapter in method.adapters(model):
        weight, product = before[name]
        assert product.norm() > 0
        torch.testing.assert_close(
            adapter.weight - weight, coefficient * product, atol=1e-6, rtol=1e-4
        )


@pytest.mark.parametrize("mode", ["corrected", "as_described"])
def test_the_described_merge_changes_no_logit(trained, mode):
    model, method, optimizer, _ = trained(7, mode=mode)
    ids, _ = batch(99)
    logits = model.logits(ids)
    method.after_step(8, model, optimizer)
    torch.testing.assert_close(model.logits(ids), logits, atol=2e-5, rtol=0)


def test_as_executed_the_old_adapters_come_back_on_top_of_the_merge(trained):
    """One update after a restart, A is near its old value and the effective weight has BA more."""
    slow = {"reset_frequency": 20, "restart_warmup_steps": 10}
    model, method, optimizer, _ = trained(40, mode="as_executed", relora=slow, train={"steps": 60})
    old = {n: (m.lora_A.clone(), m.lora_B.clone()) for n, m in method.adapters(model)}
    effective = dict(method.effective_weights(model))
    metrics = one_step(40, model, method, optimizer)
    assert metrics["restart/count"] == 2
    one_step(41, model, method, optimizer)
    weights = dict(method.effective_weights(model))
    drift, jump = [], []
    for name, adapter in method.adapters(model):
        a, b = old[name]
        drift.append(((adapter.lora_A - a).norm() / a.norm()).item())
        product, change = b @ a, weights[name] - effective[name]
        jump.append(((change * product).sum() / product.square().sum()).item())
    # Medians: A's gradient is exactly 0 in that one pass, so an entry whose first moment was kept
    # and whose second was zeroed moves by m / eps; a few adapters have such an entry.
    assert median(drift) < 1e-3  # redrawn matrices would be at a distance above 1
    assert median(jump) == pytest.approx(1.0, abs=0.05)


def test_the_masters_put_a_trained_scale_back_too(trained):
    """tanh(1) = 0.76 counts for one pass, then the s that was trained comes back."""
    settings = {"scaling": "trainable", "reset_frequency": 20, "restart_warmup_steps": 10}
    model, method, optimizer, _ = trained(
        40, mode="as_executed", relora=settings, train={"steps": 60}
    )
    before = {n: m.scalar.item() for n, m in method.adapters(model)}
    assert any(abs(s - 1) > 0.01 for s in before.values())
    one_step(40, model, method, optimizer)
    assert all(m.scalar.item() == 1.0 for _, m in method.adapters(model))
    one_step(41, model, method, optimizer)
    for name, adapter in method.adapters(model):
        assert adapter.scalar.item() == pytest.approx(before[name], abs=0.005)


def test_a_checkpoint_from_before_the_scale_was_remembered_still_loads():
    relora = ReLoRAConfig(r=2, scaling="trainable", after_merge="restore")
    old, new = (ReLoRALinear(torch.nn.Linear(5, 3, bias=False), relora) for _ in range(2))
    for adapter in (old, new):
        adapter.draw_(torch.Generator().manual_seed(0))
    with torch.no_grad():
        old.scalar.fill_(0.7)
    state = {k: v for k, v in old.state_dict().items() if k != "master_scalar"}
    new.load_state_dict(state)
    assert new.scalar.item() == pytest.approx(0.7)
    new.restore_masters_()
    assert new.scalar.item() == pytest.approx(0.7)  # as that version went on


def test_a_bfloat16_base_holds_bfloat16_values(trained):
    model, method, _, _ = trained(10, mode="as_executed")
    for _, adapter in method.adapters(model):
        assert torch.equal(adapter.weight, adapter.weight.bfloat16().float())


# pruning ----------------------------------------------------------------------------------------
def state_after(policy, **options):
    parameter = torch.nn.Parameter(torch.zeros(8))
    optimizer = AdamW([parameter])
    moments = torch.tensor([1.0, -8, 2, -7, 3, -6, 4, -5])
    state = {"step": torch.tensor(5.0), "exp_avg": moments, "exp_avg_sq": moments.flip(0).square()}
    optimizer.state[parameter] = {k: v.clone() for k, v in state.items()}
    share = prune_state_(
        optimizer,
        {"p": parameter},
        policy=policy,
        generator=lambda name: torch.Generator().manual_seed(0),
        **{"ratio": 0.5, **options},
    )
    return optimizer.state[parameter], share


def test_magnitude_keeps_the_largest_of_each_moment_or_of_the_first():
    joint, share = state_after("magnitude")
    assert share == 0.5
    assert joint["exp_avg"].tolist() == [0, -8, 0, -7, 0, -6, 0, -5]
    assert joint["exp_avg_sq"].tolist() == [0, 16, 0, 9, 0, 4, 0, 1]
    separate, _ = state_after("magnitude", joint_mask=False)
    assert separate["exp_avg_sq"].tolist() == [25, 0, 36, 0, 49, 0, 64, 0]


def test_magnitude_counts_what_it_keeps_even_in_a_constant_tensor():
    parameter = torch.nn.Parameter(torch.zeros(10))
    optimizer = AdamW([parameter])
    ones = {"step": torch.tensor(1.0), "exp_avg": torch.ones(10), "exp_avg_sq": torch.ones(10)}
    optimizer.state[parameter] = ones
    prune_state_(
        optimizer,
        {"p": parameter},
        policy="magnitude",
        ratio=0.7,
        generator=lambda name: torch.Generator(),
    )
    assert optimizer.state[parameter]["exp_avg"].sum() == 3


def test_zero_keep_and_the_step_counter():
    assert state_after("zero")[1] == 1.0
    state, share = state_after("keep", reset_step=False)
    assert share == 0.0
    assert state["step"] == 5


@pytest.mark.parametrize(
    ("policy", "ratio"), [("keep", 1.0), ("random", 0.0), ("magnitude", 0.0), ("magnitude", 0.05)]
)
def test_where_nothing_is_pruned_the_step_counter_stays(policy, ratio):
    """Else a kept first moment counts ten times and a second one a thousand times what it is."""
    state, share = state_after(policy, ratio=ratio, reset_step=True)
    assert share == 0.0
    assert state["step"] == 5


@pytest.mark.parametrize("reset", [True, False])
def test_keep_restarts_under_a_constant_gradient_move_on_by_one_learning_rate(trained, reset):
    """Adam's step reset under kept moments: 0.32, 0.24, 0.20, ... learning rates instead."""
    settings = {"optimizer_state": "keep", "reset_adam_step": reset, "reset_frequency": 40}
    model, method, _, _ = trained(0, relora=settings, train={"steps": 60, "weight_decay": 0.0})
    _, adapter = next(iter(method.adapters(model)))
    optimizer = AdamW(method.param_groups(model), lr=1e-3, weight_decay=0.0, eps=1e-12)
    moved = []
    for step in range(50):
        before = adapter.lora_A.detach().clone()
        adapter.lora_A.grad = torch.ones_like(adapter.lora_A)
        optimizer.step()
        moved.append(((before - adapter.lora_A) / 1e-3).mean().item())
        if step + 1 == 40:
            state = {k: v.clone() for k, v in optimizer.state[adapter.lora_A].items()}
            assert method.after_step(40, model, optimizer)["restart/state_zeroed"] == 0
            assert all(torch.equal(optimizer.state[adapter.lora_A][k], v) for k, v in state.items())
    assert moved == pytest.approx([1.0] * 50, abs=1e-3)


def test_moments_that_go_with_a_changed_rank_count_as_zeroed(trained):
    settings = {"optimizer_state": "keep", "rank_schedule": [[8, 2]]}
    model, method, optimizer, _ = trained(7, relora=settings)
    assert method.after_step(8, model, optimizer)["restart/state_zeroed"] == 1.0


def test_random_masks_are_one_or_two():
    joint, _ = state_after("random")
    assert torch.equal(joint["exp_avg"] == 0, joint["exp_avg_sq"] == 0)
    separate, _ = state_after("random", joint_mask=False)
    assert not torch.equal(separate["exp_avg"] == 0, separate["exp_avg_sq"] == 0)


@pytest.mark.parametrize(
    ("reset_step", "expected"),
    [
        # Published, and every peer: moments zeroed at step 2000, the counter kept.
        (False, {1: 2.9, 2: 4.0, 10: 6.1, 30: 5.2, 100: 3.0, 200: 2.2}),
        # Ours: bias correction starts anew, so a constant gradient moves by one learning rate.
        (True, {1: 1.0, 2: 1.0, 10: 1.0, 30: 1.0, 100: 1.0, 200: 1.0}),
    ],
)
def test_why_the_step_counter_is_reset(reset_step, expected):
    """Size of torch's Adam updates in learning rates after a reset, under a constant gradient."""
    parameter = torch.nn.Parameter(torch.zeros((), dtype=torch.float64))
    optimizer = torch.optim.Adam([parameter], lr=1.0, eps=1e-12)
    moved = []
    for k in range(2200):
        if k == 2000:
            prune_state_(
                optimizer,
                {"p": parameter},
                policy="zero",
                ratio=1.0,
                reset_step=reset_step,
                generator=lambda name: torch.Generator(),
            )
        before = parameter.item()
        parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        moved.append(before - parameter.item())
    measured = {k: moved[2000 + k - 1] for k in expected}
    assert measured == pytest.approx(expected, abs=0.06)


# extensions -------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("scaling", "scale"), [("standard", 2.0), ("rslora", 4.0), ("trainable", math.tanh(1.0))]
)
def test_scalings(scaling, scale):
    linear = torch.nn.Linear(6, 5, bias=False)
    adapter = ReLoRALinear(linear, ReLoRAConfig(r=4, alpha=8.0, scaling=scaling))
    adapter.draw_(torch.Generator().manual_seed(0))
    torch.nn.init.normal_(adapter.lora_B, generator=torch.Generator().manual_seed(1))
    assert float(torch.as_tensor(adapter.scale).detach()) == pytest.approx(scale)
    x = torch.randn(3, 6, generator=torch.Generator().manual_seed(2))
    want = x @ (adapter.weight + scale * adapter.lora_B @ adapter.lora_A).T
    torch.testing.assert_close(adapter(x), want, atol=1e-5, rtol=1e-5)


def test_a_trained_scale_learns_and_a_restart_sets_it_back(trained):
    model, method, optimizer, _ = trained(7, relora={"scaling": "trainable"})
    assert any(m.scalar.item() != 1.0 for _, m in method.adapters(model))
    ids, _ = batch(50)
    logits = model.logits(ids)
    method.after_step(8, model, optimizer)
    torch.testing.assert_close(model.logits(ids), logits, atol=2e-5, rtol=0)
    assert all(m.scalar.item() == 1.0 for _, m in method.adapters(model))


def test_lora_plus_gives_b_a_rate_of_its_own(trained):
    model, method, optimizer, _ = trained(0, relora={"lr_ratio_b": 16.0})
    ours = {id(m.lora_B) for _, m in method.adapters(model)}
    groups = [
        (g.get("lr_ratio", 1.0), {id(p) for p in g["params"]}) for g in optimizer.param_groups
    ]
    assert groups[1] == (16.0, ours)
    assert not groups[0][1] & ours


@pytest.mark.parametrize(
    ("keep", "adapted"), [(["w_2", "q_proj"], 10), (["last:1"], 7), (["layers.0"], 7)]
)
def test_full_rank_modules_carry_no_adapter(trained, keep, adapted):
    model, method, _, _ = trained(0, relora={"full_rank_modules": keep})
    assert len(adapters(method, model)) == adapted
    names = dict(method.effective_weights(model))
    assert len(names) == 14


def test_warm_start_trains_the_base_and_then_freezes_it(trained):
    settings = {"warm_start_steps": 3}
    start, _, _, _ = trained(0, relora=settings)
    warm, method, optimizer, history = trained(3, relora=settings)
    assert history[2] == {"phase/full_rank": 0.0}
    for name, adapter in method.adapters(warm):
        assert not torch.equal(adapter.weight, adapters(method, start)[name].weight)
        assert not adapter.lora_B.any()
        assert adapter.weight not in optimizer.state
    frozen = {n: m.weight.clone() for n, m in method.adapters(warm)}
    one_step(3, warm, method, optimizer)
    for name, adapter in method.adapters(warm):
        if 4 not in restart_steps(method.config):
            assert torch.equal(adapter.weight, frozen[name])
        assert adapter.lora_B in optimizer.state or not adapter.lora_B.any()


def test_a_bfloat16_base_is_rounded_when_a_full_rank_phase_freezes_it(trained):
    settings = {"warm_start_steps": 3, "base_dtype": "bfloat16", "reset_frequency": 100}
    model, method, optimizer, _ = trained(2, relora=settings)
    rounded = [
        torch.equal(m.weight, m.weight.bfloat16().float()) for _, m in method.adapters(model)
    ]
    assert not any(rounded)  # trained in float32
    one_step(2, model, method, optimizer)
    for _, adapter in method.adapters(model):
        assert torch.equal(adapter.weight, adapter.weight.bfloat16().float())


def test_warm_start_equals_full_rank_training_while_it_lasts(nano, trained):
    warm, method, _, _ = trained(3, relora={"warm_start_steps": 5})
    full, plain, _, _ = trained(3, method="full_rank")
    ours, theirs = dict(method.effective_weights(warm)), dict(plain.effective_weights(full))
    for name, weight in theirs.items():
        torch.testing.assert_close(ours[name], weight, atol=1e-6, rtol=0)


def test_a_duty_cycle_changes_phase_without_changing_the_function(trained):
    settings = {"full_rank_steps": 2, "low_rank_steps": 3, "reset_frequency": 100}
    model, method, optimizer, _ = trained(4, relora=settings)
    phases = [is_full_rank(k, config=method.config) for k in range(7)]
    assert phases == [True, True, False, False, False, True, True]
    model.train()
    model(*batch(4)).backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    model.eval()
    ids, _ = batch(60)
    logits = model.logits(ids)
    assert method.after_step(5, model, optimizer) == {"phase/full_rank": 1.0}
    torch.testing.assert_close(model.logits(ids), logits, atol=2e-5, rtol=0)
    assert method.set_phase(5, model)
    assert all(m.weight.requires_grad for _, m in method.adapters(model))
    assert not any(m.lora_A.requires_grad for _, m in method.adapters(model))


def test_partial_restarts_take_turns(trained):
    model, method, optimizer, _ = trained(3, relora={"restart_groups": 2})
    for step, turn in ((4, 0), (8, 1)):
        before = {n: m.weight.clone() for n, m in method.adapters(model)}
        for k in range(step - (1 if step == 4 else 4), step):
            one_step(k, model, method, optimizer)
        changed = [not torch.equal(m.weight, before[n]) for n, m in method.adapters(model)]
        assert changed == [index % 2 == turn for index in range(14)]


def test_first_restart_moves_the_schedule_along(nano):
    config = nano(relora={"first_restart": 8}, train={"steps": 20})
    assert restart_steps(config) == [8, 12, 16]
    assert lr_factor(4, config=config) > 0
    assert lr_factor(8, config=config) == 0


def test_a_rank_schedule_changes_shapes_at_restarts_and_not_the_function(trained):
    settings = {"rank_schedule": [[5, 2], [8, 6]]}
    model, method, optimizer, _ = trained(7, relora=settings)
    assert {m.rank for _, m in method.adapters(model)} == {4}  # step 4 comes before the schedule
    ids, _ = batch(70)
    logits = model.logits(ids)
    metrics = method.after_step(8, model, optimizer)
    assert {m.lora_A.shape[0] for _, m in method.adapters(model)} == {6}
    assert metrics["restart/rank_mean"] == 6
    torch.testing.assert_close(model.logits(ids), logits, atol=2e-5, rtol=0)
    assert method.set_phase(8, model)  # DDP must look at the parameters anew
    assert not method.set_phase(9, model)
    one_step(8, model, method, optimizer)
    one_step(9, model, method, optimizer)
    for _, adapter in method.adapters(model):
        assert optimizer.state[adapter.lora_B]["exp_avg"].shape == adapter.lora_B.shape


def set_singular_values_(adapter, values):
    with torch.no_grad():
        size = len(values)
        adapter.lora_A.copy_(torch.eye(size, adapter.lora_A.shape[1]))
        adapter.lora_B.copy_(torch.eye(adapter.lora_B.shape[0], size) * torch.tensor(values))


@pytest.mark.parametrize(("share", "rank"), [(0.5, 1), (0.9, 2), (0.99, 3), (1.0, 4)])
def test_adaptive_rank_keeps_the_energy(trained, share, rank):
    """Singular values 4, 3, 1, 0.5 hold 16, 25, 26 and 26.25 of 26.25 in squares."""
    settings = {"adaptive_rank_energy": share}
    model, method, optimizer, _ = trained(1, relora=settings)
    for _, adapter in method.adapters(model):
        set_singular_values_(adapter, [4.0, 3.0, 1.0, 0.5])
    method.after_step(4, model, optimizer)
    assert {m.rank for _, m in method.adapters(model)} == {rank}


def test_an_adapter_that_has_learnt_nothing_keeps_its_rank(trained):
    """BA = 0 holds any share of its energy in one rank, and would never rise again."""
    model, method, optimizer, _ = trained(0, relora={"adaptive_rank_energy": 0.9})
    (_, first), (_, second), *rest = method.adapters(model)
    set_singular_values_(first, [4.0, 3.0, 1.0, 0.5])
    set_singular_values_(second, [math.nan, 1.0, 1.0, 1.0])
    metrics = method.after_step(4, model, optimizer)
    assert first.rank == 2
    assert {second.rank, *(m.rank for _, m in rest)} == {4}
    assert metrics["restart/rank_mean"] == pytest.approx(4 - 2 / 14)


def test_adaptive_ranks_begin_anew_where_the_schedule_rises(trained):
    settings = {"adaptive_rank_energy": 0.9, "rank_schedule": [[8, 6], [16, 2]]}
    model, method, optimizer, _ = trained(0, relora=settings, train={"steps": 24})
    ranks = []
    for step in (4, 8, 12, 16, 20):
        for _, adapter in method.adapters(model):
            set_singular_values_(adapter, [4.0, 3.0, 1.0, 0.5, 0.1, 0.1][: adapter.rank])
        method.after_step(step, model, optimizer)
        ranks.append({m.rank for _, m in method.adapters(model)})
    assert ranks == [{2}, {6}, {2}, {2}, {2}]  # 16 of 26.27 is 0.61, 25 is 0.95


@pytest.mark.parametrize(("scaling", "scale"), [("standard", 8 / 2), ("rslora", 8 / 2**0.5)])
def test_the_scale_follows_the_adapters_own_rank(trained, scaling, scale):
    """s = alpha / r (alpha = 8, r from 4 to 2), and the merge still leaves the function alone."""
    model, method, optimizer, _ = trained(7, relora={"rank_schedule": [[8, 2]], "scaling": scaling})
    ids, _ = batch(71)
    logits = model.logits(ids)
    method.after_step(8, model, optimizer)
    torch.testing.assert_close(model.logits(ids), logits, atol=2e-5, rtol=0)
    assert {m.scale for _, m in method.adapters(model)} == {scale}


def test_adaptive_ranks_are_those_of_the_first_process(trained, monkeypatch):
    sent = []

    def from_another(tensor, src):
        sent.append((tensor.tolist(), src))
        tensor.fill_(3)

    monkeypatch.setattr("torch.distributed.is_initialized", lambda: True)
    monkeypatch.setattr("torch.distributed.broadcast", from_another)
    model, method, optimizer, _ = trained(0, relora={"adaptive_rank_energy": 0.9})
    for _, adapter in method.adapters(model):
        set_singular_values_(adapter, [4.0, 3.0, 1.0, 0.5])
    method.after_step(4, model, optimizer)
    assert sent == [([2] * 14, 0)]
    assert {m.rank for _, m in method.adapters(model)} == {3}


def test_nested_ranks_train_the_leading_ones_most_and_score_with_all(trained):
    model, method, _, _ = trained(8, relora={"nested_rank": True, "reset_frequency": 100})
    norms = [m.lora_B.detach().norm(dim=0) for _, m in method.adapters(model)]
    mean = torch.stack(norms).mean(dim=0)
    assert mean[0] > mean[-1]
    ids, _ = batch(80)
    assert torch.equal(model.logits(ids), model.logits(ids))  # nothing is drawn in eval mode


def test_nested_ranks_are_drawn_for_each_layer_and_step_evenly(trained):
    model, method, _, _ = trained(0, relora={"nested_rank": True})
    draws = []
    for step in range(100):
        method.before_pass(step, first=0, stride=1)
        draws += [m._seed("nested") % m.rank for _, m in method.adapters(model)]
    counts = torch.tensor(draws).bincount(minlength=4) / len(draws)
    assert counts.tolist() == pytest.approx([0.25] * 4, abs=0.05)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"rank_schedule": [[4, 99]]}, "must hold ranks in [1, 16]"),
        ({"rank_schedule": [[4, 2], [4, 3]]}, "with rising steps, got [[4, 2], [4, 3]]"),
        (
            {"rank_schedule": [[4, 2]], "after_merge": "restore"},
            "must be reinit where ranks change",
        ),
        ({"adaptive_rank_energy": 1.5}, "relora.adaptive_rank_energy must be > 0 and <= 1"),
        ({"merge": "scale"}, "relora.merge must be one of scaled, unscaled, got 'scale'"),
        ({"restart_offset": 2}, "relora.restart_offset must be one of 0, 1, got 2"),
        ({"full_rank_steps": 3}, "must both be 0 or both be > 0, got 3 and 0"),
        ({"warm_start_steps": 12}, "relora.warm_start_steps must be < train.steps=12, got 12"),
        ({"restart_groups": 15}, "relora.restart_groups must be <= 14"),
        ({"full_rank_modules": ["w_9"]}, "Did you mean 'w_"),
        ({"full_rank_modules": ["layers"]}, "must leave a target"),
        ({"lr_ratio_b": 0.0}, "relora.lr_ratio_b must be > 0"),
        ({"optimizer_state": "prune"}, "relora.optimizer_state must be one of random, magnitude"),
    ],
)
def test_bad_knobs_are_one_line(nano, changes, words):
    with pytest.raises(ConfigError) as caught:
        validate(nano(relora=changes))
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_lora_without_an_a_is_refused_where_nothing_would_draw_one(nano):
    inert = {"init_a": "zero"}
    with pytest.raises(
        ConfigError, match=r"init_a must be kaiming .* got 'zero'; nearest valid: k"
    ):
        validate(nano(method="lora", relora=inert))
    for learns in ({"warm_start_steps": 2}, {"full_rank_steps": 1, "low_rank_steps": 2}, {"r": 0}):
        validate(nano(method="lora", relora={**inert, **learns}))
    validate(nano(relora=inert))  # as published


ELSEWHERE = {
    "r": 3, "alpha": 3.0, "scale": 1.0, "scaling": "rslora", "dropout": 0.3,
    "target_modules": ["w_2"],
    "full_rank_modules": ["w_2"], "lr_ratio_b": 3.0, "init_a": "zero", "warm_start_steps": 2,
    "full_rank_steps": 1, "low_rank_steps": 2, "reset_frequency": 3, "first_restart": 8,
    "restart_offset": 1, "rank_schedule": [[4, 2]], "adaptive_rank_energy": 0.5,
    "nested_rank": True, "restart_groups": 2, "restart_warmup_steps": 2, "merge": "unscaled",
    "after_merge": "restore", "base_dtype": "bfloat16", "optimizer_state": "keep",
    "prune_ratio": 0.5, "joint_mask": False, "reset_adam_step": False, "name": "other",
}  # fmt: skip


def after_steps(config, steps=5):
    model, method, optimizer = build(config)
    for step in range(steps):
        one_step(step, model, method, optimizer)
    return list(method.effective_weights(model))


@pytest.mark.parametrize("method", [name for name in METHODS if name != "relora"])
def test_a_knob_of_another_method_changes_no_bit(nano, method):
    """What stands outside a run's identity must not reach its numbers: all knobs at once."""
    foreign = {
        f.name: ELSEWHERE[f.name]
        for f in dataclasses.fields(ReLoRAConfig)
        if method not in f.metadata["methods"]
    }
    assert len(foreign) == (16 if method == "lora" else 28)
    one, two = after_steps(nano(method=method)), after_steps(nano(method=method, relora=foreign))
    for (name, weight), (_, other) in zip(one, two, strict=True):
        assert torch.equal(weight, other), name
