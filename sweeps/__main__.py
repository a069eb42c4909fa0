"""`python -m sweeps`: look after many runs. Each command is a module of `sweeps/commands/`."""

from __future__ import annotations

import argparse
import importlib
import os
import sys

from experiments.environment import RUN, SWEEPS
from experiments.errors import RunLocked
from relora_core import shared
from relora_core.config import ConfigError
from relora_core.data.base import DataError
from sweeps.slurm.cluster import SlurmError

COMMANDS = (
    *("status", "watch", "logs", "cancel", "retry"),
    *("plan", "diff", "eval", "search", "report", "compare"),
    *("gc", "sync", "ui"),
)
EPILOG = f"""examples:
  {RUN + " -m model=tiny,small relora.r=8,16,32":<51}  plan and run; again: only what is missing
  {SWEEPS + " status":<51}  every run, on one screen
  {SWEEPS + " watch":<51}  the same, live, until all have ended
  {SWEEPS + " logs tiny-relora-r16 -f":<51}  what a run prints (any part of its run_id)
  {SWEEPS + " cancel model-relora.r":<51}  end what is queued or running; asks first
  {SWEEPS + " search lr_and_rank":<51}  results of a search
  {SWEEPS + " retry":<51}  launch again what failed or was lost
  {SWEEPS + " ui":<51}  MLflow's pages, and links that open right
  {SWEEPS + " COMMAND --help":<51}  more, with examples

exit codes: 0 all well, 2 your mistake (one line says which), 1 anything else
"""


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=SWEEPS,
        description=f"Look after many runs. Sweeps are started by `{RUN} -m ...`.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    where = "where everything is (default: outputs)"
    home = os.path.expanduser  # no shell writes out the tilde of --output-dir=~/x
    parser.add_argument("--output-dir", type=home, default="outputs", help=where)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name in COMMANDS:
        module = importlib.import_module(f"sweeps.commands.{name}")
        command = commands.add_parser(
            name,
            help=module.HELP,
            description=f"{module.HELP[0].upper()}{module.HELP[1:]}.",
            epilog=getattr(module, "EXAMPLES", "").replace("python -m sweeps", SWEEPS),
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        command.add_argument("--output-dir", type=home, default=argparse.SUPPRESS, help=where)
        module.configure(command)
        command.set_defaults(run_command=module.run)
    return parser


def _is_flag(word: str) -> bool:
    return word.startswith("-")


def main(argv: list[str] | None = None) -> int:
    """Run one command; the exit code."""
    parser = build_parser()
    args, rest = parser.parse_known_args(argv)
    if rest and isinstance(getattr(args, "words", None), list) and not any(map(_is_flag, rest)):
        args.words += rest  # argparse takes only those before the first option
    elif rest:
        unknown = [word for word in rest if _is_flag(word)] or rest
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    try:
        return args.run_command(args)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # `| head` has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (SlurmError, RunLocked, DataError, OSError) as error:
        why = shared.explain(error) if isinstance(error, OSError) else None
        print(f"error: {why or error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
