"""A study on disk: which worker has which trial, and the trials' results. No process drives it.

    output_dir/sweeps/<name>/study/study.json    Spec: search, space, base configs, command
                                  /journal.log   Optuna's journal, unless search.storage names a DB
                                  /.lock         of the process that takes a trial

Each worker asks the study for a trial, reports its curve, and ends it with its result.
study.json decides: a process that takes the lock reads it again if it has changed, and updates the
journal if no other process has. So a space grows for all workers at once, and an update that was
killed is repeated.

Some trials do not count towards n_trials: points that were refused as soon as they were drawn
(`refused` in their user attributes), because they were tried before or break a constraint on their
cost, and for which another was drawn; trials that were lost with the journal; and trials that were
learnt from earlier sweeps.
"""

from __future__ import annotations

import contextlib
import dataclasses
import secrets
import sys
from collections import Counter
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
"""A trial that has lost its worker more often is taken to be the cause, and fails."""

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
        """The study in `folder`; with `create` it is begun, or continued as that says.

        A lost or damaged journal is rebuilt. ConfigError if there is no study, or if `create` is
        another search.
        """
        path = Path(folder) / "study.json"
        if create is None:
            study = cls(folder, Spec.read(path))
            study._load()
            return study
        create.check()
        create = create.absolute()
        shared.make_folder(path.parent)
        with journal.only_one(path.parent / ".lock"):
            old = Spec.read(path) if path.exists() else None
            new = dataclasses.replace(create, id=secrets.token_hex(4))
            spec = old.continue_with(create) if old else new
            spec.write(path)
            study = cls(folder, spec)
            with study._marked_locked():
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
        """To be read: best_trial(s), trials, plots."""
        if self._study is None or self._is_replaced():
            self._load()
        assert self._study is not None
        return self._study

    def _is_replaced(self) -> bool:
        """Whether another process has rebuilt the journal, or it was removed."""
        if self.config.storage:
            return False
        try:
            return self.journal_path.stat().st_ino != self._inode
        except FileNotFoundError:
            return True

    def _load(self) -> None:
        with self._lock():
            records = read_records(self.output_dir, study_id=self.spec.id)
            if self.config.storage:
                self._study = self._attach(self._database())
                n_trials = len(self._study.get_trials(deepcopy=False))
                if not n_trials or n_trials < len(self.spec.learnt):
                    self._fill(self._study, records, start=n_trials)
                return
            existed = self.journal_path.exists()
            why = journal.damage(self.journal_path) or self._open_journal(records)
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
        """Write the trial.json of trials whose process was killed between journal and record."""
        if shared.find_obstacle(self.folder):  # it can only be read
            return
        trials = self.optuna.get_trials(deepcopy=False)
        for number, record in records.items():
            frozen = trials[number]
            if frozen.state.is_finished() and frozen.state.name != record["state"]:
                self._trial(frozen).write_records()

    def _open_journal(self, records: Mapping[int, dict[str, Any]]) -> str | None:
        """Open the journal; why it cannot be used, if so. `records` were read before it."""
        try:
            self._study = self._read_journal()
            self._fit(self._study)
            return self._find_missing(records)
        except (ValueError, KeyError, TypeError, IndexError, AttributeError, AssertionError) as e:
            return f"it does not replay ({type(e).__name__})"

    def _attach(self, storage: Any) -> optuna.Study:
        """The study in the storage, begun if it is not there."""
        common = {
            "storage": storage,
            "study_name": f"{self.name}.{self.spec.id}",
            "sampler": optuna.samplers.RandomSampler(),  # draws.py sets its own
            "pruner": samplers.make_pruner(self.config),
        }
        try:
            return optuna.load_study(**common)  # create_study would write even if there is one
        except KeyError:
            directions = [objective.direction for objective in self.config.objectives]
            study = optuna.create_study(**common, directions=directions)
            study.set_user_attr("space", growth.mark(self.spec))
            return study

    def _read_journal(self) -> optuna.Study:
        self._inode = self.journal_path.stat().st_ino
        return self._attach(journal.journal_storage(self.journal_path))

    def _fit(self, study: optuna.Study) -> None:
        """Bring what was learnt, and the space if it has grown, into a journal that lacks them."""
        if shared.find_obstacle(self.folder):  # it can only be read
            return
        if (n_trials := len(study.get_trials(deepcopy=False))) < len(self.spec.learnt):
            self._fill(study, {}, start=n_trials)
        if study.user_attrs.get("space") == growth.mark(self.spec):
            return
        with journal.unchanged(self.journal_path):
            attrs = study._storage.get_study_system_attrs(study._study_id)
            trials = study.get_trials(deepcopy=False)
            new = self._new_journal(growth.carry_over(trials, self.spec), attrs=attrs)
            new.replace(self.journal_path)
        self._study = self._read_journal()

    def _restore(self, records: Mapping[int, dict[str, Any]]) -> None:
        """Put a journal with these trials in the place of the one that is there, if any."""
        new = self._new_journal(growth.carry_over(self._trials_of(records), self.spec))
        with journal.unchanged(self.journal_path):
            journal.set_aside(self.journal_path)
            new.replace(self.journal_path)
        assert self._open_journal(records) is None
        self._enqueue()

    def _new_journal(
        self, trials: Sequence[FrozenTrial], *, attrs: Mapping[str, Any] | None = None
    ) -> Path:
        """A file with these trials, and the system attributes of the study, which samplers use."""
        path = self.journal_path.with_name("journal.new")
        path.unlink(missing_ok=True)
        shared.touch(path)
        study = self._attach(journal.journal_storage(path))
        study.add_trials(trials)
        for key, value in (attrs or {}).items():
            study._storage.set_study_system_attr(study._study_id, key, value)
        return path

    def _fill(
        self, study: optuna.Study, records: Mapping[int, dict[str, Any]], *, start: int = 0
    ) -> None:
        """Add the trials from number `start` on."""
        study.add_trials(growth.carry_over(self._trials_of(records), self.spec)[start:])

    def _trials_of(self, records: Mapping[int, dict[str, Any]]) -> list[FrozenTrial]:
        """All trials, from these records and study.json."""
        n_learnt = len(self.spec.learnt)

        def trial(number: int) -> FrozenTrial:
            if number in records:
                return from_record(records[number])
            return learn.to_trial(number, self.spec) if number < n_learnt else _lost(number)

        return [trial(number) for number in range(max(max(records, default=-1) + 1, n_learnt))]

    def _find_missing(self, records: Mapping[int, dict[str, Any]]) -> str | None:
        """What the journal lacks that the run directories have, if anything."""
        assert self._study is not None
        trials = self._study.get_trials(deepcopy=False)
        written = growth.fit([from_record(record) for record in records.values()], self.spec)
        for number, record in zip(records, written, strict=True):
            if number >= len(trials):
                return f"it lacks trial {number}"
            trial, ended = trials[number], record.state.is_finished()
            if trial.params != record.params or (ended and not trial.state.is_finished()):
                return f"it is behind in trial {number}"
        return None

    def _enqueue(self) -> None:
        """Queue the settings of search.enqueue that are not there yet."""
        with self._lock():
            study = self.optuna
            queued = [t.system_attrs.get("fixed_params") for t in study.get_trials(deepcopy=False)]
            for entry in self.spec.enqueued():
                if entry not in queued:
                    study.enqueue_trial(entry)

    @contextlib.contextmanager
    def _lock(self) -> Iterator[None]:
        """A context that one process has at a time, to take trials or to mend the journal."""
        if self._locked:
            yield
            return
        with journal.only_one(self.folder / ".lock"), self._marked_locked():
            self._reread()
            yield

    @contextlib.contextmanager
    def _marked_locked(self) -> Iterator[None]:
        """A context in which `_lock` does not wait for the lock that this process has."""
        self._locked = True
        try:
            yield
        finally:
            self._locked = False

    def _reread(self) -> None:
        """Read study.json if a command has written it since: the space may have grown."""
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

    def mending(self, action: Callable[[], Result]) -> Result:
        """Call `action`; if it fails as with a damaged journal, load the study and call again."""
        try:
            return action()
        except (ValueError, KeyError, AssertionError):
            self._study = None
            return action()

    # taking -------------------------------------------------------------------------------------
    def take(
        self, worker: Worker, *, has_ended: Callable[[Worker], bool] = lambda worker: False
    ) -> Trial | None:
        """The trial for this worker: its own, an orphan, or a new one; None: no trial is left.

        An orphan is a trial whose worker certainly `has_ended`, which is asked outside the lock.
        """
        return self.mending(lambda: self._take(worker, self._orphans(has_ended)))

    def _take(self, worker: Worker, orphans: dict[int, Any]) -> Trial | None:
        with self._lock():
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

    def _orphans(self, has_ended: Callable[[Worker], bool]) -> dict[int, Any]:
        """Number -> worker, of running trials with a worker that has ended."""
        holders = {frozen.number: frozen.user_attrs["worker"] for frozen in self._running()}
        return {n: holder for n, holder in holders.items() if has_ended(Worker(**holder))}

    def _adopt(self, frozen: FrozenTrial, worker: Worker, *, mine: bool) -> Trial | None:
        """Give the trial to this worker, which resumes its runs; None if it fails instead."""
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

    # writing ------------------------------------------------------------------------------------
    def frozen(self, number: int) -> FrozenTrial:
        """A trial as it is in the storage."""
        return self._all()[number]

    def handle(self, frozen: FrozenTrial) -> optuna.trial.Trial:
        """For writing to a trial, whichever process began it."""
        return optuna.trial.Trial(self.optuna, frozen._trial_id)

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
        attrs = {"reason": reason, "by_seed": by_seed, "counted": None if counted else False}

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
            self.mending(act)

    # reading ------------------------------------------------------------------------------------
    def trials(self) -> list[FrozenTrial]:
        """The trials that count towards n_trials."""
        return [t for t in self._all() if _counts(t)]

    def learnt(self) -> list[FrozenTrial]:
        """The trials that were learnt from earlier sweeps."""
        return self._all()[: len(self.spec.learnt)]

    def _all(self) -> list[FrozenTrial]:
        return self.mending(lambda: self.optuna.get_trials(deepcopy=False))

    def _running(self) -> list[FrozenTrial]:
        return [t for t in self.trials() if t.state == TrialState.RUNNING]

    def running(self) -> list[Trial]:
        """The trials that have a worker, which may have died."""
        return [self._trial(frozen) for frozen in self._running()]

    def _trial(self, frozen: FrozenTrial) -> Trial:
        return Trial(study=self, number=frozen.number, params=frozen.user_attrs["params"])

    def counts(self) -> dict[str, int]:
        """State -> trials that count towards n_trials."""
        return dict(Counter(frozen.state.name for frozen in self.trials()))

    def left(self) -> int:
        """How many trials are still to be begun."""
        if draws.grid_is_done(self):
            return 0
        return max(self.config.n_trials - len(self.trials()), 0)

    def done(self) -> bool:
        """Whether no trial is left to begin and none is running."""
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
    """Make a new journal from the RUN_DIR/trial.json files and rename the old one; the study."""
    study = Study(folder, Spec.read(Path(folder) / "study.json"))
    if study.config.storage:
        raise ConfigError(
            f"search.storage must be null for a journal to rebuild, got {study.config.storage!r}"
        )
    with study._lock():
        study._restore(read_records(study.output_dir, study_id=study.spec.id))
    return study


def _counts(frozen: FrozenTrial) -> bool:
    if frozen.state == TrialState.WAITING or not frozen.user_attrs.get("counted", True):
        return False
    return frozen.state.is_finished() or is_begun(frozen)


def _lost(number: int) -> FrozenTrial:
    """In the place of a trial that is in no run directory: the others keep their numbers."""
    trial = optuna.trial.create_trial(
        state=TrialState.FAIL, user_attrs={"counted": False, "reason": "lost with the journal"}
    )
    trial.number = number
    return trial
