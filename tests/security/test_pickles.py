"""Files from elsewhere are read without calling what they name, and end in one line.

A pickle in the place of any file that is read: checkpoints, models to import, tokenizers, data,
studies. MLflow itself calls what a logged model names (`mlflow.pyfunc.load_model`); no command here
loads one.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import pickle
from collections.abc import Callable, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import optuna
import pytest
import torch

from experiments.disk.run_dir import RunDir
from experiments.run.runner import run_experiment
from relora_core import checkpoint, data, export
from relora_core.config import BlimpConfig, ConfigError, DataConfig, PalomaConfig, RunConfig
from relora_core.data.base import DataError
from relora_core.data.grammar import VOCAB_SIZE
from relora_core.evals.blimp import inspect as inspect_blimp
from relora_core.evals.paloma import inspect as inspect_paloma
from sweeps import worker
from sweeps.search import journal, samplers
from sweeps.search.config import SearchConfig

ONE_LINE = (ConfigError, DataError)


class Evil:
    """Unpickling it makes a folder."""

    def __init__(self, canary: Path) -> None:
        self.canary = str(canary)

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (self.canary,)


@pytest.fixture
def canary(tmp_path: Path) -> Path:
    return tmp_path / "canary"


def plain(canary: Path) -> bytes:
    return pickle.dumps(Evil(canary))


def zipped(canary: Path) -> bytes:
    """As torch.save writes it."""
    buffer = io.BytesIO()
    torch.save(Evil(canary), buffer)
    return buffer.getvalue()


def legacy(canary: Path) -> bytes:
    buffer = io.BytesIO()
    torch.save(Evil(canary), buffer, _use_new_zipfile_serialization=False)
    return buffer.getvalue()


KINDS: Sequence[Callable[[Path], bytes]] = (plain, zipped, legacy)


def test_the_pickles_here_would_do_it(canary: Path) -> None:
    for make in (zipped, legacy):
        torch.load(io.BytesIO(make(canary)), weights_only=False)
        canary.rmdir()
    pickle.loads(plain(canary))
    assert canary.is_dir()


def refused(run: Callable[[], object], canary: Path) -> None:
    """One line, and nothing was called."""
    with pytest.raises(ONE_LINE) as caught:
        run()
    assert "\n" not in str(caught.value)
    assert not canary.exists()


@pytest.mark.parametrize("make", KINDS, ids=lambda make: make.__name__)
@pytest.mark.parametrize("file", ["optimizer.pt", "rng.pt", checkpoint.MODEL, checkpoint.FROZEN])
def test_a_checkpoint_is_only_read(
    file: str,
    make: Callable[[Path], bytes],
    nano: Callable[..., RunConfig],
    tmp_path: Path,
    canary: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    config = nano(model={"vocab_size": VOCAB_SIZE}, checkpoint={"every_steps": 6})
    config.output_dir = str(tmp_path / "out")
    run = RunDir(tmp_path / "out" / "runs" / "a")
    run_experiment(config, run)
    run.result_path.unlink()
    run.update_status(state="failed")
    for path in checkpoint.complete(run.checkpoints):
        (path / file).write_bytes(make(canary))
        sums = json.loads((path / checkpoint.CHECKSUMS).read_text())
        sums[file] = hashlib.sha256(make(canary)).hexdigest()
        (path / checkpoint.CHECKSUMS).write_text(json.dumps(sums))
    capfd.readouterr()
    assert worker.work(run.path, stop=lambda: False) == worker.FAILED  # type: ignore[arg-type]
    said = capfd.readouterr().err
    assert not canary.exists()
    assert file in said
    assert "Traceback" not in said
    assert said.count("\n") == 1
    assert run.status().state == "failed"


@pytest.mark.parametrize("make", KINDS, ids=lambda make: make.__name__)
@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_a_model_to_import_is_only_read(
    name: str, make: Callable[[Path], bytes], tmp_path: Path, canary: Path
) -> None:
    source = tmp_path / "source"
    source.mkdir()
    (source / name).write_bytes(make(canary))
    told = {"model_type": "llama", "auto_map": {"AutoConfig": "evil.Config"}}
    (source / "config.json").write_text(json.dumps(told))
    (source / "evil.py").write_text(f"import os; os.mkdir({str(canary)!r})\n")
    target = tmp_path / "target"
    refused(lambda: export.import_model(source, folder=target, tokenizer=None), canary)
    assert not target.exists()


@pytest.mark.parametrize("make", KINDS, ids=lambda make: make.__name__)
def test_data_and_tokenizers_are_only_read(
    make: Callable[[Path], bytes], tmp_path: Path, canary: Path
) -> None:
    folder = tmp_path / "data"
    for name in ("tokenizer.json", "train-0.parquet", "a.jsonl", "blimp.tar", "c4/val/a.jsonl.gz"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(make(canary))
    rows = DataConfig(kind="pretokenized", path=str(folder), seq_len=8)
    cache = tmp_path / "cache"
    text = DataConfig(kind="text", path=str(folder / "a.jsonl"), tokenizer=str(folder), seq_len=8)
    refused(lambda: data.load_tokenizer(text), canary)
    refused(lambda: data.inspect(rows, cache_dir=cache), canary)
    refused(lambda: data.inspect(text, cache_dir=cache), canary)
    blimp = BlimpConfig(path=str(folder / "blimp.tar"))
    refused(lambda: inspect_blimp(blimp), canary)
    paloma = PalomaConfig(path=str(folder), split="val")
    refused(lambda: inspect_paloma(paloma), canary)


# studies ----------------------------------------------------------------------------------------
def test_a_pickle_as_a_studys_journal_is_damage(tmp_path: Path, canary: Path) -> None:
    for make in KINDS:
        (tmp_path / "journal.log").write_bytes(make(canary) + b"\n")
        assert journal.damage(tmp_path / "journal.log")
    assert not canary.exists()


def cmaes_sampler(**options: Any) -> Any:
    return samplers.make_sampler(
        SearchConfig(sampler={"name": "cmaes", **options}), space={}, draw=0
    )


@pytest.mark.parametrize("options", [{}, {"use_separable_cma": True}, {"with_margin": True}])
def test_a_samplers_state_in_a_study_calls_nothing(options: dict[str, bool], canary: Path) -> None:
    sampler = cmaes_sampler(**options)
    moment = datetime(2026, 1, 1)
    trial = optuna.trial.FrozenTrial(
        number=0,
        trial_id=0,
        state=optuna.trial.TrialState.COMPLETE,
        value=1.0,
        datetime_start=moment,
        datetime_complete=moment,
        params={},
        distributions={},
        user_attrs={},
        system_attrs=sampler._split_optimizer_str(plain(canary).hex()),
        intermediate_values={},
    )
    refused(lambda: sampler._restore_optimizer([trial]), canary)


@pytest.mark.filterwarnings("ignore")
def test_cmaes_goes_on_from_its_own_state() -> None:
    pytest.importorskip("cmaes", reason="the sampler's package is not installed")
    asked = []
    for make in (cmaes_sampler, optuna.samplers.CmaEsSampler):
        study = optuna.create_study(sampler=make() if make is cmaes_sampler else make(seed=0))
        study.optimize(lambda t: sum(t.suggest_float(k, -5, 5) ** 2 for k in "xy"), n_trials=25)
        asked.append([trial.params for trial in study.trials])
    assert asked[0] == asked[1]
