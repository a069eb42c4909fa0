"""What SLURM's tools say is read truly: odd names, old formats, silence, refusals."""

from __future__ import annotations

import subprocess
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from relora_core.config import ConfigError
from sweeps.slurm import cluster, refusal
from sweeps.slurm.cluster import SlurmError, _expand


@pytest.fixture
def submit(tmp_path):
    """Submit a job with these #SBATCH lines; its id."""

    def sbatch(*lines: str) -> str:
        done = subprocess.run(
            ["sbatch", "--parsable", str(script(tmp_path, *lines))],
            capture_output=True,
            text=True,
            check=True,
        )
        return done.stdout.strip()

    return sbatch


def script(folder, *lines):
    path = folder / "job 'one'.sh"
    path.write_text("#!/bin/bash\n" + "".join(f"#SBATCH {line}\n" for line in lines) + "true\n")
    return path


# jobs -------------------------------------------------------------------------------------------
def test_every_task_of_an_array_is_told_apart_by_one_question(slurm, submit):
    array, single = submit("--array=0-5%2"), submit()
    slurm.set_state(f"{array}_1", "RUNNING", node="n7")
    found = cluster.jobs([*(f"{array}_{i}" for i in range(6)), single])
    assert {i: job.state for i, job in found.items()} == {
        **{f"{array}_{i}": "PENDING" for i in (0, 2, 3, 4, 5)},
        f"{array}_1": "RUNNING",
        single: "PENDING",
    }
    assert found[f"{array}_1"].node == "n7"
    assert found[single].reason == "Priority"
    assert len(slurm.calls("squeue")) == 1
    assert slurm.calls("sacct") == slurm.calls("scontrol") == []


def test_no_ids_ask_nobody(slurm):
    assert cluster.jobs([]) == {}
    assert slurm.calls("squeue") == []


def test_pending_tasks_in_one_row_are_told_apart(slurm, submit):
    slurm.config(unexpanded=True)
    array = submit("--array=2-5,9%2")
    slurm.set_state(f"{array}_3", "RUNNING")
    found = cluster.jobs([f"{array}_{i}" for i in (2, 3, 4, 5, 9, 10)])
    assert {i.partition("_")[2]: job.state for i, job in found.items()} == {
        "2": "PENDING",
        "3": "RUNNING",
        "4": "PENDING",
        "5": "PENDING",
        "9": "PENDING",
        "10": cluster.UNLISTED,
    }


def test_jobs_that_left_squeue_are_found_in_the_accounting_and_steps_are_not_jobs(slurm, submit):
    array = submit("--array=0-1")
    slurm.set_state(array, "CANCELLED")  # which the accounting calls `CANCELLED by 0`
    slurm.forget(array)
    found = cluster.jobs([f"{array}_0", f"{array}_1"])
    assert [(job.state, job.source) for job in found.values()] == [("CANCELLED", "sacct")] * 2


def test_squeue_outranks_the_accounting(slurm, submit, tmp_path):
    job_id = submit()
    slurm.set_state(job_id, "PENDING", "BeginTime")  # sacct still says NODE_FAIL at this moment
    assert cluster.jobs([job_id])[job_id].waiting
    assert slurm.calls("sacct") == []


def test_without_accounting_the_controller_is_asked_job_by_job(slurm, submit):
    slurm.config(accounting=False)
    array = submit("--array=0-2")
    slurm.set_state(f"{array}_2", "TIMEOUT", node="n1")
    slurm.forget(array, by=["squeue"])
    found = cluster.jobs([f"{array}_2"])[f"{array}_2"]
    assert (found.state, found.node, found.source) == ("TIMEOUT", "n1", "scontrol")


def test_jobs_that_nobody_knows_are_left_out_with_and_without_accounting(slurm):
    assert cluster.jobs(["999", "998_3"]) == {}
    slurm.config(accounting=False)
    assert cluster.jobs(["999", "998_3"]) == {}


def test_hundreds_of_forgotten_jobs_cost_few_questions(slurm):
    slurm.config(accounting=False)
    assert cluster.jobs(str(i) for i in range(1000, 1300)) == {}
    assert len(slurm.calls("scontrol")) <= cluster.SCONTROL_MAX


def test_a_silent_squeue_is_an_error_and_never_an_empty_answer(slurm, submit):
    job_id = submit()
    slurm.fail("squeue", "Unable to contact slurm controller (connect failure)")
    with pytest.raises(SlurmError, match="Unable to contact") as caught:
        cluster.jobs([job_id])
    assert "\n" not in str(caught.value)


def test_a_busy_controller_is_asked_again(slurm, submit):
    job_id = submit()
    slurm.fail("squeue", "slurm_load_jobs error: Socket timed out on send/recv operation", at=1)
    assert job_id in cluster.jobs([job_id])


def test_a_squeue_that_hangs_is_an_error(slurm, monkeypatch):
    monkeypatch.setattr(cluster, "ANSWER_S", 0.3)
    slurm.fail("squeue", sleep=2.0, code=0)
    with pytest.raises(SlurmError, match="squeue did not answer within"):
        cluster.jobs(["1"])


def test_a_users_squeue_settings_hide_no_job(slurm, submit, monkeypatch):
    monkeypatch.setenv("SQUEUE_PARTITION", "gpu")
    monkeypatch.setenv("SQUEUE_FORMAT", "%j")
    job_id = submit("--partition=main")
    assert job_id in cluster.jobs([job_id])


def test_odd_names_of_other_jobs_disturb_nothing(slurm, submit):
    for number, name in enumerate(["a|b|c", "50%", "two\nlines", "12|RUNNING", "", "é 'q' \"r\""]):
        slurm.add(str(70 + number), name=name)
    slurm.add("80", name="x", user="12345", state="RUNNING")
    job_id = submit("--job-name=mine")
    assert {i: job.name for i, job in cluster.jobs([job_id, "70"]).items()} == {
        job_id: "mine",
        "70": "a|b|c",
    }


@given(
    st.lists(st.tuples(st.integers(0, 50), st.integers(0, 5), st.integers(1, 3)), min_size=1),
    st.sampled_from(["", "%4"]),
)
def test_any_expression_of_array_tasks_is_written_out(spans, cap):
    words, tasks = [], []
    for first, more, step in spans:
        last = first + more
        words.append(str(first) if not more else f"{first}-{last}" + (f":{step}" * (step > 1)))
        tasks += [task for task in range(first, last + 1) if (task - first) % step == 0]
    assert _expand(f"12_[{','.join(words)}{cap}]") == [f"12_{task}" for task in tasks]


@pytest.mark.parametrize("word", ["12.batch", "12_3.0", "", "JobID", "12_[3-", "x", "12+0"])
def test_what_is_no_job_id_is_none(word):
    assert _expand(word) == []


@pytest.mark.parametrize(
    ("state", "waiting", "over"),
    [
        ("PENDING", True, False),
        ("REQUEUED", True, False),
        ("REQUEUE_HOLD", True, False),
        ("CONFIGURING", False, False),
        ("RUNNING", False, False),
        ("COMPLETING", False, False),
        ("SUSPENDED", False, False),
        ("A_WORD_OF_2031", False, False),
        ("NODE_FAIL", False, True),
        ("OUT_OF_MEMORY", False, True),
    ],
)
def test_only_known_ends_are_ends(state, waiting, over):
    job = cluster.Job(job_id="1", state=state)
    assert (job.waiting, job.over, job.alive) == (waiting, over, not over)


# find -------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "name", ["plain.0a1b2c3d", "two words.0a1b", "it's.0a", "a|b.0a", 'a\\"b.1']
)
def test_a_job_is_found_by_its_exact_name_in_squeue_and_then_in_the_accounting(slurm, submit, name):
    submit("--job-name=other")
    array = submit("--array=0-3", f'--job-name="{name}"')
    submit(f'--job-name="{name}x"')
    name = name.replace("\\", "")
    assert cluster.find(name) == array
    slurm.forget(array)
    assert cluster.find(name) == array
    slurm.config(accounting=False)
    assert cluster.find(name) is None


def test_of_two_jobs_of_one_name_the_newest_counts_and_others_users_jobs_do_not(slurm, submit):
    submit("--job-name=twice")
    newest = submit("--job-name=twice")
    slurm.add("9999", name="twice", user="12345")
    assert cluster.find("twice") == newest


def test_not_finding_is_not_the_same_as_no_answer(slurm):
    assert cluster.find("never.0") is None
    slurm.fail("squeue", "Zero Bytes were transmitted or received")
    with pytest.raises(SlurmError):
        cluster.find("never.0")


# the site ---------------------------------------------------------------------------------------
def test_the_sites_limits_are_read(slurm):
    slurm.config(partitions=["cpu", "ampere"], max_array_size=17)
    assert refusal.partitions() == ["ampere", "cpu"]
    assert cluster.max_array_size() == 17
    assert cluster.available()


def test_without_slurm_on_path_nothing_is_available_and_asking_is_one_line(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert not cluster.available()
    with pytest.raises(SlurmError, match="squeue did not answer: No such file"):
        cluster.jobs(["1"])


def test_a_job_that_fits_passes_and_queues_nothing(slurm, tmp_path):
    refusal.test(script(tmp_path, "--partition=gpu", "--nodes=2", "--gpus-per-node=4"))
    assert slurm.jobs() == {}


def test_an_unknown_partition_gets_the_nearest_one(slurm, tmp_path):
    with pytest.raises(ConfigError) as caught:
        refusal.test(script(tmp_path, "--partition=mian"))
    assert str(caught.value) == (
        "hydra.launcher.partition must be one of gpu, main, got 'mian'. Did you mean 'main'?"
    )


def test_no_arrays_are_arrays_of_one(slurm):
    slurm.config(max_array_size=0)
    assert cluster.max_array_size() == 1


@pytest.mark.parametrize(
    ("lines", "said", "nearest"),
    [
        (["--gpus-per-node=9"], "node configuration is not available", "gpus_per_node=4"),
        (["--nodes=7"], "node configuration is not available", "nodes=2"),
        (["--cpus-per-task=9"], "CPU count per node can not be satisfied", "cpus_per_task=8"),
        (["--ntasks-per-node=3", "--cpus-per-task=4"], "CPU count", "cpus_per_task=2"),
        (["--ntasks-per-node=16", "--cpus-per-task=4"], "CPU count", "tasks_per_node=8"),
        (["--mem=64000M"], "Memory specification can not be satisfied", "mem_gb=7.812"),
        (["--time=2000"], "Requested time limit is invalid", "time=1-00:00:00"),
        (["--constraint=a10"], "Invalid feature specification", "constraint=a100"),
        (["--constraint=zzz"], "Invalid feature specification", "constraint one of a100, ib"),
        (["--account=grnat"], "Invalid account or account/partition combination specified",
         "account=grant"),
        (["--qos=hihg"], "Invalid qos specification", "qos=high"),
        (["--licenses=matlb"], "Invalid license specification", "licenses=matlab"),
        (["--licenses=matlb:1"], "Invalid license specification", "licenses=matlab:1"),
        (["--licenses=matlab:5"], "Invalid license specification", "licenses=matlab:2"),
        (["--reservation=mantenance"], "Requested reservation is invalid",
         "reservation=maintenance"),
        # SLURM's words for a feature that nodes of other partitions have.
        (["--constraint=a10"], "Requested node configuration is not available", "constraint=a100"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("partition", [["--partition=gpu"], []])
def test_a_refusal_has_slurms_words_and_the_nearest_value(
    slurm, tmp_path, monkeypatch, lines, said, nearest, partition
):
    slurm.config(features="a100,ib")
    site = tmp_path / "site"
    site.mkdir()
    (site / "sacctmgr").write_text("#!/bin/sh\necho 'grant|normal,high'; echo 'ours|normal'\n")
    real = slurm.folder / "bin" / "scontrol"
    (site / "scontrol").write_text(
        f'#!/bin/sh\ncase "$3" in licenses) echo "LicenseName=matlab Total=2 Used=0";;\n'
        f'reservation) echo "ReservationName=maintenance Flags=";; *) exec "{real}" "$@";; esac\n'
    )
    for tool in site.iterdir():
        tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(site), prepend=":")
    slurm.fail("sbatch", f"Batch job submission failed: {said}")
    with pytest.raises(ConfigError) as caught:
        refusal.test(script(tmp_path, *partition, *lines))
    message = str(caught.value)
    assert f"Batch job submission failed: {said}" in message
    assert f"; nearest valid: {nearest};" in message
    assert "sinfo" not in message
    assert "\n" not in message


def test_nodes_that_differ_in_features_alone_are_summed(slurm, tmp_path, monkeypatch):
    site = tmp_path / "site"
    site.mkdir()
    rows = ["gpu|3|8|8000|gpu:4|infinite|a100", "gpu|1|8|8000|gpu:4|infinite|v100"]
    (site / "sinfo").write_text("#!/bin/sh\n" + "".join(f"echo '{row}'\n" for row in rows))
    (site / "sinfo").chmod(0o755)
    monkeypatch.setenv("PATH", str(site), prepend=":")
    slurm.fail("sbatch", "Invalid --mail-type specification")
    with pytest.raises(ConfigError) as caught:
        refusal.test(script(tmp_path, "--mail-type=XX"))
    assert str(caught.value) == (
        "hydra.launcher must ask for what SLURM can give, got mail-type=XX: sbatch: Invalid "
        "--mail-type specification; gpu has 4 nodes of 8 CPUs, 8000 MB, gpu:4, time <= infinite"
    )


def test_slurms_reason_stands_where_sinfo_has_none(slurm, tmp_path):
    slurm.fail("sbatch", "Batch job submission failed: Access denied")
    slurm.fail("sinfo", "Unable to contact slurm controller")
    with pytest.raises(ConfigError, match=r"got partition=gpu: sbatch: .*Access denied$"):
        refusal.test(script(tmp_path, "--partition=gpu"))


def test_what_the_nodes_cannot_say_is_no_traceback(slurm, tmp_path, monkeypatch):
    site = tmp_path / "site"
    site.mkdir()
    rows = "gpu|4+|64+|257000+|gpu:a100:4(S:0-1),nvme:1|infinite|(null)"
    (site / "sinfo").write_text(f"#!/bin/sh\necho '{rows}'\n")
    (site / "sinfo").chmod(0o755)
    monkeypatch.setenv("PATH", str(site), prepend=":")
    slurm.fail("sbatch", "Batch job submission failed: Requested node configuration")
    with pytest.raises(ConfigError, match=r"nearest valid: gpus_per_node=4; gpu has 4 nodes"):
        refusal.test(script(tmp_path, "--gpus-per-node=5", "--time=99999"))


@pytest.mark.parametrize(
    ("partition", "limit"),
    [("", (60, "1:00:00")), ("gpu", (60, "1:00:00")), ("gpu,main", (60, "1:00:00"))],
)
def test_a_partitions_limit(slurm, partition, limit):
    slurm.config(limit="1:00:00")
    assert cluster.time_limit(partition) == limit
    slurm.config(limit="infinite")
    assert cluster.time_limit(partition) is None
    slurm.fail("sinfo", "Unable to contact slurm controller")
    assert cluster.time_limit(partition) is None


def test_a_tool_that_hangs_is_named_and_given_up(slurm, monkeypatch, capsys):
    monkeypatch.setattr(cluster, "PATIENCE_S", 0.1)
    slurm.fail("squeue", sleep=0.3, code=0)
    assert cluster.jobs(["12"]) == {}
    assert capsys.readouterr().err == "waiting for SLURM's squeue (up to 60 s)\n"
    monkeypatch.setattr(cluster, "ANSWER_S", 0.2)
    with pytest.raises(SlurmError, match="squeue did not answer within"):
        cluster.jobs(["12"])
    assert capsys.readouterr().err == "waiting for SLURM's squeue (up to 0 s)\n"
    monkeypatch.setattr(cluster, "PATIENCE_S", 120.0)
    monkeypatch.setattr(cluster, "ANSWER_S", 240.0)
    slurm.heal()
    assert cluster.jobs(["12"]) == {}
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("line", ["--gpus-per-node=9", "--nodes=7", "--gres=gpu:a100:8"])
def test_more_than_the_nodes_have_is_refused_with_what_they_have(slurm, tmp_path, line):
    with pytest.raises(ConfigError) as caught:
        refusal.test(script(tmp_path, "--partition=gpu", line))
    message = str(caught.value)
    assert line.removeprefix("--") in message
    assert "gpu has 2 nodes of 8 CPUs, 8000 MB, gpu:4" in message
    assert "\n" not in message


def test_a_silent_controller_is_not_the_users_mistake(slurm, tmp_path):
    slurm.fail("sbatch", "Batch job submission failed: Socket timed out on send/recv operation")
    with pytest.raises(SlurmError, match="Socket timed out"):
        refusal.test(script(tmp_path, "--partition=main"))


# acting -----------------------------------------------------------------------------------------
def test_cancelling_ends_exactly_the_given_tasks_and_forgives_those_over(slurm, submit):
    array, single = submit("--array=0-2"), submit()
    slurm.set_state(single, "COMPLETED")
    cluster.cancel([f"{array}_1", single, "9999"])
    assert {i: job["state"] for i, job in slurm.jobs().items()} == {
        f"{array}_0": "PENDING",
        f"{array}_1": "CANCELLED",
        f"{array}_2": "PENDING",
        single: "COMPLETED",
    }


def test_cancelling_a_thousand_jobs_stays_below_the_limit_of_a_command_line(slurm, submit):
    array = submit("--array=0-999")
    cluster.cancel(f"{array}_{i}" for i in range(1000))
    assert {job["state"] for job in slurm.jobs().values()} == {"CANCELLED"}
    assert len(slurm.calls("scancel")) == 2


def test_a_refused_cancel_is_an_error(slurm, submit):
    slurm.fail("scancel", "Kill job error on job id 5: Access/permission denied")
    with pytest.raises(SlurmError, match="permission denied"):
        cluster.cancel([submit()])


def test_requeue_touches_one_task_and_outlasts_a_busy_controller(slurm, submit):
    array = submit("--array=0-1")
    slurm.set_state(array, "RUNNING")
    slurm.fail("scontrol", "Unable to contact slurm controller (connect failure)", at=1)
    slurm.fail("scontrol", "Socket timed out on send/recv operation", at=2)
    cluster.requeue(f"{array}_1")
    assert [job["state"] for job in slurm.jobs().values()] == ["RUNNING", "PENDING"]


# of a job that is at work -----------------------------------------------------------------------
@pytest.mark.parametrize(
    ("left", "seconds"),
    [
        ("3:04", 184),
        ("2:03:04", 7384),
        ("1-02:03:04", 93784),
        ("UNLIMITED", None),
        ("INVALID", None),
    ],
)
def test_the_end_of_a_job_is_read_whatever_its_length(slurm, submit, left, seconds):
    job_id = submit()
    slurm.update(job_id, state="RUNNING", left=left)
    end = cluster.end_time(job_id)
    assert end == (None if seconds is None else pytest.approx(time.time() + seconds, abs=5))


def test_where_slurm_is_silent_the_jobs_environment_says_when_it_ends(slurm, submit, monkeypatch):
    slurm.fail("squeue", "Unable to contact slurm controller")
    assert cluster.end_time("5") is None
    monkeypatch.setenv("SLURM_JOB_END_TIME", "1900000000")
    assert cluster.end_time("5") == 1900000000


@pytest.mark.parametrize(
    ("state", "reason", "may"),
    [
        ("RUNNING", "None", True),
        ("COMPLETING", "TimeLimit", True),
        ("COMPLETING", "None", False),  # cancelled, or requeued by SLURM
        ("CANCELLED", "None", False),
        ("PENDING", "BeginTime", False),
    ],
)
def test_a_cancelled_job_never_requeues_itself_a_timed_out_one_does(
    slurm, submit, state, reason, may
):
    array = submit("--array=0-1")
    slurm.set_state(f"{array}_1", state, reason)
    assert cluster.may_requeue(f"{array}_1") == may
