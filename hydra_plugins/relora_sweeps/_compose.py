"""Composes many points quickly: once for each choice of options; values are set on a copy.

Hydra takes some 50 ms for a point, and most points of a grid differ only in values. Not for: what
the points are (`_axes.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

from hydra.core.config_loader import ConfigLoader
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import OverrideType
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, open_dict

from experiments import schema, typos
from relora_core.config import ConfigError, RunConfig


class Composer:
    """Composes points, and remembers the launchers that they ask for."""

    def __init__(self, loader: ConfigLoader, master: DictConfig) -> None:
        self.loader, self.master = loader, master
        self.parse = cache(OverridesParser.create(config_loader=loader).parse_override)
        self.is_group = cache(lambda key: bool(loader.get_group_options(key)))
        self.launchers: list[tuple[DictConfig, str]] = []
        """Each launcher that a point asks for, and the overrides of the first such point."""

    def launcher(self) -> DictConfig:
        """The launcher that all points composed so far ask for; ConfigError if they differ."""
        (node, where), *others = self.launchers
        for other, elsewhere in others:
            key, one, two = _difference("hydra.launcher", node, other)
            raise ConfigError(
                f"{key} must be the same for all runs of a command, got {one} with {where} and "
                f"{two} with {elsewhere}; the command line may set it"
            )
        return node

    def _note(self, hydra: DictConfig, texts: Sequence[str]) -> None:
        """Remember the launcher; ConfigError if a file that is swept has axes or arms itself."""
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
        plans = [self._split(cell) for cell in cells]
        base = cache(self._base)  # reads and merges files; _change does not change it
        return [self._change(base(choices), values) for choices, values in plans]

    def _split(self, cell: Sequence[str]) -> tuple[tuple[str, ...], list[str]]:
        """(overrides that Hydra composes, `key=value`s to set on a copy).

        Hydra composes all of them if one is unusual: `+key`, `~key`, a section given as a dict.
        """
        chosen = [text for text in cell if self.is_group(self.parse(text).key_or_group)]
        values = [text for text in cell if text not in chosen]
        if any(isinstance(self.parse(text).value(), dict) for text in cell):
            return tuple(cell), []
        overrides = map(self.parse, values)
        if any(o.type != OverrideType.CHANGE or o.package is not None for o in overrides):
            return tuple(cell), []
        return tuple(chosen), values

    def compose(self, texts: Sequence[str]) -> DictConfig:
        """The config that Hydra composes; ConfigError if it refuses the overrides."""
        with schema.explaining(texts):
            config = self._load(list(texts))
        with open_dict(config):
            self._note(config.pop("hydra"), texts)
        return config

    def _load(self, texts: list[str]) -> DictConfig:
        # Like `load_sweep_config`, which since Hydra 1.4 refuses launchers chosen by points:
        # `_note` and `launcher` allow one that all points agree on.
        before: Any = OmegaConf.to_container(self.master.hydra.overrides.hydra)
        name = self.master.hydra.job.config_name
        config = self.loader.load_configuration(name, before + texts, run_mode=RunMode.RUN)
        OmegaConf.copy_cache(from_config=self.master, to_config=config)
        return config

    def _base(self, texts: Any) -> Any:
        config = self.compose(texts)
        schema.refuse_search(config)
        config.search = None
        return schema.Template(config, overrides=texts)

    def _change(self, base: Any, texts: Sequence[str]) -> RunConfig:
        for text in texts:
            if self.parse(text).key_or_group.startswith("search."):
                raise ConfigError(f"{text!r} needs hydra/sweeper=search: a grid has no search")
            if self.parse(text).key_or_group not in typos.schema_keys():
                raise ConfigError(typos.diagnose([text], KeyError(text)))
        values = {o.key_or_group: o.value() for o in map(self.parse, texts)}
        return base.changed(values)


def _difference(prefix: str, one: Any, two: Any) -> tuple[str, Any, Any]:
    """(key, value, value) of the first difference of two configs."""
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
