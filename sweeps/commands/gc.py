"""`python -m sweeps gc`: remove checkpoints that are not needed; by default only say which."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.table import Table
from rich.text import Text

from experiments.disk.run_dir import RunDir
from experiments.disk.states import State
from experiments.errors import one_line
from sweeps import retention
from sweeps.commands import selection
from sweeps.display import abbreviate, make_console
from sweeps.retention import Policy, Verdict
from sweeps.slurm.cluster import SlurmError

HELP = "remove old checkpoints (and code snapshots); without --yes only say which"
EXAMPLES = """examples:
  python -m sweeps gc                                what would go if each run kept its newest
  python -m sweeps gc model-relora.r --keep-latest 2 --keep-best 1 --yes
  python -m sweeps gc --keep-best 1 --metric eval/blimp/no_bos/accuracy
  python -m sweeps gc --snapshots --yes              also code that no job can still need

never removed: anything of a run that is queued, running or lost; the newest checkpoint of a run
that has not finished; the only checkpoint of any run
"""


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "words",
        nargs="*",
        metavar="SWEEP|RUN",
        help="sweeps, runs, arms, jobs, or (parts of) run ids (default: all)",
    )
    parser.add_argument(
        "--keep-latest", type=int, default=1, metavar="K", help="newest of each run (default: 1)"
    )
    parser.add_argument(
        "--keep-best", type=int, default=0, metavar="K", help="best of each run (default: 0)"
    )
    parser.add_argument(
        "--metric",
        help="what `best` means (default: eval/paloma/perplexity where measured, else train/loss)",
    )
    parser.add_argument(
        "--maximize",
        action=argparse.BooleanOptionalAction,
        help="whether more of it is better (default: of accuracies only)",
    )
    parser.add_argument("--snapshots", action="store_true", help="unused code snapshots as well")
    parser.add_argument("--yes", action="store_true", help="remove; without it nothing changes")


def run(args: argparse.Namespace) -> int:
    policy = Policy(
        keep_latest=args.keep_latest,
        keep_best=args.keep_best,
        metric=args.metric,
        maximize=args.maximize,
    )
    where = args.output_dir
    everything = selection.runs_of(where)
    chosen = selection.resolve(where, args.words) if args.words else everything
    retention.check(policy, runs=[run.dir for run in chosen])
    asked = everything if args.snapshots else chosen
    states = {id_: state.state for id_, state in selection.survey(asked).items()}
    verdicts = [
        (run.dir, retention.judge(run.dir, state=states[run.run_id], policy=policy))
        for run in chosen
    ]
    snapshots = []
    if args.snapshots:
        snapshots = _snapshots(everything, states=states, words=args.words, output_dir=where)
    _show(verdicts, names={run.run_id: run.name for run in chosen}, snapshots=snapshots)
    if not args.yes:
        print("nothing was removed: --yes removes it")
        return 0
    return _remove(verdicts, snapshots)


def _snapshots(
    runs: Sequence[selection.Run],
    *,
    states: dict[str, State],
    words: Sequence[str],
    output_dir: str,
) -> list[Path]:
    """Unused snapshots of the sweeps among `words`, or of all."""
    sweeps: dict[str, dict[str, State]] = {}
    for one in runs:
        for name in one.sweeps:
            sweeps.setdefault(name, {})[one.run_id] = states[one.run_id]
    snapshots = []
    for name in [name for name in sweeps if not words or name in words]:
        try:
            snapshots += retention.old_snapshots(output_dir, sweep=name, states=sweeps[name])
        except SlurmError as error:
            print(f"{name}: code snapshots left alone ({error})", file=sys.stderr)
    return snapshots


def _show(
    verdicts: Sequence[tuple[RunDir, Verdict]],
    *,
    names: dict[str, str],
    snapshots: Sequence[Path],
) -> None:
    table = Table(box=None, header_style="bold")
    table.add_column("run", overflow="fold")
    for name in ("keeps", "goes", "torn", "bytes"):
        table.add_column(name, justify="right")
    table.add_column("", overflow="fold")
    removable = [path for _, verdict in verdicts for path in (*verdict.remove, *verdict.torn)]
    for _, verdict in verdicts:
        if not (verdict.keep or verdict.remove or verdict.torn):
            continue
        table.add_row(
            Text(names[verdict.run_id]),
            _steps(verdict.keep),
            _steps([retention.step_of(path) for path in verdict.remove]),
            str(len(verdict.torn) or "-"),
            abbreviate(verdict.bytes) if verdict.bytes else "-",
            Text(verdict.note),
        )
    if table.row_count:
        make_console().print(table)
    complete = sum(len(verdict.remove) for _, verdict in verdicts)
    torn = sum(len(verdict.torn) for _, verdict in verdicts)
    print(
        f"{complete} checkpoints, {torn} torn ones and {len(snapshots)} code snapshots may go: "
        f"{abbreviate(retention.count_bytes([*removable, *snapshots]))} bytes"
    )


def _steps(steps: Sequence[int]) -> str:
    """At most four, so that a row stays short."""
    if len(steps) > 4:
        return f"{steps[0]}, {steps[1]} ... {steps[-1]} ({len(steps)})"
    return ", ".join(map(str, steps)) or "-"


def _remove(verdicts: Sequence[tuple[RunDir, Verdict]], snapshots: Sequence[Path]) -> int:
    """Remove what can be removed; print what cannot."""
    failed = 0
    for run_dir, verdict in verdicts:
        try:
            retention.remove(verdict, run=run_dir)
        except BlockingIOError as error:
            print(f"{verdict.run_id} {error.strerror}", file=sys.stderr)
        except OSError as error:
            failed = 1
            print(f"{verdict.run_id}: {one_line(error)}", file=sys.stderr)
    for path in snapshots:
        try:
            retention.discard(path)
        except OSError as error:
            failed = 1
            print(f"{path}: {one_line(error)}", file=sys.stderr)
    print("removed" if not failed else "removed, except for the above")
    return failed
