"""Overrides -> RunConfig: composes with Hydra, converts to dataclasses, refuses what is not safe.

Not for: what a typo should have been (`typos.py`).
"""

from __future__ import annotations

import contextlib
import dataclasses
import re
import traceback
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from copy import copy, deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_type_hints

from hydra import __version__ as hydra_version
from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra._internal.hydra import Hydra
from hydra._internal.utils import create_config_search_path
from hydra.core.config_search_path import SearchPathQuery
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.plugins import Plugins
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from experiments import references, typos
from relora_core.config import ALPHA, ConfigError, RunConfig, get, scaled, walk

HYDRA_1_4 = tuple(map(int, hydra_version.split(".")[:2])) >= (1, 4)
VERSION_BASE: dict[str, Any] = {} if HYDRA_1_4 else {"version_base": "1.3"}
"""Without it Hydra 1.3 behaves like 1.1; with it Hydra 1.4 warns."""
INSTANTIATING = ("_target_", "_args_", "_partial_", "_recursive_", "_convert_", "()")
"""Keys that name code for Hydra, or Python's logging, to call."""
LOGGING = ("logging.StreamHandler", "logging.NullHandler", "logging.Formatter")
"""Classes that a config may name for logging; others write to files and sockets."""
FIXED: dict[str, Any] = {
    "run.dir": ".",
    "sweep.dir": ".",
    "sweep.subdir": "${hydra.job.num}",
    "output_subdir": None,
    "job.chdir": False,
    "job.env_set": {},
    "job.env_copy": [],
}
"""Keys of `hydra` that only conf/config.yaml may set: nothing here acts on them."""


NO_EXPERIMENT = ("~experiment", "train={steps: 1, batch_size: 1}")
"""Overrides for settings of evals alone: an experiment's limits are for runs that it trains."""


@dataclass(kw_only=True, slots=True)
class Composed(RunConfig):
    """What a command line composes: a run, and how runs are searched."""

    search: Any = None
    """The options of a search, as hydra_plugins declares them; not part of a run."""


def register() -> None:
    """Make the typed schema available to conf/config.yaml as `run_schema`, and `${divide:...}`."""
    if "run_schema.yaml" not in ConfigStore.instance().repo:
        store(name="run_schema", node=Composed)
    references.register()


def store(**options: Any) -> None:
    """Put a node into Hydra's store; an existing one is replaced."""
    # without `replace` Hydra 1.4 warns
    replacing: dict[str, Any] = {"replace": True} if HYDRA_1_4 else {}
    ConfigStore.instance().store(**options, **replacing)


def initialized() -> contextlib.AbstractContextManager[None]:
    """A context in which Hydra finds the options of conf/."""
    register()
    return initialize_config_dir(str(typos.CONF), **VERSION_BASE)


def to_run_config(cfg: DictConfig, *, overrides: Sequence[str] = ()) -> RunConfig:
    """A composed config as dataclasses; ConfigError if a value is missing or of the wrong type.

    `overrides` are those it was composed with: a scale among them replaces a file's alpha.
    """
    try:
        if "hydra" in cfg:
            cfg = OmegaConf.masked_copy(cfg, [str(k) for k in cfg if k not in ("hydra", "search")])
        if OmegaConf.get_type(cfg) is not Composed:  # composing keeps the type; a copy may lose it
            cfg = OmegaConf.merge(OmegaConf.structured(Composed), cfg)  # type: ignore[assignment]
        made = OmegaConf.to_object(cfg)
    except OmegaConfBaseException as error:
        _check_sections(cfg)
        raise ConfigError(typos.explain_value(error)) from None
    except AttributeError:  # a key that `+` added
        keys = _keys(OmegaConf.to_container(cfg))
        expected = {*typos.schema_keys(), "search"}
        unknown = next(k for k in keys if k not in expected and not k.startswith("search."))
        raise ConfigError(typos.unknown_key(unknown, f"+{unknown}")) from None
    assert isinstance(made, Composed)
    config = RunConfig(**{f.name: getattr(made, f.name) for f in dataclasses.fields(RunConfig)})
    try:
        leaves = list(walk(config))
    except AttributeError:
        _check_sections(cfg)
        raise
    for key, _, value in leaves:
        if value == 0 and isinstance(value, float):
            _put(config, key, 0.0)  # -0.0 would be another run
    return _scaled(config, overrides)


def _check_sections(cfg: DictConfig) -> None:
    """ConfigError if an interpolation gives a section a value that is no section."""
    # Without types: OmegaConf 2.4 checks them while it resolves, and then does not name the key.
    plain = OmegaConf.create(OmegaConf.to_container(cfg, resolve=False))  # type: ignore[arg-type]

    def visit(kind: type, prefix: str) -> None:
        for name, inner in get_type_hints(kind).items():
            if not dataclasses.is_dataclass(inner):
                continue
            key = f"{prefix}{name}"
            section = OmegaConf.select(plain, key, throw_on_resolution_failure=False)
            names = {f.name for f in dataclasses.fields(inner)}
            if section is not None and not (OmegaConf.is_dict(section) and {*section} <= names):
                raise ConfigError(typos.no_section(key, repr(section)))
            visit(inner, f"{key}.")  # type: ignore[arg-type]

    visit(RunConfig, "")


def _scaled(config: RunConfig, overrides: Sequence[str]) -> RunConfig:
    """The config with the alpha that follows from its scale, if it has one.

    A scale among the overrides replaces the alpha of a file, such as those of conf/relora; any
    other alpha must agree with the scale.
    """
    pairs = [text.lstrip("+").partition("=")[::2] for text in overrides]

    def named(name: str) -> bool:
        return any(k == f"relora.{name}" or (k == "relora" and f"{name}:" in v) for k, v in pairs)

    in_files = config.relora.alpha != ALPHA and not named("scale")
    return scaled(config, alpha_given=named("alpha") or in_files)


def _put(config: RunConfig, key: str, value: Any) -> None:
    section, _, name = key.rpartition(".")
    setattr(get(config, section) if section else config, name, value)


def refuse_search(cfg: DictConfig, overrides: Sequence[str] = ()) -> None:
    """ConfigError if a search is configured, but the sweeper does not search."""
    configured = any(text.lstrip("+~").startswith("search.") for text in overrides)
    if configured or (OmegaConf.is_dict(cfg.search) and cfg.search.get("space")):
        raise ConfigError(
            "search must be none without a search: add -m hydra/sweeper=search, or leave search out"
        )


def refuse_sweep(hydra: Any, cfg: Any = None) -> None:
    """ConfigError if a launcher, sweeper or axes are chosen, which one run would ignore."""
    choices, sweeper = hydra.runtime.choices, hydra.sweeper
    if "LocalLauncher" not in hydra.launcher._target_:
        raise ConfigError(
            f"hydra/launcher must be local for one run, got {choices['hydra/launcher']!r}: add -m, "
            "or hydra/launcher=local"
        )
    if "GridSweeper" not in sweeper._target_:
        raise ConfigError(
            f"hydra/sweeper={choices['hydra/sweeper']} needs -m, or --plan to see what it would do"
        )
    if sweeper.get("params") or sweeper.get("arms"):
        raise ConfigError("sweep must be none for one run: add -m, or leave sweep out")
    if cfg is not None and cfg.sweep.from_search is not None:
        raise ConfigError(
            f"sweep.from_search must be null for one run, got {cfg.sweep.from_search!r}: add -m"
        )


def refuse_code(cfg: DictConfig) -> None:
    """ConfigError if a config names code for Hydra to call, other than our launchers and sweepers.

    Hydra itself refuses a few names, such as `os.system`; others could do harm as well.
    """
    plugins = Plugins.instance().class_name_to_class
    for section in ("callbacks", "launcher", "sweeper", "hydra_logging", "job_logging"):
        node = OmegaConf.select(cfg, f"hydra.{section}")
        plain = OmegaConf.to_container(node, resolve=True) if OmegaConf.is_config(node) else node
        if section == "callbacks" and plain:
            raise ConfigError(f"hydra.callbacks must be empty, got {', '.join(map(str, plain))}")
        for key, value in _entries(plain, f"hydra.{section}"):
            name = key.rpartition(".")[2]
            if key in ("hydra.launcher._target_", "hydra.sweeper._target_"):
                if value not in plugins:
                    raise ConfigError(f"{key} must be left to hydra/{section}=NAME, got {value!r}")
            elif name in INSTANTIATING or (name == "class" and value not in LOGGING):
                raise ConfigError(
                    f"{key} must not be there: a config may call no code, got {value!r}"
                )


def refuse_places(cfg: DictConfig) -> None:
    """ConfigError if a file sets a key of FIXED."""
    plain: Any = OmegaConf.to_container(cfg.hydra, resolve=False) if "hydra" in cfg else None
    for key, fixed in FIXED.items() if isinstance(plain, dict) else ():
        section, _, name = key.rpartition(".")
        node: Any = plain.get(section) if section else plain
        if isinstance(node, dict) and node.get(name, fixed) != fixed:
            raise ConfigError(
                f"hydra.{key} must be left alone by a config file, got {node[name]!r}: output_dir "
                "says where everything goes, and hydra.launcher.setup what a job does first"
            )


def _entries(value: Any, prefix: str) -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of every entry of nested dicts and lists."""
    inside = value.items() if isinstance(value, dict) else enumerate(value or ())
    for key, item in inside:
        yield f"{prefix}.{key}", item
        if isinstance(item, (dict, list)):
            yield from _entries(item, f"{prefix}.{key}")


def compose(overrides: list[str], *, config_dir: str | None = None) -> RunConfig:
    """The config that `python run.py OVERRIDES` would run; ConfigError if it would refuse.

    `config_dir` is a folder of further options, like --config-dir of run.py.
    """
    started = GlobalHydra.instance().is_initialized()  # by run.py, with the same conf/
    context = nullcontext() if started else initialized()
    overrides = [typos.PLUS.sub(r"\1", text) for text in overrides]
    with context, _with_folder(config_dir), explaining(overrides):
        return to_run_config(hydra_compose("config", overrides), overrides=overrides)


@contextlib.contextmanager
def _with_folder(config_dir: str | None) -> Iterator[None]:
    """A context in which Hydra finds the options of one more folder, after those of conf/."""
    if config_dir is None:
        yield
        return
    if not Path(config_dir).is_dir():
        raise ConfigError(f"--config-dir must be a folder of options, got {config_dir!r}")
    before = GlobalHydra.instance().hydra
    search_path = create_config_search_path(str(typos.CONF))
    last = SearchPathQuery(provider="schema")
    search_path.prepend("command-line", str(Path(config_dir).absolute()), anchor=last)
    GlobalHydra.instance().clear()
    try:
        Hydra.create_main_hydra2(task_name="app", config_search_path=search_path)
        yield
    finally:
        GlobalHydra.instance().hydra = before


@contextlib.contextmanager
def explaining(arguments: Sequence[str]) -> Iterator[None]:
    """A context that turns Hydra's errors into a ConfigError of one line.

    Arguments that Hydra would misread are refused on entry.
    """
    try:
        typos.check_arguments(arguments)
        yield
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(typos.diagnose(arguments, error)) from None
    except ConfigError:
        raise
    except Exception as error:
        files = [frame.filename for frame in traceback.extract_tb(error.__traceback__)]
        if any(file.endswith("file_config_source.py") for file in files):
            reason = " ".join(str(error).split())
            raise ConfigError(f"a YAML file of the config cannot be read: {reason}") from None
        if not re.search(r"[/\\](hydra|omegaconf|antlr4)[/\\]", files[-1]):
            raise  # our own fault
        raise ConfigError(typos.diagnose(arguments, error)) from None


def _keys(values: Any, prefix: str = "") -> Iterator[str]:
    """Dotted keys of nested dicts, sections included."""
    for key, value in values.items():
        yield f"{prefix}{key}"
        if isinstance(value, dict):
            yield from _keys(value, f"{prefix}{key}.")


def _set(cfg: DictConfig, key: str, value: Any) -> None:
    try:
        OmegaConf.update(cfg, key, value, merge=False)
    except OmegaConfBaseException as error:
        raise ConfigError(typos.explain_value(error)) from None


class Template:
    """A composed config from which the configs of a grid are made: copies with other values.

    OmegaConf takes 10 ms to copy and convert a config. Here it checks and converts each value once,
    and only dataclasses are copied.
    """

    def __init__(self, cfg: DictConfig, *, overrides: Sequence[str] = ()) -> None:
        self.cfg, self._scratch, self._overrides = cfg, cfg.copy(), overrides
        self._typed: dict[tuple[str, str], Any] = {}
        self._config: RunConfig | None = None
        if not OmegaConf.missing_keys(cfg) and "${" not in str(cfg):
            self._config = to_run_config(cfg, overrides=overrides)
        self._leaves = {key for key, _, _ in walk(self._config)} if self._config else set()

    def changed(self, values: dict[str, Any]) -> RunConfig:
        """The config with values set at dotted keys; ConfigError if one is of the wrong type."""
        overrides = [*self._overrides, *values]
        if self._config is None or not all(map(self._is_plain, values, values.values())):
            cfg = self.cfg.copy()
            for key, value in values.items():
                _set(cfg, key, value)
            return to_run_config(cfg, overrides=overrides)
        made = _copied(self._config)
        if made.relora.scale is not None:  # its alpha follows from the r of the base
            made.relora.alpha = self.cfg.relora.alpha
        for key, value in values.items():
            _put(made, key, self._checked(key, value))
        return _scaled(made, overrides)

    def _is_plain(self, key: str, value: Any) -> bool:
        """Whether the value neither refers to others nor is missing."""
        return key in self._leaves and value != "???" and "${" not in str(value)

    def _checked(self, key: str, value: Any) -> Any:
        """The value converted to its key's type; ConfigError if it does not fit."""
        entry = key, repr(value)
        if entry not in self._typed:
            _set(self._scratch, key, value)
            typed = OmegaConf.select(self._scratch, key)
            typed = OmegaConf.to_object(typed) if OmegaConf.is_list(typed) else typed
            self._typed[entry] = typed + 0.0 if isinstance(typed, float) else typed  # no -0.0
        return deepcopy(self._typed[entry])


def _copied(section: Any) -> Any:
    """A deep copy of a dataclass that holds plain values, lists and dataclasses."""
    made = copy(section)
    for f in dataclasses.fields(section):
        value = getattr(section, f.name)
        if dataclasses.is_dataclass(value):
            setattr(made, f.name, _copied(value))
        elif isinstance(value, list):
            setattr(made, f.name, deepcopy(value))
    return made
