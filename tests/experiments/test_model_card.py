"""An exported model's card says what the run's records say, of the step that was exported."""

from __future__ import annotations

import re

import pytest
import yaml

from experiments.__main__ import export
from experiments.disk.evaluations import all_metrics
from experiments.disk.run_dir import RunDir
from experiments.identity import run_id
from experiments.model_card import model_card
from experiments.run.complete import complete
from experiments.run.runner import run_experiment
from relora_core.config import EvalConfig, PalomaConfig
from tests.conftest import nano_config


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    config = nano_config(
        train={"steps": 8},
        checkpoint={"every_steps": 4, "keep_last": 2},
        eval=EvalConfig(paloma=PalomaConfig(enabled=True, every_steps=4, max_documents=2)),
        output_dir=str(tmp_path_factory.mktemp("private")),
        model={"vocab_size": None, "max_seq_len": 64},
    )
    config = complete(config)
    run = RunDir(f"{config.output_dir}/runs/{run_id(config)}")
    run_experiment(config, run)
    return run


def scored(text: str) -> dict[str, str]:
    return dict(re.findall(r"^\| .* \| `(\S+)` \| (\S+) \|$", text, flags=re.M))


def test_every_export_has_a_card_that_hubs_can_read(run_dir, tmp_path):
    export(run_dir, folder=tmp_path / "model", step=None)
    text = (tmp_path / "model" / "README.md").read_text()
    front = yaml.safe_load(text.split("---\n")[1])
    assert front["license"] == "unknown"
    assert front["library_name"] == "transformers"
    config = run_dir.config()
    assert f"| method | {config.method} |" in text
    assert f"| tokens | {8 * config.train.batch_size * config.data.seq_len:,} |" in text
    assert str(config.data.fingerprint) in text
    assert f"relora.r={config.relora.r}\n" in text
    assert "2509.12960" in text
    assert "2307.05695" in text
    loss = all_metrics(run_dir)["train/loss"]
    assert scored(text)["train/loss"] == f"{loss:.6g}"


def test_an_earlier_step_has_the_metrics_of_its_time(run_dir, tmp_path):
    export(run_dir, folder=tmp_path / "model", step=4)
    text = (tmp_path / "model" / "README.md").read_text()
    assert "| steps | 4 of 8 |" in text
    key = "eval/paloma/perplexity"
    (then,) = (
        e["metrics"][key] for e in run_dir.events() if e["step"] == 4 and key in e["metrics"]
    )
    assert scored(text)[key] == f"{then:.6g}"
    assert then != all_metrics(run_dir)[key]


def test_a_card_names_every_code_that_trained_to_its_step(run_dir):
    [first] = [record["code_hash"] for record in run_dir.attempt_records()]
    run_dir.write_attempt(2, {"host": "x", "start_step": 4, "code_hash": "later"})
    run_dir.write_attempt(3, {"host": "x", "start_step": 4})  # damaged: it has none
    codes = [model_card(run_dir, run_dir.config(), step=step) for step in (4, 8)]
    assert f"| code of training | {first} |" in codes[0]
    assert f"| code of training | {first}, later |" in codes[1]


def test_a_card_names_no_place_of_the_machine_and_no_address(run_dir):
    config = run_dir.config()
    config.data.kind, config.data.path = "text", "/secret/texts"
    config.data.tokenizer, config.tracking.uri = "/secret/bpe", "http://me:secret@host"
    text = model_card(run_dir, config, step=8)
    assert "secret" not in text
    assert str(run_dir.output_dir) not in text
    assert "licence of the data before you publish" in text
