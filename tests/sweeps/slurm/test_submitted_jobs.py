"""What the jobs of a sweep ask for, and that none loses a run."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shlex
import subprocess
from collections import Counter

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from submitting import BIG, HUGE, arrays, job_ids

from experiments.disk.output_dir import all_runs, plan_folder
from experiments.disk.run_dir import RunDir
from experiments.scheduler import GPUS
from relora_core.config import (
    ConfigError,
    ResourcesConfig,
)
from sweeps.planning.plan import make_plan
from sweeps.slurm.batches import batches
from sweeps.slurm.options import SlurmOptions, minutes, shape_of
from sweeps.slurm.submission import read_submissions
from tests.conftest import nano_config


def test_runs_of_one_shape_share_an_array_and_others_have_their_own(submit, slurm, out):
    done, text = submit([0, (1, BIG), 2, (3, HUGE), (4, BIG), 5])
    assert done == 0
    assert sorted(arrays(slurm).values()) == [1, 2, 3]
    asked = {}
    for seed, job_id in job_ids(out).items():
        given_ = slurm.options(job_id)
        asked[seed] = (given_["nodes"], given_["cpus-per-task"])
    small, big, huge = ("1", "4"), ("1", "8"), ("2", "4")
    assert asked == {0: small, 1: big, 2: small, 3: huge, 4: big, 5: small}
    assert set(job_ids(out).values()) == set(slurm.jobs())
    assert {run.status().state for run in all_runs(out)} == {"queued"}
    assert all(base in text for base in arrays(slurm))


def test_each_task_finds_its_own_run(submit, slurm, out):
    """The submission's entry of a task is the run whose status names that task."""
    submit(range(3))
    (one,) = read_submissions(plan_folder(out, name="s") / "jobs")
    assert one.name in {job["name"] for job in slurm.jobs().values()}
    assert one.name == f"s.{one.submission}"
    for index, (run_id,) in enumerate(one.tasks):
        assert RunDir(out / "runs" / run_id).status().job_id == f"{one.job_id}_{index}"


shapes = st.builds(
    ResourcesConfig,
    nodes=st.sampled_from([None, 2]),
    cpus_per_task=st.sampled_from([None, 2, 3]),
)


@settings(
    max_examples=min(60, settings.default.max_examples),
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    wants=st.lists(shapes, min_size=1, max_size=12),
    max_parallel=st.none() | st.integers(1, 9),
    packed=st.integers(1, 3),
    size=st.none() | st.integers(1, 5),
)
def test_the_cap_holds_over_all_arrays_and_no_run_is_lost(make, wants, max_parallel, packed, size):
    points = [({}, make(seed=i, resources=want)) for i, want in enumerate(wants)]
    cells = make_plan(points, name="s").cells
    packed = min(packed, max_parallel or packed)  # more is refused
    options = SlurmOptions(gpus_per_node=0, max_parallel=max_parallel, runs_per_job=packed)
    made = batches(cells, options=options, max_array_size=size)
    if packed > 1:  # a job that is not full asks for less than one that is
        for batch in made:
            assert len({len(task) for task in batch.tasks}) == 1
    assert Counter(c.run_id for b in made for c in b.cells) == Counter(c.run_id for c in cells)
    for batch in made:
        assert {shape_of(cell.config, options) for cell in batch.cells} == {batch.shape}
        assert len(batch.tasks) <= (size or 1000)
        assert all(len(task) <= packed for task in batch.tasks)
    if max_parallel is None:
        assert {b.at_once for b in made} == {None}
        return
    lanes: dict[int, int] = {}
    for batch in made:
        assert batch.at_once is not None
        assert batch.at_once >= 1
        lanes[batch.lane] = max(lanes.get(batch.lane, 0), batch.at_once)
    assert sum(lanes.values()) * packed <= max_parallel


def test_the_cap_reaches_slurm(submit, slurm):
    """Three shapes and two at a time: two lanes of one, the third array after the first."""
    submit([0, 1, (2, BIG), (3, BIG), (4, HUGE), (5, HUGE)], max_parallel=2)
    first, second, third = sorted(arrays(slurm), key=int)
    assert [slurm.options(i)["array"] for i in (first, second, third)] == ["0-1%1"] * 3
    assert "dependency" not in slurm.options(first)
    assert "dependency" not in slurm.options(second)
    assert slurm.options(third)["dependency"] == f"afterany:{first}"


def test_a_cap_below_the_runs_of_one_job_is_refused(submit, slurm, out):
    with pytest.raises(ConfigError, match=r"runs_per_job must be <= max_parallel=2, got 3"):
        submit(range(6), max_parallel=2, runs_per_job=3)
    assert not out.exists()


@given(st.integers(0, 40), st.integers(0, 60), st.integers(0, 90), st.integers(0, 90))
def test_time_limits_in_all_of_slurms_notations(days, hours, mins, secs):
    def up(seconds):
        return seconds // 60 + (seconds % 60 > 0)

    assert minutes(f"{mins}") == mins
    assert minutes(f"{mins}:{secs:02}") == up(60 * mins + secs)
    assert minutes(f"{hours}:{mins}:{secs}") == up(3600 * hours + 60 * mins + secs)
    assert minutes(f"{days}-{hours}") == 60 * (24 * days + hours)
    assert minutes(f"{days}-{hours}:{mins:02}") == 60 * (24 * days + hours) + mins
    seconds = 86400 * days + 3600 * hours + 60 * mins + secs
    assert minutes(f"{days}-{hours}:{mins}:{secs}") == up(seconds)


@pytest.mark.parametrize("text", ["", "4h", "1:2:3:4", "1-2:3:4:5", "-5", "1.5", "1:", "1--2", "x"])
def test_other_time_limits_are_refused(text):
    with pytest.raises(ConfigError, match=r"hydra\.launcher\.time must be minutes, .*got") as error:
        minutes(text)
    assert "\n" not in str(error.value)


def test_a_bad_limit_of_a_run_is_named_by_its_own_key():
    config = nano_config()
    config.resources.time = "4h"
    with pytest.raises(ConfigError, match=r"^resources\.time must be minutes, .*got '4h'"):
        shape_of(config, SlurmOptions())


def test_small_runs_share_jobs(submit, slurm, out):
    submit(range(5), runs_per_job=2, cpus_per_task=3)
    one, short = read_submissions(plan_folder(out, name="s") / "jobs")
    assert sorted(map(len, one.tasks)) == [2, 2]
    assert Counter(job_ids(out).values()) == Counter(
        [*(f"{one.job_id}_{i}" for i, task in enumerate(one.tasks) for _ in task), short.job_id]
    )
    given_ = slurm.options(str(one.job_id))
    assert (given_["ntasks-per-node"], given_["cpus-per-task"]) == ("1", "6")
    given_ = slurm.options(str(short.job_id))  # what is left over asks for no more than it uses
    assert (given_["ntasks-per-node"], given_["cpus-per-task"]) == ("1", "3")


@pytest.mark.parametrize(
    ("runs", "options", "option", "asked", "waits_for_first"),
    [
        (6, {"runs_per_job": 4, "gpus_per_node": 4, "tasks_per_node": 1, "partition": "gpu"},
         "gpus-per-node", ["4", "2"], False),
        (5, {"runs_per_job": 2, "max_parallel": 4}, "cpus-per-task", ["8", "4"], True),
        (1, {"runs_per_job": 4, "max_parallel": 4}, "cpus-per-task", ["4"], False),  # a retry
    ],
)  # fmt: skip
def test_a_short_pack_asks_for_no_more_than_its_runs(
    submit, slurm, runs, options, option, asked, waits_for_first
):
    submit(range(runs), **options)
    first, *rest = [slurm.options(base) for base in sorted(arrays(slurm), key=int)]
    assert [one[option] for one in (first, *rest)] == asked
    assert ["dependency" in one for one in rest] == [waits_for_first] * len(rest)


def test_the_script_holds_every_option(submit, slurm):
    submit(
        [0],
        partition="gpu", account="a b", qos="high", constraint="a100&ib", reservation="r1",
        time="1-02", gpus_per_node=2, cpus_per_task=5, mem_gb=1.5, exclusive=True,
        signal_delay_s=90, mail_type="END,FAIL", mail_user="me@x.org", dependency="afterok:7",
        extra={"licenses": "x", "hold": True}, setup=["module load cuda"],
        teardown=["echo bye"], srun_args=["--cpu-bind=none"], python="box exec i.sif python",
    )  # fmt: skip
    (job_id,) = slurm.jobs()
    given_, text = slurm.options(job_id), slurm.script(job_id)
    expected = {
        "partition": "gpu", "account": "a b", "qos": "high", "constraint": "a100&ib",
        "reservation": "r1", "time": "1560", "gpus-per-node": "2", "ntasks-per-node": "2",
        "cpus-per-task": "5", "mem": "1536M", "exclusive": "", "mail-type": "END,FAIL",
        "mail-user": "me@x.org", "dependency": "afterok:7", "licenses": "x", "hold": "",
        "requeue": "", "open-mode": "append", "signal": "USR2@90", "nodes": "1",
    }  # fmt: skip
    assert expected.items() <= given_.items()
    assert "wckey" not in given_
    lines = text.splitlines()
    order = ("module load cuda", "srun ", "sweeps.job --after", "echo bye")
    at = [next(n for n, line in enumerate(lines) if word in line) for word in order]
    assert at == sorted(at)
    assert "--cpu-bind=none" in lines[at[1]]
    assert "box exec i.sif python -m sweeps.job " in lines[at[1]]
    assert "box exec i.sif python -m sweeps.job --after" in lines[at[2]]


def test_an_option_of_sbatch_with_a_name_here_is_ours_however_it_is_spelt(submit, slurm):
    extra = {"ntasks-per-node": 2, "mem": "64G", "cpus_per_task": 8, "time": "2:00:00"}
    more = {"gpus-per-node": "a100:4", "dependency": "afterok:7"}
    submit([0], extra={**extra, **more}, qos="high", gpus_per_node=1, partition="gpu")
    (job_id,) = slurm.jobs()
    expected = {
        "ntasks-per-node": "2", "mem": "65536M", "cpus-per-task": "8", "time": "120",
        "gpus-per-node": "a100:4", "dependency": "afterok:7", "qos": "high",
    }  # fmt: skip
    assert expected.items() <= slurm.options(job_id).items()
    text = slurm.script(job_id)
    assert [text.count(f"#SBATCH --{name}") for name in expected] == [1] * len(expected)
    assert f"export {GPUS}=4\n" in text
    submit([(1, ResourcesConfig(gpus_per_node=2, time="9"))], extra={**extra, "qos": "low"})
    mine = next(one for job in slurm.jobs() if (one := slurm.options(job))["qos"] == "low")
    assert (mine["gpus-per-node"], mine["time"], mine["mem"]) == ("2", "9", "65536M")


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"nodes": 2, "extra": {"nodes": 3}},
         "hydra.launcher.nodes=2 and hydra.launcher.extra.nodes=3 disagree: leave one out"),
        ({"partition": "gpu", "extra": {"partition": "main"}}, "disagree"),
        ({"mem_gb": 1.5, "extra": {"mem": "1G"}}, "disagree"),
        ({"extra": {"mem": "lots"}}, "hydra.launcher.extra.mem must be like 64G or 512M, got 'lo"),
        ({"extra": {"nodes": "2-4"}}, "hydra.launcher.extra.nodes must be an integer, got '2-4'"),
        ({"extra": {"job-name": "x"}},
         "hydra.launcher.extra.job-name must be left out, got 'x': by their own names"),
        ({"extra": {"signal": "USR1@60"}}, "hydra.launcher.signal_delay_s says when it comes"),
        ({"extra": {"no_requeue": True}}, "a killed run goes on only if"),
        ({"extra": {"requeue": False}}, "jobs are always requeued"),
        ({"extra": {"output": "x"}}, "have the logs"),
        ({"extra": {"error": "x"}}, "have the logs"),
        ({"extra": {"array": "0-3"}}, "hydra.launcher.max_parallel says how many"),
        ({"extra": {"clusters": "serial"}}, "SLURM_CLUSTERS tells all of them"),
        ({"extra": {"gres": ["a", "b"]}}, "hydra.launcher.extra.gres must be one value, got"),
        ({"extra": {"cpus-per-gpu": "x"}}, "cpus_per_gpu must be an integer, got 'x'"),
    ],
)  # fmt: skip
def test_options_of_sbatch_that_contradict_ours_are_refused(submit, slurm, options, line):
    with pytest.raises(ConfigError) as refused:
        submit([0], **options)
    assert line in str(refused.value)
    assert "\n" not in str(refused.value)
    assert not slurm.jobs()


def test_what_agrees_or_is_so_anyway_is_taken(submit, slurm):
    submit([0], time="2:00:00", nodes=2, extra={"time": "120", "nodes": 2, "requeue": True})
    asked = slurm.options(*slurm.jobs())
    assert (asked["time"], asked["nodes"], asked["requeue"]) == ("120", "2", "")


@pytest.mark.parametrize(
    ("options", "resources", "cores"),
    [
        ({}, {}, 6),
        ({"gpus_per_node": 2, "tasks_per_node": 1}, {}, 12),
        ({"gpus_per_node": 2, "runs_per_job": 3}, {}, 12),
        ({"gpus_per_node": 0, "partition": "main"}, {}, None),
        ({"cpus_per_task": 5}, {}, None),
        ({}, {"cpus_per_task": 4}, None),
    ],
)
def test_cores_for_each_gpu_take_the_place_of_our_default(submit, slurm, options, resources, cores):
    where = {"gpus_per_node": 1, "partition": "gpu", "extra": {"cpus_per_gpu": 6}}
    submit([(n, ResourcesConfig(**resources)) for n in range(3)], **{**where, **options})
    job_id = min(slurm.jobs())
    asked, text = slurm.options(job_id), slurm.script(job_id)
    assert asked["cpus-per-gpu"] == "6"
    assert ("cpus-per-task" in asked) == (cores is None)
    threads = f"export OMP_NUM_THREADS=${{SLURM_CPUS_PER_TASK:-{cores or 1}}}\n"
    assert threads in text
    assert ("SRUN_CPUS_PER_TASK" in text) == (cores is None)  # srun, too, takes one of the two


ANOTHER = {"str": "x", "int": 2, "float": 1e-6, "bool": True, "dict": {"a": "b"}, "list": ["x"]}
"""A value that is no option's default."""


def test_no_option_does_nothing(submit, slurm, tmp_path):
    """Whatever is changed, the jobs, their scripts or the answer are others than without it."""

    def outcome(name: str, **options):
        before, out = set(slurm.jobs()), tmp_path / name
        plain = {"gpus_per_node": 3, "runs_per_job": 3, "partition": "gpu", "time": "9"}
        try:
            submit(range(3), changes={"output_dir": str(out)}, **{**plain, **options})
        except ConfigError as error:
            return str(error)
        scripts = [slurm.script(job_id) for job_id in sorted(set(slurm.jobs()) - before)]
        files = out.glob("sweeps/s/jobs/*/submission.json")
        facts = [json.loads(path.read_text()) for path in sorted(files)]
        facts = [(one["max_stalled"], one["signal_delay_s"], one["waits_for"]) for one in facts]
        return re.sub(rf"s\.[0-9a-f]{{8}}|jobs/[0-9a-f]{{8}}|{out}", "", repr((scripts, facts)))

    plain = outcome("plain")
    assert "#SBATCH" in plain
    assert outcome("again") == plain
    for option in dataclasses.fields(SlurmOptions):
        kind = re.split(r"\W", str(option.type))[0]
        value = {"time": "8"}.get(option.name, ANOTHER[kind])
        assert outcome(option.name, **{option.name: value}) != plain, option.name


NAMES = ["plain", 'it\'s 3 "dirs"', "$HOME `id` $(id) & # ; | *", "back\\slash é~"]


@pytest.mark.parametrize("name", NAMES)
def test_odd_paths_survive_the_shell_on_the_node(submit, slurm, python, tmp_path, name):
    runs = 1 + NAMES.index(name) % 2  # a job of its own, or an array
    path, words = python
    out = tmp_path / name
    submit(range(runs), changes={"output_dir": str(out)}, python=shlex.quote(str(path)))
    (base,) = arrays(slurm)
    text = slurm.script(base)
    assert subprocess.run(["bash", "-n"], input=text, text=True, check=False).returncode == 0
    slurm.run(base)
    (file,) = out.glob("sweeps/s/jobs/*/submission.json")
    (frozen,) = out.glob("sweeps/s/code/*")
    seen = words()
    assert [w[2:] for w in seen] == [
        ["-m", "sweeps.job", str(file)],
        ["-m", "sweeps.job", "--after", "0", str(file)],
    ] * runs
    assert all(w[0].split(os.pathsep)[0] == str(frozen) for w in seen)
    assert {job["state"] for job in slurm.jobs().values()} == {"COMPLETED"}
    assert len(list(file.parent.glob("*log.out"))) == runs


@pytest.mark.parametrize("setup", [[], ["set -eu"]])
def test_the_jobs_exit_code_is_that_of_the_run(submit, slurm, python, setup):
    path, words = python
    submit([0], python=shlex.quote(str(path)), setup=setup, teardown=["true"])
    (job_id,) = slurm.jobs()
    slurm.run(job_id, CODE="137")
    assert words()[1][4:6] == ["--after", "137"]
    assert slurm.jobs()[job_id]["state"] == "FAILED"
