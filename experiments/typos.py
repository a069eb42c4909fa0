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
from itertools import pairwise
from pathlib import Path
from typing import Any, get_args, get_type_hints

from hydra.core.config_store import ConfigStore
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

from relora_core.config import ConfigError, RunConfig, nearest

CONF = Path(__file__).resolve().parent.parent / "conf"
HYDRA = ("launcher", "sweeper", "searchpath", "verbose", "help", "hydra_help")
"""Sections of `hydra` that have an effect here; where things go is output_dir's to say."""
WITH_VALUE = ("--config-name", "-cn", "--config-path", "-cp", "--config-dir", "-cd")
WITH_VALUE += ("--cfg", "-c", "--package", "-p", "--info", "-i", "--experimental-rerun")
"""Hydra's flags that take the word after them."""
HYDRAS = ("hydra/launcher", "hydra/sweeper")
OTHERS = {
    **dict.fromkeys(("optuna", "ax", "nevergrad"), "search"),
    **dict.fromkeys(("joblib", "submitit_local"), "local"),
    "submitit_slurm": "slurm",
}
"""Hydra's other launchers and sweepers -> what stands in their place here."""
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
"""Keys of `hydra.sweeper` in Hydra's other sweepers -> ours; those of `search` are as there."""
QUOTES = dict.fromkeys(range(0x2018, 0x2020))
"""Curly quotes, as an editor or a chat puts them in the place of plain ones."""
LONGEST_GROUP = 100
"""No folder of options has a longer name; the file system may not take one that has."""


def overrides_among(words: Sequence[str]) -> list[str]:
    """The words of a command line that are neither flags nor a flag's value."""
    before = ["", *words]
    return [w for b, w in zip(before, words, strict=False) if w[:1] != "-" and b not in WITH_VALUE]


def places_of(words: Sequence[str]) -> list[Path]:
    """Folders of options: conf/, those that Hydra was begun with, and those that the words name."""
    texts = [word.partition("=")[2] for word in words if word.startswith("--config-dir=")]
    texts += [w for b, w in pairwise(words) if b in ("--config-dir", "-cd")]
    for text in overrides_among(words):
        if text.lstrip("+").startswith("hydra.searchpath="):
            with contextlib.suppress(HydraException):
                value: Any = OverridesParser.create().parse_override(text).value()
                texts += map(str, value if isinstance(value, list) else [value])
    if GlobalHydra.instance().is_initialized():
        known = GlobalHydra.instance().config_loader().get_search_path().get_path()
        texts += [str(place.path) for place in known]
    if HydraConfig.initialized():
        texts += map(str, HydraConfig.get().searchpath)
    paths = [Path(text.removeprefix("file://")) for text in texts]
    return list(dict.fromkeys([CONF, *(path for path in paths if path.is_dir())]))


def check_words(words: Sequence[str]) -> None:
    """ConfigError for an override that Hydra would take for something else than was meant."""
    _check_flags(words)
    places = places_of(words)
    for text in overrides_among(words):
        try:
            override = OverridesParser.create().parse_override(text)
        except HydraException:
            continue  # Hydra says so, and `diagnose` how
        key = override.key_or_group
        if key.startswith(("hydra.", "hydra/")):
            _check_hydra(key, text)
        if override.is_delete() and key in schema_keys() and not _is_group(key, places):
            raise ConfigError(f"{key} cannot be left out: expected {key}=VALUE, got {text!r}")
        if override.package is not None and _is_group(key, places):
            raise ConfigError(f"{key} goes to its own place: expected {key}=OPTION, got {text!r}")
        for value in _values(override):
            _check_value(key, value, text, places)


def _check_flags(words: Sequence[str]) -> None:
    for before, word in pairwise(["", *words]):
        flag, equals, value = word.partition("=")
        if word[:1] == "-" and equals and flag not in WITH_VALUE:
            name = flag.lstrip("-")
            raise ConfigError(f"{word!r} is no flag: expected KEY=VALUE without dashes, {name}=...")
        folder = word if before in ("--config-dir", "-cd") else None
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
    words = text.partition("=")[2]
    with contextlib.suppress(HydraException):
        if OverridesParser.create().parse_override(text).is_sweep_override():
            quoted = f"; a text with commas is quoted: '{key}=\"{words}\"'"
            raise ConfigError(
                f"{key} must be the same for all runs of a command, got {words!r}"
                + (quoted if _expected(key).startswith(("text", "a value")) else "")
            )


def _values(override: Override) -> list[Any]:
    """Of an override, or of each choice in one; none where they are for a loader to say."""
    if not override.is_sweep_override():
        return [] if override.is_delete() else [override.value()]
    chosen = override.value()
    return list(override.sweep_iterator()) if isinstance(chosen, ChoiceSweep) else []


def _check_value(key: str, value: Any, text: str, places: Sequence[Path]) -> None:
    if not key or ("@" in key and not key.split("@")[0]):
        raise ConfigError(f"{text!r} is not an override: expected KEY=VALUE, like relora.r=16")
    if _is_group(key, places) and not isinstance(value, (str, dict)):
        names = value if isinstance(value, list) else [value]
        if not names or not all(isinstance(name, str) for name in names):
            raise ConfigError(_no_option(key, str(value), places))
    if key.startswith("hydra/") and str(value) not in _options(key, places):
        raise ConfigError(_no_option(key, str(value), places))
    text_or_number = value is not None and not isinstance(value, (list, dict))
    if _expected(key).startswith("a list") and text_or_number and "${" not in str(value):
        near = f"; nearest valid: {key}=[{value}]" if "text" in _expected(key) else ""
        raise ConfigError(f"{key} must be {_expected(key)}, got {value!r}{near}")
    number = str(value).strip().lstrip("+-").isdecimal() and str(value) not in ("0", "1")
    if _expected(key) == "true or false" and number:
        raise ConfigError(f"{key} must be true or false, got {value}")


def diagnose(overrides: Sequence[str], error: Exception) -> str:
    """One line for an override that Hydra refused: key, value, expectation, nearest choice."""
    missing = isinstance(error, MissingConfigException)
    found = isinstance(error, ConfigCompositionException) and not missing
    places = places_of(overrides)
    for text in overrides_among(overrides):
        line = _diagnose_one(text, places=places, found=found)
        if line:
            return line
        if "Ambiguous value" in str(error) and text in str(error):
            return f"{text} gives several values: expected one, or -m to run all of them"
    in_file = re.search(r"In '(.*?)': ConfigKeyError .*full_key: (\S+)", str(error), re.S)
    if in_file and (line := _other_launcher(in_file.group(2), file=in_file.group(1))):
        return line
    pattern = r"In '((experiment|sweep)/[^']*)': .*full_key: (experiment|sweep\.(hydra|sweep))\s"
    if astray := re.search(pattern, f"{error} ", re.S):
        return f"{astray.group(1)} must begin with '# @package _global_', got no such line"
    if in_file and (line := _no_key(in_file.group(2), f" (in {in_file.group(1)})")):
        return line
    typed = r"In '(.*?)': ValidationError .*?(Value '.*?' (?:of|could|is).*) full_key: (\S+)"
    if in_file := re.search(typed, " ".join(str(error).split())):
        file, told, key = in_file.groups()
        return f"{_explain_text(key, told)} (in {file})"
    absent = re.search(r"In '(.*?)': Could not find '/?([^']*)/([^'/]*)'", str(error))
    if absent and _options(absent.group(2), places):
        file, group, name = absent.groups()
        told = (
            "" if file.rpartition("/")[2] == "config" else f" (in {file})"
        )  # whoever overrides it
        return f"{_no_option(group, name, places)}{told}"
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, (InterpolationResolutionError, GrammarParseError)):
            pairs = [word.partition("=") for word in overrides_among(overrides)]
            naming = [key.lstrip("+") for key, _, value in pairs if "${" in value]
            key = cause.full_key or ""
            key = naming[0] if naming and not schema_keys().count(key) else key
            return _explain_text(key or "a value", str(cause.msg or cause))
        if isinstance(cause, OmegaConfBaseException):
            return explain_value(cause)
        cause = cause.__cause__
    return " ".join(str(error).split())


def _diagnose_one(text: str, *, places: Sequence[Path], found: bool = False) -> str | None:
    """`found`: all options were, wherever Hydra looks."""
    try:
        override = OverridesParser.create().parse_override(text)
    except HydraException as error:
        if called := re.search(r"while evaluating '.*?': (.*)", str(error), re.S):
            said = " ".join(called.group(1).split())
            said = _no_cast(text) if not said or said.startswith("assert ") else said
            if unknown := re.search(r"Unknown function '(.*?)' Available: (\S+)", said):
                said += f".{nearest(unknown.group(1), unknown.group(2).split(','))}"
            return f"{text!r} cannot be evaluated: {said}"
        return _unreadable(text, places)
    key = override.key_or_group
    if key.startswith("hydra."):
        return _elsewhere(key, text) or _diagnose_launcher(key, text)
    if key.startswith("search."):
        return _diagnose_search(key, text)
    if _is_group(key, places):
        for value in _values(override):
            named = not isinstance(value, (dict, list))
            if not found and named and str(value) not in _options(key, places):
                return _no_option(key, str(value), places)
        return None
    keys = schema_keys()
    if key not in keys:
        return unknown_key(key, text)
    if override.is_add() and text.startswith("+") and not text.startswith("++"):
        return f"{key} is there already: expected {text[1:]}, got {text!r}"
    return None


def _no_cast(text: str) -> str:
    """Of a value whose function says nothing: Hydra's casts of null."""
    key, _, value = text.partition("=")
    whole = re.fullmatch(r"(int|float|str|bool)\((.*)\)", value, re.S)
    near = f"; nearest valid: {key}={whole[2]}" if whole else ""
    return f"{whole[1] + '()' if whole else 'a cast'} takes no null{near}"


def _unreadable(text: str, places: Sequence[Path]) -> str:
    """One line for a word that Hydra's grammar cannot read: which part of it is the trouble."""
    line = f"{text!r} is not an override: expected KEY=VALUE"
    name, equals, value = text.partition("=")
    key, value = name.lstrip("+~"), value.strip()
    if not equals:
        key, _, value = text.partition(":")
        near = f"; nearest valid: {key}={value.strip()}" if key in schema_keys() and value else ""
        return f"{line}, for example relora.r=16{near}"
    known = key in schema_keys() or _is_group(key, places)
    if not known and not key.startswith(("hydra", "search.")):
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
    if home and (place := os.path.expanduser(home[0])) != home[0]:
        near = f"{key}={value[: home.start()]}{place}{value[home.end() :]}"
        there = f"{text!r} must have {home[0]} written out, as no shell does so in there"
        return f"{there}; nearest valid: {near}"
    return (
        f"{text!r} cannot be read: a value with other signs than letters, digits and -_./ is "
        f"quoted, '{key}=\"{value}\"'"
    )


def _no_option(key: str, value: str, places: Sequence[Path]) -> str:
    known = _options(key, places)
    near = f" Did you mean '{OTHERS[value]}'?" if value in OTHERS and key in HYDRAS else ""
    return f"{key} must be one of {', '.join(known)}, got {value!r}.{near or nearest(value, known)}"


def _options(group: str, places: Sequence[Path]) -> list[str]:
    """Of a config group: files, and what our plugins have registered."""
    ours = [name for name, one in _stored(group).items() if one.provider == "relora_sweeps"]
    names = {*options(group, places), *(name.removesuffix(".yaml") for name in ours)}
    return sorted(names - {"basic"})


def _elsewhere(key: str, text: str = "") -> str | None:
    """One line for an option of another project's sweeper or launcher, which is a key here."""
    section, _, name = key.removeprefix("hydra.").partition(".")
    if section != "sweeper":
        return None
    name = name.split(".")[0]
    known = list(_stored("search_schema.yaml").node)  # type: ignore[attr-defined]
    there = SWEEPERS.get(name) or (f"search.{name}" if name in known else None)
    if there is None:
        return None
    with_search = " with hydra/sweeper=search" if there.startswith("search") else ""
    got = f" ({text})" if text else ""
    return f"{key} is not a known key{got}. Did you mean '{there}'{with_search}?"


def _diagnose_search(key: str, text: str) -> str | None:
    known = [f"search.{name}" for name in _stored("search_schema.yaml").node]  # type: ignore[attr-defined]
    if ".".join(key.split(".")[:2]) in known:
        return None
    return f"{key} is not a known key ({text}).{nearest(key, known)}"


def unknown_key(key: str, text: str) -> str:
    return f"{key} is not a known key ({text}).{_nearest_key(key, schema_keys())}"


def _diagnose_launcher(key: str, text: str) -> str | None:
    """A typo in an option of our own launchers."""
    section, _, name = key.rpartition(".")
    if section == "hydra.launcher.extra" and not text.startswith("+"):
        return f"{key} must be added with a plus: +{text}"
    if section.startswith("hydra.launcher."):  # an entry of a dict
        section, _, name = section.rpartition(".")
    if section != "hydra.launcher":
        return None
    nodes = _stored("hydra/launcher").values()
    known = sorted({str(k) for option in nodes for k in option.node if not str(k).startswith("_")})
    if name in known:
        return None
    hint = nearest(name, known).replace("'", f"'{section}.", 1)
    return f"{key} is not a known key ({text})." + (hint or f" It has {', '.join(known)}.")


def _other_launcher(key: str, *, file: str = "") -> str | None:
    """One line for an option that only another launcher, or sweeper, than the chosen one has."""
    section, _, name = key.removeprefix("hydra.").partition(".")
    if section not in ("launcher", "sweeper") or not name:
        return None
    if line := _elsewhere(key, f"in {file}" if file else ""):
        return line
    nodes = {n.removesuffix(".yaml"): o.node for n, o in _stored(f"hydra/{section}").items()}
    having = [n for n, node in nodes.items() if n != "basic" and name.split(".")[0] in node]
    if not having:
        return None
    told = (
        f" (in {file}, whose defaults may say '- override /hydra/{section}: ...')" if file else ""
    )
    return f"{key} needs hydra/{section}={' or '.join(having)}{told}"


def explain_value(error: OmegaConfBaseException) -> str:
    key = error.full_key or str(error.key)
    if isinstance(error, (ConfigKeyError, ConfigAttributeError)) and (
        line := _other_launcher(key) or _no_key(key)
    ):
        return line
    return _explain_text(key, str(error.msg or error))


def _no_key(key: str, where: str = "") -> str | None:
    """One line for a key that there is not; None for one that there is, and for other programs'."""
    known = schema_keys()
    if key in known or key.startswith(("hydra", "search")):
        return None
    return f"{key} is not a known key{where}.{_nearest_key(key, known)}"


def _explain_text(key: str, told: str) -> str:
    """One line from what OmegaConf says of a value."""
    expected = _expected(key)
    if away := re.match(r"Interpolation key '(.*?)' not found", told):
        name = away.group(1)
        near = _nearest_key(name, schema_keys())
        shell = "" if near else " A variable of the shell is $NAME, or ${oc.env:NAME}."
        return f"{key}: ${{{name}}} is none, since there is no such key.{near}{shell}"
    if re.match(r"(token recognition error|mismatched input|no viable|extraneous|missing)", told):
        line = told.splitlines()[0]
        return f"{key}: ${{...}} must name a key, or a variable as ${{oc.env:NAME}}, got {line}"
    if "while resolving interpolation: " in told:
        reason = told.splitlines()[0].partition("interpolation: ")[2].strip('"')
        return f"{key}: {reason}"
    if re.fullmatch(r"\[?\d+\]?", key):  # an entry of a list inside a list, without the list's name
        return f"an entry of a list must be a list of integers, got {told}"
    value = re.search(r"Value '(.*?)' (?:of type|could not|is not)", told, re.S)
    if "is not Optional" in told:
        return f"{key} must be {expected}, got null"
    if "is not a ListConfig" in told or "with ListConfig" in told:
        return f"{key} must be {expected}, got no list: it stands in brackets, {key}=[...]"
    if wrong := re.search(r"is not a subclass of \w+\. value: (.*)", told):
        return no_section(key, wrong.group(1))
    if value:
        got = value.group(1)
        if got.startswith("[") and "list" not in expected:
            return f"{key} must be {expected}, got {got!r}{_as_axis(key, got)}"
        whole = expected.startswith("an integer") and re.fullmatch(r"-?\d{1,15}\.0", got)
        near = f"; nearest valid: {got[:-2]}" if whole else ""
        near = "; nearest valid: null" if got == "None" and "null" in expected else near
        return f"{key} must be {expected}, got '{got}'{near}"
    if "issing mandatory value" in told:
        return f"{key} must be set ({expected})"
    return f"{key}: {told.splitlines()[0]}"


def _as_axis(key: str, got: str) -> str:
    """How values that stand in brackets are written as an axis."""
    inside = got[1:-1].strip()
    if not inside or set(inside) & set("[]{}"):
        return ""
    return f"; values of an axis go without brackets, {key}={inside.replace(', ', ',')}"


def no_section(key: str, got: str) -> str:
    below = [name for name in schema_keys() if name.startswith(f"{key}.")]
    return f"{key} must hold keys such as {below[0] if below else f'{key}.KEY'}, got {got}"


def schema_keys() -> list[str]:
    """Every dotted key of RunConfig, leaves and sections."""
    keys: list[str] = []

    def visit(cls: type, prefix: str) -> None:
        for name, kind in get_type_hints(cls).items():
            keys.append(prefix + name)
            if dataclasses.is_dataclass(kind):
                visit(kind, f"{prefix}{name}.")  # type: ignore[arg-type]

    visit(RunConfig, "")
    return keys


def _expected(key: str) -> str:
    """A knob's type in words."""
    kind: Any = RunConfig
    parts = key.split(".")
    if parts[0] == "hydra":
        section, parts = "/".join(parts[:2]), parts[2:]
        having = [one.node for one in _stored(section).values() if parts and parts[0] in one.node]
        kind = OmegaConf.get_type(having[0]) if having else None
    for part in parts:
        part = part.split("[")[0]
        if not dataclasses.is_dataclass(kind):
            return "a value"
        kind = get_type_hints(kind).get(part)  # type: ignore[arg-type]
    words = {int: "an integer", float: "a number", str: "text", bool: "true or false"}
    if kind in words:
        return words[kind]
    names = [words.get(k, "null") for k in get_args(kind)] if get_args(kind) else []
    if "list[list" in str(kind):
        return "a list of lists of integers"
    if "list" in str(kind):
        return "a list of text" + ", like [attention,swiglu]" * (parts[-1] == "target_modules")
    return " or ".join(dict.fromkeys(names)) or "a section"


def options(group: str, places: Sequence[Path] | None = None) -> list[str]:
    """Names of the options of a config group, in conf/ or in all of `places`."""
    return sorted({p.stem for place in places or [CONF] for p in (place / group).glob("*.yaml")})


def _is_group(key: str, places: Sequence[Path]) -> bool:
    if key in HYDRAS:
        return True
    return 0 < len(key) < LONGEST_GROUP and bool(options(key, places))


def groups() -> list[str]:
    """Config groups of conf/, by path."""
    return sorted({str(p.parent.relative_to(CONF)) for p in CONF.glob("**/*.yaml")} - {"."})


def _stored(group: str) -> dict[str, Any]:
    """Options that plugins have registered: `<name>.yaml` -> node."""
    Plugins.instance()  # they do so when Hydra imports them, perhaps only now
    repo: Any = ConfigStore.instance().repo
    for part in group.split("/"):
        repo = repo.get(part, {})
    return repo


def _nearest_key(key: str, keys: list[str]) -> str:
    """Nearest dotted key or group; prefers the same section."""
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
