"""diff shows every difference between two runs, and nothing that is equal."""

from __future__ import annotations

import argparse
import dataclasses
import json
import shutil

import pytest

from experiments.disk.output_dir import plan_folder, runs_folder
from experiments.disk.run_dir import RunDir
from experiments.identity import run_id, scientific
from relora_core.config import ConfigError, ReLoRAConfig
from sweeps.commands import diff
from sweeps.planning.plan import make_plan, store
from sweeps.snapshot import freeze

ATTEMPT = {
    "host": "n1",
    "pid": 1,
    "started": 1.0,
    "python": "3.11.7",
    "code_hash": "aaaa",
    "commit": "c" * 40,
    "dirty": False,
    "packages": {"torch": "2.13.0", "numpy": "2.0.0"},
    "gpus": [],
    "slurm": {},
}


@pytest.fixture
def new_run(make):
    """A run in tmp_path/out; `attempt` and `metrics` are recorded where given."""

    def build(*, attempt=None, metrics=None, state="finished", **changes):
        config = make(**changes)
        run = RunDir(runs_folder(config.output_dir) / run_id(config))
        run.create(config)
        if attempt is not None:
            run.write_attempt(1, ATTEMPT | attempt)
        if metrics is not None:
            run.write_result({"state": state, "metrics": metrics, "step": 4})
            run.update_status(state=state, step=4)
        return run

    return build


@pytest.fixture
def printed(tmp_path, capsys):
    """What the command prints of two runs or words: parsed with --json, text otherwise."""

    def run(one, two, *, as_json=True):
        parser = argparse.ArgumentParser()
        diff.configure(parser)
        words = [getattr(one, "run_id", one), getattr(two, "run_id", two)]
        args = parser.parse_args([*words, *(["--json"] if as_json else [])])
        args.output_dir = str(tmp_path / "out")
        assert diff.run(args) == 0
        text = capsys.readouterr().out
        return json.loads(text, parse_constant=pytest.fail) if as_json else text

    return run


def test_two_seeds_of_one_arm_differ_in_the_seed_alone(new_run, printed):
    one, two = new_run(seed=0), new_run(seed=3)
    got = printed(one, two)
    assert got["runs"] == [one.run_id, two.run_id]
    assert got["same_arm"] is True
    assert got["seeds"]["differ"] == {"seed": [0, 3]}
    for section in ("config", "other config", "code", "environment", "results"):
        assert got[section]["differ"] == {}, section


def test_config_differences_are_told_apart_by_whether_they_change_the_numbers(
    new_run, printed, make
):
    one = new_run(r=4)
    two = new_run(r=8, runtime=dataclasses.replace(make().runtime, threads=2))
    got = printed(one, two)
    assert got["config"]["differ"] == {"relora.r": [4, 8]}
    assert got["other config"]["differ"] == {"runtime.threads": [make().runtime.threads, 2]}
    assert got["same_arm"] is False
    assert got["config"]["equal"] == len(scientific(make())) - 2  # r, and the seed is apart


def test_knobs_of_a_method_that_one_run_has_not(new_run, printed):
    one, two = new_run(method="full_rank"), new_run(method="relora", r=4)
    differ = printed(one, two)["config"]["differ"]
    assert differ["method"] == ["full_rank", "relora"]
    assert differ["relora.r"] == ["-", 4]
    text = printed(one, two, as_json=False)
    assert [line.split() for line in text.splitlines() if "relora.*" in line] == [
        ["relora.*", "-", str(sum(key.startswith("relora.") for key in differ)), "here", "alone"]
    ]
    assert "relora.r " not in text


def test_a_knob_of_no_effect_in_both_is_no_difference_of_science(new_run, printed):
    one = new_run(method="full_rank", relora=ReLoRAConfig(r=4))
    two = new_run(method="full_rank", relora=ReLoRAConfig(r=8), seed=1)
    got = printed(one, two)
    assert got["config"]["differ"] == {}
    assert got["other config"]["differ"] == {"relora.r": [4, 8]}


def test_environment_and_code_of_the_newest_attempts(new_run, printed):
    one = new_run(attempt={})
    two = new_run(seed=1, attempt={"code_hash": "old", "packages": {}})
    newest = {"pid": 9, "started": 5.0, "commit": "d" * 40, "packages": {"torch": "2.11.0"}}
    two.write_attempt(2, ATTEMPT | newest | {"gpus": ["A100", "A100"]})
    got = printed(one, two)
    assert got["code"]["differ"] == {"commit": ["c" * 40, "d" * 40]}
    assert got["environment"]["differ"] == {
        "packages.torch": ["2.13.0", "2.11.0"],
        "packages.numpy": ["2.0.0", None],
        "gpus": [[], ["A100", "A100"]],
    }


def test_results_side_by_side(new_run, printed):
    metrics = {"train/loss": 2.0, "eval/paloma/perplexity": 9.0, "same": 1.0, "gone": 3.0}
    one = new_run(metrics=metrics)
    two = new_run(
        seed=1, metrics={"train/loss": 1.5, "eval/paloma/perplexity": float("nan"), "same": 1.0}
    )
    results = printed(one, two)["results"]
    assert results["differ"]["train/loss"] == [2.0, 1.5]
    assert results["differ"]["eval/paloma/perplexity"] == [9.0, None]
    assert results["differ"]["gone"] == [3.0, None]
    assert "same" not in results["differ"]
    assert results["difference"] == {"train/loss": -0.5}
    assert "-0.5" in printed(one, two, as_json=False)


def test_a_run_that_has_not_begun_beside_one_that_has_ended(new_run, printed):
    one, two = new_run(seed=0), new_run(seed=1, attempt={}, metrics={"train/loss": 1.5})
    got = printed(one, two)
    assert got["results"]["differ"]["state"] == ["planned", "finished"]
    assert got["results"]["differ"]["train/loss"] == [None, 1.5]
    assert got["code"]["files"] is None
    assert "none" in printed(one, two, as_json=False)


def test_the_table_fits_one_screen_whatever_was_measured(new_run, printed):
    many = {f"eval/paloma/domain{i}/perplexity": float(i) for i in range(200)}
    one = new_run(method="full_rank", attempt={}, metrics=many)
    two = new_run(attempt={"host": "n2"}, metrics={key: v + 1 for key, v in many.items()})
    text = printed(one, two, as_json=False)
    assert len(text.splitlines()) <= 40
    assert "and 184 more" in text
    assert len(printed(one, two)["results"]["differ"]) == 200


def test_metrics_of_one_run_alone_do_not_crowd_out_what_both_have(new_run, printed):
    alone = {f"dynamics/layer{i}/per": 1.0 for i in range(50)}
    one = new_run(metrics={"train/loss": 2.0, "restart/count": 3.0})
    two = new_run(seed=1, metrics={"train/loss": 1.0, "restart/count": 2.0} | alone)
    lines = printed(one, two, as_json=False).splitlines()
    assert any(line.split() == ["train/loss", "2", "1", "-1"] for line in lines)
    assert any(line.split() == ["restart/count", "3", "2", "-1"] for line in lines)
    assert any(line.split() == ["dynamics/*", "-", "50", "here", "alone"] for line in lines)


def test_equal_digests_of_edited_checkouts_are_not_called_equal_code(new_run, printed):
    one, two = new_run(attempt={"dirty": True}), new_run(seed=1, attempt={"dirty": True})
    got = printed(one, two)
    assert (got["code"]["differ"], got["code"]["files"]) == ({}, None)
    assert "files that differ: unknown" in printed(one, two, as_json=False)


def test_a_run_beside_itself(new_run, printed):
    run = new_run(attempt={}, metrics={"train/loss": float("nan")})
    assert all(
        section["differ"] == {}
        for section in printed(run, run).values()
        if isinstance(section, dict)
    )
    assert "equal: config" in printed(run, run, as_json=False)


def test_brackets_in_values_are_text(new_run, printed):
    one = new_run(attempt={"host": "[bold]n1"})
    two = new_run(seed=1, attempt={"host": "[/n2]"})
    text = printed(one, two, as_json=False)
    assert "[bold]n1" in text
    assert "[/n2]" in text


def test_an_unknown_run_is_one_line(new_run, printed):
    run = new_run()
    with pytest.raises(ConfigError, match="RUN must be"):
        printed(run, "nothing-like-it")


def test_a_config_of_another_version_is_one_line(new_run, printed):
    one, two = new_run(), new_run(seed=1)
    raw = json.loads(two.config_path.read_text())
    two.config_path.write_text(json.dumps(raw | {"knob_of_old": 1}))
    with pytest.raises(ConfigError, match=r"this version reads, got .*knob_of_old"):
        printed(one, two)


# files ------------------------------------------------------------------------------------------
def test_files_of_two_frozen_copies(new_run, printed, tmp_path):
    root, copies = tmp_path / "code", []
    (root / "relora_core").mkdir(parents=True)
    for text in ("one", "two"):
        (root / "relora_core" / "model.py").write_text(text)
        copies.append(freeze(tmp_path / "out/sweeps/s/code", root=root, output_dir=tmp_path / "o"))
    one = new_run(attempt={"tree_hash": copies[0].name, "dirty": True})
    two = new_run(seed=1, attempt={"tree_hash": copies[1].name, "dirty": True})
    assert printed(one, two)["code"]["files"] == ["relora_core/model.py"]
    assert "relora_core/model.py" in printed(one, two, as_json=False)
    shutil.rmtree(copies[1])
    assert printed(one, two)["code"]["files"] is None


PATCH = """diff --git a/{0} b/{0}
index 1..2 100644
--- a/{0}
+++ b/{0}
@@ -1 +1 @@
-old
+{1}
"""


def test_files_of_an_edited_checkout_are_known_from_the_patch(new_run, printed, make):
    one, two = new_run(attempt={}), new_run(seed=1, attempt={"dirty": True})
    plan = make_plan([({"seed": "1"}, make(seed=1))], command="run.py")
    store(plan, output_dir=make().output_dir)
    folder = plan_folder(make().output_dir, name=plan.name)
    (folder / "code.diff").write_text(PATCH.format("a.py", "x") + PATCH.format("b c.py", "y"))
    (folder / "code.json").write_text(json.dumps({"commit": "c" * 40, "code_hash": "aaaa"}))
    assert printed(one, two)["code"]["files"] == ["a.py", "b c.py"]
    (folder / "code.json").write_text(json.dumps({"commit": "c" * 40, "code_hash": "later"}))
    assert printed(one, two)["code"]["files"] is None


def test_the_same_clean_commit_has_no_changed_files(new_run, printed):
    one, two = new_run(attempt={}), new_run(seed=1, attempt={})
    assert printed(one, two)["code"]["files"] == []
