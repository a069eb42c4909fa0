"""What cannot run is refused in one line before anything is written."""

from __future__ import annotations

import contextlib
import io
import re

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rich.console import Console
from submitting import BIG, CPU

from experiments.disk.output_dir import run_at
from experiments.disk.run_dir import RunDir
from experiments.identity import run_id
from experiments.run.complete import complete
from relora_core import costs
from relora_core.config import (
    CheckpointConfig,
    ConfigError,
    ResourcesConfig,
    TrainConfig,
)
from sweeps.planning.budget import Estimate, training_flops
from sweeps.planning.plan import make_plan
from sweeps.planning.rates import Rate, shape
from sweeps.search.config import normalise
from sweeps.search.launch import Draft, run_search
from sweeps.search.space import Float
from sweeps.slurm.launcher import SlurmLauncher
from sweeps.slurm.options import SlurmOptions, check_cell, check_options


def tree(folder):
    return sorted(folder.rglob("*")) if folder.exists() else []


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


@pytest.mark.parametrize("compiled", [True, False])
def test_runs_that_share_a_gpu_are_counted_as_on_a_gpu(nano, compiled):
    """With the head of one, which takes another 4 bytes per logit where it is not compiled."""
    runtime = {"compile": "auto" if compiled else "off"}
    config = nano(model={"vocab_size": 50304}, runtime=runtime)
    two = 2 * costs.memory_bytes(config, compiled=compiled)["total"] / 1e9
    options = {"time": "60", "gpus_per_node": 1, "runs_per_job": 2}
    check_cell(config, SlurmOptions(gpu_memory_gb=two * 1.001, **options))
    with pytest.raises(ConfigError, match=r"runs_per_job must be <= 1 .* got 2; nearest valid: 1"):
        check_cell(config, SlurmOptions(gpu_memory_gb=two * 0.999, **options))
    none = {"gpu_memory_gb": two * 0.4, "gpus_per_node": 4, "runs_per_job": 4, "time": "60"}
    with pytest.raises(ConfigError, match=r"runs_per_job must be <= 1 .* got 4; nearest valid: 1"):
        check_cell(config, SlurmOptions(**none))


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
    cost = Estimate(hours=10 * devices, low=1, high=99, basis="test", steps=1000)
    for time_, good in (("4:50:00", False), ("5:10:00", True)):
        launcher = SlurmLauncher(options=SlurmOptions(time=time_, **options))
        context = pytest.raises(ConfigError, match=r"interval .*about 300 min\).* 301, or checkp")
        with contextlib.nullcontext() if good else context:
            launcher.check(plan, estimates={plan.cells[0].run_id: cost})


def test_of_a_run_that_has_begun_the_rest_takes_what_it_is_expected_to_cost(make, slurm):
    config = make(
        train=TrainConfig(steps=1000, batch_size=4), checkpoint=CheckpointConfig(every_steps=100)
    )
    plan = make_plan([({}, config)], name="s")
    [cell] = plan.cells
    launcher = SlurmLauncher(options=SlurmOptions(time="1:30:00", gpus_per_node=0))
    cost = Estimate(hours=10, low=1, high=99, basis="test", steps=500)  # 2 h for 100 of them
    with pytest.raises(ConfigError, match=r"interval .*about 120 min\).* 121, or checkp"):
        launcher.check(plan, estimates={cell.run_id: cost})


def test_a_searchs_trials_must_reach_a_checkpoint_too(make, slurm, out, monkeypatch):
    """10 h on the clock for 1000 steps, a checkpoint every 500, whatever has been run before."""
    config = make(
        train=TrainConfig(steps=1000, batch_size=4), checkpoint=CheckpointConfig(every_steps=500)
    )
    config.model.vocab_size = None
    priced = complete(config)
    rate = Rate(
        run_id="x",
        label="nano",
        device="cpu",
        partition="main",
        shape=shape(priced, processes=1),
        forward_flops=costs.flops_per_token(priced).forward,
        flops_per_s=training_flops(priced) / 36_000,
        overhead_s=0.0,
    )
    monkeypatch.setattr("sweeps.search.launch.read_rates", lambda _: [rate])
    (run_at(out, run_id(priced)).checkpoints / "step-00001000").mkdir(parents=True)
    draft = Draft(
        search=normalise({"objectives": "train/loss", "sampler": "random"}),
        space={"train.lr": Float(low=1e-4, high=1e-1, log=True)},
        bases=[({}, config)],
        follows=[{}],
    )
    for time_, good in (("4:50:00", False), ("5:10:00", True)):
        launcher = SlurmLauncher(options=SlurmOptions(time=time_, **CPU))
        context = pytest.raises(ConfigError, match=r"interval .*about 300 min\).* 301, or checkp")
        with contextlib.nullcontext() if good else context:
            console = Console(file=io.StringIO())
            run_search([draft], name="s", launcher=launcher, plan_only=True, console=console)


def test_arms_of_a_search_that_differ_in_resources_alone_are_refused(make, slurm):
    """They are one run by its id."""
    bases = {"a": make(), "b": make(resources=BIG)}
    for config in bases.values():
        config.model.vocab_size = None
    drafts = [
        Draft(
            search=normalise({"objectives": "train/loss", "sampler": "random"}),
            space={"train.lr": Float(low=1e-4, high=1e-1, log=True)},
            bases=[({}, base)],
            follows=[{}],
            arm=arm,
        )
        for arm, base in bases.items()
    ]
    launcher, console = SlurmLauncher(options=SlurmOptions(**CPU)), Console(file=io.StringIO())
    with pytest.raises(ConfigError, match="resources must be the same in all of a search"):
        run_search(drafts, name="s", launcher=launcher, plan_only=True, console=console)
    run_search(drafts[:1], name="s", launcher=launcher, plan_only=True, console=console)


def test_a_snapshot_beyond_its_limit_is_refused(submit, slurm, code, out):
    (code / "conf").mkdir()
    (code / "conf" / "large.bin").write_bytes(b"0" * 1_200_000)
    with pytest.raises(ConfigError, match=r"snapshot_limit_mb must be at least 2.*large\.bin"):
        submit([0], snapshot_limit_mb=1.0)
    assert slurm.jobs() == {}
    assert not out.exists()
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


@pytest.mark.parametrize(
    ("sizes", "options", "message"),
    [
        ([None], {"runs_per_job": 2}, r"runs_per_job must be 1 with hydra/sweeper=search, got 2"),
        ([None], {"tasks_per_node": 2}, r"tasks_per_node must be 1 .* got 2 processes"),
        ([None, BIG], {}, r"resources must be the same in all of a search .* got 2 different"),
    ],
)
def test_a_search_needs_jobs_of_one_size_for_one_process(make, sizes, options, message):
    configs = [make(seed=i, **({"resources": one} if one else {})) for i, one in enumerate(sizes)]
    plan = make_plan([({}, config) for config in configs], name="s")
    with pytest.raises(ConfigError, match=message):
        SlurmLauncher(options=SlurmOptions(gpus_per_node=0, **options)).check_search(plan)
    alone = make_plan([({}, configs[0])], name="s")
    SlurmLauncher(options=SlurmOptions(gpus_per_node=0)).check_search(alone)
