"""study.json: all that a worker needs of a search, so that no worker needs Hydra."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from experiments import json_files, references
from experiments.addresses import located
from experiments.disk import frozen
from experiments.disk.output_dir import place_of_study
from experiments.identity import config_from_json
from relora_core import atomic
from relora_core.config import ConfigError, RunConfig, nearest
from sweeps.search import growth, samplers
from sweeps.search.config import CHANGEABLE, Objective, SearchConfig, normalise
from sweeps.search.space import (
    Choice,
    Dimension,
    base_key,
    check_space,
    from_json,
    to_json,
    with_values,
)


@dataclass(kw_only=True, slots=True)
class Spec:
    """A search in full."""

    config: SearchConfig
    """Normalised."""
    space: dict[str, Dimension]
    groups: list[str] = field(default_factory=list)
    """Keys of `space` that choose options of conf/."""
    bases: dict[str, RunConfig]
    """base_key(choices of all groups) -> config, completed; what is searched is set on a copy."""
    follows: dict[str, dict[str, Any]] = field(default_factory=dict)
    """The same -> {dotted key: what stands there}, of values that refer to what is searched."""
    command: str = ""
    """Of the newest launch."""
    id: str = ""
    """Distinguishes studies of one name; made when the study is created."""
    notes: list[str] = field(default_factory=list)
    """What planning noted of data and settings, one line each."""
    added: list[str] = field(default_factory=list)
    """Keys of `space` that joined later: earlier trials ran with their values in `bases`, or if the
    key is a group with its first option."""
    learnt: list[dict[str, Any]] = field(default_factory=list)
    """The first trials, made of runs of earlier sweeps (`learn.py`)."""

    def at(self, choices: Mapping[str, Any], values: Mapping[str, Any]) -> RunConfig:
        """The config with these options of groups and values of keys; not validated."""
        key = base_key(choices)
        config = with_values(self.bases[key], values)
        if not (follows := self.follows.get(key)):
            return config
        return with_values(config, references.resolve(config, follows))

    # disk ---------------------------------------------------------------------------------------
    def write(self, path: Path) -> None:
        space = {key: to_json(dimension) for key, dimension in self.space.items()}
        atomic.write_json(path, dataclasses.asdict(self) | {"space": space})

    @classmethod
    def read(cls, path: Path) -> Spec:
        """ConfigError if the file is missing or damaged."""
        output_dir, name, arm = place_of_study(path.parent)
        try:
            raw = json_files.parse(path.read_bytes())
            bases = {k: config_from_json(json.dumps(one)) for k, one in raw["bases"].items()}
            return cls(
                config=_located(normalise(raw["config"]), bases, output_dir=output_dir),
                space={key: from_json(one) for key, one in raw["space"].items()},
                groups=raw["groups"],
                bases={k: frozen.read(c, output_dir=output_dir) for k, c in bases.items()},
                follows=raw.get("follows", {}),
                command=raw["command"],
                id=raw["id"],
                notes=raw.get("notes", []),
                added=raw.get("added", []),
                learnt=raw.get("learnt", []),
            )
        except FileNotFoundError:
            raise ConfigError(f"{arm or name} must be a search, but has no {path}") from None
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ConfigError(
                f"{path} must be a search as this version writes it ({error!r}); move it away to "
                "begin anew"
            ) from None

    def absolute(self) -> Spec:
        """A copy in which nothing depends on the folder that the command was given in."""
        storage = self.config.storage and located(self.config.storage, [Path.cwd()], new=True)
        return dataclasses.replace(
            self,
            config=dataclasses.replace(self.config, storage=storage),
            bases={key: frozen.absolute(config) for key, config in self.bases.items()},
        )

    # checks -------------------------------------------------------------------------------------
    def check(self) -> None:
        """ConfigError if it cannot be searched; touches no disk."""
        when = self.config.when
        for config in self.bases.values():
            check_space(self.space, groups=self.groups, when=when, config=config)
        for choices in growth.combinations(self):
            assert base_key(choices) in self.bases, f"no base config for {choices!r}"
        samplers.check_search(self.config, space=self.space)
        for index, entry in enumerate(self.config.enqueue):
            self._check_enqueued(entry, name=f"search.enqueue[{index}]")

    def _check_enqueued(self, entry: dict[str, Any], *, name: str) -> None:
        for key, value in entry.items():
            if key not in self.space:
                raise ConfigError(
                    f"{name} must hold keys of search.space, got {key!r}."
                    f"{nearest(key, list(self.space))}"
                )
            dimension = self.space[key]
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if not dimension.contains(value):
                near = dimension.nearest(value) if number else None
                hint = "" if near is None else f"; nearest valid: {near:.12g}"
                raise ConfigError(
                    f"{name}: {key} must lie in {dimension.text()}, got {value!r}{hint}; "
                    "search.enqueue=[] tries nothing first"
                )
        missing = [key for key in self.space if key not in entry]
        if missing and self.config.sampler["name"] == "grid":
            raise ConfigError(f"{name} must set {missing[0]}, too, if search.sampler is grid")

    def enqueued(self) -> list[dict[str, Any]]:
        """search.enqueue as Optuna stores values."""
        return [
            {key: self.stored(key, value) for key, value in entry.items()}
            for entry in self.config.enqueue
        ]

    def own(self, key: str, value: Any) -> Any:
        """A value that is in the space as the space has it: 8.0 is its 8."""
        dimension = self.space[key]
        if isinstance(dimension, Choice):
            return next(v for v in dimension.values if Choice(values=[v]).contains(value))
        return type(dimension.low)(value)

    def stored(self, key: str, value: Any) -> Any:
        """The same, as Optuna stores it."""
        return samplers.encode(self.own(key, value))

    # continuing ---------------------------------------------------------------------------------
    def continue_with(self, new: Spec) -> Spec:
        """`new` as the next command of this study; its space may have grown.

        ConfigError if it is another search.
        """
        space = {key: self._dimension(key, new) for key in dict.fromkeys([*new.space, *self.space])}
        for key in self.space:
            before, now = self.config.when.get(key), new.config.when.get(key)
            if not growth.allows_same(before, now, space=self.space):
                _refuse(f"search.when.{key}", before, now)
        for f in fields(SearchConfig):
            before, now = getattr(self.config, f.name), getattr(new.config, f.name)
            if f.name not in (*CHANGEABLE, "space", "when") and before != now:
                _refuse(f"search.{f.name}", _text(before), _text(now))
        new = growth.join(self, dataclasses.replace(new, space=space))
        texts = {key: dimension.text() for key, dimension in new.space.items()}
        config = dataclasses.replace(new.config, space=texts)
        return dataclasses.replace(new, config=config, id=self.id, learnt=self.learnt)

    def _dimension(self, key: str, new: Spec) -> Dimension:
        """What the key is drawn from now; ConfigError if that lacks earlier values."""
        before, now = self.space.get(key), new.space.get(key)
        wider = growth.widen(before, now) if before and now else now
        if wider is None or (self.config.storage and wider != before):
            most = "stay" if self.config.storage else "hold all of"
            where = " whose trials are in search.storage" if self.config.storage else ""
            raise ConfigError(
                f"search.space.{key} must {most} {before.text() if before else 'as it was'} in a "
                f"study that has begun{where}, got {now.text() if now else 'nothing'}; another "
                "sweep.name begins a new study, and search.learn_from=OLD_NAME learns from this one"
            )
        return wider

    def growth_since(self, old: Spec) -> list[str]:
        """A line for each key that has another dimension than in `old`."""
        lines = []
        for key, now in self.space.items():
            before = old.space.get(key)
            if before != now:
                lines.append(f"{key} from {before.text() if before else 'fixed'} to {now.text()}")
        return lines


def _located(
    config: SearchConfig, bases: Mapping[str, RunConfig], *, output_dir: Path
) -> SearchConfig:
    """`config` with an absolute path of its storage: earlier versions wrote it as it was typed."""
    typed = next((base.output_dir for base in bases.values()), str(output_dir))
    places = frozen.typed_in(typed, output_dir)
    storage = config.storage and located(config.storage, places)
    return dataclasses.replace(config, storage=storage)


def _refuse(key: str, before: Any, now: Any) -> None:
    raise ConfigError(
        f"{key} must stay {before} in a study that has begun, got {now}; another sweep.name begins "
        "a new study"
    )


def _text(value: Any) -> Any:
    if isinstance(value, list):
        return [one.text() if isinstance(one, Objective) else one for one in value]
    return value
