"""Evaluate checkpoints, apart from training: `python -m experiments.run.evaluate REQUEST`.

    RUN_DIR/evals/<name>/request-<digest>.json      what is asked for; a job's only argument
    RUN_DIR/evals/<name>/step-00000200-blimp.json   result of one eval at one checkpoint

Writes below evals/ alone: the run may be training meanwhile. Not for: choosing runs and settings
(`sweeps/commands/eval.py`).
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from experiments import environment, json_files
from experiments.disk import inputs
from experiments.disk.evaluations import PLAIN, evaluations, results, settings_digest
from experiments.disk.run_dir import RunDir
from experiments.errors import one_line
from experiments.identity import config_from_json
from experiments.scheduler import enter_job
from relora_core import atomic, shared
from relora_core.config import EVALS, ConfigError, EvalConfig, RunConfig, runs_eval, validate
from relora_core.data import load_tokenizer
from relora_core.data.base import DataError
from relora_core.sources import code_hash

if TYPE_CHECKING:
    from relora_core.evals import Eval
    from relora_core.model import Decoder

RESERVED = ("dynamics", "perf", "phase", "restart", "train")
"""Names that would clash with metrics of training."""
SAY_EVERY_S = 30.0


@dataclass(kw_only=True, slots=True)
class Request:
    """Which evals of which checkpoints of one run."""

    name: str = PLAIN
    """First part of the metrics' names."""
    eval: EvalConfig
    """With fingerprints, as `complete_eval` gives it."""
    steps: str | list[int] = "last"
    """`last`: the newest checkpoint when the evaluation begins; `all`; or steps."""
    changes: list[dict[str, str]] = field(default_factory=list)
    """Changed inputs that the user accepted (`inputs.Change`)."""


# requests -----------------------------------------------------------------------------------------
def complete_eval(config: RunConfig, *, eval: EvalConfig) -> EvalConfig:
    """`eval` for a run of `config`, with fingerprints; ConfigError if data or tokenizer are bad.

    Every record of the evals' files is read.
    """
    from relora_core import evals  # numpy

    config = replace(config, eval=eval)
    validate(config)
    digests = evals.inspect(config)
    evals.prepare(config, load_tokenizer(config.data))
    if not digests:
        raise ConfigError(
            "at least one eval must be on, with a path where data is not grammar, got none; for "
            f"example eval.{EVALS[-1]}.path=FOLDER"
        )
    sections = {
        f.name: replace(
            getattr(eval, f.name),
            enabled=f.name in digests,
            every_steps=None,  # only training uses it
            fingerprint=digests.get(f.name),
        )
        for f in dataclasses.fields(eval)
    }
    return EvalConfig(**sections)


def check(run_dir: RunDir, *, request: Request) -> None:
    """ConfigError if the request's name would give a metric of the run a second meaning."""
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]{0,63}", request.name) or request.name in RESERVED:
        raise ConfigError(
            "--as must be a name of letters, digits, '.', '_' and '-' other than "
            f"{', '.join(RESERVED)}, got {request.name!r}; nearest valid: "
            f"{re.sub(r'[^A-Za-z0-9]+', '_', request.name).strip('_')[:60] or 'other'}_eval"
        )
    config = run_dir.config()
    earlier = {
        result["section"]: result["digest"] for result in results(run_dir, name=request.name)
    }
    for section, digest in _digests(request.eval).items():
        own = settings_digest(config.eval, section) if runs_eval(config, section) else digest
        if request.name == PLAIN and own != digest:
            raise ConfigError(
                f"--as must keep metrics apart from those of training, since the run's own "
                f"eval.{section} has other settings in {run_dir.run_id}, got {PLAIN!r}; nearest "
                f"valid: --as {PLAIN}_2"
            )
        if earlier.get(section, digest) != digest:
            raise ConfigError(
                f"--as must be a new name, since {run_dir.run_id} was evaluated under it with "
                f"other settings of eval.{section}, got {request.name!r}; nearest valid: "
                f"{request.name}_2"
            )


def write_request(run_dir: RunDir, *, request: Request) -> Path:
    """Write the request; equal requests are one file."""
    content = dataclasses.asdict(request)
    if not request.changes:
        del content["changes"]  # as earlier versions wrote it: the same file
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:8]
    path = run_dir.evals / request.name / f"request-{digest}.json"
    shared.make_folder(path.parent)
    if not path.exists():
        atomic.write_json(path, content)
    return path


def read_request(path: Path) -> tuple[RunDir, Request]:
    """The run and its request in a file; ConfigError if there is none."""
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        run_dir = RunDir(path.resolve().parents[2])
        own = json.loads(run_dir.config_path.read_text(encoding="utf-8"))
        config = config_from_json(json.dumps(own | {"eval": raw["eval"]}))
        if not isinstance(raw["steps"], list) and raw["steps"] not in ("last", "all"):
            raise ValueError(f"steps: expected last, all or a list, got {raw['steps']!r}")
        changes = raw.get("changes", [])
        if not json_files.fits(list[dict[str, str]], changes):
            raise ValueError(f"changes: expected a list, got {changes!r:.60}")
        return run_dir, Request(
            name=raw["name"], eval=config.eval, steps=raw["steps"], changes=changes
        )
    except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
        what = " ".join(str(error).split())
        raise ConfigError(
            f"REQUEST must be RUN_DIR/evals/<name>/request-<digest>.json, got {path} ({what})"
        ) from None


def missing(run_dir: RunDir, *, request: Request) -> list[int]:
    """Steps of the checkpoints that the request wants and some eval has no result of yet."""
    steps = run_dir.checkpoint_steps()
    if isinstance(request.steps, list):
        steps = [step for step in steps if step in request.steps]
    elif request.steps == "last":
        steps = steps[-1:]
    return [step for step in steps if _sections_left(run_dir, request=request, step=step)]


def _sections_left(run_dir: RunDir, *, request: Request, step: int) -> list[str]:
    stored = {(r["section"], r["step"], r["digest"]) for r in results(run_dir, name=request.name)}
    return [s for s, d in _digests(request.eval).items() if (s, step, d) not in stored]


def _digests(eval: EvalConfig) -> dict[str, str]:
    """Section -> digest of its settings, of the evals that are on."""
    names = [f.name for f in dataclasses.fields(eval) if getattr(eval, f.name).enabled]
    return {name: settings_digest(eval, name) for name in names}


# the work -----------------------------------------------------------------------------------------
def evaluate(run_dir: RunDir, *, request: Request, say: Callable[[str], None] = print) -> None:
    """Run the evals of `request` that have no result yet, a file for each eval of each checkpoint.

    `say` gets lines for the user, such as when a running trainer removes a checkpoint meanwhile.
    """
    from relora_core import evals, gpu, native  # torch

    check(run_dir, request=request)
    if not run_dir.checkpoint_steps():
        raise ConfigError(f"RUN must have a checkpoint, got {run_dir.run_id} without one")
    config = replace(run_dir.config(), eval=request.eval)
    wanted = request.steps if isinstance(request.steps, list) else []
    for step in sorted(set(wanted) - set(run_dir.checkpoint_steps()) - set(evaluations(run_dir))):
        say(f"{run_dir.run_id} has no checkpoint of step {step}: left out")
    steps = missing(run_dir, request=request)
    if not steps:
        return
    config = _opened(run_dir, config, request=request)
    prepared = evals.prepare(config, load_tokenizer(config.data))
    with _restoring_threads(), native.restore_choice(), gpu.settings(config):
        for step in steps:
            model = _load(config, run_dir.checkpoints / f"step-{step:08d}")
            if model is None:
                say(f"{run_dir.run_id} step {step}: the checkpoint was removed: left out")
                continue
            left = _sections_left(run_dir, request=request, step=step)
            for evaluation in [e for e in prepared if e.name in left]:
                _evaluate(run_dir, request, step=step, evaluation=evaluation, model=model, say=say)


def check_inputs(run_dir: RunDir, *, eval: EvalConfig) -> inputs.Checked:
    """Whether an evaluation reads what the run and `eval` have fingerprints of."""
    config = replace(inputs.with_accepted(run_dir, run_dir.config()), eval=eval)
    return inputs.check(config, output_dir=run_dir.output_dir, only=("tokenizer", *EVALS))


def _opened(run_dir: RunDir, config: RunConfig, *, request: Request) -> RunConfig:
    """`config` with the stored copy of the tokenizer; ConfigError if something has changed."""
    checked = check_inputs(run_dir, eval=request.eval)
    accepted = {(change["key"], change["now"]) for change in request.changes}
    if new := [c for c in checked.changes if (c.key, c.now) not in accepted]:
        raise inputs.refusal(new, remedy="ask for the evaluation again")
    return replace(config, data=checked.config.data)


def _load(config: RunConfig, checkpoint: Path) -> Decoder | None:
    """The model as training had it, adapters apart; None if the checkpoint was removed."""
    import torch

    from relora_core import native  # these need torch
    from relora_core.checkpoint import load_weights, read_progress
    from relora_core.methods import build_method
    from relora_core.model import Decoder

    try:
        progress = read_progress(checkpoint)
        weights = load_weights(checkpoint)
    except (OSError, DataError) as error:
        if not (checkpoint / "model.safetensors").exists() or isinstance(error, FileNotFoundError):
            return None
        raise
    with torch.random.fork_rng(devices=[]):
        model = Decoder(config.model)
        method = build_method(config)
        method.adapt(model)
    try:
        model.load_state_dict(weights)
    except RuntimeError:
        raise DataError(f"{checkpoint} must hold the weights of its run's config") from None
    method.load_state_dict(progress.method)
    environment.check_gpu(config)
    if config.runtime.device != "cpu" and torch.cuda.is_available():
        model.to("cuda")
    else:
        torch.set_num_threads(progress.threads)  # others would round differently
        asked = progress.kernels or config.runtime.kernels
        if native.choose(asked) == "torch" and asked == "native":
            line = f"no native kernels, the last digits may differ: {native.problem()}"
            print(f"warning: {line}", file=sys.stderr)
    return model


@contextlib.contextmanager
def _restoring_threads() -> Iterator[None]:
    import torch

    threads = torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _evaluate(
    run_dir: RunDir,
    request: Request,
    *,
    step: int,
    evaluation: Eval,
    model: Decoder,
    say: Callable[[str], None],
) -> None:
    where, said_at = f"{run_dir.run_id} step {step}", time.monotonic()

    def progress(done: int, total: int) -> None:
        nonlocal said_at
        if time.monotonic() - said_at >= SAY_EVERY_S:
            said_at = time.monotonic()
            say(f"{where}: {evaluation.name} {done}/{total}")

    result = evaluation.run(model, progress=progress)
    metrics = {
        f"{request.name}/{name.removeprefix('eval/')}": value
        for name, value in result.metrics.items()
    }
    content = {
        "name": request.name,
        "section": evaluation.name,
        "step": step,
        "metrics": metrics,
        "tables": result.tables,
        "eval": dataclasses.asdict(getattr(request.eval, evaluation.name)),
        "digest": settings_digest(request.eval, evaluation.name),
        "code_hash": code_hash(),
        "finished": time.time(),
    }
    if request.changes:
        content["changes"] = request.changes
    folder = run_dir.evals / request.name
    shared.make_folder(folder)
    atomic.write_json(folder / f"step-{step:08d}-{evaluation.name}.json", content)
    name, value = next(iter(metrics.items()))
    say(f"{where}: {name} {value:.5g}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Evaluate a request. Exit codes: 0 if all that could be evaluated is, else 1 with a line."""
    words = sys.argv[1:] if arguments is None else list(arguments)
    if len(words) != 1 or words[0].startswith("-"):
        print("usage: python -m experiments.run.evaluate REQUEST", file=sys.stderr)
        return 1
    enter_job()
    try:
        run_dir, request = read_request(Path(words[0]))
        evaluate(run_dir, request=request, say=lambda line: print(line, flush=True))
    except (ConfigError, DataError, OSError) as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
