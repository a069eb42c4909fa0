"""Run one experiment in this process, or with -m launch a sweep of them.

python run.py                                        the demo: about a minute on a laptop
python run.py model=small relora.r=32 seed=1         one run
python run.py -m model=tiny,small relora.r=8,16,32   a sweep
python run.py --plan model=tiny,small relora.r=8,16  what that sweep would do and cost; nothing else
python run.py --plan --measure model=tiny,small      the same, with steps timed if no run was yet
"""

import os
import sys
from typing import Any

# Threads that wait sleep instead of spinning: on shared cores, spinning makes a step ten times
# slower. Both variables must be set before torch and Hydra are imported.
os.environ.setdefault("GOMP_SPINCOUNT", "5000")
os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # exceptions reach us instead of Hydra's reporter

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from experiments import schema, typos
from experiments.errors import reporting
from experiments.labels import typed
from experiments.run.single import run_here
from hydra_plugins.relora_sweeps._habits import translate
from relora_core.config import ConfigError

schema.register()


@hydra.main(config_path="conf", config_name="config", **schema.VERSION_BASE)
def main(cfg: DictConfig) -> None:
    with reporting(resumes=True):
        # As typed: `${...}` is resolved in the run's config alone.
        overrides: Any = OmegaConf.to_container(HydraConfig.get().overrides.task, resolve=False)
        schema.refuse_search(cfg, overrides)
        schema.refuse_sweep(HydraConfig.get(), cfg)
        config = schema.to_run_config(cfg, overrides=overrides)
        sys.exit(run_here(config, given=typed(overrides)))


if __name__ == "__main__":
    arguments = [text for text in sys.argv[1:] if text not in ("--plan", "--measure")]
    with reporting(resumes="--plan" not in sys.argv[1:]):
        if "--plan" in sys.argv[1:]:
            arguments = ["-m", *(text for text in arguments if text not in ("-m", "--multirun"))]
            arguments.append("hydra.sweeper.plan_only=true")
        if "--measure" in sys.argv[1:] and "--plan" not in sys.argv[1:]:
            raise ConfigError("--measure must come with --plan")
        if "--measure" in sys.argv[1:]:
            arguments.append("hydra.sweeper.measure=true")
        arguments, notes = translate(arguments)
        for note in notes:
            print(note)
        # Hydra's parser wants flags before or after all overrides, not among them.
        sys.argv[1:] = typos.flags_first(arguments)
        with schema.explaining(sys.argv[1:]):
            main()
