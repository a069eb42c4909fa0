"""Configs of several ids that compute the same: one run of a plan, its id independent of order."""

from __future__ import annotations

import itertools
import shutil
from functools import reduce
from pathlib import Path

import pytest
import yaml

from experiments.disk.output_dir import plan_folder, runs_folder
from experiments.disk.run_dir import RunDir
from experiments.identity import essential, run_id
from experiments.run import runner, single
from experiments.run.complete import complete
from relora_core.config import DataConfig, PalomaConfig, RunConfig
from sweeps.launch import same_elsewhere
from sweeps.planning.plan import load, make_plan, store

SAME = {
    "prune ratio of all": (
        "relora.prune_ratio=1.0",
        "relora.prune_ratio=0.5",
        "relora.prune_ratio does not apply with relora.optimizer_state=zero",
    ),
    "mask of none": (
        "relora.optimizer_state=keep",
        "relora.optimizer_state=keep relora.joint_mask=false relora.reset_adam_step=false",
        "do not apply with relora.optimizer_state=keep",
    ),
    "A before a warm start": (
        "relora.warm_start_steps=2",
        "relora.warm_start_steps=2 relora.init_a=zero",
        "relora.init_a does not apply with relora.warm_start_steps=2",
    ),
    "alpha of a trained scale": (
        "relora.scaling=trainable",
        "relora.scaling=trainable relora.alpha=3.0",
        "relora.alpha does not apply with relora.scaling=trainable",
    ),
    "floor of a line": (
        "schedule.name=linear",
        "schedule.name=linear schedule.min_ratio=0.3",
        "schedule.min_ratio does not apply with schedule.name=linear",
    ),
    "horizon": (
        "train.steps=8",
        "train.steps=8 schedule.total_steps=8",
        "values of schedule.total_steps mean the same",
    ),
    "first restart": (
        "relora.reset_frequency=3",
        "relora.reset_frequency=3 relora.first_restart=2",
        "values of relora.first_restart mean the same",
    ),
    "targets": (
        "relora.target_modules=[attention,swiglu]",
        "relora.target_modules=[SwiGLU,attention,q_proj,swiglu]",
        "values of relora.target_modules mean the same",
    ),
    "targets left out": (
        "relora.target_modules=[attention]",
        "relora.full_rank_modules=[swiglu]",
        "mean the same",
    ),
    "pruning of one moment": (
        "train.optimizer=muon relora.optimizer_state=magnitude relora.prune_ratio=0.5",
        "train.optimizer=muon relora.optimizer_state=magnitude relora.prune_ratio=0.5 "
        "relora.joint_mask=false relora.reset_adam_step=false",
        "relora.joint_mask, relora.reset_adam_step do not apply with train.optimizer=muon",
    ),
    "frozen body": (
        "method=lora relora.r=0",
        "method=lora relora.r=0 relora.alpha=3.0 relora.dropout=0.1 relora.lr_ratio_b=4.0",
        "do not apply with relora.r=0",
    ),
    "projectors": (
        "method=galore galore.r=4 galore.update_gap=100",
        "method=galore galore.r=4 galore.update_gap=300 galore.moments=reset",
        "galore.moments does not apply with galore.update_gap=",
    ),
    "supports": (
        "method=sparse sparse.update_gap=null",
        "method=sparse sparse.update_gap=300 sparse.bias_correction=entry",
        "sparse.bias_correction does not apply with sparse.update_gap=",
    ),
    "no factors": (
        "method=sltrain sltrain.r=0",
        "method=sltrain sltrain.r=0 sltrain.alpha=3.0 sltrain.refactor_every=4",
        "do not apply with sltrain.r=0",
    ),
    "no refactorisation within the run": (
        "method=sltrain sltrain.r=4",
        "method=sltrain sltrain.r=4 sltrain.refactor_every=99 sltrain.refactor=moments",
        "sltrain.refactor does not apply with sltrain.refactor_every=",
    ),
    "no restart within the run": (
        "relora.reset_frequency=8",
        "relora.reset_frequency=2000 relora.first_restart=3000 relora.restart_warmup_steps=5 "
        "relora.merge=unscaled relora.optimizer_state=random relora.prune_ratio=0.5 "
        "relora.joint_mask=false relora.reset_adam_step=false relora.restart_offset=1 "
        "relora.restart_groups=2 relora.adaptive_rank_energy=0.5 relora.rank_schedule=[[2,2]]",
        "relora.optimizer_state, relora.prune_ratio, relora.joint_mask, relora.reset_adam_step do "
        "not apply with relora.reset_frequency=",
    ),
    "masters without a restart": (
        "relora.reset_frequency=9 relora.base_dtype=bfloat16",
        "relora.reset_frequency=9 relora.base_dtype=bfloat16 relora.after_merge=restore",
        "relora.after_merge does not apply with relora.reset_frequency=9",
    ),
    "a restart after the last update": (
        "relora.reset_frequency=7 relora.restart_warmup_steps=0 relora.restart_offset=1",
        "relora.reset_frequency=8 relora.restart_warmup_steps=0 relora.restart_offset=1",
        "relora.reset_frequency does not apply with ",
    ),
    "every restart at full rank": (
        "relora.full_rank_steps=2 relora.low_rank_steps=2 relora.reset_frequency=4",
        "relora.full_rank_steps=2 relora.low_rank_steps=2 relora.reset_frequency=4 "
        "relora.merge=unscaled relora.restart_warmup_steps=3",
        "do not apply with relora.reset_frequency=4",
    ),
    "first restart at full rank": (
        "relora.reset_frequency=2 relora.full_rank_steps=1 relora.low_rank_steps=2",
        "relora.reset_frequency=2 relora.full_rank_steps=1 relora.low_rank_steps=2 "
        "relora.first_restart=1",
        "values of relora.first_restart mean the same",
    ),
    "ranks after the last restart": (
        "relora.rank_schedule=[[3,2]]",
        "relora.rank_schedule=[[0,4],[2,2],[4,2],[7,3]]",
        "values of relora.rank_schedule mean the same",
    ),
    "ranks that stay": (
        "",
        "relora.rank_schedule=[[0,4],[3,4],[7,1]]",
        "values of relora.rank_schedule mean the same",
    ),
    "a low-rank phase beyond the end": (
        "relora.full_rank_steps=2 relora.low_rank_steps=7",
        "relora.warm_start_steps=1 relora.full_rank_steps=1 relora.low_rank_steps=9",
        "values of relora.warm_start_steps, relora.full_rank_steps, relora.low_rank_steps mean the",
    ),
    "a cycle beyond the end": (
        "relora.warm_start_steps=2",
        "relora.full_rank_steps=2 relora.low_rank_steps=7",
        "relora.full_rank_steps, relora.low_rank_steps mean the same",
    ),
    "a second full-rank phase beyond the end": (
        "relora.warm_start_steps=1 relora.full_rank_steps=3 relora.low_rank_steps=3",
        "relora.warm_start_steps=0 relora.full_rank_steps=4 relora.low_rank_steps=3",
        "values of relora.warm_start_steps, relora.full_rank_steps mean the same",
    ),
    "two ways to write a scale": (
        "relora.alpha=8.0",
        "relora.alpha=4.0 relora.scaling=rslora",
        "values of relora.alpha, relora.scaling mean the same",
    ),
    "two ways to write lora's scale": (
        "method=lora relora.alpha=8.0",
        "method=lora relora.alpha=4.0 relora.scaling=rslora",
        "values of relora.alpha, relora.scaling mean the same",
    ),
    "merge at s = 1": (
        "relora.alpha=4.0",
        "relora.alpha=4.0 relora.merge=unscaled",
        "relora.merge does not apply with relora.alpha=4",
    ),
    "nested in one rank": (
        "relora.r=1",
        "relora.r=1 relora.nested_rank=true",
        "relora.nested_rank does not apply with relora.r=1",
    ),
    "random of none": (
        "relora.optimizer_state=keep",
        "relora.optimizer_state=random relora.prune_ratio=0.0 relora.joint_mask=false "
        "relora.reset_adam_step=false",
        "values of relora.optimizer_state",
    ),
    "magnitude of none": (
        "relora.optimizer_state=random relora.prune_ratio=0.0",
        "relora.optimizer_state=magnitude relora.prune_ratio=0.0 relora.joint_mask=false",
        "relora.joint_mask does not apply with relora.prune_ratio=0",
    ),
    "random of all": (
        "relora.optimizer_state=random relora.reset_adam_step=false",
        "relora.prune_ratio=0.2 relora.joint_mask=false relora.reset_adam_step=false",
        "values of relora.optimizer_state",
    ),
    "magnitude of all": (
        "relora.optimizer_state=zero",
        "relora.optimizer_state=magnitude relora.joint_mask=false",
        "values of relora.optimizer_state",
    ),
    "a decay that is not reached": (
        "method=lora schedule.warmup_steps=8",
        "method=lora schedule.warmup_steps=8 schedule.name=linear schedule.min_ratio=0.5 "
        "schedule.total_steps=99",
        "schedule.name, schedule.min_ratio, schedule.total_steps do not apply with "
        "schedule.warmup_steps=8",
    ),
    "horizon of no decay": (
        "schedule.min_ratio=1.0",
        "schedule.min_ratio=1.0 schedule.total_steps=99",
        "schedule.total_steps does not apply with schedule.min_ratio=1",
    ),
    "evals at start and end": (
        "eval.paloma.enabled=true eval.paloma.every_steps=8 eval.paloma.max_documents=40",
        "eval.paloma.enabled=true eval.paloma.split=test eval.paloma.every_steps=99",
        "values of eval.paloma.every_steps, eval.paloma.max_documents mean the same",
    ),
    "measures of the start": (
        "dynamics.every_steps=9",
        "dynamics.every_steps=99",
        "values of dynamics.every_steps mean the same",
    ),
    "measures": (
        "",
        "dynamics.what=[base]",
        "dynamics.what does not apply with dynamics.every_steps=none",
    ),
}
"""Two settings that compute the same, and how the plan says so."""
DIFFERENT = [  # what both set, and what each sets besides
    ("relora.optimizer_state=random", "relora.prune_ratio=0.5", "relora.prune_ratio=1.0"),
    ("relora.optimizer_state=magnitude relora.prune_ratio=0.5",
     "relora.joint_mask=true", "relora.joint_mask=false"),
    ("", "relora.init_a=kaiming", "relora.init_a=zero"),
    ("relora.reset_frequency=3", "relora.first_restart=3", "relora.first_restart=4"),
    ("", "schedule.min_ratio=0.0", "schedule.min_ratio=0.3"),
    ("", "relora.target_modules=[attention]", "relora.target_modules=[q_proj]"),
    ("relora.optimizer_state=zero", "relora.reset_adam_step=true", "relora.reset_adam_step=false"),
    ("relora.reset_frequency=8", "relora.base_dtype=float32", "relora.base_dtype=bfloat16"),
    ("", "relora.reset_frequency=7", "relora.reset_frequency=8"),
    ("relora.reset_frequency=7", "relora.restart_offset=0", "relora.restart_offset=1"),
    ("", "relora.rank_schedule=[[6,2]]", "relora.rank_schedule=[[7,2]]"),
    ("relora.rank_schedule=[[6,2]]", "relora.merge=scaled", "relora.merge=unscaled"),
    ("relora.rank_schedule=[[6,2]]",
     "relora.alpha=8.0 relora.scaling=standard", "relora.alpha=4.0 relora.scaling=rslora"),
    ("relora.adaptive_rank_energy=0.5",
     "relora.alpha=8.0 relora.scaling=standard", "relora.alpha=4.0 relora.scaling=rslora"),
    ("relora.full_rank_steps=2", "relora.low_rank_steps=6", "relora.low_rank_steps=7"),
    ("relora.low_rank_steps=99", "relora.full_rank_steps=8", "relora.full_rank_steps=9"),
    ("", "", "relora.full_rank_steps=9 relora.low_rank_steps=1"),
    ("method=lora schedule.warmup_steps=7 schedule.total_steps=9",
     "schedule.name=cosine", "schedule.name=linear"),
    ("relora.optimizer_state=random", "relora.prune_ratio=0.0", "relora.prune_ratio=1.0"),
    ("eval.blimp.enabled=true", "", "eval.blimp.every_steps=99"),
    ("eval.blimp.enabled=true", "eval.blimp.max_pairs=59", "eval.blimp.max_pairs=60"),
    ("", "dynamics.every_steps=null", "dynamics.every_steps=99"),
    ("", "dynamics.every_steps=8", "dynamics.every_steps=9"),
]  # fmt: skip
SMALL = {"train": {"steps": 8}, "relora": {"r": 4, "reset_frequency": 3}}


class Heard:
    """A sink that keeps the losses, and what evals and dynamics measure."""

    def __init__(self):
        self.losses, self.measures = [], []

    def emit(self, event):
        if "train/loss" in event.metrics and event.kind == "train":
            self.losses.append(event.metrics["train/loss"])
        if event.kind in ("eval", "dynamics"):
            values = {k: v for k, v in event.metrics.items() if not k.startswith("perf/")}
            self.measures.append((event.kind, event.step, values))

    def close(self):
        pass


def both(nano, one, two) -> tuple[RunConfig, RunConfig]:
    def build(words):
        config = nano(**SMALL)
        config.model.vocab_size = 384
        for key, value in (word.split("=") for word in words.split()):
            *sections, name = key.split(".")
            setattr(reduce(getattr, sections, config), name, yaml.safe_load(value))
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

    heard = []
    for index, config in enumerate(both(nano, *SAME[case][:2])):
        config.runtime.log_every_steps = 1
        sink, folder = Heard(), tmp_path / str(index)
        train(config, checkpoints=folder, cache_dir=folder / "cache", sink=sink)
        heard.append(sink)
    assert len(heard[0].losses) == 8
    assert heard[0].losses == heard[1].losses
    assert heard[0].measures == heard[1].measures


@pytest.mark.parametrize(("common", "one", "two"), DIFFERENT)
def test_what_does_change_the_numbers_stays_two_runs(nano, common, one, two):
    one, two = both(nano, f"{common} {one}", f"{common} {two}")
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


def test_texts_that_no_eval_scores_make_no_second_run(make):
    rows = {"kind": "pretokenized", "path": "rows", "fingerprint": "f", "seq_len": 8}

    def plan(**changes):
        config = make(data=DataConfig(**rows | changes))
        config.model.vocab_size = 128
        return config

    on = plan()
    on.eval.paloma = PalomaConfig(enabled=True, every_steps=2)
    same = [plan(), plan(vocab_size=128), plan(eos_id=0), on]
    assert len({run_id(config) for config in same}) == 4
    found = make_plan([({}, config) for config in same])
    assert len(found.cells) == 1
    assert "with eval.paloma.path=none" in "\n".join(found.collapsed)
    assert "data.vocab_size does not apply with model.vocab_size=128" in "\n".join(found.collapsed)
    assert len(make_plan([({}, plan()), ({}, plan(fingerprint="g"))]).cells) == 2


def test_a_single_run_says_that_another_has_done_the_same(make, capsys, monkeypatch):
    def planned(**changes):
        config = make(**changes)
        config.model.vocab_size = None
        return complete(config)

    old, new = planned(), planned()
    new.relora.prune_ratio = 0.5
    monkeypatch.setattr(runner, "run_experiment", lambda *_, **__: "finished")
    done = RunDir(runs_folder(old.output_dir) / run_id(old))
    done.create(old)
    line = f"note: it computes what run {run_id(old)} did, which is finished"
    assert single.run_here(planned(seed=1)) == 0
    assert single.run_here(new) == 0
    assert line not in capsys.readouterr().err  # it has only begun
    shutil.rmtree(runs_folder(old.output_dir) / run_id(new))
    done.write_result({"run_id": run_id(old), "state": "finished", "step": 4, "metrics": {}})
    assert single.run_here(new) == 0
    assert line in capsys.readouterr().err.splitlines()
