"""Small configs that tests share, and where real data is when it is there."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from relora_core.config import (
    DataConfig,
    ModelConfig,
    ReLoRAConfig,
    RunConfig,
    RuntimeConfig,
    ScheduleConfig,
    TrainConfig,
)

os.environ.setdefault("OMP_NUM_THREADS", "1")  # two test workers share two cores

SHARED = Path(__file__).resolve().parent.parent.parent / "shared" / "data"


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real BLiMP, tokenizer, text and rows; not part of a clone."""
    if not SHARED.is_dir():
        pytest.skip("real data is not here: no ../shared/data beside the checkout")
    return SHARED


def nano_config(**changes: object) -> RunConfig:
    """A run of seconds; `relora={...}` and the like replace fields of a section."""
    sections = {
        "model": ModelConfig(
            name="nano", d_model=32, d_ff=48, n_layers=2, n_heads=4, n_kv_heads=2, vocab_size=97
        ),
        "relora": ReLoRAConfig(r=4, alpha=8.0, reset_frequency=4, restart_warmup_steps=1),
        "schedule": ScheduleConfig(warmup_steps=2, min_ratio=0.1),
        "train": TrainConfig(steps=12, batch_size=4, lr=1e-2),
        "data": DataConfig(seq_len=16),
        "runtime": RuntimeConfig(device="cpu", log_every_steps=1, threads=1),
    }
    for name, fields in list(changes.items()):
        if isinstance(fields, dict):
            section = sections.get(name) or RunConfig.__dataclass_fields__[name].default_factory()
            for key, value in fields.items():
                setattr(section, key, value)
            sections[name] = section
            del changes[name]
    return RunConfig(**{"method": "relora", **sections, **changes})  # type: ignore[arg-type]


@pytest.fixture
def nano() -> Callable[..., RunConfig]:
    return nano_config
