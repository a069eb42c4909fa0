"""`python -m sweeps eval`: evaluate checkpoints that exist, with the runs' own evals or others."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from experiments.disk import evaluations, inputs
from experiments.disk.output_dir import plan_folder
from experiments.errors import one_line
from experiments.metrics import charted
from experiments.run import evaluate
from experiments.run.evaluate import Request
from relora_core import shell
from relora_core.config import ConfigError, EvalConfig, RunConfig, nearest, walk
from relora_core.data.base import DataError
from relora_core.data.places import expand
from sweeps.commands import selection
from sweeps.commands.selection import Run
from sweeps.display import make_console
from sweeps.launchers import load_launcher
from sweeps.slurm import evals

HELP = "evaluate checkpoints again or with other evals, without training"
EXAMPLES = """examples:
  python -m sweeps eval model-relora.r --steps all           the runs' own evals, every checkpoint
  python -m sweeps eval model-relora.r eval.blimp.path=DIR   one that they did not have
  python -m sweeps eval RUN eval.paloma.split=test --as test    test/paloma/... beside eval/...
  python -m sweeps eval model-relora.r eval=paloma_blimp --slurm --after    as jobs, after the runs'

Settings choose the evals that they name and change the run's own value of that key (a new path
begins from the defaults); eval=OPTION chooses those of conf/eval/OPTION.yaml. What has been
evaluated already is not repeated. A run that is training goes on: its checkpoints are only read.
"""
SAME_TEXTS = ("enabled", "every_steps", "precision")
"""Knobs that do not change which texts an eval has; nor do those that begin with max_."""


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "words",
        nargs="+",
        metavar="SWEEP|RUN|eval.KEY=VALUE",
        help="sweeps, (parts of) run ids, and settings",
    )
    parser.add_argument(
        "--steps", default="last", help="of the checkpoints: last (default), all, or like 100,200"
    )
    parser.add_argument(
        "--as", dest="name", default="eval", help="first part of the metrics' names (default: eval)"
    )
    parser.add_argument(
        "--accept-changed",
        action="store_true",
        help="with --as: evaluate texts or a tokenizer that have changed, and record that",
    )
    parser.add_argument("--slurm", action="store_true", help="as jobs, like the sweep's own")
    parser.add_argument(
        "--after", action="store_true", help="with --slurm: when the runs' jobs have ended"
    )


def run(args: argparse.Namespace) -> int:
    shell.require_one_process("an evaluation")
    words = [w for w in args.words if "=" not in w or selection.is_named(args.output_dir, w)]
    settings = eval_settings([word for word in args.words if word not in words])
    steps = _steps(args.steps)
    if args.after and not args.slurm:
        raise ConfigError("--after needs --slurm: here an evaluation waits for nothing")
    if not words:
        raise ConfigError("SWEEP|RUN must name runs to evaluate, got settings alone")
    runs = selection.resolve(args.output_dir, words)
    waiting = _waiting(runs) if args.after else []
    requests = _requests(
        runs,
        settings=settings,
        steps=steps,
        name=args.name,
        waiting=waiting,
        accept=args.accept_changed,
    )
    todo = [
        (run, request)
        for run, request in requests
        if run.run_id in waiting or evaluate.missing(run.dir, request=request)
    ]
    if args.slurm and todo:
        return _submit(todo, words=words, output_dir=args.output_dir, after=args.after)
    code = _evaluate_here(todo)
    _show(requests)
    return code


# what is asked for ------------------------------------------------------------------------------
def eval_settings(overrides: Sequence[str]) -> Callable[[RunConfig], EvalConfig]:
    """From a run's config to the evals that `overrides` ask for; ConfigError for a typo."""
    from experiments import schema, typos  # Hydra: 0.1 s that no other command needs

    keys = [text.partition("=")[0] for text in overrides]
    eval_keys = [key for key in typos.schema_keys() if key.split(".")[0] == "eval"]
    for key, text in zip(keys, overrides, strict=True):
        if key in eval_keys:
            continue
        if key.startswith("eval."):
            raise ConfigError(f"{key} is not a known key ({text}).{nearest(key, eval_keys)}")
        raise ConfigError(
            f"{key} must be eval or a key below it ({text}), since all else is frozen in the "
            f"runs.{nearest(key, eval_keys)}"
        )
    if not overrides:
        return lambda config: config.eval
    composed = schema.compose([*schema.NO_EXPERIMENT, *overrides])
    return lambda config: _changed(config.eval, composed, keys=keys)


def _changed(own: EvalConfig, composed: RunConfig, *, keys: Sequence[str]) -> EvalConfig:
    """The evals that `keys` name, with the run's own values of all other keys.

    With a new path the other keys have defaults: the run's limits were chosen for its own texts.
    """
    given: dict[str, dict[str, Any]] = {f.name: {} for f in dataclasses.fields(own)}
    defaults = EvalConfig()
    for leaf, f, value in walk(composed.eval, "eval."):
        named = any(leaf == key or leaf.startswith(f"{key}.") for key in keys if key != "eval")
        section = getattr(defaults, leaf.split(".")[1])
        of_option = f.name == "enabled" or value != getattr(section, f.name)
        if named or ("eval" in keys and of_option):
            given[leaf.split(".")[1]][f.name] = value
    sections = {}
    for name, values in given.items():
        base = getattr(EvalConfig() if "path" in values else own, name)
        if not all(key in SAME_TEXTS or key.startswith("max_") for key in values):
            base = dataclasses.replace(base, fingerprint=None)  # other texts than the run's own
        sections[name] = dataclasses.replace(base, **{"enabled": bool(values), **values})
    return EvalConfig(**sections)


def _absolute(eval: EvalConfig) -> EvalConfig:
    """With absolute paths: a job may begin in another folder."""
    sections = {f.name: getattr(eval, f.name) for f in dataclasses.fields(eval)}
    for name, section in sections.items():
        if section.path is not None:
            path = str(expand(section.path).resolve())
            sections[name] = dataclasses.replace(section, path=path)
    return EvalConfig(**sections)


def _steps(text: str) -> str | list[int]:
    if text in ("last", "all"):
        return text
    try:
        return sorted({int(part) for part in text.split(",") if part})
    except ValueError:
        hint = nearest(text, ("last", "all"))
        raise ConfigError(
            f"--steps must be last, all or like 100,200, got {text!r}.{hint}"
        ) from None


def _waiting(runs: Sequence[Run]) -> list[str]:
    """Ids of the runs that SLURM jobs are still to end."""
    in_flight = {id_: s for id_, s in selection.survey(runs).items() if s.state.in_flight}
    for id_, state in in_flight.items():
        if state.job_id is None:
            raise ConfigError(
                f"--after must name runs of SLURM jobs, got {id_} ({state.state} without one)"
            )
    return list(in_flight)


def _requests(
    runs: Sequence[Run],
    *,
    settings: Callable[[RunConfig], EvalConfig],
    steps: str | list[int],
    name: str,
    waiting: Sequence[str],
    accept: bool,
) -> list[tuple[Run, Request]]:
    """A checked request per run; prints which runs are left out for lack of a checkpoint."""
    completed: dict[str, tuple[EvalConfig, list[dict[str, str]]]] = {}
    requests = []
    for run in runs:
        there = run.dir.checkpoint_steps()
        some = there if isinstance(steps, str) else sorted(set(there) & set(steps))
        done = not isinstance(steps, str) and set(steps) & set(evaluations.evaluations(run.dir))
        if not some and not done and run.run_id not in waiting:
            has = f" (it has {', '.join(map(str, there))})" if there else ""
            print(f"{run.name}: no such checkpoint{has}: left out", file=sys.stderr)
            continue
        config = inputs.with_accepted(run.dir, run.dir.config())
        wanted = _absolute(settings(config))
        key = repr((wanted, config.data, config.model))
        if key not in completed:
            seen = evaluate.check_inputs(run.dir, eval=wanted)
            _check_changes(seen.changes, name=name, accept=accept)
            eval = evaluate.complete_eval(
                dataclasses.replace(config, data=seen.config.data), eval=wanted
            )
            completed[key] = eval, [dataclasses.asdict(change) for change in seen.changes]
        eval, changes = completed[key]
        request = evaluate.Request(name=name, eval=eval, steps=steps, changes=changes)
        evaluate.check(run.dir, request=request)
        requests.append((run, request))
    if not requests:
        raise ConfigError(
            "SWEEP|RUN must name runs with a checkpoint of --steps, got none among "
            f"{len(runs)}; `--slurm --after` waits for runs that are at work"
        )
    return requests


def _check_changes(changes: Sequence[inputs.Change], *, name: str, accept: bool) -> None:
    """ConfigError unless the changes are accepted, under another name for the metrics."""
    if changes and not (accept and name != evaluate.PLAIN):
        raise inputs.refusal(
            changes,
            remedy="`--accept-changed --as NAME` evaluates what is there now, under a name apart",
        )


# doing it ---------------------------------------------------------------------------------------
def _evaluate_here(todo: Sequence[tuple[Run, Request]]) -> int:
    """Evaluate one after another; print failures and go on."""
    failed = 0
    for number, (run, request) in enumerate(todo, 1):
        print(f"[{number}/{len(todo)}] {run.name}", file=sys.stderr, flush=True)
        evaluate.write_request(run.dir, request=request)
        try:
            evaluate.evaluate(run.dir, request=request, say=_say)
        except (ConfigError, DataError, OSError) as error:
            failed += 1
            _say(f"{run.name}: {one_line(error)}")
    return int(failed > 0)


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _submit(
    todo: Sequence[tuple[Run, Request]], *, words: Sequence[str], output_dir: str, after: bool
) -> int:
    """Submit for each sweep by which the runs were named, else to which they belong."""
    groups: dict[str, list[tuple[Run, Request]]] = {}
    for run, request in todo:
        sweep = next((name for name in run.sweeps if name in words), run.sweep)
        if sweep is None:
            raise ConfigError(f"--slurm needs runs of a sweep, got {run.run_id} of none")
        groups.setdefault(sweep, []).append((run, request))
    for sweep, pairs in groups.items():
        paths = [evaluate.write_request(run.dir, request=request) for run, request in pairs]
        launcher = load_launcher(plan_folder(output_dir, name=sweep))
        evals.submit_evals(
            paths, sweep=sweep, launcher=launcher, output_dir=Path(output_dir), after=after
        )
    return 0


def _show(requests: Sequence[tuple[Run, Request]]) -> None:
    """Print the metrics that the requests asked for, also those of earlier evaluations."""
    rows: list[tuple[str, int, dict[str, float]]] = []
    for run, request in requests:
        by_step = {
            step: own
            for step, metrics in sorted(evaluations.evaluations(run.dir).items())
            if (own := {k: v for k, v in metrics.items() if k.startswith(f"{request.name}/")})
        }
        steps = list(by_step)[-1:] if request.steps == "last" else by_step
        if isinstance(request.steps, list):
            steps = [step for step in by_step if step in request.steps]
        rows += [(run.name, step, by_step[step]) for step in steps]
    main = [metric.key for metric in charted() if metric.key.startswith("eval/")]
    keys = [key.replace("eval", request.name, 1) for _, request in requests[:1] for key in main]
    keys = [key for key in keys if any(key in metrics for _, _, metrics in rows)]
    table = Table(box=None, header_style="bold")
    table.add_column("run", overflow="fold")
    for name in ("step", *keys):
        table.add_column(name, justify="right")
    for name, step, metrics in rows:
        figures = [f"{metrics[key]:.4g}" if key in metrics else "-" for key in keys]
        table.add_row(Text(name), str(step), *figures)
    make_console().print(table)
