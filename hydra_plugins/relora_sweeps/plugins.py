"""Hydra's sweepers and launchers, which call `sweeps`, and their options."""

# No `from __future__ import annotations`: Hydra 1.3 runs this module before it is in `sys.modules`,
# where dataclasses look up annotations.

import dataclasses
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import TYPE_CHECKING, Any

from hydra._internal.core_plugins import basic_launcher, basic_sweeper  # noqa: F401
from hydra.core.override_parser.types import Override
from hydra.core.plugins import Plugins
from hydra.core.utils import JobReturn
from hydra.plugins.launcher import Launcher
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf, open_dict, read_write

from experiments import references, schema
from experiments.environment import RUN, is_installed
from hydra_plugins.relora_sweeps._axes import (
    arms_taken,
    as_list,
    dimension,
    expand_arms,
    lines_of,
    parse,
)
from hydra_plugins.relora_sweeps._compose import Composer
from hydra_plugins.relora_sweeps._guards import install_guards
from relora_core import shell
from relora_core.config import ConfigError, RunConfig, nearest
from sweeps.planning.grid import points_from
from sweeps.search.config import SearchConfig, check_arms, check_overrides, normalise
from sweeps.search.recipe import quoted
from sweeps.search.space import Choice, Dimension
from sweeps.slurm.options import SlurmOptions

if TYPE_CHECKING:
    from sweeps.planning.provenance import Tuned
    from sweeps.search.launch import Draft

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
        self.config = None

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
        search = self.config.sweep.from_search if self.config else None
        if self.config is None or search is None:
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
    """Parses the space, composes each choice of groups, and gives both to `sweeps.search`."""

    def __init__(self, plan_only: bool = False, measure: bool = False) -> None:
        self.plan_only, self.measure = plan_only, measure

    def setup(
        self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig
    ) -> None:
        self.loader = hydra_context.config_loader
        self.composer = Composer(self.loader, config)
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
        given = parse([as_list(text) for text in arguments], loader=self.loader)
        taken = [o for o in given if o.key_or_group == "sweep.arm"]
        given = [o for o in given if o not in taken]
        for override in given:
            if override.key_or_group in ("search", "sweep") and override.is_sweep_override():
                raise ConfigError(
                    f"{override.key_or_group} must be one option with hydra/sweeper=search, got "
                    f"{override.input_line!r}"
                )
        fixed = {o.key_or_group: str(o.input_line) for o in given if not o.is_sweep_override()}
        first = self.composer.compose(list(fixed.values()))
        arms = check_arms(OmegaConf.to_container(first.search.arms) or {})
        if first.sweep.from_search is not None:
            raise ConfigError(f"{KEY} must be null in a search, got {first.sweep.from_search!r}")
        for key in ("space", "when", "common"):
            if not OmegaConf.is_dict(first.search[key]):
                raise ConfigError(
                    f"search.{key} must be {{key: value, ...}}, got {first.search[key]!r}"
                )
        common = self._runs(lines_of(self._common(first), of="search.common"), of="search.common")
        self.composer.launchers.clear()  # `first` is not a point
        if arms:
            names = arms_taken(taken, arms=arms, loader=self.loader)
            drafts = [
                self._arm(name, arms[name], first=first, common=common, given=given)
                for name in names
            ]
        else:
            drafts = [self._draft(first, [*common, *given, *taken])]
        code = run_search(
            drafts,
            name=self.name,
            launcher=self._launcher(),
            command=_command(),
            plan_only=self.plan_only,
            measure=self.measure,
        )
        if code:
            raise SystemExit(code)

    def _common(self, first: DictConfig) -> dict[str, Any]:
        """`search.common`, in which references are those of the runs."""
        written, resolved = (
            OmegaConf.to_container(first.search.common, resolve=resolve)
            for resolve in (False, True)
        )
        return references.kept(written, resolved)

    def _launcher(self) -> Any:
        """The launcher of `sweeps`, once all points are composed."""
        assert isinstance(self.launcher, OurLauncher)  # sweep() allows no other
        return self.launcher.for_points(self.composer).make()

    def _runs(self, overrides: list[str], *, of: str) -> list[Override]:
        """Overrides in a file, parsed; ConfigError if one does not set what runs do."""
        parsed = parse(overrides, loader=self.loader)
        for override in parsed:
            if override.key_or_group.split(".")[0] in ("search", "sweep", "hydra"):
                raise ConfigError(f"{of} must set what runs do, got {override.input_line!r}")
        return parsed

    def _arm(
        self,
        name: str,
        overrides: list[str],
        *,
        first: DictConfig,
        common: list[Override],
        given: list[Override],
    ) -> "Draft":
        """The draft of an arm: its own overrides win over those that are common to all and over
        the file's space, the command line's over all."""
        own = self._runs([*overrides], of=f"search.arms.{name}")
        own += parse([f"sweep.arm={name}"], loader=self.loader)
        try:
            one = self._draft(first, [*common, *own, *given], start=True)
        except ConfigError as error:
            raise ConfigError(f"arm {name}: {error}") from None
        if one.search.learn_from:
            raise ConfigError(
                "search.learn_from must be empty with search.arms, as arms are to be tuned alike, "
                f"got {', '.join(one.search.learn_from)}"
            )
        if len(one.search.objectives) > 1:
            raise ConfigError(
                "search.objectives must be one with search.arms, each of which is to have a best, "
                f"got {len(one.search.objectives)}"
            )
        one.search.enqueue = [
            {key: value for key, value in entry.items() if key in one.space}
            for entry in one.search.enqueue
        ]
        one.search.enqueue = [entry for entry in one.search.enqueue if entry]
        one.arm = name
        return one

    def _draft(
        self, first: DictConfig, overrides: list[Override], *, start: bool = False
    ) -> "Draft":
        """The draft of one study, where later overrides win; with `start` its bases have the first
        of each choice."""
        from sweeps.search.launch import Draft

        by_key = {o.key_or_group: o for o in overrides}
        given = list(by_key.values())
        fixed = {key: str(o.input_line) for key, o in by_key.items() if not o.is_sweep_override()}
        space = self._space(first.search.space, given)
        if "relora.scale" in {*space, *fixed} and "relora.alpha" in {*space, *fixed}:
            raise ConfigError(
                "relora.alpha must be left out where relora.scale is given: it follows"
            )
        firsts = {
            key: f"{key}={quoted(one.values[0])}"
            for key, one in space.items()
            if start
            and isinstance(one, Choice)
            and one.values
            and not self.composer.is_group(key)
            and key not in first.search["when"]  # where it is not drawn it is the config's own
        }
        bases, follows = self._bases(space, [*fixed.values(), *firsts.values()])
        seeds = {config.seed for _, config in bases}
        seed = seeds.pop() if len(seeds) == 1 else first.seed
        search = self._search(first, space, fixed, seed=seed)
        return Draft(search=search, space=space, bases=bases, follows=follows)

    def _search(
        self, composed: DictConfig, space: dict[str, Dimension], fixed: dict[str, str], *, seed: int
    ) -> SearchConfig:
        """`search.*`, checked, without values for keys that the command line fixes."""
        given: Any = OmegaConf.to_container(composed.search, resolve=True)
        given["space"] = {key: one.text() for key, one in space.items()}
        given["when"] = {key: text for key, text in given["when"].items() if key not in fixed}
        given |= {"arms": {}, "common": {}}
        search = normalise(given, seed=seed)
        entries = [{k: v for k, v in one.items() if k not in fixed} for one in search.enqueue]
        search.enqueue = [entry for entry in entries if entry]
        return search

    def _bases(
        self, space: dict[str, Dimension], fixed: list[str]
    ) -> tuple[list[tuple[dict[str, str], RunConfig]], list[dict[str, Any]]]:
        """Of each combination of the groups that are searched the choices and the config, and what
        refers to a key of the space or the seed."""
        groups = {key: one.values for key, one in space.items() if isinstance(one, Choice)}
        groups = {key: values for key, values in groups.items() if self.composer.is_group(key)}
        bases, follows = [], []
        for options in product(*groups.values()):
            choices = dict(zip(groups, map(str, options), strict=True))
            overrides = [*fixed, *(f"{key}={option}" for key, option in choices.items())]
            config = self.composer.compose(overrides)
            bases.append((choices, schema.to_run_config(config, overrides=overrides)))
            follows.append(references.following(references.read(config), [*space, "seed"]))
        return bases, follows

    def _space(self, texts: Any, given: list[Override]) -> dict[str, Dimension]:
        """The space of the file and the command line, without keys that the latter fixes."""
        lines = lines_of(texts, of="search.space")
        space = {o.key_or_group: o for o in parse(lines, loader=self.loader)}
        for override in given:
            space.pop(override.key_or_group, None)
            if override.is_sweep_override():
                space[override.key_or_group] = override
        return {key: dimension(override) for key, override in space.items()}


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
