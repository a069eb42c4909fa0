"""`relora-sweeps COMMAND`: what `python run.py`, `python -m experiments` and `-m sweeps` do."""

from __future__ import annotations

import importlib.metadata
import runpy
import sys
from pathlib import Path

from relora_core.config import nearest

HERE = Path(__file__).resolve().parent
OF_ONE_RUN = ("describe", "show", "export", "evaluate", "import-pico", "tokenizer", "published")
"""Commands of `python -m experiments`; all others are those of `python -m sweeps`."""
USAGE = f"""usage: relora-sweeps COMMAND ...

  run ...               train one run; with -m a sweep of them (as python run.py)
  {", ".join(OF_ONE_RUN)}
                        as python -m experiments COMMAND
  status, watch, report, ...
                        as python -m sweeps COMMAND; `sweeps --help` lists them

examples:
  relora-sweeps run -m model=tiny,small relora.r=8,16,32
  relora-sweeps describe model=small
  relora-sweeps status

`relora-sweeps --version` says which one this is.
"""


def main() -> int:
    """Run the command line; the exit code."""
    words = sys.argv[1:]
    if not words or words[0] in ("-h", "--help", "help"):
        print(USAGE, end="", file=sys.stdout if words else sys.stderr)
        return 0 if words else 2
    if words[0] == "--version":
        print(f"relora-sweeps {importlib.metadata.version('relora-sweeps')}")
        return 0
    if line := _unknown(words[0]):
        print(f"error: {line}", file=sys.stderr)
        return 2
    if words[0] == "run":
        # As a script: Hydra then takes conf/ beside it, and a wheel has both in this folder.
        sys.argv[1:] = words[1:]
        script = next(f / "run.py" for f in (HERE, HERE.parent) if (f / "run.py").is_file())
        runpy.run_path(str(script), run_name="__main__")
        return 0
    if words[0] in OF_ONE_RUN or words[0] == "experiments":
        from experiments.__main__ import main as one  # MLflow's and data's parts take a second
    else:
        from sweeps.__main__ import main as one
    return one(words[1:] if words[0] in ("experiments", "sweeps") else words)


def _unknown(word: str) -> str | None:
    """One line for a word that is no command."""
    from sweeps.__main__ import COMMANDS

    known = ["run", *OF_ONE_RUN, *COMMANDS, "experiments", "sweeps"]
    if word.startswith("-") or word in known:
        return None
    return f"COMMAND must be one of {', '.join(known)}, got {word!r}.{nearest(word, known)}"


if __name__ == "__main__":
    sys.exit(main())
