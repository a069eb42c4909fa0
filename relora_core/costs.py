"""Parameters, FLOPs, memory and disk of a run from its shapes alone. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass

from relora_core.config import RunConfig, adapted_shapes, linear_shapes, projected_shapes


@dataclass(kw_only=True, slots=True)
class Parameters:
    """Number of parameters (Weiss et al. 2025, Table 1)."""

    total: int
    trainable: int
    by_group: dict[str, int]
    """embedding, head, norms, attention, swiglu (the linears' weights) and adapters (A, B and a
    trained s)."""


def _vocab(config: RunConfig) -> int:
    if config.model.vocab_size is None:
        raise ValueError("model.vocab_size is not set: it comes from the data")
    return config.model.vocab_size


def _trained_scales(config: RunConfig) -> int:
    """One scalar for each adapter whose s is trained."""
    trained = config.relora.scaling == "trainable" and config.relora.r
    return len(adapted_shapes(config)) if trained else 0


def parameters(config: RunConfig) -> Parameters:
    """Exact counts; with adapters, the weights that carry one are frozen."""
    model, linears, adapted = config.model, linear_shapes(config.model), adapted_shapes(config)
    table = _vocab(config) * model.d_model
    groups = {
        "embedding": table,
        "head": table,
        "norms": (2 * model.n_layers + 1) * model.d_model,
        "attention": sum(o * i for n, (o, i) in linears.items() if ".attention." in n),
        "swiglu": sum(o * i for n, (o, i) in linears.items() if ".swiglu." in n),
        "adapters": sum(config.relora.r * (o + i) for o, i in adapted.values())
        + _trained_scales(config),
    }
    total = sum(groups.values())
    frozen = sum(o * i for o, i in adapted.values())
    return Parameters(total=total, trainable=total - frozen, by_group=groups)


@dataclass(kw_only=True, slots=True)
class Flops:
    """Floating-point operations per token of a full-length sequence; a multiply-add counts two."""

    forward: int
    train: int
    """Forward, gradients of activations, gradients of the trainable weights."""


def flops_per_token(config: RunConfig) -> Flops:
    """Matmuls only; attention over the whole sequence as is customary (causality not deducted)."""
    linears, adapted = linear_shapes(config.model), adapted_shapes(config)
    head = _vocab(config) * config.model.d_model
    base = sum(o * i for o, i in linears.values())
    adapters = sum(config.relora.r * (o + i) for o, i in adapted.values())
    attention = 4 * config.data.seq_len * config.model.d_model * config.model.n_layers
    forward = 2 * (head + base + adapters) + attention
    frozen = sum(o * i for o, i in adapted.values())
    weight_gradients = 2 * (head + base + adapters - frozen)
    activation_gradients = 2 * (head + base + adapters) + 2 * attention
    return Flops(forward=forward, train=forward + activation_gradients + weight_gradients)


def _moment_bytes(config: RunConfig, *, trainable: int) -> int:
    """Two float32 moments per trainable parameter; projected ones are r x longer side (galore).

    A projector, r x shorter side, is counted with them.
    """
    r, shapes = config.galore.r, projected_shapes(config).values()
    projected = sum(8 * r * max(shape) + 4 * r * min(shape) for shape in shapes)
    return 8 * (trainable - sum(o * i for o, i in shapes)) + projected


def memory_bytes(config: RunConfig) -> dict[str, int]:
    """Estimated peak training memory of one process, by cause. Not a bound: kernels add theirs."""
    counted = parameters(config)
    model, micro = config.model, config.train.micro_batch_size or config.train.batch_size
    tokens = micro * config.data.seq_len
    width = 2 if config.train.precision == "bf16" else 4
    kv = model.n_kv_heads * (model.d_model // model.n_heads)
    # Saved for backward: per block norms, q, k, v rotated and not, attention, SwiGLU's three.
    saved = tokens * model.n_layers * (9 * model.d_model + 4 * kv + 4 * model.d_ff) * width
    estimate = {
        "weights": 4 * counted.total,
        "gradients": 4 * counted.trainable,
        "moments": _moment_bytes(config, trainable=counted.trainable),
        "activations": saved,
        "head": 4 * (min(tokens * _vocab(config), 128 * 50304) + _vocab(config) * model.d_model),
    }
    return {**estimate, "total": sum(estimate.values())}


TENSOR_BYTES = 95
"""What a tensor of a checkpoint takes beside its values: name, shape and place (safetensors)."""
STATE_BYTES = 815
"""Likewise of a parameter's state in optimizer.pt: two moments and a step count in a zip file."""
GENERATORS_BYTES = 14_200
"""rng.pt of one process."""


def checkpoint_bytes(config: RunConfig) -> int:
    """One checkpoint on disk, where it is largest: weights, moments, dynamics' reference weights.

    Adapters count with rank `relora.r`, whatever a rank schedule makes of them.
    """
    counted, adapted = parameters(config), adapted_shapes(config)
    adapters = counted.by_group["adapters"]
    masters = config.method == "relora" and config.relora.after_merge == "restore"
    plain = 3 + 9 * config.model.n_layers
    factors = 2 * len(adapted) + _trained_scales(config) if config.relora.r else 0
    tensors = plain + factors * (1 + masters)
    states = _moment_bytes(config, trainable=counted.trainable)
    states += STATE_BYTES * (plain - len(adapted) + factors)  # A, B, s have one, the weight none
    if adapted and (config.relora.warm_start_steps or config.relora.full_rank_steps):
        base = 8 * (counted.total - adapters) + STATE_BYTES * plain
        states = max(states, base)  # in a full-rank phase it is the base that has moments
    weights = counted.total + masters * adapters + sum(_reference_sizes(config))
    return 4 * weights + TENSOR_BYTES * tensors + states + GENERATORS_BYTES


def _reference_sizes(config: RunConfig) -> list[int]:
    """Sizes of the weights that a checkpoint keeps for `update_restart` of dynamics."""
    dynamics = config.dynamics
    if dynamics.every_steps is None or "update_restart" not in dynamics.what:
        return []
    kinds = {*dynamics.kinds, *(("v_proj", "o_proj") if "ov" in dynamics.kinds else ())}
    shapes = linear_shapes(config.model).items()
    return [o * i for name, (o, i) in shapes if name.rpartition(".")[2] in kinds]
