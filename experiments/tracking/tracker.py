"""Brings MLflow up to date from plans and records: sweeps, arms and runs, in all their stores.

`sync`, `watch` and both launchers use it. Not for: how any of it looks in MLflow (`runs.py`,
`sweeps.py`), nor for what is true of a run (`disk/state.py`).
"""

from __future__ import annotations

import contextlib
import functools
import re
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from pathlib import Path

from experiments import colours
from experiments.addresses import default_uri, redacted
from experiments.disk.evaluations import all_metrics, results, unlike
from experiments.disk.output_dir import all_runs, plan_folder
from experiments.disk.plans import PlannedRun, SweepRecord, question, read_sweeps, single_run
from experiments.disk.run_dir import RunDir
from experiments.disk.state import RunState, state_of
from experiments.labels import KEYS, spell
from experiments.tracking import store as mlflow_store
from experiments.tracking.runs import WAIT_S, InSweep, Syncer, SyncReport
from experiments.tracking.store import Store
from experiments.tracking.sweep_view import ArmView, RunView, SweepView
from relora_core import shared

Survey = Callable[[list[RunDir]], Mapping[str, RunState]]
"""Returns the states of runs, by run_id; a caller with a scheduler asks it, too."""
Progress = Callable[[str, int, int], None]
BUSY_S = 5.0
"""Longest wait for another process that writes into the store, unless the pass is final."""
NUMBER = re.compile(r"\d+(\.\d+)?(e[+-]?\d+)?")
MAX_DIGITS = 12
"""Numbers with more decimals stay in scientific notation."""


@dataclass(kw_only=True, slots=True)
class Group:
    """Runs of one sweep, or of none, that go to one MLflow experiment of one store."""

    uri: str
    experiment: str
    sweep: SweepRecord | None
    members: list[PlannedRun] = field(default_factory=list)


@dataclass(kw_only=True, slots=True)
class Pass:
    """What bringing one group up to date has done."""

    uri: str
    experiment: str
    sweep: str | None
    names: dict[str, str]
    """run_id -> name in MLflow."""
    colours: dict[str, str]
    """arm_id -> colour."""
    runs: int = 0
    experiment_id: str | None = None
    parent: str | None = None
    """MLflow's id of the sweep's parent run."""
    report: SyncReport | None = None
    problem: str | None = None
    """A line if something was not synced."""
    files: str | None = None
    """A line if files of runs did not reach MLflow; all else was synced."""


class Tracker:
    """Brings MLflow up to date, repeatedly: only what is new since the last pass is sent.

    `tracking_uri` takes the place of the runs' own stores; without `servers` only local stores are
    written to.
    """

    def __init__(
        self,
        output_dir: Path | str,
        *,
        survey: Survey,
        tracking_uri: str | None = None,
        servers: bool = True,
    ) -> None:
        self.output_dir = Path(output_dir)
        self.survey = survey
        self.tracking_uri = tracking_uri
        self.servers = servers
        self._stores: dict[tuple[str, str], Store] = {}
        self._before: dict[tuple[str, str, str | None], _Before] = {}

    def bring_up_to_date(
        self,
        sweeps: Sequence[str] | None = None,
        *,
        states: Mapping[str, RunState] | None = None,
        final: bool = False,
        progress: Progress | None = None,
    ) -> list[Pass]:
        """One pass over each group; errors of a store become the `problem` of a pass.

        `states` spares asking the scheduler; `final` waits for other processes that write into a
        store. `progress` is called with the MLflow experiment, the number of its runs that are
        done, and of all its runs.
        """
        groups = self._groups(sweeps)
        runs = {run.run_id: run.dir for group in groups for run in group.members}
        if states is None:
            states = self.survey(list(runs.values()))
        current = {id_: states.get(id_) or state_of(run) for id_, run in runs.items()}
        return [self._bring(group, current, final=final, progress=progress) for group in groups]

    # where runs go ------------------------------------------------------------------------------
    def _groups(self, sweeps: Sequence[str] | None) -> list[Group]:
        groups: dict[tuple[str, str, str | None], Group] = {}
        planned: set[str] = set()
        for sweep in read_sweeps(self.output_dir, sweeps).values():
            planned |= {run.run_id for run in sweep.runs}
            self._sort(sweep.runs, groups, sweep=sweep)
        if sweeps is None:
            others = [run for run in all_runs(self.output_dir) if run.run_id not in planned]
            singles = [run for run in map(single_run, others) if run.config]
            self._sort(singles, groups, sweep=None)
        return list(groups.values())

    def _sort(
        self,
        runs: Iterable[PlannedRun],
        groups: dict[tuple[str, str, str | None], Group],
        *,
        sweep: SweepRecord | None,
    ) -> None:
        for run in runs:
            place = run.place()
            uri = self.tracking_uri or place.uri or default_uri(self.output_dir)
            if not (place.tracked or self.tracking_uri):
                continue
            if not (self.servers or uri.startswith("sqlite")):
                continue
            key = (uri, place.experiment, run.sweep)
            empty = Group(uri=uri, experiment=place.experiment, sweep=sweep)
            groups.setdefault(key, empty).members.append(run)

    # a pass -------------------------------------------------------------------------------------
    def _bring(
        self,
        group: Group,
        states: Mapping[str, RunState],
        *,
        final: bool,
        progress: Progress | None,
    ) -> Pass:
        from filelock import Timeout

        view = sweep_view(group, states) if group.sweep else None
        done = Pass(
            uri=group.uri,
            experiment=group.experiment,
            sweep=group.sweep.name if group.sweep else None,
            names={run.run_id: run.name for arm in view.arms for run in arm.runs} if view else {},
            colours={arm.arm_id: arm.colour for arm in view.arms} if view else {},
        )
        try:
            self._send(group, view, states, done, final=final, progress=progress)
        except Timeout:
            done.problem = "tracking: another sync holds the store, the next pass tries again"
        except Exception as error:  # whatever it is: the runs are on disk, a later sync can succeed
            self._log()
            done.problem = mlflow_store.problem(group.uri, error)
        if done.report and done.report.errors:
            run_id, line = next(iter(done.report.errors.items()))
            count = f"{len(done.report.errors)} of {len(group.members)} runs not synced"
            done.problem = f"tracking: {count} ({run_id}: {line})"
        return done

    def _log(self) -> None:
        with contextlib.suppress(OSError):
            path = self.output_dir / "logs" / "mlflow-sync.log"
            shared.make_folder(path.parent)
            with shared.open_file(path, "a", encoding="utf-8") as log:
                log.write(redacted(traceback.format_exc()))

    def _send(
        self,
        group: Group,
        view: SweepView | None,
        states: Mapping[str, RunState],
        done: Pass,
        *,
        final: bool,
        progress: Progress | None,
    ) -> None:
        from experiments.tracking import sweeps  # numpy, which launchers need not load to start

        store, wait_s = self._store(group), WAIT_S if final else BUSY_S
        before = self._remembered(done, store)
        done.experiment_id = store.experiment_id
        if view:
            if final or before.parent is None:
                before.parent = sweeps.parent_run(store, view, wait_s=wait_s)
            done.parent = before.parent
        runs = [run.dir for run in group.members if run.dir.config_path.exists()]
        done.runs = len(runs)
        done.report = before.syncer.sync(
            runs,
            sweep=InSweep(names=done.names, parent=done.parent, colours=done.colours),
            states=states,
            final=final,
            progress=functools.partial(progress or (lambda *_: None), done.experiment),
        )
        done.files = done.report.files
        if view:
            self._update(store, view, done, before, wait_s=wait_s)

    def _store(self, group: Group) -> Store:
        place = (group.uri, group.experiment)
        if place not in self._stores:
            self._stores[place] = mlflow_store.open_store(
                group.uri, experiment=group.experiment, output_dir=self.output_dir
            )
        return self._stores[place]

    def _remembered(self, done: Pass, store: Store) -> _Before:
        key = (done.uri, done.experiment, done.sweep)
        if key not in self._before:
            self._before[key] = _Before(syncer=Syncer(store))
        return self._before[key]

    def _update(
        self, store: Store, view: SweepView, done: Pass, before: _Before, *, wait_s: float
    ) -> None:
        """Show arms, note and views if they have changed since we did; and files of the sweep."""
        from experiments.tracking import sweeps  # numpy

        now = _fingerprint(view)
        if before.fingerprint != now:
            before.parent, files = sweeps.update(store, view, wait_s=wait_s)
            before.fingerprint = "" if files else now
            done.parent, done.files = before.parent, done.files or files
        if done.parent:
            folder = plan_folder(self.output_dir, name=view.name)
            files = sweeps.attach(store, done.parent, folder, wait_s=wait_s)
            done.files = done.files or files


@dataclass(kw_only=True, slots=True)
class _Before:
    """What is remembered of a group from one pass to the next."""

    syncer: Syncer
    parent: str | None = None
    """MLflow's id of the sweep's parent run."""
    fingerprint: str = ""
    """Fingerprint of the sweep that is shown; empty if it is shown only in part."""


def _fingerprint(view: SweepView) -> str:
    """A value that changes when the sweep's summary does; steps of running runs do not count."""
    runs = [
        (run.run_id, run.name, run.state.state, run.state.reason, run.metrics)
        for arm in view.arms
        for run in arm.runs
    ]
    return repr((view.question, view.commands, view.collapsed, runs))


# views ------------------------------------------------------------------------------------------
def sweep_view(group: Group, states: Mapping[str, RunState]) -> SweepView:
    """The group's part of its sweep, arms in the order of their names."""
    sweep = group.sweep
    assert sweep is not None
    looks = colours.looks(sweep.runs)
    arms: dict[str, ArmView] = {}
    shown = display_axes([run.axes for run in group.members])
    metrics = _metrics([run for run in group.members if states[run.run_id].state.done])
    for planned, axes in zip(group.members, shown, strict=True):
        state = states[planned.run_id]
        run = RunView(
            run_id=planned.run_id,
            name=spell(axes) or planned.name,
            seed=planned.seed,
            state=state,
            metrics=metrics.get(planned.run_id, {}),
        )
        arm = _arm(planned, axes, colour=looks[planned.arm_id].colour)
        arms.setdefault(planned.arm_id, arm).runs.append(run)
    return SweepView(
        name=sweep.name,
        question=question(sweep.name, sweep.overrides, [run.experiment for run in group.members]),
        commands=sweep.commands,
        created=sweep.created,
        collapsed=sweep.collapsed,
        arms=sorted(arms.values(), key=lambda arm: arm.name),
    )


def _metrics(runs: Sequence[PlannedRun]) -> dict[str, dict[str, float]]:
    """run_id -> final numbers of runs that have ended, without evaluations that are `unlike`, as in
    reports; none of a run whose files are damaged, so that its arm shows no mean.
    """
    metrics: dict[str, dict[str, float]] = {}
    known, evaluated = [], []
    some = any(run.dir.evals.is_dir() for run in runs)  # configs of a thousand runs take seconds
    for run in runs:
        with contextlib.suppress(OSError, ValueError, KeyError):
            metrics[run.run_id] = numbers = all_metrics(run.dir)
            if some:
                stored = {(one["name"], one["section"]): one for one in results(run.dir)}
                digests = {key: one["digest"] for key, one in stored.items()}
                known.append((run.dir.config() if numbers else None, digests))
                evaluated.append((numbers, stored))
    for key, places in unlike(known).items():
        for numbers, stored in (evaluated[place] for place in places):
            for name in stored[key]["metrics"]:
                numbers.pop(name, None)
    return metrics


def _arm(run: PlannedRun, axes: Mapping[str, str], *, colour: str) -> ArmView:
    return ArmView(
        arm_id=run.arm_id,
        name=spell(_seedless(axes)) or run.experiment,
        axes={KEYS.get(label, label): value for label, value in _seedless(run.axes).items()},
        colour=colour,
        runs=[],
    )


def _seedless(axes: Mapping[str, str]) -> dict[str, str]:
    return {key: value for key, value in axes.items() if key != "seed"}


def display_axes(rows: Sequence[Mapping[str, str]]) -> list[dict[str, str]]:
    """The axes with zero-padded numbers, `r=08`, which MLflow then sorts as numbers."""
    values: dict[str, set[str]] = {}
    for axes in rows:
        for key, value in axes.items():
            values.setdefault(key, set()).add(value)
    padded = {key: _padded(texts) for key, texts in values.items()}
    return [{key: padded[key].get(v, v) for key, v in axes.items()} for axes in rows]


def _padded(texts: Iterable[str]) -> dict[str, str]:
    """Numbers among `texts` -> the same with leading zeros, and without exponents."""
    plain = {text: f"{Decimal(text):f}" for text in texts if NUMBER.fullmatch(text)}
    if len({Decimal(text) for text in plain}) < len(plain):  # both `08` and `8` as paths or labels
        return {}
    if any(len(text.partition(".")[2]) > MAX_DIGITS for text in plain.values()):
        return {}
    width = max((len(text.partition(".")[0]) for text in plain.values()), default=0)
    return {
        text: integer.zfill(width) + dot + rest
        for text, number in plain.items()
        for integer, dot, rest in [number.partition(".")]
    }
