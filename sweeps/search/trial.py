"""A trial: one point of the space, run at each seed, and what it reports to the study.

RUN_DIR/trial.json has all that the study knows of the trial, so that a lost journal can be rebuilt.
If several trials have the same run, it has the newest, and in that the `earlier` ones.
"""

from __future__ import annotations

import json
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from optuna.distributions import distribution_to_json, json_to_distribution
from optuna.trial import FrozenTrial, TrialState

from experiments.disk.output_dir import runs_folder
from experiments.disk.run_dir import RunDir
from experiments.identity import run_id
from relora_core import atomic
from relora_core.config import RunConfig
from sweeps.search.objective import Verdict, judge
from sweeps.search.space import is_active, ordered

if TYPE_CHECKING:
    from sweeps.search.study import Spec, Study

RECORD = "trial.json"


@dataclass(kw_only=True, slots=True, frozen=True)
class Worker:
    """The process that has a trial."""

    host: str
    pid: int
    started: float = 0.0
    """psutil's create_time: distinguishes processes of one pid."""
    birth: str | None = None
    """The same in a form that changes of the clock do not affect (`process.process_start`)."""
    job_id: str | None = None
    """Of the scheduler; a requeued job keeps it."""

    def is_same(self, other: Worker) -> bool:
        """Whether it is the same process, or another start of the same job."""
        if self.job_id != other.job_id:
            return False
        if self.job_id is not None:
            return True
        began = self.birth == other.birth if self.birth else self.started == other.started
        return began and (self.host, self.pid) == (other.host, other.pid)


@dataclass(kw_only=True, slots=True)
class Trial:
    """A handle: its state is in the study's storage."""

    study: Study
    number: int
    params: dict[str, Any]
    """Key of the space (groups by their name) -> value; keys that do not apply are absent."""

    def config(self, seed: int) -> RunConfig:
        """What the trial runs at this seed; not validated (the study has)."""
        return config_at(self.study.spec, self.params, seed=seed)

    @property
    def name(self) -> str:
        """`trial 3`, or `trial 3 of lora` in a search with arms."""
        return f"trial {self.number}" + (f" of {self.study.arm}" if self.study.arm else "")

    @property
    def seeds(self) -> list[int]:
        return self.study.config.seeds

    @property
    def run_ids(self) -> list[str]:
        """One per seed, in their order."""
        return [run_id(self.config(seed)) for seed in self.seeds]

    @property
    def runs(self) -> list[RunDir]:
        folder = runs_folder(self.study.output_dir)
        return [RunDir(folder / id_) for id_ in self.run_ids]

    @property
    def worker(self) -> Worker:
        """Who has the trial now: another process may have adopted it."""
        return Worker(**self.study.frozen(self.number).user_attrs["worker"])

    def belongs_to(self, worker: Worker) -> bool:
        return self.worker.is_same(worker)

    def is_newest_of(self, run: RunDir) -> bool:
        """Whether no other trial, of this search or another, has asked for the run since."""
        newest = next(_read(run.path / RECORD), None)
        return newest is not None and _id(newest) == (self.study.spec.id, self.number)

    # reports to the study -----------------------------------------------------------------------
    def report(self, step: int, value: float) -> None:
        """Report a value of the curve; the same step again changes nothing.

        Nothing is reported with several objectives, which have no pruning.
        """
        if len(self.study.config.objectives) > 1:
            return

        def act() -> None:
            frozen = self.study.frozen(self.number)
            if step not in frozen.intermediate_values and frozen.state == TrialState.RUNNING:
                self.study.handle(frozen).report(value, step)

        self.study.mending(act)
        self.write_records()

    def should_prune(self) -> bool:
        """Whether the pruner would end it here."""
        if len(self.study.config.objectives) > 1:
            return False
        study = self.study
        with warnings.catch_warnings():  # after a diverged seed Wilcoxon's test prunes nothing
            warnings.filterwarnings("ignore", "The intermediate values of the ", UserWarning)
            return study.mending(lambda: study.handle(study.frozen(self.number)).should_prune())

    def finish(self) -> Verdict:
        """Judge the trial by its runs; end it in the study: COMPLETE, or FAIL with the reason."""
        verdict = judge(self.study.config, self.runs)
        if verdict.values is None:
            self.fail(verdict.reason or "there are no values")
            return verdict
        self.study.tell(
            self.number,
            state=TrialState.COMPLETE,
            values=verdict.values,
            constraints=verdict.constraints,
            by_seed=verdict.by_seed,
        )
        self.write_records()
        return verdict

    def prune(self) -> None:
        """End it in the study as pruned."""
        self.study.tell(self.number, state=TrialState.PRUNED)
        self.write_records()

    def fail(self, reason: str) -> None:
        """End it in the study as failed."""
        self.study.tell(self.number, state=TrialState.FAIL, reason=reason)
        self.write_records()

    def write_records(self) -> None:
        """Write RUN_DIR/trial.json in those of the trial's run directories that exist."""
        frozen = self.study.frozen(self.number)
        for seed, run in zip(self.seeds, self.runs, strict=True):
            if run.path.is_dir():
                record = to_record(frozen, study=self.study, params=self.params, seed=seed)
                earlier = _read(run.path / RECORD)
                record["earlier"] = [one for one in earlier if _id(one) != _id(record)]
                atomic.write_json(run.path / RECORD, record)


def is_begun(frozen: FrozenTrial) -> bool:
    """Whether a worker has it: then it has all its parameters and is worth running."""
    return "worker" in frozen.user_attrs


def config_at(spec: Spec, params: dict[str, Any], *, seed: int | None = None) -> RunConfig:
    """The config at a point of the space; groups that `params` lacks have their first option."""
    choices = {g: params.get(g, spec.space[g].values[0]) for g in spec.groups}  # type: ignore[union-attr]
    values = {key: value for key, value in params.items() if key not in spec.groups}
    return spec.at(choices, values if seed is None else {**values, "seed": seed})


def fill(spec: Spec, take: Callable[[str, RunConfig], Any]) -> dict[str, Any]:
    """A point of the space, key by key.

    `take(key, config)` gives the value of each key that applies to `config`, which has the values
    of the keys before it.
    """
    params: dict[str, Any] = {}
    for key in ordered(spec.space, groups=spec.groups, when=spec.config.when):
        config = config_at(spec, params)
        if is_active(
            key,
            params=params,
            space=spec.space,
            when=spec.config.when,
            config=config,
            group=key in spec.groups,
        ):
            params[key] = take(key, config)
    return params


def spell(params: Mapping[str, object]) -> str:
    """`model=tiny train.lr=0.00123`."""
    short = {k: f"{v:.4g}" if isinstance(v, float) else v for k, v in params.items()}
    return " ".join(f"{key}={value}" for key, value in short.items())


# trial.json -------------------------------------------------------------------------------------
def to_record(
    frozen: FrozenTrial, *, study: Study, params: dict[str, Any], seed: int
) -> dict[str, Any]:
    """All data of a trial, as JSON."""
    return {
        "study": study.name,
        "arm": study.arm,
        "study_id": study.spec.id,
        "number": frozen.number,
        "seed": seed,
        "state": frozen.state.name,
        "values": frozen.values,
        "params": params,
        "stored": frozen.params,
        "distributions": {k: distribution_to_json(d) for k, d in frozen.distributions.items()},
        "intermediate": {str(step): value for step, value in frozen.intermediate_values.items()},
        "user_attrs": frozen.user_attrs,
        "system_attrs": dict(frozen.system_attrs),
        "started": _stamp(frozen.datetime_start),
        "ended": _stamp(frozen.datetime_complete),
        "written": time.time(),
    }


def from_record(record: dict[str, Any]) -> FrozenTrial:
    """Inverse of `to_record`."""
    return FrozenTrial(
        number=record["number"],
        trial_id=record["number"],
        state=TrialState[record["state"]],
        value=None,
        values=record["values"],
        datetime_start=_time(record["started"]),
        datetime_complete=_time(record["ended"]),
        params=record["stored"],
        distributions={k: json_to_distribution(d) for k, d in record["distributions"].items()},
        user_attrs=record["user_attrs"],
        system_attrs=record["system_attrs"],
        intermediate_values={int(step): v for step, v in record["intermediate"].items()},
    )


def read_records(output_dir: Path, *, study_id: str) -> dict[int, dict[str, Any]]:
    """Number -> newest record of each of a study's trials, from all run directories."""
    newest: dict[int, dict[str, Any]] = {}
    for path in sorted(runs_folder(output_dir).glob(f"*/{RECORD}")):
        for record in _read(path):
            number = record.get("number")
            if record.get("study_id") != study_id or not isinstance(number, int):
                continue
            if number not in newest or newest[number]["written"] < record["written"]:
                newest[number] = record
    return newest


def _read(path: Path) -> Iterator[dict[str, Any]]:
    """The records in a trial.json; none if it is missing or damaged."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        earlier = record.pop("earlier", [])
    except (OSError, ValueError, AttributeError):
        return
    yield record
    yield from earlier


def _id(record: dict[str, Any]) -> tuple[Any, Any]:
    return record["study_id"], record["number"]


def _stamp(moment: datetime | None) -> str | None:
    return None if moment is None else moment.astimezone().isoformat(timespec="microseconds")


def _time(text: str | None) -> datetime | None:
    """In local time without a zone, as Optuna has it."""
    return None if text is None else datetime.fromisoformat(text).astimezone().replace(tzinfo=None)
