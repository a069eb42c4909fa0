"""On a job's PYTHONPATH: a training run waits at its 25th step until the file RELORA_GATE is there.

So a test disturbs runs that are surely at work, and no run burns the cores meanwhile. While it
waits it asks its stop flag as ever, hence signals, deadlines and cancel markers work as ever.
"""

import os
import time

GATE = os.environ.get("RELORA_GATE", "")
STEP = 25

if GATE and "SLURM_JOB_ID" in os.environ:
    from experiments.stopping import StopFlag

    real = StopFlag.__call__
    steps = 0

    def at_gate(self: StopFlag) -> bool:
        global steps
        if self.run_dir is not None:  # rank 0: the others wait for it
            steps += 1
            if steps == STEP:
                open(f"{GATE}.{os.getpid()}", "w").close()  # for the test: here I stand
            while steps >= STEP and not os.path.exists(GATE) and not real(self):
                time.sleep(0.05)
        return real(self)

    StopFlag.__call__ = at_gate
