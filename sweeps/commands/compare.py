"""`python -m sweeps compare`: what changed between two sweeps, on common arms and seeds."""

from __future__ import annotations

import argparse

from experiments.report import compare
from relora_core.data.places import expand

HELP = "compare two sweeps on their common arms and seeds"
EXAMPLES = """examples:
  python -m sweeps compare audit audit_long
  python -m sweeps compare before/sweeps/audit after/sweeps/audit   of two output folders

Differences are the second minus the first, with 95 % intervals over common seeds. Arms are matched
by their settings, and by name where settings were changed.
"""


def configure(parser: argparse.ArgumentParser) -> None:
    which = "name of a sweep, or the path of its folder in another output folder"
    parser.add_argument("first", metavar="SWEEP", help=which)
    parser.add_argument("second", metavar="SWEEP", help="likewise")
    parser.add_argument("--output", metavar="DIR", type=expand, help="another folder to write to")


def run(args: argparse.Namespace) -> int:
    first, second = (compare.locate(args.output_dir, w) for w in (args.first, args.second))
    print(compare.write(first, second, output=args.output))
    return 0
