"""Kinds of GPUs by name: as jobs ask for them, and as drivers name them."""

import pytest

from sweeps.planning.kinds import is_kind, kinds_in, peak_ratio
from sweeps.slurm.options import SlurmOptions, gpu_kinds

A100 = "NVIDIA A100-SXM4-80GB"


@pytest.mark.parametrize(
    ("kind", "device"),
    [
        ("a100", A100),
        ("A100", A100),
        ("a100_80gb", A100),
        ("nvidia_a100-sxm4-80gb", A100),
        (A100, A100),
        ("rtx4090", "NVIDIA GeForce RTX 4090"),
        ("nvidia_geforce_rtx_2080_ti", "NVIDIA GeForce RTX 2080 Ti"),
        ("1g.10gb", "NVIDIA A100-SXM4-80GB MIG 1g.10gb"),
        ("a100_1g.10gb", "NVIDIA A100-SXM4-80GB MIG 1g.10gb"),
    ],
)
def test_a_kind_is_known_by_its_words(kind, device):
    assert is_kind(kind, device)


@pytest.mark.parametrize(
    ("kind", "device"),
    [
        ("a10", A100),
        ("a100", "NVIDIA A10"),
        ("a100_40gb", A100),
        ("h100", "NVIDIA GH200 480GB"),
        ("a100", "NVIDIA A100-SXM4-80GB MIG 1g.10gb"),
        ("1g.10gb", A100),
    ],
)
def test_and_no_other_is_taken_for_it(kind, device):
    assert not is_kind(kind, device)


@pytest.mark.parametrize(
    ("options", "kinds"),
    [
        ({"extra": {"gres": "gpu:a100:2"}}, ("a100",)),
        ({"extra": {"gres": "gpu:a100:2,gpu:h100:1,shard:3"}}, ("a100", "h100")),
        ({"extra": {"gres": "gpu:2"}, "constraint": "h100"}, ("h100",)),
        ({"extra": {"gpus_per_node": "rtx_4090:4"}}, ("rtx_4090",)),
        ({"extra": {"gpus-per-task": "a100:1"}, "constraint": "h100"}, ("a100",)),
        ({"constraint": "[a100|h100]&ib"}, ("a100", "h100")),
        ({"partition": "gpu-a100"}, ("a100",)),
        ({"partition": "h100s,h100"}, ("h100",)),
        ({"partition": "ampere", "constraint": "ib"}, ()),
        ({}, ()),
    ],
    ids=str,
)
def test_a_job_says_by_gres_constraint_or_partition_which_kind_it_gets(options, kinds):
    assert gpu_kinds(SlurmOptions(**options)) == kinds


def test_a_ratio_needs_both_peaks_of_whole_gpus():
    assert peak_ratio("h100", A100, precision="bf16") == pytest.approx(989 / 312)
    assert peak_ratio("a100_80gb", A100, precision="bf16") == 1
    for kind, device in (("h100", "Some GPU"), ("k80", A100), ("a100_1g.10gb", A100)):
        assert peak_ratio(kind, device, precision="bf16") is None


def test_names_of_kinds_are_words_of_a_text():
    assert kinds_in("gpu_a100,h100x") == ("a100",)
