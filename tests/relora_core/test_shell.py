"""The shell's variables put a process into a group only where they say so completely."""

from __future__ import annotations

import dataclasses

import pytest

from relora_core import shell
from relora_core.config import ConfigError
from relora_core.shell import Group

SIX = {
    "RANK": "1",
    "LOCAL_RANK": "1",
    "WORLD_SIZE": "2",
    "LOCAL_WORLD_SIZE": "2",
    "MASTER_ADDR": "127.0.0.1",
    "MASTER_PORT": "29500",
}
TORCHRUN = SIX | {"GROUP_RANK": "0", "ROLE_RANK": "1", "TORCHELASTIC_RUN_ID": "none"}
DEFAULTS = {  # of `accelerate launch` of one process
    "ACCELERATE_DYNAMO_BACKEND": "NO",
    "ACCELERATE_DYNAMO_MODE": "default",
    "ACCELERATE_DYNAMO_USE_DYNAMIC": "False",
    "ACCELERATE_MIXED_PRECISION": "no",
    "ACCELERATE_USE_CPU": "False",
}
ONE = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}
ALONE = Group()
BOTH = Group(rank=1, world=2, local_rank=1, local_world=2, address="127.0.0.1:29500")


@pytest.mark.parametrize(
    ("environment", "place"),
    [
        ({}, ALONE),
        ({"RANK": "8"}, ALONE),  # of a LoRA
        ({"RANK": ""}, ALONE),
        ({"RANK": "high"}, ALONE),
        ({"RANK": "", "WORLD_SIZE": ""}, ALONE),
        ({"WORLD_SIZE": "2"}, ALONE),
        ({"LOCAL_RANK": "0"}, ALONE),
        ({"RANK": "8", "MASTER_PORT": "29500"}, ALONE),
        ({"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}, ALONE),  # accelerate launch --cpu
        (ONE, ALONE),
        (SIX | ONE, ALONE),  # torchrun with one process
        ({"TORCHELASTIC_RUN_ID": "none"}, ALONE),
        ({"OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_SIZE": "1"}, ALONE),
        ({"PMI_RANK": "", "PMI_SIZE": ""}, ALONE),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "4"}, ALONE),  # the batch script, no task of srun
        (SIX, BOTH),
        (TORCHRUN, BOTH),
        (TORCHRUN | {"TORCHELASTIC_RESTART_COUNT": "2"}, dataclasses.replace(BOTH, start="2")),
        (SIX | {"SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "2"}, BOTH),  # our own job
        (TORCHRUN | {"OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_SIZE": "2"}, BOTH),
    ],
)
def test_a_place_in_a_group_is_said_completely_or_not_at_all(environment, place):
    assert shell.group(environment) == place


def without(*names: str) -> dict[str, str]:
    return {name: value for name, value in SIX.items() if name not in names}


@pytest.mark.parametrize(
    ("environment", "line"),
    [
        ({"RANK": "0", "WORLD_SIZE": "2"}, "got RANK=0 WORLD_SIZE=2 without LOCAL_RANK, "),
        ({"RANK": "8", "WORLD_SIZE": "1"}, "RANK must be below WORLD_SIZE, got RANK=8 "),
        ({"RANK": "high", "WORLD_SIZE": "2"}, "RANK must be a whole number, got RANK=high "),
        ({"RANK": "0", "LOCAL_RANK": "0"}, "without WORLD_SIZE, LOCAL_WORLD_SIZE, "),
        (without("MASTER_PORT"), "without MASTER_PORT; start one process, or several by torchrun"),
        (without("LOCAL_WORLD_SIZE"), "without LOCAL_WORLD_SIZE; "),
        (SIX | {"MASTER_ADDR": " "}, "without MASTER_ADDR; "),
        (SIX | {"MASTER_PORT": "any"}, "MASTER_PORT must be a whole number"),
        (SIX | {"RANK": "2"}, "RANK must be below WORLD_SIZE"),
        (SIX | {"RANK": "-1"}, "RANK must be a whole number"),
        (SIX | {"LOCAL_RANK": "2"}, "LOCAL_RANK must be below LOCAL_WORLD_SIZE"),
        (SIX | {"LOCAL_WORLD_SIZE": "4"}, "LOCAL_WORLD_SIZE must be in [1, WORLD_SIZE]"),
        (SIX | {"RANK": "0", "WORLD_SIZE": "0"}, "LOCAL_WORLD_SIZE must be in [1, WORLD_SIZE]"),
        ({"OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_SIZE": "2"}, "OMPI_COMM_WORLD_SIZE=2"),
        ({"OMPI_COMM_WORLD_SIZE": "2", "RANK": "8"}, "got OMPI_COMM_WORLD_SIZE=2 alone"),
        ({"PMI_RANK": "1", "PMI_SIZE": "2"}, "got PMI_RANK=1 PMI_SIZE=2 alone (mpirun or srun)"),
        ({"PMIX_RANK": "1"}, "got PMIX_RANK=1 alone"),
        ({"MV2_COMM_WORLD_SIZE": "2"}, "got MV2_COMM_WORLD_SIZE=2 alone"),
        ({"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "2"}, "SLURM_STEP_NUM_TASKS=2 alone"),
        ({"SLURM_PROCID": "1", "SLURM_NTASKS": "2"}, "got SLURM_PROCID=1 alone"),
        ({"PMI_SIZE": "2"} | ONE, "got PMI_SIZE=2 alone"),
    ],
)
def test_half_a_group_is_refused_in_one_line(environment, line):
    with pytest.raises(ConfigError) as caught:
        shell.group(environment)
    assert line in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("environment", "left", "named"),
    [
        ({"RANK": "8"}, {}, "RANK=8 (no group of processes: this one is alone)"),
        ({"RANK": ""}, {}, ""),
        (SIX | ONE, {}, ""),
        (DEFAULTS, {n: DEFAULTS[n] for n in shell.OPTIONS}, ""),
        (TORCHRUN, TORCHRUN, ""),
        (
            TORCHRUN | {"ACCELERATE_TORCH_DEVICE": "meta"},
            TORCHRUN,
            "ACCELERATE_TORCH_DEVICE=meta (settings are the config's)",
        ),
        (
            {"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4", "FSDP_VERSION": "2", "WORLD_SIZE": "2"},
            {},
            "WORLD_SIZE=2 (no group of processes: this one is alone), "
            "ACCELERATE_GRADIENT_ACCUMULATION_STEPS=4 FSDP_VERSION=2 (settings are the config's)",
        ),
    ],
)
def test_what_decides_nothing_is_removed_and_named_once(capsys, environment, left, named):
    environment, other = dict(environment), {"PATH": "/bin", "OMP_NUM_THREADS": "1"}
    environment |= other
    first = shell.take_group(environment)
    assert environment == left | other
    assert shell.take_group(environment) == first
    line = f"warning: set aside from the environment: {named}\n" if named else ""
    assert capsys.readouterr().err == line


@pytest.mark.parametrize("kind", shell.SHARDED)
def test_what_keeps_weights_elsewhere_is_refused(kind):
    line = f"must be DDP or a single process, got ACCELERATE_USE_{kind}=true"
    with pytest.raises(ConfigError, match=line):
        shell.take_group(TORCHRUN | {f"ACCELERATE_USE_{kind}": "true"})
    shell.take_group({f"ACCELERATE_USE_{kind}": "False"})


def test_compiling_is_refused():
    with pytest.raises(ConfigError, match="ACCELERATE_DYNAMO_BACKEND must be no"):
        shell.take_group({"ACCELERATE_DYNAMO_BACKEND": "INDUCTOR"})


def test_a_process_that_we_start_is_in_no_group():
    ours = {"PATH": "/bin", "SLURM_JOB_ID": "1", "CUDA_VISIBLE_DEVICES": "0", "HF_HOME": "/x"}
    theirs = TORCHRUN | DEFAULTS | {"SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "2"}
    theirs |= {"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2"}
    assert shell.strip_group(ours | theirs) == ours


@pytest.mark.parametrize(
    ("asked", "precision", "refused"),
    [
        ("no", "fp32", False),
        ("no", "bf16", False),  # the launcher's default asks for nothing
        ("bf16", "bf16", False),
        ("bf16", "fp32", True),
        ("fp16", "fp32", True),
        ("fp8", "bf16", True),
    ],
)
def test_a_launchers_precision_is_that_of_the_config_or_refused(
    nano, monkeypatch, asked, precision, refused
):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", asked)
    config = nano(train={"precision": precision})
    if not refused:
        return shell.check_options(config, gpu=True)
    with pytest.raises(ConfigError, match=r"train\.precision must be what .* asks for") as caught:
        shell.check_options(config, gpu=False)
    assert ("nearest valid: train.precision=bf16" in str(caught.value)) == (asked == "bf16")


def test_a_launchers_cpu_is_refused_where_a_gpu_would_be_taken(nano, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "True")
    shell.check_options(nano(), gpu=False)
    with pytest.raises(ConfigError, match=r"runtime\.device must be cpu where ACCELERATE_USE_CPU"):
        shell.check_options(nano(), gpu=True)
