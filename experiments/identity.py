"""run_id and arm_id: a readable label, and a digest of everything that changes the numbers.

The digest covers the *full* scientific config, not its difference to the defaults: otherwise a
changed default would make an old and a new experiment share a name.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Mapping
from typing import Any, get_args

from experiments import json_files
from experiments.labels import text_of
from relora_core.config import (
    EvaluatedConfig,
    RunConfig,
    applies,
    concerns,
    get,
    ruled_out_by,
    runs_eval,
    walk,
)

SCHEMA_VERSION = 1
"""Part of every digest; raised when the meaning of an existing knob changes."""
DIGESTED_WHEN_OFF = ("eval.paloma.enabled", "eval.blimp.enabled")
"""Part of every digest; evals added later are part of it only if they are on."""


def scientific(config: RunConfig) -> dict[str, Any]:
    """Dotted key -> value of every knob that a run's identity depends on.

    Left out: knobs marked `scientific=False`, knobs of methods and data kinds that are not
    selected, evals that are off, later-added knobs at the value that means "as before", and those
    that say nothing of a model that was not trained here.
    """
    chosen = {}
    for key, f, value in walk(config):
        meta = f.metadata
        if not meta.get("scientific", True) or not applies(meta, config):
            continue
        if _as_before(meta, value) or not concerns(config, key):
            continue
        if key.startswith("eval.") and key not in DIGESTED_WHEN_OFF:
            section = key.rsplit(".", 1)[0]
            if not get(config, f"{section}.enabled"):
                continue
        chosen[key] = value
    return chosen


def _as_before(metadata: Mapping[str, Any], value: Any) -> bool:
    """Whether a knob that was added later has the value that means "as before"."""
    return "as_before" in metadata and value == metadata["as_before"]


def essential(config: RunConfig) -> dict[str, Any]:
    """Like `scientific`, but equal for any two configs that compute the same numbers.

    Leaves out knobs that another one rules out (`moot` in their metadata), and replaces values by
    what they mean (`same_as`). Not used for ids: that would rename existing runs.
    """
    essentials = {}
    for key, f, value in walk(config):
        meta = f.metadata
        if not meta.get("scientific", True) or not applies(meta, config):
            continue
        if key.startswith("eval.") and not runs_eval(config, key.split(".")[1]):
            continue
        if any(rules_out(config) for rules_out in meta.get("moot", {}).values()):
            continue
        if "same_as" not in meta:
            essentials[key] = value
        elif (meaning := meta["same_as"](config)) is not None:
            essentials[key] = meaning
    return essentials


def overruled(metadata: Mapping[str, Any], config: RunConfig) -> str | None:
    """What leaves a knob with this metadata without effect: `to method=lora`, `with relora.r=0`."""
    if choice := ruled_out_by(metadata, config):
        return f"to {choice}"
    moot = metadata.get("moot", {}).items()
    by = next((key for key, rules_out in moot if rules_out(config)), None)
    return None if by is None else f"with {by}={text_of(get(config, by))}"


def left_out(name: str, config: RunConfig) -> str | None:
    """What leaves an eval out of the run, such as `eval.blimp.enabled=false`; None if it runs."""
    if runs_eval(config, name):
        return None
    on = get(config, f"eval.{name}.enabled")
    return f"eval.{name}.{'path=none' if on else 'enabled=false'}"


def plain_keys(config: RunConfig) -> list[str]:
    """Keys of `essential` that equal configs of this method and kind of data have in common."""
    return [
        key
        for key, f, _ in walk(config)
        if f.metadata.get("scientific", True)
        and applies(f.metadata, config)
        and not {"moot", "same_as"} & set(f.metadata)
        and not key.startswith("eval.")
    ]


def _digest(values: dict[str, Any]) -> str:
    text = json.dumps({"schema": SCHEMA_VERSION, **values}, sort_keys=True, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]  # 64 bit


def label(config: RunConfig) -> str:
    """Readable part of the ids: model, method, the knobs marked `label`, and kind of data."""
    parts = [config.model.name, config.method.replace("_", "")]
    for _, f, value in walk(config):
        meta = f.metadata
        if "label" in meta and applies(meta, config) and not _as_before(meta, value):
            parts.append(f"{meta['label']}{value}")
    if not isinstance(config, EvaluatedConfig):
        parts.append(config.data.kind)
    safe = "-".join(parts)
    safe = "".join(c if c.isascii() and (c.isalnum() or c in "-_.") else "_" for c in safe)
    return safe[:60].lstrip(".-")


def arm_id(config: RunConfig) -> str:
    """Id of the setting regardless of seed."""
    return ids(config)[1]


def run_id(config: RunConfig) -> str:
    """Id of the setting at its seed; also the name of the run's folder."""
    return ids(config)[0]


def ids(config: RunConfig) -> tuple[str, str]:
    """(run_id, arm_id)."""
    values, name = scientific(config), label(config)
    arm = {k: v for k, v in values.items() if k != "seed"}
    return f"{name}-s{config.seed}-{_digest(values)}", f"{name}-{_digest(arm)}"


def config_to_json(config: RunConfig) -> str:
    """The config as it is frozen in a run's folder, with what is not part of the identity."""
    return json.dumps(dataclasses.asdict(config), indent=2, allow_nan=False) + "\n"


def config_from_json(text: str) -> RunConfig:
    """Inverse of `config_to_json`; ValueError if it does not fit. Newer knobs take defaults."""
    values = json_files.parse(text)
    return _build(EvaluatedConfig if "foreign" in values else RunConfig, values, "")


def _build(cls: type, values: Any, prefix: str) -> Any:
    hints = json_files.hints(cls)
    if not isinstance(values, dict):
        raise ValueError(f"config.json holds {values!r:.60} as {prefix[:-1]}")
    if unknown := set(values) - set(hints):
        raise ValueError(f"config.json holds unknown key {prefix}{sorted(unknown)[0]}")
    built = {}
    for name, value in values.items():
        kind = hints[name]
        if dataclasses.is_dataclass(kind):
            built[name] = _build(kind, value, f"{prefix}{name}.")  # type: ignore[arg-type]
        elif not json_files.fits(kind, value) or value in (math.inf, -math.inf) or value != value:
            raise ValueError(f"config.json holds {value!r:.60} as {prefix}{name}")
        elif isinstance(value, int) and not isinstance(value, bool) and _is_float(kind):
            built[name] = float(value)
        else:
            built[name] = value
    return cls(**built)


def _is_float(kind: Any) -> bool:
    return kind is float or (float in get_args(kind) and int not in get_args(kind))
