"""Plans: equal runs fall together, names tell runs apart, a stored plan only grows."""

from __future__ import annotations

import dataclasses
import itertools
import json
import re
import shlex

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from experiments.disk.output_dir import plan_folder, refuse_unwritable
from experiments.disk.plans import read_sweep
from experiments.labels import spell
from relora_core.config import ConfigError, ModelConfig, MuonConfig, ReLoRAConfig, SweepConfig
from sweeps.planning.grid import axes, check_name, points_from, safe_name, sweep_name
from sweeps.planning.plan import load, make_plan, store


def grid(make, **axes_):
    """Points and configs of a product, as Hydra would hand them in."""
    return [
        ({f"relora.{k}" if k == "r" else k: str(v) for k, v in cell.items()}, make(**cell))
        for cell in (
            dict(zip(axes_, values, strict=True)) for values in itertools.product(*axes_.values())
        )
    ]


def test_a_knob_of_an_optimizer_collapses_where_another_one_is_chosen(make):
    points = [
        ({"muon.momentum": str(momentum)}, make(muon=MuonConfig(momentum=momentum)))
        for momentum in (0.9, 0.95)
    ]
    plan = make_plan(points)
    line = "2 points -> 1 runs: muon.momentum does not apply to train.optimizer=adamw"
    assert plan.collapsed == [line]


def test_axes_that_do_not_apply_collapse_and_the_plan_says_so(make):
    plan = make_plan(grid(make, method=["full_rank", "relora"], r=[8, 6]))
    assert [cell.name for cell in plan.cells] == [
        "method=full_rank",
        "method=relora relora.r=8",
        "method=relora relora.r=6",
    ]
    told = "4 points -> 3 runs: relora.r does not apply to method=full_rank"
    assert plan.collapsed == [told]


def in_arms(make, *names: str, **changes):
    """The same point in each of these arms."""
    return [
        ({"sweep.arm": name}, make(sweep=SweepConfig(name="s", arm=name), **changes))
        for name in names
    ]


def test_an_arm_that_computes_the_same_as_another_is_found_by_its_own_name(make, tmp_path):
    other = in_arms(make, "other", method="full_rank")
    plan = make_plan([*in_arms(make, "tuned", "common"), *other])
    assert plan.same_arms == {"common": "tuned"}
    assert plan.collapsed == ["3 points -> 2 runs: of equal arms one runs (common = tuned)"]
    store(plan, output_dir=tmp_path)
    path = tmp_path / "sweeps" / "s" / "plan.json"
    assert load(path).same_arms == {"common": "tuned"}
    store(make_plan(in_arms(make, "renamed")), output_dir=tmp_path)
    assert load(path).same_arms == {"common": "renamed", "tuned": "renamed"}
    store(make_plan(in_arms(make, "common", "tuned")), output_dir=tmp_path)
    assert load(path).same_arms == {"renamed": "common", "tuned": "common"}


def test_equal_arms_have_one_name_whatever_seeds_each_was_given(make, tmp_path):
    other = in_arms(make, "other", method="full_rank")
    points = [*other, *in_arms(make, "one", "two"), *in_arms(make, "two", seed=1)]
    plan = make_plan(points)
    assert plan.same_arms == {"two": "one"}
    assert [cell.config.sweep.arm for cell in plan.cells] == ["other", "one", "one"]
    path = plan_folder(tmp_path, name="s") / "plan.json"
    for command, label, others in (
        (points, "one", ["two"]),
        (in_arms(make, "two", seed=2), "two", ["one"]),
        ([({"seed": "3"}, make(seed=3, sweep=SweepConfig(name="s")))], "two", ["one"]),
        (in_arms(make, "renamed", seed=0), "renamed", ["one", "two"]),
    ):
        given = store(make_plan(command), output_dir=tmp_path)
        stored, arms = load(path), read_sweep(tmp_path, "s").arms
        assert {cell.run_id: cell.name for cell in stored.cells}.items() >= {
            cell.run_id: cell.name for cell in given.cells
        }.items()
        assert [{run.arm for run in runs} for runs in arms.values()] == [{"other"}, {label}]
        assert stored.same_arms == dict.fromkeys(others, label)


def test_a_plan_of_before_in_which_an_arm_has_two_names_is_mended_by_the_next_command(
    make, tmp_path
):
    points = [*in_arms(make, "one"), *in_arms(make, "one", seed=1)]
    store(make_plan([*points, *in_arms(make, "other", method="full_rank")]), output_dir=tmp_path)
    path = plan_folder(tmp_path, name="s") / "plan.json"
    raw = json.loads(path.read_text())
    raw["cells"][1]["config"]["sweep"]["arm"] = "two"
    path.write_text(json.dumps(raw))
    assert [cell.config.sweep.arm for cell in load(path).cells] == ["one", "two", "other"]
    store(make_plan(in_arms(make, "other", method="full_rank", seed=1)), output_dir=tmp_path)
    assert [cell.config.sweep.arm for cell in load(path).cells] == ["one", "one", "other", "other"]
    assert load(path).same_arms == {"two": "one"}


def test_an_arm_with_a_setting_of_its_own_is_not_said_to_be_another(make):
    points = [*in_arms(make, "one", "two"), *in_arms(make, "two", method="full_rank")]
    assert make_plan(points).same_arms == {}


def test_the_same_point_twice_and_a_label_are_one_run(make):
    plan = make_plan([({"seed": "1"}, make(seed=1)), ({"seed": "1"}, make(seed=1))])
    assert len(plan.cells) == 1
    assert plan.collapsed == ["2 points -> 1 runs: the same setting is there more than once"]
    renamed = make_plan([({}, make()), ({}, make(experiment="other"))])
    assert len(renamed.cells) == 1
    assert "experiment does not change what is computed" in renamed.collapsed[0]


def test_a_bad_cell_stops_the_whole_grid(make):
    with pytest.raises(ConfigError, match=r"relora.r must be in \[1, 8\].* got 99") as caught:
        make_plan(grid(make, r=[4, 99]))
    assert "\n" not in str(caught.value)


def names(*configs):
    return [cell.name for cell in make_plan([({}, config) for config in configs]).cells]


def test_names_follow_the_fewest_telling_keys(make):
    wide = ModelConfig(name="wide", d_model=48, d_ff=96, vocab_size=64)
    assert names(make(), make(model=wide)) == ["model=nano", "model=wide"]
    unnamed = make(model=dataclasses.replace(wide, name="nano"))
    assert names(make(), unnamed) == ["model.d_model=24", "model.d_model=48"]
    assert names(make()) == ["test"]


def test_names_tell_numbers_apart_that_differ_in_the_last_digit(make):
    plan = make_plan([({}, make(relora=ReLoRAConfig(r=4, dropout=d))) for d in (0.3, 0.1 + 0.2)])
    names = [cell.name for cell in plan.cells]
    assert names == ["relora.dropout=0.3", "relora.dropout=0.30000000000000004"]


def test_a_long_value_is_cut_in_a_name_and_still_told_apart(make):
    phases = [[[step, 4 + step % (3 + last)] for step in range(200)] for last in range(3)]
    every = [ReLoRAConfig(r=8, reset_frequency=1, rank_schedule=one) for one in phases]
    plan = make_plan([({}, make(steps=200, relora=relora)) for relora in every])
    names = [cell.name for cell in plan.cells]
    assert len(set(names)) == 3
    assert all(len(name) < 120 for name in names)
    assert all(name.startswith("relora.rank_schedule=[0, 4]+") for name in names)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    cells=st.sets(
        st.tuples(
            st.sampled_from(["full_rank", "lora", "relora"]),
            st.integers(1, 8),
            st.integers(0, 3),
            st.sampled_from([3, 4]),
        ),
        min_size=1,
        max_size=12,
    )
)
def test_names_are_unique_within_any_plan(make, cells):
    def config(method, r, seed, steps):
        return make(method=method, r=r, seed=seed, steps=steps)

    plan = make_plan([({}, config(*cell)) for cell in sorted(cells)])
    assert len({cell.name for cell in plan.cells}) == len(plan.cells)
    assert len({cell.run_id for cell in plan.cells}) == len(plan.cells)


def test_the_sweep_is_named_by_what_varies(make):
    assert make_plan(grid(make, method=["lora", "relora"], r=[4, 8])).name == "method-relora.r"
    assert make_plan([({"seed": "3"}, make(seed=3))]).name == "test"
    named = make(sweep=SweepConfig(name="mine"))
    plan = make_plan([({}, named)])
    assert (plan.name, plan.cells[0].config.sweep.name) == ("mine", "mine")
    with pytest.raises(ConfigError, match="one name per command"):
        make_plan([({}, named), ({}, make(seed=1))])


@given(text=st.text(max_size=90))
def test_any_text_becomes_a_safe_folder_name(text):
    name = safe_name(text)
    assert re.fullmatch(r"[A-Za-z0-9_=][A-Za-z0-9._=-]{0,59}", name)
    assert safe_name(name) == name == check_name(name)


@given(keys=st.lists(st.from_regex(r"[a-z]{1,9}(\.[a-z]{1,9})?", fullmatch=True), min_size=1))
def test_different_axes_have_different_names_however_long(keys):
    keys = list(dict.fromkeys(keys))
    points = [dict.fromkeys(keys, "1"), dict.fromkeys(keys, "2")]
    assert axes(points) == keys
    name = sweep_name(points, experiment="demo")
    more = [{**point, "zzz.one-more": str(i)} for i, point in enumerate(points)]
    assert len(name) <= 60
    assert sweep_name(more, experiment="demo") != name


def test_an_unsafe_name_is_refused_with_the_nearest_valid_one():
    with pytest.raises(ConfigError, match=r"got 'a/b'; nearest valid: a-b"):
        check_name("a/b")


def test_points_keep_the_keys_without_hydras_prefixes():
    assert points_from([["model=tiny", "+a.b=x=y"], ["~c"]]) == [
        {"model": "tiny", "a.b": "x=y"},
        {"c": ""},
    ]


def test_a_stored_plan_reads_back_as_it_was(make, tmp_path):
    out = tmp_path / "out"
    plan = store(make_plan(grid(make, r=[4, 8]), command="run -m relora.r=4,8"), output_dir=out)
    assert load(plan_folder(out, name=plan.name) / "plan.json") == plan


def test_a_widened_grid_extends_the_stored_plan_and_runs_its_own_points_only(make, tmp_path):
    first = store(make_plan(grid(make, r=[4, 8]), name="s", command="one"), output_dir=tmp_path)
    second = store(
        make_plan(grid(make, r=[8, 2], seed=[0, 1]), name="s", command="two"), output_dir=tmp_path
    )
    stored = load(plan_folder(tmp_path, name="s") / "plan.json")
    ids = [cell.run_id for cell in stored.cells]
    assert ids[:2] == [cell.run_id for cell in first.cells]
    assert len(ids) == len(set(ids)) == 5
    assert len(second.cells) == 4
    assert stored.commands == ["one", "two"]
    assert stored.created == first.created
    names = {cell.run_id: cell.name for cell in stored.cells}
    assert all(cell.name == names[cell.run_id] for cell in second.cells)
    record = read_sweep(tmp_path, "s")
    assert {run.run_id: run.name for run in record.runs} == names
    assert record.commands == ["one", "two"]


def test_a_plan_keeps_the_overrides_of_each_command_as_typed(make, tmp_path):
    typed = {"a": ["relora.r=4,8", "data.path=my data/x"], "b": ["+sweep=it's", "seed=0"]}
    for words in [*typed.values(), typed["a"]]:
        command = shlex.join(["python", "run.py", "-m", *words])
        store(make_plan(grid(make, r=[4, 8]), name="s", command=command), output_dir=tmp_path)
    path = plan_folder(tmp_path, name="s") / "plan.json"
    assert read_sweep(tmp_path, "s").overrides == list(typed.values())
    path.write_text(json.dumps(json.loads(path.read_text()) | {"overrides": [[]]}))
    with pytest.raises(ConfigError, match="one a command"):
        read_sweep(tmp_path, "s")


def test_a_stored_run_has_the_axes_that_its_name_is_made_of(make, tmp_path):
    grammar = make()
    files = dataclasses.replace(grammar.data, kind="text", path="/a b=c", fingerprint="f")
    odd = dataclasses.replace(grammar, data=dataclasses.replace(files, tokenizer="t"))
    points = [({}, odd), *grid(make, r=[4, 8], seed=[0, 1])]
    store(make_plan(points, name="s"), output_dir=tmp_path)
    runs = read_sweep(tmp_path, "s").runs
    assert [spell(run.axes) for run in runs] == [run.name for run in runs]
    assert runs[0].axes["data"] == "text"
    assert (runs[2].axes["relora.r"], runs[2].axes["seed"]) == ("4", "1")


def test_a_plan_of_an_earlier_version_is_read_as_one_with_axes(make, tmp_path):
    points = grid(make, method=["lora", "relora"], r=[4, 8], seed=[0, 1])
    plan = store(make_plan(points, name="s"), output_dir=tmp_path)
    path = plan_folder(tmp_path, name="s") / "plan.json"
    now = [(run.axes, run.arm) for run in read_sweep(tmp_path, "s").runs]
    raw = json.loads(path.read_text())
    del raw["overrides"]
    for cell in raw["cells"]:
        del cell["axes"]
    path.write_text(json.dumps(raw))
    assert [(run.axes, run.arm) for run in read_sweep(tmp_path, "s").runs] == now
    assert [cell.axes for cell in load(path).cells] == [cell.axes for cell in plan.cells]


def test_a_damaged_plan_is_the_users_to_mend_in_one_line(make, tmp_path):
    plan = store(make_plan([({}, make())]), output_dir=tmp_path)
    path = plan_folder(tmp_path, name=plan.name) / "plan.json"
    path.write_text(json.dumps({"cells": [{"run_id": "x"}]}))
    with pytest.raises(ConfigError, match="must be a plan") as caught:
        load(path)
    assert "\n" not in str(caught.value)


def test_a_disk_without_file_locks_is_named(make, tmp_path, monkeypatch):
    def none(*arguments: object) -> None:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr("fcntl.flock", none)
    line = (
        r"this disk has no file locks, which keep two commands apart \(Function not implemented\)"
    )
    with pytest.raises(ConfigError, match=line), refuse_unwritable(tmp_path):
        store(make_plan([({}, make())], name="s"), output_dir=tmp_path)
