"""Run one experiment, or with -m a sweep: compose -> RunConfig -> run it here, or launch them all.

python run.py                                        the demo: minutes on a laptop
python run.py model=small relora.r=32 seed=1         one run
python run.py -m model=tiny,small relora.r=8,16,32   a sweep
python run.py --plan model=tiny,small relora.r=8,16  what that sweep would do and cost; nothing else
"""

import os
import sys
from typing import Any

# Waiting threads give their core away: where cores are shared with others, spinning ones make a
# step ten times slower. Both must be set before torch and Hydra load.
os.environ.setdefault("GOMP_SPINCOUNT", "5000")
os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # exceptions reach us instead of Hydra's reporter

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from experiments import schema
from experiments.runner import reporting, run_here

schema.register()


@hydra.main(config_path="conf", config_name="config", **schema.VERSION_BASE)
def main(cfg: DictConfig) -> None:
    with reporting():
        # As typed: what `${...}` names is looked for in the run's config, and only there.
        words: Any = OmegaConf.to_container(HydraConfig.get().overrides.task, resolve=False)
        schema.refuse_search(cfg, words)
        schema.refuse_sweep(HydraConfig.get())
        sys.exit(run_here(schema.to_run_config(cfg, words=words)))


if __name__ == "__main__":
    words = [word for word in sys.argv[1:] if word != "--plan"]
    if len(words) < len(sys.argv) - 1:
        words = ["-m", *(w for w in words if w not in ("-m", "--multirun"))]
        words.append("hydra.sweeper.plan_only=true")
    # Hydra's parser wants -m before or after all overrides, not among them.
    sys.argv[1:] = sorted(words, key=lambda word: word not in ("-m", "--multirun"))
    with reporting(), schema.explaining(sys.argv[1:]):
        main()
