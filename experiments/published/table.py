"""The answers of `verdicts.judge` as lines of text."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

COLUMNS = {
    "A distance": "a_distance",
    "fresh": "a_distance_fresh",
    "A corr.": "a_correlation",
    "same sign": "a_same_sign",
    "small": "a_small",
    "B ratio": "b_ratio",
    "factor": "merge_factor",
    "cosine": "merge_cosine",
}


def lines(result: dict[str, Any]) -> Iterator[str]:
    """A line a question, its evidence, then a row a module."""
    at = ", ".join(f"{role} {c['step']}" for role, c in result["checkpoints"].items())
    branch = f" ({result['branch']})" if result["branch"] else ""
    yield f"{result['source']}{branch}: restart {result['restart']}, checkpoints: {at}"
    for verdict in result["verdicts"].values():
        yield ""
        yield f"{verdict['question']} {verdict['answer']}"
        if verdict["why"]:
            yield f"  {verdict['why']}"
        if verdict["modules"]:
            agree = ", ".join(f"{n} {value}" for value, n in sorted(verdict["modules"].items()))
            yield f"  modules: {agree}"
        yield f"  threshold: {verdict['threshold']}"
    yield ""
    yield f"No answer speaks against: {', '.join(result['procedures']) or 'no procedure of ours'}"
    yield ""
    width = max(len(name) for name in [*result["modules"], "control"])
    yield " ".join([f"{'module':<{width}}", *(f"{title:>10}" for title in COLUMNS)])
    rows = result["modules"] | {"pooled": result["pooled"]}
    if result["pooled"]["control"]:
        rows["control"] = result["pooled"]["control"]
    for name, row in rows.items():
        cells = (row.get(key) for key in COLUMNS.values())
        yield " ".join(
            [f"{name:<{width}}", *(f"{'-' if c is None else format(c, '.4f'):>10}" for c in cells)]
        )
    if (expected := result["pooled"]["merge_expected"]) and result["pooled"]["merge_misfit"]:
        for merge, factor in expected.items():
            misfit = result["pooled"]["merge_misfit"][merge]
            same = result["pooled"]["merge_same_bits"][merge]
            yield (
                f"merge {merge}: factor {factor:.4f} expected, misfit {misfit:.4f}, "
                f"{same:.2%} of W to the last bit"
            )
    first = result["first_cycle"]
    if first:
        yield (
            f"first cycle, step {first['step']}: |A| {first['a_norm']:.4g} (a fresh draw: "
            f"{first['a_norm_fresh']:.4g}), |B| {first['b_norm']:.4g}"
        )
    for note in result["notes"]:
        yield f"note: {note}"
