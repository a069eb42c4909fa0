"""`python -m sweeps report`: a sweep's results as a page, figures and tables."""

from __future__ import annotations

import argparse
from pathlib import Path

from experiments.report import index, page
from experiments.report.data import AXES
from relora_core.config import ConfigError
from relora_core.data.places import expand
from sweeps.commands import selection

HELP = "write the results of a sweep: page, figures, tables, data"
EXAMPLES = """examples:
  python -m sweeps report model-relora.r
  python -m sweeps report audit --reference full_rank --x gpu_hours
  python -m sweeps report audit --arms '[0-9]_*' --reference previous --output audit_steps
  python -m sweeps report audit_10m --comparisons docs/audit/comparisons.yaml
  python -m sweeps report model-relora.r --beside gpt2
  python -m sweeps report --html-index
  python -m sweeps report paper --published paper_results.json --output paper_report

Means over finished seeds with 95 % intervals, arms compared on common seeds, every figure as SVG
and PNG, every table as CSV, results and comparisons also for LaTeX, in
OUTPUT_DIR/sweeps/SWEEP/report. A sweep need not have ended.
"""


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("sweep", metavar="SWEEP", nargs="?", help="name of a sweep")
    help_index = "a page over all sweeps, OUTPUT_DIR/sweeps/index.html, with links to their reports"
    parser.add_argument("--html-index", action="store_true", help=help_index)
    parser.add_argument("--output", metavar="DIR", type=expand, help="another folder to write to")
    help_arms = "show these arms only: names or patterns, with commas (default: all)"
    parser.add_argument("--arms", metavar="NAMES", help=help_arms)
    help_reference = (
        "what the others are compared with (default: full rank, else the first arm); `previous`: "
        "each with the arm before it"
    )
    parser.add_argument("--reference", metavar="ARM", help=help_reference)
    parser.add_argument("--x", choices=AXES, default="tokens", help="what curves are drawn against")
    help_beside = "models that `python -m experiments evaluate` has evaluated, with commas"
    parser.add_argument("--beside", metavar="NAMES", help=help_beside)
    help_comparisons = "YAML of comparisons, as a study names them before its runs; tested together"
    parser.add_argument("--comparisons", metavar="FILE", type=expand, help=help_comparisons)
    help_pdf = "figures as PDF, too, for one and two columns of a paper"
    parser.add_argument("--pdf", action="store_true", help=help_pdf)
    help_notebook = "report.ipynb, too, which draws the figures again from the data"
    parser.add_argument("--notebook", action="store_true", help=help_notebook)
    help_published = "JSON of published curves to lay under ours"
    parser.add_argument("--published", metavar="FILE", type=expand, help=help_published)


def run(args: argparse.Namespace) -> int:
    if args.sweep is None and not args.html_index:
        raise ConfigError("report needs SWEEP, or --html-index for a page over all sweeps")
    if args.sweep is not None:
        print(_report(args))
    if args.html_index:
        states = selection.survey(selection.runs_of(args.output_dir))
        print(index.write(args.output_dir, states=states))
    return 0


def _report(args: argparse.Namespace) -> Path:
    args.sweep = selection.find_sweep(args.output_dir, args.sweep)
    runs = selection.runs_of(args.output_dir, sweep=args.sweep)
    return page.write(
        args.output_dir,
        args.sweep,
        output=args.output,
        arms=args.arms.split(",") if args.arms else (),
        reference=args.reference,
        x=args.x,
        published=args.published,
        comparisons=args.comparisons,
        states=selection.survey(runs),
        beside=args.beside.split(",") if args.beside else (),
        pdf=args.pdf,
        with_notebook=args.notebook,
    )
