"""The seam between the training loop and a method, and the method that does nothing: full rank."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from relora_core.config import RunConfig, linear_shapes, muon_shapes
from relora_core.optim import build_adamw, build_muon
from relora_core.schedule import lr_factor


class Method:
    """How a model is parametrised and updated. Every part's default: train all weights as they are.

    The method owns restart and schedule, so that neither can be set without the other.
    """

    base_dtype = torch.float32
    """Precision that weights of the decoder are kept in while they are frozen."""

    def __init__(self, config: RunConfig) -> None:
        self.config = config

    def adapt(self, model: nn.Module) -> None:
        """Change the freshly drawn model in place, before the optimizer sees it."""

    def param_groups(self, model: nn.Module) -> list[dict[str, Any]]:
        """Groups for the optimizer; each may set options of its own, such as `lr_ratio`."""
        return [{"params": [p for p in model.parameters() if p.requires_grad]}]

    def build_optimizer(self, model: nn.Module) -> Optimizer:
        """The optimizer of the adapted model; its state_dict holds all of its state."""
        groups = self.param_groups(model)
        if self.config.train.optimizer == "adamw":
            return build_adamw(groups, train=self.config.train)
        matrices = [model.get_parameter(name) for name in muon_shapes(self.config)]
        return build_muon(groups, matrices=matrices, config=self.config)

    def lr_multiplier(self, step: int) -> float:
        """Factor of the peak learning rate for update `step` (0-based)."""
        return lr_factor(step, config=self.config)

    def set_phase(self, step: int, model: nn.Module) -> bool:
        """Decide which parameters update `step` (0-based) trains; whether that changed anything."""
        return False

    def restarts(self, step: int) -> bool:
        """Whether `after_step(step, ...)` is a restart, around which the function is compared."""
        return False

    def redraws(self, step: int) -> bool:
        """Whether it draws adapters anew: at each restart, and where it has nothing to merge."""
        return False

    def before_pass(self, step: int, *, first: int, stride: int) -> None:
        """Called before each forward pass of update `step` (0-based): of the step's batch over all
        processes it takes the sequences `first`, `first + stride`, ..."""

    def before_update(self, step: int, model: nn.Module) -> None:
        """Called when `step` updates are complete and the gradients of the next one are there."""

    def after_step(self, step: int, model: nn.Module, optimizer: Optimizer) -> dict[str, float]:
        """Called when `step` updates are done; may change weights and state; returns metrics."""
        return {}

    def effective_weights(self, model: nn.Module) -> Iterator[tuple[str, Tensor]]:
        """(name, matrix) of every block linear as the forward pass uses it."""
        for name, module in model.named_modules():
            if isinstance(module, nn.Linear) and name.startswith("layers."):
                yield name, module.weight.detach()

    def base_weights(self, model: nn.Module) -> Iterator[tuple[str, Tensor]]:
        """(name, matrix) of every block linear without the adapter that it may carry."""
        for name in linear_shapes(self.config.model):
            weight = model.get_submodule(name).weight
            assert isinstance(weight, Tensor)
            yield name, weight.detach()

    def adapter_factors(self, model: nn.Module) -> Iterator[tuple[str, Tensor, Tensor]]:
        """(name, B, A) of every linear that carries an adapter."""
        for name, module in model.named_modules():
            if getattr(module, "lora_A", None) is not None:
                yield name, module.lora_B.detach(), module.lora_A.detach()  # type: ignore[operator]

    def state_dict(self) -> dict[str, Any]:
        """JSON-serialisable state beyond weights and moments."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Inverse of `state_dict`."""


class FullRank(Method):
    """Ordinary training of every weight."""
