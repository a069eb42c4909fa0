"""A study on disk: who may take which trial, and what the trials came to. No process drives it.

    output_dir/sweeps/<name>/study/study.json    Spec: search, space, base configs, command
                                  /journal.log   Optuna's journal, unless search.storage names a DB
                                  /.lock         of the process that takes a trial

Each worker asks the study for a trial, reports its curve, and ends it with its result.
study.json decides: a process that has taken the lock reads it again if it has changed, and updates
the journal if no other process has. So a space that grows does so for all workers at once, and an
update that was killed is repeated.

Trials that n_trials does not count: points drawn and at once refused (`refused` in their user
attributes), such as one that was tried before or that breaks a constraint on its cost, for which
another is drawn; those that were given up uncounted; and what was learnt from earlier sweeps.
"""

from __future__ import annotations

import contextlib
import dataclasses
import secrets
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import optuna
from optuna.trial import FrozenTrial, TrialState

from experiments.addresses import relative_database, with_password
from experiments.disk.output_dir import place_of_study
from relora_core import shared
from relora_core.config import ConfigError
from sweeps.search import draws, growth, journal, learn, samplers
from sweeps.search.config import SearchConfig
from sweeps.search.spec import Spec
from sweeps.search.trial import Trial, Worker, from_record, is_begun, read_records

MAX_ADOPTIONS = 10
"""A trial that lost its worker this often is itself the cause, and fails."""

Result = TypeVar("Result")
optuna.logging.set_verbosity(optuna.logging.WARNING)


class Study:
    """One search. Many processes have it open at once."""

    def __init__(self, folder: Path | str, spec: Spec) -> None:
        self.folder, self.spec = Path(folder).absolute(), spec
        self._study: optuna.Study | None = None
        self._inode = 0
        self._locked = False
        self._seen: tuple[int, ...] | None = None

    @classmethod
    def open(cls, folder: Path | str, *, create: Spec | None = None) -> Study:
        """The study in `folder`; with `create`, made or continued (then ConfigError if it asks
        for something else than before). A lost or damaged journal is rebuilt."""
        path = Path(folder) / "study.json"
        if create is None:
            study = cls(folder, Spec.read(path))
            study._load()
            return study
        create.check()
        create = create.frozen()
        shared.make_folder(path.parent)
        with journal.only_one(path.parent / ".lock"):
            old = Spec.read(path) if path.exists() else None
            spec = old.continued(create) if old else create.named(secrets.token_hex(4))
            spec.write(path)
            study = cls(folder, spec)
            with study._holding():
                study._load()
                study._enqueue()
        return study

    name = property(lambda self: place_of_study(self.folder).name)
    arm = property(lambda self: place_of_study(self.folder).arm)
    output_dir = property(lambda self: place_of_study(self.folder).output_dir)
    path = property(lambda self: self.folder / "study.json")
    journal_path = property(lambda self: self.folder / "journal.log")

    @property
    def config(self) -> SearchConfig:
        return self.spec.config

    # storage ------------------------------------------------------------------------------------
    @property
    def optuna(self) -> optuna.Study:
        """The optuna.Study, for reading: best_trial(s), trials, plots."""
        if self._study is None or self._replaced():
            self._load()
        assert self._study is not None
        return self._study

    def _replaced(self) -> bool:
        """Whether the journal was rebuilt by another process, or removed."""
        if self.config.storage:
            return False
        try:
            return self.journal_path.stat().st_ino != self._inode
        except FileNotFoundError:
            return True

    def _load(self) -> None:
        with self._alone():
            records = read_records(self.output_dir, study_id=self.spec.id)
            if self.config.storage:
                self._study = self._attached(self._database())
                n_trials = len(self._study.get_trials(deepcopy=False))
                if not n_trials or n_trials < len(self.spec.learnt):
                    self._fill(self._study, records, start=n_trials)
                return
            existed = self.journal_path.exists()
            why = journal.damage(self.journal_path) or self._attach_journal(records)
            if why:
                if existed or records:
                    print(
                        f"warning: {self.journal_path}: {why}; rebuilt with {len(records)} trials "
                        "from the run directories",
                        file=sys.stderr,
                    )
                self._restore(records)
            self._catch_up(records)

    def _database(self) -> Any:
        assert self.config.storage
        if relative_database(self.config.storage):
            raise ConfigError(
                f"search.storage={self.config.storage} was written down as it was typed, and is no "
                f"database in {Path.cwd()}: run this where the search was begun"
            )
        return optuna.storages.get_storage(with_password(self.config.storage))

    def _catch_up(self, records: Mapping[int, dict[str, Any]]) -> None:
        """Write down again what a process was killed in telling: the journal hears of it first."""
        if shared.closed(self.folder):  # who only looks
            return
        trials = self.optuna.get_trials(deepcopy=False)
        for number, record in records.items():
            frozen = trials[number]
            if frozen.state.is_finished() and frozen.state.name != record["state"]:
                self._trial(frozen).write_records()

    def _attach_journal(self, records: Mapping[int, dict[str, Any]]) -> str | None:
        """Open the journal; in words why not. Records are older than what is read here."""
        try:
            self._study = self._read_journal()
            self._fit(self._study)
            return self._behind(records)
        except (ValueError, KeyError, TypeError, IndexError, AttributeError, AssertionError) as e:
            return f"it does not replay ({type(e).__name__})"

    def _attached(self, storage: Any) -> optuna.Study:
        common = {
            "storage": storage,
            "study_name": f"{self.name}.{self.spec.id}",
            "sampler": optuna.samplers.RandomSampler(),  # _point() sets its own
            "pruner": samplers.make_pruner(self.config),
        }
        try:
            return optuna.load_study(**common)  # creating writes, even where there is one
        except KeyError:
            directions = [objective.direction for objective in self.config.objectives]
            study = optuna.create_study(**common, directions=directions)
            study.set_user_attr("space", growth.mark(self.spec))
            return study

    def _read_journal(self) -> optuna.Study:
        self._inode = self.journal_path.stat().st_ino
        return self._attached(journal.journal_storage(self.journal_path))

    def _fit(self, study: optuna.Study) -> None:
        """What was learnt, and a space that has grown, in a journal that lacks it: of another
        process's making, or killed before this."""
        if shared.closed(self.folder):  # who only looks
            return
        if (n_trials := len(study.get_trials(deepcopy=False))) < len(self.spec.learnt):
            self._fill(study, {}, start=n_trials)
        if study.user_attrs.get("space") == growth.mark(self.spec):
            return
        with journal.unchanged(self.journal_path):
            noted = study._storage.get_study_system_attrs(study._study_id)
            trials = study.get_trials(deepcopy=False)
            new = self._new_journal(growth.moved(trials, self.spec), noted=noted)
            new.replace(self.journal_path)
        self._study = self._read_journal()

    def _restore(self, records: Mapping[int, dict[str, Any]]) -> None:
        """A journal with these trials in the place of whatever there is."""
        new = self._new_journal(growth.moved(self._trials_of(records), self.spec))
        with journal.unchanged(self.journal_path):
            journal.set_aside(self.journal_path)
            new.replace(self.journal_path)
        assert self._attach_journal(records) is None
        self._enqueue()

    def _new_journal(
        self, trials: Sequence[FrozenTrial], *, noted: Mapping[str, Any] | None = None
    ) -> Path:
        """A file with these trials, and what samplers have `noted` of the study."""
        path = self.journal_path.with_name("journal.new")
        path.unlink(missing_ok=True)
        shared.touch(path)
        study = self._attached(journal.journal_storage(path))
        study.add_trials(trials)
        for key, value in (noted or {}).items():
            study._storage.set_study_system_attr(study._study_id, key, value)
        return path

    def _fill(
        self, study: optuna.Study, records: Mapping[int, dict[str, Any]], *, start: int = 0
    ) -> None:
        study.add_trials(growth.moved(self._trials_of(records), self.spec)[start:])

    def _trials_of(self, records: Mapping[int, dict[str, Any]]) -> list[FrozenTrial]:
        """All trials as far as study.json and these records know them."""
        count = max(max(records, default=-1) + 1, len(self.spec.learnt))
        return [self._known(number, records.get(number)) for number in range(count)]

    def _known(self, number: int, record: dict[str, Any] | None) -> FrozenTrial:
        if record is not None:
            return from_record(record)
        if number < len(self.spec.learnt):
            return learn.to_trial(number, self.spec)
        return _lost(number)

    def _behind(self, records: Mapping[int, dict[str, Any]]) -> str | None:
        """In words: a trial that the run directories know better than the journal."""
        assert self._study is not None
        trials = self._study.get_trials(deepcopy=False)
        written = growth.fitted([from_record(record) for record in records.values()], self.spec)
        for number, record in zip(records, written, strict=True):
            if number >= len(trials):
                return f"it lacks trial {number}"
            trial, ended = trials[number], record.state.is_finished()
            if trial.params != record.params or (ended and not trial.state.is_finished()):
                return f"it is behind in trial {number}"
        return None

    def _enqueue(self) -> None:
        """Queue the settings of search.enqueue that are not there yet."""
        with self._alone():
            study = self.optuna
            queued = [t.system_attrs.get("fixed_params") for t in study.get_trials(deepcopy=False)]
            for entry in self.spec.enqueued():
                if entry not in queued:
                    study.enqueue_trial(entry)

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """One process at a time takes trials or mends the journal."""
        if self._locked:
            yield
            return
        with journal.only_one(self.folder / ".lock"), self._holding():
            self._renew()
            yield

    @contextlib.contextmanager
    def _holding(self) -> Iterator[None]:
        self._locked = True
        try:
            yield
        finally:
            self._locked = False

    def _renew(self) -> None:
        """Read study.json if a command has written it since: its space may have grown."""
        try:
            stat = self.path.stat()
        except FileNotFoundError:
            return
        if (seen := (stat.st_ino, stat.st_mtime_ns, stat.st_size)) == self._seen:
            return
        spec = Spec.read(self.path)
        if spec.id != self.spec.id:
            raise ConfigError(f"{self.path} is of another study by now: this one has ended")
        if spec != self.spec:
            self.spec, self._study = spec, None
        self._seen = seen

    def _mending(self, action: Callable[[], Result]) -> Result:
        """Call `action`; if it fails as on a damaged journal, load the study and call it again."""
        try:
            return action()
        except (ValueError, KeyError, AssertionError):
            self._study = None
            return action()

    # taking -------------------------------------------------------------------------------------
    def take(
        self, worker: Worker, *, gone: Callable[[Worker], bool] = lambda worker: False
    ) -> Trial | None:
        """The trial for this worker: its own, an orphan, or a new one; None: no trial is left.

        `gone` returns whether another worker has certainly ended; it is called outside the lock.
        """
        return self._mending(lambda: self._take(worker, self._orphans(gone)))

    def _take(self, worker: Worker, orphans: dict[int, Any]) -> Trial | None:
        with self._alone():
            for frozen in self._running():
                holder = frozen.user_attrs["worker"]
                mine = worker.is_same(Worker(**holder))
                if not mine and orphans.get(frozen.number) != holder:
                    continue
                if trial := self._adopt(frozen, worker, mine=mine):
                    return trial
            while self.left():
                if trial := draws.draw(self, worker):
                    return trial
            return None

    def _orphans(self, gone: Callable[[Worker], bool]) -> dict[int, Any]:
        """Number -> worker, of running trials with a worker that has ended."""
        holders = {frozen.number: frozen.user_attrs["worker"] for frozen in self._running()}
        return {n: holder for n, holder in holders.items() if gone(Worker(**holder))}

    def _adopt(self, frozen: FrozenTrial, worker: Worker, *, mine: bool) -> Trial | None:
        """The same trial goes on, from its runs' checkpoints."""
        handle, adoptions = self.handle(frozen), frozen.user_attrs.get("adoptions", 0)
        trial = self._trial(frozen)
        if mine:
            handle.set_user_attr("worker", dataclasses.asdict(worker))
            return trial
        if adoptions >= MAX_ADOPTIONS:
            trial.fail(f"its worker vanished {adoptions + 1} times")
            return None
        handle.set_user_attr("adoptions", adoptions + 1)
        handle.set_user_attr("worker", dataclasses.asdict(worker))
        return trial

    # telling ------------------------------------------------------------------------------------
    def frozen(self, number: int) -> FrozenTrial:
        """What the storage knows of a trial."""
        return self._mending(lambda: self.optuna.get_trials(deepcopy=False)[number])

    def handle(self, frozen: FrozenTrial) -> optuna.trial.Trial:
        """To write to a trial, whichever process began it."""
        return optuna.trial.Trial(self.optuna, frozen._trial_id)

    def report(self, number: int, *, step: int, value: float) -> None:
        """See Trial.report."""

        def act() -> None:
            frozen = self.frozen(number)
            if step not in frozen.intermediate_values and frozen.state == TrialState.RUNNING:
                self.handle(frozen).report(value, step)

        self._mending(act)

    def should_prune(self, number: int) -> bool:
        """See Trial.should_prune."""
        if len(self.config.objectives) > 1:
            return False
        return self._mending(lambda: self.handle(self.frozen(number)).should_prune())

    def tell(
        self,
        number: int,
        *,
        state: TrialState,
        values: Sequence[float] | None = None,
        constraints: Mapping[str, float] | None = None,
        by_seed: Mapping[str, list[float]] | None = None,
        reason: str | None = None,
        counted: bool = True,
    ) -> None:
        """End a trial; one that has ended stays as it is."""
        attrs: dict[str, Any] = {"reason": reason, "by_seed": by_seed}
        attrs |= {} if counted else {"counted": False}

        def act() -> None:
            frozen = self.frozen(number)
            if frozen.state.is_finished():
                return
            handle = self.handle(frozen)
            for key, value in attrs.items():
                if value is not None:
                    handle.set_user_attr(key, value)
            for key, value in (constraints or {}).items():
                if key not in frozen.constraints:
                    handle.set_constraint(key, value)
            finished = values if state == TrialState.COMPLETE else None
            self.optuna.tell(number, values=finished, state=state, skip_if_finished=True)

        with contextlib.suppress(optuna.exceptions.UpdateFinishedTrialError):
            self._mending(act)

    # looking ------------------------------------------------------------------------------------
    def trials(self) -> list[FrozenTrial]:
        """Those that count towards n_trials."""
        trials = self._mending(lambda: self.optuna.get_trials(deepcopy=False))
        return [t for t in trials if _counts(t)]

    def learnt(self) -> list[FrozenTrial]:
        """Those that stand for runs of earlier sweeps."""
        number = len(self.spec.learnt)
        return self._mending(lambda: self.optuna.get_trials(deepcopy=False))[:number]

    def _running(self) -> list[FrozenTrial]:
        return [t for t in self.trials() if t.state == TrialState.RUNNING]

    def running(self) -> list[Trial]:
        """Trials that are assigned to a worker, which may have died."""
        return [self._trial(frozen) for frozen in self._running()]

    def _trial(self, frozen: FrozenTrial) -> Trial:
        return Trial(study=self, number=frozen.number, params=frozen.user_attrs["params"])

    def counts(self) -> dict[str, int]:
        """State -> trials that count towards n_trials."""
        states = [frozen.state.name for frozen in self.trials()]
        return {state: states.count(state) for state in dict.fromkeys(states)}

    def left(self) -> int:
        """Trials still to be begun."""
        if draws.grid_is_done(self):
            return 0
        return max(self.config.n_trials - len(self.trials()), 0)

    def done(self) -> bool:
        """Nothing left to begin and nothing running."""
        return self.left() == 0 and not self._running()

    def failures(self) -> list[str]:
        """Reasons of the newest failed trials in a row, newest first."""
        ended = [
            t for t in self.trials() if t.state.is_finished() and "refused" not in t.user_attrs
        ]
        reasons = []
        for frozen in sorted(ended, key=lambda t: t.datetime_complete or t.number, reverse=True):
            if frozen.state != TrialState.FAIL:
                break
            reasons.append(frozen.user_attrs.get("reason", "no reason given"))
        return reasons


def rebuild(folder: Path | str) -> Study:
    """A new journal from RUN_DIR/trial.json files; the old one is renamed."""
    study = Study(folder, Spec.read(Path(folder) / "study.json"))
    if study.config.storage:
        raise ConfigError(
            f"search.storage must be null for a journal to rebuild, got {study.config.storage!r}"
        )
    with study._alone():
        study._restore(read_records(study.output_dir, study_id=study.spec.id))
    return study


def _counts(frozen: FrozenTrial) -> bool:
    if frozen.state == TrialState.WAITING or not frozen.user_attrs.get("counted", True):
        return False
    return frozen.state.is_finished() or is_begun(frozen)


def _lost(number: int) -> FrozenTrial:
    """Stands for a trial that no run directory knows, so that the others keep their numbers."""
    trial = optuna.trial.create_trial(
        state=TrialState.FAIL, user_attrs={"counted": False, "reason": "lost with the journal"}
    )
    trial.number = number
    return trial
