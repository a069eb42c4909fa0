"""Our changes to Hydra's own code, all made by `install_guards`."""

from __future__ import annotations

import re
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
from omegaconf import DictConfig, _utils
from yaml import YAMLError

from experiments import schema
from hydra_plugins.relora_sweeps._axes import count_points
from relora_core.config import ConfigError

NOT_DECIMAL = re.compile(r"[-+]?(?:[0-9]+(?::[0-5]?[0-9])+(?:\.[0-9]*)?|0[0-9]+)$")
"""What YAML 1.1 reads in base 60 (`12:00:00` as 43200) or 8 (`010` as 8)."""


@cache  # only once: Hydra 1.3 may run its plugins' modules twice, which would wrap twice
def install_guards() -> None:
    """Change Hydra where it hides mistakes, is slow or wrong.

    Checked against hydra-core 1.3.8 and 1.4.0rc3; tests/sweeps/test_guards.py fails if another
    version no longer has what is changed here.
    """
    # Hydra loads every config with these before it calls what the config names, so here code in a
    # config is refused, and files that are not YAML.
    if schema.HYDRA_1_4:
        loader: Any = ConfigLoaderImpl
        loader._load_configuration = _checked(loader._load_configuration)
        # 1.4 looks for `hydra.mode` in config.yaml only; here an experiment may ask for a sweep.
        loader.get_mode = _unless_given(_composed_mode)
    else:
        ConfigLoaderImpl.load_configuration = _checked(ConfigLoaderImpl.load_configuration)
        # Before 1.4 `FloatRange` added binary fractions: range(0.1,0.4,0.1) included
        # 0.30000000000000004 and 0.4. And sort(range(2,9,4)) gave other points than range(2,9,4).
        FloatRange.__post_init__ = _as_written  # type: ignore[method-assign]
        grammar_functions._sort_sweep = partial(_sorted, grammar_functions._sort_sweep)
        # Hydra composes the whole config to read `hydra.mode`, even if -m is given.
        Hydra.get_mode = _unless_given(Hydra.get_mode)
        # Before 1.4 every list of defaults was prepared for `${...}`: a sixth of the time.
        defaults_list._create_interpolation_map = _if_needed(
            defaults_list._create_interpolation_map
        )
    # `load_config` silently takes the first of several files of one name.
    ConfigRepository.load_config = _unshadowed(ConfigRepository.load_config)
    # `add_override` silently drops what a second file chooses for a group.
    Overrides.add_override = _unrivalled(Overrides.add_override)  # type: ignore[method-assign]
    # `_get_header_dict` misses `# @package` after a byte order mark, which some editors write.
    ConfigSource._get_header_dict = staticmethod(_unmarked(ConfigSource._get_header_dict))
    # Of YAML's numbers these are the ones that the command line, and YAML 1.2, do not have: a time
    # limit of `12:00:00` without quotes would be one of 43,200 minutes.
    _utils.get_yaml_loader = _decimal(_utils.get_yaml_loader)
    # `choice` does not take null: Hydra checks its arguments against these annotations.
    grammar_functions.choice.__annotations__["args"] |= None
    # Hydra copies its whole store to look into a group, a second of `--help`. It only reads the
    # copy, and copies what it takes from it.
    ConfigStore.__deepcopy__ = lambda self, memo: self  # type: ignore[attr-defined]


def _as_written(self: FloatRange) -> None:
    """The decimals as they were written, not those of the nearest binary fractions."""
    for name in ("start", "stop", "step"):
        setattr(self, name, Decimal(str(getattr(self, name))))


def _sorted(
    sort: Callable[..., Any], sweep: ChoiceSweep | RangeSweep, reverse: bool
) -> ChoiceSweep | RangeSweep:
    """Hydra's `sort`, which for a range changes the points."""
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
    """Hydra's loading of a config, followed by our checks."""

    @wraps(load)
    def load_configuration(self: ConfigLoaderImpl, *args: Any, **options: Any) -> DictConfig:
        try:
            config = load(self, *args, **options)
        except (YAMLError, UnicodeDecodeError) as error:
            reason = " ".join(str(error).split())
            raise ConfigError(f"a config file must be plain YAML in UTF-8: {reason}") from None
        if (args[0] if args else options["config_name"]) is not None:  # None for --hydra-help
            schema.refuse_code(config)
            schema.refuse_places(config)
        return config

    return load_configuration


def _unless_given(get_mode: Callable[..., Any]) -> Callable[..., Any]:
    """Hydra's reading of `hydra.mode`, skipped if -m is given, which suffices without a mode."""

    @wraps(get_mode)
    def given_mode(*args: Any, **options: Any) -> Any:
        flags = {"-m", "--multirun"} & set(sys.argv[1:])
        return None if flags else get_mode(*args, **options)

    return given_mode


def _if_needed(create: Callable[..., DictConfig]) -> Callable[..., DictConfig | None]:
    """Hydra's map of what `${...}` may name, made only for lists of defaults with a `${...}`."""

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
    """`hydra.mode` of the composed config, as in Hydra 1.3; None if it does not compose."""
    return super(ConfigLoaderImpl, self).get_mode(config_name, overrides)  # type: ignore[misc]


def _unshadowed(load: Callable[..., Any]) -> Callable[..., Any]:
    """Hydra's `load_config`; ConfigError if several files of that name differ."""

    @wraps(load)
    def load_config(self: ConfigRepository, config_path: str) -> Any:
        sources = [source for source in self.get_sources() if source.is_config(config_path)]
        files = [_file_of(source, config_path) for source in sources]
        for own in files[1:]:
            if own and (not files[0] or files[0].read_bytes() != own.read_bytes()):
                raise ConfigError(
                    f"{config_path.removesuffix('.yaml')} must be one file, got "
                    f"{files[0] or f'that of {sources[0].provider}'} and {own}: give your own "
                    "another name"
                )
        return load(self, config_path)

    return load_config


def _file_of(source: ConfigSource, config_path: str) -> Path | None:
    name = source._normalize_file_name(config_path)
    return Path(source.path) / name if source.scheme() == "file" else None


def _unmarked(read: Callable[[str], dict[str, str | None]]) -> Callable[..., Any]:
    """Hydra's reading of `# @package`, also after a byte order mark."""
    return wraps(read)(lambda text: read(text.removeprefix("\ufeff")))


def _decimal(make: Callable[[], Any]) -> Callable[[], Any]:
    """OmegaConf's `get_yaml_loader`; what NOT_DECIMAL matches is text, as on the command line."""

    @wraps(make)
    def get_yaml_loader() -> Any:
        loader = make()
        text, resolvers = ("tag:yaml.org,2002:str", NOT_DECIMAL), loader.yaml_implicit_resolvers
        more = {first: [text, *resolvers.get(first, [])] for first in "+-0123456789"}
        loader.yaml_implicit_resolvers = {**resolvers, **more}
        return loader

    return get_yaml_loader


def _unrivalled(add: Callable[..., None]) -> Callable[..., None]:
    """Hydra's `add_override`; ConfigError if two files choose different options of a group."""

    @wraps(add)
    def add_override(self: Overrides, parent_config_path: str, default: GroupDefault) -> None:
        key = default.get_override_key()
        winner = self.override_metadata.get(key)
        if winner and winner.containing_config_path and not winner.external_override:
            files = winner.containing_config_path, parent_config_path
            before, now = self.override_choices[key], default.value
            # Of one folder, the first file includes the second, and may override it.
            if before != now and len({file.rpartition("/")[0] for file in files}) > 1:
                raise ConfigError(
                    f"{key} must be chosen by one file, got {before} in {files[0]} and {now} in "
                    f"{files[1]}"
                )
        add(self, parent_config_path, default)

    return add_override
