"""What the training loop asks of a method, and the method that changes nothing: full rank."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from relora_core.config import RunConfig, linear_shapes, method_config, muon_shapes
from relora_core.optim import SplitAdamW, build_adamw, build_muon
from relora_core.schedule import lr_factor


class Method:
    """How a model is parametrised and updated. By default all weights are trained as they are.

    Restarts and learning rates are both the method's, so that they cannot disagree.
    """

    base_dtype = torch.float32
    """Precision of the decoder's weights while they are frozen."""

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
        """Choose the parameters that update `step` (0-based) trains; True if others than before."""
        return False

    def restarts(self, step: int) -> bool:
        """Whether `after_step(step, ...)` is a restart; the loop measures what it changes."""
        return False

    def redraws(self, step: int) -> bool:
        """Whether `after_step(step, ...)` draws adapters anew: at a restart, or with nothing to
        merge."""
        return False

    def prepare_graphs(self, model: nn.Module) -> None:
        """Called before blocks are compiled: what changes from pass to pass, and would be part of
        the graph as a number, must be a tensor from now on."""

    def before_pass(self, step: int, *, first: int, stride: int) -> None:
        """Called before each forward pass of update `step` (0-based), which takes the sequences
        `first`, `first + stride`, ... of the step's batch over all processes."""

    def before_update(self, step: int, model: nn.Module) -> None:
        """Called after `step` updates, between the next one's backward pass and itself."""

    def after_step(self, step: int, model: nn.Module, optimizer: Optimizer) -> dict[str, float]:
        """Called after `step` updates; may change weights and optimizer state. Returns metrics."""
        return {}

    def effective_weights(self, model: nn.Module) -> Iterator[tuple[str, Tensor]]:
        """(name, (out, in) matrix) of every block linear as the forward pass uses it."""
        for name in linear_shapes(self.config.model):
            linear: Any = model.get_submodule(name)
            plain = isinstance(linear, nn.Linear)
            yield name, linear.weight.detach() if plain else linear.effective_weight()

    def base_weights(self, model: nn.Module) -> Iterator[tuple[str, Tensor]]:
        """(name, (out, in) matrix) of every block linear without the adapter that it may have."""
        for name in linear_shapes(self.config.model):
            linear: Any = model.get_submodule(name)
            yield name, linear.weight.detach()

    def adapter_factors(self, model: nn.Module) -> Iterator[tuple[str, Tensor, Tensor]]:
        """(name, B, A) of every linear that has an adapter: (out, r) and (r, in)."""
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


class SplitMethod(Method):
    """Every weight is trained: those of the target linears by a rule of the method's own, the
    others by AdamW."""

    optimizer: type[SplitAdamW]

    def options(self) -> dict[str, Any]:
        """What the targets' group holds for the rule, the optimizer's key `own` among it."""
        raise NotImplementedError

    def targets(self) -> list[str]:
        """Names of the target linears."""
        return list(method_config(self.config).targets(self.config))

    def param_groups(self, model: nn.Module) -> list[dict[str, Any]]:
        """The others' group, then the targets' with their options."""
        targets = [model.get_parameter(f"{name}.weight") for name in self.targets()]
        chosen = {id(parameter) for parameter in targets}
        others = [parameter for parameter in model.parameters() if id(parameter) not in chosen]
        return [{"params": others}, {"params": targets, **self.options()}]

    def build_optimizer(self, model: nn.Module) -> AdamW:
        """AdamW over both groups. Gradients are clipped before, by the norm of all entries."""
        return build_adamw(self.param_groups(model), train=self.config.train, kind=self.optimizer)


def updates_done(state: dict[str, Any]) -> int:
    """Updates of a parameter by its optimizer state; 0 where it has none.

    The count is on the CPU, where reading it waits for no kernel; loading a checkpoint may move it.
    """
    return int(state["step"].cpu()) if state else 0


def index_in_group(parameter: Tensor, group: dict[str, Any]) -> int:
    """Index of a parameter in its group; a tensor's own `==` compares entries."""
    return next(i for i, other in enumerate(group["params"]) if other is parameter)
