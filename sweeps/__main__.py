"""`python -m sweeps`: many runs' states, logs and plans, and MLflow brought up to date."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from experiments.run_dir import RunDir, all_runs, runs_folder
from experiments.state import RunState, find_run, state_of
from relora_core.config import ConfigError, TrackingConfig, nearest
from sweeps import display
from sweeps.plan import load, plan_folder, stored_names

EPILOG = """examples:
  python run.py -m model=tiny,small relora.r=8,16,32   plan and run; again: only what is missing
  python -m sweeps status                              every run, grouped by sweep
  python -m sweeps status model-relora.r --json        one sweep, for scripts
  python -m sweeps logs r16-t60-grammar-s0 -f          what a run prints (any part of its run_id)
  python -m sweeps sync                                bring MLflow up to date from the records

exit codes: 0 all well, 2 your mistake (one line says which), 1 anything else
"""


def status(output_dir: str, *, sweep: str | None, as_json: bool) -> int:
    """Every run, or those of one sweep. Reads only."""
    rows = _rows(output_dir, sweep=sweep)
    if as_json:
        json.dump({"runs": [row for _, row in rows]}, sys.stdout, indent=2)
        print()
        return 0
    if not rows:
        print(f"no runs in {output_dir} yet: `python run.py` makes one")
        return 0
    console = display.make_console()
    groups: dict[str, list[tuple[str, RunState]]] = {}
    for state, row in rows:
        groups.setdefault(row["sweep"] or "(single runs)", []).append((row["name"], state))
    for title, members in groups.items():
        told: dict[str, int] = {}
        for _, state in members:
            told[state.state] = told.get(state.state, 0) + 1
        counts = ", ".join(f"{n} {state}" for state, n in told.items())
        console.print(display.status_table(members, title=f"{title}: {counts}"))
    return 0


def _rows(output_dir: str, *, sweep: str | None) -> list[tuple[RunState, dict[str, Any]]]:
    """(state, entry of the JSON) of each run; a run that several sweeps share is told once."""
    plans = stored_names(output_dir)
    if sweep is not None:
        _known(sweep, list(plans), output_dir=output_dir)
        wanted = plans[sweep]
        runs = [RunDir(runs_folder(output_dir) / run_id) for run_id in wanted]
    else:
        runs = all_runs(output_dir)
        known = {run.run_id for run in runs}
        missing = {id_ for names in plans.values() for id_ in names} - known
        runs += [RunDir(runs_folder(output_dir) / run_id) for run_id in sorted(missing)]
    rows = []
    for run in runs:
        state = state_of(run)
        sweeps = [name for name, names in plans.items() if run.run_id in names]
        first = sweep or (sweeps[0] if sweeps else None)
        name = plans[first][run.run_id] if first else run.run_id
        row = dataclasses.asdict(state) | {"name": name, "sweep": first, "sweeps": sweeps}
        rows.append((state, row))
    return rows


def _known(sweep: str, sweeps: list[str], *, output_dir: str) -> None:
    if sweep not in sweeps:
        raise ConfigError(
            f"SWEEP must be one of {', '.join(sweeps) or 'none yet'} in {output_dir}, "
            f"got {sweep!r}.{nearest(sweep, sweeps)}"
        )


def plan(output_dir: str, *, sweep: str) -> int:
    """The stored plan, with the state of each run."""
    _known(sweep, list(stored_names(output_dir)), output_dir=output_dir)
    stored = load(plan_folder(output_dir, name=sweep) / "plan.json")
    runs = {cell.run_id: RunDir(runs_folder(output_dir) / cell.run_id) for cell in stored.cells}
    states = {id_: state_of(run) for id_, run in runs.items()}
    console = display.make_console()
    console.print(display.plan_table(stored, states=states))
    for line in [*stored.collapsed, *stored.commands]:
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    return 0


def logs(output_dir: str, *, run: str, follow: bool, attempt: int | None) -> int:
    """What a run printed; with `follow`, until it ends."""
    run_dir = find_run(output_dir, word=run)
    numbers = sorted(int(path.stem) for path in run_dir.attempts.glob("*.log"))
    if not numbers:
        raise ConfigError(f"RUN must have been started by a sweep, {run_dir.run_id} has no log yet")
    if attempt is not None and attempt not in numbers:
        raise ConfigError(
            f"--attempt must be one of {', '.join(map(str, numbers))}, got {attempt}; "
            f"nearest valid: {min(numbers, key=lambda n: abs(n - attempt))}"
        )
    path = run_dir.log_path(attempt or numbers[-1])
    for text in _tail(path, run_dir) if follow else [path.read_text(errors="replace")]:
        sys.stdout.write(text)
        sys.stdout.flush()
    return 0


def _tail(path: Path, run_dir: RunDir, *, every_s: float = 0.5) -> Iterator[str]:
    with open(path, encoding="utf-8", errors="replace") as file:
        while True:
            going = state_of(run_dir).state in (
                "running",
                "queued",
            )  # before the read: miss no word
            yield file.read()
            if not going:
                return
            time.sleep(every_s)


def sync(output_dir: str, *, sweep: str | None, tracking_uri: str | None) -> int:
    """Bring MLflow up to date from the runs' records; repeating it changes nothing."""
    from experiments import mlflow_sync

    if tracking_uri is not None:
        mlflow_sync.check_uri(TrackingConfig(enabled=True, uri=tracking_uri))
    groups: dict[tuple[str, str], list[RunDir]] = {}
    names: dict[str, str] = {}
    for state, row in _rows(output_dir, sweep=sweep):
        run = RunDir(runs_folder(output_dir) / state.run_id)
        if not run.config_path.exists():
            continue
        config = run.config()
        uri = tracking_uri or config.tracking.uri or mlflow_sync.default_uri(output_dir)
        if config.tracking.enabled or tracking_uri:
            groups.setdefault((uri, mlflow_sync.experiment_name(config)), []).append(run)
            if row["sweep"]:
                names[run.run_id] = row["name"]
    if not groups:
        print(f"nothing to sync in {output_dir}")
    return max([_sync_group(g, runs, names, output_dir) for g, runs in groups.items()], default=0)


def _sync_group(
    group: tuple[str, str], runs: list[RunDir], names: dict[str, str], output_dir: str
) -> int:
    from experiments import mlflow_sync

    uri, experiment = group
    try:
        experiment_id = mlflow_sync.ensure_store(uri, experiment=experiment, output_dir=output_dir)
        report = mlflow_sync.sync(
            runs,
            uri=uri,
            experiment_id=experiment_id,
            output_dir=output_dir,
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


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m sweeps",
        description="Look after many runs. Sweeps are started by `python run.py -m ...`.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    one = commands.add_parser("status", help="state, step and loss of every run; changes nothing")
    one.add_argument("sweep", nargs="?", help="name of a sweep (default: all)")
    one.add_argument("--json", action="store_true", help='{"runs": [...]} for scripts')
    two = commands.add_parser("plan", help="the stored plan of a sweep")
    two.add_argument("sweep", help="name of a sweep")
    three = commands.add_parser("logs", help="what a run prints")
    three.add_argument("run", help="run_id, or any part of it that only one run has")
    three.add_argument("-f", "--follow", action="store_true", help="go on until the run ends")
    three.add_argument("--attempt", type=int, help="number of the attempt (default: the newest)")
    four = commands.add_parser("sync", help="bring MLflow up to date from the runs' records")
    four.add_argument("sweep", nargs="?", help="name of a sweep (default: all)")
    four.add_argument("--tracking-uri", help="another store than the runs' own")
    where = "where everything is (default: outputs)"
    parser.add_argument("--output-dir", default="outputs", help=where)
    for command in (one, two, three, four):  # before or after the command
        command.add_argument("--output-dir", default=argparse.SUPPRESS, help=where)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run one command; the exit code."""
    args = build_parser().parse_args(argv)
    where = args.output_dir
    try:
        if args.command == "status":
            return status(where, sweep=args.sweep, as_json=args.json)
        if args.command == "plan":
            return plan(where, sweep=args.sweep)
        if args.command == "logs":
            return logs(where, run=args.run, follow=args.follow, attempt=args.attempt)
        return sync(where, sweep=args.sweep, tracking_uri=args.tracking_uri)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except (KeyboardInterrupt, BrokenPipeError):
        return 130


if __name__ == "__main__":
    sys.exit(main())
