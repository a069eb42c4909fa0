"""Every function of a built `native.cpp` against float64, in a few milliseconds, by one thread.

Run on each load: a compiler, its flags, a wrapper around it or a file from elsewhere may have made
kernels that compute something else. Not for: how close they are (tests/relora_core).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch

from relora_core.dropout import Dropout

LOG2E = 1.4426950408889634
CLOSE = {"float32": 1e-4, "bfloat16": 1e-2}
"""Largest difference, relative to the largest value. Right kernels are a hundredth of it off in
float32 and a third in bfloat16; with -ffast-math they are .1 off and more."""

Call = Callable[..., Any]
"""Calls a function by its name; arrays are handed over by their place."""
Result = tuple[str, np.ndarray, np.ndarray]
"""(function, what it gave, what float64 gives)."""


def wrong(call: Call) -> str | None:
    """The first function with a wrong result, and how wrong; None: all are right."""
    with np.errstate(all="ignore"):
        for name, actual, right in _results(call):
            if (np.isnan(actual) != np.isnan(right)).any():
                return f"{name} takes no care of numbers that are none"
            away = np.nanmax(np.abs(actual - right)) / np.nanmax(np.abs(right))
            if not away < CLOSE["bfloat16" if name.endswith("bfloat16") else "float32"]:
                return f"{name} is off by {away:.2g}"
    return None


def _results(call: Call) -> Iterator[Result]:
    draw = np.random.default_rng(0)
    yield from _attention(call, draw)
    yield from _rms_norm(call, draw)
    yield from _rotate(call, draw)
    for kind in ("float32", "bfloat16"):
        yield from _exponentials(call, draw, kind)
        yield from _swiglu(call, draw, kind)
        yield from _adapt(call, draw, kind)


# numbers in memory --------------------------------------------------------------------------------
def _stored(x: np.ndarray, kind: str) -> np.ndarray:
    """x as float32, or as bf16's bits (truncated: then what is stored is exact)."""
    x = np.ascontiguousarray(x, dtype=np.float32)
    return x if kind == "float32" else (x.view(np.uint32) >> 16).astype(np.uint16)


def _read(x: np.ndarray) -> np.ndarray:
    """What `_stored` stored, as float64."""
    if x.dtype == np.uint16:
        x = (x.astype(np.uint32) << 16).view(np.float32)
    return x.astype(np.float64)


def _normal(draw: np.random.Generator, *shape: int, kind: str = "float32") -> np.ndarray:
    return _stored(draw.standard_normal(shape), kind)


# attention ----------------------------------------------------------------------------------------
def _attention(call: Call, draw: np.random.Generator) -> Iterator[Result]:
    """135 positions: more than one block of keys and, of any width of vectors, an odd rest."""
    length, heads, size = 135, 2, 8
    q, g = (_normal(draw, length, heads, size) for _ in range(2))
    k, v = (_normal(draw, length, 1, size) for _ in range(2))
    q *= 2  # some probabilities near 1
    out, sums = np.empty_like(q), np.empty((heads, length), np.float32)
    sizes = 1, length, heads, 1, size
    call("attention", q, k, v, out, sums, *sizes)
    gradients = [np.empty_like(x) for x in (q, k, v)]
    call("attention_back", q, k, v, out, sums, g, *gradients, *sizes)

    scale = size**-0.5
    keys, values = _read(k)[:, 0], _read(v)[:, 0]
    want = np.empty(q.shape), np.empty(q.shape), np.zeros(keys.shape), np.zeros(values.shape)
    logs = np.empty(sums.shape)
    for h in range(heads):
        own, up = _read(q)[:, h], _read(g)[:, h]
        scores = np.where(np.tri(length, dtype=bool), own @ keys.T * scale, -np.inf)
        top = scores.max(axis=1, keepdims=True)
        p = np.exp(scores - top)
        total = p.sum(axis=1, keepdims=True)
        p /= total
        logs[h] = (top + np.log(total))[:, 0] * LOG2E
        want[0][:, h] = p @ values
        dp = up @ values.T
        ds = p * (dp - (p * dp).sum(axis=1, keepdims=True)) * scale
        want[1][:, h] = ds @ keys
        want[2][:] += ds.T @ own
        want[3][:] += p.T @ up
    yield "attention", out, want[0]
    yield "attention", sums, logs
    for one, right in zip(gradients, want[1:], strict=True):
        yield "attention_back", one, right.reshape(one.shape)


# the head -----------------------------------------------------------------------------------------
def _exponentials(call: Call, draw: np.random.Generator, kind: str) -> Iterator[Result]:
    """Two blocks of 37 columns, the second with larger logits; a target in each, or in none."""
    rows, columns, width = 3, 37, 5
    name = f"exponentials_{kind}"
    top, total = np.full(rows, -1e38, np.float32), np.zeros(rows, np.float32)
    mean = np.zeros((rows, width), np.float32)
    want_top, want_total, want_mean = np.full(rows, -1e38), np.zeros(rows), np.zeros(mean.shape)
    for spread, own in ((4, np.array([7, -1, 40])), (9, np.array([-30, -1, 36]))):
        z = _stored(spread * draw.standard_normal((rows, columns)), kind)
        logits = _read(z)
        for row, column in enumerate(own):
            if 0 <= column < columns:
                logits[row, column] = -np.inf
        call(name, z, rows, columns, own.astype(np.int64), top, total, mean, width)
        grown = np.maximum(want_top, logits.max(axis=1))
        shrink, want_top = np.exp2(want_top - grown), grown
        want = np.exp2(logits - grown[:, None])
        want_total = want_total * shrink + want.sum(axis=1)
        want_mean = want_mean * shrink[:, None]
        yield name, _read(z), want
        mean += (more := _normal(draw, rows, width))
        want_mean += more
    yield from ((name, top, want_top), (name, total, want_total), (name, mean, want_mean))


# between the products -----------------------------------------------------------------------------
def _swiglu(call: Call, draw: np.random.Generator, kind: str) -> Iterator[Result]:
    n = 37
    gate, value, g = (_normal(draw, n, kind=kind) for _ in range(3))
    gate[3] = _stored(np.array([np.nan]), kind)[0]
    out, d_gate, d_value = (np.empty_like(gate) for _ in range(3))
    call(f"swiglu_{kind}", gate, value, out, n)
    call(f"swiglu_back_{kind}", gate, value, g, d_gate, d_value, n)
    x, y, up = _read(gate), _read(value), _read(g)
    s = 1 / (1 + np.exp(-x))
    yield f"swiglu_{kind}", _read(out), x * s * y
    yield f"swiglu_back_{kind}", _read(d_gate), up * y * s * (1 + x * (1 - s))
    yield f"swiglu_back_{kind}", _read(d_value), up * x * s


def _rms_norm(call: Call, draw: np.random.Generator) -> Iterator[Result]:
    rows, width, eps = 5, 37, 1e-6
    x, g = (_normal(draw, rows, width) for _ in range(2))
    weight = _normal(draw, width)
    out, dx, inverse = np.empty_like(x), np.empty_like(x), np.empty(rows, np.float32)
    d_weight = np.empty_like(weight)
    call("rms_norm", x, weight, out, inverse, rows, width, eps)
    call("rms_norm_back", x, weight, inverse, g, dx, d_weight, rows, width)
    a, w, up = _read(x), _read(weight), _read(g)
    by = 1 / np.sqrt((a * a).mean(axis=1, keepdims=True) + eps)
    along = (a * up * w).mean(axis=1, keepdims=True)
    yield "rms_norm", out, a * by * w
    yield "rms_norm", inverse, by[:, 0]
    yield "rms_norm_back", dx, up * w * by - a * along * by**3
    yield "rms_norm_back", d_weight, (up * a * by).sum(axis=0)


def _rotate(call: Call, draw: np.random.Generator) -> Iterator[Result]:
    length, heads, size = 5, 2, 8
    x = _normal(draw, length, heads, size)
    angles = draw.uniform(0, 6, (length, size // 2))
    table = np.ascontiguousarray(np.stack([np.cos(angles), np.sin(angles)], axis=-1), np.float32)
    pairs = _read(x).reshape(length, heads, -1, 2)
    for sign in (1.0, -1.0):
        out = np.empty_like(x)
        call("rotate", x, table, out, 1, length, heads, size, sign)
        turned = (pairs[..., 0] + 1j * pairs[..., 1]) * np.exp(1j * sign * angles)[:, None]
        right = np.stack([turned.real, turned.imag], axis=-1).reshape(x.shape)
        yield "rotate", out, right


# adapters -----------------------------------------------------------------------------------------
def _adapt(call: Call, draw: np.random.Generator, kind: str) -> Iterator[Result]:
    """37 rows: more than are in work at a time; a tenth of the inputs is dropped.

    They are of every third sequence, ten rows each.
    """

    dropout, rows, tokens = Dropout(0.1, seed=7, stride=3), 37, 10
    inner, outer, rank, scale = 32, 48, 5, 0.5
    x, y, g, dx = (
        _normal(draw, rows, columns, kind=kind) for columns in (inner, outer, outer, inner)
    )
    a, b = _normal(draw, rank, inner), _normal(draw, outer, rank)
    low = np.zeros((rows, -(-rank // LANES) * LANES), np.float32)
    d_a, d_b = np.empty_like(a), np.empty_like(b)
    before, d_before = _read(y), _read(dx)
    sizes = rows, inner, outer, rank, scale, dropout.seed, dropout.cut, tokens, dropout.stride
    call(f"adapt_{kind}", x, a, b, y, low, *sizes)
    call(f"adapt_back_{kind}", x, a, b, low, g, dx, d_a, d_b, *sizes)
    keep = dropout.mask(torch.empty(4, tokens, inner)).flatten(0, 1).numpy()[:rows]
    dropped, up, down = _read(x) * keep, _read(g), _read(b)
    thin = dropped @ _read(a).T
    d_thin = up @ down * scale
    yield f"adapt_{kind}", low[:, :rank], thin
    yield f"adapt_{kind}", _read(y), before + scale * thin @ down.T
    yield f"adapt_back_{kind}", d_a, d_thin.T @ dropped
    yield f"adapt_back_{kind}", d_b, up.T @ thin * scale
    yield f"adapt_back_{kind}", _read(dx), d_before + d_thin @ _read(a) * keep


LANES = 16
"""Columns of adapters come in multiples of it."""
