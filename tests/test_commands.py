"""Every command that README and docs show is carried out as it stands, or named here with a reason.

Those of `run.py` are planned (`--plan`): composed, checked, named and priced, but not timed. Names
in capitals stand for what a user has; `prepare` makes it.
"""

import gzip
import json
import os
import re
import shlex
import shutil
import subprocess
import tarfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from relora_core.data.grammar import REGISTERS, documents, minimal_pairs
from tests import warm
from tests.sweeps.fake_slurm import FakeSlurm

ROOT = Path(__file__).resolve().parents[1]
PAGES = ["README.md", *sorted(p.relative_to(ROOT).as_posix() for p in ROOT.glob("docs/**/*.md"))]
PAGES += ["benchmarks/README.md"]
PROGRAMS = ("python", "make", "pip", "pipx", "pytest", "torchrun", "relora-sweeps")
PROGRAMS += ("docker", "apptainer")
NANO = [
    *("model=nano", "relora.r=4", "train.steps=6", "train.batch_size=2", "data.seq_len=16"),
    *("relora.reset_frequency=3", "schedule.warmup_steps=1", "relora.restart_warmup_steps=1"),
    *("eval.blimp.max_pairs=1", "eval.paloma.max_documents=1", "tracking=none"),
    *("runtime.threads=1", "runtime.device=cpu"),
]
GALLERY = "minutes of runs each: docs/gallery/make.py carries them out"
IMAGE = "tests/test_door.py compares its files, tests/test_installed.py installs them"
EVALUATE = "tests/experiments/run/test_evaluate_command.py"
OWN_CONFIGS = "tests/sweeps/test_habits.py makes the page's files"
STUDY = "a study of hours: its files are planned here, the rest is tests/sweeps/search"
OTHERS = {
    "make ": "Makefile: this suite runs by it",
    "pip install": "tests/test_installed.py installs the package",
    "pipx run pip-audit": "asks a service for known faults of dependencies",
    "docker build": IMAGE,
    "apptainer build": IMAGE,
    "pytest -m gpu": "needs a GPU: tests/relora_core/test_on_gpu.py",
    "python benchmarks/": "minutes to hours each; whether they take these options is tested below",
    "torchrun ": "tests/test_journey.py",
    "python -m sweeps watch": "never ends: tests/sweeps/commands/test_watch.py",
    "python -m sweeps ui": "a server: tests/sweeps/commands/test_ui_command.py",
    "python -m experiments evaluate gpt2": EVALUATE,
    "python -m experiments evaluate DIR/my-model": EVALUATE,
    "python -m sweeps report SWEEP --beside gpt2,mine": EVALUATE,
    "python -m experiments published": "a hub's checkpoints: tests/experiments/published",
    "python -m experiments import-pico SOURCE": "tests/relora_core/test_export.py",
    "python run.py -m --config-dir ~/mine": OWN_CONFIGS,
    'python run.py -m "hydra.searchpath': OWN_CONFIGS,
    **dict.fromkeys(
        [f"python -m sweeps report {name}" for name in ("ranks", "procedures", "grid", "weights")],
        GALLERY,
    ),
    "python -m sweeps search rates": GALLERY,
    "python -m sweeps report audit": "an hour of runs: tests/sweeps/commands",
    "python -m sweeps report methods_short": STUDY,
    "python -m sweeps search method_lr": STUDY,
    "python run.py -m hydra/sweeper=search search=audit_lr": STUDY,
    "python run.py -m sweep=audit_10m sweep.from_search": STUDY,
    "python run.py -m sweep=methods sweep.from_search": STUDY,
    "python run.py -m sweep=methods_short sweep.from_search": STUDY,
}
"""Part of a command -> where else it is tested, or why not at all."""
PYTHON = {
    "docs/evaluate.md": "tests/test_blimp_module.py",
    "docs/recipes.md": "tests/test_toy_method.py, tests/test_toy_eval.py",
}
"""Page with code in Python -> where that is carried out."""


def commands(page: str) -> list[str]:
    """Those in the blocks of a page, joined where they go on, without what follows on the line."""
    text = (ROOT / page).read_text().replace("\\\n", " ")
    blocks = re.findall(r"^(?:    |)(?=(?:" + "|".join(PROGRAMS) + r") )(.*)$", text, flags=re.M)
    blocks += re.findall(r"`(python run\.py -m [^`]*=[^`]*)`", text)
    blocks += re.findall(r"`((?:pipx run|python benchmarks/)[^`]*)`", text)
    cut = (re.split(r"\s+# |(?<=[\w\]'\"/])\s{6,}(?=\w+ )", line)[0] for line in blocks)
    return [" ".join(line.split()) for line in cut]


ALL = [(page, command) for page in PAGES for command in commands(page)]
FIRST = {c: page for page, c in reversed(ALL)}
"""Command -> the first page that shows it."""
HERE = [(page, c) for page, c in ALL if FIRST[c] == page and not any(part in c for part in OTHERS)]
HERE = list(dict.fromkeys(HERE))  # a page may show one twice


def test_commands_are_found_on_the_pages():
    assert len(ALL) > 40
    assert {page for page, _ in ALL} >= {"README.md", "docs/data.md", "docs/slurm.md"}


@pytest.mark.parametrize(("page", "command"), ALL)
def test_a_shell_takes_the_command_as_it_stands(page, command):
    done = subprocess.run(
        ["bash", "-n", "-c", command], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_no_reason_is_left_over():
    unused = [part for part in OTHERS if not any(part in command for _, command in ALL)]
    assert unused == []


@pytest.mark.parametrize("reason", sorted({*OTHERS.values(), *PYTHON.values()}))
def test_a_file_that_a_reason_names_is_there(reason):
    named = re.findall(r"\b(?:tests|docs)/[\w/.]+", reason)
    assert [name for name in named if not (ROOT / name).exists()] == []


def test_code_in_python_is_carried_out_somewhere():
    code = re.compile(r"^(?:    (?:import|from) |```python)", flags=re.M)
    assert {page for page in PAGES if code.search((ROOT / page).read_text())} == set(PYTHON)


BENCHMARKS = sorted({c for _, c in ALL if c.startswith("python benchmarks/")})


@pytest.mark.slow
@pytest.mark.parametrize("file", sorted({shlex.split(c)[1] for c in BENCHMARKS}))
def test_a_benchmark_takes_the_options_that_pages_show(file, tmp_path):
    commands = [words for c in BENCHMARKS if (words := shlex.split(c))[1] == file]
    shown = carry_out(tmp_path, ["python", str(ROOT / file), "--help"])
    assert {word for words in commands for word in words[2:] if word.startswith("--")} <= set(
        re.findall(r"--[\w-]+", shown)
    )


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A user's folder: text, data, a sweep called SWEEP with its runs, a search."""
    folder = tmp_path_factory.mktemp("user")
    prepare(folder)
    return folder


def prepare(folder: Path) -> None:
    texts = [text for name in REGISTERS for text in documents(name, 60, seed=1)]
    (folder / "TEXTS").mkdir()
    (folder / "TEXTS" / "all.txt").write_text("\n<|endoftext|>\n".join(texts))
    data = folder / "DIR"
    paloma = data / "paloma" / "wiki" / "val" / "wiki.jsonl.gz"
    paloma.parent.mkdir(parents=True)
    paloma.write_bytes(gzip.compress(json.dumps({"text": texts[0]}).encode() + b"\n"))
    for pair in minimal_pairs(pairs_per_paradigm=1):
        (data / f"{pair['UID']}.jsonl").write_text(json.dumps(pair) + "\n")
    rows = [[(7 * i + j) % 300 for j in range(2049)] for i in range(4)]
    (data / "dolma-mini").mkdir()
    pq.write_table(pa.table({"input_ids": rows}), data / "dolma-mini" / "rows.parquet")
    with tarfile.open(data / "blimp_data.tar.xz", "w:xz") as archive:
        for file in data.glob("*.jsonl"):
            archive.add(file, f"data/{file.name}")
    carry_out(
        folder, ["python", "-m", "experiments", "tokenizer", "TEXTS", "made", "--vocab", "512"]
    )
    shutil.copytree(folder / "made", data / "tokenizer")
    shutil.copytree(folder / "made", folder / "bpe4k")
    carry_out(folder, ["python", "run.py", "-m", *NANO, "seed=0,1", "sweep.name=SWEEP"])
    carry_out(folder, ["python", "run.py", "-m", *NANO, "seed=0,1", "sweep.name=OTHER"])
    searched = ["hydra/sweeper=search", "search=lr_and_rank", "search.n_trials=1"]
    carry_out(folder, ["python", "run.py", "-m", *NANO, *searched])


def carry_out(folder: Path, words: list[str]) -> str:
    """stdout of a command in a user's folder; it must succeed."""
    words = [str(ROOT / word) if word == "run.py" else word for word in words[1:]]
    done = warm.run(words, cwd=folder, env={**os.environ, "PYTHONPATH": str(ROOT)}, figures=False)
    assert done.returncode == 0, (words, done.stdout, done.stderr)
    return done.stdout


DATA = (
    "data=text data.path=TEXTS data.tokenizer=bpe4k eval.paloma.path=DIR/paloma eval.blimp.path=DIR"
)


@pytest.mark.slow
@pytest.mark.parametrize(("page", "command"), HERE)
def test_a_command_works_as_it_stands(home, page, command, tmp_path, monkeypatch):
    if "hydra/launcher=" in command:
        slurm = FakeSlurm.install(tmp_path / "slurm", monkeypatch)
        slurm.config(partitions=["main", "gpu", "preempt", "ampere"])
    words = shlex.split(command.replace(" DATA", f" {DATA}"))
    if words[1] == "run.py":
        words = [word for word in words if word != "--measure"]  # minutes, or a job to wait for
        words += ["output_dir=planned", *([] if "--plan" in words else ["--plan"])]
    run, other = sorted(path.name for path in (home / "outputs" / "runs").iterdir())[:2]
    names = iter([run, other])
    words = [next(names) if word == "RUN" else word for word in words]
    if "export" in words:
        words = ["exported" if word == "DIR" else word for word in words]
    if "tokenizer" in words:
        words = ["another" if word == "bpe4k" else word for word in words]
        shutil.rmtree(home / "another", ignore_errors=True)
    assert carry_out(home, words) or "logs" in words  # these runs print nothing


@pytest.mark.slow
def test_the_arms_that_the_page_on_searches_shows_can_be_searched(tmp_path):
    page = (ROOT / "docs" / "searching.md").read_text().partition("## Arms")[2]
    lines = re.findall(r"^    ((?:common|arms): .*|arms:|  \w+: \[.*\])$", page, flags=re.M)
    assert len(lines) > 3
    head = ["objectives: [eval/paloma/perplexity min last]", "n_trials: 1"]
    head += ["space: {train.lr: 'tag(log, interval(1e-3, 1e-2))'}"]
    (tmp_path / "search").mkdir()
    (tmp_path / "search" / "page.yaml").write_text("\n".join([*head, *lines]) + "\n")
    words = ["--plan", "--config-dir", str(tmp_path), "hydra/sweeper=search", "search=page"]
    carry_out(tmp_path, ["python", "run.py", *words, "tracking=none", "output_dir=planned"])
