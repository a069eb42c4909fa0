"""On a job's PYTHONPATH: a run waits after its 25th step until the file RELORA_GATE is there.

So a test disturbs runs that are surely at work, and no run burns the cores meanwhile. While it
waits it asks its stop flag as ever, hence signals, deadlines and cancel markers work as ever.
GATE.PID says that process PID waits; a test that makes GATE.PID.late lets an hour pass for it.
"""

import os
import sys
import time

GATE = os.environ.get("RELORA_GATE", "")
STEP = 25
HOUR_S = 3600.0

if GATE and "SLURM_JOB_ID" in os.environ:
    from experiments.run.stopping import StopFlag

    real = StopFlag.__call__
    waits = f"{GATE}.{os.getpid()}"
    steps = 0

    def at_gate(self: StopFlag) -> bool:
        global steps
        # The loop asks once a step; processes that wait for each other ask as often as they like.
        in_loop = sys._getframe(1).f_globals["__name__"] == "relora_core.train"
        if in_loop and self.run_dir is not None:  # rank 0: the others wait for it
            steps += 1
            if steps == STEP:
                open(waits, "w").close()
            while steps >= STEP and not os.path.exists(GATE) and not real(self):
                time.sleep(0.05)
                if os.path.exists(f"{waits}.late"):
                    self.deadline -= HOUR_S
        return real(self)

    StopFlag.__call__ = at_gate
