"""Checkpoints are written while training goes on, hold one step's state, and tell damage."""

from __future__ import annotations

import itertools
import json
import shutil
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from training import Record, run

from relora_core import checkpoint
from relora_core.checkpoint import FROZEN, MODEL
from relora_core.data.grammar import VOCAB_SIZE
from relora_core.train import train

EVERY = 2
STEPS = 12


def checkpoints(folder: Path) -> list[Path]:
    return checkpoint.complete(folder / "checkpoints")


def digests(folder: Path) -> dict[str, dict[str, str]]:
    """Checkpoint -> file -> sha256; progress.json holds seconds."""
    return {
        path.name: {
            name: digest
            for name, digest in json.loads((path / "checksums.json").read_text()).items()
            if name != "progress.json"
        }
        for path in checkpoints(folder)
    }


@pytest.fixture
def config(nano):
    def make(**changes):
        changes.setdefault("checkpoint", {"every_steps": EVERY, "keep_last": 99})
        changes.setdefault("relora", {"dropout": 0.2})
        return nano(model={"vocab_size": VOCAB_SIZE}, train={"steps": STEPS}, **changes)

    return make


# in the background --------------------------------------------------------------------------------
def test_training_goes_on_while_a_checkpoint_is_written(config, tmp_path, monkeypatch):
    """The write of step 2 ends only when step 3 has; what it holds is step 2 all the same."""
    run(config(), tmp_path / "plain")
    gate, write = threading.Event(), checkpoint._write

    def late(file, content):
        assert gate.wait(60), "training waited for the disk"
        write(file, content)

    def seen(event):
        if (event.kind, event.step) == ("train", EVERY + 1):
            gate.set()

    monkeypatch.setattr(checkpoint, "_write", late)
    run(config(), tmp_path / "late", seen=seen)
    assert len(digests(tmp_path / "plain")) == STEPS // EVERY
    assert digests(tmp_path / "late") == digests(tmp_path / "plain")


def test_a_checkpoint_is_told_once_and_only_when_it_is_on_disk(config, tmp_path):
    def seen(event):
        if event.kind == "checkpoint":
            path = tmp_path / "checkpoints" / f"step-{event.step:08d}"
            assert path in checkpoints(tmp_path)
            assert checkpoint.damage(path) is None

    record = run(config(), tmp_path, seen=seen)
    assert record.of("checkpoint") == list(range(EVERY, STEPS + 1, EVERY))


@pytest.mark.parametrize("step", [EVERY, STEPS])
def test_a_full_disk_ends_the_run_and_says_so(config, tmp_path, monkeypatch, step):
    write = checkpoint._write

    def full(file, content):
        if f"{step:08d}" in str(file):
            raise OSError(28, "No space left on device", str(file))
        write(file, content)

    monkeypatch.setattr(checkpoint, "_write", full)
    record = Record()
    with pytest.raises(OSError, match="No space left"):
        train(config(), checkpoints=tmp_path / "c", cache_dir=tmp_path, sink=record)
    assert record.of("checkpoint") == list(range(EVERY, step, EVERY))
    assert record.of("train")[-1] <= step + EVERY
    assert sorted(int(p.name[5:]) for p in (tmp_path / "c").iterdir()) == record.of("checkpoint")


def test_what_else_ends_a_run_does_not_hide_a_failed_write(config, tmp_path, monkeypatch):
    def full(file, content):
        raise OSError(28, "No space left on device", str(file))

    def seen(event):
        if (event.kind, event.step) == ("train", EVERY + 1):
            raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint, "_write", full)
    with pytest.raises(KeyboardInterrupt) as caught:
        run(config(), tmp_path, seen=seen)
    assert "No space left on device" in caught.value.__notes__[0]


def test_what_else_ends_a_run_leaves_the_checkpoint_that_was_begun(config, tmp_path):
    def seen(event):
        if (event.kind, event.step) == ("train", EVERY + 1):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(config(), tmp_path, seen=seen)
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == [f"step-{EVERY:08d}"]
    assert checkpoint.damage(checkpoints(tmp_path)[0]) is None


# frozen weights -----------------------------------------------------------------------------------
@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"relora": {"full_rank_steps": 2, "low_rank_steps": 3, "dropout": 0.2}},
        {"relora": {"warm_start_steps": 3, "restart_groups": 3}},
        {"relora": {"base_dtype": "bfloat16", "after_merge": "restore"}},
        {"method": "lora", "relora": {"r": 0}},
        {"method": "galore"},
        {"method": "sparse"},
        {"method": "sltrain", "sltrain": {"r": 4, "refactor_every": 5}},
        {"method": "switchlora", "switchlora": {"r": 4, "interval": 10, "decay": None}},
    ],
    ids=str,
)
def test_not_writing_what_did_not_change_changes_no_checkpoint(
    config, tmp_path, monkeypatch, changes
):
    policy = {"every_steps": 1, "keep_last": 99}
    run(config(checkpoint=policy, **changes), tmp_path / "linked")
    monkeypatch.setattr(checkpoint.Writer, "_same", lambda self, versions: None)
    run(config(checkpoint=policy, **changes), tmp_path / "written")
    assert digests(tmp_path / "linked") == digests(tmp_path / "written")
    assert not [p for p in checkpoints(tmp_path / "linked") if checkpoint.damage(p)]


def test_frozen_weights_are_written_only_when_they_changed_and_never_for_two_neighbours(
    config, tmp_path
):
    """Restarts at 4 and 8, each before its own step's checkpoint."""
    run(config(checkpoint={"every_steps": 1, "keep_last": 99}), tmp_path)
    files = [(path / FROZEN).stat().st_ino for path in checkpoints(tmp_path)]
    assert files[0] == files[2]
    assert files[3] == files[5]
    assert files[4] == files[6]
    assert files[7] == files[9] == files[11]
    assert len(set(files)) == 6
    assert all(one != other for one, other in itertools.pairwise(files))


def test_older_checkpoints_may_go(config, tmp_path):
    run(config(checkpoint={"every_steps": 1, "keep_last": 2}), tmp_path / "few")
    run(config(checkpoint={"every_steps": 1, "keep_last": 99}), tmp_path / "all")
    few, every = digests(tmp_path / "few"), digests(tmp_path / "all")
    assert few == {name: every[name] for name in sorted(every)[-2:]}
    assert not [p for p in checkpoints(tmp_path / "few") if checkpoint.damage(p)]


def test_full_rank_has_one_file_of_weights(config, tmp_path):
    run(config(method="full_rank"), tmp_path)
    assert not (checkpoints(tmp_path)[-1] / FROZEN).exists()


# damage -------------------------------------------------------------------------------------------
def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.unlink()  # not in a place that another checkpoint shares
    file.write_bytes(content)


def truncate(file: Path) -> None:
    content = file.read_bytes()
    file.unlink()
    file.write_bytes(content[: len(content) // 2])


FILES = (MODEL, FROZEN, "optimizer.pt", "rng.pt", "progress.json")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run with all of its checkpoints."""
    from tests.conftest import nano_config

    folder = tmp_path_factory.mktemp("whole")
    setting = nano_config(
        model={"vocab_size": VOCAB_SIZE},
        train={"steps": STEPS},
        relora={"dropout": 0.2},
        checkpoint={"every_steps": EVERY, "keep_last": 99},
    )
    return setting, folder, run(setting, folder).metrics()


@pytest.mark.parametrize("name", [*FILES, "checksums.json"])
@pytest.mark.parametrize("damage", [flip, truncate, Path.unlink], ids=lambda f: f.__name__)
def test_damage_is_noticed(finished, tmp_path, name, damage):
    path = tmp_path / "step-00000002"
    shutil.copytree(checkpoints(finished[1])[0], path)
    assert checkpoint.damage(path) is None
    damage(path / name)
    if name != "checksums.json":
        assert checkpoint.damage(path) == name
    elif damage is not Path.unlink:  # without one it may be from before there were checksums
        assert checkpoint.damage(path) is not None


def test_what_somebody_leaves_beside_the_files_is_no_damage(finished, tmp_path):
    """Unless it has the name of one that would be loaded."""
    path = tmp_path / "step-00000002"
    shutil.copytree(checkpoints(finished[1])[0], path)
    for name, damage in ((".DS_Store", None), ("reference.safetensors", "checksums.json")):
        (path / name).write_text("")
        assert checkpoint.damage(path) == damage


def test_a_damaged_checkpoint_falls_back_to_the_one_before(finished, tmp_path, capsys):
    setting, folder, metrics = finished
    shutil.copytree(folder / "checkpoints", tmp_path / "checkpoints")
    flip(checkpoints(tmp_path)[-1] / "optimizer.pt")
    truncate(checkpoints(tmp_path)[-2] / FROZEN)
    record = run(setting, tmp_path)
    start = record.events[0]
    assert start.step == STEPS - 2 * EVERY
    assert [line.split()[0] for line in start.data["damaged"]] == ["step-00000012", "step-00000010"]
    assert f"({FROZEN} is not as it was written)" in capsys.readouterr().err
    assert {k: v for k, v in metrics.items() if k[0] > start.step} == record.metrics()
    assert digests(tmp_path) == digests(folder)
    run(setting, tmp_path)
    assert not list((tmp_path / "checkpoints").glob(".tmp-*"))


def test_a_checkpoint_from_before_checksums_still_loads(finished, tmp_path):
    setting, folder, metrics = finished
    path = tmp_path / "checkpoints" / "step-00000006"
    shutil.copytree(checkpoints(folder)[2], path)
    weights = checkpoint.load_weights(path)
    for name in ("checksums.json", FROZEN):
        (path / name).unlink()
    save_file(weights, path / MODEL)
    record = run(setting, tmp_path)
    assert record.events[0].step == 6
    assert {k: v for k, v in metrics.items() if k[0] > 6} == record.metrics()


def _see_gpus(monkeypatch: pytest.MonkeyPatch, count: int, *, current: int) -> list[torch.Tensor]:
    """Generators of GPUs that torch is made to see; the process is on the one at `current`."""
    generators = [torch.tensor([0]) for _ in range(count)]

    def set_state(state: torch.Tensor) -> None:
        generators[current] = state

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: current)
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda: generators[current])
    monkeypatch.setattr(torch.cuda, "get_rng_state_all", lambda: list(generators))
    monkeypatch.setattr(torch.cuda, "set_rng_state", set_state)
    monkeypatch.setattr(
        torch.cuda, "set_rng_state_all", lambda states: [generators[i] for i in range(len(states))]
    )
    return generators


def test_a_rank_resumes_its_generator_on_a_gpu_of_another_index(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    before = _see_gpus(monkeypatch, 4, current=3)
    before[3] = torch.tensor([42])
    state = checkpoint.rng_state()
    after = _see_gpus(monkeypatch, 1, current=0)
    checkpoint.set_rng_state(state)
    assert after[0].item() == 42


@pytest.mark.parametrize(("count", "current", "expected"), [(1, 0, 0), (4, 2, 2), (8, 6, 3)])
def test_a_checkpoint_with_a_generator_of_every_gpu_resumes_on_fewer_or_more(
    monkeypatch: pytest.MonkeyPatch, count: int, current: int, expected: int
) -> None:
    _see_gpus(monkeypatch, 4, current=0)
    state = {**checkpoint.rng_state(), "cuda": [torch.tensor([index]) for index in range(4)]}
    after = _see_gpus(monkeypatch, count, current=current)
    checkpoint.set_rng_state(state)
    assert after[current].item() == expected


def test_a_resumed_run_holds_no_file_of_its_checkpoint(config, tmp_path):
    """On NFS the folder could not be removed later, and the run would fail."""
    maps = Path("/proc/self/maps")
    if not maps.exists():
        pytest.skip("only Linux lists the files that a process has mapped")
    measured = {"every_steps": 100, "what": ["update_restart"], "kinds": ["w_2"]}
    setting = config(method="lora", dynamics=measured)
    run(setting, tmp_path, die_at=("train", 7))
    held = []
    again = run(setting, tmp_path, seen=lambda _: held.append(str(tmp_path) in maps.read_text()))
    assert again.events[0].data["resumed"]
    assert held
    assert not any(held)
