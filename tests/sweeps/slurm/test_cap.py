"""max_parallel holds for a whole sweep, whichever commands submit it."""

from __future__ import annotations

import io
import shlex

import pytest
from rich.console import Console
from submitting import BIG, CPU, HUGE, arrays

from experiments.disk.output_dir import plan_folder
from relora_core.config import (
    ConfigError,
)
from sweeps.__main__ import main
from sweeps.slurm.launcher import SlurmLauncher
from sweeps.slurm.options import SlurmOptions
from sweeps.slurm.searches import submit_search


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


def test_an_array_that_waits_for_several_lanes_takes_their_places(submit, slurm):
    submit([0, (1, BIG)], max_parallel=2)
    submit([2, 3], max_parallel=2)
    first, second, after = sorted(arrays(slurm), key=int)
    assert waits(slurm)[after] == f"afterany:{first}:{second}"
    _, text = submit([4, 5], max_parallel=4)
    assert "max_parallel=4: 2 at a time are in flight, these are 2" in text


def test_lanes_that_wait_for_one_array_share_its_places(submit, slurm):
    submit([0, 1], max_parallel=2)
    submit([2, 3, (4, BIG), (5, HUGE)], max_parallel=2)  # its lanes wait for the first array
    _, text = submit([6], max_parallel=3)
    assert "max_parallel=3: 2 at a time are in flight, these are 1" in text
    (last,) = {max(arrays(slurm), key=int)}
    submit([7], max_parallel=3)
    assert last in str(waits(slurm)[max(arrays(slurm), key=int)])


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
