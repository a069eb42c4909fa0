"""Every knob of a run: type, unit, neutral default, bounds; validation of each and across them.

Not for: choices of an experiment (those are YAML in `conf/`), nor for reading YAML
(`experiments/schema.py`). Imports no torch, so that planning stays fast.

Each field may carry metadata that `knob` writes:
  ge, gt, le, lt   bounds of a number
  choices          the allowed strings
  methods          methods that the knob applies to, if not all of its section (`of_methods`);
                   elsewhere it is left out of the identity
  kinds            kinds of data that the knob applies to; likewise
  optimizers       values of train.optimizer that the knob applies to; likewise
  label            letter before its value in run names, where it applies
  main             True: among the params that MLflow shows of every run it applies to
  scientific       False: where or how it runs, not what it computes; outside the identity
  moot             key -> predicate of a config: that key's value leaves this knob nothing to say
  same_as          function of a config: one value for all that mean the same there, None: nothing
                   (both for planning alone: the identity stays what it was)
  sets             for a knob outside the identity: the key inside that follows from it
  grammar          False: of an eval's path: the grammar has no texts for it
  as_before        for a knob added later: the value that means "as before", left out of the hash
"""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Callable, Iterator
from dataclasses import MISSING, dataclass, field, fields
from decimal import Decimal
from functools import cache
from operator import attrgetter
from types import MappingProxyType
from typing import Any, TypeVar, cast, get_type_hints

from relora_core import schedule

METHODS = ["full_rank"]
"""Every method; `of_methods` adds those that have knobs of their own."""
ADAPTERS = ("lora", "relora")
DATA_KINDS = ("grammar", "pretokenized", "text")
OPTIMIZERS = ("adamw", "muon")
SCOPES = (
    ("methods", "method", "method"),
    ("kinds", "data.kind", "data"),
    ("optimizers", "train.optimizer", "train.optimizer"),
)
"""(entry of a knob's metadata, the key that decides, its short name)."""
EVAL_PRECISIONS = ("fp32", "bf16")
DYNAMICS = ("weight", "base", "gradient", "update_proxy", "update_restart", "update_total")
LARGEST_INT = 2**31 - 1
"""What counts and sizes fit into everywhere."""
MOST_RESTARTS = 1_000_000
"""More than a schedule can list."""
GRAMMAR_DOCUMENTS = 40
"""Held-out documents per register of the grammar."""
GRAMMAR_PAIRS = 60
"""Pairs per paradigm of the grammar."""
DYNAMICS_KINDS = ("q_proj", "k_proj", "v_proj", "o_proj", "w_0", "w_1", "w_2", "ov")


def printable(text: str) -> str:
    """One line that a terminal shows as it is, whatever a value or file name brought into it."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


class ConfigError(ValueError):
    """The user's mistake: one line naming key, value, what was expected and the nearest choice."""

    def __init__(self, message: str) -> None:
        super().__init__(printable(message))


def nearest(word: str, choices: Iterator[str] | list[str] | tuple[str, ...]) -> str:
    """` Did you mean 'x'?`, or nothing where no choice is near."""
    close = difflib.get_close_matches(str(word), [str(c) for c in choices], n=1, cutoff=0.5)
    return f" Did you mean '{close[0]}'?" if close else ""


def knob(default: Any = MISSING, *, factory: Any = MISSING, **metadata: Any) -> Any:
    """A dataclass field with bounds and scope in its metadata (see the module's docstring)."""
    if factory is not MISSING:
        return field(default_factory=factory, metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass(kw_only=True, slots=True)
class ModelConfig:
    """The pico-decoder: a pre-norm Llama block, untied head (Weiss et al. 2025, Tables 1, 6)."""

    name: str = knob("custom", scientific=False)
    """Label in run names and tables; says nothing that the sizes below do not."""
    d_model: int = knob(ge=2)
    """Width of the residual stream."""
    d_ff: int = knob(ge=1)
    """Inner width of SwiGLU (the paper's d_inter)."""
    n_layers: int = knob(12, ge=1, le=10_000)
    """Number of blocks."""
    n_heads: int = knob(12, ge=1)
    """Query heads; the head width is d_model / n_heads."""
    n_kv_heads: int = knob(4, ge=1)
    """Key/value heads (grouped-query attention); divides n_heads."""
    max_seq_len: int = knob(2048, ge=1)
    """Positions in the RoPE table; longer input is an error."""
    rope_theta: float = knob(10000.0, gt=0)
    """Base of the rotary angles."""
    norm_eps: float = knob(1e-6, gt=0)
    """RMSNorm's epsilon."""
    vocab_size: int | None = knob(None, ge=2)
    """Rows of embedding and head; None: the data's vocabulary, padded as the data says."""
    init_std: float | None = knob(None, gt=0, as_before=None)
    """Standard deviation of embedding, head and linears at the start, as in Hugging Face's Llama
    (0.02). None: pico-decoder's, which are torch's: N(0, 1) for the embedding, U(-1, 1) / sqrt(in)
    for the others."""


def adapter_scale(alpha: float, *, rank: int, rslora: bool) -> float:
    """s of an adapter with an untrained scale."""
    return alpha / (math.sqrt(rank) if rslora else rank)


def _within(every: int | None, most: int) -> int | None:
    """A cadence beyond the end is one that ends with it: with any, step 0 is measured."""
    return every and min(every, most)


def _of_grammar(path: str | None, most: int | None, there: int) -> int | None:
    """How many texts the grammar gives; None, all, of a folder's unknown number."""
    return most if path is not None or (most or there) < there else None


# knobs that say nothing beside others ------------------------------------------------------------
def _constant_scale(c: RunConfig) -> float | None:
    """s of every adapter throughout the run; None where it is trained or ranks change."""
    relora = c.relora
    ranks_change = relora.adaptive_rank_energy is not None and not _never_redraws(c)
    if relora.scaling == "trainable" or not relora.r or ranks_change or _rank_changes(c):
        return None
    return adapter_scale(relora.alpha, rank=relora.r, rslora=relora.scaling == "rslora")


def _rank_changes(c: RunConfig) -> list[tuple[int, int]] | None:
    return schedule.rank_changes(c) or None


def _phase_changes(c: RunConfig) -> list[int] | None:
    return schedule.phase_changes(c) or None


def _first_multiple(c: RunConfig) -> int | None:
    return next(schedule.restart_multiples(c), None)


def _never_redraws(c: RunConfig) -> bool:
    first = _first_multiple(c)
    return first is None or first + c.relora.restart_offset >= c.train.steps


def _never_rewarms(c: RunConfig) -> bool:
    return not c.relora.restart_warmup_steps or _first_multiple(c) is None


def _never_decays(c: RunConfig) -> bool:
    """All is warm-up, restarts included: none may come before its end."""
    return c.train.steps <= c.schedule.warmup_steps


def _pruning(relora: ReLoRAConfig) -> str:
    """The policy; of a share that is none or all, the one that says so."""
    all_or_none = {0.0: "keep", 1.0: "zero"}
    partial = relora.optimizer_state in ("random", "magnitude")
    return all_or_none.get(relora.prune_ratio if partial else -1, relora.optimizer_state)


def _is_zero_or_keep(c: RunConfig) -> bool:
    return c.relora.optimizer_state in ("zero", "keep")


def _has_no_step(c: RunConfig) -> bool:
    """Muon has one moment and no bias correction; a trained s, which is no matrix, is AdamW's."""
    return c.train.optimizer == "muon" and c.relora.scaling != "trainable"


def _one_support(c: RunConfig) -> bool:
    """Whether the first support that is drawn serves the whole run."""
    gap = c.sparse.update_gap
    return gap is None or gap >= c.train.steps or c.sparse.density == 1


def _never_refactors(c: RunConfig) -> bool:
    every = c.sltrain.refactor_every
    return not c.sltrain.r or every is None or every >= c.train.steps


_FROZEN = {"relora.r": lambda c: c.relora.r == 0}
_NO_REDRAW = {"relora.reset_frequency": _never_redraws}
_NO_RESTART = {"relora.reset_frequency": lambda c: _never_redraws(c) and _never_rewarms(c)}
_NO_DECAY = {"schedule.warmup_steps": _never_decays}


Shape = tuple[int, ...]
Matrix = tuple[int, int]
"""Shape of a linear's weight, (out, in)."""


class MethodConfig:
    """A section of knobs for a method or several, and what planning asks of them without torch.

    By default: every weight of the decoder is trained by AdamW, and nothing else. Linears and
    tensors are given as qualified name -> shape, linears' being (out, in).
    """

    __slots__ = ()

    def check(self, config: RunConfig) -> None:
        """ConfigError where knobs are at odds with each other, or with the model."""

    def targets(self, config: RunConfig) -> dict[str, Matrix]:
        """Linears that the method treats in its own way."""
        return {}

    def frozen_linears(self, config: RunConfig) -> dict[str, Matrix]:
        """Linears whose weight is not trained; with phases, not in those at low rank."""
        return {}

    def replaced_linears(self, config: RunConfig) -> dict[str, Matrix]:
        """Linears without a weight: each forward pass builds it from `added_parameters`, and keeps
        it for the backward pass."""
        return {}

    def added_parameters(self, config: RunConfig) -> dict[str, Shape]:
        """Tensors that the method adds to the model and trains, as they are at the start."""
        return {}

    def buffers(self, config: RunConfig) -> dict[str, Shape]:
        """Tensors that the method adds to the model and does not train."""
        return {}

    def has_phases(self, config: RunConfig) -> bool:
        """Whether there are phases at full rank, which train the decoder's weights alone."""
        return False

    def pass_flops(self, config: RunConfig) -> int:
        """FLOPs of the matmuls that build weights in a forward pass of any number of tokens."""
        return 0

    def moment_bytes(self, config: RunConfig, *, trainable: int) -> int:
        """Bytes of the optimizer's state, which is float32: two moments per trained parameter with
        AdamW, one with Muon."""
        frozen = {f"{name}.weight" for name in self.frozen_linears(config)}
        one = [shape for name, shape in muon_shapes(config).items() if name not in frozen]
        return 8 * trainable - 4 * sum(map(math.prod, one))

    def state_tensors(self, config: RunConfig) -> int:
        """Tensors of the optimizer's state besides each parameter's moments and step count."""
        return 0


class TargetedConfig(MethodConfig):
    """What methods have in common whose knobs name the linears that they treat."""

    __slots__ = ()
    target_modules: list[str]
    """Parts of names of these linears."""

    def targets(self, config: RunConfig) -> dict[str, Matrix]:
        return named_shapes(config.model, self.target_modules)


def targets_knob() -> Any:
    """A `target_modules`: by default every linear of the blocks."""
    return knob(
        factory=lambda: ["attention", "swiglu"],
        same_as=lambda c: list(method_config(c).targets(c)),
    )


def factor_shapes(targets: dict[str, Matrix], *, r: int) -> dict[str, Shape]:
    """A (r, in) and B (out, r) of each target; none with rank 0."""
    shapes: dict[str, Shape] = {}
    for name, (rows, columns) in targets.items() if r else ():
        shapes |= {f"{name}.lora_A": (r, columns), f"{name}.lora_B": (rows, r)}
    return shapes


_METHODS_OF: dict[type, tuple[str, ...]] = {}
WITH_MUON = ["full_rank"]
"""Methods that leave the choice of `train.optimizer`."""
Section = TypeVar("Section", bound=MethodConfig)


def of_methods(*names: str, muon: bool = False) -> Callable[[type[Section]], type[Section]]:
    """Declare a section's methods: they can be chosen, and its knobs apply to them alone.

    A knob with `methods` of its own applies to those alone. `muon`: the methods can be combined
    with `train.optimizer=muon`, which the others refuse.
    """

    def declare(section: type[Section]) -> type[Section]:
        METHODS.extend(names)
        WITH_MUON.extend(names if muon else ())
        for f in fields(section):  # type: ignore[arg-type]
            f.metadata = MappingProxyType({"methods": names, **f.metadata})
        _METHODS_OF[section] = names
        return section

    return declare


@of_methods(*ADAPTERS, muon=True)
@dataclass(kw_only=True, slots=True)
class ReLoRAConfig(TargetedConfig):
    """Adapters and restarts (Lialin et al. 2023); `lora` has the adapter knobs alone.

    The options of conf/relora combine these into the published procedures; each can be ablated.
    """

    name: str = knob("custom", scientific=False, methods=("relora",))
    """Label of the procedure in run names and tables; says nothing that the knobs do not."""
    r: int = knob(16, ge=0, label="r", main=True)
    """Rank of B·A; at most the smaller side of every target. 0 (lora only): targets stay as drawn,
    and embedding, head and norms alone are trained."""
    alpha: float = knob(
        16.0,
        gt=0,
        main=True,
        moot={"relora.scaling": lambda c: c.relora.scaling == "trainable", **_FROZEN},
        same_as=lambda c: _constant_scale(c) or c.relora.alpha,
    )
    """Numerator of the adapter's scale s; no part of a trained one."""
    scale: float | None = knob(None, gt=0, scientific=False, sets="relora.alpha")
    """s itself, for sweeps over r: alpha is scale * r then, and the run that of such an alpha."""
    scaling: str = knob(
        "standard",
        choices=("standard", "rslora", "trainable"),
        moot=_FROZEN,
        same_as=lambda c: None if _constant_scale(c) else c.relora.scaling,
    )
    """s: alpha / r; alpha / sqrt(r) (Kalajdzievski 2023); or tanh of a trained scalar. r is the
    adapter's own rank: where a restart lowers that, s rises."""
    dropout: float = knob(0.0, ge=0, lt=1, moot=_FROZEN)
    """Dropout on the adapter's input only."""
    target_modules: list[str] = targets_knob()
    """A linear is adapted where its qualified name contains one of these (case-insensitive)."""
    full_rank_modules: list[str] = knob(factory=list, same_as=lambda c: None)
    """Targets that stay full rank: parts of names, or `last:n` for the last n layers."""
    lr_ratio_b: float = knob(1.0, gt=0, moot=_FROZEN)
    """Learning rate of B over that of all else (LoRA+, Hayou et al. 2024)."""
    init_a: str = knob(
        "kaiming",
        choices=("kaiming", "zero"),
        moot={
            "relora.warm_start_steps": lambda c: c.relora.warm_start_steps > 0,
            "relora.full_rank_steps": lambda c: c.relora.full_rank_steps > 0,
            **_FROZEN,
        },
    )
    """A at the start; `zero` as published: with B = 0, neither has a gradient before a restart (so
    lora, which has none, refuses it). After a full-rank phase A is kaiming in any case."""
    warm_start_steps: int = knob(0, ge=0, same_as=_phase_changes)
    """Full-rank steps before the adapters begin (Lialin et al. 2023, Sec. 3)."""
    full_rank_steps: int = knob(0, ge=0, same_as=lambda c: None)
    """Duty cycle after the warm start: so many full-rank steps ..."""
    low_rank_steps: int = knob(0, ge=0, same_as=lambda c: None)
    """... then so many with adapters, in turn; both 0: adapters all the time."""
    reset_frequency: int = knob(
        2000,
        ge=1,
        methods=("relora",),
        label="t",
        main=True,
        moot={
            "train.steps": lambda c: _first_multiple(c) is None,
            "relora.restart_offset": lambda c: _never_redraws(c) and _never_rewarms(c),
        },
    )
    """Optimizer steps between restarts (the paper's T). There is none at full rank, nor, though the
    learning rate is re-warmed, where no adapter has had an update since a full-rank phase."""
    first_restart: int | None = knob(
        None, ge=1, methods=("relora",), moot=_NO_RESTART, same_as=_first_multiple
    )
    """No restart before this step; None: the first multiple of reset_frequency."""
    restart_offset: int = knob(0, choices=(0, 1), methods=("relora",), moot=_NO_REDRAW)
    """Restart before (0) or after (1, as published) the update whose learning rate is 0."""
    rank_schedule: list[list[int]] = knob(
        factory=list, methods=("relora",), moot=_NO_REDRAW, same_as=_rank_changes
    )
    """[[step, rank], ...]: adapters drawn at a multiple of reset_frequency from a step on have this
    rank, else r."""
    adaptive_rank_energy: float | None = knob(
        None, gt=0, le=1, methods=("relora",), moot=_NO_REDRAW
    )
    """A restart gives each adapter the fewest ranks that hold this share of BA's squared singular
    values, at most r or the schedule's. So ranks fall, until the schedule rises: then all have
    its rank. BA = 0 keeps the rank; None: no adapting."""
    nested_rank: bool = knob(
        False,
        methods=("relora",),
        moot={"relora.r": lambda c: c.relora.r == 1 and _rank_changes(c) is None},
    )
    """Train with the first b ranks, b drawn anew at each step (DyLoRA, Valipour et al. 2023), so
    that the leading ones carry most."""
    restart_groups: int = knob(1, ge=1, methods=("relora",), moot=_NO_REDRAW)
    """Partial restarts: the adapters take turns in so many groups; 1: all at every restart."""
    restart_warmup_steps: int = knob(
        0, ge=0, methods=("relora",), moot={"relora.reset_frequency": _never_rewarms}
    )
    """Steps over which the learning rate is re-warmed after a restart (jagged schedule)."""
    merge: str = knob(
        "scaled",
        choices=("scaled", "unscaled"),
        methods=("relora",),
        moot={**_NO_REDRAW, "relora.alpha": lambda c: _constant_scale(c) == 1},
    )
    """A restart's W += s·BA (Weiss et al. 2025, Eq. 3), or 1·BA as the published trainer does. The
    end of a low-rank phase folds s·BA in either case."""
    after_merge: str = knob(
        "reinit", choices=("reinit", "restore"), methods=("relora",), moot=_NO_REDRAW
    )
    """New A and B (and trained s); or, as very probably ran, the old ones back from the optimizer's
    masters after one forward and backward pass with the new ones."""
    base_dtype: str = knob("float32", choices=("float32", "bfloat16"), methods=("relora",))
    """Precision that a frozen W is kept and merged in; the published runs' copies were bfloat16.
    Full-rank phases train it in float32."""
    optimizer_state: str = knob(
        "zero",
        choices=("random", "magnitude", "zero", "keep"),
        methods=("relora",),
        main=True,
        moot=_NO_REDRAW,
        same_as=lambda c: _pruning(c.relora),
    )
    """What a restart does to the adapters' moments: zero a share, all or none of them (`keep` keeps
    Adam's step, too). Where it changes the rank, they go with the old shape."""
    prune_ratio: float = knob(
        1.0,
        ge=0,
        le=1,
        methods=("relora",),
        moot={**_NO_REDRAW, "relora.optimizer_state": _is_zero_or_keep},
        same_as=lambda c: None if _pruning(c.relora) in ("zero", "keep") else c.relora.prune_ratio,
    )
    """Share that `random` and `magnitude` zero."""
    joint_mask: bool = knob(
        True,
        methods=("relora",),
        moot={
            **_NO_REDRAW,
            "relora.optimizer_state": _is_zero_or_keep,
            "relora.prune_ratio": lambda c: _pruning(c.relora) in ("zero", "keep"),
            "train.optimizer": _has_no_step,
        },
    )
    """One mask for both moments; false: each its own, as published."""
    reset_adam_step: bool = knob(
        True,
        methods=("relora",),
        moot={
            **_NO_REDRAW,
            "relora.optimizer_state": lambda c: c.relora.optimizer_state == "keep",
            "relora.prune_ratio": lambda c: _pruning(c.relora) == "keep",
            "train.optimizer": _has_no_step,
        },
    )
    """Whether bias correction starts anew for a tensor with pruned moments; false as published."""

    def check(self, config: RunConfig) -> None:
        _check_adapters(config)
        if config.method == "relora":
            _check_restarts(config)

    def targets(self, config: RunConfig) -> dict[str, Matrix]:
        left_out = named_shapes(config.model, self.full_rank_modules)
        named = named_shapes(config.model, self.target_modules)
        return {name: shape for name, shape in named.items() if name not in left_out}

    def frozen_linears(self, config: RunConfig) -> dict[str, Matrix]:
        return self.targets(config)

    def added_parameters(self, config: RunConfig) -> dict[str, Shape]:
        """A, B and a trained s of each adapter; with rank `r`, whatever a schedule makes of it."""
        targets = self.targets(config)
        trained = self.scaling == "trainable" and self.r > 0
        scales: dict[str, Shape] = {f"{name}.scalar": () for name in targets} if trained else {}
        return factor_shapes(targets, r=self.r) | scales

    def has_phases(self, config: RunConfig) -> bool:
        return self.warm_start_steps > 0 or self.full_rank_steps > 0

    def buffers(self, config: RunConfig) -> dict[str, Shape]:
        """The masters of A, B and s, which a merge keeps."""
        masters = config.method == "relora" and self.after_merge == "restore"
        return self.added_parameters(config) if masters else {}


class ProjectedConfig(TargetedConfig):
    """What methods with moments of a projected gradient have in common."""

    __slots__ = ()
    r: int
    """Rank of a projected gradient."""
    norm_growth: float | None = None
    """Of a norm-growth limiter; None: there is none."""

    def check(self, config: RunConfig) -> None:
        _check_names(config, f"{config.method}.target_modules")
        _check_rank(config, f"{config.method}.r", self.targets(config))

    def moment_bytes(self, config: RunConfig, *, trainable: int) -> int:
        """Moments of a target are r x longer side, its projector is r x shorter side."""
        shapes = self.targets(config).values()
        low = sum(8 * self.r * max(shape) + 4 * self.r * min(shape) for shape in shapes)
        norms = 0 if self.norm_growth is None else 4 * len(shapes)
        return 8 * (trainable - sum(math.prod(shape) for shape in shapes)) + low + norms

    def state_tensors(self, config: RunConfig) -> int:
        """A projector and, of a limiter, a norm for each target."""
        return len(self.targets(config)) * (1 if self.norm_growth is None else 2)


@of_methods("galore")
@dataclass(kw_only=True, slots=True)
class GaLoreConfig(ProjectedConfig):
    """Low-rank moments for full-rank weights (GaLore, Zhao et al. 2024, arXiv 2403.03507)."""

    r: int = knob(16, ge=1, label="r", main=True)
    """Rank of the projected gradient; at most the smaller side of every target."""
    update_gap: int = knob(
        200,
        ge=1,
        main=True,
        same_as=lambda c: min(c.galore.update_gap, c.train.steps),
    )
    """Optimizer steps between projectors (the paper's T, which it finds best at 50 to 1000)."""
    scale: float = knob(0.25, gt=0)
    """Factor of a target's update (the paper's alpha); its weight decay is not scaled."""
    moments: str = knob(
        "keep",
        choices=("keep", "reset"),
        moot={"galore.update_gap": lambda c: c.galore.update_gap >= c.train.steps},
    )
    """At a new projector: `keep` moments and step counter (as published) or `reset` both."""
    target_modules: list[str] = targets_knob()
    """A linear is projected where its qualified name contains one of these (case-insensitive)."""


@of_methods("fira")
@dataclass(kw_only=True, slots=True)
class FiraConfig(ProjectedConfig):
    """GaLore, and what it discards of the gradient (Fira, Chen et al. 2024, arXiv 2410.01623)."""

    r: int = knob(16, ge=1, label="r", main=True)
    """Rank of the projected gradient; at most the smaller side of every target."""
    update_gap: int = knob(
        200, ge=1, main=True, same_as=lambda c: min(c.fira.update_gap, c.train.steps)
    )
    """Optimizer steps between projectors (the paper's T)."""
    scale: float = knob(0.25, gt=0)
    """Factor of the projected part of a target's update (the paper's alpha); neither the other part
    nor the weight decay is scaled."""
    residual: str = knob(
        "paper",
        choices=("paper", "code"),
        moot={"fira.scale": lambda c: c.fira.scale == 1},
    )
    """What counts as discarded: G - P P^T G; or, as published code has it, G - scale P P^T G."""
    norm_growth: float | None = knob(1.01, ge=1)
    """The discarded part's norm over the last update's, at most (the paper's gamma); None: any."""
    target_modules: list[str] = targets_knob()
    """A linear is projected where its qualified name contains one of these (case-insensitive)."""


@of_methods("apollo")
@dataclass(kw_only=True, slots=True)
class ApolloConfig(ProjectedConfig):
    """Gradients scaled by what Adam does in a random projection (APOLLO, Zhu et al. 2024)."""

    r: int = knob(16, ge=1, label="r", main=True)
    """Rank of the projected gradient; at most the smaller side of every target."""
    update_gap: int = knob(
        200, ge=1, main=True, same_as=lambda c: min(c.apollo.update_gap, c.train.steps)
    )
    """Optimizer steps between random projections (the paper's T)."""
    scaling: str = knob("channel", choices=("channel", "tensor"), main=True)
    """A factor for each column of the gradient (each row where rows > columns), or one for all."""
    scale: float = knob(1.0, gt=0)
    """An update is multiplied by its square root. Factors from r numbers instead of m are smaller
    by about sqrt(r / m); published: 1 at r = d_model / 4, 128 at r = 1."""
    norm_growth: float | None = knob(1.01, ge=1)
    """An update's norm over the last one's, at most (the paper's gamma); None: any."""
    target_modules: list[str] = targets_knob()
    """A linear is projected where its qualified name contains one of these (case-insensitive)."""


def _never_switches(c: RunConfig) -> bool:
    return c.switchlora.interval is None


_NO_SWITCH = {"switchlora.interval": _never_switches}


@of_methods("switchlora")
@dataclass(kw_only=True, slots=True)
class SwitchLoRAConfig(TargetedConfig):
    """Adapters that exchange a few vectors at a time (SwitchLoRA, Zhou et al. 2024,
    arXiv 2406.06564); defaults as published."""

    r: int = knob(16, ge=2, label="r", main=True)
    """Rank of B·A; at most the smaller side of every target. One with a side of r has no vector to
    spare, and switches none: B·A is of full rank there."""
    alpha: float = knob(1.0, gt=0, main=True)
    """Numerator of the scale s = alpha / r."""
    interval: int | None = knob(40, ge=1, label="i", main=True)
    """Optimizer steps between two switches of the same vector at first: r / interval vectors of B
    and as many of A a step. None: never; then it is LoRA from this initialisation."""
    decay: float | None = knob(0.1, gt=0, le=1000, label="d", main=True, moot=_NO_SWITCH)
    """Share of train.steps in which the frequency falls to 0.3 of its first value, exponentially,
    and so on: to 6e-6 of it at the end with 0.1. None: the frequency stays."""
    freeze_steps: int = knob(5, ge=0, label="f", main=True, moot=_NO_SWITCH)
    """Updates for which the gradient of a switched vector's counterpart is taken as 0."""
    order: str = knob("sequential", choices=("sequential", "random"), moot=_NO_SWITCH)
    """Which spare vector comes in: that which has been out longest, or any."""
    target_modules: list[str] = targets_knob()
    """A linear is adapted where its qualified name contains one of these (case-insensitive)."""

    def check(self, config: RunConfig) -> None:
        _check_names(config, "switchlora.target_modules")
        _check_switches(config)

    def frozen_linears(self, config: RunConfig) -> dict[str, Matrix]:
        return self.targets(config)

    def added_parameters(self, config: RunConfig) -> dict[str, Shape]:
        """A and B of each adapter."""
        return factor_shapes(self.targets(config), r=self.r)

    def buffers(self, config: RunConfig) -> dict[str, Shape]:
        """The pools: spare vectors, each a row."""
        pools: dict[str, Shape] = {}
        for name, (rows, columns) in self.targets(config).items():
            spare = self.spare_vectors((rows, columns))
            pools |= {f"{name}.pool_A": (spare, columns), f"{name}.pool_B": (spare, rows)}
        return pools

    def spare_vectors(self, shape: Matrix) -> int:
        """How many vectors of A, and of B, wait in the pools of a linear."""
        return min(shape) - self.r if self.interval is not None else 0

    def moment_bytes(self, config: RunConfig, *, trainable: int) -> int:
        """Besides two moments, a step count and the rest of its freeze for each vector."""
        return 8 * trainable + 8 * self.r * self.state_tensors(config)

    def state_tensors(self, config: RunConfig) -> int:
        """The rest of the freezes of each factor, if it is likely to have a vector switched."""
        shapes = self.targets(config).values() if schedule.expected_switches(config) >= 1 else ()
        return 2 * sum(self.spare_vectors(shape) > 0 for shape in shapes)


@of_methods("sparse")
@dataclass(kw_only=True, slots=True)
class SparseConfig(TargetedConfig):
    """Updates of few entries at a time (Sparse Optimization, Mrabah et al. 2025, arXiv 2504.12436).

    Both betas are those of `train`; the published code's default for the first is 0.4.
    """

    density: float = knob(0.1, gt=0, le=1, label="d", main=True)
    """Share of a target's entries whose gradient is used, and whose moments are kept. 1: AdamW."""
    update_gap: int | None = knob(
        30,
        ge=1,
        main=True,
        moot={"sparse.density": lambda c: c.sparse.density == 1},
        same_as=lambda c: None if _one_support(c) else c.sparse.update_gap,
    )
    """Optimizer steps between draws of these entries (the paper's T); None: one draw for the run,
    which is random static sparse training."""
    select: str = knob(
        "random",
        choices=("random", "gradient"),
        moot={"sparse.density": lambda c: c.sparse.density == 1},
    )
    """What is drawn: entries at `random` (as published), or those of the largest gradient."""
    keep: str = knob(
        "importance",
        choices=("importance", "support"),
        moot={"sparse.update_gap": lambda c: _one_support(c)},
    )
    """Which moments outlive an update: the largest first ones by `importance`, drawn or not (as
    published), or those of the `support`, the entries drawn last."""
    bias_correction: str = knob(
        "global",
        choices=("global", "entry"),
        moot={"sparse.update_gap": lambda c: _one_support(c)},
    )
    """Whether Adam's step is the run's (as published: an entry drawn late begins with an update of
    (1 - beta1) / sqrt(1 - beta2) learning rates) or each `entry` counts its own."""
    target_modules: list[str] = targets_knob()
    """A linear is a target where its qualified name contains one of these (case-insensitive)."""

    def entries(self, config: RunConfig) -> dict[str, int]:
        """Target -> how many of its entries are drawn, and have moments."""
        return share_of_entries(self.density, self.targets(config))

    def check(self, config: RunConfig) -> None:
        _check_names(config, "sparse.target_modules")
        _check_share("sparse.density", self.density, self.targets(config))

    def moment_bytes(self, config: RunConfig, *, trainable: int) -> int:
        """For each of the k entries two moments, its place, a place of the support, and its age if
        it has one.

        Beyond a density of a half that is more than AdamW's 8 bytes of every entry.
        """
        each = 20 if self.bias_correction == "entry" else 16
        dense = trainable - sum(map(math.prod, self.targets(config).values()))
        return 8 * dense + each * sum(self.entries(config).values())

    def state_tensors(self, config: RunConfig) -> int:
        return (3 if self.bias_correction == "entry" else 2) * len(self.entries(config))


_NO_FACTORS = {"sltrain.r": lambda c: c.sltrain.r == 0}


@of_methods("sltrain", muon=True)
@dataclass(kw_only=True, slots=True)
class SLTrainConfig(TargetedConfig):
    """Low rank plus sparse from scratch (SLTrain, Han et al. 2024, arXiv 2406.02214)."""

    r: int = knob(16, ge=0, label="r", main=True)
    """Rank of B·A; at most the smaller side of every target. 0: the sparse part alone."""
    alpha: float = knob(16.0, gt=0, main=True, moot=_NO_FACTORS)
    """Numerator of the scale s = alpha / r (published: 32 with r=128, 16 with r=256)."""
    delta: float = knob(0.03, ge=0, le=1, label="d", main=True)
    """Share of a target's entries that are in the sparse part. 0: the low-rank part alone."""
    init: str = knob(
        "published",
        choices=("published", "spectral"),
        moot={**_NO_FACTORS, "sltrain.delta": lambda c: c.sltrain.delta == 0},
    )
    """B·A at the start: B = 0 as published, which needs a sparse part; or what is nearest to the
    draw of a dense linear."""
    refactor_every: int | None = knob(
        None,
        ge=1,
        main=True,
        moot=_NO_FACTORS,
        same_as=lambda c: None if _never_refactors(c) else c.sltrain.refactor_every,
    )
    """Optimizer steps between refactorisations of B·A; None: never."""
    refactor: str = knob(
        "balance",
        choices=("balance", "moments"),
        moot={**_NO_FACTORS, "sltrain.refactor_every": lambda c: _never_refactors(c)},
    )
    """`balance` A and B by the SVD of their product and drop their moments (Glentis et al. 2025),
    or drop the `moments` alone."""
    target_modules: list[str] = targets_knob()
    """A linear is replaced where its qualified name contains one of these (case-insensitive)."""

    def entries(self, config: RunConfig) -> dict[str, int]:
        """Target -> entries of its sparse part."""
        return share_of_entries(self.delta, self.targets(config))

    def check(self, config: RunConfig) -> None:
        _check_names(config, "sltrain.target_modules")
        targets = self.targets(config)
        _check_rank(config, "sltrain.r", targets, least=0)
        if self.delta:
            _check_share("sltrain.delta", self.delta, targets)
        elif not self.r:
            raise ConfigError(
                "sltrain.r and sltrain.delta must not both be 0 (a target would have no weight), "
                "got 0 and 0; nearest valid: sltrain.r=1"
            )
        elif self.init == "published":
            raise ConfigError(
                "sltrain.init must be spectral with sltrain.delta=0 (with B = 0 and no sparse part "
                "nothing in a block has a gradient), got 'published'; nearest valid: spectral"
            )

    def replaced_linears(self, config: RunConfig) -> dict[str, Matrix]:
        return self.targets(config)

    def added_parameters(self, config: RunConfig) -> dict[str, Shape]:
        """A and B, and the values of each sparse part."""
        values = {f"{name}.values": (k,) for name, k in self.entries(config).items() if k}
        return factor_shapes(self.targets(config), r=self.r) | values

    def buffers(self, config: RunConfig) -> dict[str, Shape]:
        """The places of each sparse part, in int32."""
        return {f"{name}.places": (k,) for name, k in self.entries(config).items() if k}

    def pass_flops(self, config: RunConfig) -> int:
        """Of B A of every target."""
        return sum(2 * self.r * math.prod(shape) for shape in self.targets(config).values())


@dataclass(kw_only=True, slots=True)
class ScheduleConfig:
    """Learning-rate factor as a pure function of the 0-based optimizer step (`schedule.py`)."""

    name: str = knob("cosine", choices=("cosine", "linear"), moot=_NO_DECAY)
    """Decay after the warm-up; `relora` makes it jagged at its restarts."""
    warmup_steps: int = knob(0, ge=0)
    """Linear warm-up from 0."""
    min_ratio: float = knob(
        0.0,
        ge=0,
        le=1,
        moot={**_NO_DECAY, "schedule.name": lambda c: c.schedule.name == "linear"},
    )
    """Floor of the cosine, as a share of the peak. The linear decay ends at 0."""
    total_steps: int | None = knob(
        None,
        ge=1,
        moot={
            "schedule.min_ratio": lambda c: (
                c.schedule.name == "cosine" and c.schedule.min_ratio == 1
            ),
            **_NO_DECAY,
        },
        same_as=lambda c: c.schedule.total_steps or c.train.steps,
    )
    """Horizon of the decay; None: train.steps. The published runs used 200,000 for 20,000 steps."""


@dataclass(kw_only=True, slots=True)
class TrainConfig:
    """Optimisation of all trainable parameters (Weiss et al. 2025, Table 6)."""

    steps: int = knob(ge=1)
    """Optimizer steps."""
    batch_size: int = knob(ge=1)
    """Sequences per optimizer step, over all processes and accumulation."""
    micro_batch_size: int | None = knob(None, ge=1, scientific=False)
    """Sequences per process and forward pass; None: as micro_batch_tokens says."""
    micro_batch_tokens: int | None = knob(None, ge=1, scientific=False)
    """Tokens of a forward pass that suffice: it has the fewest sequences with so many, on a GPU not
    more than its memory holds (by costs.py); a resumed run keeps them. Above 32,768 a GPU gains
    nothing. None: batch_size / processes (no accumulation)."""
    optimizer: str = knob("adamw", choices=OPTIMIZERS, as_before="adamw", label="")
    """`muon`: Muon for the matrices of the blocks and of adapters, AdamW for all else."""
    lr: float = knob(3e-4, gt=0)
    """Peak learning rate."""
    weight_decay: float = knob(0.01, ge=0)
    """Decoupled decay, on every trainable parameter (as published)."""
    beta1: float = knob(0.9, ge=0, lt=1)
    """Decay of AdamW's first moment."""
    beta2: float = knob(0.999, ge=0, lt=1)
    """Decay of AdamW's second moment."""
    eps: float = knob(1e-8, gt=0)
    """AdamW's epsilon."""
    grad_clip: float | None = knob(None, gt=0)
    """Largest global gradient norm; None: no clipping (as published)."""
    precision: str = knob("fp32", choices=("fp32", "bf16", "tf32"))
    """`bf16`: matmuls under autocast; weights, moments, softmax and loss stay float32. `tf32`: the
    matmuls of training passes round their inputs to 10 bits, on a GPU alone; all else as fp32."""


@dataclass(kw_only=True, slots=True)
class MuonConfig:
    """Orthogonalised momentum for hidden matrices (Jordan et al. 2024), as torch.optim.Muon has it.

    The schedule, the weight decay and, for all other parameters, AdamW's knobs are those of train.
    """

    lr_ratio: float = knob(1.0, gt=0, main=True, optimizers=("muon",))
    """Learning rate of Muon over train.lr, AdamW's."""
    adjust_lr: str = knob(
        "match_rms_adamw",
        choices=("match_rms_adamw", "original"),
        main=True,
        optimizers=("muon",),
    )
    """Factor of an update of shape (m, n): 0.2 sqrt(max(m, n)), entries about as large as AdamW's,
    so that one learning rate serves both (Liu et al. 2025, arXiv 2502.16982); or
    sqrt(max(1, m / n)), as first published, with learning rates near 0.02."""
    momentum: float = knob(0.95, ge=0, lt=1, optimizers=("muon",))
    """Share of the moment that the next one keeps."""
    nesterov: bool = knob(
        True, optimizers=("muon",), moot={"muon.momentum": lambda c: c.muon.momentum == 0}
    )
    """Orthogonalise the gradient mixed with the moment; false: the moment alone."""
    ns_steps: int = knob(5, ge=1, le=99, optimizers=("muon",))
    """Newton-Schulz iterations, in bfloat16."""


@dataclass(kw_only=True, slots=True)
class DataConfig:
    """Where the tokens come from. A position in them is part of a checkpoint."""

    kind: str = knob("grammar", choices=DATA_KINDS)
    """`grammar`: our generator. `pretokenized`: parquet rows of ids. `text`: files + tokenizer."""
    path: str | None = knob(None, scientific=False, kinds=("pretokenized", "text"))
    """Local folder or file, or a hub name (pretokenized only)."""
    split: str = knob("train", kinds=("pretokenized",))
    """Split of a pretokenized data set."""
    tokenizer: str | None = knob(None, scientific=False, kinds=("pretokenized", "text"))
    """tokenizer.json, a folder that holds one, or a hub name. Evals on text need it."""
    text_field: str = knob("text", kinds=("text",))
    """Key of the text in a jsonl record, or its column in parquet."""
    shuffle_rows: bool = knob(False, kinds=("text",), as_before=False)
    """Rows in a seeded order of their own; false: as they lie, so that a step's rows are often of
    one document, and a short run sees what few documents it happens to begin with."""
    vocab_size: int | None = knob(
        None,
        ge=2,
        kinds=("pretokenized",),
        moot={"model.vocab_size": lambda c: c.model.vocab_size is not None},
    )
    """Ids that rows may hold; None: the tokenizer's size padded to a multiple of 128."""
    eos_id: int | None = knob(
        None,
        ge=0,
        kinds=("pretokenized", "text"),
        same_as=lambda c: None if c.data.fingerprint else c.data.eos_id,
    )
    """Id that ends a document; None: the tokenizer's `<|endoftext|>`, `</s>` or `<eos>`."""
    seq_len: int = knob(ge=1)
    """Tokens per training sequence (inputs; labels are shifted by one)."""
    fingerprint: str | None = knob(None)
    """Digest of data and tokenizer files; filled in by the plan, stands for path and tokenizer."""


@dataclass(kw_only=True, slots=True)
class PalomaConfig:
    """Perplexity per source and domain, in the layout of Paloma (Magnusson et al. 2023)."""

    enabled: bool = knob(False)
    """Whether it runs."""
    path: str | None = knob(None, scientific=False)
    """Folder <source>/<split>/*.jsonl.gz; None: the grammar's own registers (other data: off)."""
    split: str = knob("val", moot={"eval.paloma.path": lambda c: c.eval.paloma.path is None})
    """Folder below each source."""
    every_steps: int | None = knob(
        None, ge=1, same_as=lambda c: _within(c.eval.paloma.every_steps, c.train.steps)
    )
    """Cadence in optimizer steps; None: only at the end. The end is always evaluated."""
    max_documents: int | None = knob(
        None,
        ge=1,
        same_as=lambda c: _of_grammar(
            c.eval.paloma.path, c.eval.paloma.max_documents, GRAMMAR_DOCUMENTS
        ),
    )
    """Documents per domain at most; None: all."""
    precision: str = knob("fp32", choices=EVAL_PRECISIONS, as_before="fp32")
    """Of the head's matmuls; sums and exponentials are float32 in any case."""
    fingerprint: str | None = knob(None)
    """Digest of the files; filled in by the plan, stands for path."""


@dataclass(kw_only=True, slots=True)
class BlimpConfig:
    """Minimal-pair accuracy (BLiMP, Warstadt et al. 2020)."""

    enabled: bool = knob(False)
    """Whether it runs."""
    path: str | None = knob(None, scientific=False)
    """Folder, tar or zip of <UID>.jsonl, or a folder of the hub's parquet files; None: the
    grammar's own pairs (off for other data)."""
    every_steps: int | None = knob(
        None, ge=1, same_as=lambda c: _within(c.eval.blimp.every_steps, c.train.steps)
    )
    """Cadence in optimizer steps; None: only at the end. The end is always evaluated."""
    max_pairs: int | None = knob(
        None,
        ge=1,
        same_as=lambda c: _of_grammar(c.eval.blimp.path, c.eval.blimp.max_pairs, GRAMMAR_PAIRS),
    )
    """Pairs per paradigm at most (the first ones); None: all."""
    precision: str = knob("fp32", choices=EVAL_PRECISIONS, as_before="fp32")
    """Of the head's matmuls; bf16 is faster and may flip pairs that are nearly even."""
    fingerprint: str | None = knob(None)
    """Digest of the files; filled in by the plan, stands for path."""


@dataclass(kw_only=True, slots=True)
class EvalConfig:
    """A section for each eval of `evals/`, by its name.

    Each has `enabled`, `path`, `every_steps` and `fingerprint`, with these meanings.
    """

    paloma: PalomaConfig = field(default_factory=PalomaConfig)
    blimp: BlimpConfig = field(default_factory=BlimpConfig)


def runs_eval(config: RunConfig, name: str) -> bool:
    """Without a path an eval has the grammar's own texts, if there are any and data are grammar."""
    section = getattr(config.eval, name)
    if section.path is not None:
        return section.enabled
    return section.enabled and config.data.kind == "grammar" and _in_grammar(type(section))


@cache
def _in_grammar(section: type) -> bool:
    return next(f.metadata.get("grammar", True) for f in fields(section) if f.name == "path")


EVALS = tuple(f.name for f in fields(EvalConfig))
"""Every eval: a section above, a spec in `evals.REGISTRY`."""


@dataclass(kw_only=True, slots=True)
class DynamicsConfig:
    """Effective ranks and condition numbers of weights, gradients and updates (`dynamics.py`)."""

    every_steps: int | None = knob(
        None, ge=1, same_as=lambda c: _within(c.dynamics.every_steps, c.train.steps + 1)
    )
    """Cadence in optimizer steps, before the restart where there is one; None: never."""
    what: list[str] = knob(
        factory=lambda: ["weight"],
        as_before=["weight"],
        moot={"dynamics.every_steps": lambda c: c.dynamics.every_steps is None},
        same_as=lambda c: sorted(set(c.dynamics.what)),
    )
    """`weight` W + s·BA; `base` W without adapter, as published; `gradient` of W + s·BA;
    `update_proxy` B·A, as published; and the true updates of W + s·BA: `update_restart` since the
    newest restart, `update_total` since the start."""
    kinds: list[str] = knob(
        factory=lambda: ["v_proj", "o_proj", "w_2", "ov"],
        as_before=["v_proj", "o_proj", "w_2", "ov"],
        moot={"dynamics.every_steps": lambda c: c.dynamics.every_steps is None},
        same_as=lambda c: sorted(set(c.dynamics.kinds)),
    )
    """Block linears, by default the paper's; `ov`: the circuit of v_proj and o_proj, four ways."""


@dataclass(kw_only=True, slots=True)
class CheckpointConfig:
    """Where a killed run resumes from."""

    every_steps: int = knob(1000, ge=1, scientific=False)
    """A hard kill costs at most this many optimizer steps."""
    every_minutes: float | None = knob(None, gt=0, scientific=False)
    """And at most this much time; None: steps alone count."""
    keep_last: int = knob(2, ge=1, scientific=False)
    """Complete checkpoints kept while training."""
    on_code_change: str = knob("warn", choices=("warn", "refuse"), scientific=False)
    """What to do where a run would go on with other code of relora_core than it began with."""


@dataclass(kw_only=True, slots=True)
class TrackingConfig:
    """MLflow, a view of events.jsonl that can be rebuilt (`experiments/tracking/runs.py`)."""

    enabled: bool = knob(False, scientific=False)
    """Whether runs are shown in MLflow; events.jsonl is written in any case."""
    uri: str | None = knob(None, scientific=False)
    """sqlite:///, http(s)://, postgresql://, mysql:// ...; None: the variable MLFLOW_TRACKING_URI,
    else sqlite in output_dir/mlflow.db."""
    experiment: str | None = knob(None, scientific=False)
    """Name of the MLflow experiment; None: the variable MLFLOW_EXPERIMENT_NAME, else the sweep's
    name, else the experiment's."""
    system_metrics: bool = knob(False, scientific=False)
    """Record the load of CPU and GPUs every 10 s as metrics system/..."""


@dataclass(kw_only=True, slots=True)
class RuntimeConfig:
    """Where and how it runs. Nothing here changes what is computed, up to rounding."""

    device: str = knob("auto", choices=("auto", "cpu", "cuda"), scientific=False)
    """`auto`: a GPU where there is one."""
    threads: int | None = knob(None, ge=1, scientific=False)
    """CPU threads of a run; None: the cores, shared between the runs at work."""
    kernels: str = knob("auto", choices=("auto", "native", "torch"), scientific=False)
    """Of a CPU. `native`: C++ built on first use (needs a compiler); `auto`: that if possible."""
    compile: str = knob("auto", choices=("auto", "off", "blocks", "cudagraphs"), scientific=False)
    """`blocks`: torch compiles the blocks of a training pass (the first one takes longer); `auto`:
    that on a GPU with a C compiler and Python.h (python3-dev). `cudagraphs`: that, launched
    together, for small batches."""
    head: str = knob("chunked", choices=("chunked", "cce"), scientific=False)
    """The loss of training. `cce`: on a GPU in bf16 by Apple's cut-cross-entropy, which writes no
    logits. It must be installed apart (pip install cut-cross-entropy), under a licence of its own;
    it rounds otherwise, and waits for the GPU once a pass. Its speed here is not measured."""
    deterministic: bool = knob(False, scientific=False)
    """A GPU's kernels add up in one order, so that the same run there gives the same bits; slower,
    by how much is not measured. A CPU's do so anyway."""
    log_every_steps: int = knob(10, ge=1, scientific=False)
    """Cadence of train/loss events (each the mean since the last; a run's final one is that of the
    last ten updates) and of the heartbeat."""


@dataclass(kw_only=True, slots=True)
class SweepConfig:
    """What a sweep is called; a name groups runs and changes none of them."""

    name: str | None = knob(None, scientific=False)
    """None: made of what varies."""
    arm: str | None = knob(None, scientific=False)
    """Name of the run's setting in a sweep file that names its arms; with -m, those to take."""
    from_search: str | None = knob(None, scientific=False)
    """A search with arms, of which each arm of a sweep takes its best settings (with -m)."""
    max_gpu_hours: float | None = knob(None, gt=0, scientific=False)
    """A sweep whose runs are estimated to take more is refused before anything is queued."""


@dataclass(kw_only=True, slots=True)
class ResourcesConfig:
    """What a run needs of a scheduler where that is not what its launcher asks for."""

    nodes: int | None = knob(None, ge=1, scientific=False)
    """Machines of one run."""
    tasks_per_node: int | None = knob(None, ge=1, scientific=False)
    """Processes of a run on each node; None: one per GPU."""
    gpus_per_node: int | None = knob(None, ge=0, scientific=False)
    """0: the CPU."""
    cpus_per_task: int | None = knob(None, ge=1, scientific=False)
    """Cores of each process."""
    mem_gb: float | None = knob(None, gt=0, scientific=False)
    """Memory of each node."""
    time: str | None = knob(None, scientific=False)
    """Limit of one job in SLURM's notation: minutes, H:MM:SS, D-H."""


@dataclass(kw_only=True, slots=True)
class RunConfig:
    """One arm at one seed: everything that a run needs, frozen as RUN_DIR/config.json."""

    experiment: str = knob("custom", scientific=False)
    """Label of the experiment file."""
    output_dir: str = knob("outputs", scientific=False)
    """Everything goes there."""
    seed: int = knob(0, ge=0, lt=2**31)
    """Initialisation, dropout, restarts and the order of grammar and shuffled text. The arm is the
    setting without it."""
    method: str = knob("relora", choices=METHODS)
    """How the model is parametrised and updated."""
    model: ModelConfig
    relora: ReLoRAConfig = field(default_factory=ReLoRAConfig)
    galore: GaLoreConfig = field(default_factory=GaLoreConfig)
    fira: FiraConfig = field(default_factory=FiraConfig)
    apollo: ApolloConfig = field(default_factory=ApolloConfig)
    switchlora: SwitchLoRAConfig = field(default_factory=SwitchLoRAConfig)
    sparse: SparseConfig = field(default_factory=SparseConfig)
    sltrain: SLTrainConfig = field(default_factory=SLTrainConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    train: TrainConfig
    muon: MuonConfig = field(default_factory=MuonConfig)
    data: DataConfig
    eval: EvalConfig = field(default_factory=EvalConfig)
    dynamics: DynamicsConfig = field(default_factory=DynamicsConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    runtime: RuntimeConfig = field(default_factory=RuntimeConfig)
    resources: ResourcesConfig = field(default_factory=ResourcesConfig)
    sweep: SweepConfig = field(default_factory=SweepConfig)


EVALUATED = "evaluated"
"""Method of a model that was not trained here, and its experiment where none is named."""


@dataclass(kw_only=True, slots=True)
class ForeignConfig:
    """Where a model that was not trained here comes from, and what it is."""

    source: str = knob(scientific=False)
    """Folder or hub name."""
    revision: str | None = knob(None, scientific=False)
    """Branch, tag or commit of the hub."""
    remote_code: bool = knob(False, scientific=False)
    """Whether code of its own ran."""
    architecture: str = knob(scientific=False, main=True)
    """Class of transformers, such as GPT2LMHeadModel."""
    parameters: int = knob(scientific=False, main=True)
    """Tied ones once."""
    start_id: int = knob()
    """Id that texts begin after."""
    fingerprint: str = knob()
    """Digest of weights, architecture and tokenizer; stands for the source."""


@dataclass(kw_only=True, slots=True)
class EvaluatedConfig(RunConfig):
    """What is frozen of a model that was not trained here (`foreign.py`); no one types it.

    Most of a run's knobs say nothing of it: see `concerns`.
    """

    foreign: ForeignConfig


def concerns(config: RunConfig, key: str) -> bool:
    """Whether the knob can say anything of the run: of a model from elsewhere few do."""
    own = ("foreign.", "eval.", "dynamics.kinds", "experiment", "output_dir", "tracking.")
    sizes = ("name", "d_model", "d_ff", "n_layers", "n_heads", "vocab_size", "max_seq_len")
    own += ("method", "data.seq_len", "runtime.", "seed", *(f"model.{name}" for name in sizes))
    return not isinstance(config, EvaluatedConfig) or key.startswith(own)


def method_config(config: RunConfig) -> MethodConfig:
    """The section of the run's method; of one without knobs, what any method does by default."""
    for f in fields(RunConfig):
        section = getattr(config, f.name)
        if config.method in _METHODS_OF.get(type(section), ()):
            return section
    return MethodConfig()


def applies(metadata: Any, config: RunConfig) -> bool:
    """Whether a knob with this metadata has any effect in `config`."""
    return ruled_out_by(metadata, config) is None


def ruled_out_by(metadata: Any, config: RunConfig) -> str | None:
    """The choice that leaves a knob with this metadata without effect, such as `method=lora`."""
    for scope, key, word in SCOPES:
        if scope in metadata and (value := get(config, key)) not in metadata[scope]:
            return f"{word}={value}"
    return None


def walk(section: Any, prefix: str = "") -> Iterator[tuple[str, dataclasses.Field[Any], Any]]:
    """(dotted key, field, value) of every leaf, depth first."""
    for key, f, value_of in _leaves(type(section)):
        yield f"{prefix}{key}", f, value_of(section)


@cache
def _leaves(section: type) -> list[tuple[str, dataclasses.Field[Any], Callable[[Any], Any]]]:
    """What `walk` gives of each section of this class: a sweep walks thousands of configs."""
    hints, leaves = get_type_hints(section), []
    for f in fields(section):
        if dataclasses.is_dataclass(kind := hints[f.name]):
            inner = _leaves(cast(type, kind))
            leaves += [(f"{f.name}.{k}", g, attrgetter(f"{f.name}.{k}")) for k, g, _ in inner]
        else:
            leaves.append((f.name, f, attrgetter(f.name)))
    return leaves


def get(config: RunConfig, key: str) -> Any:
    """The value at a dotted key."""
    value: Any = config
    for part in key.split("."):
        value = getattr(value, part)
    return value


def scaled(config: RunConfig, *, alpha_given: bool) -> RunConfig:
    """The config with `relora.alpha` as `relora.scale` has it, if that is set; ConfigError where
    an alpha that was given says otherwise."""
    relora = config.relora
    possible = relora.r > 0 and relora.scaling == "standard"
    if relora.scale is None or not (possible and 0 < relora.scale < math.inf):
        return config  # `validate` says what cannot be
    alpha = _alpha(relora)
    if alpha_given and relora.alpha != alpha and config.method in ADAPTERS:
        raise ConfigError(
            f"relora.alpha must be {alpha:g} with relora.scale={relora.scale:g} and relora.r="
            f"{relora.r}, got {relora.alpha:g}; leave one of relora.alpha and relora.scale out"
        )
    return dataclasses.replace(config, relora=dataclasses.replace(relora, alpha=alpha))


def _alpha(relora: ReLoRAConfig) -> float:
    """scale * r, of decimals as they are written: 0.1 * 3 is 0.3."""
    return float(Decimal(str(relora.scale)) * relora.r)


ALPHA = cast(float, next(f.default for f in fields(ReLoRAConfig) if f.name == "alpha"))
"""Where none is given."""


def linear_shapes(model: ModelConfig) -> dict[str, Matrix]:
    """(out, in) of every linear of the blocks, by the qualified name `model.Decoder` gives it."""
    head_dim = model.d_model // model.n_heads
    kv = model.n_kv_heads * head_dim
    d, ff = model.d_model, model.d_ff
    block = {
        "attention.q_proj": (d, d),
        "attention.k_proj": (kv, d),
        "attention.v_proj": (kv, d),
        "attention.o_proj": (d, d),
        "swiglu.w_0": (ff, d),
        "swiglu.w_1": (ff, d),
        "swiglu.w_2": (d, ff),
    }
    return {f"layers.{i}.{n}": s for i in range(model.n_layers) for n, s in block.items()}


def names_part(key: str, name: str, *, n_layers: int) -> bool:
    """Whether `key` (part of a name, or `last:n`) names the linear `name` (`layers.<i>....`)."""
    if key.startswith("last:") and key[5:].isdecimal() and len(key) < 20:
        return int(name.split(".")[1]) >= n_layers - int(key[5:])
    return key.lower() in name.lower()


def named_shapes(model: ModelConfig, keys: list[str]) -> dict[str, Matrix]:
    """Those of `linear_shapes` that one of the keys names."""
    return {
        name: shape
        for name, shape in linear_shapes(model).items()
        if any(names_part(key, name, n_layers=model.n_layers) for key in keys)
    }


def share_of_entries(share: float, shapes: dict[str, Matrix]) -> dict[str, int]:
    """How many entries of each matrix that share is, rounded down as published code does."""
    return {name: int(share * math.prod(shape)) for name, shape in shapes.items()}


def adapted_shapes(config: RunConfig) -> dict[str, Matrix]:
    """The linears with an adapter of `lora` or `relora`; none for other methods."""
    return config.relora.targets(config) if config.method in ADAPTERS else {}


def muon_shapes(config: RunConfig) -> dict[str, Shape]:
    """The parameters that Muon updates: every matrix of the blocks that is trained in some phase,
    adapters' included."""
    if config.train.optimizer != "muon":
        return {}
    method = method_config(config)
    others = method.replaced_linears(config) | (
        {} if method.has_phases(config) else method.frozen_linears(config)
    )
    linears = linear_shapes(config.model).items()
    own = {f"{name}.weight": shape for name, shape in linears if name not in others}
    return own | {name: s for name, s in method.added_parameters(config).items() if len(s) == 2}


def validate(config: RunConfig) -> None:
    """Raise ConfigError at the first value out of bounds or at odds with another."""
    for key, f, value in walk(config):
        _check_value(key, value, f.metadata)
    if not config.output_dir.strip():
        raise ConfigError(f"output_dir must name a folder, got {config.output_dir!r}")
    _check_model(config.model)
    method_config(config).check(config)
    _check_train(config)
    _check_data(config)
    _check_dynamics(config)


def _bounds(metadata: Any) -> str:
    words = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<"}
    return " and ".join(f"{w} {metadata[k]:g}" for k, w in words.items() if k in metadata)


def _clamp(value: float, metadata: Any) -> str:
    if "ge" in metadata and value < metadata["ge"]:
        return f"; nearest valid: {metadata['ge']:g}"
    if "le" in metadata and value > metadata["le"]:
        return f"; nearest valid: {metadata['le']:g}"
    return ""


def _check_value(key: str, value: Any, metadata: Any) -> None:
    if value is None:
        return
    if isinstance(value, str):
        _check_text(key, value)
    if choices := metadata.get("choices"):
        if value not in choices:
            raise ConfigError(
                f"{key} must be one of {', '.join(map(str, choices))}, got {value!r}."
                f"{nearest(value, choices)}"
            )
        return
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        outside = (
            not math.isfinite(value)
            or value < metadata.get("ge", -math.inf)
            or value > metadata.get("le", math.inf)
            or value <= metadata.get("gt", -math.inf)
            or value >= metadata.get("lt", math.inf)
        )
        if outside:
            expected = _bounds(metadata) or "finite"
            raise ConfigError(f"{key} must be {expected}, got {value}{_clamp(value, metadata)}")
        if isinstance(value, int) and value > LARGEST_INT:
            raise ConfigError(
                f"{key} must be <= {LARGEST_INT}, got {value}; nearest valid: {LARGEST_INT}"
            )


def _check_text(key: str, value: str) -> None:
    """Text that can be written to a file, and name one."""
    if "\0" in value or (not value.isascii() and value != value.encode(errors="ignore").decode()):
        raise ConfigError(f"{key} must be text in UTF-8 without zero bytes, got {value!r}")


def _check_model(model: ModelConfig) -> None:
    if model.d_model % (2 * model.n_heads):
        good = max(
            2 * model.n_heads, round(model.d_model / (2 * model.n_heads)) * 2 * model.n_heads
        )
        raise ConfigError(
            f"model.d_model must be a multiple of 2 * n_heads = {2 * model.n_heads} (RoPE rotates "
            f"pairs), got {model.d_model}; nearest valid: {good}"
        )
    if model.n_heads % model.n_kv_heads:
        divisors = [n for n in range(1, model.n_heads + 1) if model.n_heads % n == 0]
        good = min(divisors, key=lambda n: abs(n - model.n_kv_heads))
        raise ConfigError(
            f"model.n_kv_heads must divide model.n_heads={model.n_heads}, got {model.n_kv_heads}; "
            f"nearest valid: {good}"
        )


def _check_adapters(config: RunConfig) -> None:
    _check_names(config, "relora.target_modules")
    _check_names(config, "relora.full_rank_modules", some=False)
    adapted = adapted_shapes(config)
    if not adapted:
        raise ConfigError(
            f"relora.full_rank_modules must leave a target of {config.relora.target_modules} to "
            f"adapt, got {config.relora.full_rank_modules}; for none, method=full_rank"
        )
    _check_phases(config)
    _check_inert(config)
    _check_rank(config, "relora.r", adapted)
    _check_scale(config.relora)
    if config.relora.r == 0:
        _check_frozen(config)


def _check_inert(config: RunConfig) -> None:
    """With A = B = 0 neither ever has a gradient; here nothing would draw an A."""
    relora = config.relora
    drawn = relora.r == 0 or relora.warm_start_steps or relora.full_rank_steps
    if config.method == "lora" and relora.init_a == "zero" and not drawn:
        raise ConfigError(
            "relora.init_a must be kaiming with method=lora (A and B would both stay 0), got "
            "'zero'; nearest valid: kaiming, or relora.r=0 for a frozen body"
        )


def _check_scale(relora: ReLoRAConfig) -> None:
    if relora.scale is None or not relora.r:
        return
    if relora.scaling != "standard":
        raise ConfigError(
            f"relora.scale must be null with relora.scaling={relora.scaling} (it is alpha / r), "
            f"got {relora.scale:g}"
        )
    if relora.alpha != _alpha(relora):
        raise ConfigError(
            f"relora.alpha must be scale * r = {_alpha(relora):g}, got {relora.alpha:g}; leave "
            "one of relora.alpha and relora.scale out"
        )


def _check_frozen(config: RunConfig) -> None:
    """Without adapters there is nothing to restart, and no phase to take turns with."""
    if config.method == "relora":
        raise ConfigError(
            "relora.r must be >= 1 with method=relora, got 0; nearest valid: 1, or method=lora for "
            "a frozen body"
        )
    for key in ("relora.warm_start_steps", "relora.full_rank_steps"):
        if get(config, key):
            raise ConfigError(f"{key} must be 0 with relora.r=0, got {get(config, key)}")


def _check_names(config: RunConfig, key: str, *, some: bool = True) -> None:
    """Every entry of a list of modules names a linear; with `some` there is one."""
    linears = linear_shapes(config.model)
    parts = sorted({part for name in linears for part in name.split(".") if not part.isdigit()})
    entries = get(config, key)
    if some and not entries:
        raise ConfigError(f"{key} must name at least one of {', '.join(parts)}, got []")
    layers = config.model.n_layers
    for entry in entries:
        if not isinstance(entry, str):
            raise ConfigError(f"{key} must be a list of text, got {entry!r} in it")
        if not entry or not any(names_part(entry, name, n_layers=layers) for name in linears):
            raise ConfigError(
                f"{key} must name parts of {', '.join(parts)}, got {entry!r}."
                f"{nearest(entry, parts)}"
            )


def _check_rank(config: RunConfig, key: str, targets: dict[str, Matrix], *, least: int = 1) -> None:
    """The rank fits the smallest target."""
    name, shape = min(targets.items(), key=lambda item: min(item[1]))
    if get(config, key) > min(shape):
        raise ConfigError(
            f"{key} must be in [{least}, {min(shape)}] (the smaller side of {name}, "
            f"{shape[0]} x {shape[1]}, in model={config.model.name}), got {get(config, key)}; "
            f"nearest valid: {min(shape)}"
        )


def _check_share(key: str, share: float, targets: dict[str, Matrix]) -> None:
    """The share is at least an entry of the smallest target."""
    name, shape = min(targets.items(), key=lambda item: math.prod(item[1]))
    least = math.ceil(1e9 / math.prod(shape)) / 1e9
    if share < least:
        raise ConfigError(
            f"{key} must be >= {least} (one entry of {name}), got {share:g}; nearest valid: {least}"
        )


def _check_switches(config: RunConfig) -> None:
    """Vectors to spare, and time for a counterpart to thaw before it is switched itself."""
    switch, shapes = config.switchlora, config.switchlora.targets(config)
    _check_rank(config, "switchlora.r", shapes, least=2)
    if switch.interval is None:
        return
    most = max(min(shape) for shape in shapes.values()) - 1
    if switch.r > most:
        raise ConfigError(
            f"switchlora.r must be <= {most} (each of {switch.target_modules} has {most + 1} "
            f"vectors, so that none is left to switch), got {switch.r}; nearest valid: {most}"
        )
    least = 2 * switch.freeze_steps
    if switch.interval < least:
        raise ConfigError(
            f"switchlora.interval must be >= 2 * switchlora.freeze_steps = {least} (half of the "
            f"vectors may be frozen at a time), got {switch.interval}; nearest valid: {least}"
        )


def _check_rank_changes(config: RunConfig) -> None:
    relora = config.relora
    steps = [entry[0] for entry in relora.rank_schedule if len(entry) == 2]
    if (
        len(steps) < len(relora.rank_schedule)
        or steps != sorted(set(steps))
        or min(steps, default=0) < 0
    ):
        raise ConfigError(
            "relora.rank_schedule must be [[step, rank], ...] with rising steps, got "
            f"{relora.rank_schedule}"
        )
    name, shape = min(adapted_shapes(config).items(), key=lambda item: min(item[1]))
    for _, rank in relora.rank_schedule:
        if not 1 <= rank <= min(shape):
            raise ConfigError(
                f"relora.rank_schedule must hold ranks in [1, {min(shape)}] (the smaller side of "
                f"{name}), got {rank}; nearest valid: {max(1, min(rank, min(shape)))}"
            )
    if relora.after_merge == "restore" and (relora.rank_schedule or relora.adaptive_rank_energy):
        raise ConfigError(
            "relora.after_merge must be reinit where ranks change (the old A and B cannot come "
            "back in another shape), got 'restore'"
        )


def _check_phases(config: RunConfig) -> None:
    relora = config.relora
    if relora.warm_start_steps >= config.train.steps:
        raise ConfigError(
            f"relora.warm_start_steps must be < train.steps={config.train.steps}, got "
            f"{relora.warm_start_steps}; nearest valid: {config.train.steps - 1}"
        )
    if bool(relora.full_rank_steps) != bool(relora.low_rank_steps):
        raise ConfigError(
            f"relora.full_rank_steps and relora.low_rank_steps must both be 0 or both be > 0, got "
            f"{relora.full_rank_steps} and {relora.low_rank_steps}"
        )


def _check_restarts(config: RunConfig) -> None:
    _check_rank_changes(config)
    relora, schedule = config.relora, config.schedule
    if config.train.steps > MOST_RESTARTS * relora.reset_frequency:
        least = -(-config.train.steps // MOST_RESTARTS)
        raise ConfigError(
            f"relora.reset_frequency must be >= {least} with train.steps={config.train.steps} "
            f"(at most {MOST_RESTARTS} restarts), got {relora.reset_frequency}; nearest valid: "
            f"{least}"
        )
    adapted = len(adapted_shapes(config))
    if relora.restart_groups > adapted:
        raise ConfigError(
            f"relora.restart_groups must be <= {adapted} (the adapted linears), got "
            f"{relora.restart_groups}; nearest valid: {adapted}"
        )
    if relora.restart_warmup_steps > relora.reset_frequency:
        raise ConfigError(
            f"relora.restart_warmup_steps must be <= relora.reset_frequency="
            f"{relora.reset_frequency}, got {relora.restart_warmup_steps}; nearest valid: "
            f"{relora.reset_frequency}"
        )
    first = max(relora.first_restart or 0, relora.reset_frequency)
    if schedule.warmup_steps > first:
        key = "first_restart" if first > relora.reset_frequency else "reset_frequency"
        raise ConfigError(
            f"schedule.warmup_steps must be <= relora.{key}={first} (the warm-up ends before the "
            f"first restart), got {schedule.warmup_steps}; nearest valid: {first}"
        )


ONLY_GPU = {
    "runtime.device": ("cuda", "auto or cpu"),
    "train.precision": ("tf32", "fp32 or bf16"),
    "runtime.head": ("cce", "chunked"),
}
"""Key -> its value that a CPU cannot have, and those that it can."""


def needs_gpu(config: RunConfig) -> str | None:
    """The setting without which the run could be a CPU's; None: it can be."""
    for key, (value, _) in ONLY_GPU.items():
        if get(config, key) == value:
            return f"{key}={value}"
    return None


def lacks_gpu(setting: str) -> ConfigError:
    """The error where there is no GPU, for a setting as of `needs_gpu`."""
    key, _, value = setting.partition("=")
    return ConfigError(f"{key} must be {ONLY_GPU[key][1]} here (no GPU found), got {value!r}")


def _check_train(config: RunConfig) -> None:
    train = config.train
    total = config.schedule.total_steps or train.steps
    if config.schedule.warmup_steps > total:
        raise ConfigError(
            f"schedule.warmup_steps must be <= the schedule's {total} steps, got "
            f"{config.schedule.warmup_steps}; nearest valid: {total}"
        )
    _check_optimizer(config)
    _check_head(config)
    if train.precision == "tf32" and config.runtime.device == "cpu":
        raise ConfigError(
            "train.precision must be fp32 or bf16 with runtime.device=cpu (tf32 is a GPU's), got "
            "'tf32'; nearest valid: fp32"
        )
    micro = train.micro_batch_size
    if micro is not None and train.batch_size % micro:
        good = max(n for n in divisors(train.batch_size) if n <= micro)
        raise ConfigError(
            f"train.micro_batch_size must divide train.batch_size={train.batch_size}, got {micro}; "
            f"nearest valid: {good}"
        )


def divisors(number: int) -> list[int]:
    """Of a whole number >= 1, ascending."""
    small = [n for n in range(1, math.isqrt(number) + 1) if number % n == 0]
    return sorted({*small, *(number // n for n in small)})


def _check_head(config: RunConfig) -> None:
    runtime, bf16 = config.runtime, config.train.precision == "bf16"
    against = {
        "runtime.device=cpu": runtime.device == "cpu",
        f"train.precision={config.train.precision}": not bf16,
        "runtime.deterministic=true": runtime.deterministic,
    }
    if runtime.head == "cce" and (reason := next((k for k in against if against[k]), None)):
        raise ConfigError(
            f"runtime.head must be chunked with {reason} (cce computes in bf16 on a GPU, and adds "
            "up in any order), got 'cce'"
        )


def _check_optimizer(config: RunConfig) -> None:
    if config.train.optimizer != "muon":
        return
    if config.method not in WITH_MUON:
        raise ConfigError(
            f"train.optimizer must be adamw with method={config.method} (it has an update rule of "
            f"its own for the matrices that Muon would update), got 'muon'"
        )
    if not muon_shapes(config):
        none = "sltrain.r=0 and every linear sparse"
        if config.method in ADAPTERS:
            none = "relora.r=0 and every linear frozen"
        raise ConfigError(
            f"train.optimizer must be adamw with {none} (no matrix is left to Muon), got 'muon'"
        )


def _check_data(config: RunConfig) -> None:
    data = config.data
    if data.seq_len > config.model.max_seq_len:
        raise ConfigError(
            f"data.seq_len must be <= model.max_seq_len={config.model.max_seq_len}, got "
            f"{data.seq_len}; nearest valid: {config.model.max_seq_len}"
        )
    if data.kind != "grammar" and not data.path:
        raise ConfigError(f"data.path must name a folder or file for data={data.kind}, got nothing")
    if data.kind == "text" and not data.tokenizer:
        raise ConfigError("data.tokenizer must name a tokenizer for data=text, got nothing")


def _check_dynamics(config: RunConfig) -> None:
    for key, choices in (("dynamics.what", DYNAMICS), ("dynamics.kinds", DYNAMICS_KINDS)):
        entries = get(config, key)
        if not entries:
            raise ConfigError(f"{key} must name at least one of {', '.join(choices)}, got []")
        for entry in entries:
            if entry not in choices:
                raise ConfigError(
                    f"{key} must name some of {', '.join(choices)}, got {entry!r}."
                    f"{nearest(entry, choices)}"
                )
