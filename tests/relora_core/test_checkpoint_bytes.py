"""The size of a checkpoint from shapes alone, against the files that training writes."""

import pytest

from relora_core import checkpoint, costs
from relora_core.config import METHODS
from relora_core.data.grammar import VOCAB_SIZE
from relora_core.events import NullSink
from relora_core.train import train


def written(config, folder) -> int:
    """Bytes of the largest checkpoint that the run leaves."""
    train(config, checkpoints=folder / "checkpoints", cache_dir=folder, sink=NullSink())
    paths = checkpoint.complete(folder / "checkpoints")
    return max(sum(file.stat().st_size for file in path.iterdir()) for path in paths)


@pytest.mark.parametrize("layers", [2, 5])
@pytest.mark.parametrize("method", METHODS)
def test_a_checkpoint_is_as_large_as_its_shapes_say(nano, tmp_path, method, layers):
    model = {"vocab_size": VOCAB_SIZE, "n_layers": layers}
    config = nano(method=method, model=model, train={"steps": 2})
    assert costs.checkpoint_bytes(config) == pytest.approx(written(config, tmp_path), rel=0.02)


@pytest.mark.parametrize(
    "changes",
    [
        {"relora": {"after_merge": "restore"}},
        {"relora": {"after_merge": "restore", "scaling": "trainable"}},
        {"relora": {"full_rank_modules": ["attention"], "r": 8}},
        {"method": "lora", "relora": {"warm_start_steps": 2}},
        {"method": "lora", "relora": {"r": 0}},
        {"method": "full_rank", "train": {"optimizer": "muon"}},
        {"train": {"optimizer": "muon"}},
        {"train": {"optimizer": "muon"}, "relora": {"warm_start_steps": 2, "r": 1}},
        {"method": "switchlora", "switchlora": {"freeze_steps": 1, "interval": 2, "decay": None}},
        {"method": "switchlora", "switchlora": {"interval": None, "r": 4}},
        {"method": "sltrain", "sltrain": {"r": 4, "delta": 0.2}},
        {"method": "sltrain", "sltrain": {"r": 0, "delta": 0.5}},
        {"method": "sltrain", "sltrain": {"r": 4, "delta": 0.0, "init": "spectral"}},
        {"method": "sparse", "sparse": {"density": 0.4, "bias_correction": "entry"}},
        {"dynamics": {"every_steps": 2, "what": ["update_restart"]}},
        {"dynamics": {"every_steps": 2, "what": ["update_restart"], "kinds": ["w_2", "q_proj"]}},
        {"dynamics": {"every_steps": 2, "what": ["update_total", "weight"]}},
    ],
    ids=str,
)
def test_what_a_procedure_keeps_beside_weights_is_counted(nano, tmp_path, changes):
    model = {"vocab_size": VOCAB_SIZE}
    policy = {"every_steps": 1, "keep_last": 3}
    train = {"steps": 3, **changes.get("train", {})}
    config = nano(**{**changes, "model": model, "train": train, "checkpoint": policy})
    assert costs.checkpoint_bytes(config) == pytest.approx(written(config, tmp_path), rel=0.02)
