"""The porch: Hydra's Sweeper and Launcher as thin doors into `sweeps`.

Hydra imports this module at every start, so everything heavy is imported where it is used. No
`from __future__ import annotations` here: Hydra executes the module before it is in `sys.modules`,
where dataclasses would look its annotations up.
"""

import dataclasses
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, field
from decimal import Decimal
from functools import cache, partial
from itertools import product, zip_longest
from pathlib import Path
from typing import Any

from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.config_repository import ConfigRepository
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra._internal.defaults_list import Overrides
from hydra._internal.grammar import grammar_functions
from hydra.core.config_loader import ConfigLoader
from hydra.core.config_store import ConfigStore
from hydra.core.default_element import GroupDefault
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import (
    ChoiceSweep,
    FloatRange,
    IntervalSweep,
    Override,
    OverrideType,
    QuotedString,
    RangeSweep,
)
from hydra.core.plugins import Plugins
from hydra.core.utils import JobReturn
from hydra.errors import HydraException
from hydra.plugins.config_source import ConfigSource
from hydra.plugins.launcher import Launcher
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf, open_dict
from yaml import YAMLError

from relora_core import shell
from relora_core.config import ConfigError, RunConfig, nearest
from sweeps.options import SlurmOptions
from sweeps.search.config import SearchConfig
from sweeps.search.space import Choice, Dimension, Float, Int

MOST_POINTS = 100_000
"""Points of a grid, and values of an axis: more are a slip of the hand, and would not end."""


@dataclass
class GridConf:
    """`hydra/sweeper=relora_grid`: the product of all axes, planned as a whole."""

    _target_: str = "hydra_plugins.relora_sweeps.plugins.GridSweeper"
    params: dict[str, Any] | None = field(default_factory=dict)
    """Axes of a sweep file: key -> values as on the command line, where they can be overridden."""
    arms: dict[str, Any] | None = field(default_factory=dict)
    """Settings that no axis spans: name -> overrides, crossed with all axes. `sweep.arm=a,b` takes
    some; what the command line says wins over an arm, and an arm over `params`."""
    plan_only: bool = False
    """Show what would be done, and its cost, and do nothing (`run.py --plan`)."""


@dataclass
class SearchConf:
    """`hydra/sweeper=search`: what is tried next depends on what came before (`search=...`)."""

    _target_: str = "hydra_plugins.relora_sweeps.plugins.SearchSweeper"
    plan_only: bool = False
    """Show the space, what is left and its cost, and do nothing (`run.py --plan`)."""


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


# Hydra copies its whole store for each group that it looks into, a second in all of `--help`. It
# only reads in it then, and copies what it reads.
ConfigStore.__deepcopy__ = lambda self, memo: self  # type: ignore[attr-defined]


def _as_written(self: FloatRange) -> None:
    """Decimals of what stands there; Hydra's are those of the binary fractions, whose sums give
    0.30000000000000004, and with it the end, which is no point of a range."""
    for name in ("start", "stop", "step"):
        setattr(self, name, Decimal(str(getattr(self, name))))


FloatRange.__post_init__ = _as_written  # type: ignore[method-assign]


def _sorted(
    sort: Callable[..., Any], sweep: ChoiceSweep | RangeSweep, reverse: bool
) -> ChoiceSweep | RangeSweep:
    """Hydra's sorting, but a range keeps its points: it takes those of range(2,9,4) for 5 and 1."""
    if not isinstance(sweep, RangeSweep):
        return sort(sweep, reverse)
    start, step = Decimal(str(sweep.start)), Decimal(str(sweep.step))
    sweep = copy(sweep)
    sweep.shuffle = False
    if (count := _points(sweep)) and (step < 0) != reverse:
        kind = int if type(sweep.start) is type(sweep.step) is int else float
        last = start + (count - 1) * step
        sweep.start, sweep.stop, sweep.step = kind(last), kind(start - step), kind(-step)
    return sweep


def _points(sweep: RangeSweep) -> int:
    """How many points a range has; too many to count without a step."""
    start, stop, step = (Decimal(str(n)) for n in (sweep.start, sweep.stop, sweep.step))
    if not step or not all(n.is_finite() for n in (start, stop, step)):
        return MOST_POINTS + 1
    return max(0, math.ceil((stop - start) / step))


grammar_functions._sort_sweep = partial(_sorted, grammar_functions._sort_sweep)
# Hydra checks the words of a function against its annotations; null is a value like others.
grammar_functions.choice.__annotations__["args"] |= None


def _checked(load: Callable[..., DictConfig]) -> Callable[..., DictConfig]:
    """Hydra's `load`, through which every config goes before anything that it names is called."""

    def load_configuration(self: ConfigLoaderImpl, *args: Any, **options: Any) -> DictConfig:
        from experiments import schema

        try:
            config = load(self, *args, **options)
        except (YAMLError, UnicodeDecodeError) as error:
            line = " ".join(str(error).split())
            raise ConfigError(f"a config file must be plain YAML in UTF-8: {line}") from None
        if (args[0] if args else options["config_name"]) is not None:  # --hydra-help reads no file
            schema.refuse_code(config)
            schema.refuse_places(config)
        return config

    return load_configuration


ConfigLoaderImpl.load_configuration = _checked(ConfigLoaderImpl.load_configuration)


def _unshadowed(load: Callable[..., Any]) -> Callable[..., Any]:
    """Hydra's `load_config`, which takes the first of several files and is silent on the others."""

    def load_config(self: ConfigRepository, config_path: str) -> Any:
        having = [source for source in self.get_sources() if source.is_config(config_path)]
        files = [_file_of(source, config_path) for source in having]
        for own in files[1:]:
            if own and (not files[0] or files[0].read_bytes() != own.read_bytes()):
                raise ConfigError(
                    f"{config_path.removesuffix('.yaml')} must be one file, got "
                    f"{files[0] or f'that of {having[0].provider}'} and {own}: give your own "
                    "another name"
                )
        return load(self, config_path)

    return load_config


def _file_of(source: ConfigSource, config_path: str) -> Path | None:
    name = source._normalize_file_name(config_path)
    return Path(source.path) / name if source.scheme() == "file" else None


ConfigRepository.load_config = _unshadowed(ConfigRepository.load_config)


def _unmarked(read: Callable[[str], dict[str, str | None]]) -> Callable[..., Any]:
    """Hydra's reading of `# @package`, without the mark that some editors put before all text."""
    return lambda text: read(text.removeprefix("\ufeff"))


ConfigSource._get_header_dict = staticmethod(_unmarked(ConfigSource._get_header_dict))


def _first_wins(add: Callable[..., None]) -> Callable[..., None]:
    """Hydra's `add_override`, which drops what a second file says of a group without a word."""

    def add_override(self: Overrides, parent_config_path: str, default: GroupDefault) -> None:
        key = default.get_override_key()
        winner = self.override_metadata.get(key)
        if winner and winner.containing_config_path and not winner.external_override:
            files = winner.containing_config_path, parent_config_path
            before, now = self.override_choices[key], default.value
            # Files of one folder are an heir and what it begins with: the heir is right.
            if before != now and len({file.rpartition("/")[0] for file in files}) > 1:
                raise ConfigError(
                    f"{key} must be chosen by one file, got {before} in {files[0]} and {now} in "
                    f"{files[1]}"
                )
        add(self, parent_config_path, default)

    return add_override


Overrides.add_override = _first_wins(Overrides.add_override)  # type: ignore[method-assign]

_store = ConfigStore.instance()
# Hydra's own config chooses `basic`, and any file may override that; what the primary config
# overrides, no other file can, and is not told so.
for _group, _node in (("hydra/sweeper", GridConf), ("hydra/launcher", LocalConf)):
    _store.store(group=_group, name="basic", node=_node, provider="relora_sweeps")
_store.store(group="hydra/sweeper", name="relora_grid", node=GridConf, provider="relora_sweeps")
_store.store(group="hydra/sweeper", name="search", node=SearchConf, provider="relora_sweeps")
_store.store(group="hydra/launcher", name="local", node=LocalConf, provider="relora_sweeps")
_store.store(group="hydra/launcher", name="slurm", node=SlurmConf, provider="relora_sweeps")


def _search_node() -> DictConfig:
    """SearchConfig's keys and defaults; the values are its own to check, its mappings are open."""
    named = {key: {"name": getattr(SearchConfig(), key)} for key in ("sampler", "pruner")}
    node = OmegaConf.create(dataclasses.asdict(SearchConfig()) | named)
    for key in ("sampler", "pruner", "space", "when"):
        OmegaConf.set_struct(node[key], False)
    return node


_store.store(name="search_schema", node=_search_node(), package="search", provider="relora_sweeps")


class GridSweeper(Sweeper):
    """Expands the axes with Hydra's own grammar and hands all points to the launcher at once."""

    def __init__(
        self,
        params: dict[str, Any] | None = None,
        arms: dict[str, Any] | None = None,
        plan_only: bool = False,
    ) -> None:
        self.params, self.arms, self.plan_only = params or {}, arms or {}, plan_only

    def setup(
        self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig
    ) -> None:
        self.loader = hydra_context.config_loader
        self.launcher = Plugins.instance().instantiate_launcher(
            hydra_context=hydra_context, task_function=task_function, config=config
        )

    def sweep(self, arguments: list[str]) -> None:
        shell.alone("a sweep (-m)")
        texts = _lines(self.params, of="hydra.sweeper.params")
        if not isinstance(self.launcher, OurLauncher):
            raise ConfigError(
                "hydra/launcher must be local or slurm with hydra/sweeper=relora_grid"
            )
        self.launcher.plan_only = self.plan_only
        arms = {name: list(words or []) for name, words in self.arms.items()}
        cells = expand_arms(texts, arms=arms, arguments=arguments, loader=self.loader)
        self.launcher.launch(cells, initial_job_idx=0)


class SearchSweeper(Sweeper):
    """Parses the space, composes what groups can be chosen, and hands both to `sweeps.search`."""

    def __init__(self, plan_only: bool = False) -> None:
        self.plan_only = plan_only

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
        from sweeps.search.launch import run_search

        shell.alone("a search (-m)")
        if not isinstance(self.launcher, OurLauncher):
            raise ConfigError("hydra/launcher must be local or slurm with hydra/sweeper=search")
        given = parse([_as_list(text) for text in arguments], loader=self.loader)
        for override in given:
            if override.key_or_group in ("search", "sweep") and override.is_sweep_override():
                raise ConfigError(
                    f"{override.key_or_group} must be one option with hydra/sweeper=search, got "
                    f"{override.input_line!r}"
                )
        fixed = {o.key_or_group: str(o.input_line) for o in given if not o.is_sweep_override()}
        first = self.composer.compose(list(fixed.values()))
        for key in ("space", "when"):
            if not OmegaConf.is_dict(first.search[key]):
                raise ConfigError(
                    f"search.{key} must be {{key: value, ...}}, got {first.search[key]!r}"
                )
        space = self._space(first.search.space, given)
        if "relora.scale" in {*space, *fixed} and "relora.alpha" in {*space, *fixed}:
            raise ConfigError(
                "relora.alpha must be left out where relora.scale is given: it follows"
            )
        self.composer.launchers.clear()  # `first` is no point
        bases = self._bases(space, list(fixed.values()))
        code = run_search(
            self._search(first, space, fixed),
            space=space,
            bases=bases,
            name=self.name,
            launcher=self.launcher.agreed(self.composer).made(),
            command=_command(),
            plan_only=self.plan_only,
        )
        if code:
            raise SystemExit(code)

    def _search(
        self, composed: DictConfig, space: dict[str, Dimension], fixed: dict[str, str]
    ) -> SearchConfig:
        """`search.*`, checked; what the command line fixes is not tried otherwise."""
        from sweeps.search.config import normalise

        given: Any = OmegaConf.to_container(composed.search, resolve=True)
        given["space"] = {key: one.text() for key, one in space.items()}
        given["when"] = {key: text for key, text in given["when"].items() if key not in fixed}
        search = normalise(given, seed=composed.seed)
        entries = [{k: v for k, v in one.items() if k not in fixed} for one in search.enqueue]
        search.enqueue = [entry for entry in entries if entry]
        return search

    def _bases(
        self, space: dict[str, Dimension], fixed: list[str]
    ) -> list[tuple[dict[str, str], RunConfig]]:
        """What each combination of the groups that are searched composes to."""
        from experiments import schema

        groups = {key: one.values for key, one in space.items() if isinstance(one, Choice)}
        groups = {key: values for key, values in groups.items() if self.composer.is_group(key)}
        bases = []
        for options in product(*groups.values()):
            choices = dict(zip(groups, map(str, options), strict=True))
            words = [*fixed, *(f"{key}={option}" for key, option in choices.items())]
            config = schema.to_run_config(self.composer.compose(words), words=words)
            bases.append((choices, config))
        return bases

    def _space(self, texts: Any, given: list[Override]) -> dict[str, Dimension]:
        """The file's space with the command line's: what that fixes is not searched."""
        lines = _lines(texts, of="search.space")
        space = {o.key_or_group: o for o in parse(lines, loader=self.loader)}
        for override in given:
            space.pop(override.key_or_group, None)
            if override.is_sweep_override():
                space[override.key_or_group] = override
        return {key: dimension(override) for key, override in space.items()}


def _as_list(text: str) -> str:
    """`search.learn_from=a,b` is two sweeps, no choice of one."""
    key, sign, names = text.partition("=")
    plain = sign and key == "search.learn_from" and "," in names and names[0] not in "['\""
    return f"{key}=[{names}]" if plain else text


class OurLauncher(Launcher):
    """Composes every point and hands all to `sweeps`; ends the process where something failed."""

    plan_only = False

    def setup(
        self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig
    ) -> None:
        self.context, self.task_function, self.config = hydra_context, task_function, config
        self.loader = hydra_context.config_loader

    def agreed(self, composer: "Composer") -> "OurLauncher":
        """This launcher, or the other one that all the composed points ask for."""
        node = composer.launcher()
        if node == self.config.hydra.launcher:
            return self
        config = self.config.copy()
        with open_dict(config):
            config.hydra.launcher = node
        launcher = Plugins.instance().instantiate_launcher(
            hydra_context=self.context, task_function=self.task_function, config=config
        )
        assert isinstance(launcher, OurLauncher)  # refuse_code has seen to it
        return launcher

    def made(self) -> Any:
        """The launcher of `sweeps` that this one stands for."""
        raise NotImplementedError

    def launch(
        self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int
    ) -> Sequence[JobReturn]:
        from sweeps.grid import points_from
        from sweeps.launch import run_sweep

        composer = Composer(self.loader, self.config)
        configs = composer.all(job_overrides)
        points = list(zip(points_from(job_overrides), configs, strict=True))
        launcher = self.agreed(composer).made()
        code = run_sweep(points, launcher=launcher, command=_command(), plan_only=self.plan_only)
        if code:
            raise SystemExit(code)
        return []


class LocalLauncher(OurLauncher):
    """Worker processes on this machine."""

    def __init__(self, max_parallel: int | None = None, **added: Any) -> None:
        self.max_parallel, self.added = max_parallel, added

    def made(self) -> Any:
        from sweeps.local import LocalLauncher as Local

        _refuse_added(self.added, known=["max_parallel"])
        return Local(max_parallel=self.max_parallel)


class SlurmLauncher(OurLauncher):
    """SLURM job arrays."""

    def __init__(self, **options: Any) -> None:
        self.values: dict[str, Any] = {
            key: OmegaConf.to_container(value) if OmegaConf.is_config(value) else value
            for key, value in options.items()
        }

    def made(self) -> Any:
        from sweeps.slurm import SlurmLauncher as Slurm

        _refuse_added(self.values, known=[f.name for f in dataclasses.fields(SlurmOptions)])
        return Slurm(options=SlurmOptions(**self.values))


def _refuse_added(values: Mapping[str, Any], *, known: list[str]) -> None:
    """ConfigError for a key that a plus has added: what sbatch has and we do not goes elsewhere."""
    for key in values:
        if key in known:
            continue
        line = f"hydra.launcher.{key} is not a known key.{nearest(key, known)}"
        if "extra" in known:
            line += f" +hydra.launcher.extra.{key}=... hands any option to sbatch."
        raise ConfigError(line)


def parse(texts: list[str], *, loader: ConfigLoader) -> list[Override]:
    """Hydra's reading of overrides; one line where one is none."""
    try:
        overrides = OverridesParser.create(config_loader=loader).parse_overrides(texts)
    except HydraException as error:
        raise ConfigError(_explain(texts, error)) from None
    for override in overrides:
        _values(override)
    return overrides


def _lines(values: Mapping[str, Any], *, of: str) -> list[str]:
    """KEY=VALUE of each entry, as on the command line; ConfigError for a section, which is none."""
    for key, value in values.items():
        if isinstance(value, Mapping):
            name, inner = next(iter(value.items()), ("KEY", "VALUE"))
            inner = ",".join(map(str, inner)) if OmegaConf.is_list(inner) else inner
            raise ConfigError(
                f"{of}.{key} must be values, got a section; write {key}.{name}: {inner}"
            )
    return [f"{key}={'null' if value is None else value}" for key, value in values.items()]


def _values(override: Override) -> int:
    """How many values an axis has; ConfigError where they would never be listed."""
    if not override.is_sweep_override() or not override.is_discrete_sweep():
        return 1
    value = override.value()
    if isinstance(value, RangeSweep):
        count = _points(value)
    else:
        count = sum(1 for _ in override.sweep_iterator())
    if not 1 <= count <= MOST_POINTS:
        most = f"at most {MOST_POINTS} values" if count else "at least one value"
        raise ConfigError(f"{override.key_or_group} must have {most}, got {override.input_line!r}")
    return count


def dimension(override: Override) -> Dimension:
    """A sweep in Hydra's grammar as a dimension of a search; `range` ends before its stop."""
    key, value = f"search.space.{override.key_or_group}", override.value()
    if isinstance(value, IntervalSweep):
        low, high, log = value.start, value.end, "log" in value.tags
        assert low is not None
        assert high is not None
        if type(low) is int and type(high) is int:
            return Int(low=low, high=high, log=log)
        return Float(low=float(low), high=float(high), log=log)
    if isinstance(value, RangeSweep):
        values = list(value.range())
        log = "log" in value.tags
        kind = Int if all(type(v) is int for v in values) else Float
        step = abs(value.step) if kind is Int else abs(float(value.step))
        return kind(low=min(values), high=max(values), step=step, log=log)  # type: ignore[arg-type]
    if override.is_sweep_override():
        words = override.sweep_iterator()
        return Choice(values=[w.text if isinstance(w, QuotedString) else w for w in words])
    raise ConfigError(
        f"{key} must be choice(), range() or interval(), got {value!r}; to fix it say "
        f"{override.key_or_group}={value} outside search.space"
    )


def expand(texts: list[str], *, loader: ConfigLoader) -> list[list[str]]:
    """The overrides of each point of the product; ConfigError for axes that are no finite list."""
    overrides = parse(texts, loader=loader)
    for override in overrides:
        if override.is_sweep_override() and not override.is_discrete_sweep():
            raise ConfigError(
                f"{override.key_or_group} must be a list, choice() or range() in a grid, got "
                f"{override.input_line!r}; interval() is for a search"
            )
    if (points := math.prod(map(_values, overrides))) > MOST_POINTS:
        raise ConfigError(f"a grid must have at most {MOST_POINTS} points, got {points}")
    return BasicSweeper.split_arguments(overrides, None)[0]


def expand_arms(
    params: list[str],
    *,
    arms: Mapping[str, list[str]],
    arguments: list[str],
    loader: ConfigLoader,
) -> list[list[str]]:
    """The points of every arm that `sweep.arm` takes (all, where nothing says), replicate by
    replicate: a sweep that is stopped halfway has compared all arms on the seeds it got to."""
    key = "sweep.arm"
    given = [text for text in params + arguments if text.lstrip("+").startswith(f"{key}=")]
    if not arms:
        return expand(params + arguments, loader=loader)
    names = list(arms)
    if given:
        cells = expand([text.lstrip("+") for text in given], loader=loader)
        names = [str(parse(cell, loader=loader)[-1].value()) for cell in cells]
        arguments = [text for text in arguments if text not in given]
        params = [text for text in params if text not in given]
    grids = []
    for name in names:
        if name not in arms:
            raise ConfigError(
                f"{key} must be one of {', '.join(arms)}, got {name!r}.{nearest(name, list(arms))}"
            )
        grids.append(expand([*params, *arms[name], *arguments, f"{key}={name}"], loader=loader))
    return [cell for cells in zip_longest(*grids) for cell in cells if cell is not None]


def _command() -> str:
    import shlex

    return shlex.join(["python", *sys.argv])


def _explain(texts: Sequence[str], error: Exception) -> str:
    from experiments import schema

    return schema.diagnose(list(texts), error)


def _difference(prefix: str, one: Any, two: Any) -> tuple[str, Any, Any]:
    """(key, value, value) where two configs first differ."""
    plain: list[Any] = [OmegaConf.to_container(node, resolve=False) for node in (one, two)]
    if not all(isinstance(values, dict) for values in plain):
        return prefix, one, two
    for key in dict.fromkeys(key for values in plain for key in values):
        left, right = (values.get(key) for values in plain)
        if key == "_target_" and left != right:
            one, two = (str(target).rpartition(".")[2] for target in (left, right))
            return prefix.replace(".", "/"), one, two
        if left != right:
            return f"{prefix}.{key}", left, right
    return prefix, one, two


class Composer:
    """Composes many points: files once per distinct choice of options, values on a copy of that.

    Hydra takes some 60 ms for a point; a grid of a thousand mostly varies values.
    """

    def __init__(self, loader: ConfigLoader, master: DictConfig) -> None:
        self.loader, self.master = loader, master
        self.parse = cache(OverridesParser.create(config_loader=loader).parse_override)
        self.is_group = cache(lambda key: bool(loader.get_group_options(key)))
        self.known: frozenset[str] = frozenset()
        self.launchers: list[tuple[DictConfig, str]] = []
        """Each launcher that a point asks for, with the first such point's words."""

    def launcher(self) -> DictConfig:
        """What all points composed so far say that runs them; ConfigError where they differ."""
        (node, where), *others = self.launchers
        for other, elsewhere in others:
            key, one, two = _difference("hydra.launcher", node, other)
            raise ConfigError(
                f"{key} must be the same for all runs of a command, got {one} with {where} and "
                f"{two} with {elsewhere}; the command line may set it"
            )
        return node

    def _note(self, hydra: DictConfig, texts: Sequence[str]) -> None:
        """Remember the launcher; ConfigError for axes and arms of a file that is itself swept."""
        where = " ".join(texts) or "the defaults"
        if hydra.sweeper != self.master.hydra.sweeper:
            key, _, got = _difference("hydra.sweeper", self.master.hydra.sweeper, hydra.sweeper)
            raise ConfigError(
                f"{key} must come from a file that the command line names alone, got {got} with "
                f"{where}: points are made before a swept file is read; one command for each file"
            )
        if all(hydra.launcher != node for node, _ in self.launchers):
            self.launchers.append((hydra.launcher, where))

    def all(self, cells: Sequence[Sequence[str]]) -> list[RunConfig]:
        """The config of each cell; ConfigError at the first that does not compose."""
        from sweeps.grid import compose_all

        plans = [self._split(cell) for cell in cells]
        return compose_all(plans, base=self._base, change=self._change)

    def _split(self, cell: Sequence[str]) -> tuple[tuple[str, ...], list[str]]:
        """(choices of options, plain `key=value`), or all of it and nothing.

        The latter where anything is unusual (`+key`, `~key`, a section given as a dict): then Hydra
        composes the cell alone.
        """
        chosen = [text for text in cell if self.is_group(self.parse(text).key_or_group)]
        values = [text for text in cell if text not in chosen]
        if any(isinstance(self.parse(text).value(), dict) for text in cell):
            return tuple(cell), []
        if any(not self._is_plain(self.parse(text)) for text in values):
            return tuple(cell), []
        return tuple(chosen), values

    def _is_plain(self, override: Override) -> bool:
        return override.type == OverrideType.CHANGE and override.package is None

    def compose(self, texts: Sequence[str]) -> DictConfig:
        """What Hydra makes of the overrides; ConfigError in one line where it refuses them."""
        from experiments import schema

        with schema.explaining(texts):
            config = self.loader.load_sweep_config(self.master, list(texts))
        with open_dict(config):
            self._note(config.pop("hydra"), texts)
        return config

    def _base(self, texts: Any) -> Any:
        from experiments import schema

        config = self.compose(texts)
        schema.refuse_search(config)
        config.search = None
        return schema.Base(config, words=texts)

    def _change(self, base: Any, texts: Sequence[str]) -> RunConfig:
        from experiments import schema

        self.known = self.known or frozenset(schema.schema_keys())
        for text in texts:
            if self.parse(text).key_or_group.startswith("search."):
                raise ConfigError(f"{text!r} needs hydra/sweeper=search: a grid has no search")
            if self.parse(text).key_or_group not in self.known:
                raise ConfigError(schema.diagnose([text], KeyError(text)))
        values = {o.key_or_group: o.value() for o in map(self.parse, texts)}
        return base.changed(values)
