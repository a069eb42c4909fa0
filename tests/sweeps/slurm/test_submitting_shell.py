"""The shell of the user, a site's wrapper of sbatch and the set-up on the node change no job."""

from __future__ import annotations

import os
import shlex
from pathlib import Path

import pytest
from submitting import arrays, forget_job_ids, job_ids

from experiments.disk.output_dir import all_runs, plan_folder
from sweeps.slurm import sbatch as submit_module
from sweeps.slurm.submission import read_submissions
from sweeps.slurm.survey import survey

# the user's shell ---------------------------------------------------------------------------------
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


# set-up and what the node sees --------------------------------------------------------------------
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
