"""`python -m sweeps.worker RUN_DIR`: runs or resumes the run there; knows no sweep and no Hydra.

Exit codes: 0 finished, 3 diverged, 1 failed (recorded in the run), 4 at work elsewhere, 5 stopped
and to be resumed, 6 cancelled. A kill at any time is safe.
"""

from __future__ import annotations

import os
import sys
import traceback
from pathlib import Path

from experiments.disk.run_dir import RunDir
from experiments.disk.states import Outcome
from experiments.errors import RunLocked
from experiments.run.runner import run_experiment
from experiments.run.stopping import StopFlag
from experiments.scheduler import enter_job
from relora_core.config import ConfigError
from relora_core.data.base import DataError
from sweeps.slurm.survey import is_dead

PRELOAD = (
    "torch",
    "torch._dynamo",  # torch's optimizers import it, accelerate the next one, at the first step
    "torch.distributed.tensor",
    "accelerate",
    "safetensors.torch",
    "relora_core.train",
    "relora_core.data.grammar",
)
"""What every run imports; a warm parent (`warm.py`) imports it once for all."""
FINISHED, FAILED, DIVERGED, LOCKED, INTERRUPTED, CANCELLED = 0, 1, 3, 4, 5, 6
CODES = {
    Outcome.FINISHED: FINISHED,
    Outcome.DIVERGED: DIVERGED,
    Outcome.INTERRUPTED: INTERRUPTED,
    Outcome.CANCELLED: CANCELLED,
}


def work(path: Path | str, *, stop: StopFlag) -> int:
    """Run the run at `path` until it ends or `stop` is set; the exit code."""
    run_dir = RunDir(path)
    if not run_dir.config_path.exists():
        print(f"RUN_DIR must hold config.json, got {path}", file=sys.stderr)
        return FAILED
    heartbeat = run_dir.status().heartbeat
    try:
        outcome = run_experiment(
            run_dir.config(),
            run_dir,
            console=True,
            stop=stop,
            is_dead=lambda holder: is_dead(holder, heartbeat=heartbeat),
        )
    except RunLocked as error:
        print(error, file=sys.stderr)
        return LOCKED
    except (ConfigError, DataError) as error:
        print(error, file=sys.stderr)
        return FAILED
    except Exception:
        traceback.print_exc()
        return FAILED
    return CODES[outcome]


def main(argv: list[str]) -> int:
    """`RUN_DIR`; the exit code."""
    if len(argv) != 1:
        print("usage: python -m sweeps.worker RUN_DIR", file=sys.stderr)
        return 2
    enter_job()  # of a packed job, whose `job.py` has started this process
    stop = StopFlag()
    with stop.installed():
        return work(argv[0], stop=stop)


if __name__ == "__main__":
    os.environ.setdefault("PYTHONUNBUFFERED", "1")  # for what the worker starts
    sys.exit(main(sys.argv[1:]))
