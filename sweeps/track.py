"""The one way to bring MLflow up to date: plans and records -> sweeps, arms and runs in stores.

`sync`, `watch` and both launchers go through it, so all of them show the same. Not for: how any of
it looks in MLflow (`experiments/mlflow_*.py`), nor for what is true of a run (`state.py`).
"""

from __future__ import annotations

import contextlib
import functools
import os
import re
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from pathlib import Path
from typing import TYPE_CHECKING, Any

from experiments import frozen, records
from experiments.identity import arm_id
from experiments.mlflow_store import located
from experiments.run_dir import DONE, RunDir, all_runs, run_at
from experiments.state import RunState, state_of
from experiments.tidy import question
from relora_core import shared, shell
from relora_core.config import ConfigError
from sweeps.plan import LABELS, plan_folder
from sweeps.state import survey

if TYPE_CHECKING:
    from experiments.mlflow_sweep import ArmView, SweepView
    from experiments.mlflow_sync import Syncer, SyncReport

KEYS = {word: key for key, word in LABELS.items()}
"""Word of a name -> config key, where they differ."""
BUSY_S = 5.0
"""Longest wait of a pass that is not final for another process at the same store."""
WORD = re.compile(r"(?:^| )([A-Za-z_][\w.]*)=")
NUMBER = re.compile(r"\d+(\.\d+)?(e[+-]?\d+)?")
MAX_DIGITS = 12
"""A longer decimal fraction is left in scientific notation."""


@dataclass(kw_only=True, slots=True)
class Member:
    """A run, as a plan or its own config says where it is to be shown."""

    run: RunDir
    name: str
    arm_id: str
    seed: int | None
    experiment: str
    """The setting's name, of which conf/ knows the question."""
    tracked: bool
    uri: str | None
    """None: the store in the output folder."""
    shown_in: str
    """Name of the MLflow experiment."""


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


def bring_up_to_date(
    output_dir: Path | str,
    sweeps: Sequence[str] | None = None,
    *,
    tracking_uri: str | None = None,
    states: Mapping[str, RunState] | None = None,
    final: bool = True,
    progress: Callable[[str, int, int], None] | None = None,
) -> list[Pass]:
    """Show sweeps (None: all, and runs of none) as they are now; see Tracker.

    `progress` hears the MLflow experiment, how many of its runs are done, and of how many.
    """
    tracker = Tracker(output_dir, tracking_uri=tracking_uri)
    tracker.progress = progress
    return tracker.bring_up_to_date(sweeps, states=states, final=final)


class Tracker:
    """`bring_up_to_date`, repeated: remembers what was shown, so that no news costs few requests.

    `tracking_uri` takes the place of the runs' own stores; without `servers` only local stores are
    written to.
    """

    def __init__(
        self, output_dir: Path | str, *, tracking_uri: str | None = None, servers: bool = True
    ) -> None:
        self.output_dir = Path(output_dir)
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
            states = survey(list(runs.values()))
        known = {id_: states.get(id_) or state_of(run) for id_, run in runs.items()}
        return [self._bring(group, known, final=final) for group in groups]

    # where runs go ------------------------------------------------------------------------------
    def _groups(self, sweeps: Sequence[str] | None) -> list[Group]:
        groups: dict[tuple[str, str, str | None], Group] = {}
        planned: set[str] = set()
        for name, plan in plans(self.output_dir, sweeps).items():
            members = _members(plan, self.output_dir, sweep=name)
            planned |= {member.run.run_id for member in members}
            self._sort(members, groups, sweep=name, plan=plan)
        if sweeps is None:
            singles = [run for run in all_runs(self.output_dir) if run.run_id not in planned]
            members = [member for run in singles if (member := _single(run))]
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
        from experiments.mlflow_store import default_uri

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

        from experiments import mlflow_store, mlflow_views

        view = sweep_view(group, states) if group.sweep else None
        done = Pass(
            uri=group.uri,
            experiment=group.experiment,
            sweep=group.sweep,
            names={run.run_id: run.name for arm in view.arms for run in arm.runs} if view else {},
            colours=mlflow_views.colours(view.arms) if view else {},
        )
        try:
            self._send(group, view, states, done, final=final)
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
        from experiments.mlflow_store import redacted

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
        from experiments import mlflow_sweep
        from experiments.mlflow_store import ensure_store

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
        from experiments.mlflow_sync import Syncer

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
        from experiments import mlflow_sweep

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


def shown(output_dir: Path | str, sweep: str) -> list[Pass]:
    """What came of showing the sweep; none, and a line on stderr, where its plan cannot be read."""
    try:
        return bring_up_to_date(output_dir, [sweep])
    except Exception as error:  # whatever it is: the runs go on, and a later sync can succeed
        line = next(iter(str(error).splitlines()), type(error).__name__)
        print(f"tracking: {line}; `python -m sweeps sync` tries again", file=sys.stderr)
        return []


_BESIDE: list[subprocess.Popen[bytes]] = []
"""Processes that outlive this one: Python warns of those that it forgets."""


def in_background(output_dir: Path | str, sweep: str) -> Path:
    """Show the sweep from a process that outlives this one; the file that has what it said."""
    output_dir = Path(output_dir).absolute()
    log = output_dir / "logs" / "mlflow-sync.log"
    root = str(Path(__file__).resolve().parents[1])
    paths = filter(None, (root, os.environ.get("PYTHONPATH")))
    with contextlib.suppress(OSError):
        shared.make_folder(log.parent)
        with shared.opened(log, "ab") as said:
            process = subprocess.Popen(
                [sys.executable, "-P", "-m", "sweeps", "sync", sweep, "--output-dir", output_dir],
                stdin=subprocess.DEVNULL,
                stdout=said,
                stderr=said,
                env={**shell.outside(os.environ), "PYTHONPATH": os.pathsep.join(paths)},
                start_new_session=True,  # Ctrl-C, and the terminal's end, are not for it
            )
        _BESIDE.append(process)
    return log


def complaints(passes: Sequence[Pass]) -> Iterator[str]:
    """What is wrong, in lines of which each is said once in a process."""
    for one in passes:
        for line in (one.problem, one.files):
            if line and line not in _SAID:
                _SAID.add(line)
                yield line


_SAID: set[str] = set()


def _fingerprint(view: SweepView) -> str:
    """Changes when the sweep's summary does; a running run's step does not count."""
    runs = [
        (run.run_id, run.name, run.state.state, run.state.reason, run.metrics)
        for arm in view.arms
        for run in arm.runs
    ]
    return repr((view.question, view.commands, view.collapsed, runs))


# plans ------------------------------------------------------------------------------------------
def plans(output_dir: Path | str, sweeps: Sequence[str] | None = None) -> dict[str, dict[str, Any]]:
    """Sweep -> its stored plan as it is in the file: building thousands of configs takes seconds.

    Of names without a plan nothing is told.
    """
    found = {}
    for path in sorted(plan_folder(output_dir, name="").glob("*/plan.json")):
        if sweeps is None or path.parent.name in sweeps:
            found[path.parent.name] = records.plan(path)
    return found


def _no_plan(path: Path) -> ConfigError:
    return ConfigError(f"{path} must be a plan as this version writes it")


def _members(plan: Mapping[str, Any], output_dir: Path, *, sweep: str) -> list[Member]:
    try:
        return [_planned(cell, output_dir=output_dir) for cell in plan["cells"]]
    except (KeyError, TypeError):
        raise _no_plan(plan_folder(output_dir, name=sweep) / "plan.json") from None


def _planned(cell: Mapping[str, Any], *, output_dir: Path) -> Member:
    config = cell["config"]
    tracking, experiment = config["tracking"], config["experiment"]
    bases = frozen.typed_in(config["output_dir"], output_dir)
    return Member(
        run=run_at(output_dir, cell["run_id"]),
        name=cell["name"],
        arm_id=cell["arm_id"],
        seed=config["seed"],
        experiment=experiment,
        tracked=tracking["enabled"],
        uri=tracking["uri"] and located(tracking["uri"], bases),
        shown_in=tracking["experiment"] or config["sweep"]["name"] or experiment,
    )


def _single(run: RunDir) -> Member | None:
    """A run without a plan; None where this version cannot read what it is."""
    from experiments.mlflow_store import experiment_name

    try:
        config = run.config()
    except (OSError, ValueError, TypeError):
        return None
    return Member(
        run=run,
        name="",
        arm_id=arm_id(config),
        seed=config.seed,
        experiment=config.experiment,
        tracked=config.tracking.enabled,
        uri=config.tracking.uri,
        shown_in=experiment_name(config),
    )


# views ------------------------------------------------------------------------------------------
def sweep_view(group: Group, states: Mapping[str, RunState]) -> SweepView:
    """The group's part of its sweep, arms in the order of their names."""
    from experiments.mlflow_sweep import RunView, SweepView

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
    from experiments.evaluate import all_metrics

    try:
        return all_metrics(run)
    except (OSError, ValueError, KeyError):
        return {}


def _arm(member: Member, name: str) -> ArmView:
    from experiments.mlflow_sweep import ArmView

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
