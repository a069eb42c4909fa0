"""`plan`: the stored plan of a sweep, with the state of each run."""

from __future__ import annotations

import argparse

from experiments.disk.output_dir import plan_folder
from sweeps import display
from sweeps.commands import selection
from sweeps.planning import provenance
from sweeps.planning.plan import load

HELP = "the stored plan of a sweep, and the commands that made it"
EXAMPLES = """examples:
  python -m sweeps plan model-relora.r
"""


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("sweep", metavar="SWEEP", help="name of a sweep")


def run(args: argparse.Namespace) -> int:
    args.sweep = selection.find_sweep(args.output_dir, args.sweep)
    states = selection.survey(selection.runs_of(args.output_dir, sweep=args.sweep))
    stored = load(plan_folder(args.output_dir, name=args.sweep) / "plan.json")
    console = display.make_console()
    console.print(display.plan_table(stored, states=states))
    for line in [*stored.collapsed, *stored.commands, *provenance.lines(stored.tuned)]:
        display.say(console, line)
    display.show_notes(stored.notes, console=console)
    return 0
