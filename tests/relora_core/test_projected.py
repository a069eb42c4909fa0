"""What must hold of every method with projected moments: limiter, sizes, resume, DDP."""

import pytest
import torch
from training import assert_processes_equal_one, build, one_step, resumes_exactly, run

from experiments.identity import run_id
from relora_core import costs
from relora_core.data.grammar import VOCAB_SIZE
from relora_core.methods.projected import limit_growth, norm_ratio

SETTINGS = {
    "galore": {"method": "galore", "galore": {"r": 4, "update_gap": 5, "scale": 1.0}},
    "galore reset": {"method": "galore", "galore": {"r": 4, "update_gap": 5, "moments": "reset"}},
    "fira": {"method": "fira", "fira": {"r": 4, "update_gap": 5}},
    "fira as coded": {"method": "fira", "fira": {"r": 4, "update_gap": 5, "residual": "code"}},
    "fira without limiter": {"method": "fira", "fira": {"r": 4, "norm_growth": None}},
    "apollo": {"method": "apollo", "apollo": {"r": 4, "update_gap": 5}},
    "apollo mini": {
        "method": "apollo",
        "apollo": {"r": 1, "update_gap": 5, "scaling": "tensor", "scale": 128.0},
    },
    "apollo without limiter": {"method": "apollo", "apollo": {"r": 4, "norm_growth": None}},
}


# the limiter --------------------------------------------------------------------------------------
def limited(sizes, *, most=1.01, direction=(0.6, 0.8)):
    """Norms that the limiter gives updates of these norms, one after the other."""
    state, unit = {}, torch.tensor(direction, dtype=torch.float64)
    return [limit_growth(size * unit, state, most=most).norm().item() for size in sizes]


def test_a_norm_grows_by_its_share_and_falls_at_will():
    assert limited([2.0, 2.01, 9.0, 9.0, 0.5, 0.6]) == pytest.approx(
        [2.0, 2.01, 2.01 * 1.01, 2.01 * 1.01**2, 0.5, 0.505], rel=1e-14
    )


def test_what_is_within_bounds_passes_as_it_is():
    state, update = {}, torch.randn(5, 7, generator=torch.Generator().manual_seed(0))
    for factor in (1.0, 1.005, 0.3):
        assert torch.equal(limit_growth(update * factor, state, most=1.01), update * factor)


def test_an_update_of_zero_is_no_bound_for_the_next():
    assert limited([0.0, 3.0, 0.0, 5.0, 8.0]) == pytest.approx([0, 3, 0, 5, 5.05], rel=1e-14)


def test_a_constant_factor_passes_through_the_limiter():
    """So it matters not whether a method's scale comes before it or after."""
    sizes = [1.0, 4.0, 0.1, 7.0, 7.0]
    assert [8 * size for size in limited(sizes)] == limited([8 * size for size in sizes])


def test_a_limited_update_keeps_its_direction():
    state, generator = {}, torch.Generator().manual_seed(0)
    first, second = torch.randn(2, 5, 7, generator=generator, dtype=torch.float64)
    limit_growth(first, state, most=1.01)
    given = limit_growth(50 * second, state, most=1.01)
    want = second * (1.01 * first.norm() / second.norm())
    torch.testing.assert_close(given, want, atol=1e-14, rtol=0)


def test_a_ratio_of_norms_is_zero_where_there_is_no_gradient():
    low = torch.tensor([[3.0, 0.0], [4.0, 0.0]])
    direction = torch.tensor([[1.0, 1.0], [0.0, 1.0]])
    assert norm_ratio(direction, low, dim=0).tolist() == [[pytest.approx(0.2), 0.0]]
    assert norm_ratio(direction, low, dim=None).item() == pytest.approx(3**0.5 / 5)
    assert norm_ratio(direction, 0 * low, dim=None).item() == 0.0


# in a run -----------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", SETTINGS)
def test_the_state_has_the_size_that_costs_says(nano, name):
    config = nano(**SETTINGS[name])
    model, _, optimizer = build(config)
    one_step(model, optimizer)
    size = sum(
        4 * tensor.numel()
        for state in optimizer.state.values()
        for key, tensor in state.items()
        if key != "step"
    )
    assert costs.memory_bytes(config)["moments"] == size
    full_rank = nano(method="full_rank")
    assert size < costs.memory_bytes(full_rank)["moments"]
    assert costs.parameters(config) == costs.parameters(full_rank)
    assert costs.flops_per_token(config) == costs.flops_per_token(full_rank)


@pytest.mark.parametrize("method", ["galore", "fira", "apollo"])
def test_other_parameters_move_as_under_full_rank_bit_for_bit(nano, method):
    targets = {method: {"r": 2, "target_modules": ["swiglu"]}}
    start, low, full = (
        build(nano(method=m, **targets)) for m in ("full_rank", method, "full_rank")
    )
    for model, _, optimizer in (low, full):
        one_step(model, optimizer)
    theirs, before = dict(full[0].named_parameters()), dict(start[0].named_parameters())
    for name, weight in low[0].named_parameters():
        assert torch.equal(weight, theirs[name]) == (".swiglu." not in name), name
        assert not torch.equal(weight, before[name]), name


KNOBS = {
    "galore": [{"scale": 1.0}, {"moments": "reset"}],
    "fira": [{"scale": 1.0}, {"residual": "code"}, {"norm_growth": None}],
    "apollo": [{"scale": 2.0}, {"scaling": "tensor"}, {"norm_growth": None}],
}


@pytest.mark.parametrize("method", KNOBS)
def test_its_knobs_name_its_runs_and_no_others(nano, method):
    own = run_id(nano(method=method))
    for change in [{"r": 3}, {"update_gap": 7}, {"target_modules": ["w_2"]}, *KNOBS[method]]:
        assert run_id(nano(method=method, **{method: change})) != own
        for other in {"full_rank", "lora", "relora", *KNOBS} - {method}:
            assert run_id(nano(method=other, **{method: change})) == run_id(nano(method=other))
    assert run_id(nano(method=method, **{method: {"r": 4}})).startswith(f"nano-{method}-r4-grammar")


@pytest.fixture
def config(nano):
    """Projectors at updates 1, 6 and 11; checkpoints at 3, 6, 9 and 12."""

    def make(name, **changes):
        setting = SETTINGS[name]
        model, policy = {"vocab_size": VOCAB_SIZE}, {"every_steps": 3}
        return nano(**setting, **changes, model=model, checkpoint=policy)

    return make


@pytest.mark.slow
@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("die_at", [("train", 5), ("train", 7), ("checkpoint", 9)])
def test_a_killed_and_resumed_run_equals_an_undisturbed_one(
    config, undisturbed, tmp_path, name, die_at
):
    """Bit for bit: losses, weights and the optimizer's state, before and after a new basis."""
    setting = config(name, train={"micro_batch_size": 2, "grad_clip": 0.5})
    assert resumes_exactly(setting, tmp_path, die_at=die_at, undisturbed=undisturbed)


@pytest.mark.parametrize("name", SETTINGS)
def test_a_run_learns_and_a_diverging_one_says_so(config, tmp_path, name):
    losses = run(config(name), tmp_path / "learns").metrics()
    assert losses[12, "train/loss"] < losses[1, "train/loss"] - 0.1
    wild = config(name, train={"lr": 1e30, "steps": 8})
    assert run(wild, tmp_path / "wild").events[-1].kind == "diverged"


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 4])
@pytest.mark.parametrize("name", ["galore", "fira", "apollo", "apollo mini"])
def test_several_processes_equal_one(config, tmp_path, name, processes):
    setting = config(name, train={"micro_batch_size": 1, "steps": 7, "lr": 1e-3})
    assert_processes_equal_one(setting, tmp_path, processes=processes, atol=2e-4)
