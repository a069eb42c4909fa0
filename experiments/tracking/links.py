"""Links into MLflow's pages, and the command that opens them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING
from urllib.parse import quote, urlsplit, urlunsplit

from experiments.addresses import redacted
from experiments.tracking.saved_views import CHARTS, TAG, TITLES, slug
from experiments.tracking.server import ServerFailed
from experiments.tracking.store import connect, reachable

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Experiment, Run

MAX_COMPARED = 20
"""Columns of a compare page: more are hard to read, and the arms table says the same."""
ML_WORKFLOW = "workflowType=machine_learning"
"""Without it a fresh browser takes every experiment for one of traces."""


def ui_link(base: str, experiment_id: str) -> str:
    """The experiment's runs as a table, ordered by name: otherwise a parent's runs are folded."""
    order = quote("tags.`mlflow.runName`")
    return (
        f"{base.rstrip('/')}/#/experiments/{experiment_id}/runs?searchFilter=&orderByKey={order}"
        f"&orderByAsc=true&{ML_WORKFLOW}"
    )


def links(experiment_id: str, *, sweep: str) -> dict[str, str]:
    """Title -> address of each saved view, relative to the UI's root."""
    addresses = {}
    for view, title in TITLES.items():
        mode = "&compareRunsMode=CHART" if view in CHARTS else ""
        key = quote(slug(sweep, view))
        addresses[title] = (
            f"#/experiments/{experiment_id}/runs?viewStateShareKey={key}{mode}&{ML_WORKFLOW}"
        )
    return addresses


def compare_link(experiment_id: str, *, runs: Sequence[str]) -> str:
    """The page that shows these MLflow runs side by side."""
    ids, experiments = quote(json.dumps(list(runs))), quote(json.dumps([experiment_id]))
    return f"#/compare-runs?runs={ids}&experiments={experiments}"


@dataclass(kw_only=True, slots=True)
class Page:
    """A page of the UI."""

    title: str
    url: str


@dataclass(kw_only=True, slots=True)
class Section:
    """The pages of a sweep, or of an MLflow experiment without sweeps."""

    name: str
    sweep: bool
    pages: list[Page]


def sections(uri: str, *, base: str) -> list[Section]:
    """All pages of the store at `uri`, newest sweep first, as links below `base`.

    Raises TrackingUnreachable if the store does not answer, ServerFailed if another version of
    MLflow made it.
    """
    from mlflow.exceptions import MlflowException

    try:
        with reachable(uri):
            client = connect(uri)
            return [
                section
                for experiment in client.search_experiments(order_by=["last_update_time DESC"])
                for section in _of_experiment(client, experiment, base=base)
            ]
    except MlflowException as error:
        line = next(iter(str(error).splitlines()), type(error).__name__)
        raise ServerFailed(f"{redacted(uri)}: {line}") from None


def _of_experiment(client: MlflowClient, experiment: Experiment, *, base: str) -> Iterator[Section]:
    id_ = experiment.experiment_id
    parents = _summaries(client, id_, kind="sweep")
    arms = _summaries(client, id_, kind="arm") if parents else []
    for parent in reversed(parents):
        sweep = parent.data.tags.get("sweep", experiment.name)
        own = [a for a in arms if a.data.tags.get("mlflow.parentRunId") == parent.info.run_id]
        pages = _sweep_pages(experiment, base=base, sweep=sweep, parent=parent, arms=own)
        yield Section(name=sweep, sweep=True, pages=pages)
    if not parents and client.search_runs([id_], max_results=1):
        page = Page(title="all runs", url=ui_link(base, id_))
        yield Section(name=experiment.name, sweep=False, pages=[page])


def _summaries(client: MlflowClient, experiment_id: str, *, kind: str) -> list[Run]:
    """The runs that stand for sweeps or arms, oldest first."""
    hits = client.search_runs(
        [experiment_id],
        filter_string=f"tags.kind = '{kind}'",
        order_by=["attributes.start_time ASC"],
        max_results=1000,
    )
    return list(hits)


def _sweep_pages(
    experiment: Experiment, *, base: str, sweep: str, parent: Run, arms: list[Run]
) -> list[Page]:
    id_ = experiment.experiment_id
    addresses = {
        title: address
        for view, (title, address) in zip(TITLES, links(id_, sweep=sweep).items(), strict=True)
        if TAG + slug(sweep, view) in experiment.tags
    }
    if "curves" in addresses:  # without charts it is a table of the runs
        addresses["runs"] = addresses["curves"].replace("&compareRunsMode=CHART", "")
    if 1 < len(arms) <= MAX_COMPARED:
        named = sorted(arms, key=lambda arm: arm.info.run_name or "")
        addresses["arms side by side"] = compare_link(id_, runs=[a.info.run_id for a in named])
    addresses["note"] = f"#/experiments/{id_}/runs/{parent.info.run_id}?{ML_WORKFLOW}"
    return [Page(title=title, url=f"{base}/{address}") for title, address in addresses.items()]


def without_user(uri: str) -> str:
    """A server's address without user and password, which a link must not show."""
    parts = urlsplit(uri)
    return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2])).rstrip("/")
