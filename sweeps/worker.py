"""The job body: `python -m sweeps.worker RUN_DIR` runs or resumes one run from its frozen config.

Exit codes: 0 finished, 3 diverged, 1 failed (recorded in the run), 4 at work elsewhere. It knows
nothing of sweeps, launchers or Hydra. A kill at any time is safe: the run resumes from its newest
complete checkpoint.
"""

from __future__ import annotations

import os
import sys
import traceback
from pathlib import Path

from experiments.run_dir import RunDir, RunLocked
from relora_core.config import ConfigError
from relora_core.data.base import DataError

FINISHED, FAILED, DIVERGED, LOCKED = 0, 1, 3, 4


def work(path: Path | str) -> int:
    """Run the run at `path` in this process; the exit code says how it ended."""
    run_dir = RunDir(path)
    if not run_dir.config_path.exists():
        print(f"RUN_DIR must hold config.json, got {path}", file=sys.stderr)
        return FAILED
    from experiments.runner import run_experiment  # torch: only where a run is to be trained

    try:
        state = run_experiment(run_dir.config(), run_dir, console=False)
    except RunLocked as error:
        print(error, file=sys.stderr)
        return LOCKED
    except (ConfigError, DataError) as error:
        print(error, file=sys.stderr)
        return FAILED
    except Exception:
        traceback.print_exc()
        return FAILED
    return DIVERGED if state == "diverged" else FINISHED


if __name__ == "__main__":
    if len(sys.argv) != 2:
        print("usage: python -m sweeps.worker RUN_DIR", file=sys.stderr)
        sys.exit(2)
    os.environ.setdefault("PYTHONUNBUFFERED", "1")  # for what the worker starts
    sys.exit(work(sys.argv[1]))
