"""The registry of methods. A new one: docs/recipes.md.

base.py     the seam between the training loop and a method; full rank
relora.py   LoRA, ReLoRA and its restart
adapter.py  the linear with an adapter
projected.py  what methods with moments of a projected gradient share
galore.py   GaLore: moments that are kept in a projection of the gradient
fira.py     Fira: GaLore and the discarded part of the gradient
apollo.py   APOLLO: gradients scaled by what Adam does in a random projection
switchlora.py  SwitchLoRA: adapters that exchange a few vectors at a time
sltrain.py  SLTrain: low rank plus sparse, and their special cases
sparse.py   Sparse Optimization: few entries of a matrix are updated at a time
"""

from relora_core.config import METHODS, RunConfig
from relora_core.methods.apollo import Apollo
from relora_core.methods.base import FullRank, Method
from relora_core.methods.fira import Fira
from relora_core.methods.galore import GaLore
from relora_core.methods.relora import LoRA, ReLoRA
from relora_core.methods.sltrain import SLTrain
from relora_core.methods.sparse import Sparse
from relora_core.methods.switchlora import SwitchLoRA

REGISTRY: dict[str, type[Method]] = {
    "full_rank": FullRank,
    "lora": LoRA,
    "relora": ReLoRA,
    "galore": GaLore,
    "fira": Fira,
    "apollo": Apollo,
    "switchlora": SwitchLoRA,
    "sparse": Sparse,
    "sltrain": SLTrain,
}
"""By the names that sections of `config.RunConfig` declare with `of_methods`."""
assert set(REGISTRY) == set(METHODS), f"methods {list(REGISTRY)}, declared in config {METHODS}"


def build_method(config: RunConfig) -> Method:
    """The method that `config.method` names."""
    return REGISTRY[config.method](config)
