"""Data and eval texts of a search: as planned, or with changes that the user has accepted since.

    output_dir/sweeps/<name>/study/changes.json    accepted changes, in the form of a run's

Later trials keep the run_ids that they would have had, and their runs record the changes.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from experiments.disk import inputs
from experiments.disk.inputs import Change
from experiments.disk.output_dir import place_of_study
from experiments.disk.run_dir import RunDir
from relora_core.config import RunConfig
from sweeps.planning.plan import command
from sweeps.search.spec import Spec

FILE = "changes.json"


def accepted(folder: Path) -> list[dict[str, Any]]:
    """Changes that were accepted, oldest first."""
    return inputs.accepted_in(folder / FILE)


def changes(spec: Spec, folder: Path) -> list[Change]:
    """What is neither as planned nor as accepted."""
    output_dir = place_of_study(folder.resolve()).output_dir
    prints = inputs.fingerprints(accepted(folder))
    bases = {repr((b.data, b.eval)): b for b in spec.bases.values()}
    seen: dict[tuple[str, str, str], Change] = {}
    for base in bases.values():
        config = inputs.with_fingerprints(base, prints)
        for one in inputs.check(config, output_dir=output_dir).changes:
            seen.setdefault((one.key, one.planned, one.now), one)
    return list(seen.values())


def check(spec: Spec, folder: Path) -> None:
    """ConfigError if something has changed."""
    if changed := changes(spec, folder):
        output_dir, name, _ = place_of_study(folder.resolve())
        again = command("search", name, "--accept-changed", output_dir=output_dir)
        remedy = f"`{again}` goes on with what is there now, and writes it down"
        raise inputs.refusal(changed, remedy=f"{remedy}; or search under another sweep.name")


def accept(folder: Path) -> list[Change]:
    """Accept what has changed, for all trials to come; what that is."""
    changed = changes(Spec.read(folder / "study.json"), folder)
    if changed:
        inputs.accept_in(folder / FILE, changed, by="search")
    return changed


def as_planned(configs: Iterable[RunConfig], folder: Path) -> list[RunConfig]:
    """The configs with the planned fingerprints in place of those that were accepted since."""
    newest_first = accepted(folder)[::-1]
    return [inputs.undo(config, newest_first) for config in configs]


def record_accepted(folder: Path, runs: Sequence[RunDir]) -> None:
    """Write the accepted changes into those of the search's unfinished runs that lack them."""
    newest = {change["key"]: change for change in accepted(folder)}
    for run_dir in runs if newest else ():
        prints = inputs.fingerprints(inputs.accepted(run_dir, by=inputs.TRAINING))
        new = [c for key, c in newest.items() if prints.get(key) != c["now"]]
        if new and not run_dir.ended():
            fields = ("key", "planned", "now", "what")
            own = [Change(**{field: change[field] for field in fields}) for change in new]
            inputs.accept(run_dir, own, by="search")
