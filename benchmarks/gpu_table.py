"""The table of `gpu.py`: its rows, roofs, targets, and how it is written. Imports no torch."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from relora_core import costs
from relora_core.config import RunConfig
from relora_core.devices import find_device

DEVICE = ("product, bf16", "copy")
"""What measures the GPU itself, in part `device`."""
LOGIT_BYTES = 12
"""See `relora_core/head.py`; where a compiler makes two passes of the softmax it is 14."""


@dataclass(kw_only=True, slots=True)
class Row:
    """One variant, as the table has it."""

    part: str
    model: str
    variant: str
    batch: int
    rates: list[float] = field(default_factory=list)
    """Tokens per second, of each turn; FLOP/s or bytes/s of part `device`."""
    loss: float | None = None
    """Of the first step: at random weights log(50,304) = 10.8, or a little more."""
    compile_s: float | None = None
    peak_mb: float | None = None
    """GPU memory that torch took for a step."""
    mfu_executed: float | None = None
    mfu_6n: float | None = None
    roof: float | None = None
    """Tokens per second."""
    roof_by: str | None = None
    note: str = ""

    @property
    def rate(self) -> float | None:
        return statistics.median(self.rates) if self.rates else None

    @property
    def spread(self) -> float | None:
        """Fastest less slowest turn, of the median."""
        return (max(self.rates) - min(self.rates)) / self.rate if self.rate else None


# what the GPU can do ------------------------------------------------------------------------------
DATA_SHEET = "data sheet"


class Peaks(NamedTuple):
    flops: float
    """Of bf16, per second."""
    memory: float
    """Bytes per second."""
    source: str

    def __str__(self) -> str:
        flops, memory = self.flops / 1e12, self.memory / 1e12
        return f"{flops:.4g} TFLOP/s in bf16, {memory:.4g} TB/s ({self.source})"


def find_peaks(name: str, rows: Sequence[Row]) -> Peaks | None:
    """From the data sheet; else the median of what was measured; None without either."""
    if device := find_device(name):
        return Peaks(device.bf16, device.memory, DATA_SHEET)
    measured = [
        [rate for row in rows if (row.part, row.variant) == ("device", kind) for rate in row.rates]
        for kind in DEVICE
    ]
    if not all(measured):
        return None
    flops, memory = map(statistics.median, measured)
    return Peaks(flops, memory, "measured here")


def add_roof(row: Row, *, config: RunConfig, peaks: Peaks) -> None:
    """Fill in MFU and the roof of a step of `config`; `gpu.py`'s docstring says what they are."""
    tokens, model = config.train.batch_size * config.data.seq_len, config.model
    if row.part == "head":
        logits = tokens * (model.vocab_size or 0)
        flops, moved = 6 * logits * model.d_model, LOGIT_BYTES * logits
    else:
        counted, flops = costs.parameters(config), costs.flops_per_token(config).train * tokens
        saved = costs.memory_bytes(config)["activations"]
        moved = 8 * counted.total + 32 * counted.trainable + 2 * saved
        if peaks.source == DATA_SHEET and row.rate:
            row.mfu_executed = flops / tokens * row.rate / peaks.flops
            row.mfu_6n = costs.flops_per_token_6n(config) * row.rate / peaks.flops
    floors = {"FLOPs": flops / peaks.flops, "bytes": moved / peaks.memory}
    row.roof_by = max(floors, key=lambda name: floors[name])
    row.roof = tokens / floors[row.roof_by]


# targets ------------------------------------------------------------------------------------------
class Target(NamedTuple):
    text: str
    measured: float | None
    least: float | None
    """None: not applicable to this GPU."""

    @property
    def verdict(self) -> str:
        if self.least is None:
            return "not applicable"
        if self.measured is None:
            return "not measured"
        return "met" if self.measured >= self.least else "missed"


LEAST = {"A100": {"tiny": 400e3, "small": 240e3}, "H100": {"tiny": 900e3, "small": 500e3}}
"""Class of GPU -> model -> tokens per second in training."""
CLASSES = {"A100": "A100", "H100": "H100", "H200": "H100", "GH200": "H100"}
"""Part of a GPU's name -> class."""


def targets(rows: Sequence[Row], *, gpu: str) -> list[Target]:
    """Those that were set for this benchmark, whether it measured them or not."""
    by_name = {(row.part, row.model, row.variant): row for row in rows}
    kind = next((CLASSES[word] for word in gpu.replace("-", " ").split() if word in CLASSES), None)

    def ratio(model: str, one: str, *others: str) -> float | None:
        """Tokens/s of a variant to those of the best other one, of the same turn."""
        own = by_name.get(("train", model, one))
        pairs = [by_name.get(("train", model, other)) for other in others]
        values = [
            statistics.median(a / b for a, b in zip(own.rates, other.rates, strict=False))
            for other in pairs
            if own and other and own.rates and other.rates
        ]
        return min(values, default=None)

    out = []
    for model in ("tiny", "small"):
        row = by_name.get(("train", model, "full rank, blocks"))
        for name, least in LEAST.items():
            text = f"{model} at full rank, tokens/s, on a GPU of the {name} class"
            applies = least[model] if name == kind else None
            out.append(Target(f"{text}: {least[model]:,.0f}", row and row.rate, applies))
    for model, least in (("tiny", 1.3), ("small", 1.0)):
        best = ratio(model, "full rank, blocks", "llama, compiled", "simple, compiled")
        out.append(Target(f"{model} against the best compiled Llama: {least}x", best, least))
    for model in ("tiny", "small", "medium"):
        best = ratio(model, "relora, blocks", "full rank, blocks")
        out.append(Target(f"{model}, ReLoRA against full rank: 1.0x", best, 1.0))
    for model in ("tiny", "small", "medium"):
        row = by_name.get(("head", model, "head, ours"))
        share = row.rate / row.roof if row and row.rate and row.roof else None
        out.append(Target(f"{model}, the head's speed of its roof's: 0.5", share, 0.5))
    return out


# the table ----------------------------------------------------------------------------------------
def markdown(rows: Sequence[Row], *, about: dict[str, Any]) -> str:
    """The whole report."""
    lines = [f"# {about['gpu']}", ""]
    lines += [f"- {name}: {value}" for name, value in about.items() if name != "gpu"]
    for kind, unit in (("product, bf16", "TFLOP/s"), ("copy", "TB/s")):
        rates = [
            r for row in rows if (row.part, row.variant) == ("device", kind) for r in row.rates
        ]
        if rates:
            low, middle, high = (
                min(rates) / 1e12,
                statistics.median(rates) / 1e12,
                max(rates) / 1e12,
            )
            lines.append(f"- {kind}, measured: {middle:.3g} {unit} ({low:.3g} to {high:.3g})")
    names = ("part", "model", "variant", "batch", "tokens/s", "spread", "MFU executed", "MFU 6N")
    names += ("of roof", "roof tokens/s", "compile s", "peak MB", "first loss", "remark")
    cells = [cells_of(row) for row in rows if row.part != "device"]
    lines += ["", *table(names, cells), ""]
    judged = [
        [t.text, "-" if t.measured is None else f"{t.measured:,.3g}", t.verdict]
        for t in targets(rows, gpu=about["gpu"])
    ]
    return "\n".join([*lines, *table(("target", "measured", "verdict"), judged), ""])


def cells_of(row: Row) -> list[str]:
    def shown(value: float | None, form: str) -> str:
        return "-" if value is None else format(value, form)

    share = row.rate / row.roof if row.rate and row.roof else None
    roof = shown(row.roof, ",.0f") + (f" ({row.roof_by})" if row.roof_by else "")
    return [
        *(row.part, row.model, row.variant, str(row.batch)),
        *(shown(row.rate, ",.0f"), shown(row.spread, ".1%")),
        *(shown(row.mfu_executed, ".1%"), shown(row.mfu_6n, ".1%"), shown(share, ".1%"), roof),
        *(shown(row.compile_s, ".1f"), shown(row.peak_mb, ",.0f"), shown(row.loss, ".3f")),
        row.note,
    ]


def table(names: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = [names, ["---"] * len(names), *rows]
    return [f"| {' | '.join(cell.replace('|', '/') for cell in line)} |" for line in lines]


def write(rows: Sequence[Row], *, about: dict[str, Any], folder: Path) -> str:
    """gpu.json and gpu.md; the text of the latter."""
    text = markdown(rows, about=about)
    judged = [{**t._asdict(), "verdict": t.verdict} for t in targets(rows, gpu=about["gpu"])]
    content = {"about": about, "rows": [asdict(row) for row in rows], "targets": judged}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "gpu.json").write_text(json.dumps(content, indent=1) + "\n")
    (folder / "gpu.md").write_text(text)
    return text
