"""`sync`: MLflow brought up to date from the runs' records."""

from __future__ import annotations

import argparse
import sys

from experiments import addresses
from experiments.disk.plans import sweep_names
from experiments.tracking.tracker import Pass
from sweeps import display, tracking
from sweeps.commands import selection

HELP = "bring MLflow up to date from the runs' records"
EXAMPLES = """examples:
  python -m sweeps sync                                    every tracked run into its own store
  python -m sweeps sync SWEEP --tracking-uri http://...    one sweep into another store
"""


def configure(parser: argparse.ArgumentParser) -> None:
    selection.add_sweep(parser)
    parser.add_argument("--tracking-uri", help="another store than the runs' own")


def run(args: argparse.Namespace) -> int:
    """1 if a store does not answer or a run was not synced. Repeating it changes nothing."""
    uri = None if args.tracking_uri is None else addresses.check_given(args.tracking_uri)
    args.sweep = args.sweep and selection.find_sweep(args.output_dir, args.sweep)
    if args.sweep is not None:
        names = sweep_names(args.output_dir)
        selection.check_sweep(args.sweep, names, output_dir=args.output_dir)
    with display.Counter("synced to", console=display.make_console()) as counter:
        passes = tracking.bring_up_to_date(
            args.output_dir,
            None if args.sweep is None else [args.sweep],
            tracking_uri=uri,
            progress=counter,
        )
    if not passes:
        print(f"nothing to sync in {args.output_dir}")
    printed: set[str] = set()
    for one in passes:
        if one.report is None and one.problem in printed:  # of another experiment in this store
            continue
        printed.add(one.problem or "")
        _print(one)
    return int(any(one.problem for one in passes))


def _print(one: Pass) -> None:
    if one.report is None:
        print(one.problem, file=sys.stderr)
        return
    print(
        f"{one.experiment}: {one.runs} runs, {one.report.created} created, {one.report.points} "
        f"points sent to {addresses.redacted(one.uri)}"
    )
    for run_id, line in one.report.errors.items():
        print(f"{run_id}: {line}", file=sys.stderr)
    if one.problem and not one.report.errors:
        print(one.problem, file=sys.stderr)
    if one.files:
        print(one.files, file=sys.stderr)
