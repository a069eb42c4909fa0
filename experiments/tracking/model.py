"""Logs an exported folder as an MLflow model of its run; its `data/` is the export itself.

    mlflow.pyfunc.load_model("models:/<id>").predict(["a text"])

Not for: exporting (`relora_core/export.py`), nor for what a loaded model does (`mlflow_scorer.py`).
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import re
import shlex
import tempfile
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from experiments.addresses import (
    LOOPBACK,
    default_uri,
    experiment_name,
    local_folder,
    read_only,
    redacted,
    sqlite_path,
)
from experiments.disk.run_dir import RunDir
from experiments.environment import ROOT
from experiments.tracking import mlflow_scorer, run_view
from experiments.tracking.content import Shown
from experiments.tracking.runs import find_own
from experiments.tracking.store import (
    Store,
    TrackingUnreachable,
    connect,
    move_artifacts,
    reachable,
)
from relora_core import shared
from relora_core.config import ConfigError
from relora_core.data.places import expand

if TYPE_CHECKING:
    from mlflow.entities import Experiment, LoggedModel, Run

REQUIREMENTS = ("torch", "numpy", "safetensors", "tokenizers", "pyarrow")
"""What relora_core imports to load and score."""


@dataclass(kw_only=True, slots=True)
class Tracked:
    """A run in MLflow, and where."""

    store: Store
    run: Run


def find_tracked(run_dir: RunDir) -> Tracked:
    """The run in its own store, which is not made if it does not exist.

    ConfigError if the run is not there, or could hold no model; ConnectionError if the store does
    not answer.
    """
    config, output_dir = run_dir.config(), run_dir.output_dir
    uri = config.tracking.uri or default_uri(output_dir)
    database = sqlite_path(uri)
    missing = ConfigError(
        f"--mlflow needs a run that MLflow shows, got {run_dir.run_id}, which {redacted(uri)} does "
        "not hold; " + _remedy(run_dir)
    )
    if database is not None and not database.exists():
        raise missing
    with _one_line(uri):
        if uri == default_uri(output_dir) and database and not read_only(database):
            move_artifacts(output_dir)
        client = connect(uri)
        experiment = client.get_experiment_by_name(experiment_name(config))
        if experiment is None or experiment.lifecycle_stage != "active":
            raise missing
        place = {"experiment_id": experiment.experiment_id, "output_dir": output_dir}
        store = Store(uri=uri, client=client, **place)
        runs = store.search(f"tags.kind = 'run' and tags.run_id = '{run_dir.run_id}'")
    position = run_view.read_position(run_dir, store.key)
    own = find_own(map(Shown.of, runs), run_dir, store=store, position=position)
    if own is None:
        raise missing
    _check_place(experiment, uri=uri)
    return Tracked(store=store, run=next(run for run in runs if run.info.run_id == own.run))


def _remedy(run_dir: RunDir) -> str:
    if not run_dir.config().tracking.enabled:
        return "it was run with tracking.enabled=false"
    return f"`python -m sweeps sync --output-dir {shlex.quote(str(run_dir.output_dir))}` first"


def _check_place(experiment: Experiment, *, uri: str) -> None:
    """ConfigError unless what is written for the experiment reaches the store's own artifacts."""
    place = urlsplit(experiment.artifact_location)
    server = urlsplit(uri)
    remote = server.scheme in ("http", "https") and server.hostname not in LOOPBACK
    if place.scheme in ("http", "https", "mlflow-artifacts"):
        return
    if place.scheme not in ("", "file") or remote:
        raise ConfigError(
            "--mlflow needs artifacts in a local folder or through the server "
            f"(`mlflow server --artifacts-destination`), got {redacted(place.geturl())!r} at "
            f"{redacted(uri)}"
        )


def log_model(tracked: Tracked, *, folder: Path, step: int) -> str:
    """The model's URI (`models:/<id>`); the same weights of the same run are logged once."""
    folder = expand(folder).resolve()
    with open(folder / "model.safetensors", "rb") as file:
        weights = hashlib.file_digest(file, "sha256").hexdigest()
    same = f"source_run_id = '{tracked.run.info.run_id}' AND tags.sha256 = '{weights}'"
    with _one_line(tracked.store.uri):
        models = tracked.store.client.search_logged_models(
            [tracked.run.info.experiment_id], filter_string=same
        )
        ready = [model.model_uri for model in models if model.status == "READY"]
        return ready[0] if ready else _log(tracked, folder=folder, step=step, weights=weights)


def _log(tracked: Tracked, *, folder: Path, step: int, weights: str) -> str:
    """What `mlflow.pyfunc.log_model` does, without opening the run again, which moves its end."""
    from mlflow.entities import LoggedModelOutput

    info, tags = tracked.run.info, tracked.run.data.tags
    labels = {key: tags[key] for key in ("run_id", "arm", "seed", "method") if key in tags}
    model = tracked.store.client.create_logged_model(
        info.experiment_id,
        name=re.sub(r"[^\w-]", "_", f"{tags['run_id']}-step-{step}"),
        source_run_id=info.run_id,
        params=dict(tracked.run.data.params),
        tags={**labels, "step": str(step), "sha256": weights},
    )
    try:
        with tempfile.TemporaryDirectory() as scratch:
            target = Path(scratch) / "model"
            _save(target, folder=folder, model_id=model.model_id, run=info.run_id)
            if place := _own_folder(tracked, model):
                shared.make_folder(place)
            tracked.store.client.log_model_artifacts(model.model_id, str(target))
            if place:
                shared.share_all(place)
        tracked.store.client.log_outputs(
            info.run_id, [LoggedModelOutput(model.model_id, step=step)]
        )
    except BaseException:
        with contextlib.suppress(Exception):  # the first error is the one to report
            tracked.store.client.finalize_logged_model(model.model_id, "FAILED")
        raise
    tracked.store.client.finalize_logged_model(model.model_id, "READY")
    return model.model_uri


def _own_folder(tracked: Tracked, model: LoggedModel) -> Path | None:
    """The model's folder if MLflow writes it on this machine: not writable for the group."""
    return local_folder(model.artifact_location) if sqlite_path(tracked.store.uri) else None


def _save(target: Path, *, folder: Path, model_id: str, run: str) -> None:
    """Write an MLflow model that loads without this project and without transformers."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # MLflow complains of its own type hints
        import mlflow.pyfunc
        from mlflow.models import Model

    versions = {name: importlib.metadata.version(name) for name in REQUIREMENTS}
    mlflow.pyfunc.save_model(
        str(target),
        loader_module=mlflow_scorer.__name__.rpartition(".")[2],
        data_path=str(folder),
        code_paths=[str(ROOT / "relora_core"), mlflow_scorer.__file__],
        mlflow_model=Model(run_id=run, model_id=model_id),
        # Without a local part such as +cpu, which no package index knows.
        pip_requirements=[f"{name}=={v.partition('+')[0]}" for name, v in versions.items()],
    )


@contextlib.contextmanager
def _one_line(uri: str) -> Iterator[None]:
    """Turn a store's refusal into a ConfigError, and silence into a ConnectionError."""
    from mlflow.exceptions import MlflowException

    try:
        with reachable(uri):
            yield
    except TrackingUnreachable as error:
        raise ConnectionError(
            f"--mlflow: {redacted(uri)} does not answer; the model was not logged"
        ) from error
    except MlflowException as error:
        line = next(iter(str(error).splitlines()), "")
        raise ConfigError(
            f"--mlflow: {redacted(uri)} refuses to hold the model: {redacted(line)}"
        ) from error
