import pytest
import torch
from training import batch, build, one_step

from relora_core.config import ReLoRAConfig
from relora_core.methods.adapter import ReLoRALinear
from relora_core.model import Decoder
from relora_core.optim import prune_state_, set_lr_


def test_adapting_changes_no_logit_and_no_base_weight(nano):
    config = nano()
    torch.manual_seed(config.seed)
    plain = Decoder(config.model).eval()
    model, _, _ = build(config)
    ids, _ = batch()
    assert torch.equal(plain.logits(ids), model.eval().logits(ids))
    adapted = model.state_dict()
    for name, weight in plain.state_dict().items():
        assert torch.equal(weight, adapted[name])


def test_a_and_b_have_both_moved_after_two_steps(nano):
    """With A = B = 0, as published, neither ever gets a gradient."""
    model, method, optimizer = build(nano())
    before = {n: (m.lora_A.clone(), m.lora_B.clone()) for n, m in method.adapters(model)}
    for seed in range(2):
        one_step(model, optimizer, seed)
    for name, adapter in method.adapters(model):
        assert not torch.equal(adapter.lora_A, before[name][0])
        assert not torch.equal(adapter.lora_B, before[name][1])


def test_frozen_base_never_moves_between_restarts(nano):
    model, method, optimizer = build(nano())
    before = {n: m.weight.clone() for n, m in method.adapters(model)}
    for seed in range(3):
        one_step(model, optimizer, seed)
        assert method.after_step(seed + 1, model, optimizer) == {}
    assert all(torch.equal(m.weight, before[n]) for n, m in method.adapters(model))


def test_restart_keeps_the_function_and_renews_the_adapter(nano):
    config = nano(relora={"dropout": 0.3})
    model, method, optimizer = build(config)
    for seed in range(4):
        one_step(model, optimizer, seed)
    ids, _ = batch(9)
    model.eval()
    logits = model.logits(ids)
    effective = dict(method.effective_weights(model))
    metrics = method.after_step(4, model, optimizer)
    torch.testing.assert_close(model.logits(ids), logits, atol=2e-6, rtol=0)
    for name, weight in method.effective_weights(model):
        torch.testing.assert_close(weight, effective[name], atol=1e-7, rtol=0)
    for _, adapter in method.adapters(model):
        assert torch.equal(adapter.lora_B, torch.zeros_like(adapter.lora_B))
        assert 0 < adapter.lora_A.abs().max() <= adapter.lora_A.shape[1] ** -0.5
    assert metrics["restart/count"] == 1
    assert metrics["restart/merged_norm"] > 0


def test_merge_adds_s_times_b_a():
    linear = ReLoRALinear(torch.nn.Linear(5, 3, bias=False), ReLoRAConfig(r=2, alpha=5.0))
    generator = torch.Generator().manual_seed(0)
    linear.draw_(generator)
    with torch.no_grad():
        linear.lora_B.normal_(generator=generator)
    want = linear.weight.double() + 2.5 * linear.lora_B.double() @ linear.lora_A.double()
    norm = linear.merge_()
    torch.testing.assert_close(linear.weight.double(), want, atol=1e-6, rtol=0)
    product = 2.5 * linear.lora_B @ linear.lora_A
    assert norm.item() == pytest.approx(product.norm().item() ** 2, rel=1e-5)


def test_restart_prunes_adapter_state_only(nano):
    config = nano(relora={"optimizer_state": "random", "prune_ratio": 0.9})
    model, method, optimizer = build(config)
    for seed in range(4):
        one_step(model, optimizer, seed)
    adapters = {id(p) for _, m in method.adapters(model) for p in (m.lora_A, m.lora_B)}
    before = {p: {k: v.clone() for k, v in s.items()} for p, s in optimizer.state.items()}
    metrics = method.after_step(4, model, optimizer)
    nonzero = total = 0
    for parameter, state in optimizer.state.items():
        if id(parameter) in adapters:
            assert state["step"] == 0
            for moment in ("exp_avg", "exp_avg_sq"):
                alive = state[moment] != 0
                assert torch.equal(state[moment][alive], before[parameter][moment][alive])
            assert torch.equal(state["exp_avg"] == 0, state["exp_avg_sq"] == 0)  # one mask for both
            nonzero += int((state["exp_avg"] != 0).sum())
            total += state["exp_avg"].numel()
        else:
            assert all(torch.equal(state[k], v) for k, v in before[parameter].items())
    assert nonzero / total == pytest.approx(0.1, abs=0.03)
    assert metrics["restart/state_zeroed"] == pytest.approx(0.9, abs=0.03)


@pytest.mark.parametrize("ratio", [0.0, 1.0])
def test_pruning_all_and_nothing(nano, ratio):
    model, method, optimizer = build(nano())
    one_step(model, optimizer)
    _, adapter = next(iter(method.adapters(model)))
    before = optimizer.state[adapter.lora_B]["exp_avg"].clone()
    zeroed = prune_state_(
        optimizer,
        {"B": adapter.lora_B},
        policy="random",
        ratio=ratio,
        generator=lambda name: torch.Generator().manual_seed(1),
    )
    assert zeroed == ratio
    want = before if ratio == 0 else torch.zeros_like(before)
    assert torch.equal(optimizer.state[adapter.lora_B]["exp_avg"], want)


def test_pruning_before_the_first_update_is_nothing(nano):
    model, method, optimizer = build(nano())
    assert method.after_step(4, model, optimizer)["restart/state_zeroed"] == 0.0


def test_a_restart_is_a_function_of_seed_step_and_name_alone(nano):
    """So every rank, and every resumed run, draws the same matrices."""
    drawn = []
    for noise in (1, 2):
        model, method, optimizer = build(nano())
        torch.manual_seed(noise)
        torch.rand(noise)
        method.after_step(4, model, optimizer)
        drawn.append([m.lora_A.clone() for _, m in method.adapters(model)])
    assert all(torch.equal(a, b) for a, b in zip(*drawn, strict=True))
    assert not torch.equal(drawn[0][0], drawn[0][3])


def test_lora_never_restarts_and_full_rank_trains_everything(nano):
    model, method, optimizer = build(nano(method="lora"))
    assert method.after_step(4, model, optimizer) == {}
    model, method, _ = build(nano(method="full_rank"))
    assert all(p.requires_grad for p in model.parameters())
    names = {name for name, _ in method.effective_weights(model)}
    assert len(names) == 7 * 2


def test_adapters_and_only_they_are_where_the_targets_say(nano):
    model, method, _ = build(nano(relora={"target_modules": ["W_2", "attention.q"]}))
    assert {n.split(".", 2)[2] for n, _ in method.adapters(model)} == {
        "swiglu.w_2",
        "attention.q_proj",
    }
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert "layers.0.swiglu.w_0.weight" in trained
    assert "layers.0.swiglu.w_2.weight" not in trained


def test_group_learning_rates_scale_with_their_ratio():
    parameter = [torch.nn.Parameter(torch.zeros(1)) for _ in range(2)]
    optimizer = torch.optim.AdamW(
        [{"params": parameter[:1]}, {"params": parameter[1:], "lr_ratio": 16.0}]
    )
    set_lr_(optimizer, 0.5)
    assert [g["lr"] for g in optimizer.param_groups] == [0.5, 8.0]
