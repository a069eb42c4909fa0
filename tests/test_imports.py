"""What must start quickly, or where torch is not wanted, loads no heavy library."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.relora_core.data_files import random_rows, write_rows

ROOT = Path(__file__).resolve().parents[1]
CONFIG = "from relora_core.config import DataConfig, PalomaConfig, TrackingConfig\n"
CASES = {
    "statistics": (
        "import experiments.stats, experiments.report.blimp_tests",
        "numpy scipy statsmodels torch",
    ),
    "evaluations": ("import experiments.run.evaluate", "torch"),
    "states": ("import sweeps.slurm.survey", "torch mlflow hydra"),
    "plans": (
        "import sweeps.tracking, sweeps.launch, sweeps.commands.watch",
        "torch mlflow scipy",
    ),
    "an address": (
        CONFIG + "from experiments.addresses import check_uri, ui_command\n"
        "check_uri(TrackingConfig(enabled=True, uri='http://h')); ui_command('x')",
        "mlflow torch sqlalchemy",
    ),
    "rows": (
        CONFIG + "from relora_core.data import inspect\n"
        "inspect(DataConfig(kind='pretokenized', path='rows', vocab_size=500, seq_len=8))",
        "torch datasets mlflow hydra",
    ),
    "texts of evals": (
        CONFIG + "from relora_core.evals import blimp, paloma\n"
        "paloma.load(PalomaConfig(path='paloma')); blimp.grammar_pairs(1)",
        "torch mlflow hydra",
    ),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With data that planning looks at."""
    folder = tmp_path_factory.mktemp("data")
    write_rows(folder / "rows" / "train-0.parquet", random_rows(4))
    texts = folder / "paloma" / "wiki" / "val" / "wiki.jsonl.gz"
    texts.parent.mkdir(parents=True)
    texts.write_bytes(gzip.compress(json.dumps({"text": "x"}).encode() + b"\n"))
    return folder


@pytest.mark.parametrize("case", CASES)
def test_no_heavy_library_is_loaded(folder: Path, case: str) -> None:
    code, heavy = CASES[case]
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r})\n{code}\n"
    code += f"print(sorted({set(heavy.split())!r} & set(sys.modules)))"
    words = [sys.executable, "-c", code]
    done = subprocess.run(words, cwd=folder, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
