"""Which GPU a process takes, what is refused there, and how torch rounds during a run and after it.

Without a GPU: torch's answers about one are made up.
"""

from __future__ import annotations

import importlib.util
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch._inductor.config as inductor
from accelerate.utils import DistributedType
from test_gpu_path_graphs import Compared
from test_gpu_path_waits import short
from training import run

from experiments import environment
from relora_core import gpu, native
from relora_core import train as train_module
from relora_core.config import ConfigError, RunConfig, validate
from relora_core.data.grammar import VOCAB_SIZE
from relora_core.methods.relora import running_sums
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


@pytest.fixture(autouse=True)
def unused(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a process without a product on a GPU so far."""
    monkeypatch.setattr(gpu, "_fixed", None)
    monkeypatch.delenv(gpu.WORKSPACE, raising=False)


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


@pytest.mark.parametrize(("visible", "number"), [(1, "0"), (4, "1")], ids=["bound", "all"])
def test_accelerate_is_told_the_number_of_the_gpu(
    nano: Nano,
    card: SimpleNamespace,
    monkeypatch: pytest.MonkeyPatch,
    visible: int,
    number: str,
) -> None:
    """Which it takes LOCAL_RANK for: DDP and barriers would ask for a GPU that is not there."""
    place = {"RANK": "3", "LOCAL_RANK": "1", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2"}
    place |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
    for name, value in place.items():
        monkeypatch.setenv(name, value)
    card.count, seen = visible, []

    def accelerator(**_: Any) -> Any:
        seen.append(os.environ["LOCAL_RANK"])
        return SimpleNamespace(distributed_type=DistributedType.MULTI_GPU, num_processes=4)

    monkeypatch.setattr(train_module, "Accelerator", accelerator)
    train_module.make_accelerator(on_gpu(nano))
    train_module.make_accelerator(nano())  # on a CPU it is the process's own
    assert seen == [number, "1"]
    assert os.environ["LOCAL_RANK"] == "1"


@pytest.mark.parametrize("before", ["1", None])
def test_the_variable_is_back_where_accelerate_refuses(
    nano: Nano, card: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, before: str | None
) -> None:
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    if before is not None:
        monkeypatch.setenv("LOCAL_RANK", before)
    place = Group(rank=1, world=2, local_rank=1, local_world=2)

    @gpu.numbered(on_gpu(nano), place)
    def refuse() -> None:
        raise ValueError(os.environ["LOCAL_RANK"])

    with pytest.raises(ValueError, match=r"^0$"):
        refuse()
    assert os.environ.get("LOCAL_RANK") == before
    with gpu.numbered(on_gpu(nano), Group()):
        assert os.environ.get("LOCAL_RANK") == before


SHARED = """
from relora_core import ranks, shell
from relora_core.config import ConfigError

place = shell.take_group()
for gpu in ("B 7", f"A {place.rank}"):
    try:
        print(ranks.form_group(place, {}, backend="gloo", stop=lambda: False, gpu=gpu), flush=True)
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


def test_an_apple_gpu_is_left_alone(nano: Nano, monkeypatch: pytest.MonkeyPatch) -> None:
    """It has no float64, in which losses and scores are added up."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("torch.backends.mps.is_available", lambda: True)
    asked = []

    def accelerator(**options: Any) -> Any:
        asked.append(options["cpu"])
        return SimpleNamespace(distributed_type=DistributedType.NO, num_processes=1)

    monkeypatch.setattr(train_module, "Accelerator", accelerator)
    train_module.make_accelerator(nano(runtime={"device": "auto"}))
    assert asked == [True]


# what it cannot do -------------------------------------------------------------------------------
@pytest.mark.parametrize("precision", ["bf16", "tf32"])
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


def test_tf32_is_no_format_of_a_cpu(nano: Nano, tmp_path: Path) -> None:
    """Where the config leaves the device open, too: it would be fp32 under another name."""
    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    config = nano(train={"precision": "tf32"}, runtime={"device": "auto"})
    validate(config)
    with pytest.raises(ConfigError, match=r"fp32 or bf16 here .*, got 'tf32'$"):
        run(config, tmp_path)


# how it rounds -----------------------------------------------------------------------------------
@pytest.fixture
def ours(nano: Nano, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Config of a run on a CPU that takes itself for one on a GPU."""
    monkeypatch.setattr(gpu, "wanted", lambda config: True)
    monkeypatch.setattr(gpu, "take", lambda config, place: "NVIDIA Made Up 0")

    def make(**changes: Any) -> RunConfig:
        runtime = {"compile": "off", "kernels": "torch", **changes.pop("runtime", {})}
        return nano(runtime=runtime, model={"vocab_size": VOCAB_SIZE}, **changes)

    return make


class Seen:
    """float32's precision in products: at passes forward and back, at updates and measures."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.passes: set[str] = set()
        self.others: set[str] = set()
        accumulate, probe = train_module.accumulate_gradients, train_module.RestartProbe.look

        def accumulated(accelerator: Any, wrapped: torch.nn.Module, **settings: Any) -> Any:
            self.others.add(torch.get_float32_matmul_precision())
            weight = next(p for p in wrapped.parameters() if p.requires_grad)
            hooks = [
                wrapped.register_forward_hook(lambda *_: self._add()),
                weight.register_post_accumulate_grad_hook(lambda _: self._add()),
            ]
            total = accumulate(accelerator, wrapped, **settings)
            for hook in hooks:
                hook.remove()
            self.others.add(torch.get_float32_matmul_precision())
            return total

        def looked(probe_: Any) -> Any:
            self.others.add(torch.get_float32_matmul_precision())
            return probe(probe_)

        monkeypatch.setattr(train_module, "accumulate_gradients", accumulated)
        monkeypatch.setattr(train_module.RestartProbe, "look", looked)

    def _add(self) -> None:
        self.passes.add(torch.get_float32_matmul_precision())


@pytest.fixture
def inherited() -> Iterator[None]:
    """What a notebook, or TORCH_ALLOW_TF32_CUBLAS_OVERRIDE=1 of a container, leaves set."""
    torch.set_float32_matmul_precision("high")
    yield
    torch.set_float32_matmul_precision("highest")


@pytest.mark.parametrize(("precision", "passes"), [("fp32", "highest"), ("tf32", "high")])
def test_tf32_is_that_of_training_passes_alone(
    ours: Callable[..., Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    inherited: None,
    precision: str,
    passes: str,
) -> None:
    seen, train = Seen(monkeypatch), {"precision": precision, "micro_batch_size": 2}
    assert run(ours(train=train), tmp_path).state == "finished"
    assert (seen.passes, seen.others) == ({passes}, {"highest"})
    assert torch.get_float32_matmul_precision() == "high"


@pytest.fixture
def triton(monkeypatch: pytest.MonkeyPatch) -> None:
    """Looks as if it were installed."""
    find = importlib.util.find_spec
    there = lambda name: SimpleNamespace() if name == "triton" else find(name)  # noqa: E731
    monkeypatch.setattr(gpu.importlib.util, "find_spec", there)


def flags() -> list[Any]:
    return [
        inductor.deterministic,
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        torch.utils.deterministic.fill_uninitialized_memory,
        torch.get_float32_matmul_precision(),
        os.environ.get(gpu.WORKSPACE),
    ]


def test_a_deterministic_run_sets_torch_and_sets_it_back(
    ours: Callable[..., Any], tmp_path: Path, triton: None
) -> None:
    before, during = flags(), []
    config = ours(runtime={"deterministic": True})
    record = run(config, tmp_path / "1", seen=lambda event: during.append(flags()))
    assert record.events[0].data["deterministic"]
    assert all(one == [True, True, False, False, "highest", ":4096:8"] for one in during)
    assert flags() == before
    run(config, tmp_path / "2", die_at=("train", 3))  # and where it ends early
    assert flags() == before
    plain = run(ours(), tmp_path / "3")  # after one with, one without may follow
    assert "deterministic" not in plain.events[0].data
    assert plain.metrics() == record.metrics()


def test_a_torch_or_machine_that_cannot_be_asked_is_left_alone(
    nano: Nano, monkeypatch: pytest.MonkeyPatch, triton: None
) -> None:
    """Torch without the setting; and without triton nothing is imported, which takes seconds."""
    monkeypatch.setattr(gpu, "wanted", lambda config: True)
    config, imported = nano(runtime={"deterministic": True}), []
    monkeypatch.setattr(gpu.importlib, "import_module", imported.append)
    with gpu.settings(config):
        assert torch.are_deterministic_algorithms_enabled()
    assert imported == ["torch._inductor.config"]
    monkeypatch.setattr(gpu.importlib.util, "find_spec", lambda _: None)
    with gpu.settings(config):
        assert torch.are_deterministic_algorithms_enabled()
    assert len(imported) == 1


def test_a_workspace_that_cannot_be_had_is_one_line(
    ours: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """cuBLAS reads the variable at its first product in a process."""
    before, config = flags(), ours(runtime={"deterministic": True})
    monkeypatch.setenv(gpu.WORKSPACE, ":4096:2")
    with pytest.raises(ConfigError, match=r"must be :4096:8 or :16:8 with .*, got ':4096:2'"):
        run(config, tmp_path)
    monkeypatch.delenv(gpu.WORKSPACE)
    run(ours(), tmp_path / "plain")
    with pytest.raises(ConfigError, match="false after a run without it in the same process"):
        run(config, tmp_path)
    assert flags() == before


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")
def test_compiled_blocks_are_made_anew_for_another_way_to_round(
    nano: Nano, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And stay one graph within a run, whose gradients are those of eager blocks."""
    monkeypatch.setattr(gpu, "wanted", lambda config: True)
    with native.restore_choice():
        native.choose("torch")
        torch.compiler.reset()
        one = Compared(nano(relora={"dropout": 0.1}))
        for deterministic, graphs in ((True, 1), (False, 2), (True, 2)):
            with gpu.settings(nano(runtime={"deterministic": deterministic})):
                for step in range(3):
                    one.check(step)
            assert one.counter.frame_count == graphs
        torch.compiler.reset()


RAISE = re.compile(
    r"aten\.(cumsum|put|histc|bincount|kthvalue|median|nll_loss2d|grid_sampler|resize_as|"
    r"embedding_bag|_embedding_bag|upsample|max_unpool|avg_pool|adaptive|reflection|ctc)"
)
"""Operations that torch lists as without a deterministic kernel on a GPU
(torch.use_deterministic_algorithms), and those of their names that are fine there."""


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        {"method": "full_rank"},
        {"method": "full_rank", "train": {"optimizer": "muon", "micro_batch_size": 2}},
        {"method": "galore", "galore": {"r": 4, "update_gap": 3}},
        {"method": "fira", "fira": {"r": 4, "update_gap": 3}},
        {"method": "apollo", "apollo": {"r": 4, "update_gap": 3}},
        {"method": "switchlora"},
        {"method": "sparse"},
        {"method": "sltrain"},
        {"relora": {"reset_frequency": 4, "restart_warmup_steps": 1, "adaptive_rank_energy": 0.9}},
        {
            "relora": {
                "reset_frequency": 4,
                "restart_warmup_steps": 1,
                "optimizer_state": "magnitude",
                "prune_ratio": 0.9,
            }
        },
    ],
    ids=[
        "full",
        "muon",
        "galore",
        "fira",
        "apollo",
        "switch",
        "sparse",
        "sltrain",
        "adapt",
        "prune",
    ],
)
def test_no_operation_of_a_run_lacks_a_deterministic_kernel(
    fake_run: Callable[[RunConfig], Any], changes: dict[str, Any]
) -> None:
    used = fake_run(short(**changes))["operations"]
    assert not [name for name in used if RAISE.match(name)]
    assert "aten.mm.default" in used


@pytest.mark.slow
def test_no_operation_of_the_head_lacks_a_deterministic_kernel(
    fake_run: Callable[[str], Any],
) -> None:
    used = fake_run("100 32 301")["operations"]
    assert not [name for name in used if RAISE.match(name)]


def test_running_sums_of_a_gpu_are_those_of_a_cpu() -> None:
    values = torch.rand(7, generator=torch.Generator().manual_seed(0))
    sums = [sum(values[: n + 1].tolist()) for n in range(7)]
    for there in (False, True):
        torch.testing.assert_close(running_sums(values, gpu=there), torch.tensor(sums))
