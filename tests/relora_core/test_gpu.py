"""Which GPU a process takes, and what is refused there.

Without a GPU: torch's answers about one are made up.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from experiments import environment
from relora_core import gpu
from relora_core.config import ConfigError, RunConfig, validate
from relora_core.shell import Group
from tests import warm

Nano = Callable[..., RunConfig]


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A machine with `count` GPUs of capability `major`; `taken` is the current one."""
    one = SimpleNamespace(count=1, major=8, taken=0)

    def properties(index: Any = None) -> SimpleNamespace:
        return SimpleNamespace(name="NVIDIA Made Up", major=one.major, uuid=f"uuid-{one.taken}")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: one.count)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: one.taken)
    monkeypatch.setattr(torch.cuda, "set_device", lambda index: setattr(one, "taken", index))
    monkeypatch.setattr(torch.cuda, "get_device_properties", properties)
    return one


def on_gpu(nano: Nano, **changes: Any) -> RunConfig:
    return nano(**{"runtime": {"device": "cuda", **changes.pop("runtime", {})}, **changes})


# which one ---------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("visible", "local_world", "taken"),
    [(4, 4, [0, 1, 2, 3]), (4, 2, [0, 1]), (1, 4, [0, 0, 0, 0]), (1, 1, [0])],
    ids=["all", "some", "bound to its task", "alone"],
)
def test_a_process_takes_the_gpu_of_its_number_or_the_only_one(
    visible: int, local_world: int, taken: list[int]
) -> None:
    places = [
        Group(rank=8 + n, world=16, local_rank=n, local_world=local_world)
        for n in range(local_world)
    ]
    assert [gpu.index(place, visible=visible) for place in places] == taken


def test_more_processes_than_visible_gpus_are_refused(nano: Nano, card: SimpleNamespace) -> None:
    card.count = 2
    place = Group(rank=3, world=4, local_rank=3, local_world=4)
    with pytest.raises(
        ConfigError, match=r"at most its 2 visible GPUs, .* got 4; nearest valid: 2"
    ):
        gpu.take(on_gpu(nano), place)


def test_a_process_alone_leaves_the_current_gpu(nano: Nano, card: SimpleNamespace) -> None:
    card.count, card.taken = 4, 2
    assert gpu.take(on_gpu(nano), Group()) == "NVIDIA Made Up uuid-2"
    assert gpu.take(nano(), Group()) is None  # runtime.device=cpu
    place = Group(rank=1, world=2, local_rank=1, local_world=2)
    assert gpu.take(on_gpu(nano), place) == "NVIDIA Made Up uuid-1"
    assert card.taken == 1


SHARED = """
from relora_core import ranks, shell
from relora_core.config import ConfigError

place = shell.settle()
for gpu in ("B 7", f"A {place.rank}"):
    try:
        print(ranks.meet(place, {}, backend="gloo", stop=lambda: False, gpu=gpu), flush=True)
    except ConfigError as error:
        print(error, flush=True)
"""


@pytest.mark.slow
def test_two_processes_with_one_gpu_are_refused_on_both(tmp_path: Path) -> None:
    line = "each process must have a GPU of its own, got B 7 on rank 0 and on rank 1; nearest "
    for rank in warm.ranks(2, ["-c", SHARED], cwd=tmp_path):
        assert rank.stdout.splitlines() == [f"{line}valid: as many processes as GPUs", "True"]


@pytest.mark.slow
def test_a_gpu_asked_for_and_absent_is_one_line_of_each_process(tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    words = ["run.py", "model=nano", "runtime.device=cuda", f"output_dir={tmp_path / 'out'}"]
    done = warm.ranks(2, words, cwd=Path(__file__).parents[2])
    for rank in done:
        assert rank.returncode != 0
        assert "runtime.device must be auto or cpu here (no GPU found), got 'cuda'" in rank.stderr
        assert "Traceback" not in rank.stderr
    assert not (tmp_path / "out").exists()


def test_an_apple_gpu_is_none_of_cuda(nano: Nano, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("torch.backends.mps.is_available", lambda: True)
    environment.check_gpu(nano(runtime={"device": "auto"}))
    with pytest.raises(ConfigError, match="no GPU found"):
        environment.check_gpu(on_gpu(nano))


# what it cannot do -------------------------------------------------------------------------------
@pytest.mark.parametrize("precision", ["bf16"])
@pytest.mark.parametrize("major", [7, 8])
def test_a_format_that_the_gpu_lacks_is_one_line(
    nano: Nano, card: SimpleNamespace, precision: str, major: int
) -> None:
    card.major = major
    config = on_gpu(nano, train={"precision": precision})
    validate(config)
    gpu.take(on_gpu(nano), Group())
    if major == 8:
        gpu.take(config, Group())
        return
    line = f"on this GPU \\(NVIDIA Made Up has no {precision}; .* nearest valid: fp32$"
    with pytest.raises(ConfigError, match=line):
        gpu.take(config, Group())
