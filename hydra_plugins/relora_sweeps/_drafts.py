"""The studies that a command line asks for: its space parsed, each choice of groups composed.

Not for: whether they can be searched (`sweeps/search/launch.py`).
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from typing import TYPE_CHECKING, Any

from hydra.core.override_parser.types import Override
from omegaconf import DictConfig, OmegaConf

from experiments import references, schema
from experiments.labels import quoted, typed
from hydra_plugins.relora_sweeps._axes import arms_taken, as_list, dimension, lines_of, parse
from hydra_plugins.relora_sweeps._compose import Composer
from relora_core.config import ConfigError, RunConfig
from sweeps.search.config import SearchConfig, check_arms, normalise
from sweeps.search.space import Choice, Dimension

if TYPE_CHECKING:
    from sweeps.search.launch import Draft


def make_drafts(arguments: list[str], *, composer: Composer) -> list[Draft]:
    """A draft for each arm of the search, else a single one; ConfigError for a user's mistake."""
    loader = composer.loader
    given = parse([as_list(text) for text in arguments], loader=loader)
    taken = [o for o in given if o.key_or_group == "sweep.arm"]
    given = [o for o in given if o not in taken]
    for override in given:
        if override.key_or_group in ("search", "sweep") and override.is_sweep_override():
            raise ConfigError(
                f"{override.key_or_group} must be one option with hydra/sweeper=search, got "
                f"{override.input_line!r}"
            )
    fixed = {o.key_or_group: str(o.input_line) for o in given if not o.is_sweep_override()}
    first = composer.compose(list(fixed.values()))
    arms = check_arms(OmegaConf.to_container(first.search.arms) or {})
    if first.sweep.from_search is not None:
        raise ConfigError(
            f"sweep.from_search must be null in a search, got {first.sweep.from_search!r}"
        )
    for key in ("space", "when", "common"):
        if not OmegaConf.is_dict(first.search[key]):
            raise ConfigError(
                f"search.{key} must be {{key: value, ...}}, got {first.search[key]!r}"
            )
    drafts = _Drafts(composer=composer, first=first)
    common = drafts.parse_runs(lines_of(_common(first), of="search.common"), of="search.common")
    composer.launchers.clear()  # `first` is not a point
    if not arms:
        return [drafts.make([*common, *given, *taken])]
    names = arms_taken(taken, arms=arms, loader=loader)
    return [drafts.of_arm(name, arms[name], common=common, given=given) for name in names]


def _common(first: DictConfig) -> dict[str, Any]:
    """`search.common`, in which references are those of the runs."""
    written, resolved = (
        OmegaConf.to_container(first.search.common, resolve=resolve) for resolve in (False, True)
    )
    return references.kept(written, resolved)


@dataclass(kw_only=True)
class _Drafts:
    """Makes drafts, each of one study."""

    composer: Composer
    first: DictConfig
    """What the command line composes to without what it searches."""

    def parse_runs(self, overrides: list[str], *, of: str) -> list[Override]:
        """Overrides in a file, parsed; ConfigError if one does not set what runs do."""
        parsed = parse(overrides, loader=self.composer.loader)
        for override in parsed:
            if override.key_or_group.split(".")[0] in ("search", "sweep", "hydra"):
                raise ConfigError(f"{of} must set what runs do, got {override.input_line!r}")
        return parsed

    def of_arm(
        self, name: str, overrides: list[str], *, common: list[Override], given: list[Override]
    ) -> Draft:
        """The draft of an arm: its own overrides win over those that are common to all and over
        the file's space, the command line's over all."""
        own = self.parse_runs([*overrides], of=f"search.arms.{name}")
        own += parse([f"sweep.arm={name}"], loader=self.composer.loader)
        try:
            one = self.make([*common, *own, *given], start=True)
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

    def make(self, overrides: list[Override], *, start: bool = False) -> Draft:
        """The draft of one study, where later overrides win; with `start` its bases have the first
        of each choice."""
        from sweeps.search.launch import Draft  # Optuna: not at every start of Hydra

        by_key = {o.key_or_group: o for o in overrides}
        given = list(by_key.values())
        fixed = {key: str(o.input_line) for key, o in by_key.items() if not o.is_sweep_override()}
        space = self._space(given)
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
            and key not in self.first.search["when"]  # where it is not drawn it is the config's own
        }
        bases, follows = self._bases(space, [*fixed.values(), *firsts.values()])
        seeds = {config.seed for _, config in bases}
        seed = seeds.pop() if len(seeds) == 1 else self.first.seed
        search = self._search(space, fixed, seed=seed)
        set_by_user = dict.fromkeys(space, "") | typed(fixed.values())
        return Draft(search=search, space=space, bases=bases, follows=follows, given=set_by_user)

    def _search(
        self, space: dict[str, Dimension], fixed: dict[str, str], *, seed: int
    ) -> SearchConfig:
        """`search.*`, checked, without values for keys that the command line fixes."""
        given: Any = OmegaConf.to_container(self.first.search, resolve=True)
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

    def _space(self, given: list[Override]) -> dict[str, Dimension]:
        """The space of the file and the command line, without keys that the latter fixes."""
        lines = lines_of(self.first.search.space, of="search.space")
        space = {o.key_or_group: o for o in parse(lines, loader=self.composer.loader)}
        for override in given:
            space.pop(override.key_or_group, None)
            if override.is_sweep_override():
                space[override.key_or_group] = override
        return {key: dimension(override) for key, override in space.items()}
