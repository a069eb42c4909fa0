"""Every change that is made to Hydra's own code, in `install_guards`."""

from __future__ import annotations

import sys
from collections.abc import Callable
from copy import copy
from decimal import Decimal
from functools import cache, partial, wraps
from pathlib import Path
from typing import Any

from hydra._internal import defaults_list
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.config_repository import ConfigRepository
from hydra._internal.defaults_list import Overrides
from hydra._internal.grammar import grammar_functions
from hydra._internal.hydra import Hydra
from hydra.core.config_store import ConfigStore
from hydra.core.default_element import GroupDefault, InputDefault
from hydra.core.override_parser.types import ChoiceSweep, FloatRange, RangeSweep
from hydra.plugins.config_source import ConfigSource
from omegaconf import DictConfig
from yaml import YAMLError

from experiments import schema
from hydra_plugins.relora_sweeps._axes import count_points
from relora_core.config import ConfigError


@cache  # a second time would wrap what is wrapped; Hydra 1.3 may run its plugins' modules twice
def install_guards() -> None:
    """Change Hydra where it is silent, slow or wrong.

    Checked against hydra-core 1.3.8 and 1.4.0rc3; tests/sweeps/test_guards.py fails where another
    Hydra no longer has what is changed here.
    """
    # Every config goes through these before anything that it names is called: here code in a config
    # is refused, and a file that is no YAML.
    if schema.HYDRA_1_4:
        loader: Any = ConfigLoaderImpl
        loader._load_configuration = _checked(loader._load_configuration)
        # 1.4 looks for `hydra.mode` in config.yaml alone; an experiment may ask for a sweep, too.
        loader.get_mode = _unless_given(_composed_mode)
    else:
        ConfigLoaderImpl.load_configuration = _checked(ConfigLoaderImpl.load_configuration)
        # Until 1.4 `FloatRange` added binary fractions: range(0.1,0.4,0.1) had 0.30000000000000004
        # and its end. And `sort` changed the points of a range: range(2,9,4) became 5 and 1.
        FloatRange.__post_init__ = _as_written  # type: ignore[method-assign]
        grammar_functions._sort_sweep = partial(_sorted, grammar_functions._sort_sweep)
        # Hydra composes all files once more to find `hydra.mode`, of which `-m` leaves no question.
        Hydra.get_mode = _unless_given(Hydra.get_mode)
        # Until 1.4 each file's defaults were prepared for `${...}`, a sixth of composing.
        defaults_list._create_interpolation_map = _if_needed(
            defaults_list._create_interpolation_map
        )
    # `load_config` takes the first of several files of one name, and does not say so.
    ConfigRepository.load_config = _unshadowed(ConfigRepository.load_config)
    # `add_override` drops what a second file chooses for a group, and does not say so.
    Overrides.add_override = _first_wins(Overrides.add_override)  # type: ignore[method-assign]
    # `_get_header_dict` does not see `# @package` behind the mark that some editors put before all
    # text: the file's keys would go into the package of its folder.
    ConfigSource._get_header_dict = staticmethod(_unmarked(ConfigSource._get_header_dict))
    # Hydra checks what `choice` is given against its annotations; null is a value like others.
    grammar_functions.choice.__annotations__["args"] |= None
    # Hydra copies its whole store for each group that it looks into, a second in all of `--help`.
    # It only reads in that copy, and copies what it takes from it.
    ConfigStore.__deepcopy__ = lambda self, memo: self  # type: ignore[attr-defined]


def _as_written(self: FloatRange) -> None:
    """Decimals of what stands there; Hydra's are those of the binary fractions, whose sums give
    0.30000000000000004, and with it the end, which is no point of a range."""
    for name in ("start", "stop", "step"):
        setattr(self, name, Decimal(str(getattr(self, name))))


def _sorted(
    sort: Callable[..., Any], sweep: ChoiceSweep | RangeSweep, reverse: bool
) -> ChoiceSweep | RangeSweep:
    """Hydra's sorting, but a range keeps its points: it takes those of range(2,9,4) for 5 and 1."""
    if not isinstance(sweep, RangeSweep):
        return sort(sweep, reverse)
    start, step = Decimal(str(sweep.start)), Decimal(str(sweep.step))
    sweep = copy(sweep)
    sweep.shuffle = False
    if (count := count_points(sweep)) and (step < 0) != reverse:
        kind = int if type(sweep.start) is type(sweep.step) is int else float
        last = start + (count - 1) * step
        sweep.start, sweep.stop, sweep.step = kind(last), kind(start - step), kind(-step)
    return sweep


def _checked(load: Callable[..., DictConfig]) -> Callable[..., DictConfig]:
    """Hydra's `load`, through which every config goes before anything that it names is called."""

    @wraps(load)
    def load_configuration(self: ConfigLoaderImpl, *args: Any, **options: Any) -> DictConfig:
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


def _unless_given(get_mode: Callable[..., Any]) -> Callable[..., Any]:
    """Hydra's `get_mode`: a config's `hydra.mode`. With None, `-m` has its way."""

    @wraps(get_mode)
    def given_mode(*args: Any, **options: Any) -> Any:
        flags = {"-m", "--multirun"} & set(sys.argv[1:])
        return None if flags else get_mode(*args, **options)

    return given_mode


def _if_needed(create: Callable[..., DictConfig]) -> Callable[..., DictConfig | None]:
    """Hydra's map of what `${...}` in a list of defaults may name, where the list has one."""

    @wraps(create)
    def interpolation_map(
        overrides: Overrides, defaults: list[InputDefault], self_added: bool
    ) -> DictConfig | None:
        needed = any(not one.is_override() and one.is_interpolation() for one in defaults)
        return create(overrides, defaults, self_added) if needed else None

    return interpolation_map


def _composed_mode(
    self: Any, config_name: str | None, overrides: list[str], parsed: Any = None
) -> Any:
    """As Hydra 1.3: `hydra.mode` of the composed config; None where it does not compose."""
    return super(ConfigLoaderImpl, self).get_mode(config_name, overrides)  # type: ignore[misc]


def _unshadowed(load: Callable[..., Any]) -> Callable[..., Any]:
    """Hydra's `load_config`, which takes the first of several files and is silent on the others."""

    @wraps(load)
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


def _unmarked(read: Callable[[str], dict[str, str | None]]) -> Callable[..., Any]:
    """Hydra's reading of `# @package`, without the mark that some editors put before all text."""
    return wraps(read)(lambda text: read(text.removeprefix("\ufeff")))


def _first_wins(add: Callable[..., None]) -> Callable[..., None]:
    """Hydra's `add_override`, which drops what a second file says of a group without a word."""

    @wraps(add)
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
