"""`run.py --plan --measure`: what is timed, where, and what is left of it."""

import io
import os
import re
import signal
import sys
import threading
from pathlib import Path

import pytest
from rich.console import Console

import sweeps.slurm.timings as on_slurm
from experiments.disk.output_dir import all_runs
from relora_core.config import ConfigError
from sweeps import snapshot, timing
from sweeps.launch import run_sweep
from sweeps.local.launcher import LocalLauncher
from sweeps.planning.rates import read_rates
from sweeps.slurm.cluster import SlurmError
from sweeps.slurm.launcher import SlurmLauncher
from sweeps.slurm.options import SlurmOptions
from tests import warm
from tests.waiting import wait_for

ROOT = Path(__file__).resolve().parents[2]
FAKE = '''
"""Times a config in no time; the model's name says how that ends."""
import json, os, signal, sys, time
from pathlib import Path
file = Path(sys.argv[1])
name = json.loads(file.read_text())["model"]["name"]
log = Path(os.environ["FAKE_LOG"])
with log.open("a") as out:
    print(name, os.getpid(), os.environ.get("OMP_NUM_THREADS"), file=out)
if name.startswith("interrupt"):
    os.kill(os.getppid(), signal.SIGINT)
if name == "interrupted":  # as a terminal's Ctrl-C reaches it, too
    time.sleep(0.1)
    os.kill(os.getpid(), signal.SIGINT)
if name == "killed":
    os.kill(os.getpid(), signal.SIGKILL)
if name in ("interrupts", "hangs"):
    time.sleep(600)
if name == "broken":
    sys.exit("no such module")
result = {"device": "cpu", "steps": 10, "seconds": 2.0, "tokens": 320, "world": 1}
if name == "large":
    result = {"error": "OutOfMemoryError: CUDA out of memory"}
file.with_suffix(".result.json").write_text(json.dumps(result))
'''
WIDTHS = {
    "nano": 24,
    "large": 48,
    "killed": 72,
    "hangs": 96,
    "broken": 120,
    "interrupts": 144,
    "interrupted": 168,
}


@pytest.fixture
def fake(tmp_path, monkeypatch):
    """A process that times nothing; the lines (model, pid, threads) that such ones have left."""
    script, log = tmp_path / "fake_timing.py", tmp_path / "timed.txt"
    script.write_text(FAKE)
    monkeypatch.setenv("FAKE_LOG", str(log))
    monkeypatch.setattr(timing, "COMMAND", (sys.executable, "-S", str(script)))
    return lambda: [line.split() for line in log.read_text().splitlines()] if log.exists() else []


@pytest.fixture
def out(tmp_path):
    return tmp_path / "out"


@pytest.fixture
def plan(make):
    """`--plan --measure` of (model, seed) or models; the text that it prints."""

    def measure(*runs, launcher=None):
        points = []
        for run in runs:
            name, seed = run if isinstance(run, tuple) else (run, 0)
            config = make(seed=seed, steps=50_000_000)
            config.model.name, config.model.d_model = name, WIDTHS[name]
            config.model.vocab_size, config.sweep.name = None, "s"
            config.runtime.device = "cpu"
            points.append(({"model": name, "seed": str(seed)}, config))
        plan.console = Console(file=io.StringIO(), width=400)
        launcher = launcher or LocalLauncher()
        done = run_sweep(
            points, launcher=launcher, plan_only=True, measure=True, console=plan.console
        )
        assert done == 0
        return plan.console.file.getvalue()

    plan = measure
    return measure


def models(lines):
    return [line[0] for line in lines]


def test_each_shape_is_timed_once_and_prices_all_of_its_runs(plan, fake, out):
    text = plan(("nano", 0), ("nano", 1), ("nano", 2))
    assert models(fake()) == ["nano"]
    assert "timed seed=0: 160 tokens/s on cpu (10 steps)" in text
    assert "CPU-hours by 10 timed steps of nano on cpu, start and evals not counted" in text
    [rate] = read_rates(out)
    assert (rate.device, rate.timed_steps, rate.partition) == ("cpu", 10, None)


def test_what_has_been_timed_is_not_timed_again_but_with_other_code(plan, fake, monkeypatch):
    plan("nano")
    assert "nothing to time: the speed of every shape has been measured" in plan("nano")
    assert models(fake()) == ["nano"]
    for module in ("sweeps.measure", "sweeps.planning.rates"):
        monkeypatch.setattr(f"{module}.code_hash", lambda: "other")
    plan("nano")
    assert models(fake()) == ["nano", "nano"]


def test_no_run_is_recorded_and_no_file_but_the_rates_stays(plan, fake, out):
    plan("nano", "large")
    assert not all_runs(out)
    files = [path.relative_to(out) for path in out.rglob("*") if path.is_file()]
    assert {file.parts[:2] for file in files} == {(".measure", "rates")}
    assert len(files) == 1


@pytest.mark.parametrize(
    ("model", "why"),
    [
        ("large", "OutOfMemoryError: CUDA out of memory"),
        ("killed", "killed by SIGKILL, as a machine out of memory does"),
        ("broken", "no such module"),
    ],
)
def test_a_shape_that_cannot_be_timed_is_named_and_the_others_count(plan, fake, out, model, why):
    assert f"cannot time model={model}: {why}" in plan(model, "nano")
    assert [rate.label for rate in read_rates(out)] == ["nano"]


@pytest.mark.slow
def test_a_shape_that_hangs_is_given_up(plan, fake, monkeypatch):
    monkeypatch.setattr(timing, "EACH_S", 1.0)
    assert "cannot time test: not done after 1 s" in plan("hangs")


def test_it_has_the_threads_of_one_of_the_sweeps_runs(plan, fake, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)))
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    plan(*(("nano", seed) for seed in range(4)))
    assert fake()[0][2] == "2"


@pytest.mark.parametrize("interrupts", ["interrupts", "interrupted"])
def test_ctrl_c_leaves_no_process_and_nothing_half(plan, fake, out, interrupts):
    with pytest.raises(KeyboardInterrupt):
        plan("nano", interrupts, "large")
    assert models(fake()) == ["nano", interrupts]
    with pytest.raises(ProcessLookupError):
        os.kill(int(fake()[1][1]), 0)
    assert [rate.label for rate in read_rates(out)] == ["nano"]
    assert [path.name for path in (out / ".measure").iterdir()] == ["rates"]


# on SLURM
@pytest.fixture
def cluster(slurm, monkeypatch):
    """A SLURM launcher without GPUs, whose jobs run this very code."""
    monkeypatch.setattr(on_slurm, "POLL_S", 0.02)
    monkeypatch.setattr(snapshot, "freeze", lambda *_, **__: ROOT)
    return lambda **options: SlurmLauncher(
        options=SlurmOptions(**{"gpus_per_node": 0, "partition": "main", **options})
    )


@pytest.fixture
def when_queued(slurm):
    """Calls a function with the id of the first job, once it is queued."""
    threads = []

    def start(do):
        def watch():
            wait_for(lambda: slurm.jobs())
            do(next(iter(slurm.jobs())))

        threads.append(threading.Thread(target=watch))
        threads[-1].start()

    yield start
    for thread in threads:
        thread.join()


FAKE_JOB = """
import sys
from sweeps import job, timing
timing.COMMAND = {command!r}
sys.exit(job.main(sys.argv[1:]))
"""


def node(slurm, tmp_path):
    """A function that runs a job as a node would, whose timing processes are the fake ones."""
    script = tmp_path / "job.py"
    script.write_text(FAKE_JOB.format(command=timing.COMMAND))
    front = tmp_path / "python"
    front.write_text(f'#!/bin/sh\n[ "$1" = -m ] && shift 2\nexec {sys.executable} {script} "$@"\n')
    front.chmod(0o755)
    return str(front), slurm.run


@pytest.mark.slow
def test_one_short_job_with_the_sweeps_options_times_all_shapes(
    plan, fake, slurm, cluster, when_queued, out, tmp_path
):
    python, run = node(slurm, tmp_path)
    when_queued(run)
    launcher = cluster(python=python, time="12:00:00", account="me", max_parallel=1)
    text = plan("nano", "large", "killed", launcher=launcher)
    [job_id] = slurm.jobs()
    options = slurm.options(job_id)
    assert (options["partition"], options["account"]) == ("main", "me")
    assert options["time"] == "12"  # three shapes of at most 4 minutes
    assert models(fake()) == ["nano", "large", "killed"]
    assert slurm.jobs()[job_id]["state"] == "COMPLETED"
    assert f"submitted job {job_id} to time " in text
    assert "cannot time model=large: OutOfMemoryError: CUDA out of memory" in text
    assert "cannot time model=killed: killed by SIGKILL" in text
    assert "10 timed steps of nano on cpu" in text
    assert [rate.partition for rate in read_rates(out)] == ["main"]
    assert not (out / "sweeps").exists()
    assert [path.name for path in (out / ".measure").iterdir()] == ["rates"]


def test_the_job_is_no_longer_than_a_runs_and_waits_for_nothing(
    plan, fake, slurm, cluster, when_queued
):
    when_queued(lambda job_id: slurm.set_state(job_id, "FAILED"))
    plan("nano", launcher=cluster(time="5", dependency="afterok:7", mail_type="END"))
    [options] = [slurm.options(job_id) for job_id in slurm.jobs()]
    assert options["time"] == "5"
    assert not {"dependency", "mail-type", "array"} & set(options)


def test_a_job_that_fails_has_timed_nothing_and_says_so(plan, fake, slurm, cluster, when_queued):
    when_queued(lambda job_id: slurm.set_state(job_id, "NODE_FAIL"))
    text = plan("nano", launcher=cluster())
    assert f"cannot time test: job {next(iter(slurm.jobs()))} NODE_FAIL" in text
    assert "10 timed steps" not in text


def test_a_job_that_fails_says_what_it_has_printed_and_not_another(make, tmp_path):
    reasons = {}
    work = timing.Timings(
        folder=tmp_path,
        names=["a", "b"],
        configs=[make(), make()],
        files=[tmp_path / "0.json", tmp_path / "1.json"],
        runs=2,
        report=lambda index, result: reasons.update({index: result.error}),
        reported=set(),
    )
    for job_id, line in (("7", "timed all"), ("8", "Bus error")):
        folder = tmp_path / "sweeps" / "s" / "jobs" / f"0000000{job_id}"
        folder.mkdir(parents=True)
        (folder / f"{job_id}_0_log.out").write_text(f"{line}\n")
    on_slurm._fail_rest("8", [1], work, end="job 8 FAILED")
    work.collect()
    assert reasons == {1: "job 8 FAILED: Bus error"}


def test_ctrl_c_during_sbatch_cancels_the_job_that_it_made(
    plan, fake, slurm, cluster, out, monkeypatch
):
    real = on_slurm.submit

    def interrupted(one, *words, **options):
        real(one, *words, **options)
        one.job_id, one.state = None, "submitting"
        os.kill(os.getpid(), signal.SIGINT)
        raise SlurmError("sbatch: exit code -2")

    monkeypatch.setattr(on_slurm, "submit", interrupted)
    with pytest.raises(KeyboardInterrupt):
        plan("nano", launcher=cluster())
    assert [job["state"] for job in slurm.jobs().values()] == ["CANCELLED"]


@pytest.mark.parametrize("state", ["PENDING", "RUNNING"])
def test_ctrl_c_cancels_the_job(plan, fake, slurm, cluster, when_queued, out, state):
    def interrupt(job_id):
        slurm.set_state(job_id, state)
        os.kill(os.getpid(), signal.SIGINT)

    when_queued(interrupt)
    with pytest.raises(KeyboardInterrupt):
        plan("nano", launcher=cluster())
    assert [job["state"] for job in slurm.jobs().values()] == ["CANCELLED"]
    assert not (out / ".measure").exists()


def test_an_sbatch_that_refuses_is_one_line(plan, fake, slurm, cluster, out):
    slurm.fail("sbatch", "Batch job submission failed: QOS limit", at=2)  # the first one only asks
    with pytest.raises(ConfigError, match=r"SLURM did not time the shapes: .*QOS limit"):
        plan("nano", launcher=cluster())
    assert not (out / ".measure").exists()


# as typed
def command(*words, cwd):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    return warm.run([ROOT / "run.py", *words], cwd=cwd, env=environment)


@pytest.mark.parametrize("more", [(), ("-m",)])
def test_it_belongs_to_a_plan(tmp_path, more):
    done = command("--measure", *more, "model=nano", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (2, "error: --measure must come with --plan\n")
    assert not list(tmp_path.iterdir())


NANO = ("model=nano", "train.steps=400000", "train.batch_size=2", "data.seq_len=8")
NANO += ("tracking=none", "eval=none", "output_dir=out")
SEARCH = ("hydra/sweeper=search", "search=lr_and_rank", "search.objectives=train/loss")


@pytest.mark.slow
@pytest.mark.parametrize("search", [(), SEARCH])
def test_a_first_sweep_is_priced_by_real_steps(tmp_path, search):
    axes = ("relora.r=4",) if search else ("relora.r=2,4",)
    done = command("--plan", "--measure", *search, *NANO, *axes, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    basis = r"CPU-hours by \d+ timed steps of nano on cpu, start and evals not counted"
    assert re.search(basis, " ".join(done.stdout.split()))
    assert not (tmp_path / "out" / "runs").exists()
