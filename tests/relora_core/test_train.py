import dataclasses
import json
import shutil

import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from training import (
    Record,
    assert_processes_equal_one,
    assert_same_state,
    resumed,
    resumes_exactly,
    run,
    run_in_processes,
)

import relora_core.train as train_module
from experiments import schema
from relora_core import native
from relora_core.config import ConfigError
from relora_core.data.grammar import VOCAB_SIZE
from relora_core.dropout import Dropout
from relora_core.model import SwiGLU
from relora_core.optim import clip
from relora_core.train import split_batch

EVERY_STEP = {"every_steps": 1, "keep_last": 12}


@pytest.fixture
def config(nano):
    def make(**changes):
        changes["model"] = {"vocab_size": VOCAB_SIZE, **changes.get("model", {})}
        changes.setdefault("relora", {}).setdefault("dropout", 0.2)
        changes.setdefault("checkpoint", {"every_steps": 3})
        return nano(**changes)

    return make


@pytest.mark.parametrize("method", ["full_rank", "lora", "relora"])
@pytest.mark.parametrize("die_at", [("train", 3), ("train", 4), ("train", 8), ("checkpoint", 9)])
def test_a_killed_and_resumed_run_equals_an_undisturbed_one(
    config, undisturbed, tmp_path, method, die_at
):
    """Bit for bit: losses, weights, moments; restarts at 4 and 8, checkpoints at 3, 6, 9, 12."""
    setting = config(method=method, train={"micro_batch_size": 2, "grad_clip": 0.5})
    went_on = resumes_exactly(setting, tmp_path, die_at=die_at, undisturbed=undisturbed)
    assert went_on == (die_at[1] > 3 or die_at[0] == "checkpoint")


@pytest.mark.parametrize("mode", ["corrected", "as_described", "as_coded", "as_executed"])
@pytest.mark.parametrize("offset", [-1, 0, 1])
def test_resuming_around_a_restart_is_exact_in_every_mode(
    config, undisturbed, tmp_path, mode, offset
):
    """From one step before, at, and one step after the second restart, with dropout on."""
    knobs = dataclasses.asdict(schema.compose([f"relora={mode}", "relora.r=4"]).relora)
    knobs |= {"alpha": 8.0, "dropout": 0.2, "reset_frequency": 4, "restart_warmup_steps": 1}
    setting = config(relora=knobs, checkpoint=EVERY_STEP)
    second = 8 if mode in ("corrected", "as_described") else 9
    full, expected = undisturbed(setting)
    assert [e.step for e in full.events if e.kind == "restart" and e.step == second]
    again = resumed(setting, tmp_path, source=expected, at=second + offset)
    assert again.events[0].step == second + offset
    assert again.metrics() == full.metrics(after=second + offset)
    assert_same_state(tmp_path, expected)


@pytest.mark.slow
@pytest.mark.parametrize(
    "knobs",
    [
        {"warm_start_steps": 5},
        {"full_rank_steps": 2, "low_rank_steps": 3, "restart_groups": 3},
        {"scaling": "trainable", "lr_ratio_b": 4.0, "full_rank_modules": ["last:1"]},
        {"optimizer_state": "magnitude", "prune_ratio": 0.9},
        {"rank_schedule": [[4, 2], [8, 6]]},
        {"adaptive_rank_energy": 0.7, "nested_rank": True},
        {"optimizer_state": "keep", "adaptive_rank_energy": 0.9, "warm_start_steps": 4},
        {"scaling": "trainable", "after_merge": "restore"},
        {"base_dtype": "bfloat16", "warm_start_steps": 6},
    ],
)
def test_resuming_is_exact_with_the_extensions(config, undisturbed, tmp_path, knobs):
    setting = config(relora=knobs, checkpoint=EVERY_STEP)
    full, expected = undisturbed(setting)
    for step in (5, 6, 8):
        again = resumed(setting, tmp_path / f"{step}", source=expected, at=step)
        assert again.metrics() == full.metrics(after=step)
        assert_same_state(tmp_path / f"{step}", expected)


def test_a_kill_inside_an_accumulation_window_costs_the_window_alone(config, tmp_path, monkeypatch):
    setting = config(train={"micro_batch_size": 1}, checkpoint={"every_steps": 1})
    full = run(setting, tmp_path / "full")
    backward, calls = Accelerator.backward, []

    def dying(self, loss, **options):
        calls.append(loss)
        if len(calls) == 4 * 6 + 3:  # the third of four micro-batches of the seventh step
            raise KeyboardInterrupt
        backward(self, loss, **options)

    monkeypatch.setattr(Accelerator, "backward", dying)
    first = run(setting, tmp_path / "killed", die_at=("never", 0))
    again = run(setting, tmp_path / "killed")
    assert again.events[0].step == 6
    assert first.metrics() | again.metrics() == full.metrics()


def test_every_restart_says_what_it_did(config, tmp_path):
    metrics = run(config(relora={"dropout": 0.0}), tmp_path).metrics()
    for step in (4, 8):
        assert metrics[step, "restart/logit_change_max"] < 1e-5
        before, after = metrics[step, "restart/loss_before"], metrics[step, "restart/loss_after"]
        assert after == pytest.approx(before, abs=1e-6)
        assert metrics[step + 1, "restart/loss_next"] == pytest.approx(after, abs=1e-4)
        assert metrics[step, "restart/state_zeroed"] == 1.0


def test_adapters_that_begin_at_a_multiple_of_f_are_no_restart(config, tmp_path):
    """At step 4 the warm start ends: nothing is merged, ranks stay, W + s B A counts from there."""
    knobs = {"dropout": 0.0, "warm_start_steps": 4, "adaptive_rank_energy": 0.99}
    dynamics = {"every_steps": 2, "what": ["update_restart"], "kinds": ["w_2"]}
    events = run(config(relora=knobs, dynamics=dynamics), tmp_path).events
    assert [(e.step, e.metrics["restart/count"]) for e in events if e.kind == "restart"] == [(8, 1)]
    begun, following = (e.metrics for e in events if e.kind == "method")
    assert following.keys() == {"restart/loss_next"}  # of the restart at 8
    assert begun["phase/full_rank"] == 0
    assert begun["restart/rank_mean"] == 4
    assert not any(name.startswith("restart/lo") for name in begun)
    ranks = {
        e.step: e.metrics["dynamics/update_restart/w_2/numerical_rank"]
        for e in events
        if e.kind == "dynamics"
    }
    assert ranks[4] > 8
    assert ranks[6] <= 4


def test_native_and_torch_kernels_agree_up_to_rounding(compiler, config, tmp_path):
    """Dropout included: both draw the same."""
    runs = {
        kernels: run(config(runtime={"kernels": kernels, "log_every_steps": 1}), tmp_path / kernels)
        for kernels in ("native", "torch")
    }
    begun = {k: recorder.events[0].data["kernels"] for k, recorder in runs.items()}
    assert begun == {"native": "native", "torch": "torch"}
    built = {k: recorder.events[0].data.get("kernels_build") for k, recorder in runs.items()}
    assert built == {"native": native.build(), "torch": None}
    first, second = (recorder.metrics() for recorder in runs.values())
    assert first != second
    for key, value in first.items():
        assert value == pytest.approx(second[key], rel=1e-3, abs=1e-5), key


def test_a_resumed_run_keeps_its_kernels(compiler, config, tmp_path):
    """And equals the undisturbed one, whatever is asked for the second time."""
    run(config(runtime={"kernels": "torch"}), tmp_path / "one")
    run(config(runtime={"kernels": "torch"}), tmp_path / "two", die_at=("train", 8))
    again = run(config(runtime={"kernels": "auto"}), tmp_path / "two")
    assert again.events[0].data["kernels"] == "torch"
    assert_same_state(tmp_path / "one", tmp_path / "two")


@pytest.mark.slow
def test_where_native_kernels_cannot_be_had(config, tmp_path, monkeypatch, capsys):
    run(config(), tmp_path / "old", die_at=("train", 8))
    capsys.readouterr()
    monkeypatch.setattr(native, "problem", lambda: "no compiler")
    try:
        with pytest.raises(
            ConfigError, match=r"runtime\.kernels must be auto or torch here \(no comp"
        ):
            run(config(runtime={"kernels": "native"}), tmp_path / "refused")
        run(config(), tmp_path / "slower")
        assert "training is slower: no compiler" in capsys.readouterr().err
        run(config(), tmp_path / "old")
        assert "the last digits will differ: no compiler" in capsys.readouterr().err
        run(config(runtime={"kernels": "torch"}), tmp_path / "plain")
        assert "kernels" not in capsys.readouterr().err
    finally:
        monkeypatch.undo()
        native.choose("auto")


def test_the_same_seed_gives_the_same_numbers_and_another_does_not(config, tmp_path):
    one = run(config(seed=3), tmp_path / "1").metrics()
    assert one == run(config(seed=3), tmp_path / "2").metrics()
    assert one != run(config(seed=4), tmp_path / "3").metrics()


@pytest.mark.slow
def test_evals_and_dynamics_change_no_number(config, tmp_path):
    plain = run(config(), tmp_path / "plain").metrics()
    measured = run(
        config(
            eval={
                "paloma": _on("paloma", every_steps=2, max_documents=1),
                "blimp": _on("blimp", every_steps=3, max_pairs=2),
            },
            dynamics={"every_steps": 2},
        ),
        tmp_path / "measured",
    ).metrics()
    assert {k: measured[k] for k in plain} == plain
    names = {name for _, name in measured}
    assert "eval/paloma/perplexity" in names
    assert "eval/blimp/no_bos/accuracy" in names
    assert "dynamics/weight/w_2/per" in names


def _on(name, **fields):
    from relora_core.config import BlimpConfig, PalomaConfig

    return {"paloma": PalomaConfig, "blimp": BlimpConfig}[name](enabled=True, **fields)


@pytest.mark.slow
@pytest.mark.parametrize(
    "knobs", [{}, {"nested_rank": True}, {"scaling": "trainable", "warm_start_steps": 2}]
)
def test_accumulation_changes_nothing_but_rounding(config, tmp_path, knobs):
    """Dropout's draws are those of a sequence's place in the whole batch, nested ranks a step's."""
    setting = {"relora": {"dropout": 0.2, **knobs}}
    full = run(config(**setting), tmp_path / "1").metrics()
    parts = run(config(train={"micro_batch_size": 1}, **setting), tmp_path / "2").metrics()
    for key, value in full.items():
        assert parts[key] == pytest.approx(value, rel=2e-3, abs=1e-5), key


def test_dropout_differs_between_steps_layers_sequences_and_seeds(config, monkeypatch, tmp_path):
    """8 steps of 2 passes through 14 adapters draw 224 masks, no two of them alike."""
    masks, mask = [], Dropout.mask

    def heard(self, x):
        masks.append(mask(self, x))
        return masks[-1]

    monkeypatch.setattr(Dropout, "mask", heard)
    for seed in (0, 1):
        setting = {"kernels": "torch", "log_every_steps": 1, "threads": 1, "device": "cpu"}
        train_knobs = {"steps": 8, "micro_batch_size": 2}
        run(config(seed=seed, train=train_knobs, runtime=setting), tmp_path / f"{seed}")
    sequences = [bytes(one.numpy()) for pass_ in masks for one in pass_]
    assert len(masks) == 2 * 8 * 2 * 14
    assert len(set(sequences)) == 2 * len(masks)


def test_restarts_happen_where_the_schedule_says(config, tmp_path):
    recorder = run(config(), tmp_path)
    assert [e.step for e in recorder.events if e.kind == "restart"] == [4, 8]
    lr = {e.step: e.metrics["train/lr"] for e in recorder.events if e.kind == "train"}
    assert lr[1] == 0.0
    assert lr[5] == 0.0  # the update after a restart: its 0-based index is 4
    assert lr[6] > 0.0


def final(recorder: Record) -> dict[str, float]:
    """The newest value of every metric, as a result holds it."""
    return {name: value for (_, name), value in sorted(recorder.metrics().items())}


@pytest.mark.parametrize(
    "knobs",
    [
        *({"runtime": {"log_every_steps": n}} for n in (5, 11, 1000)),
        {"checkpoint": {"every_steps": 1, "keep_last": 1}},
        {"checkpoint": {"every_minutes": 1e-4}},
    ],
)
def test_what_is_outside_the_identity_moves_no_final_number(config, undisturbed, tmp_path, knobs):
    """The loss is the mean of the last ten updates, whenever it was logged."""
    plain = undisturbed(config())[0]
    losses = [plain.metrics()[step, "train/loss"] for step in range(3, 12)]
    *_, last = (e for e in plain.events if e.kind == "train")
    recorder = run(config(**knobs), tmp_path)
    assert final(recorder) == final(plain)
    assert last.data == {"loss_steps": 10}
    assert 10 * last.metrics["train/loss"] - sum(losses) == pytest.approx(losses[-1], rel=0.1)


@pytest.mark.slow
def test_the_final_loss_survives_a_kill_and_an_older_checkpoint(config, tmp_path):
    setting = config(runtime={"log_every_steps": 7}, checkpoint=EVERY_STEP)
    full = run(setting, tmp_path / "full")
    for step in (1, 2, 5, 7, 11):
        again = resumed(setting, tmp_path / f"{step}", source=tmp_path / "full", at=step)
        assert again.metrics() == full.metrics(after=step)
    for step, since in ((2, 10), (5, 7)):  # of steps 3 to 12 it knows those from here on
        name = f"old{step}/checkpoints/step-{step:08d}"
        shutil.copytree(tmp_path / "full" / name.partition("/")[2], tmp_path / name)
        file = tmp_path / name / "progress.json"
        progress = json.loads(file.read_text())
        assert len(progress.pop("losses")) == step
        file.write_text(json.dumps(progress))
        (file.parent / "checksums.json").unlink()
        again = run(setting, tmp_path / f"old{step}")
        *_, last = (e for e in again.events if e.kind == "train")
        assert last.data == {"loss_steps": since}
        assert (again.metrics() == full.metrics(after=step)) == (since == 10)


@pytest.mark.parametrize("every", [1, 7, 1000])
def test_a_run_diverges_at_the_same_step_however_often_it_logs(config, tmp_path, every):
    setting = config(
        method="full_rank", train={"lr": 1e30, "steps": 8}, runtime={"log_every_steps": every}
    )
    events = [e for e in run(setting, tmp_path).events if e.kind in ("train", "diverged")]
    assert [(e.kind, e.step) for e in events[-2:]] == [("train", 4), ("diverged", 4)]


def test_bf16_trains_near_fp32(config, tmp_path):
    setting = {"relora": {"dropout": 0.0}}
    exact = run(config(**setting), tmp_path / "1").metrics()
    rough = run(config(train={"precision": "bf16"}, **setting), tmp_path / "2").metrics()
    assert rough[12, "train/loss"] == pytest.approx(exact[12, "train/loss"], rel=0.02)
    assert rough[12, "train/loss"] != exact[12, "train/loss"]


CHANGES = {
    "warm start": {"relora": {"warm_start_steps": 5}},
    "duty cycle": {"relora": {"full_rank_steps": 2, "low_rank_steps": 3}},
    "rank schedule": {"relora": {"rank_schedule": [[4, 2], [8, 6]]}},
    "adaptive rank": {"relora": {"adaptive_rank_energy": 0.7}},
    "restore": {"relora": {"after_merge": "restore", "base_dtype": "bfloat16"}},
    "trained scale": {"relora": {"scaling": "trainable"}},
    "full rank": {"method": "full_rank"},
    "galore": {"method": "galore", "galore": {"r": 4, "update_gap": 4}},
    "fira": {"method": "fira", "fira": {"r": 4, "update_gap": 4}},
    "apollo": {"method": "apollo", "apollo": {"r": 4, "update_gap": 4}},
    "sparse": {"method": "sparse", "sparse": {"update_gap": 4}},
    "sltrain": {"method": "sltrain", "sltrain": {"r": 4, "delta": 0.2, "refactor_every": 4}},
    "switchlora": {"method": "switchlora", "switchlora": {"r": 4, "interval": 10, "decay": None}},
}
"""All that may exchange what a step computes with; restarts at 4 and 8 in most."""


def changing(name: str) -> dict:
    """In bf16, evaluated and measured in between."""
    return {
        "train": {"precision": "bf16", "micro_batch_size": 2},
        "eval": {"blimp": _on("blimp", every_steps=6, max_pairs=1)},
        "dynamics": {"every_steps": 4, "what": ["weight", "gradient"]},
        "checkpoint": EVERY_STEP,
        **CHANGES[name],
    }


def types(monkeypatch) -> list[torch.dtype]:
    """Of w_2's output in every training pass from now on."""
    dtypes, forward = [], SwiGLU.forward

    def heard(self, x):
        y = forward(self, x)
        if self.training:
            dtypes.append(y.dtype)
        return y

    monkeypatch.setattr(SwiGLU, "forward", heard)
    return dtypes


@pytest.mark.slow
@pytest.mark.parametrize("name", CHANGES)
def test_bf16_lasts_through_every_change_and_a_kill(config, tmp_path, monkeypatch, name):
    """12 steps of two passes through two layers; resumed after the first change, bit for bit."""
    setting, dtypes = config(**changing(name)), types(monkeypatch)
    full = run(setting, tmp_path / "full")
    assert dtypes == [torch.bfloat16] * 12 * 2 * 2
    again = resumed(setting, tmp_path / "again", source=tmp_path / "full", at=6)
    assert again.metrics(after=6) == full.metrics(after=6)
    assert_same_state(tmp_path / "again", tmp_path / "full")
    assert dtypes[48:] == [torch.bfloat16] * 6 * 2 * 2


@pytest.mark.parametrize("limit", [None, 1.0, 1e35, 1e38])
@pytest.mark.parametrize("size", [1e-30, 1e-3, 1.0, 1e20, 1e37])
def test_a_norm_beyond_float32_leaves_finite_gradients_finite(limit, size):
    """The square of 1e20 is beyond float32, which ends at 3.4e38."""
    model = torch.nn.Linear(3, 2)
    generator = torch.Generator().manual_seed(0)
    for p in model.parameters():
        p.grad = size * torch.randn(p.shape, generator=generator)
    exact = [p.grad.double() for p in model.parameters()]
    norm = sum(g.square().sum() for g in exact).sqrt().item()
    assert clip(model, limit=limit, measured=True) == pytest.approx(norm, rel=1e-6, abs=1e-25)
    factor = 1.0 if limit is None or limit >= norm else limit / norm
    for p, g in zip(model.parameters(), exact, strict=True):
        if factor == 1.0:
            assert p.grad.double().equal(g)
        torch.testing.assert_close(p.grad.double(), g * factor, rtol=1e-5, atol=0.0)


@pytest.mark.parametrize("bad", [torch.inf, torch.nan])
def test_a_gradient_that_is_not_finite_is_not_hidden(bad):
    for limit in (None, 1.0):
        model = torch.nn.Linear(3, 2)
        for p in model.parameters():
            p.grad = torch.full_like(p, bad)
        assert not torch.tensor(clip(model, limit=limit, measured=True)).isfinite()
        assert not any(p.grad.isfinite().any() for p in model.parameters())


def test_the_batch_must_divide(nano):
    assert split_batch(nano(train={"batch_size": 8, "micro_batch_size": 2}), world=2) == 2
    with pytest.raises(ConfigError, match=r"divisible by the 3 processes, got 4; nearest valid: 3"):
        split_batch(nano(), world=3)
    with pytest.raises(
        ConfigError, match=r"must divide the 2 sequences .* got 4; nearest valid: 2"
    ):
        split_batch(nano(train={"micro_batch_size": 4}), world=2)


@pytest.mark.parametrize("kind", ["FSDP", "DEEPSPEED"])
def test_sharded_optimizers_are_refused(nano, monkeypatch, kind):
    """Their state lies elsewhere: a restart would edit copies, as very probably happened."""

    class Sharded:
        def __init__(self, **options):
            self.distributed_type = DistributedType[kind]

    monkeypatch.setattr(train_module, "Accelerator", Sharded)
    with pytest.raises(ConfigError, match=f"must be DDP or a single process, got .*{kind}"):
        train_module.make_accelerator(nano())


CHECK_TYPES = """
import relora_core.model as model
forward = model.SwiGLU.forward

def checked(self, x):
    y = forward(self, x)
    assert not self.training or str(y.dtype) == "torch.bfloat16"
    return y

model.SwiGLU.forward = checked
"""


@pytest.mark.slow
def test_bf16_lasts_in_several_processes(config, tmp_path):
    setting = config(**changing("rank schedule"))
    setting.relora.warm_start_steps = 2
    run_in_processes(setting, tmp_path, processes=2, prelude=CHECK_TYPES)


@pytest.mark.slow
def test_four_processes_equal_one(config, tmp_path):
    """DDP over gloo, restarts included: the same global batches, equal adapters on all ranks."""
    knobs = {"dropout": 0.2, "nested_rank": True, "rank_schedule": [[8, 6]], "warm_start_steps": 2}
    setting = config(relora=knobs, train={"micro_batch_size": 1})
    events = assert_processes_equal_one(setting, tmp_path, processes=4, atol=2e-3)
    spreads = [m["restart/rank_spread"] for _, _, m in events if "restart/rank_spread" in m]
    assert spreads == [0.0, 0.0]
