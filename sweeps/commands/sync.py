"""`sync`: MLflow brought up to date from the runs' records."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence

from experiments.run_dir import RunDir
from relora_core.config import TrackingConfig
from sweeps.commands import common
from sweeps.commands.common import Run

HELP = "bring MLflow up to date from the runs' records"
EXAMPLES = """examples:
  python -m sweeps sync                                    every tracked run into its own store
  python -m sweeps sync SWEEP --tracking-uri http://...    one sweep into another store
"""

Store = tuple[str, str]
"""(tracking URI, name of the MLflow experiment)."""


def configure(parser: argparse.ArgumentParser) -> None:
    common.add_sweep(parser)
    parser.add_argument("--tracking-uri", help="another store than the runs' own")


def run(args: argparse.Namespace) -> int:
    """Repeating it changes nothing; 1 where a store does not answer or a run was not synced."""
    from experiments import mlflow_sync

    if args.tracking_uri is not None:
        mlflow_sync.check_uri(TrackingConfig(enabled=True, uri=args.tracking_uri))
    runs = common.runs_of(args.output_dir, sweep=args.sweep)
    groups = stores(runs, output_dir=args.output_dir, tracking_uri=args.tracking_uri)
    if not groups:
        print(f"nothing to sync in {args.output_dir}")
    names = run_names(runs)
    return max((_sync(store, members, names, args) for store, members in groups.items()), default=0)


def stores(
    runs: Sequence[Run], *, output_dir: str, tracking_uri: str | None = None
) -> dict[Store, list[RunDir]]:
    """The tracked runs by where they go; `tracking_uri` takes the place of their own."""
    from experiments import mlflow_sync

    groups: dict[Store, list[RunDir]] = {}
    for run in runs:
        if not run.dir.config_path.exists():
            continue
        config = run.dir.config()
        uri = tracking_uri or config.tracking.uri or mlflow_sync.default_uri(output_dir)
        if config.tracking.enabled or tracking_uri:
            groups.setdefault((uri, mlflow_sync.experiment_name(config)), []).append(run.dir)
    return groups


def run_names(runs: Sequence[Run]) -> dict[str, str]:
    """run_id -> name in MLflow, of the runs that a sweep names."""
    return {run.run_id: run.name for run in runs if run.sweep}


def _sync(
    store: Store, runs: list[RunDir], names: Mapping[str, str], args: argparse.Namespace
) -> int:
    from experiments import mlflow_sync

    uri, experiment = store
    where = args.output_dir
    try:
        experiment_id = mlflow_sync.ensure_store(uri, experiment=experiment, output_dir=where)
        report = mlflow_sync.sync(
            runs,
            uri=uri,
            experiment_id=experiment_id,
            output_dir=where,
            names={run.run_id: names[run.run_id] for run in runs if run.run_id in names},
            final=True,
        )
    except mlflow_sync.TrackingUnreachable as error:
        print(error, file=sys.stderr)
        return 1
    print(
        f"{experiment}: {len(runs)} runs, {report.created} created, {report.points} points sent "
        f"to {mlflow_sync.redacted(uri)}"
    )
    for run_id, line in report.errors.items():
        print(f"{run_id}: {line}", file=sys.stderr)
    return int(bool(report.errors))
