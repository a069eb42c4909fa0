"""Hydra's sweepers and launchers, which call `sweeps`, and their options."""

# No `from __future__ import annotations`: Hydra 1.3 runs this module before it is in `sys.modules`,
# where dataclasses look up annotations.

import dataclasses
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from hydra._internal.core_plugins import basic_launcher, basic_sweeper  # noqa: F401
from hydra.core.plugins import Plugins
from hydra.core.utils import JobReturn
from hydra.plugins.launcher import Launcher
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf, open_dict, read_write

from experiments import references, schema
from experiments.environment import RUN, is_installed
from experiments.labels import quoted
from hydra_plugins.relora_sweeps._axes import arms_taken, expand_arms, lines_of, parse
from hydra_plugins.relora_sweeps._compose import Composer
from hydra_plugins.relora_sweeps._drafts import make_drafts
from hydra_plugins.relora_sweeps._guards import install_guards
from relora_core import shell
from relora_core.config import ConfigError, RunConfig, nearest
from sweeps.planning.grid import points_from
from sweeps.search.config import SearchConfig, check_overrides
from sweeps.slurm.options import SlurmOptions

if TYPE_CHECKING:
    from sweeps.planning.provenance import Tuned

KEY, TUNED_AS, NOTHING = "sweep.from_search", "sweep.tuned_as", "none"
ALPHA_OR_SCALE = {"relora.alpha", "relora.scale"}
"""One setting, spelt in two ways."""


@dataclass
class GridConf:
    """`hydra/sweeper=relora_grid`: all points of a grid, planned together."""

    _target_: str = "hydra_plugins.relora_sweeps.plugins.GridSweeper"
    params: dict[str, Any] | None = field(default_factory=dict)
    """Axes of a sweep file: key -> values as on the command line, where they can be overridden."""
    arms: dict[str, Any] | None = field(default_factory=dict)
    """Settings of several keys: name -> overrides, crossed with all axes. `sweep.arm=a,b` selects
    some. The command line overrides arms, and arms override `params`. `sweep.from_search` gives
    each the best of a search's arm of the same name, or of the arm that `sweep.tuned_as=NAME` among
    its overrides names; `none`: nothing."""
    plan_only: bool = False
    """Show what would be done and what it costs; do nothing (`run.py --plan`)."""
    measure: bool = False
    """Time some steps of each shape whose speed is not known (`run.py --plan --measure`)."""


@dataclass
class SearchConf:
    """`hydra/sweeper=search`: the results so far decide what is tried next (`search=...`)."""

    _target_: str = "hydra_plugins.relora_sweeps.plugins.SearchSweeper"
    plan_only: bool = False
    """Show the space, what is left to do and what it costs; do nothing (`run.py --plan`)."""
    measure: bool = False
    """Time some steps of each shape whose speed is not known (`run.py --plan --measure`)."""


@dataclass
class LocalConf:
    """`hydra/launcher=local`: worker processes on this machine."""

    _target_: str = "hydra_plugins.relora_sweeps.plugins.LocalLauncher"
    max_parallel: int | None = None
    """Runs at a time; null: one per GPU, or per core where there is none."""


@dataclass(kw_only=True)
class SlurmConf(SlurmOptions):
    """`hydra/launcher=slurm`: job arrays; the command returns once they are submitted."""

    _target_: str = "hydra_plugins.relora_sweeps.plugins.SlurmLauncher"


install_guards()


def _register() -> None:
    """Register the options of `hydra/sweeper`, `hydra/launcher` and `search`.

    Hydra's own are imported above, so that `basic` is replaced here.
    """
    nodes = {
        # Hydra's own config chooses `basic`. If conf/config.yaml chose ours instead, no other file
        # could override that, and Hydra would not say so.
        "hydra/sweeper": {"basic": GridConf, "relora_grid": GridConf, "search": SearchConf},
        "hydra/launcher": {"basic": LocalConf, "local": LocalConf, "slurm": SlurmConf},
    }
    for group, options in nodes.items():
        for name, node in options.items():
            schema.store(group=group, name=name, node=node, provider="relora_sweeps")
    schema.store(
        name="search_schema", node=_search_node(), package="search", provider="relora_sweeps"
    )


def _search_node() -> DictConfig:
    """Keys and defaults of SearchConfig, which checks the values; mappings take any key."""
    named = {key: {"name": getattr(SearchConfig(), key)} for key in ("sampler", "pruner")}
    node = OmegaConf.create(dataclasses.asdict(SearchConfig()) | named)
    for key in ("sampler", "pruner", "space", "when", "arms", "common"):
        OmegaConf.set_struct(node[key], False)
    return node


_register()


class GridSweeper(Sweeper):
    """Expands the axes and gives all points to the launcher at once."""

    def __init__(
        self,
        params: dict[str, Any] | None = None,
        arms: dict[str, Any] | None = None,
        plan_only: bool = False,
        measure: bool = False,
    ) -> None:
        self.params, self.arms, self.plan_only = params or {}, arms or {}, plan_only
        self.measure = measure

    def setup(
        self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig
    ) -> None:
        self.loader, self.config = hydra_context.config_loader, config
        written: Any = OmegaConf.to_container(config.hydra.sweeper, resolve=False)
        self.params = references.kept(written.get("params") or {}, self.params)
        self.arms = references.kept(written.get("arms") or {}, self.arms)
        self.launcher = Plugins.instance().instantiate_launcher(
            hydra_context=hydra_context, task_function=task_function, config=config
        )

    def sweep(self, arguments: list[str]) -> None:
        shell.require_one_process("a sweep (-m)")
        _check_measure(self.measure, plan_only=self.plan_only)
        texts = lines_of(self.params, of="hydra.sweeper.params")
        if not isinstance(self.launcher, OurLauncher):
            raise ConfigError(
                "hydra/launcher must be local or slurm with hydra/sweeper=relora_grid"
            )
        self.launcher.plan_only, self.launcher.measure = self.plan_only, self.measure
        arms = {
            name: check_overrides(f"hydra.sweeper.arms.{name}", overrides)
            for name, overrides in self.arms.items()
        }
        sources = {name: _tuned_as(name, lines) for name, lines in arms.items()}
        self.launcher.tuned = tuned = self._tuned(arms, sources, arguments, texts=texts)
        taken = {
            name: [f"{key}={quoted(value)}" for key, value in one.values.items()]
            for name, one in tuned.items()
        }
        cells = expand_arms(texts, arms=arms, arguments=arguments, loader=self.loader, tuned=taken)
        self.launcher.launch(cells, initial_job_idx=0)

    def _tuned(
        self,
        arms: dict[str, list[str]],
        sources: dict[str, str],
        arguments: list[str],
        *,
        texts: list[str],
    ) -> "dict[str, Tuned]":
        """What each arm takes from the search that `sweep.from_search` names; `texts` are `params`.

        The search overrides an arm's own line, which gives defaults; but not if the arm takes the
        settings of another one, since its line then says how it differs from that. Lines lose what
        is taken.
        """
        given = parse(arguments, loader=self.loader)
        if any(o.key_or_group == KEY and o.is_sweep_override() for o in given):
            raise ConfigError(f"{KEY} must be one search, as it decides what the points are")
        assert self.config is not None  # setup() has set it
        search = self.config.sweep.from_search
        if search is None:
            return {}
        if not arms:
            raise ConfigError(f"{KEY} must be null for a sweep without arms, got {search!r}")
        from sweeps.search.tuned import read_tuned  # a sweep without a search needs no Optuna

        every = [*parse(texts, loader=self.loader), *given]
        wanted = [o for o in every if o.key_or_group == "sweep.arm"]
        names = arms_taken(wanted, arms=arms, loader=self.loader)
        mapped = {name: sources[name] for name in names if sources[name] != NOTHING}
        tuned = read_tuned(self.config.output_dir, search, mapped)
        for name, one in tuned.items():
            own = {o.key_or_group: str(o.input_line) for o in parse(arms[name], loader=self.loader)}
            stays = {o.key_or_group for o in given} | (set(own) if one.borrowed else set())
            stays |= ALPHA_OR_SCALE if stays & ALPHA_OR_SCALE else set()
            one.values = {key: v for key, v in one.values.items() if key not in stays}
            arms[name][:] = [text for key, text in own.items() if key not in one.values]
        return tuned


def _check_measure(measure: bool, *, plan_only: bool) -> None:
    if measure and not plan_only:
        raise ConfigError("--measure must come with --plan")


def _tuned_as(name: str, lines: list[str]) -> str:
    """The arm of a search with the settings of this arm; its `sweep.tuned_as` is taken out."""
    source = name
    for text in [text for text in lines if text.startswith(f"{TUNED_AS}=")]:
        source = text.partition("=")[2].strip()
        lines.remove(text)
    return source


class SearchSweeper(Sweeper):
    """Gives the studies that the command line asks for to `sweeps.search`."""

    def __init__(self, plan_only: bool = False, measure: bool = False) -> None:
        self.plan_only, self.measure = plan_only, measure

    def setup(
        self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig
    ) -> None:
        self.composer = Composer(hydra_context.config_loader, config)
        self.name = str(config.hydra.runtime.choices.search)
        self.launcher = Plugins.instance().instantiate_launcher(
            hydra_context=hydra_context, task_function=task_function, config=config
        )

    def sweep(self, arguments: list[str]) -> None:
        from sweeps.search.launch import run_search  # a single run need not wait for it

        shell.require_one_process("a search (-m)")
        _check_measure(self.measure, plan_only=self.plan_only)
        if not isinstance(self.launcher, OurLauncher):
            raise ConfigError("hydra/launcher must be local or slurm with hydra/sweeper=search")
        drafts = make_drafts(arguments, composer=self.composer)
        code = run_search(
            drafts,
            name=self.name,
            launcher=self.launcher.for_points(self.composer).make(),
            command=_command(),
            plan_only=self.plan_only,
            measure=self.measure,
        )
        if code:
            raise SystemExit(code)


class OurLauncher(Launcher):
    """Composes all points and gives them to `sweeps`; exits with a code if something failed."""

    plan_only = measure = False
    tuned: "dict[str, Tuned] | None" = None
    """What arms have from a search."""

    def setup(
        self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig
    ) -> None:
        self.context, self.task_function, self.config = hydra_context, task_function, config
        self.loader = hydra_context.config_loader

    def for_points(self, composer: Composer) -> "OurLauncher":
        """The launcher that the composed points ask for, which may be another one."""
        node = composer.launcher()
        if node == self.config.hydra.launcher:
            return self
        config = self.config.copy()
        with open_dict(config), read_write(config.hydra):
            config.hydra.launcher = node
        launcher = Plugins.instance().instantiate_launcher(
            hydra_context=self.context, task_function=self.task_function, config=config
        )
        assert isinstance(launcher, OurLauncher)  # refuse_code allows no other
        return launcher

    def make(self) -> Any:
        """The launcher of `sweeps` with these options."""
        raise NotImplementedError

    def launch(
        self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int
    ) -> Sequence[JobReturn]:
        from sweeps.launch import run_sweep  # a single run need not wait for it

        composer = Composer(self.loader, self.config)
        configs = composer.all(job_overrides)
        self._check_search(configs)
        points = list(zip(points_from(job_overrides), configs, strict=True))
        launcher = self.for_points(composer).make()
        code = run_sweep(
            points,
            launcher=launcher,
            command=_command(),
            plan_only=self.plan_only,
            measure=self.measure,
            tuned=self.tuned,
        )
        if code:
            raise SystemExit(code)
        return []

    def _check_search(self, configs: Sequence[RunConfig]) -> None:
        """ConfigError if a point names another search, or another place for it, than was read."""
        known = self.config.sweep.from_search
        for config in configs:
            if config.sweep.from_search != known:
                raise ConfigError(
                    f"{KEY} must come from the command line or the top of the sweep's file, as it "
                    f"decides what the points are, got {config.sweep.from_search!r} in a point"
                )
            if known is not None and config.output_dir != self.config.output_dir:
                raise ConfigError(
                    f"output_dir must come from there, too, with {KEY}: the search was read in "
                    f"{self.config.output_dir!r}, got {config.output_dir!r} in a point"
                )


class LocalLauncher(OurLauncher):
    """Worker processes on this machine."""

    def __init__(self, max_parallel: int | None = None, **added: Any) -> None:
        self.max_parallel, self.added = max_parallel, added

    def make(self) -> Any:
        from sweeps.local.launcher import LocalLauncher as Local  # likewise

        _refuse_added(self.added, keys=["max_parallel"])
        return Local(max_parallel=self.max_parallel)


class SlurmLauncher(OurLauncher):
    """SLURM job arrays."""

    def __init__(self, **options: Any) -> None:
        self.values: dict[str, Any] = {
            key: OmegaConf.to_container(value) if OmegaConf.is_config(value) else value
            for key, value in options.items()
        }

    def make(self) -> Any:
        from sweeps.slurm.launcher import SlurmLauncher as Slurm  # likewise

        _refuse_added(self.values, keys=[f.name for f in dataclasses.fields(SlurmOptions)])
        return Slurm(options=SlurmOptions(**self.values))


def _refuse_added(values: Mapping[str, Any], *, keys: list[str]) -> None:
    """ConfigError for a key that was added with a plus: options of sbatch go to `extra`."""
    for key in values:
        if key in keys:
            continue
        line = f"hydra.launcher.{key} is not a known key.{nearest(key, keys)}"
        if "extra" in keys:
            line += f" +hydra.launcher.extra.{key}=... hands any option to sbatch."
        raise ConfigError(line)


def _command() -> str:
    first = RUN if is_installed() else shlex.join(["python", sys.argv[0]])
    return f"{first} {shlex.join(sys.argv[1:])}"
