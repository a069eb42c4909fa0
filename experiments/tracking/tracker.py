"""The one way to bring MLflow up to date: plans and records -> sweeps, arms and runs in stores.

`sync`, `watch` and both launchers go through it, so all of them show the same. Not for: how any of
it looks in MLflow (`experiments/mlflow_*.py`), nor for what is true of a run (`state.py`).
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
from typing import TYPE_CHECKING, Any

from experiments.disk.output_dir import all_runs, plan_folder
from experiments.disk.plans import Member, members_of, question, read_plans, single_member
from experiments.disk.run_dir import DONE, RunDir
from experiments.disk.state import RunState, state_of
from experiments.labels import LABELS
from relora_core import shared

if TYPE_CHECKING:
    from experiments.tracking.runs import Syncer, SyncReport
    from experiments.tracking.sweep_view import ArmView, SweepView

KEYS = {word: key for key, word in LABELS.items()}
"""Word of a name -> config key, where they differ."""
Survey = Callable[[list[RunDir]], Mapping[str, RunState]]
"""What is true of runs, by run_id: whoever knows a scheduler asks it."""
BUSY_S = 5.0
"""Longest wait of a pass that is not final for another process at the same store."""
WORD = re.compile(r"(?:^| )([A-Za-z_][\w.]*)=")
NUMBER = re.compile(r"\d+(\.\d+)?(e[+-]?\d+)?")
MAX_DIGITS = 12
"""A longer decimal fraction is left in scientific notation."""


@dataclass(kw_only=True, slots=True)
class Group:
    """Runs of one sweep, or of none, that go to one place."""

    uri: str
    experiment: str
    sweep: str | None
    plan: dict[str, Any]
    members: list[Member] = field(default_factory=list)


@dataclass(kw_only=True, slots=True)
class Pass:
    """What came of bringing one group up to date."""

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
    """One line where something was not synced."""
    files: str | None = None
    """One line where files of runs are not where MLflow shows them; all else was synced."""


class Tracker:
    """Brings MLflow up to date, repeatedly: it remembers what was shown, and sends what is new.

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
        self.progress: Callable[[str, int, int], None] | None = None
        self._ids: dict[tuple[str, str], str] = {}
        self._parents: dict[tuple[str, str, str], str] = {}
        self._syncers: dict[tuple[str, str, str | None], Syncer] = {}
        self._shown: dict[tuple[str, str, str], str] = {}

    def bring_up_to_date(
        self,
        sweeps: Sequence[str] | None = None,
        *,
        states: Mapping[str, RunState] | None = None,
        final: bool = False,
    ) -> list[Pass]:
        """One pass over each place. Whatever a store says is a `problem`, not an error.

        `states` spares asking the scheduler; `final` awaits another process that is at a store.
        """
        groups = self._groups(sweeps)
        runs = {m.run.run_id: m.run for group in groups for m in group.members}
        if states is None:
            states = self.survey(list(runs.values()))
        known = {id_: states.get(id_) or state_of(run) for id_, run in runs.items()}
        return [self._bring(group, known, final=final) for group in groups]

    # where runs go ------------------------------------------------------------------------------
    def _groups(self, sweeps: Sequence[str] | None) -> list[Group]:
        groups: dict[tuple[str, str, str | None], Group] = {}
        planned: set[str] = set()
        for name, plan in read_plans(self.output_dir, sweeps).items():
            members = members_of(plan, self.output_dir, sweep=name)
            planned |= {member.run.run_id for member in members}
            self._sort(members, groups, sweep=name, plan=plan)
        if sweeps is None:
            singles = [run for run in all_runs(self.output_dir) if run.run_id not in planned]
            members = [member for run in singles if (member := single_member(run))]
            self._sort(members, groups, sweep=None, plan={})
        return list(groups.values())

    def _sort(
        self,
        members: Iterable[Member],
        groups: dict[tuple[str, str, str | None], Group],
        *,
        sweep: str | None,
        plan: dict[str, Any],
    ) -> None:
        from experiments.addresses import default_uri

        for member in members:
            uri = self.tracking_uri or member.uri or default_uri(self.output_dir)
            if not (member.tracked or self.tracking_uri):
                continue
            if not (self.servers or uri.startswith("sqlite")):
                continue
            empty = Group(uri=uri, experiment=member.shown_in, sweep=sweep, plan=plan)
            groups.setdefault((uri, member.shown_in, sweep), empty).members.append(member)

    # a pass -------------------------------------------------------------------------------------
    def _bring(self, group: Group, states: Mapping[str, RunState], *, final: bool) -> Pass:
        from filelock import Timeout

        from experiments.tracking import saved_views, store

        view = sweep_view(group, states) if group.sweep else None
        done = Pass(
            uri=group.uri,
            experiment=group.experiment,
            sweep=group.sweep,
            names={run.run_id: run.name for arm in view.arms for run in arm.runs} if view else {},
            colours=saved_views.colours(view.arms) if view else {},
        )
        try:
            self._send(group, view, states, done, final=final)
        except Timeout:
            done.problem = "tracking: another sync holds the store, the next pass tries again"
        except Exception as error:  # whatever it is: the runs are on disk, a later sync can succeed
            self._log()
            done.problem = store.problem(group.uri, error)
        if done.report and done.report.errors:
            run_id, line = next(iter(done.report.errors.items()))
            count = f"{len(done.report.errors)} of {len(group.members)} runs not synced"
            done.problem = f"tracking: {count} ({run_id}: {line})"
        return done

    def _log(self) -> None:
        from experiments.addresses import redacted

        with contextlib.suppress(OSError):
            path = self.output_dir / "logs" / "mlflow-sync.log"
            shared.make_folder(path.parent)
            with shared.opened(path, "a", encoding="utf-8") as log:
                log.write(redacted(traceback.format_exc()))

    def _send(
        self,
        group: Group,
        view: SweepView | None,
        states: Mapping[str, RunState],
        done: Pass,
        *,
        final: bool,
    ) -> None:
        from experiments.tracking import sweeps as mlflow_sweep
        from experiments.tracking.store import ensure_store

        place, where = (group.uri, group.experiment), self.output_dir
        if place not in self._ids:
            self._ids[place] = ensure_store(
                group.uri, experiment=group.experiment, output_dir=where
            )
        done.experiment_id = self._ids[place]
        settings: dict[str, Any] = {
            "uri": group.uri,
            "experiment_id": done.experiment_id,
            "output_dir": where,
            "wait_s": mlflow_sweep.WAIT_S if final else BUSY_S,
        }
        if view:
            key = (*place, view.name)
            if final or key not in self._parents:
                self._parents[key] = mlflow_sweep.parent_run(view, **settings)
            done.parent = self._parents[key]
        syncer = self._syncer(group, done)
        runs = [m.run for m in group.members if m.run.config_path.exists()]
        done.runs = len(runs)
        done.report = syncer.sync(runs, final=final, states=states)
        done.files = done.report.files
        if view:
            self._update(view, done, settings)

    def _syncer(self, group: Group, done: Pass) -> Syncer:
        from experiments.tracking.runs import Syncer

        key = (group.uri, group.experiment, group.sweep)
        if key not in self._syncers:
            assert done.experiment_id is not None
            self._syncers[key] = Syncer(
                group.uri, experiment_id=done.experiment_id, output_dir=self.output_dir
            )
        syncer = self._syncers[key]
        syncer.names, syncer.parent, syncer.colours = done.names, done.parent, done.colours
        if self.progress:
            syncer.progress = functools.partial(self.progress, done.experiment)
        return syncer

    def _update(self, view: SweepView, done: Pass, settings: dict[str, Any]) -> None:
        """Arms, note and views, where they have changed since we showed them."""
        from experiments.tracking import sweeps as mlflow_sweep

        key, now = (done.uri, done.experiment, view.name), _fingerprint(view)
        if self._shown.get(key) != now:
            done.parent, files = mlflow_sweep.update(view, **settings)
            self._parents[key] = done.parent
            self._shown[key] = "" if files else now
            done.files = done.files or files
        if done.parent:
            folder = plan_folder(self.output_dir, name=view.name)
            files = mlflow_sweep.attach(done.parent, folder, **settings)
            done.files = done.files or files


def _fingerprint(view: SweepView) -> str:
    """Changes when the sweep's summary does; a running run's step does not count."""
    runs = [
        (run.run_id, run.name, run.state.state, run.state.reason, run.metrics)
        for arm in view.arms
        for run in arm.runs
    ]
    return repr((view.question, view.commands, view.collapsed, runs))


# views ------------------------------------------------------------------------------------------
def sweep_view(group: Group, states: Mapping[str, RunState]) -> SweepView:
    """The group's part of its sweep, arms in the order of their names."""
    from experiments.tracking.sweep_view import RunView, SweepView

    assert group.sweep is not None
    commands = group.plan.get("commands", [])
    experiments = [member.experiment for member in group.members]
    arms: dict[str, ArmView] = {}
    names = display_names([member.name for member in group.members])
    for member, name in zip(group.members, names, strict=True):
        state = states[member.run.run_id]
        run = RunView(
            run_id=member.run.run_id,
            name=name,
            seed=member.seed,
            state=state,
            metrics=_metrics(member.run) if state.state in DONE else {},
        )
        arm = arms.setdefault(member.arm_id, _arm(member, name))
        arm.runs.append(run)
    return SweepView(
        name=group.sweep,
        question=question(group.sweep, commands, experiments),
        commands=commands,
        created=group.plan.get("created", 0.0),
        collapsed=group.plan.get("collapsed", []),
        arms=sorted(arms.values(), key=lambda arm: arm.name),
    )


def _metrics(run: RunDir) -> dict[str, float]:
    """The run's final numbers; none where its files are damaged, so that its arm shows no mean."""
    from experiments.disk.evaluations import all_metrics

    try:
        return all_metrics(run)
    except (OSError, ValueError, KeyError):
        return {}


def _arm(member: Member, name: str) -> ArmView:
    from experiments.tracking.sweep_view import ArmView

    words = [(key, value) for key, value in words_of(name) if key != "seed"]
    axes = {KEYS.get(k, k): v for k, v in words_of(member.name) if k != "seed"}
    label = " ".join(f"{key}={value}" for key, value in words) or member.experiment
    return ArmView(arm_id=member.arm_id, name=label, axes=axes, runs=[])


def words_of(name: str) -> list[tuple[str, str]]:
    """`model=tiny relora.r=8` -> pairs; a value may hold spaces."""
    starts = list(WORD.finditer(name))
    ends = [*(match.start() for match in starts[1:]), len(name)]
    return [(m.group(1), name[m.end() : end]) for m, end in zip(starts, ends, strict=False)]


def display_names(names: Sequence[str]) -> list[str]:
    """The names with their numbers padded, so that their order is that of the numbers: `r=08`."""
    values: dict[str, set[str]] = {}
    for name in names:
        for key, value in words_of(name):
            values.setdefault(key, set()).add(value)
    padded = {key: _padded(texts) for key, texts in values.items()}
    return [
        " ".join(f"{k}={padded[k].get(v, v)}" for k, v in words_of(name)) or name for name in names
    ]


def _padded(texts: Iterable[str]) -> dict[str, str]:
    """Numbers among `texts` -> the same with leading zeros, and without exponents."""
    plain = {text: f"{Decimal(text):f}" for text in texts if NUMBER.fullmatch(text)}
    if len({Decimal(text) for text in plain}) < len(plain):  # `08` and `8`, of paths or labels
        return {}
    if any(len(text.partition(".")[2]) > MAX_DIGITS for text in plain.values()):
        return {}
    width = max((len(text.partition(".")[0]) for text in plain.values()), default=0)
    return {
        text: whole.zfill(width) + dot + rest
        for text, number in plain.items()
        for whole, dot, rest in [number.partition(".")]
    }
