"""What a restart did, by four questions: each with an answer, its evidence and its threshold.

The numbers decide, not the names of steps: the merge lies where the base changed, since nothing
else changes a frozen base. Where the checkpoints cannot tell, the answer is `undecided`, with why.
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

from experiments.published import adapters
from experiments.published.adapters import Snapshot
from experiments.published.commits import Checkpoints, find
from experiments.published.measures import MERGES, Sums, add, compare
from relora_core.config import ConfigError
from relora_core.data.base import DataError

SCHEMA = 1
UNDECIDED = "undecided"

RESTORED, FRESH, SIGMAS = 0.75, 0.05, 5.0
"""Share of A's entries that have their sign still: at least `RESTORED`, or 1/2 within `FRESH` or
`SIGMAS` standard deviations. Where A was 0, the share of small entries: at least `RESTORED`, or at
most 1/4 + 2 `FRESH`, as training after the draw moves it."""
FIT, FIT_RATIO = 0.1, 0.2
"""A merge fits: what it leaves open is at most `FIT` of the largest change that any predicts, and
`FIT_RATIO` of what the next best leaves open."""
COSINE, SLACK = 0.9, 0.1
"""Else about: the change of W is this parallel to B A, and its factor within this share of one
candidate's range alone."""
EXACT, INEXACT = 0.999, 0.01
"""Share of a float32 file's entries that bfloat16 holds exactly; chance gives 2^-16."""

PROCEDURES = {
    "as_executed": ("nothing", "unscaled", "restored", "bfloat16"),
    "as_coded": ("nothing", "unscaled", "re-initialised", "float32"),
    "as_described": ("trained", "scaled", "re-initialised", "float32"),
    "corrected": ("trained", "scaled", "re-initialised", "float32"),
}
"""Answers by which docs/procedures.md tells them apart, in the order of the questions."""

FIRST, MERGE, RESTART, BASE = "first_cycle", "merge", "adapters", "base"
QUESTIONS = {
    FIRST: "Did the first cycle train the adapters?",
    MERGE: "How far was the merge scaled?",
    RESTART: "Was A re-initialised or restored?",
    BASE: "Is the base rounded to bfloat16?",
}
THRESHOLDS = {
    FIRST: "nothing: A and B are exactly 0, so that both gradients are 0; trained: neither is",
    MERGE: f"misfit <= {FIT} and <= {FIT_RATIO} of the next best; else, as `about`, cosine >= "
    f"{COSINE} and the factor within {SLACK:.0%} of one merge's range alone",
    RESTART: f"same sign: restored >= {RESTORED}; re-initialised 0.5 +- {FRESH} or {SIGMAS:.0f} "
    f"standard deviations (A was 0: small entries >= {RESTORED}; <= {0.25 + 2 * FRESH})",
    BASE: f"bfloat16: >= {EXACT} of the entries of a float32 file; float32: <= {INEXACT}",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    value: str
    why: str
    """Where it is undecided or needs a caution; else empty."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Bracket:
    """Checkpoints around a restart: p before it, q after it, and one before p as the control."""

    control: Snapshot | None
    p: Snapshot
    q: Snapshot
    again: bool
    """Whether another restart lies between p and q."""
    notes: list[str]


def judge(source: str, *, restart: int, revision: str | None = None) -> dict[str, Any]:
    """All answers on the restart at step `restart`, as the object that docs/published.md describes.

    ConfigError where there is no checkpoint on both sides, DataError where one cannot be read.
    """
    checkpoints = find(source, revision=revision)
    load = cache(lambda step: adapters.read(checkpoints, step=step))
    place = bracket(list(checkpoints.commits), restart=restart, load=load)
    p, q = place.p, place.q
    by_module = _compared(p, q)
    control = _compared(place.control, p) if place.control else None
    pooled, before = add(by_module.values()), add(control.values()) if control else None
    drift = _drift(before, place, restart=restart)
    stored = {str(a.weight.dtype).removeprefix("torch.") for a in p.adapters.values()}

    def each(sums: Sums) -> dict[str, Answer]:
        return {
            MERGE: merge_answer(sums, again=place.again, drift=drift),
            RESTART: restart_answer(sums, again=place.again),
            BASE: base_answer(sums, stored=stored),
        }

    first, first_numbers = first_cycle(checkpoints, load=load, restart=restart)
    answers = {FIRST: first, **each(pooled)}
    modules = {name: each(sums) for name, sums in by_module.items()}
    names = [name for name, row in PROCEDURES.items() if _agrees(answers, row)]
    evidence = numbers(pooled) | {"control": control_numbers(before), "drift": drift}
    return {
        "schema": SCHEMA,
        "source": checkpoints.repository.name,
        "branch": checkpoints.branch,
        "restart": restart,
        "reset_frequency": p.reset_frequency,
        "checkpoints": {
            role: {"step": snapshot.step, "commit": snapshot.commit}
            for role, snapshot in (("control", place.control), ("before", p), ("after", q))
            if snapshot
        },
        "verdicts": {
            key: {
                "question": question,
                "answer": answers[key].value,
                "why": answers[key].why,
                "threshold": THRESHOLDS[key],
                "modules": dict(Counter(row[key].value for row in modules.values() if key in row)),
            }
            for key, question in QUESTIONS.items()
        },
        "procedures": names,
        "first_cycle": first_numbers,
        "stored_as": sorted(stored),
        "pooled": evidence,
        "modules": {
            name: {"answers": {key: a.value for key, a in modules[name].items()}} | numbers(sums)
            for name, sums in by_module.items()
        },
        "notes": checkpoints.notes + place.notes,
    }


# which checkpoints --------------------------------------------------------------------------------
def bracket(steps: list[int], *, restart: int, load: Callable[[int], Snapshot]) -> Bracket:
    """The two checkpoints between which the restart merged.

    The published trainer restarts after the checkpoint of that step, others before it: where W does
    not change after it, the step before is looked at. `steps` are in order.
    """
    below = [step for step in steps if step <= restart]
    above = [step for step in steps if step > restart]
    if not below or not above:
        near = sorted(steps, key=lambda step: abs(step - restart))[:4]
        raise ConfigError(
            f"--restart must have checkpoints before and after it, got {restart}; nearest "
            f"checkpoints: {', '.join(map(str, sorted(near)))}"
        )
    p, q, notes = load(below[-1]), load(above[0]), []
    earlier = below[:-1]
    if p.step == restart and earlier and not _moved(p, q) and _moved(load(earlier[-1]), p):
        p, earlier = load(earlier[-1]), earlier[:-1]  # it had restarted by the step of its name
    later = [step for step in above if step > q.step]
    if later and _untouched(q) and not _moved(q, load(later[0])):
        q = load(later[0])  # one update at least shows what the optimizer does with the new A
    frequency = p.reset_frequency
    if restart % frequency:
        notes.append(f"{restart} is no multiple of reset_frequency={frequency} in config.json")
    if p.step < restart - 1 or q.step > restart + 2:
        notes.append(
            f"between steps {p.step} and {q.step} there are up to {q.step - p.step} updates beside "
            "the restart, which move A and B too"
        )
    control = load(earlier[-1]) if earlier else None
    if control and _moved(control, p):
        control = None
    if control is None:
        notes.append(f"no control: no interval without a merge just before step {p.step}")
    inside = range((p.step // frequency + 1) * frequency, q.step, frequency)
    again = any(step != restart for step in inside)
    return Bracket(control=control, p=p, q=q, again=again, notes=notes)


def _moved(p: Snapshot, q: Snapshot) -> bool:
    """Whether W changed anywhere."""
    _match(p, q)
    return any(not a.weight.equal(q.adapters[name].weight) for name, a in p.adapters.items())


def _untouched(q: Snapshot) -> bool:
    """Whether B is 0 everywhere and A is not: drawn, without an update since."""
    some = list(q.adapters.values())
    return not any(bool(a.b.any()) for a in some) and any(bool(a.a.any()) for a in some)


def _compared(p: Snapshot, q: Snapshot) -> dict[str, Sums]:
    _match(p, q)
    return {name: compare(adapter, q.adapters[name]) for name, adapter in p.adapters.items()}


def _match(p: Snapshot, q: Snapshot) -> None:
    """DataError unless both have the same adapters of the same shapes."""
    for name in [*p.adapters, *q.adapters]:
        shapes = [
            (tuple(s.adapters[name].a.shape), tuple(s.adapters[name].b.shape))
            if name in s.adapters
            else None
            for s in (p, q)
        ]
        if shapes[0] != shapes[1]:
            raise DataError(
                f"{name} must have the same A and B at steps {p.step} and {q.step}, got shapes "
                f"{shapes[0]} and {shapes[1]}"
            )


def _drift(before: Sums | None, place: Bracket, *, restart: int) -> float | None:
    """By what factor B A grew from p to the merge, if it went on as in the control interval.

    1 where p is the restart's own step, None where no control interval tells.
    """
    if place.p.step >= restart:
        return 1.0
    if not before or not place.control or not before.growth:
        return None
    share = (restart - place.p.step) / (place.p.step - place.control.step)
    return max(1 + (before.growth - 1) * share, 0.0)


# answers ------------------------------------------------------------------------------------------
def merge_answer(sums: Sums, *, again: bool, drift: float | None = 1.0) -> Answer:
    """Which of `MERGES` the change of W is. `drift`: see `_drift`."""
    if again:
        return _undecided("another restart lies between the two checkpoints")
    factor, expected, misfits = sums.factor, sums.expected_factors, sums.misfits
    if factor is None or expected is None:
        return _undecided("B A is 0 before the restart: no merge could add anything")
    if misfits is None:
        return _undecided("every merge of so small a B A is lost in the base's rounding")
    equal = math.isclose(sums.steps[1], sums.steps[2], rel_tol=1e-6)  # alpha = r
    indices = [0, 1] if equal else [0, 1, 2]
    best, second = sorted(indices, key=lambda i: misfits[i])[:2]
    if misfits[best] <= FIT and misfits[best] <= FIT_RATIO * misfits[second]:
        return _merged(best, equal=equal, why="")
    cosine = sums.factor_cosine or 0.0
    measured = f"factor {factor:.3f}, cosine {cosine:.3f}"
    if drift is None:
        return _undecided(f"B A moved on before the merge, by how much is unknown: {measured}")
    ends = {i: sorted((expected[i], expected[i] * drift)) for i in indices}
    slack = {i: SLACK * abs(expected[i] or expected[1]) for i in indices}
    near = [i for i in indices if ends[i][0] - slack[i] <= factor <= ends[i][1] + slack[i]]
    if cosine >= COSINE and len(near) == 1:
        low, high = ends[near[0]]
        return _merged(
            near[0],
            equal=equal,
            why=f"about: B A moved on before the merge ({measured}, {low:.3f} to {high:.3f} "
            "expected)",
        )
    return _undecided(f"no merge alone explains the change of W: {measured}")


def _merged(index: int, *, equal: bool, why: str) -> Answer:
    if equal and index:
        return Answer(value="scaled or unscaled", why="alpha = r: both are the same")
    return Answer(value=MERGES[index], why=why)


def restart_answer(sums: Sums, *, again: bool) -> Answer:
    """`restored` (A went on from its old values), `re-initialised`, `zeroed` or undecided."""
    if again:
        return _undecided("another restart lies between the two checkpoints")
    if not sums.aa_after:
        if sums.aa_before:
            return Answer(value="zeroed", why="A is 0 after the restart")
        return Answer(value="restored", why="A is 0 before and after")
    share = sums.a_same_sign
    if share is None:  # A was 0
        old, fresh = sums.a_small >= RESTORED, sums.a_small <= 0.25 + 2 * FRESH
        why = f"A was 0 before; now {sums.a_small:.3f} of its entries are small"
    else:
        sigma = 0.5 / math.sqrt(sums.signed)
        old, fresh = share >= RESTORED, abs(share - 0.5) <= max(FRESH, SIGMAS * sigma)
        why = "" if old or fresh else f"{share:.3f} of A's entries have their sign still"
    if old and not sums.moved and sums.product:
        why = "W did not change: nothing shows that there was a restart"
    if fresh and not old and not sums.bb_after:
        return _undecided(
            "A is drawn anew and B is 0, but no update has acted since: whether the optimizer puts "
            "the old ones back shows in a later checkpoint"
        )
    return (
        Answer(value="restored" if old else "re-initialised", why=why)
        if old or fresh
        else (_undecided(why))
    )


def base_answer(sums: Sums, *, stored: set[str]) -> Answer:
    """`bfloat16` or `float32` where the file is in float32; else the file cannot tell."""
    if stored != {"float32"}:
        kinds = ", ".join(sorted(stored))
        why = f"the file is in {kinds}, which rounds whatever the base was"
        return Answer(value=f"stored in {kinds}", why=why)
    share = sums.bf16_exact / sums.entries
    if share >= EXACT:
        return Answer(value="bfloat16", why="")
    if share <= INEXACT:
        return Answer(value="float32", why="")
    return _undecided(f"{share:.3f} of W is exact in bfloat16")


def first_cycle(
    checkpoints: Checkpoints, *, load: Callable[[int], Snapshot], restart: int
) -> tuple[Answer, dict[str, Any]]:
    """From the last checkpoint of the first cycle: (answer, its numbers)."""
    frequency = load(max(s for s in checkpoints.commits if s <= restart)).reset_frequency
    steps = [step for step in checkpoints.commits if 0 < step <= frequency]
    if steps and steps[-1] == frequency and _untouched(load(steps[-1])):
        steps.pop()  # it has restarted already
    if not steps:
        why = f"no checkpoint lies in the first cycle (steps 1 to {frequency})"
        return _undecided(why), {}
    snapshot = load(steps[-1])
    some = list(snapshot.adapters.values())
    facts: dict[str, Any] = {
        "step": snapshot.step,
        "commit": snapshot.commit,
        "a_norm": math.sqrt(sum(x.a.square().sum().item() for x in some)),
        "b_norm": math.sqrt(sum(x.b.square().sum().item() for x in some)),
        "a_norm_fresh": math.sqrt(sum(x.a.shape[0] / 3 for x in some)),
        "modules_a_zero": sum(not x.a.any() for x in some),
        "modules_b_zero": sum(not x.b.any() for x in some),
        "modules": len(some),
    }
    if facts["modules_a_zero"] == facts["modules_b_zero"] == len(some):
        return Answer(value="nothing", why=""), facts
    if facts["modules_a_zero"] == facts["modules_b_zero"] == 0:
        return Answer(value="trained", why=""), facts
    a, b, n = facts["modules_a_zero"], facts["modules_b_zero"], len(some)
    return _undecided(f"at step {snapshot.step} A is 0 in {a} and B in {b} of {n} modules"), facts


def _undecided(why: str) -> Answer:
    return Answer(value=UNDECIDED, why=why)


def _agrees(answers: dict[str, Answer], row: tuple[str, ...]) -> bool:
    """Whether no answer speaks against a procedure."""
    for answer, expected in zip((answers[key].value for key in QUESTIONS), row, strict=True):
        silent = answer == UNDECIDED or answer.startswith("stored in")
        if not silent and expected not in answer.split(" or "):
            return False
    return True


# numbers ------------------------------------------------------------------------------------------
def numbers(sums: Sums) -> dict[str, Any]:
    """What the answers rest on, for people and for a citation. null: a division by 0."""
    largest, misfits, expected = sums.entries, sums.misfits, sums.expected_factors
    return {
        "a_distance": sums.a_distance,
        "a_distance_fresh": sums.a_distance_fresh,
        "a_correlation": sums.a_correlation,
        "a_correlation_sd": 1 / math.sqrt(sums.a_entries),
        "a_same_sign": sums.a_same_sign,
        "a_same_sign_sd": 0.5 / math.sqrt(sums.signed) if sums.signed else None,
        "a_small": sums.a_small,
        "a_size": sums.a_size,
        "b_ratio": sums.b_ratio,
        "b_correlation": sums.b_correlation,
        "merge_factor": sums.factor,
        "merge_cosine": sums.factor_cosine,
        "merge_expected": dict(zip(MERGES, expected, strict=True)) if expected else None,
        "merge_misfit": dict(zip(MERGES, misfits, strict=True)) if misfits else None,
        "merge_same_bits": {m: n / largest for m, n in zip(MERGES, sums.same, strict=True)},
        "base_bf16_exact": sums.bf16_exact / sums.entries,
        "sums": dataclasses.asdict(sums),
    }


def control_numbers(sums: Sums | None) -> dict[str, Any] | None:
    """How far A and B A moved in an interval without a restart."""
    if sums is None:
        return None
    return {
        "a_distance": sums.a_distance,
        "a_correlation": sums.a_correlation,
        "a_same_sign": sums.a_same_sign,
        "b_ratio": sums.b_ratio,
        "growth": sums.growth,
    }
