"""Peaks of GPUs by the names that drivers give them: the right one, or none."""

import pytest

from relora_core.devices import find_device

NAMES = {
    "NVIDIA A100-SXM4-40GB": (312e12, 1555e9),
    "NVIDIA A100-SXM4-80GB": (312e12, 2039e9),
    "NVIDIA A100-PCIE-40GB": (312e12, 1555e9),
    "NVIDIA A100 80GB PCIe": (312e12, 1935e9),
    "NVIDIA H100 80GB HBM3": (989e12, 3350e9),
    "NVIDIA H100 PCIe": (756e12, 2000e9),
    "NVIDIA H100 NVL": (835e12, 3900e9),
    "NVIDIA H200": (989e12, 4800e9),
    "NVIDIA GH200 480GB": (989e12, 4000e9),
    "NVIDIA L4": (121e12, 300e9),
    "NVIDIA L40": (181e12, 864e9),
    "NVIDIA L40S": (362e12, 864e9),
    "NVIDIA GeForce RTX 4090": (165e12, 1008e9),
}


@pytest.mark.parametrize("name", NAMES)
def test_a_gpu_has_the_peaks_of_its_data_sheet(name: str) -> None:
    device = find_device(name)
    assert device is not None
    assert (device.bf16, device.memory) == NAMES[name]


@pytest.mark.parametrize(
    "name",
    [
        "",
        "cpu",
        "Tesla V100-SXM2-16GB",
        "NVIDIA A10",
        "NVIDIA H20",
        "NVIDIA A100-SXM4-40GB MIG 1g.5gb",
        "NVIDIA GeForce RTX 3090 Ti",
        "NVIDIA GeForce RTX 4090 D",
        "NVIDIA GeForce RTX 4090 Laptop GPU",
        "AMD Instinct MI300X",
    ],
)
def test_no_gpu_is_taken_for_one_whose_name_it_resembles(name: str) -> None:
    assert find_device(name) is None


def test_bf16_is_never_slower_than_tf32_nor_tf32_than_float32() -> None:
    for name in NAMES:
        device = find_device(name)
        assert device is not None
        assert device.tf32
        assert device.fp32
        assert device.bf16 >= device.tf32 >= device.fp32
