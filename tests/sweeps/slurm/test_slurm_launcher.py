"""What is submitted, and that nothing is submitted twice, whatever happens in between."""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import functools
import io
import json
import os
import re
import shlex
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rich.console import Console
from submitit import SlurmExecutor

from experiments.disk.output_dir import all_runs, plan_folder
from experiments.disk.run_dir import RunDir
from relora_core.config import (
    CheckpointConfig,
    ConfigError,
    ResourcesConfig,
    TrackingConfig,
    TrainConfig,
)
from sweeps import snapshot
from sweeps.__main__ import main
from sweeps.launch import relaunch, run_sweep
from sweeps.launchers import load_launcher, store_launcher
from sweeps.planning.budget import Estimate
from sweeps.planning.plan import load, make_plan
from sweeps.slurm import cluster, evals
from sweeps.slurm import sbatch as submit_module
from sweeps.slurm.batches import batches
from sweeps.slurm.launcher import SlurmLauncher
from sweeps.slurm.options import SlurmOptions, check_cell, check_options, minutes, shape_of
from sweeps.slurm.searches import submit_search
from sweeps.slurm.submission import read_submissions
from sweeps.slurm.survey import survey

CPU = {"gpus_per_node": 0, "partition": "main"}
BIG = ResourcesConfig(cpus_per_task=8)
HUGE = ResourcesConfig(nodes=2)


def submit_evals(requests: Sequence[Path], *, sweep: str, output_dir: Path, after: bool) -> None:
    launcher = load_launcher(plan_folder(output_dir, name=sweep))
    evals.submit_evals(requests, sweep=sweep, launcher=launcher, output_dir=output_dir, after=after)


@pytest.fixture
def code(tmp_path, monkeypatch):
    """A project of one file, so that freezing it takes no time."""
    root = tmp_path / "project"
    root.mkdir()
    (root / "run.py").write_text("print('code')\n")
    for name in ("freeze", "record"):
        monkeypatch.setattr(snapshot, name, functools.partial(getattr(snapshot, name), root=root))
    return root


@pytest.fixture
def submit(make, code):
    """run_sweep over seeds, or (seed, resources), as sweep `s`; (exit code, printed text)."""

    def sweep(runs, *, plan_only=False, changes=None, **options):
        points = []
        for run in runs:
            seed, resources = run if isinstance(run, tuple) else (run, ResourcesConfig())
            config = make(seed=seed, resources=resources, **(changes or {}))
            config.model.vocab_size, config.sweep.name = None, "s"
            points.append(({"seed": str(seed)}, config))
        sweep.console = console = Console(file=io.StringIO(), width=400)
        launcher = SlurmLauncher(options=SlurmOptions(**{**CPU, **options}))
        done = run_sweep(points, launcher=launcher, plan_only=plan_only, console=console)
        return done, console.file.getvalue()  # type: ignore[attr-defined]

    return sweep


@pytest.fixture
def out(tmp_path):
    return tmp_path / "out"


def arrays(slurm) -> Counter[str]:
    """Base id -> number of tasks."""
    return Counter(job_id.partition("_")[0] for job_id in slurm.jobs())


def job_ids(out) -> dict[int, str | None]:
    """Seed -> job."""
    return {run.config().seed: run.status().job_id for run in all_runs(out)}


def tree(folder):
    return sorted(folder.rglob("*")) if folder.exists() else []


# what is asked for ------------------------------------------------------------------------------
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


@pytest.fixture
def python(tmp_path):
    """Stands for Python on the node: writes down its words, and ends as the test wants it to."""
    path, log = tmp_path / "a python", tmp_path / "words.jsonl"
    path.write_text(
        "#!/bin/sh\n"
        f'exec /usr/bin/env -u PYTHONPATH SEEN="$PYTHONPATH" python3 -S -c \''
        "import json, os, sys; "
        f'print(json.dumps([os.environ["SEEN"], *sys.argv[1:]]), file=open(sys.argv[1], "a")); '
        'sys.exit(int(os.environ.get("CODE", 0)) if "--after" not in sys.argv else '
        "int(sys.argv[5]))' "
        f'{shlex.quote(str(log))} "$@"\n'
    )
    path.chmod(0o755)
    log.touch()
    return path, lambda: [json.loads(line) for line in log.read_text().splitlines()]


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


# the user's shell -------------------------------------------------------------------------------
PARENT = {
    "SLURM_JOB_ID": "14", "SLURM_ARRAY_JOB_ID": "12", "SLURM_ARRAY_TASK_ID": "3",
    "SLURM_ARRAY_TASK_COUNT": "9", "SLURM_CPU_BIND": "quiet,mask_cpu:0x1",
    "SLURM_CPU_BIND_LIST": "0x1", "SLURM_MEM_PER_CPU": "100", "SLURM_EXPORT_ENV": "NONE",
    "SLURM_STEP_ID": "0", "SLURM_GPUS_PER_NODE": "2", "SRUN_DEBUG": "3", "SALLOC_TIMELIMIT": "5",
    "SUBMITIT_EXECUTOR": "slurm", "CUDA_VISIBLE_DEVICES": "5", "RELORA_JOB": "other/12_3",
}  # fmt: skip
GROUP = {
    "WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1", "MASTER_ADDR": "n1", "MASTER_PORT": "29500",
    "TORCHELASTIC_RUN_ID": "x", "ACCELERATE_MIXED_PRECISION": "no", "PMI_RANK": "1",
}  # fmt: skip


def shell(monkeypatch, **variables):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)


def notes(capsys) -> list[str]:
    return [n for n in capsys.readouterr().err.splitlines() if n.startswith("of this shell's")]


def test_options_in_the_profile_beat_nothing(submit, slurm, monkeypatch, capsys):
    profile = {"SBATCH_PARTITION": "gpu", "SBATCH_TIMELIMIT": "1", "SBATCH_JOB_NAME": "mine"}
    shell(monkeypatch, **profile)
    assert submit([0, 1])[0] == 0
    (base,) = arrays(slurm)
    given_ = slurm.options(base)
    assert (given_["partition"], given_["time"]) == ("main", "60")
    assert {job["name"].partition(".")[0] for job in slurm.jobs().values()} == {"s"}
    assert not profile.keys() & slurm.environ(base).keys()
    assert notes(capsys) == [
        "of this shell's variables the jobs do not take SBATCH_JOB_NAME, SBATCH_PARTITION, "
        "SBATCH_TIMELIMIT"
    ]


def test_a_job_name_in_the_profile_costs_no_job(submit, slurm, out, monkeypatch):
    """The launcher was killed before it wrote the id down: the job is found by its name."""
    shell(monkeypatch, SBATCH_JOB_NAME="mine")
    submit([0, 1])
    forget_job_ids(out)
    assert "nothing to submit" in submit([0, 1])[1]
    assert list(arrays(slurm).values()) == [2]


@pytest.mark.parametrize("own", [None, "ours"])
def test_a_sites_option_counts_where_the_launcher_has_none(submit, slurm, monkeypatch, capsys, own):
    shell(monkeypatch, SBATCH_ACCOUNT="grant", SBATCH_PARTITION="gpu", SBATCH_QOS="")
    submit([0], account=own, partition=None, plan_only=True)
    (planned_line,) = notes(capsys)
    submit([0], account=own, partition=None)
    (job_id,) = slurm.jobs()
    given_ = slurm.options(job_id)
    assert (given_["account"], given_["partition"]) == (own or "grant", "gpu")
    assert "qos" not in given_
    (line,) = notes(capsys)
    assert line == planned_line
    assert "SBATCH_PARTITION=gpu (hydra.launcher.partition is not set)" in line
    assert ("do not take SBATCH_ACCOUNT" in line) == (own is not None)
    assert ("SBATCH_ACCOUNT=grant (hydra.launcher.account is not set)" in line) == (own is None)
    assert "QOS" not in line


def test_extra_options_count_as_asked_for(submit, slurm, monkeypatch):
    shell(monkeypatch, SBATCH_ACCOUNT="grant")
    submit([0], extra={"account": "ours"})
    (job_id,) = slurm.jobs()
    assert slurm.options(job_id)["account"] == "ours"


def test_a_command_inside_a_job_hands_nothing_of_it_on(submit, slurm, monkeypatch, capsys):
    # a whole group, or half of one, is refused before (`relora_core/shell.py`)
    stray = {k: v for k, v in GROUP.items() if k not in ("RANK", "LOCAL_RANK", "PMI_RANK")}
    shell(monkeypatch, **PARENT, **stray, SLURM_CONF="/etc/site.conf", OURS="stays")
    submit([0])
    (job_id,) = slurm.jobs()
    environ = slurm.environ(job_id)
    assert not (PARENT | stray).keys() & environ.keys()
    assert (environ["SLURM_CONF"], environ["OURS"]) == ("/etc/site.conf", "stays")
    (line,) = notes(capsys)
    assert "nothing of the job 14 around this command" in line
    assert "MASTER_PORT" in line
    assert os.environ["SLURM_JOB_ID"] == "14"  # nothing of ours is changed


def test_without_a_job_around_a_choice_of_gpus_is_the_users(submit, slurm, monkeypatch, capsys):
    shell(monkeypatch, CUDA_VISIBLE_DEVICES="1")
    submit([0])
    (job_id,) = slurm.jobs()
    assert slurm.environ(job_id)["CUDA_VISIBLE_DEVICES"] == "1"
    assert notes(capsys) == []


@pytest.mark.parametrize("runs", [1, 2])
def test_a_job_clears_what_is_not_its_own(submit, slurm, tmp_path, runs):
    """Whatever brought it there: a site's wrapper of sbatch, or a script submitted by hand."""
    stand_in, seen = tmp_path / "python", tmp_path / "seen"
    seen.mkdir()
    stand_in.write_text(f'#!/bin/sh\nenv > {seen}/"${{SLURM_ARRAY_TASK_ID:-x}}"\n')
    stand_in.chmod(0o755)
    mine = "export MASTER_PORT=1 SLURM_CPU_BIND=none RUN=$RELORA_JOB"  # of the user's: stays
    last = f"echo $RELORA_JOB > {seen}/z"
    submit(range(runs), python=str(stand_in), setup=[mine], teardown=[last], mem_gb=1.0)
    (base,) = arrays(slurm)
    leaks = {k: v for k, v in (PARENT | GROUP).items() if k not in ("SLURM_JOB_ID", "PMI_RANK")}
    if runs > 1:  # SLURM's own
        leaks = {k: v for k, v in leaks.items() if not k.startswith("SLURM_ARRAY_")}
    slurm.run(base, **leaks)
    assert {job["state"] for job in slurm.jobs().values()} == {"COMPLETED"}
    name = next(iter(slurm.jobs().values()))["name"]
    for task in ["x"] if runs == 1 else ["0", "1"]:
        got = dict(line.split("=", 1) for line in (seen / task).read_text().splitlines())
        assert got["RELORA_JOB"] == f"{name}/{base}" + ("" if runs == 1 else f"_{task}")
        cleared = ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR", "TORCHELASTIC_RUN_ID",
                   "ACCELERATE_MIXED_PRECISION", "SLURM_MEM_PER_CPU", "SLURM_EXPORT_ENV",
                   "SLURM_CPU_BIND_LIST")  # fmt: skip
        assert not set(cleared) & got.keys()
        assert (got["MASTER_PORT"], got["SLURM_CPU_BIND"], got["RUN"]) == ("1", "none", "")
    assert (seen / "z").read_text() == "\n"


# behind a site's wrapper --------------------------------------------------------------------------
ANSWERS = {
    "a number": 'real "$@" | grep -o "[0-9]*$"',
    "a banner": 'echo "Welcome: job 1 of 50"; echo 99; real "$@"',
    "a banner and a number": 'echo "you have used 1 of 50"; echo 7; real "$@" | grep -o "[0-9]*$"',
    "two sentences": 'echo "Submitted batch job 1"; real "$@"',
    "nothing": 'real "$@" > /dev/null',
    "a failure": 'real "$@"; echo "mail: no such user" >&2; exit 1',
    "on stderr": 'real "$@" >&2',
    "a cluster": 'real "$@" | sed "s/$/ on cluster main/"',
}


@pytest.fixture
def wrapped(tmp_path, monkeypatch, slurm):
    """sbatch behind a script of the site's."""

    def go(body: str) -> None:
        place = tmp_path / "site"
        place.mkdir()
        real = shlex.quote(str(slurm.folder / "bin" / "sbatch"))
        script = (
            "#!/bin/bash\n"
            f'real() {{ {real} "$@"; }}\n'
            'for word; do [ "$word" = --test-only ] && { real "$@"; exit; }; done\n'
        )
        (place / "sbatch").write_text(script + body + "\n")
        (place / "sbatch").chmod(0o755)
        monkeypatch.setenv("PATH", str(place), prepend=os.pathsep)

    return go


@pytest.mark.parametrize("answer", ANSWERS)
def test_whatever_a_wrapper_prints_a_job_is_submitted_once(submit, slurm, out, wrapped, answer):
    wrapped(ANSWERS[answer])
    done, text = submit([0, 1])
    assert done == 0, text
    assert list(arrays(slurm).values()) == [2]
    assert set(job_ids(out).values()) == set(slurm.jobs())
    assert "nothing to submit" in submit([0, 1])[1]
    assert list(arrays(slurm).values()) == [2]


@pytest.mark.parametrize("body", ['echo "job 1 of 50"', "echo 17", "true", "exit 3"])
def test_what_slurm_surely_does_not_know_is_refused(submit, slurm, out, wrapped, body):
    slurm.add("17", name="another", state="RUNNING")
    wrapped(body)
    done, text = submit([0])
    assert done == 1
    assert "sbatch refused job array 1 of 1" in text
    assert ("SLURM knows no job 's." in text) == (body != "exit 3")
    assert set(slurm.jobs()) == {"17"}
    (out.parent / "site" / "sbatch").unlink()
    assert submit([0])[0] == 0
    assert len(slurm.jobs()) == 2


def test_in_doubt_and_without_an_answer_nothing_is_submitted_again(submit, slurm, out, wrapped):
    wrapped(ANSWERS["a number"])
    slurm.fail("squeue", "Unable to contact slurm controller")
    done, text = submit([0])
    assert done == 1
    assert "sbatch may have taken job array 1 of 1" in text
    (one,) = read_submissions(plan_folder(out, name="s") / "jobs")
    assert (one.state, one.job_id) == ("submitting", None)
    slurm.heal()
    assert "nothing to submit" in submit([0])[1]
    assert list(slurm.jobs()) == list(job_ids(out).values())


# set-up and what the node sees ------------------------------------------------------------------
def slurm_log(out) -> str:
    return "".join(path.read_text() for path in sorted(out.rglob("*_log.out")))


@pytest.mark.parametrize(
    ("lines", "code"),
    [
        (["false"], 1),
        (["export A=1", "no-such-command-here", "true"], 127),
        (["load() { return 3; }", "load x"], 3),
        (["true\nfalse\ntrue"], 1),
        (["set -e", "false"], 1),
        (["[[ -n $NOT_THERE ]] && echo it is", "fine() { false; true; }", "fine",
          "if false; then", "true", "fi", "false || true", "set -eu"], 0),
        ([". <(echo false; echo true)"], 0),  # a profile may hold commands that fail
    ],
)  # fmt: skip
def test_a_line_of_setup_that_fails_fails_the_job(submit, slurm, out, python, lines, code):
    path, words = python
    submit([0], python=shlex.quote(str(path)), setup=lines)
    (job_id,) = slurm.jobs()
    slurm.run(job_id)
    assert slurm.jobs()[job_id]["state"] == ("FAILED" if code else "COMPLETED")
    if code:
        assert words() == []  # nothing was begun
        assert f"hydra.launcher.setup failed with exit code {code}: " in slurm_log(out)
    (state,) = survey(all_runs(out)).values()
    assert state.state == "failed"


@pytest.mark.parametrize(
    "line", ["export PYTHONPATH=/elsewhere PYTHONSAFEPATH=", "unset PYTHONPATH PYTHONSAFEPATH"]
)
def test_setup_cannot_displace_the_frozen_code(submit, slurm, out, tmp_path, line):
    stand_in, seen = tmp_path / "stand-in", tmp_path / "seen"
    stand_in.write_text(f'#!/bin/sh\necho "$PYTHONSAFEPATH $PYTHONPATH" > {seen}\n')
    stand_in.chmod(0o755)
    submit([0], python=str(stand_in), setup=[line])
    (job_id,) = slurm.jobs()
    slurm.run(job_id)
    safe, _, folders = seen.read_text().strip().partition(" ")
    first, *more = folders.split(":")
    assert (safe, Path(first).parent) == ("1", plan_folder(out, name="s") / "code")
    assert (more == ["/elsewhere"]) == line.startswith("export")


@pytest.mark.parametrize("what", ["code", "submission.json"])
def test_a_node_that_does_not_see_the_folder_says_so(submit, slurm, out, python, what):
    path, words = python
    submit([0], python=shlex.quote(str(path)))
    (job_id,) = slurm.jobs()
    (gone,) = out.glob("sweeps/s/code/*" if what == "code" else "sweeps/s/jobs/*/submission.json")
    gone.rename(gone.with_name("away"))
    slurm.run(job_id)
    assert slurm.jobs()[job_id]["state"] == "FAILED"
    assert words() == []
    assert f"does not see {gone}: output_dir must be on a shared file system" in slurm_log(out)


def test_a_python_that_the_node_does_not_see(submit, slurm, out, monkeypatch):
    monkeypatch.setattr(submit_module.sys, "executable", "/nowhere/python")
    submit([0])
    (job_id,) = slurm.jobs()
    slurm.run(job_id)
    log = slurm_log(out)
    assert "does not see /nowhere/python: this Python, or the one that hydra.launcher.python" in log


# the cap over several commands ------------------------------------------------------------------
def waits(slurm) -> dict[str, str | None]:
    return {base: slurm.options(base).get("dependency") for base in arrays(slurm)}


def test_the_cap_is_the_sweeps_not_a_commands(submit, slurm):
    _, text = submit(range(4), max_parallel=2)
    assert "in flight" not in text
    (first,) = arrays(slurm)
    _, text = submit(range(6), max_parallel=2)
    second = max(arrays(slurm), key=int)
    assert f"max_parallel=2: 2 at a time are in flight, these wait for jobs {first}" in text
    assert (waits(slurm)[second], slurm.options(second)["array"]) == (f"afterany:{first}", "0-1%2")
    slurm.set_state(first, "COMPLETED")
    submit([*range(6), 6], max_parallel=2)
    third = max(arrays(slurm), key=int)
    assert waits(slurm)[third] == f"afterany:{second}"


def test_what_the_cap_leaves_is_used(submit, slurm):
    submit(range(4), max_parallel=3)
    (first,) = arrays(slurm)
    for task in (0, 1):
        slurm.set_state(f"{first}_{task}", "COMPLETED")
    _, text = submit([*range(2, 4), 10, 11], max_parallel=3)  # two are left of the first four
    second = max(arrays(slurm), key=int)
    assert "max_parallel=3: 2 at a time are in flight, these are 1" in text
    assert (waits(slurm)[second], slurm.options(second)["array"]) == (None, "0-1%1")


def test_a_lane_counts_once(submit, slurm):
    """Two arrays one after another are never at work together."""
    submit([0, 1, (2, BIG), (3, HUGE)], max_parallel=2)
    submit([4], max_parallel=3)
    last = max(arrays(slurm), key=int)
    assert waits(slurm)[last] is None


def test_packs_count_by_their_runs(submit, slurm):
    submit(range(4), max_parallel=4, runs_per_job=2)
    (first,) = arrays(slurm)
    slurm.set_state(f"{first}_0", "COMPLETED")
    submit(range(4, 8), max_parallel=4, runs_per_job=2)
    second = max(arrays(slurm), key=int)
    assert (waits(slurm)[second], slurm.options(second)["array"]) == (None, "0-1%1")


def test_a_dependency_of_the_users_stays(submit, slurm):
    submit([0], max_parallel=1)
    (first,) = arrays(slurm)
    submit([1], max_parallel=1, dependency="afterok:7")
    assert waits(slurm)[max(arrays(slurm), key=int)] == f"afterok:7,afterany:{first}"


def test_a_search_counts_too(submit, slurm, out, make):
    submit([0, 1], max_parallel=2)
    (first,) = arrays(slurm)
    study = plan_folder(out, name="s") / "study"
    console = Console(file=io.StringIO(), width=400)
    launcher = SlurmLauncher(options=SlurmOptions(**CPU, max_parallel=2))
    submit_search(launcher, study, left=3, config=make(), console=console)
    second = max(arrays(slurm), key=int)
    assert (waits(slurm)[second], slurm.options(second)["array"]) == (f"afterany:{first}", "0-2%2")
    slurm.set_state(first, "COMPLETED")
    slurm.set_state(f"{second}_0", "COMPLETED")
    slurm.set_state(f"{second}_1", "FAILED")
    submit_search(launcher, study, left=3, config=make(), console=console)
    third = max(arrays(slurm), key=int)
    assert (waits(slurm)[third], slurm.options(third)["array"]) == (None, "0-1%1")
    assert f"watch: python -m sweeps search s --output-dir {out}" in console.file.getvalue()


def test_a_site_without_arrays_gets_jobs_of_one(submit, slurm, out, make):
    slurm.config(max_array_size=0)
    assert submit([0, 1, 2], max_parallel=2)[0] == 0
    jobs = sorted(slurm.jobs(), key=int)
    assert [slurm.options(job).get("array") for job in jobs] == [None] * 3
    assert [waits(slurm)[job] for job in jobs] == [None, None, f"afterany:{jobs[0]}"]
    launcher = SlurmLauncher(options=SlurmOptions(**CPU))
    study = plan_folder(out, name="t") / "study"
    submit_search(launcher, study, left=3, config=make(), console=Console(file=io.StringIO()))
    assert len(slurm.jobs()) == 6


def test_the_printed_watch_line_works(submit, slurm, out, monkeypatch):
    _, text = submit([0])
    (line,) = [line for line in text.splitlines() if line.startswith("watch: ")]
    words = shlex.split(line.removeprefix("watch: "))
    assert words[:3] == ["python", "-m", "sweeps"]
    monkeypatch.chdir("/")
    slurm.set_state("102", "FAILED")
    assert main([*words[3:], "--once"]) == 1  # as the run has failed


def test_a_time_beyond_the_partitions_limit_is_refused(submit, slurm, out):
    slurm.config(limit="0:30:00")
    message = r"time must be <= 0:30:00 \(the limit of partition main\), got 60 min: .*valid: 30$"
    with pytest.raises(ConfigError, match=message):
        submit([0])
    assert not out.exists()
    assert submit([0], time="30")[0] == 0
    assert submit([0, 1], qos="long")[0] == 0  # which may allow more


# submitted once ---------------------------------------------------------------------------------
def test_submitting_twice_submits_nothing(submit, slurm, out):
    submit([0, 1])
    before, calls = slurm.jobs(), len(slurm.calls("sbatch"))
    done, text = submit([0, 1])
    assert (done, slurm.jobs()) == (0, before)
    assert "2 runs are done or in flight: nothing to submit" in text
    real = [c for c in slurm.calls("sbatch")[calls:] if "--test-only" not in c]
    assert real == []


@pytest.mark.parametrize("end", ["FAILED", "CANCELLED"])
def test_failed_and_cancelled_runs_are_submitted_again(submit, slurm, out, end):
    submit([0, 1, 2])
    lost = RunDir(next(r.path for r in all_runs(out) if r.config().seed == 1))
    job_id = str(lost.status().job_id)
    lost.cancel_path.touch()
    slurm.set_state(job_id, end)
    assert submit([0, 1, 2])[0] == 0
    assert sorted(arrays(slurm).values()) == [1, 3]
    assert lost.status().job_id not in (None, job_id)
    assert (lost.status().state, lost.cancel_path.exists()) == ("queued", False)


def test_done_runs_are_left_alone(submit, slurm, out):
    submit([0, 1])
    for run in all_runs(out):
        run.write_result({"state": "finished", "step": 4, "metrics": {}})
        run.update_status(state="finished")
    slurm.set_state(next(iter(arrays(slurm))), "COMPLETED")
    submit([0, 1, 2])
    assert sorted(arrays(slurm).values()) == [1, 2]


def test_retry_launches_as_before(submit, slurm, out):
    submit([0, 1], partition="gpu", time="7")
    slurm.set_state(next(iter(arrays(slurm))), "FAILED")
    plan = load(plan_folder(out, name="s") / "plan.json")
    assert relaunch(plan, [plan.cells[0].run_id], output_dir=out) == 0
    new = [i for i, job in slurm.jobs().items() if job["state"] == "PENDING"]
    assert len(new) == 1
    assert (slurm.options(new[0])["partition"], slurm.options(new[0])["time"]) == ("gpu", "7")


def test_a_refusal_half_way_is_told_and_mended_by_the_same_command(submit, slurm, out):
    runs = [0, (1, BIG), (2, BIG), (3, HUGE)]
    refusal = "Batch job submission failed: Job violates accounting/QOS policy"
    slurm.fail("sbatch", refusal, at=5)  # three questions, then the second array
    done, text = submit(runs)
    assert done == 1
    assert "refused job array 2 of 3" in text
    assert "Job violates accounting/QOS policy" in text
    assert "1 runs are submitted and stay so, 3 are not" in text
    (first,) = slurm.jobs()
    assert f"submitted job {first}" in text
    assert job_ids(out) == {0: first, 1: None, 2: None, 3: None}
    states = survey(all_runs(out))
    assert Counter(s.state for s in states.values()) == {"queued": 1, "planned": 3}
    refused = [s for s in read_submissions(plan_folder(out, name="s") / "jobs") if s.error]
    assert [(s.state, s.job_id) for s in refused] == [("refused", None)]
    done, text = submit(runs)
    assert done == 0
    assert sorted(arrays(slurm).values()) == [1, 1, 2]
    assert job_ids(out)[0] == first


def test_a_time_out_after_acceptance_is_no_second_job(submit, slurm, out):
    slurm.fail("sbatch", "Socket timed out on send/recv operation", at=2, after=True)
    done, _ = submit([0, 1])
    assert (done, list(arrays(slurm).values())) == (0, [2])
    assert set(job_ids(out).values()) == set(slurm.jobs())


def test_a_busy_controller_is_asked_again(submit, slurm, out):
    for at in (2, 3):
        slurm.fail("sbatch", "Unable to contact slurm controller (connect failure)", at=at)
    done, _ = submit([0, 1])
    assert (done, list(arrays(slurm).values())) == (0, [2])
    assert set(job_ids(out).values()) == set(slurm.jobs())


def test_a_controller_that_stays_away_is_a_refusal(submit, slurm, out):
    for at in range(2, 7):
        slurm.fail("sbatch", "Unable to contact slurm controller (connect failure)", at=at)
    done, text = submit([0, 1])
    assert (done, slurm.jobs()) == (1, {})
    assert "0 runs are submitted and stay so, 2 are not" in text
    slurm.heal()
    assert submit([0, 1])[0] == 0
    assert list(arrays(slurm).values()) == [2]


class Killed(BaseException):
    """The command ends here and now."""


@pytest.fixture
def interrupt(monkeypatch):
    """sbatch of the `number`-th array raises `error`, after SLURM took the job, or before."""

    @contextlib.contextmanager
    def interrupting(error=KeyboardInterrupt, *, number=1, taken=True):
        real, left = SlurmExecutor._submit_command, [number]

        def submit_command(self, command):
            left[0] -= 1
            job = None if left[0] == 0 and not taken else real(self, command)
            if left[0]:
                return job
            raise error

        with monkeypatch.context() as patch:
            patch.setattr(SlurmExecutor, "_submit_command", submit_command)
            with pytest.raises(error):
                yield

    return interrupting


def forget_job_ids(out) -> None:
    """As if the command had been killed before it wrote down what SLURM said."""
    for file in out.glob("sweeps/s/jobs/*/submission.json"):
        lost = {**json.loads(file.read_text()), "state": "submitting", "job_id": None}
        file.write_text(json.dumps(lost))
    for run in all_runs(out):
        run.update_status(state="planned", job_id=None)


def test_ctrl_c_says_what_was_submitted_and_cancel_ends_it(submit, slurm, out, interrupt, capsys):
    with interrupt(number=2):
        submit([0, (1, BIG), (2, HUGE)])
    text = submit.console.file.getvalue()
    cancel = f"python -m sweeps cancel s --output-dir {out}"
    assert "Ctrl-C: 2 runs are submitted and go on, 1 are not: the same command submits" in text
    assert f"to end what is submitted: {cancel}" in text
    assert Counter(job_ids(out).values()) == Counter([*slurm.jobs(), None])
    assert main([*shlex.split(cancel)[3:], "--yes"]) == 0
    assert {job["state"] for job in slurm.jobs().values()} == {"CANCELLED"}
    assert "now: 2 cancelled" in capsys.readouterr().out


def test_ctrl_c_inside_the_sbatch_of_a_search(submit, slurm, out, make, interrupt, capsys):
    submit([0])
    launcher = SlurmLauncher(options=SlurmOptions(**CPU))
    study = plan_folder(out, name="s") / "study"
    with interrupt():
        submit_search(launcher, study, left=2, config=make(), console=Console(file=io.StringIO()))
    job_id = max(arrays(slurm), key=int)
    line = f"Ctrl-C: job {job_id} is submitted and goes on; to end it: python -m sweeps cancel s"
    assert line in capsys.readouterr().err
    assert main(["cancel", "s", "--yes", "--output-dir", str(out)]) == 0
    assert {job["state"] for job in slurm.jobs().values()} == {"CANCELLED"}


def test_a_search_without_a_trial_is_cancelled_by_its_name(submit, slurm, out, make, capsys):
    launcher = SlurmLauncher(options=SlurmOptions(**CPU))
    study = plan_folder(out, name="lr") / "study"
    submit_search(launcher, study, left=2, config=make(), console=Console(file=io.StringIO()))
    assert main(["cancel", "lr", "--yes", "--output-dir", str(out)]) == 0
    assert "to cancel: jobs that have no run yet\n" in capsys.readouterr().out
    assert {job["state"] for job in slurm.jobs().values()} == {"CANCELLED"}


def test_cancel_after_a_kill_inside_sbatch_finds_the_jobs(submit, slurm, out, interrupt, capsys):
    """Nothing was written down: no run knows that it is queued."""
    with interrupt(Killed):
        submit([0, 1])
    assert {run.status().state for run in all_runs(out)} == {"planned"}
    assert main(["cancel", "s", "--yes", "--output-dir", str(out)]) == 0
    assert {job["state"] for job in slurm.jobs().values()} == {"CANCELLED"}
    assert "now: 2 cancelled" in capsys.readouterr().out


def test_cancel_while_sbatch_may_still_be_heard_asks_its_jobs_to_end(
    submit, slurm, out, interrupt, monkeypatch, capsys
):
    monkeypatch.setattr(cluster, "PAUSE_S", 0.01)
    with interrupt(taken=False):
        submit([0, 1])
    assert main(["cancel", "s", "--yes", "--output-dir", str(out)]) == 0
    assert "2 runs: the command that submitted them was interrupted" in capsys.readouterr().out
    assert all(run.cancel_path.exists() for run in all_runs(out))
    monkeypatch.setattr("sweeps.slurm.submission.APPEARS_S", 0.0)
    assert main(["cancel", "s", "--yes", "--output-dir", str(out)]) == 0
    assert "nothing to cancel" in capsys.readouterr().out


def test_cancel_without_an_answer_does_not_say_that_there_is_nothing(submit, slurm, out, capsys):
    submit([0])
    forget_job_ids(out)
    slurm.fail("squeue", "Unable to contact slurm controller")
    assert main(["cancel", "s", "--yes", "--output-dir", str(out)]) == 1
    assert "there may be jobs of theirs" in capsys.readouterr().err


def test_an_old_job_is_not_taken_for_that_of_a_refused_submission(submit, slurm, out):
    submit([0])
    slurm.set_state("102", "FAILED")
    slurm.forget("102", by=["squeue", "scontrol", "sacct"])
    (run,) = all_runs(out)
    run.update_status(state="failed")
    slurm.fail("sbatch", "Batch job submission failed: Job violates accounting/QOS policy", at=2)
    assert submit([0])[0] == 1
    assert submit([0])[0] == 0
    assert len(slurm.jobs()) == 2


@pytest.mark.parametrize("accounting", [True, False])
def test_a_kill_before_the_job_id_is_written_down(submit, slurm, out, interrupt, accounting):
    slurm.config(accounting=accounting)
    with interrupt(Killed):
        submit([0, 1])
    assert len(slurm.jobs()) == 2
    assert set(job_ids(out).values()) == {None}
    done, text = submit([0, 1, 2])
    assert done == 0
    assert sorted(arrays(slurm).values()) == [1, 2]
    assert set(job_ids(out).values()) == set(slurm.jobs())
    assert "2 runs are done or in flight: 1 to submit" in text


def test_ctrl_c_before_sbatch_leaves_nothing_behind_that_blocks(submit, slurm, interrupt):
    with interrupt(taken=False):
        submit([0, 1])
    assert submit([0, 1])[0] == 0
    assert list(arrays(slurm).values()) == [2]


def test_no_answer_to_whether_runs_are_in_flight_submits_nothing(submit, slurm, interrupt):
    """A lost job id and a silent squeue: the job may exist."""
    with interrupt(Killed):
        submit([0])
    slurm.fail("squeue", "Unable to contact slurm controller (connect failure)")
    with pytest.raises(ConfigError, match=r"nothing was submitted: .*Unable to contact"):
        submit([0])
    slurm.heal()
    submit([0])
    assert len(slurm.jobs()) == 1


def test_two_commands_at_once_submit_once(submit, slurm, out):
    slurm.fail("sbatch", sleep=0.3, code=0)
    done = []
    threads = [threading.Thread(target=lambda: done.append(submit([0, 1]))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert [code for code, _ in done] == [0, 0]
    assert list(arrays(slurm).values()) == [2]
    assert sum("nothing to submit" in text for _, text in done) == 1


def _open_files():
    """Of this process, as os.stat has them."""
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):  # closed meanwhile
            yield os.fstat(int(name))


@pytest.mark.skipif(not os.path.exists("/proc/self/fd"), reason="only Linux lists open files")
def test_a_second_command_says_that_it_waits(submit, slurm, out):
    (out / "sweeps").mkdir(parents=True)
    done = []
    with open(out / "sweeps" / ".submit.lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        thread = threading.Thread(target=lambda: done.append(submit([0])))
        thread.start()
        lock, until = os.fstat(file.fileno()).st_ino, time.monotonic() + 120
        while [f.st_ino for f in _open_files()].count(lock) < 2:  # it has come to the lock
            assert thread.is_alive()
            assert time.monotonic() < until
            time.sleep(0.02)
        thread.join(timeout=1.0)
        assert thread.is_alive()
        assert slurm.jobs() == {}
    thread.join(timeout=60)
    assert "another command submits below this output_dir: waiting" in done[0][1]
    assert len(slurm.jobs()) == 1


# refused before anything is written -------------------------------------------------------------
LAUNCHER = r"hydra\.launcher\."


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"partition": "gpus"}, LAUNCHER + r"partition .*got 'gpus'\. Did you mean 'gpu'\?"),
        ({"gpus_per_node": 9, "tasks_per_node": 1}, r"gpus-per-node=9.*main has 2 nodes"),
        ({"time": "2", "signal_delay_s": 120}, LAUNCHER + r"time .*signal_delay_s=120.*: 7$"),
        ({"time": "4h"}, LAUNCHER + r"time must be minutes"),
        ({"tasks_per_node": 3}, r"train\.batch_size .* 3 processes .*got 2; nearest valid: 3"),
        ({"nodes": 0}, LAUNCHER + r"nodes must be >= 1, got 0; nearest valid: 1"),
        ({"max_parallel": 0}, LAUNCHER + r"max_parallel must be >= 1, got 0"),
        ({"signal_delay_s": -1}, LAUNCHER + r"signal_delay_s must be >= 0, got -1"),
        ({"runs_per_job": 2, "nodes": 2}, LAUNCHER + r"runs_per_job must be 1 for a run of"),
        ({"runs_per_job": 9, "gpus_per_node": 2, "tasks_per_node": 1, "gpu_memory_gb": 1e-3},
         LAUNCHER + r"runs_per_job must be <= \d+ .*got 9; nearest valid: \d+"),
    ],
)  # fmt: skip
def test_what_cannot_run_is_refused_and_nothing_written(submit, slurm, out, options, message):
    with pytest.raises(ConfigError, match=message) as error:
        submit([0, 1], **options)
    assert "\n" not in str(error.value)
    assert not out.exists()
    assert slurm.jobs() == {}


def test_a_runs_own_time_must_leave_room_for_saving(submit, slurm, out):
    with pytest.raises(ConfigError, match=r"resources\.time must be longer than .*120.* got '2'"):
        submit([0, (1, ResourcesConfig(time="2"))])
    assert not out.exists()


def test_a_clock_slower_than_the_time_limit_is_refused(submit, slurm, out):
    every = {"checkpoint": CheckpointConfig(every_minutes=30)}
    with pytest.raises(ConfigError, match=r"time must be longer than checkpoint\.every_minutes=30"):
        submit([0], time="20", changes=every)
    assert not out.exists()
    assert submit([0], time="61", changes=every)[0] == 0


@pytest.mark.parametrize(
    ("options", "devices"),
    [
        ({"gpus_per_node": 0}, 1),
        ({"gpus_per_node": 1}, 1),
        ({"gpus_per_node": 4, "tasks_per_node": 1}, 4),
        ({"gpus_per_node": 2}, 2),
        ({"gpus_per_node": 1, "runs_per_job": 4}, 0.25),
    ],
)
def test_a_checkpoint_interval_must_fit_into_the_time_limit(make, slurm, options, devices):
    """10 h on the clock for 1000 steps, a checkpoint every 500: 5 h; however many devices."""
    config = make(
        train=TrainConfig(steps=1000, batch_size=4), checkpoint=CheckpointConfig(every_steps=500)
    )
    plan = make_plan([({}, config)], name="s")
    cost = Estimate(hours=10 * devices, low=1, high=99, basis="test")
    for time_, good in (("4:50:00", False), ("5:10:00", True)):
        launcher = SlurmLauncher(options=SlurmOptions(time=time_, **options))
        context = pytest.raises(ConfigError, match=r"interval .*about 300 min\).* 301, or checkp")
        with contextlib.nullcontext() if good else context:
            launcher.check(plan, estimates={plan.cells[0].run_id: cost})


def test_a_snapshot_beyond_its_limit_is_refused(submit, slurm, code):
    (code / "conf").mkdir()
    (code / "conf" / "large.bin").write_bytes(b"0" * 1_200_000)
    with pytest.raises(ConfigError, match=r"snapshot_limit_mb must be at least 2.*large\.bin"):
        submit([0], snapshot_limit_mb=1.0)
    assert slurm.jobs() == {}
    assert submit([0], snapshot_limit_mb=2.0)[0] == 0


def test_an_output_dir_that_cannot_be_written_to(submit, slurm):
    with pytest.raises(ConfigError, match=r"output_dir must be a folder that can be written to"):
        submit([0], changes={"output_dir": "/proc/relora/out"})
    assert slurm.jobs() == {}


def test_a_disk_that_fills_up_while_submitting(submit, slurm, out, monkeypatch):
    """One line, and what SLURM took before is known to the next command."""
    real, left = RunDir.write_status, [1]  # the run is made; its job is not written down

    def full(self, status):
        left[0] -= 1
        if left[0] < 0:
            raise OSError(28, "No space left on device", str(self.status_path))
        real(self, status)

    with monkeypatch.context() as patch:
        patch.setattr(RunDir, "write_status", full)
        with pytest.raises(ConfigError, match=r"output_dir .*No space left on device"):
            submit([0])
        left[0] = 0
        with pytest.raises(ConfigError, match=r"No space left"):
            submit([0, 1])
    assert submit([0, 1])[0] == 0
    assert len(slurm.jobs()) == 2


def test_a_per_cent_sign_in_the_path_is_refused(submit, slurm, tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match=r"output_dir must hold no %"):
        submit([0], changes={"output_dir": str(tmp_path / "100%")})
    (tmp_path / "50%").mkdir()
    monkeypatch.chdir(tmp_path / "50%")
    with pytest.raises(ConfigError, match=r"output_dir must hold no %"):
        submit([0], changes={"output_dir": "out"})
    assert tree(tmp_path / "50%") == []
    assert not (tmp_path / "100%").exists()


def test_without_slurm_the_launcher_says_so(submit, slurm, out, monkeypatch):
    monkeypatch.setenv("PATH", "/nonexistent")
    with pytest.raises(ConfigError, match=r"hydra/launcher must be local here: slurm needs sbatch"):
        submit([0])
    assert not out.exists()


def test_the_plan_alone_writes_nothing_and_queues_nothing(submit, slurm, out):
    with pytest.raises(ConfigError, match=r"Did you mean 'gpu'\?"):
        submit([0], plan_only=True, partition="gpus")
    done, text = submit([0, (1, BIG)], plan_only=True)
    assert (done, slurm.jobs(), tree(out)) == (0, {}, [])
    assert "2 runs" in text
    assert all("--test-only" in call for call in slurm.calls("sbatch"))
    submit([0, 1])
    before, jobs = {p: p.stat().st_mtime_ns for p in tree(out)}, slurm.jobs()
    submit([0, 1, 2], plan_only=True)
    assert ({p: p.stat().st_mtime_ns for p in tree(out)}, slurm.jobs()) == (before, jobs)


def test_refusals_have_valid_neighbours():
    """What an error calls valid is."""
    for delay in (1, 59, 60, 61, 120, 1000):
        with pytest.raises(ConfigError) as error:
            check_options(SlurmOptions(time="0", signal_delay_s=delay))
        good = re.findall(r"nearest valid: (\d+)", str(error.value))[0]
        check_options(SlurmOptions(time=good, signal_delay_s=delay))


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(batch=st.integers(1, 64), nodes=st.integers(1, 4), tasks=st.integers(1, 5))
def test_a_batch_that_divides_is_offered(nano, batch, nodes, tasks):
    options = SlurmOptions(nodes=nodes, tasks_per_node=tasks)
    try:
        check_cell(nano(train={"batch_size": batch}), options)
    except ConfigError as error:
        assert batch % (nodes * tasks)
        good = int(re.findall(r"nearest valid: (\d+)", str(error))[0])
        check_cell(nano(train={"batch_size": good}), options)
    else:
        assert batch % (nodes * tasks) == 0


# evaluations ------------------------------------------------------------------------------------
@pytest.fixture
def requests(submit, slurm, out):
    """Of evaluations of a sweep of three runs, one of them finished."""
    submit([0, 1, (2, HUGE)])
    paths = []
    for run in all_runs(out):
        if run.config().seed == 0:
            run.write_result({"state": "finished", "step": 4, "metrics": {}})
        path = run.evals / "again" / "request.json"
        path.parent.mkdir(parents=True)
        path.write_text("{}")
        paths.append(path)
    return paths


def evaluations(out):
    """Submissions of evaluations, oldest first."""
    return [s for s in read_submissions(plan_folder(out, name="s") / "jobs") if s.kind == "eval"]


def test_evaluations_are_an_array_on_one_process_each(requests, slurm, out):
    before = job_ids(out)
    submit_evals(requests, sweep="s", output_dir=out, after=False)
    (one,) = evaluations(out)
    asked = slurm.options(str(one.job_id))
    assert arrays(slurm)[str(one.job_id)] == 3
    assert [out / name for (name,) in one.tasks] == requests
    assert (asked["nodes"], asked["ntasks-per-node"]) == ("1", "1")
    assert "dependency" not in asked
    assert job_ids(out) == before


def test_evaluations_wait_for_the_runs_that_are_in_flight(requests, slurm, out):
    before = job_ids(out)
    submit_evals(requests, sweep="s", output_dir=out, after=True)
    (one,) = evaluations(out)
    kind, *waits = slurm.options(str(one.job_id))["dependency"].split(":")
    assert kind == "afterany"
    assert sorted(waits) == sorted([str(before[1]), str(before[2])])


@pytest.mark.parametrize("after", [True, False])
def test_the_same_evaluations_are_queued_once(requests, slurm, out, capsys, after):
    submit_evals(requests, sweep="s", output_dir=out, after=after)
    submit_evals(requests, sweep="s", output_dir=out, after=after)
    (one,) = evaluations(out)
    assert "3 of 3 evaluations are queued already" in capsys.readouterr().out
    slurm.set_state(f"{one.job_id}_1", "FAILED")  # it may be asked for again
    submit_evals(requests, sweep="s", output_dir=out, after=after)
    assert evaluations(out)[-1].tasks == [one.tasks[1]]


def test_evaluations_that_would_come_too_early_do_not_count(requests, slurm, out):
    submit_evals(requests, sweep="s", output_dir=out, after=False)
    submit_evals(requests, sweep="s", output_dir=out, after=True)
    later = evaluations(out)[-1]
    assert len(later.tasks) == 2  # of the runs in flight: the first may begin before they end
    slurm.set_state(str(later.job_id), "RUNNING")
    submit_evals(requests, sweep="s", output_dir=out, after=True)
    assert len(evaluations(out)[-1].tasks) == 2


def test_the_cap_holds_for_evaluations_and_trainings_apart(requests, slurm, out):
    launcher = SlurmLauncher(options=SlurmOptions(**CPU, max_parallel=1))
    store_launcher(launcher, plan_folder(out, name="s"))
    submit_evals(requests[:1], sweep="s", output_dir=out, after=False)
    submit_evals(requests[1:], sweep="s", output_dir=out, after=False)
    first, second = evaluations(out)
    assert [one.waits_for for one in (first, second)] == [[], [first.job_id]]


def test_a_refused_evaluation_is_written_down_as_refused(requests, slurm, out):
    slurm.fail("sbatch", "Batch job submission failed: Invalid qos specification")
    with pytest.raises(cluster.SlurmError, match="Invalid qos"):
        submit_evals(requests, sweep="s", output_dir=out, after=False)
    (one,) = evaluations(out)
    assert (one.state, one.job_id) == ("refused", None)
    assert "Invalid qos" in (one.error or "")


def test_evaluations_of_a_local_sweep_are_refused(requests, out):
    Path(plan_folder(out, name="s") / "launcher.json").unlink()
    with pytest.raises(ConfigError, match=r"--slurm must be left out for s"):
        submit_evals(requests, sweep="s", output_dir=out, after=False)


def test_mlflows_part_begins_when_the_jobs_are_submitted_and_nobody_waits_for_it(
    submit, slurm, out, monkeypatch
):
    asked = []

    def start(words, **options):
        asked.append((words[3:], len(slurm.jobs()), options["start_new_session"]))

    def waits(*words, **options):
        raise AssertionError("submitting waits for a store")

    stand_in = SimpleNamespace(Popen=start, DEVNULL=subprocess.DEVNULL)
    monkeypatch.setattr("sweeps.slurm.launcher.subprocess", stand_in)
    monkeypatch.setattr("experiments.tracking.tracker.Tracker.bring_up_to_date", waits)
    done, text = submit([0, 1], changes={"tracking": TrackingConfig(enabled=True)})
    assert done == 0
    words = ["sweeps", "sync", "s", "--output-dir", out.absolute()]
    assert asked == [(words, 2, True)]
    assert f"(log: {out.absolute()}/logs/mlflow-sync.log)" in text
    submit([2], changes={"tracking": TrackingConfig(enabled=False)})
    assert len(asked) == 1
