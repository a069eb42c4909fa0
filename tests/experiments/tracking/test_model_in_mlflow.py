"""An exported model in MLflow loads in another process and gives the run's own numbers."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.mlflow_load import server
from experiments.__main__ import main
from experiments.addresses import default_uri, experiment_name
from experiments.disk.run_dir import RunDir
from experiments.tracking import model as mlflow_model
from experiments.tracking.mlflow_scorer import Scorer
from experiments.tracking.runs import Syncer
from experiments.tracking.store import open_store
from relora_core.config import RunConfig
from relora_core.data.grammar import VOCAB_SIZE, GrammarTokenizer
from relora_core.model import Decoder
from tests.conftest import nano_config
from tests.relora_core.test_export import RUN, grammar_config, random_ids, save_run

ELSEWHERE = """
import json, os, sys
import mlflow.pyfunc, torch
for line in sys.stdin:
    if os.fork():
        if os.wait()[1]:
            print("null", flush=True)
        continue
    uri, model, inputs = json.loads(line)
    mlflow.set_tracking_uri(uri)
    found = mlflow.pyfunc.load_model(model).predict(inputs)
    import relora_core
    print(json.dumps({"found": found, "code": relora_core.__file__}), flush=True)
    os._exit(0)
"""


@dataclasses.dataclass(kw_only=True)
class Exported:
    """A finished run that MLflow shows, and its own model."""

    output: Path
    model: Decoder

    uri = property(lambda self: default_uri(self.output))

    def client(self) -> Any:
        from mlflow import MlflowClient

        return MlflowClient(tracking_uri=self.uri)

    def experiments(self) -> list[str]:
        return [one.experiment_id for one in self.client().search_experiments()]

    def shown(self) -> Any:
        runs = self.client().search_runs(self.experiments(), filter_string=f"tags.run_id = '{RUN}'")
        assert len(runs) == 1
        return runs[0]

    def models(self, status: str = "READY") -> list[Any]:
        return [
            m for m in self.client().search_logged_models(self.experiments()) if m.status == status
        ]


def a_config(**tracking: Any) -> RunConfig:
    return grammar_config(nano_config, tracking={"enabled": True, **tracking})


def track(output: Path, run_dir: RunDir, *, uri: str) -> None:
    run_dir.update_status(state="finished", attempts=1)
    experiment = experiment_name(run_dir.config())
    store = open_store(uri, experiment=experiment, output_dir=output)
    report = Syncer(store).sync([run_dir], final=True)
    assert (report.created, report.errors) == (1, {})


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory, migrated: Path) -> Exported:
    output = tmp_path_factory.mktemp("odd 'dir' 100% é")
    shutil.copy(migrated, output / "mlflow.db")
    model = save_run(output, a_config())
    track(output, RunDir(output / "runs" / RUN), uri=default_uri(output))
    return Exported(output=output, model=model)


@pytest.fixture
def without_models(exported: Exported) -> Iterator[Exported]:
    yield exported
    for model in [*exported.models(), *exported.models("FAILED")]:
        exported.client().delete_logged_model(model.model_id)


def export(output: Path, folder: Path, *more: str) -> int:
    return main(["export", RUN, str(folder), "--mlflow", "--output-dir", str(output), *more])


def log_probabilities(model: Decoder, ids: list[int]) -> torch.Tensor:
    """From the full logits."""
    row = torch.tensor(ids)
    with torch.no_grad():
        return model.logits(row[None, :-1])[0].log_softmax(-1).gather(1, row[1:, None])[:, 0]


def assert_same_numbers(
    answers: list[dict[str, Any]], rows: list[list[int]], model: Decoder
) -> None:
    assert [row["ids"] for row in answers] == rows
    for row in answers:
        expected = log_probabilities(model, row["ids"])
        shown = torch.tensor(row["log_probabilities"])
        torch.testing.assert_close(shown, expected, atol=1e-5, rtol=0)
        assert row["loss"] == pytest.approx(-float(expected.mean()), abs=1e-5)
        assert expected.std() > 0.1  # so that 1e-5 says something


Elsewhere = Callable[[str, str, list[Any]], dict[str, Any]]


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Elsewhere]:
    """What a process outside the checkout reads out of a store: a new one for each, that begins
    with MLflow and torch loaded, which takes seconds, and nothing of ours."""
    names = ("PYTHONPATH", "MLFLOW_TRACKING_URI")
    with subprocess.Popen(
        [sys.executable, "-c", ELSEWHERE],
        cwd=tmp_path_factory.mktemp("elsewhere"),
        env={k: v for k, v in os.environ.items() if k not in names},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as parent:

        def ask(uri: str, model: str, inputs: list[Any]) -> dict[str, Any]:
            assert parent.stdin is not None
            assert parent.stdout is not None
            print(json.dumps([uri, model, inputs]), file=parent.stdin, flush=True)
            answer = json.loads(parent.stdout.readline())
            assert answer, "it failed; its traceback is above"
            return answer

        yield ask


@pytest.mark.slow
def test_it_loads_in_a_fresh_process_and_gives_the_runs_numbers(
    without_models: Exported,
    elsewhere: Elsewhere,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Ids and texts, with the code that came with the model and not the checkout's."""
    assert export(without_models.output, tmp_path / "a 'b' é", "--json") == 0
    printed = json.loads(capsys.readouterr().out)
    text = GrammarTokenizer().decode(random_ids(VOCAB_SIZE)[0].clamp(min=1).tolist())
    rows = [random_ids(VOCAB_SIZE)[1].tolist(), GrammarTokenizer().encode(text)]
    answer = elsewhere(printed["tracking_uri"], printed["mlflow_model"], [rows[0], text])
    assert_same_numbers(answer["found"], rows, without_models.model)
    assert str(without_models.output / "mlartifacts") in answer["code"]


@pytest.mark.slow
def test_it_goes_and_comes_through_a_server(
    tmp_path: Path, migrated: Path, elsewhere: Elsewhere
) -> None:
    (tmp_path / "server").mkdir()
    shutil.copy(migrated, tmp_path / "server" / "mlflow.db")
    with server(tmp_path / "server") as uri:
        model = save_run(tmp_path, a_config(uri=uri))
        run_dir = RunDir(tmp_path / "runs" / RUN)
        track(tmp_path, run_dir, uri=uri)
        assert export(tmp_path, tmp_path / "llama") == 0
        tracked = mlflow_model.find_tracked(run_dir)
        (logged,) = tracked.store.client.search_logged_models([tracked.run.info.experiment_id])
        row = random_ids(VOCAB_SIZE)[0].tolist()
        answer = elsewhere(uri, logged.model_uri, [row])
    assert_same_numbers(answer["found"], [row], model)


def test_logging_it_leaves_the_run_as_it_was_and_links_it(
    without_models: Exported, tmp_path: Path
) -> None:
    before = without_models.shown()
    assert export(without_models.output, tmp_path / "llama") == 0
    after = without_models.shown()
    for name in ("status", "start_time", "end_time"):
        assert getattr(after.info, name) == getattr(before.info, name)
    assert after.data.tags == before.data.tags
    (model,) = without_models.models()
    assert linked(after) - linked(before) == {model.model_id}
    assert (model.source_run_id, model.tags["run_id"]) == (before.info.run_id, RUN)


def linked(shown: Any) -> set[str]:
    return {output.model_id for output in shown.outputs.model_outputs}


def test_the_same_weights_are_logged_once(without_models: Exported, tmp_path: Path) -> None:
    for name in ("one", "two"):
        assert export(without_models.output, tmp_path / name) == 0
    assert len(without_models.models()) == 1


def test_a_failed_upload_is_no_model_and_the_next_try_makes_one(
    without_models: Exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlflow import MlflowClient

    def broken(*_: object) -> None:
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(MlflowClient, "log_model_artifacts", broken)
        with pytest.raises(SystemExit) as ended:
            export(without_models.output, tmp_path / "one")
    assert ended.value.code == 1
    assert without_models.models() == []
    assert len(without_models.models("FAILED")) == 1
    assert export(without_models.output, tmp_path / "two") == 0
    assert len(without_models.models()) == 1


# what is refused ----------------------------------------------------------------------------------
def refused(
    output: Path, folder: Path, capsys: pytest.CaptureFixture[str], *, code: int = 2
) -> str:
    """The one line; nothing was written."""
    there = sorted(output.rglob("*"))
    with pytest.raises(SystemExit) as ended:
        export(output, folder)
    assert ended.value.code == code
    line = capsys.readouterr().err
    assert line.count("\n") == 1
    assert "Traceback" not in line
    assert not folder.exists()
    assert sorted(output.rglob("*")) == there
    return line


def test_a_run_without_a_store_makes_none(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_run(tmp_path / "out", a_config())
    line = refused(tmp_path / "out", tmp_path / "llama", capsys)
    assert f"got {RUN}" in line
    assert "python -m sweeps sync" in line


def test_a_run_that_the_store_does_not_hold(
    exported: Exported, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_run(tmp_path / "out", a_config(uri=exported.uri, experiment="another"))
    line = refused(tmp_path / "out", tmp_path / "llama", capsys)
    assert f"got {RUN}" in line


def test_a_run_that_was_not_tracked_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_run(tmp_path / "out", a_config(enabled=False))
    line = refused(tmp_path / "out", tmp_path / "llama", capsys)
    assert "tracking.enabled=false" in line


def test_a_store_that_does_not_answer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_run(tmp_path / "out", a_config(uri="http://me:secret@127.0.0.1:9"))
    line = refused(tmp_path / "out", tmp_path / "llama", capsys, code=1)
    assert "127.0.0.1:9 does not answer" in line
    assert "secret" not in line


def test_a_run_without_a_checkpoint(
    exported: Exported, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    RunDir(tmp_path / "out" / "runs" / RUN).create(grammar_config(nano_config))
    assert "must have a checkpoint" in refused(tmp_path / "out", tmp_path / "llama", capsys)


@pytest.mark.parametrize("place", ["s3://bucket/a", "ftp://host/a"])
def test_artifacts_that_are_neither_local_nor_the_servers(
    exported: Exported, tmp_path: Path, capsys: pytest.CaptureFixture[str], place: str
) -> None:
    experiment = f"at {place[:2]}"
    made = exported.client().create_experiment(experiment, artifact_location=place)
    exported.client().create_run(made, tags={"kind": "run", "run_id": RUN})
    save_run(tmp_path / "out", a_config(uri=exported.uri, experiment=experiment))
    assert place in refused(tmp_path / "out", tmp_path / "llama", capsys)


# the scorer ---------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def scorer() -> Scorer:
    torch.manual_seed(0)
    return Scorer(Decoder(grammar_config(nano_config).model), tokenizer=None)


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ([1], "2 to 64 tokens, got 1"),
        ([1] * 65, "2 to 64 tokens, got 65"),
        ([1, VOCAB_SIZE], f"ids in [0, {VOCAB_SIZE})"),
        ([1, -1], f"ids in [0, {VOCAB_SIZE})"),
        ("a text", "no tokenizer"),
    ],
)
def test_what_cannot_be_scored_says_why(scorer: Scorer, entry: Any, words: str) -> None:
    with pytest.raises(ValueError, match=r".*") as error:
        scorer.predict([entry])
    assert words in str(error.value)


def test_a_frame_is_scored_as_its_column(scorer: Scorer) -> None:
    """What a model server hands over."""
    import pandas

    rows = [row.tolist() for row in random_ids(VOCAB_SIZE)]
    assert scorer.predict(pandas.DataFrame({"ids": rows})) == scorer.predict(rows)
    with pytest.raises(ValueError, match="column text or ids"):
        scorer.predict(pandas.DataFrame({"words": rows}))
