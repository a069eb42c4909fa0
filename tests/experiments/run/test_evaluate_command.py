"""`python -m experiments evaluate`: a run beside ours, in its record, in MLflow and in reports."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
from synthetic import a_config, a_sweep, record

from experiments.__main__ import main
from experiments.disk.output_dir import all_runs
from experiments.disk.run_dir import RunDir
from experiments.identity import arm_id, config_from_json, config_to_json, run_id, scientific
from experiments.report import gather, page
from experiments.run import foreign
from experiments.tracking import run_view
from relora_core.config import BlimpConfig, ConfigError, EvaluatedConfig, PalomaConfig
from sweeps.__main__ import main as sweeps_main
from tests.foreign_models import needs_transformers, save, save_texts

pytestmark = needs_transformers


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A GPT-2 that has been evaluated: `words` is the command, `run` its run."""
    folder = tmp_path_factory.mktemp("foreign")
    source = save(folder / "tiny", "gpt2")
    texts = [f"{key}={path}" for key, path in save_texts(folder).items()]
    out = folder / "out"
    settings = [*texts, "tracking.enabled=false", "runtime.kernels=torch", "runtime.device=cpu"]
    words = ["evaluate", str(source), "--as", "little", "--output-dir", str(out), *settings]
    assert main(words) == 0
    [run] = all_runs(out)
    return {"folder": folder, "out": out, "words": words, "run": run, "source": source}


def test_its_numbers_are_those_that_our_runs_end_with(place) -> None:
    run: RunDir = place["run"]
    result = run.result()
    assert result is not None
    metrics = result["metrics"]
    keys = ["perplexity", "paper_perplexity", "bits_per_byte", "wiki/perplexity"]
    wanted = [f"eval/paloma/{key}" for key in keys]
    wanted += [f"eval/blimp/{kind}/accuracy" for kind in ("no_bos", "eos_prefix")]
    wanted += [f"dynamics/weight/{kind}/per" for kind in ("v_proj", "o_proj", "w_2", "ov")]
    assert all(math.isfinite(metrics[key]) for key in wanted)
    assert not any(key.startswith("train/") for key in metrics)
    tables = {e["data"]["name"] for e in run.events() if e["kind"] == "table"}
    assert tables == {"dynamics", "blimp_paradigms", "paloma_domains"}
    assert run.attempt_records()[0]["code_hash"]


def test_nothing_limits_it_but_what_is_typed() -> None:
    """The default experiment's limits are for the runs that it trains."""
    composed = foreign._composed(foreign.Wanted(source="x", overrides=["eval.blimp.path=b"]))
    assert composed.eval.blimp == BlimpConfig(enabled=True, path="b")
    assert composed.eval.paloma == PalomaConfig(enabled=True)


def test_the_same_command_does_nothing_twice(place, capsys) -> None:
    before = place["run"].events_path.read_bytes()
    assert main(place["words"]) == 0
    assert "finished already: nothing to do" in capsys.readouterr().out
    assert place["run"].events_path.read_bytes() == before


def test_status_lists_it(place, capsys) -> None:
    assert sweeps_main(["status", "--json", "--output-dir", str(place["out"])]) == 0
    [entry] = json.loads(capsys.readouterr().out)["runs"]
    assert entry["run_id"].startswith("little-evaluated-s0-")
    assert entry["state"] == "finished"


def test_json_has_its_facts_alone_on_stdout(place, capsys) -> None:
    assert main([*place["words"], "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["run_id"] == place["run"].run_id


def test_its_config_comes_back_and_says_nothing_of_training(place) -> None:
    config = place["run"].config()
    assert isinstance(config, EvaluatedConfig)
    assert config_from_json(config_to_json(config)) == config
    assert run_id(config) == place["run"].run_id
    said = {*scientific(config), *run_view.params(config, varying=["train.lr", "schedule.name"])}
    assert not any(key.startswith(("train.", "schedule.", "relora.")) for key in said)
    assert {"foreign.fingerprint", "foreign.architecture", "eval.blimp.fingerprint"} <= said


def test_its_id_stands_for_weights_and_evals_not_for_places_and_names(place) -> None:
    def changed(**values: Any) -> str:
        raw = json.loads(config_to_json(place["run"].config()))
        for key, value in values.items():
            section, _, name = key.partition("__")
            raw[section][name] = value
        return arm_id(config_from_json(json.dumps(raw))).rpartition("-")[2]

    own = changed()
    assert changed(foreign__source="/other", tracking__experiment="x", model__name="y") == own
    assert changed(foreign__fingerprint="other") != own
    assert changed(data__seq_len=7) != own
    assert changed(eval__blimp={"enabled": False}) != own


@pytest.mark.slow
def test_a_report_shows_it_beside_the_arms_of_a_sweep(place, tmp_path, monkeypatch) -> None:
    for run in a_sweep(place["out"], [a_config(r=4, seed=seed) for seed in (0, 1)], name="mine"):
        record(run)
    written = page.write(place["out"], "mine", output=tmp_path, beside=["little"])
    text = (written.parent / "report.md").read_text()
    assert "could not be" not in text
    arm = gather.gather(place["out"], "mine", beside=["little"]).arms[-1]
    assert (arm.name, len(arm.finished)) == ("little", 1)
    result = place["run"].result()["metrics"]
    assert arm.values("eval/paloma/bits_per_byte") == {0: result["eval/paloma/bits_per_byte"]}
    assert "bits per byte" in text
    assert "Not trained here" in text
    assert "Arms differ in their number of steps" not in text
    alone = page.write(place["out"], "mine", output=tmp_path / "alone")
    assert "bits per byte" not in (alone.parent / "report.md").read_text()
    with pytest.raises(ConfigError, match="--beside must name models"):
        gather.gather(place["out"], "mine", beside=["nano-relora-r4-t20-grammar-s0"])


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["train.lr=1"], "train.lr must be a key of eval"),
        (["eval.blimp.paht=x"], "Did you mean 'eval.blimp.path'?"),
        (["eval.blimp.path=nowhere"], "eval.blimp.path"),
        (["--as", "a b"], "nearest valid: a_b"),
        (["--max-length", "65"], "[1, 64]"),
        (["--revision", "main"], "--revision must be left out"),
    ],
)
def test_a_wrong_word_is_one_line(place, tmp_path, capsys, words, expected) -> None:
    start = ["evaluate", str(place["source"]), "--output-dir", str(tmp_path / "none")]
    with pytest.raises(SystemExit) as ended:
        main([*start, *words])
    assert ended.value.code == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert len(error) == 1
    assert expected in error[0]
    assert not (tmp_path / "none").exists()


def test_a_precision_that_a_model_cannot_have_is_one_line(tmp_path, capsys) -> None:
    source = save(tmp_path / "gptj", "gptj")  # its head has a bias
    texts = [f"{key}={path}" for key, path in save_texts(tmp_path / "texts").items()]
    words = ["evaluate", str(source), "--output-dir", str(tmp_path / "out"), *texts]
    with pytest.raises(SystemExit) as ended:
        main([*words, "eval.blimp.precision=bf16", "runtime.device=cpu"])
    assert ended.value.code == 2
    assert "eval.blimp.precision must be fp32 for GPTJForCausalLM" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
