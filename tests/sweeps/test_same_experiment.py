"""Configs of several ids that compute the same: one run of a plan, its id independent of order."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest

from experiments.identity import essential, run_id
from experiments.run_dir import RunDir, runs_folder
from relora_core.config import RunConfig
from sweeps.launch import same_elsewhere
from sweeps.plan import load, make_plan, plan_folder, store

SAME = {
    "prune ratio of all": (
        {"relora": {"prune_ratio": 1.0}},
        {"relora": {"prune_ratio": 0.5}},
        "relora.prune_ratio does not apply with relora.optimizer_state=zero",
    ),
    "mask of none": (
        {"relora": {"optimizer_state": "keep"}},
        {"relora": {"optimizer_state": "keep", "joint_mask": False, "reset_adam_step": False}},
        "do not apply with relora.optimizer_state=keep",
    ),
    "A before a warm start": (
        {"relora": {"warm_start_steps": 2}},
        {"relora": {"warm_start_steps": 2, "init_a": "zero"}},
        "relora.init_a does not apply with relora.warm_start_steps=2",
    ),
    "alpha of a trained scale": (
        {"relora": {"scaling": "trainable"}},
        {"relora": {"scaling": "trainable", "alpha": 3.0}},
        "relora.alpha does not apply with relora.scaling=trainable",
    ),
    "floor of a line": (
        {"schedule": {"name": "linear"}},
        {"schedule": {"name": "linear", "min_ratio": 0.3}},
        "schedule.min_ratio does not apply with schedule.name=linear",
    ),
    "horizon": (
        {"train": {"steps": 8}},
        {"train": {"steps": 8}, "schedule": {"total_steps": 8}},
        "values of schedule.total_steps mean the same",
    ),
    "first restart": (
        {"relora": {"reset_frequency": 3}},
        {"relora": {"reset_frequency": 3, "first_restart": 2}},
        "values of relora.first_restart mean the same",
    ),
    "targets": (
        {"relora": {"target_modules": ["attention", "swiglu"]}},
        {"relora": {"target_modules": ["SwiGLU", "attention", "q_proj", "swiglu"]}},
        "values of relora.target_modules mean the same",
    ),
    "targets left out": (
        {"relora": {"target_modules": ["attention"]}},
        {"relora": {"full_rank_modules": ["swiglu"]}},
        "mean the same",
    ),
    "frozen body": (
        {"method": "lora", "relora": {"r": 0}},
        {"method": "lora", "relora": {"r": 0, "alpha": 3.0, "dropout": 0.1, "lr_ratio_b": 4.0}},
        "do not apply with relora.r=0",
    ),
    "projectors": (
        {"method": "galore", "galore": {"r": 4, "update_gap": 100}},
        {"method": "galore", "galore": {"r": 4, "update_gap": 300, "moments": "reset"}},
        "galore.moments does not apply with galore.update_gap=",
    ),
    "measures": (
        {},
        {"dynamics": {"what": ["base"]}},
        "dynamics.what does not apply with dynamics.every_steps=none",
    ),
}
DIFFERENT = [
    ({"relora": {"optimizer_state": "random", "prune_ratio": p}} for p in (0.5, 1.0)),
    ({"relora": {"joint_mask": j, "optimizer_state": "magnitude"}} for j in (True, False)),
    ({"relora": {"init_a": a}} for a in ("kaiming", "zero")),
    ({"relora": {"reset_frequency": 3, "first_restart": f}} for f in (3, 4)),
    ({"schedule": {"min_ratio": m}} for m in (0.0, 0.3)),
    ({"relora": {"target_modules": t}} for t in (["attention"], ["q_proj"])),
    ({"relora": {"optimizer_state": "zero", "reset_adam_step": z}} for z in (True, False)),
]
SMALL = {"train": {"steps": 8}, "relora": {"r": 4, "reset_frequency": 3}}


class Heard:
    """A sink that keeps the losses."""

    def __init__(self):
        self.losses = []

    def emit(self, event):
        if "train/loss" in event.metrics and event.kind == "train":
            self.losses.append(event.metrics["train/loss"])

    def close(self):
        pass


def both(nano, one, two) -> tuple[RunConfig, RunConfig]:
    def build(change):
        sections = {k: {**v, **change.get(k, {})} for k, v in SMALL.items()}
        config = nano(**{**change, **sections})
        config.model.vocab_size = 384
        return config

    return build(one), build(two)


@pytest.mark.parametrize("case", SAME)
def test_what_another_knob_rules_out_makes_no_second_run(nano, case):
    *changes, line = SAME[case]
    configs = both(nano, *changes)
    assert run_id(configs[0]) != run_id(configs[1])
    plans = [make_plan([({}, c) for c in order]) for order in itertools.permutations(configs)]
    assert {len(plan.cells) for plan in plans} == {1}
    assert len({plan.cells[0].run_id for plan in plans}) == 1
    assert all(line in "\n".join(plan.collapsed) for plan in plans)


@pytest.mark.slow
@pytest.mark.parametrize("case", SAME)
def test_both_compute_the_same_bit_for_bit(nano, case, tmp_path):
    from relora_core.train import train

    losses = []
    for index, config in enumerate(both(nano, *SAME[case][:2])):
        config.runtime.log_every_steps = 1
        sink, folder = Heard(), tmp_path / str(index)
        train(config, checkpoints=folder, cache_dir=folder / "cache", sink=sink)
        losses.append(sink.losses)
    assert len(losses[0]) == 8
    assert losses[0] == losses[1]


@pytest.mark.parametrize("pair", DIFFERENT)
def test_what_does_change_the_numbers_stays_two_runs(nano, pair):
    one, two = both(nano, *pair)
    assert essential(one) != essential(two)
    assert len(make_plan([({}, one), ({}, two)]).cells) == 2


def test_the_id_that_has_begun_is_kept_and_an_arm_stays_one(make, tmp_path):
    def at(seed, ratio):
        config = make(seed=seed)
        config.relora.prune_ratio = ratio
        return config

    begun = {run_id(at(0, 1.0)), run_id(at(1, 0.5))}
    points = [({}, at(seed, ratio)) for seed in (0, 1, 2) for ratio in (0.5, 1.0)]
    plan = make_plan(points, name="s", begun=begun.__contains__)
    assert {cell.run_id for cell in plan.cells[:2]} == begun
    assert len(plan.cells) == 3
    assert len({cell.arm_id for cell in plan.cells}) == 1
    store(plan, output_dir=tmp_path)
    store(make_plan([({}, at(3, 0.7))], name="s"), output_dir=tmp_path)
    stored = load(plan_folder(tmp_path, name="s") / "plan.json")
    assert len({cell.arm_id for cell in stored.cells}) == 1
    assert len(stored.cells) == 4


def test_a_run_that_computes_the_same_under_another_id_is_named(make):
    old, new = make(), make()
    new.relora.prune_ratio = 0.5
    RunDir(runs_folder(old.output_dir) / run_id(old)).create(old)
    plan = make_plan([({}, new), ({}, make(seed=1))])
    [line] = same_elsewhere(plan, Path(old.output_dir))
    assert line == f"{plan.cells[0].name} computes what run {run_id(old)} does"
    assert same_elsewhere(make_plan([({}, old)]), Path(old.output_dir)) == []
