"""The registry of methods. A new one: its file, dataclass, one line here, conf/method/x.yaml."""

from relora_core.config import RunConfig
from relora_core.methods.base import FullRank, Method
from relora_core.methods.galore import GaLore
from relora_core.methods.relora import LoRA, ReLoRA

REGISTRY: dict[str, type[Method]] = {
    "full_rank": FullRank,
    "lora": LoRA,
    "relora": ReLoRA,
    "galore": GaLore,
}


def build_method(config: RunConfig) -> Method:
    """The method that `config.method` names."""
    return REGISTRY[config.method](config)
