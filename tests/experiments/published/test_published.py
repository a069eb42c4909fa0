"""What published checkpoints say of a restart, on runs of ours in the published layout."""

import dataclasses
import inspect
import json
import math
import os
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from huggingface_hub import HfApi
from safetensors.torch import load_file, save_file

from experiments import schema
from experiments.__main__ import main
from experiments.published import commits, verdicts
from experiments.published.adapters import Adapter, read
from experiments.published.measures import Sums, add, compare
from experiments.published.verdicts import merge_answer
from relora_core import checkpoint
from relora_core.config import ConfigError
from relora_core.data import grammar
from relora_core.data.base import DataError
from relora_core.events import NullSink
from relora_core.train import train
from tests.conftest import nano_config

FREQUENCY, RESTART, STEPS = 12, 24, 27
EXPECTED = {
    "as_executed": ("nothing", "unscaled", "restored", "bfloat16"),
    "as_coded": ("nothing", "unscaled", "re-initialised", "float32"),
    "corrected": ("trained", "scaled", "re-initialised", "float32"),
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Mode -> folder of commits, each named by its title: all steps of a run over two restarts."""
    folders = {}
    for mode in EXPECTED:
        knobs = dataclasses.asdict(schema.compose([f"relora={mode}", "relora.r=4"]).relora)
        own = {"alpha": 8.0, "reset_frequency": FREQUENCY, "restart_warmup_steps": 4}
        config = nano_config(
            model={"vocab_size": grammar.VOCAB_SIZE},
            relora=knobs | own,
            train={"steps": STEPS},
            checkpoint={"every_steps": 1, "keep_last": STEPS},
        )
        folder = tmp_path_factory.mktemp(mode)
        train(config, checkpoints=folder / "own", cache_dir=folder / "cache", sink=NullSink())
        for path in checkpoint.complete(folder / "own"):
            write(folder / "hub", step=int(path.name[5:]), state=checkpoint.load_weights(path))
        folders[mode] = folder / "hub"
    return folders


def write(folder: Path, *, step: int, state: dict[str, torch.Tensor], **config: object) -> Path:
    """A commit in relora-pico's layout."""
    commit = folder / f"Saving HF Model -- Step {step}"
    commit.mkdir(parents=True)
    names = {"lora_A": "A_lora.weight", "lora_B": "B_lora.weight"}
    renamed = {}
    for name, tensor in state.items():
        stem, _, last = name.rpartition(".")
        if not last.startswith("master"):
            renamed[f"pico_decoder.{stem}.{names.get(last, last)}"] = tensor
    save_file(renamed, commit / "model.safetensors")
    relora = {"r": 4, "lora_alpha": 8, "reset_frequency": FREQUENCY} | config
    (commit / "config.json").write_text(json.dumps({"relora": relora}))
    return commit


def some(source: Path, target: Path, steps) -> Path:
    """The commits of these steps alone."""
    target.mkdir()
    for step in steps:
        name = f"Saving HF Model -- Step {step}"
        (target / name).symlink_to(source / name)
    return target


def answers(result) -> tuple[str, ...]:
    return tuple(verdict["answer"] for verdict in result["verdicts"].values())


@pytest.mark.parametrize("mode", EXPECTED)
@pytest.mark.parametrize("every", [1, 2, 3])
def test_each_procedure_gets_its_own_answers(runs, tmp_path, mode, every):
    folder = some(runs[mode], tmp_path / "some", range(every, STEPS + 1, every))
    result = verdicts.judge(str(folder), restart=RESTART)
    assert answers(result) == EXPECTED[mode]
    assert mode in result["procedures"]
    agreeing = [list(verdict["modules"]) for verdict in result["verdicts"].values()]
    assert agreeing == [[], *([answer] for answer in EXPECTED[mode][1:])]


@pytest.mark.parametrize("mode", EXPECTED)
def test_the_first_restart_where_a_may_have_been_zero(runs, mode):
    result = verdicts.judge(str(runs[mode]), restart=FREQUENCY)
    first, merge, adapters, base = EXPECTED[mode]
    merge = verdicts.UNDECIDED if first == "nothing" else merge
    assert answers(result) == (first, merge, adapters, base)


@pytest.mark.parametrize("mode", EXPECTED)
def test_files_in_bfloat16_tell_all_but_the_base(runs, tmp_path, mode):
    """Only the merge of a bfloat16 base is then as predicted, to the last bit."""
    folder = altered(runs[mode], tmp_path, range(1, STEPS + 1), change=halve)
    result = verdicts.judge(str(folder), restart=RESTART)
    assert answers(result) == (*EXPECTED[mode][:3], "stored in bfloat16")
    same = result["pooled"]["merge_same_bits"][EXPECTED[mode][1]]
    assert (same == 1.0) == (mode == "as_executed")


def halve(state):
    return {name: tensor.to(torch.bfloat16) for name, tensor in state.items()}


def altered(source: Path, target: Path, steps, *, change) -> Path:
    """Copies of these commits with other weights, in folders named as pico-train names its own."""
    for step in steps:
        commit = source / f"Saving HF Model -- Step {step}"
        folder = target / f"step_{step}"
        folder.mkdir()
        shutil.copy(commit / "config.json", folder)
        save_file(change(load_file(commit / "model.safetensors")), folder / "model.safetensors")
    return target


def test_without_a_merge_nothing_shows_a_restart(runs, tmp_path):
    folder = some(runs["corrected"], tmp_path / "some", range(18, 23))
    result = verdicts.judge(str(folder), restart=20)
    assert answers(result)[1:3] == ("none", "restored")
    assert "nothing shows" in result["verdicts"]["adapters"]["why"]
    assert "20 is no multiple of reset_frequency=12 in config.json" in result["notes"]


def test_an_interval_with_two_restarts_tells_neither(runs, tmp_path):
    wide = some(runs["corrected"], tmp_path / "wide", (10, 26))
    result = verdicts.judge(str(wide), restart=FREQUENCY)
    assert answers(result) == ("trained", "undecided", "undecided", "float32")
    assert "another restart" in result["verdicts"]["merge"]["why"]
    assert any("up to 16 updates" in note for note in result["notes"])


def test_a_draw_without_an_update_since_does_not_tell_what_the_optimizer_does(runs, tmp_path):
    """It looks re-initialised also where the next update puts the old adapters back."""
    folder = some(runs["as_executed"], tmp_path / "some", (23, 24, 25))
    for step, present in ((25, True), (24, False)):
        state = load_file(folder / f"Saving HF Model -- Step {step}" / "model.safetensors")
        assert (not any(t.any() for n, t in state.items() if "B_lora" in n)) == present
    result = verdicts.judge(str(folder), restart=RESTART)
    assert answers(result) == ("undecided", "unscaled", "undecided", "bfloat16")
    assert "a later checkpoint" in result["verdicts"]["adapters"]["why"]
    assert "no checkpoint lies in the first cycle" in result["verdicts"]["first_cycle"]["why"]


def test_an_adapter_that_moved_on_unseen_is_undecided(runs, tmp_path):
    """B A grows by half before the merge, and no control interval tells how much."""
    alone = some(runs["corrected"], tmp_path / "alone", (21, 26))
    result = verdicts.judge(str(alone), restart=RESTART)
    assert answers(result)[1] == "undecided"
    assert "by how much is unknown" in result["verdicts"]["merge"]["why"]


@pytest.mark.parametrize("steps", [(20, 24), (25, 26)])
def test_a_restart_needs_checkpoints_on_both_sides(runs, tmp_path, steps):
    folder = some(runs["corrected"], tmp_path / "some", steps)
    with pytest.raises(ConfigError, match=f"before and after it.* {steps[0]}, {steps[1]}$"):
        verdicts.judge(str(folder), restart=RESTART)


# the numbers --------------------------------------------------------------------------------------
def pair(*, scale: float, factor: float, bf16: bool) -> Sums:
    """A module: W gets `factor` times B A, and A a draw of its own."""
    generator = torch.Generator().manual_seed(0)
    bound = 1 / math.sqrt(300)
    a, new = (torch.rand(8, 300, generator=generator) * 2 * bound - bound for _ in range(2))
    b = torch.randn(200, 8, generator=generator) * 0.01
    w = torch.randn(200, 300, generator=generator) * 0.1
    w = w.bfloat16().float() if bf16 else w
    merged = w + factor * (b @ a)
    merged = merged.bfloat16().float() if bf16 else merged
    p = Adapter(weight=w, a=a.double(), b=b.double(), scale=scale)
    return compare(p, Adapter(weight=merged, a=new.double(), b=b.double(), scale=scale))


def test_an_independent_draw_is_as_far_away_as_expected():
    sums = pair(scale=2.0, factor=2.0, bf16=False)
    assert sums.a_distance == pytest.approx(sums.a_distance_fresh, rel=0.03)
    assert sums.a_distance_fresh == pytest.approx(math.sqrt(2), rel=0.03)
    assert abs(sums.a_correlation or 1) < 5 / math.sqrt(2400)
    assert sums.a_same_sign == pytest.approx(0.5, abs=0.05)
    assert sums.a_small == pytest.approx(0.25, abs=0.05)
    assert sums.a_size == pytest.approx(1, rel=0.03)


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize(
    ("factor", "scale", "answer"),
    [
        (0.0, 2.0, "none"),
        (1.0, 2.0, "unscaled"),
        (2.0, 2.0, "scaled"),
        (0.25, 0.25, "scaled"),
        (1.0, 8.0, "unscaled"),
        (1.0, 1.0, "scaled or unscaled"),
        (0.0, 1.0, "none"),
        (1.5, 2.0, "undecided"),
        (-1.0, 2.0, "undecided"),
    ],
)
def test_the_merge_is_measured(factor, scale, answer, bf16):
    sums = pair(scale=scale, factor=factor, bf16=bf16)
    assert sums.factor == pytest.approx(factor, abs=0.05 if bf16 else 1e-4)
    assert merge_answer(sums, again=False).value == answer


def test_a_merge_below_the_rounding_is_undecided():
    w = 1 + torch.rand(6, 5, generator=torch.Generator().manual_seed(0))
    tiny = {"a": torch.full((2, 5), 1e-3).double(), "b": torch.full((6, 2), 1e-3).double()}
    p = Adapter(weight=w.bfloat16(), scale=2.0, **tiny)
    answer = merge_answer(compare(p, p), again=False)
    assert answer.value == "undecided"
    assert "rounding" in answer.why


def test_modules_add_up():
    one = pair(scale=2.0, factor=1.0, bf16=False)
    two = add([one, one])
    assert two.product == 2 * one.product
    assert two.fits == tuple(2 * fit for fit in one.fits)
    assert two.factor == one.factor


def test_a_trained_scale_is_its_tanh(runs, tmp_path):
    def with_scale(state):
        names = [n.removesuffix("A_lora.weight") for n in state if n.endswith("A_lora.weight")]
        return state | {f"{name}s": torch.tensor([0.3]) for name in names}

    source = commits.find(str(altered(runs["corrected"], tmp_path, [24], change=with_scale)))
    scales = {adapter.scale for adapter in read(source, step=24).adapters.values()}
    assert list(scales) == [pytest.approx(math.tanh(0.3))]


# where checkpoints come from ----------------------------------------------------------------------
TAKEN = (12, 22, 23, 24, 26)


def facts(result) -> dict:
    """What does not name the place."""
    steps = {role: taken["step"] for role, taken in result["checkpoints"].items()}
    return {key: result[key] for key in ("verdicts", "pooled", "modules")} | {"steps": steps}


def git(folder: Path, *words: str) -> None:
    own = ("-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false")
    environment = os.environ | {"GIT_CONFIG_GLOBAL": os.devnull}
    subprocess.run(["git", "-C", folder, *own, *words], check=True, env=environment)


@pytest.fixture(scope="module")
def published_clone(runs, tmp_path_factory):
    """A git repository: a commit a step on the run's branch, others between them."""
    folder = tmp_path_factory.mktemp("odd 'clone' é") / "relora"
    folder.mkdir()
    git(folder, "init", "-q", "-b", "main")
    git(folder, "commit", "-q", "--allow-empty", "-m", "initial commit")
    git(folder, "checkout", "-q", "-b", "relora-v2")
    for step in TAKEN:
        for file in (runs["as_executed"] / f"Saving HF Model -- Step {step}").iterdir():
            shutil.copy(file, folder)
        git(folder, "add", ".")
        git(folder, "commit", "-q", "-m", f"Saving HF Model -- Step {step}")
    git(folder, "commit", "-q", "--allow-empty", "-m", "Saving Evaluation Results -- Step 25")
    git(folder, "checkout", "-q", "main")
    return folder


@pytest.fixture
def clone(published_clone, tmp_path):
    return shutil.copytree(published_clone, tmp_path / "odd 'clone' é")


def test_a_git_clone_says_what_its_folders_say(runs, tmp_path, clone):
    folders = some(runs["as_executed"], tmp_path / "some", TAKEN)
    expected = facts(verdicts.judge(str(folders), restart=RESTART))
    result = verdicts.judge(str(clone), restart=RESTART)
    assert facts(result) == expected
    assert result["branch"] == "relora-v2"
    assert facts(verdicts.judge(str(clone), restart=RESTART, revision="relora-v2")) == expected
    git(clone, "clone", "-q", ".", str(tmp_path / "fresh"))  # branches of origin alone
    fresh = str(tmp_path / "fresh")
    assert facts(verdicts.judge(fresh, restart=RESTART)) == expected


def test_a_branch_that_is_not_clear_must_be_named(clone):
    with pytest.raises(ConfigError, match="at main without one"):
        commits.find(str(clone), revision="main")
    with pytest.raises(DataError, match="git rev-list"):
        commits.find(str(clone), revision="--all")
    git(clone, "branch", "copy", "relora-v2")
    with pytest.raises(ConfigError, match=r"--revision must name one of .*copy, relora-v2"):
        commits.find(str(clone))


def test_a_clones_own_settings_run_nothing(tmp_path, clone):
    script, trace = tmp_path / "script", tmp_path / "ran"
    script.write_text(f"#!/bin/sh\ntouch '{trace}'\n")
    script.chmod(0o755)
    for key in ("core.fsmonitor", "gpg.program", "core.pager", "core.sshCommand"):
        git(clone, "config", key, str(script))
    git(clone, "config", "log.showSignature", "true")
    verdicts.judge(str(clone), restart=RESTART)
    assert not trace.exists()


def test_large_files_are_taken_from_the_clones_own_store(clone):
    content, digest = b"weights", "ab" + "cd" * 31
    git(clone, "checkout", "-q", "relora-v2")
    pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{digest}\nsize 7\n"
    (clone / "model.safetensors").write_text(pointer)
    git(clone, "add", ".")
    git(clone, "commit", "-q", "-m", "Saving HF Model -- Step 27")
    source = commits.find(str(clone))
    with pytest.raises(DataError, match="`git lfs fetch --all` brings it"):
        source.file(27, "model.safetensors")
    store = clone / ".git" / "lfs" / "objects" / digest[:2] / digest[2:4]
    store.mkdir(parents=True)
    (store / digest).write_bytes(content)
    assert source.file(27, "model.safetensors") == content


class NoConnection(Exception):
    """As a HTTP client raises it: no OSError."""


class FakeHub:
    """HfApi's three calls, on a folder of commits."""

    def __init__(self, folder: Path, *, branches: list[str]) -> None:
        self.folder, self.branches = folder, branches

    def list_repo_refs(self, repo_id):
        if repo_id != "owner/relora":
            raise NoConnection("[Errno -2] Name or service\n\nnot known")
        return SimpleNamespace(branches=[SimpleNamespace(name=name) for name in self.branches])

    def list_repo_commits(self, repo_id, *, revision):
        titles = sorted((p.name for p in self.folder.iterdir()), key=lambda n: -int(n.split()[-1]))
        listed = [SimpleNamespace(commit_id=f"sha {title}", title=title) for title in titles]
        other = SimpleNamespace(commit_id="x", title="Saving Evaluation Results -- Step 24")
        again = SimpleNamespace(commit_id="old", title="Saving HF Model -- Step 24")
        return [other, *listed, again] if revision == "relora" else [other]

    def hf_hub_download(self, repo_id, filename, *, revision):
        return str(self.folder / revision.removeprefix("sha ") / filename)


@pytest.fixture
def hub(runs, monkeypatch):
    api = FakeHub(runs["as_coded"], branches=["main", "relora"])
    monkeypatch.setattr("huggingface_hub.HfApi", lambda: api)
    return api


def test_the_double_takes_what_the_hubs_api_takes():
    for name in ("list_repo_refs", "list_repo_commits", "hf_hub_download"):
        own = inspect.signature(getattr(FakeHub, name)).parameters
        assert own.keys() <= inspect.signature(getattr(HfApi, name)).parameters.keys()


def test_the_hubs_commits_are_read_by_their_titles(runs, hub):
    result = verdicts.judge("owner/relora", restart=RESTART)
    assert facts(result) == facts(verdicts.judge(str(runs["as_coded"]), restart=RESTART))
    assert result["checkpoints"]["before"]["commit"] == "sha Saving HF Model -- Step 24"
    assert result["notes"][0].startswith("several commits of one step")


def test_a_hub_that_cannot_be_read_is_one_line(hub, capsys):
    why = "NoConnection: [Errno -2] Name or service not known"
    line = f"the hub's owner/other cannot be read ({why})"
    assert_refused(capsys, "owner/other", code=1, line=line)
    hub.branches = ["main"]
    line = "titled 'Saving HF Model -- Step N', got owner/relora without"
    assert_refused(capsys, "owner/relora", code=2, line=line)


# the command --------------------------------------------------------------------------------------
def assert_refused(capsys, source: object, *, code: int, line: str) -> None:
    with pytest.raises(SystemExit) as end:
        main(["published", str(source), "--restart", str(RESTART)])
    assert end.value.code == code
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert line in error


def test_the_command_prints_a_table_or_json(runs, capsys):
    command = ["published", str(runs["as_coded"]), "--restart", "24"]
    assert main([*command, "--json"]) == 0
    text = capsys.readouterr().out
    result = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert answers(result) == EXPECTED["as_coded"]
    assert main(command) == 0
    table = capsys.readouterr().out
    assert "Was A re-initialised or restored? re-initialised\n" in table
    assert "No answer speaks against: as_coded\n" in table
    rows = [line for line in table.splitlines() if line.startswith("layers.")]
    assert len(rows) == len(result["modules"]) == 14


def of_config(change):
    def damage(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({"relora": change(config["relora"])}))

    return damage


def of_weights(change):
    def damage(folder: Path) -> None:
        state = load_file(folder / "model.safetensors")
        save_file(change(state), folder / "model.safetensors")

    return damage


A = "pico_decoder.layers.0.attention.q_proj.A_lora.weight"
B = A.replace("A_lora", "B_lora")
DAMAGES = {
    "has no model.safetensors": lambda f: (f / "model.safetensors").unlink(),
    "has no config.json": lambda f: (f / "config.json").unlink(),
    "model.safetensors is damaged": lambda f: (f / "model.safetensors").write_bytes(b"torn"),
    "config.json is damaged": lambda f: (f / "config.json").write_text("{"),
    "must have a section relora": of_config(lambda relora: None),
    "relora.r in config.json must be positive, got 0": of_config(lambda relora: relora | {"r": 0}),
    "reset_frequency in config.json must be a whole number": of_config(
        lambda relora: relora | {"reset_frequency": 0.5}
    ),
    "must hold unmerged adapters": of_weights(
        lambda state: {n: t for n, t in state.items() if "lora" not in n}
    ),
    "layers.0.attention.q_proj must have W, A and B": of_weights(
        lambda state: {n: t for n, t in state.items() if n != B}
    ),
    "must have W of B A's shape": of_weights(lambda state: state | {A: torch.zeros(4, 31)}),
    "must have the same A and B at steps": of_weights(
        lambda state: state | {A: torch.zeros(2, 32), B: torch.zeros(32, 2)}
    ),
    "not finite": of_weights(lambda state: state | {A: torch.full((4, 32), math.nan)}),
    "floating-point": of_weights(lambda state: state | {A: torch.ones(4, 32, dtype=torch.int8)}),
}


@pytest.mark.parametrize("line", DAMAGES)
def test_a_damaged_checkpoint_is_refused_in_one_line(runs, tmp_path, capsys, line):
    altered(runs["as_coded"], tmp_path, (23, 24, 26), change=lambda state: state)
    DAMAGES[line](tmp_path / "step_26")
    assert_refused(capsys, tmp_path, code=1, line=line)


def test_folders_in_another_layout_are_refused_in_one_line(tmp_path, capsys):
    assert_refused(capsys, tmp_path, code=2, line=f"got {tmp_path} without one")
    assert_refused(capsys, tmp_path / "none", code=2, line="OWNER/NAME on the hub or a local")
    (tmp_path / "step_24").mkdir()
    (tmp_path / "step-24").mkdir()
    assert_refused(capsys, tmp_path, code=1, line="'step-24' and 'step_24' are one step")
    (tmp_path / "bare" / "objects").mkdir(parents=True)
    (tmp_path / "bare" / "HEAD").write_text("nonsense")
    assert_refused(capsys, tmp_path / "bare", code=1, line="git for-each-ref")
