"""What a mistyped key, option or value should have been, in one line.

Not for: composing (`schema.py`), or whether a value of the right type makes sense
(`relora_core/config.py`).
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import re
import unicodedata
from collections.abc import Sequence
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any, get_args, get_type_hints

from hydra.core.config_store import ConfigNode, ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import ChoiceSweep, Override
from hydra.core.plugins import Plugins
from hydra.errors import ConfigCompositionException, HydraException, MissingConfigException
from omegaconf import OmegaConf
from omegaconf.errors import (
    ConfigAttributeError,
    ConfigKeyError,
    GrammarParseError,
    InterpolationResolutionError,
    OmegaConfBaseException,
)

from experiments.environment import CONF
from relora_core.config import ConfigError, RunConfig, nearest

HYDRA = ("launcher", "sweeper", "searchpath", "verbose", "help", "hydra_help")
"""Sections of `hydra` that have an effect here."""
WITH_VALUE = ("--config-name", "-cn", "--config-path", "-cp", "--config-dir", "-cd")
WITH_VALUE += ("--cfg", "-c", "--package", "-p", "--info", "-i", "--experimental-rerun")
"""Hydra's flags that take the argument after them."""
PLUGINS = ("hydra/launcher", "hydra/sweeper")
"""Groups with options that plugins register, beside the files in conf/."""
OTHERS = {
    **dict.fromkeys(("optuna", "ax", "nevergrad"), "search"),
    **dict.fromkeys(("joblib", "submitit_local"), "local"),
    "submitit_slurm": "slurm",
}
"""Other projects' launchers and sweepers for Hydra -> ours that does the same."""
PLUS = re.compile(r"^\+((?:experiment|search|sweep)=)")
"""Groups that have an option already, where many repositories want a plus."""
SWEEPERS = {
    "n_jobs": "hydra.launcher.max_parallel",
    "max_batch_size": "hydra.launcher.max_parallel",
    "direction": "search.objectives",
    "search_space": "search.space",
    "study_name": "sweep.name",
    "max_trials": "search.n_trials",
    "budget": "search.n_trials",
    "custom_search_space": "search.when",
    "max_failure_rate": "search.max_failures",
}
"""Keys of `hydra.sweeper` in those sweepers -> ours. Keys of `search` have the same name there."""
LAUNCHERS = {
    "timeout_min": "hydra.launcher.time",
    "array_parallelism": "hydra.launcher.max_parallel",
    "additional_parameters": "hydra.launcher.extra",
    "comment": "hydra.launcher.extra.comment",
    "exclude": "hydra.launcher.extra.exclude",
    "gres": "hydra.launcher.extra.gres",
    "mem_per_gpu": "hydra.launcher.extra.mem_per_gpu",
    "mem_per_cpu": "hydra.launcher.extra.mem_per_cpu",
    "cpus_per_gpu": "hydra.launcher.extra.cpus_per_gpu",
    "gpus_per_task": "hydra.launcher.extra.gpus_per_task",
}
"""Keys of `hydra.launcher` in the stock plugin for submitit -> ours."""
QUOTES = dict.fromkeys(range(0x2018, 0x2020))
"""Curly quotes, which editors and chats put in place of plain ones; for `str.translate`."""
LONGEST_GROUP = 100
"""A longer name is no folder of options, and a file system may raise an error for it."""


def overrides_among(arguments: Sequence[str]) -> list[str]:
    """The arguments of a command line that are neither flags nor a flag's value."""
    return [
        argument
        for before, argument in pairwise(["", *arguments])
        if not argument.startswith("-") and before not in WITH_VALUE
    ]


def flags_first(arguments: Sequence[str]) -> list[str]:
    """The arguments with all flags, and their values, before the overrides."""
    overrides = overrides_among(arguments)
    return [text for text in arguments if text not in overrides] + overrides


def option_folders(arguments: Sequence[str]) -> list[Path]:
    """Folders of options: conf/, and those that Hydra's search path or the arguments name."""
    texts = [text.partition("=")[2] for text in arguments if text.startswith("--config-dir=")]
    texts += [text for flag, text in pairwise(arguments) if flag in ("--config-dir", "-cd")]
    for text in overrides_among(arguments):
        if text.lstrip("+").startswith("hydra.searchpath="):
            with contextlib.suppress(HydraException):
                value: Any = OverridesParser.create().parse_override(text).value()
                texts += map(str, value if isinstance(value, list) else [value])
    if GlobalHydra.instance().is_initialized():
        search_path = GlobalHydra.instance().config_loader().get_search_path().get_path()
        texts += [str(entry.path) for entry in search_path]
    if HydraConfig.initialized():
        texts += map(str, HydraConfig.get().searchpath)
    paths = [Path(text.removeprefix("file://")) for text in texts]
    return list(dict.fromkeys([CONF, *(path for path in paths if path.is_dir())]))


def check_arguments(arguments: Sequence[str]) -> None:
    """ConfigError for an argument that Hydra would misread."""
    _check_flags(arguments)
    folders = option_folders(arguments)
    for text in overrides_among(arguments):
        try:
            override = OverridesParser.create().parse_override(text)
        except HydraException:
            continue  # Hydra will refuse it, and `diagnose` explains
        key = override.key_or_group
        if key.startswith(("hydra.", "hydra/")):
            _check_hydra(key, text)
        if override.is_delete() and key in schema_keys() and not _is_group(key, folders):
            raise ConfigError(f"{key} cannot be left out: expected {key}=VALUE, got {text!r}")
        if override.package is not None and _is_group(key, folders):
            raise ConfigError(f"{key} goes to its own place: expected {key}=OPTION, got {text!r}")
        for value in _values(override):
            _check_value(key, value, text, folders)


def _check_flags(arguments: Sequence[str]) -> None:
    for before, argument in pairwise(["", *arguments]):
        flag, equals, value = argument.partition("=")
        if argument.startswith("-") and equals and flag not in WITH_VALUE:
            name = flag.lstrip("-")
            raise ConfigError(
                f"{argument!r} is no flag: expected KEY=VALUE without dashes, {name}=..."
            )
        folder = argument if before in ("--config-dir", "-cd") else None
        folder = value if equals and flag in ("--config-dir", "-cd") else folder
        if folder is not None and not Path(folder).is_dir():
            raise ConfigError(f"--config-dir must be a folder of options, got {folder!r}")


def _check_hydra(key: str, text: str) -> None:
    section = re.split(r"[./]", key)[1]
    if section not in HYDRA or key.endswith("._target_"):
        raise ConfigError(
            f"{key} must be one of hydra.{', hydra.'.join(HYDRA[:3])} and hydra/launcher, "
            f"hydra/sweeper, got {text!r}: output_dir says where everything goes"
        )
    value = text.partition("=")[2]
    with contextlib.suppress(HydraException):
        if OverridesParser.create().parse_override(text).is_sweep_override():
            quoted = f"; a text with commas is quoted: '{key}=\"{value}\"'"
            raise ConfigError(
                f"{key} must be the same for all runs of a command, got {value!r}"
                + (quoted if _expected(key).startswith(("text", "a value")) else "")
            )


def _values(override: Override) -> list[Any]:
    """The value of an override, or all of its choices; none for glob(), which needs a loader."""
    if not override.is_sweep_override():
        return [] if override.is_delete() else [override.value()]
    choices = isinstance(override.value(), ChoiceSweep)
    return list(override.sweep_iterator()) if choices else []


def _check_value(key: str, value: Any, text: str, folders: Sequence[Path]) -> None:
    if not key or ("@" in key and not key.split("@")[0]):
        raise ConfigError(f"{text!r} is not an override: expected KEY=VALUE, like relora.r=16")
    if _is_group(key, folders) and not isinstance(value, (str, dict)):
        names = value if isinstance(value, list) else [value]
        if not names or not all(isinstance(name, str) for name in names):
            raise ConfigError(_no_option(key, str(value), folders))
    if key.startswith("hydra/") and str(value) not in _options(key, folders):
        raise ConfigError(_no_option(key, str(value), folders))
    text_or_number = value is not None and not isinstance(value, (list, dict))
    if _expected(key).startswith("a list") and text_or_number and "${" not in str(value):
        near = f"; nearest valid: {key}=[{value}]" if "text" in _expected(key) else ""
        raise ConfigError(f"{key} must be {_expected(key)}, got {value!r}{near}")
    number = str(value).strip().lstrip("+-").isdecimal() and str(value) not in ("0", "1")
    if _expected(key) == "true or false" and number:
        raise ConfigError(f"{key} must be true or false, got {value}")


def diagnose(arguments: Sequence[str], error: Exception) -> str:
    """One line for what Hydra refused: key, value, expectation, nearest choice."""
    missing = isinstance(error, MissingConfigException)
    # Hydra looks for all options first: any other error means that they exist.
    have_options = isinstance(error, ConfigCompositionException) and not missing
    folders = option_folders(arguments)
    for text in overrides_among(arguments):
        if line := _diagnose_override(text, folders=folders, have_options=have_options):
            return line
        if "Ambiguous value" in str(error) and text in str(error):
            return f"{text} gives several values: expected one, or -m to run all of them"
    line = _diagnose_file(error, folders) or _diagnose_cause(error, overrides_among(arguments))
    return line or " ".join(str(error).split())


def _diagnose_file(error: Exception, folders: Sequence[Path]) -> str | None:
    """One line for an error in a config file."""
    text = " ".join(str(error).split())
    no_key = re.search(r"In '(.*?)': ConfigKeyError .*full_key: (\S+)", text)
    if no_key and (line := _other_launcher(no_key[2], file=no_key[1])):
        return line
    pattern = r"In '((experiment|sweep)/[^']*)': .*full_key: (experiment|sweep\.(hydra|sweep))\s"
    if no_package := re.search(pattern, f"{text} "):
        return f"{no_package[1]} must begin with '# @package _global_', got no such line"
    if no_key and (line := _no_key(no_key[2], f" (in {no_key[1]})")):
        return line
    pattern = r"In '(.*?)': ValidationError .*?(Value '.*?' (?:of|could|is).*) full_key: (\S+)"
    if wrong_type := re.search(pattern, text):
        file, message, key = wrong_type.groups()
        return f"{_explain_text(key, message)} (in {file})"
    no_option = re.search(r"In '(.*?)': Could not find '/?([^']*)/([^'/]*)'", text)
    if no_option and _options(no_option[2], folders):
        file, group, name = no_option.groups()
        # An option that the command line chooses is reported as one of config.yaml.
        where = "" if file.rpartition("/")[2] == "config" else f" (in {file})"
        return f"{_no_option(group, name, folders)}{where}"
    return None


def _diagnose_cause(error: BaseException, overrides: Sequence[str]) -> str | None:
    """One line for the error of OmegaConf that caused this one of Hydra's."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, (InterpolationResolutionError, GrammarParseError)):
            pairs = [text.partition("=") for text in overrides]
            interpolated = [key.lstrip("+") for key, _, value in pairs if "${" in value]
            key = cause.full_key or ""
            key = interpolated[0] if interpolated and key not in schema_keys() else key
            return _explain_text(key or "a value", str(cause.msg or cause))
        if isinstance(cause, OmegaConfBaseException):
            return explain_value(cause)
        cause = cause.__cause__
    return None


def _diagnose_override(
    text: str, *, folders: Sequence[Path], have_options: bool = False
) -> str | None:
    """One line for a mistake in an override, if it has one."""
    try:
        override = OverridesParser.create().parse_override(text)
    except HydraException as error:
        return _not_evaluated(text, str(error)) or _unreadable(text, folders)
    key = override.key_or_group
    if key.startswith("hydra."):
        return _elsewhere(key, text) or _diagnose_launcher(key, text)
    if key.startswith("search."):
        return _diagnose_search(key, text)
    if _is_group(key, folders):
        for value in _values(override):
            is_name = not isinstance(value, (dict, list))
            if not have_options and is_name and str(value) not in _options(key, folders):
                return _no_option(key, str(value), folders)
        return None
    keys = schema_keys()
    if key not in keys:
        return unknown_key(key, text)
    if override.is_add() and text.startswith("+") and not text.startswith("++"):
        return f"{key} is there already: expected {text[1:]}, got {text!r}"
    return None


def _not_evaluated(text: str, message: str) -> str | None:
    """One line if a function of Hydra's grammar does not exist, or refused its arguments."""
    called = re.search(r"while evaluating '.*?': (.*)", message, re.S)
    if not called:
        return None
    reason = " ".join(called[1].split())
    reason = _no_cast(text) if not reason or reason.startswith("assert ") else reason
    if unknown := re.search(r"Unknown function '(.*?)' Available: (\S+)", reason):
        reason += f".{nearest(unknown[1], unknown[2].split(','))}"
    return f"{text!r} cannot be evaluated: {reason}"


def _no_cast(text: str) -> str:
    """The reason if a function gives none: so do Hydra's casts when they fail for null."""
    key, _, value = text.partition("=")
    cast = re.fullmatch(r"(int|float|str|bool)\((.*)\)", value, re.S)
    near = f"; nearest valid: {key}={cast[2]}" if cast else ""
    return f"{cast[1] + '()' if cast else 'a cast'} takes no null{near}"


def _unreadable(text: str, folders: Sequence[Path]) -> str:
    """One line that says which part of a text Hydra's grammar cannot read."""
    line = f"{text!r} is not an override: expected KEY=VALUE"
    name, equals, value = text.partition("=")
    key, value = name.lstrip("+~"), value.strip()
    if not equals:
        key, _, value = text.partition(":")
        near = f"; nearest valid: {key}={value.strip()}" if key in schema_keys() and value else ""
        return f"{line}, for example relora.r=16{near}"
    is_key = key in schema_keys() or _is_group(key, folders)
    if not is_key and not key.startswith(("hydra", "search.")):
        return unknown_key(key, text)
    if value.endswith(","):
        return f"{line}, got one that ends in a comma: values of an axis go without spaces"
    plain = unicodedata.normalize("NFKC", value).translate(QUOTES)
    if plain != value and plain.isascii():
        return f"{key} must be {_expected(key)}, got {value!r}; nearest valid: {key}={plain}"
    if listed := re.fullmatch(r"[{(]([^{}()]*)[})]", value):
        return f"{line}, got {value}; values of an axis go without brackets, {key}={listed[1]}"
    if "'" in value or value.count("{") != value.count("}"):
        return f"{line}, got quotes or braces that do not close"
    home = re.search(r"(?:^|(?<=[/:]))~\w*(?=/|$)", value)
    if home and (path := os.path.expanduser(home[0])) != home[0]:
        near = f"{key}={value[: home.start()]}{path}{value[home.end() :]}"
        line = f"{text!r} must have {home[0]} written out, as no shell does so in there"
        return f"{line}; nearest valid: {near}"
    return (
        f"{text!r} cannot be read: a value with other signs than letters, digits and -_./ is "
        f"quoted, '{key}=\"{value}\"'"
    )


def _no_option(key: str, value: str, folders: Sequence[Path]) -> str:
    names = _options(key, folders)
    near = f" Did you mean '{OTHERS[value]}'?" if value in OTHERS and key in PLUGINS else ""
    return f"{key} must be one of {', '.join(names)}, got {value!r}.{near or nearest(value, names)}"


def _options(group: str, folders: Sequence[Path]) -> list[str]:
    """Names of a group's options: files, and those that our plugins have registered."""
    ours = [name for name, one in _stored(group).items() if one.provider == "relora_sweeps"]
    names = {*options(group, folders), *(name.removesuffix(".yaml") for name in ours)}
    return sorted(names - {"basic"})


def _elsewhere(key: str, text: str = "") -> str | None:
    """One line for a key of another project's launcher or sweeper: what it is called here."""
    section, _, name = key.removeprefix("hydra.").partition(".")
    name = name.split(".")[0]
    ours = {"launcher": LAUNCHERS, "sweeper": SWEEPERS}.get(section, {}).get(name)
    if section == "sweeper" and ours is None and name in _registered("search_schema.yaml").node:
        ours = f"search.{name}"
    if ours is None:
        return None
    with_search = " with hydra/sweeper=search" if ours.startswith("search") else ""
    got = f" ({text})" if text else ""
    return f"{key} is not a known key{got}. Did you mean '{ours}'{with_search}?"


def _diagnose_search(key: str, text: str) -> str | None:
    keys = [f"search.{name}" for name in _registered("search_schema.yaml").node]
    if ".".join(key.split(".")[:2]) in keys:
        return None
    return f"{key} is not a known key ({text}).{nearest(key, keys)}"


def unknown_key(key: str, text: str) -> str:
    """One line for a key that RunConfig does not have, and the override that names it."""
    return f"{key} is not a known key ({text}).{_nearest_key(key, schema_keys())}"


def _diagnose_launcher(key: str, text: str) -> str | None:
    """One line for a mistyped option of our own launchers."""
    section, _, name = key.rpartition(".")
    if section == "hydra.launcher.extra" and not text.startswith("+"):
        return f"{key} must be added with a plus: +{text}"
    if section.startswith("hydra.launcher."):  # an entry of a dict
        section, _, name = section.rpartition(".")
    if section != "hydra.launcher":
        return None
    nodes = _stored("hydra/launcher").values()
    names = sorted({str(k) for option in nodes for k in option.node if not str(k).startswith("_")})
    if name in names:
        return None
    hint = nearest(name, names).replace("'", f"'{section}.", 1)
    return f"{key} is not a known key ({text})." + (hint or f" It has {', '.join(names)}.")


def _other_launcher(key: str, *, file: str = "") -> str | None:
    """One line for an option of a launcher, or sweeper, that was not chosen."""
    section, _, name = key.removeprefix("hydra.").partition(".")
    if section not in ("launcher", "sweeper") or not name:
        return None
    if line := _elsewhere(key, f"in {file}" if file else ""):
        return line
    nodes = {n.removesuffix(".yaml"): o.node for n, o in _stored(f"hydra/{section}").items()}
    names = [n for n, node in nodes.items() if n != "basic" and name.split(".")[0] in node]
    if not names:
        return _diagnose_launcher(key, f"in {file}") if file else None
    where = f" (in {file}, whose defaults may say '- override /hydra/{section}: ...')"
    return f"{key} needs hydra/{section}={' or '.join(names)}{where if file else ''}"


def explain_value(error: OmegaConfBaseException) -> str:
    """One line for a value, or a key, that OmegaConf refused."""
    key = error.full_key or str(error.key)
    if isinstance(error, (ConfigKeyError, ConfigAttributeError)) and (
        line := _other_launcher(key) or _no_key(key)
    ):
        return line
    return _explain_text(key, str(error.msg or error))


def _no_key(key: str, where: str = "") -> str | None:
    """One line for a key that RunConfig does not have; None for keys of `hydra` and `search`."""
    keys = schema_keys()
    if key in keys or key.startswith(("hydra", "search")):
        return None
    return f"{key} is not a known key{where}.{_nearest_key(key, keys)}"


def _explain_text(key: str, message: str) -> str:
    """One line from OmegaConf's message on a value."""
    expected = _expected(key)
    if no_key := re.match(r"Interpolation key '(.*?)' not found", message):
        name = no_key.group(1)
        near = _nearest_key(name, schema_keys())
        shell = "" if near else " A variable of the shell is $NAME, or ${oc.env:NAME}."
        return f"{key}: ${{{name}}} is none, since there is no such key.{near}{shell}"
    if re.match(
        r"(token recognition error|mismatched input|no viable|extraneous|missing)", message
    ):
        line = message.splitlines()[0]
        return f"{key}: ${{...}} must name a key, or a variable as ${{oc.env:NAME}}, got {line}"
    if "while resolving interpolation: " in message:
        reason = message.splitlines()[0].partition("interpolation: ")[2].strip('"')
        return f"{key}: {reason}"
    if re.fullmatch(r"\[?\d+\]?", key):  # an entry of a list in a list: the outer key is lost
        return f"an entry of a list must be a list of integers, got {message}"
    value = re.search(r"Value '(.*?)' (?:of type|could not|is not)", message, re.S)
    if "is not Optional" in message:
        return f"{key} must be {expected}, got null"
    if "is not a ListConfig" in message or "with ListConfig" in message:
        return f"{key} must be {expected}, got no list: it stands in brackets, {key}=[...]"
    if wrong := re.search(r"is not a subclass of \w+\. value: (.*)", message):
        return no_section(key, wrong.group(1))
    if value:
        got = value.group(1)
        if got.startswith("[") and "list" not in expected:
            return f"{key} must be {expected}, got {got!r}{_as_axis(key, got)}"
        integer = expected.startswith("an integer") and re.fullmatch(r"-?\d{1,15}\.0", got)
        near = f"; nearest valid: {got[:-2]}" if integer else ""
        near = "; nearest valid: null" if got == "None" and "null" in expected else near
        return f"{key} must be {expected}, got '{got}'{near}"
    if "issing mandatory value" in message:
        return f"{key} must be set ({expected})"
    return f"{key}: {message.splitlines()[0]}"


def _as_axis(key: str, got: str) -> str:
    """A hint for values in brackets: how an axis of them is written."""
    inside = got[1:-1].strip()
    if not inside or set(inside) & set("[]{}"):
        return ""
    return f"; values of an axis go without brackets, {key}={inside.replace(', ', ',')}"


def no_section(key: str, got: str) -> str:
    """One line for a value in place of a section."""
    below = [name for name in schema_keys() if name.startswith(f"{key}.")]
    return f"{key} must hold keys such as {below[0] if below else f'{key}.KEY'}, got {got}"


@cache
def schema_keys() -> list[str]:
    """Every dotted key of RunConfig, sections included."""
    keys: list[str] = []

    def visit(cls: type, prefix: str) -> None:
        for name, kind in get_type_hints(cls).items():
            keys.append(prefix + name)
            if dataclasses.is_dataclass(kind):
                visit(kind, f"{prefix}{name}.")  # type: ignore[arg-type]

    visit(RunConfig, "")
    return keys


def _expected(key: str) -> str:
    """The type of a knob in words."""
    kind: Any = RunConfig
    parts = key.split(".")
    if parts[0] == "hydra":
        section, parts = "/".join(parts[:2]), parts[2:]
        nodes = [one.node for one in _stored(section).values() if parts and parts[0] in one.node]
        kind = OmegaConf.get_type(nodes[0]) if nodes else None
    for part in parts:
        part = part.split("[")[0]
        if not dataclasses.is_dataclass(kind):
            return "a value"
        kind = get_type_hints(kind).get(part)  # type: ignore[arg-type]
    plain = {int: "an integer", float: "a number", str: "text", bool: "true or false"}
    if kind in plain:
        return plain[kind]
    names = [plain.get(k, "null") for k in get_args(kind)] if get_args(kind) else []
    if "list[list" in str(kind):
        return "a list of lists of integers"
    if "list" in str(kind):
        return "a list of text" + ", like [attention,swiglu]" * (parts[-1] == "target_modules")
    return " or ".join(dict.fromkeys(names)) or "a section"


def options(group: str, folders: Sequence[Path] | None = None) -> list[str]:
    """Names of the files of a config group, in conf/ or in all of `folders`."""
    return sorted({p.stem for folder in folders or [CONF] for p in (folder / group).glob("*.yaml")})


def _is_group(key: str, folders: Sequence[Path]) -> bool:
    if key in PLUGINS:
        return True
    return 0 < len(key) < LONGEST_GROUP and bool(options(key, folders))


def groups() -> list[str]:
    """Config groups of conf/, as paths."""
    return sorted({str(p.parent.relative_to(CONF)) for p in CONF.glob("**/*.yaml")} - {"."})


def _stored(group: str) -> dict[str, Any]:
    """Options of a group that plugins have registered: `<name>.yaml` -> node."""
    repo = _registered(group)
    # A group in a group is a dict among them: Optuna's plugin registers hydra/sweeper/sampler.
    return {name: one for name, one in repo.items() if isinstance(one, ConfigNode)}


def _registered(path: str) -> Any:
    """What plugins have registered as this group or `<name>.yaml`."""
    Plugins.instance()  # imports the plugins, which then register their options
    repo: Any = ConfigStore.instance().repo
    for part in path.split("/"):
        repo = repo.get(part, {})
    return repo


def _nearest_key(key: str, keys: list[str]) -> str:
    """A hint: the nearest key of the same section, else of all, else the keys of that section."""
    section = key.rpartition(".")[0]
    same = [k for k in keys if section and k.startswith(f"{section}.")]
    if hint := nearest(key, same):
        return hint
    by_leaf = [k for k in keys if k.rpartition(".")[2] == key.rpartition(".")[2]]
    if by_leaf:
        return f" Did you mean '{by_leaf[0]}'?"
    return nearest(key, keys + groups()) or (
        f" {section} has {', '.join(k.rpartition('.')[2] for k in same)}." if same else ""
    )
