"""Whatever became of data, evals, checkpoints, curves or YAML: read as it is, or one clear line.

In each case one file of a sound set is damaged and read as a run reads it.
"""

from __future__ import annotations

import gzip
import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from experiments import typos
from experiments.report.figures import published
from relora_core import checkpoint, data
from relora_core.config import BlimpConfig, ConfigError, DataConfig, PalomaConfig, printable
from relora_core.data.base import DataError
from relora_core.evals import blimp, paloma
from relora_core.methods import build_method
from relora_core.model import Decoder
from tests.fuzz import command_line
from tests.fuzz.damage import damaged
from tests.relora_core.data_files import random_rows, write_bpe, write_rows

CLEAR = (ConfigError, DataError, OSError)
"""What the commands tell in one line."""


def sound(root: Path) -> None:
    """A small set of every kind of input."""
    write_rows(root / "rows" / "train-0.parquet", random_rows(40, vocab_size=200))
    write_bpe(root / "bpe")
    (root / "text").mkdir()
    lines = "".join(json.dumps({"text": f"the cat sat {i}" * 9}) + "\n" for i in range(20))
    (root / "text" / "a.jsonl").write_text(lines)
    (root / "text" / "b.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    (root / "text" / "c.txt").write_text("the dog sat too " * 30)
    (root / "paloma" / "one" / "val").mkdir(parents=True)
    (root / "paloma" / "one" / "val" / "x.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    (root / "blimp").mkdir()
    pair = {
        "sentence_good": "the cat sat",
        "sentence_bad": "the cat sit",
        "UID": "u",
        "pairID": "0",
    }
    pair |= {"field": "syntax", "linguistics_term": "agreement"}
    (root / "blimp" / "u.jsonl").write_text("".join(json.dumps(pair) + "\n" for _ in range(9)))


def read_rows(root: Path) -> None:
    read_stream(
        DataConfig(kind="pretokenized", path=str(root / "rows"), vocab_size=200, seq_len=32)
    )


def read_rows_with_tokenizer(root: Path) -> None:
    config = DataConfig(kind="pretokenized", path=str(root / "rows"), seq_len=32)
    config.tokenizer = str(root / "bpe")
    read_stream(config)


def read_text(root: Path) -> None:
    config = DataConfig(kind="text", path=str(root / "text"), seq_len=16)
    config.tokenizer = str(root / "bpe" / "tokenizer.json")
    read_stream(config, cache=root / "cache")


def read_stream(config: DataConfig, cache: Path | None = None) -> None:
    info = data.inspect(config)
    if cache:
        data.prepare(config, cache_dir=cache)
    stream = data.open_stream(config, seed=0, vocab_size=info.vocab_size, cache_dir=cache)
    rows = stream.next_rows(60)
    assert rows.min() >= 0
    assert rows.max() < info.vocab_size


def read_paloma(root: Path) -> None:
    config = PalomaConfig(enabled=True, path=str(root / "paloma"))
    paloma.inspect(config)
    paloma.load(config)


def read_blimp(root: Path) -> None:
    config = BlimpConfig(enabled=True, path=str(root / "blimp"))
    blimp.inspect(config)
    blimp.load(config)


def clear(error: BaseException, seed: int, path: Path) -> None:
    assert str(error) == printable(str(error)), (seed, path)


def a_case(
    reading: Callable[[Path], None], where: str, whole: Path, folder: Path, *, seed: int
) -> bool:
    """Whether the damaged set could be read; AssertionError unless so, or in one line not."""
    draw = random.Random(seed)
    shutil.copytree(whole, folder)
    path = draw.choice(sorted(p for p in (folder / where).rglob("*") if p.is_file()))
    content = path.read_bytes()
    if path.suffix == ".gz" and draw.random() < 0.6:
        path.write_bytes(gzip.compress(damaged(gzip.decompress(content), seed=seed)))
    else:
        path.write_bytes(damaged(content, seed=seed))
    try:
        with command_line.timed():
            reading(folder)
        return True
    except CLEAR as error:
        clear(error, seed, path)
        return False
    finally:
        shutil.rmtree(folder)


READINGS = [
    *((read_rows, "rows"), (read_rows_with_tokenizer, "bpe"), (read_text, "text")),
    *((read_text, "bpe"), (read_paloma, "paloma"), (read_blimp, "blimp")),
]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    root = tmp_path_factory.mktemp("data") / "whole"
    root.mkdir()
    sound(root)
    return root


@pytest.mark.parametrize(("reading", "where"), READINGS)
def test_damaged_data_are_one_line(reading, where, whole, tmp_path):
    reading(shutil.copytree(whole, tmp_path / "sound"))
    for seed in range(4):
        a_case(reading, where, whole, tmp_path / "x", seed=seed)


@pytest.mark.slow
@pytest.mark.parametrize(("reading", "where"), READINGS)
def test_so_are_100_more_of_each(reading, where, whole, tmp_path):
    read = sum(
        a_case(reading, where, whole, tmp_path / "x", seed=100 + seed) for seed in range(100)
    )
    assert read < 95


# checkpoints ------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    from tests.conftest import nano_config

    torch.manual_seed(0)
    config = nano_config()
    model = Decoder(config.model)
    build_method(config).adapt(model)
    optimizer = torch.optim.AdamW(model.parameters())
    folder = tmp_path_factory.mktemp("saved") / "checkpoints"
    for step in (1, 2):
        for parameter in model.parameters():
            parameter.grad = torch.full_like(parameter, 0.1)
        optimizer.step()
        progress = checkpoint.Progress(step=step)
        rng = [checkpoint.rng_state()]
        with checkpoint.Writer(folder, keep_last=2) as writer:
            writer.save(model=model, optimizer=optimizer, progress=progress, rng=rng)
    return folder, model, optimizer


def a_checkpoint(saved, folder: Path, *, seed: int, checksums: bool) -> None:
    source, model, optimizer = saved
    shutil.copytree(source, folder)
    newest = checkpoint.complete(folder)[-1]
    path = random.Random(seed).choice(sorted(newest.iterdir()))
    before = path.read_bytes()
    path.write_bytes(damaged(before, seed=seed))
    changed = path.read_bytes() != before and path.name != checkpoint.CHECKSUMS
    if not checksums:
        (newest / checkpoint.CHECKSUMS).unlink()
    with command_line.timed():
        answer = checkpoint.set_aside_damaged(folder)
        assert not (changed and checksums and not answer), (seed, path)
        intact = True
        try:
            progress = checkpoint.load(
                checkpoint.complete(folder)[-1], model=model, optimizer=optimizer
            )
            assert not (checksums and changed and progress.step != 1), (seed, path)
        except CLEAR as error:
            clear(error, seed, path)
            intact = False
        assert intact or not checksums, (seed, path)
    shutil.rmtree(folder)


@pytest.mark.slow
@pytest.mark.parametrize("checksums", [True, False])
def test_a_damaged_checkpoint_is_set_aside_or_named(saved, checksums, tmp_path):
    for seed in range(75):
        a_checkpoint(saved, tmp_path / "x", seed=seed, checksums=checksums)


# curves and YAML --------------------------------------------------------------------------------
def the_curves() -> bytes:
    models = {f"{s}-{m}": {"train_loss_digitised": {"0": 9.0, "100": 5.0}} for s in "ts" for m in
              ("rel", "dec")}  # fmt: skip
    for model in models.values():
        model["eval"] = {"100": {"paloma_ppl": 50.0, "blimp": 0.6}}  # type: ignore[assignment]
    hours = {name: {"gpu_h": 10.0} for name in models}
    curves = {"per_weights": {"swiglu_w2|tiny|relora": [[0, 0.5], [100, 0.6]]}}
    content = {"models": models, "gpu_hours": hours, "learning_dynamics_digitised": curves}
    return json.dumps(content).encode()


def test_damaged_curves_are_one_line(tmp_path):
    file = tmp_path / "curves.json"
    file.write_bytes(the_curves())
    published.load(file, models=["tiny"])
    for seed in range(300):
        file.write_bytes(damaged(the_curves(), seed=seed))
        try:
            with command_line.timed():
                published.load(file, models=["tiny", "small"])
        except ConfigError as error:
            clear(error, seed, file)


@pytest.mark.slow
def test_damaged_yaml_is_one_line(tmp_path):
    text = (typos.CONF / "experiment" / "demo.yaml").read_bytes()
    (tmp_path / "conf" / "experiment").mkdir(parents=True)
    (tmp_path / "cwd").mkdir()
    file = tmp_path / "conf" / "experiment" / "mine.yaml"
    for seed in range(24):
        file.write_bytes(damaged(text, seed=seed))
        answer = command_line.run_py(
            ["--config-dir", str(tmp_path / "conf"), "experiment=mine"], cwd=tmp_path / "cwd"
        )
        assert command_line.faults(answer) == [], (seed, answer)
        assert list((tmp_path / "cwd").iterdir()) == []
