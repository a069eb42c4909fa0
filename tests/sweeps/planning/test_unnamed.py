"""What differs between runs and stands in no name is a line; what an option gives is not."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from experiments import schema
from experiments.disk.output_dir import plan_folder
from relora_core.config import RunConfig
from sweeps.planning.plan import comparison_notes, load, make_plan, store

VOCABULARY = 300
LR = "names say model alone, yet model=tiny has train.lr=0.001; model=small has train.lr=0.0003"


def composed(*commands: str) -> list[RunConfig]:
    configs = [schema.compose(command.split()) for command in commands]
    for config in configs:
        config.model.vocab_size = VOCABULARY
    return configs


@pytest.mark.parametrize(
    ("commands", "lines"),
    [
        (("model=tiny train.lr=1e-3", "model=small train.lr=3e-4"), [LR]),
        (("model=tiny", "model=small"), []),  # its width is what the name means
        (("model=tiny model.n_layers=8", "model=small"), ["model=tiny has model.n_layers=8"]),
        (("model=tiny seed=0 train.lr=1e-3", "model=small seed=1 train.lr=3e-4"), [LR]),
        (("relora=corrected", "relora=as_coded"), []),
        (("relora=corrected relora.alpha=8", "relora=as_coded"), ["has relora.alpha=8; relora=as"]),
        (("method=relora", "method=full_rank", "method=galore"), []),
        (("relora.r=4 relora.scale=2", "relora.r=8 relora.scale=2"), []),
        (("relora.r=4 relora.alpha=8", "relora.r=8 relora.alpha=16"), []),
        (("train.lr=1e-3 train.steps=9", "train.lr=1e-4 train.steps=9"), []),
        (
            ("experiment=demo", "experiment=laptop"),
            ["names say experiment alone, yet experiment=demo has relora.dropout=0, "],
        ),
    ],
)
def test_a_label_hides_nothing(commands: tuple[str, ...], lines: list[str]) -> None:
    said = [line for line in comparison_notes(composed(*commands)) if line.startswith("names say")]
    assert len(said) == len(lines)
    for line, one in zip(lines, said, strict=True):
        assert line in one
        assert len(one) < 400


def test_a_command_that_joins_a_sweep_with_other_settings_is_said_in_its_plan(
    make: Callable[..., RunConfig], tmp_path: Path
) -> None:
    def planned(name: str, lr: float) -> list[str]:
        config = make()
        config.model.name, config.train.lr = name, lr
        return store(make_plan([({}, config)], name="s"), output_dir=tmp_path / "out").notes

    assert planned("tiny", 1e-3) == []
    planned("small", 3e-4)
    path = plan_folder(tmp_path / "out", name="s") / "plan.json"
    assert load(path).notes == [LR]
    planned("nano", 1e-4)  # one line for all of them, not one more
    assert load(path).notes == [f"{LR}; model=nano has train.lr=0.0001"]
