"""A run reads what it was planned with, or says in one line what has changed; it keeps its
tokenizer."""

from __future__ import annotations

import gzip
import io
import json
import os
import shutil
import tarfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from experiments import __main__ as command
from experiments.disk import inputs
from experiments.disk.evaluations import evaluations, results
from experiments.disk.output_dir import cache_dir, study_folder
from experiments.disk.run_dir import RunDir
from experiments.disk.state import state_of
from experiments.identity import run_id
from experiments.report import page as report
from experiments.report.page import write as write_report
from experiments.run.complete import complete
from experiments.run.evaluate import Request, complete_eval, evaluate
from experiments.run.runner import run_experiment
from experiments.run.stopping import StopFlag
from relora_core import data, evals
from relora_core.config import (
    EVALS,
    BlimpConfig,
    ConfigError,
    EvalConfig,
    PalomaConfig,
    validate,
)
from relora_core.data import documents, parquet, places
from relora_core.data.tokenizer import HFTokenizer
from sweeps.__main__ import main as sweeps
from sweeps.display import make_console
from sweeps.launch import prepare_data
from sweeps.planning.plan import make_plan, store
from sweeps.search import process as search
from sweeps.search import reads
from sweeps.search.config import normalise
from sweeps.search.space import Float
from sweeps.search.study import Spec, Study
from tests.conftest import nano_config
from tests.relora_core.data_files import random_rows, write_bpe, write_rows

TEXT = "the cat sat on the mat and the dog sat too"


class HalfWay(StopFlag):
    """Asks to end after step 2."""

    def __call__(self) -> bool:
        if self.run_dir is not None and len(losses(self.run_dir)) >= 2:
            self.reason = "half way"
            return True
        return False


def permute(folder):
    """The same entries and size, other ids."""
    file = folder / "tokenizer.json"
    raw = json.loads(file.read_text())
    vocabulary = raw["model"]["vocab"]
    first, *_, last = sorted(k for k in vocabulary if len(k) == 1 and k.isalpha() and k < "z")
    names = sorted(k for k in vocabulary if k.isascii() and k.isalpha() and len(k) == 1)
    ids = [vocabulary[name] for name in names]
    vocabulary.update(zip(names, ids[1:] + ids[:1], strict=True))
    assert first != last
    file.write_text(json.dumps(raw))


def write_pairs(folder, *, bad="the mat sat cat"):
    folder.mkdir(parents=True, exist_ok=True)
    record = {
        "sentence_good": TEXT,
        "sentence_bad": bad,
        "field": "syntax",
        "linguistics_term": "island_effects",
        "UID": "u",
        "pairID": "0",
    }
    others = [{**record, "sentence_good": f"{w} sat", "pairID": w} for w in TEXT.split()]
    (folder / "u.jsonl").write_text("".join(json.dumps(r) + "\n" for r in [record, *others]))
    return folder


def write_archive(folder, file):
    with tarfile.open(file, "w:xz") as archive:
        content = (folder / "u.jsonl").read_bytes()
        info = tarfile.TarInfo("data/u.jsonl")
        info.size = len(content)
        archive.addfile(info, io.BytesIO(content))


def write_sources(folder, names=("c4", "wiki")):
    for name in names:
        file = folder / name / "val" / "a.jsonl.gz"
        file.parent.mkdir(parents=True)
        file.write_bytes(gzip.compress(json.dumps({"text": f"{name} {TEXT}"}).encode() + b"\n"))
    return folder


class World:
    """Data, tokenizer and eval texts of one run in a folder of their own."""

    def __init__(self, folder, *, kind="pretokenized", **eval):
        self.folder, self.out = folder, folder / "out"
        self.rows, self.tokenizer = folder / "rows", write_bpe(folder / "bpe")
        self.rows.mkdir()
        if kind == "text":
            (self.rows / "a.txt").write_text(f"{TEXT} " * 60)
        else:
            for i in range(2):
                write_rows(self.rows / f"train-0000{i}-of-00002.parquet", random_rows(40, seed=i))
        self.kind, self.eval = kind, EvalConfig(**eval)

    def config(self, **changes):
        config = nano_config(
            data={
                "kind": self.kind,
                "path": str(self.rows),
                "tokenizer": str(self.tokenizer),
                "seq_len": 32,
                "vocab_size": 512 if self.kind == "pretokenized" else None,
            },
            model={"vocab_size": None},
            train={"steps": 4},
            checkpoint={"every_steps": 2},
            eval=self.eval,
            output_dir=str(self.out),
        )
        return complete(replace(config, **changes))

    def run_dir(self, config):
        return RunDir(self.out / "runs" / run_id(config))

    def train(self, *, stop=None):
        """The run as any command runs it, in this process."""
        config = self.config()
        run_dir = self.run_dir(config)
        run_dir.create(config)
        return self.go_on(run_dir, stop=stop), run_dir

    def go_on(self, run_dir, *, stop=None):
        config = inputs.open_for_training(run_dir, run_dir.config())
        data.prepare(config.data, cache_dir=cache_dir(self.out))
        return run_experiment(run_dir.config(), run_dir, stop=stop or StopFlag())

    def half_way(self):
        state, run_dir = self.train(stop=HalfWay())
        assert (state, run_dir.newest_step()) == ("interrupted", 2)
        return run_dir


@pytest.fixture
def world(tmp_path):
    return World(tmp_path)


def losses(run_dir):
    return [e["metrics"]["train/loss"] for e in run_dir.events() if e["kind"] == "train"]


def forget(world):
    """As runs of earlier versions are: nothing was kept."""
    shutil.rmtree(world.out / "inputs")


def refused(run_dir, *words):
    """A worker of that run refuses in one line, which status shows."""
    with pytest.raises(ConfigError) as error:
        run_experiment(run_dir.config(), run_dir)
    assert "\n" not in str(error.value)
    assert all(word in str(error.value) for word in words), error.value
    assert state_of(run_dir).state == "failed"
    assert state_of(run_dir).reason == str(error.value)
    return str(error.value)


# the tokenizer ------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def scored(tmp_path_factory):
    """A finished run with BLiMP, whose tokenizer then got other ids; tests work on copies."""
    world = World(tmp_path_factory.mktemp("scored"))
    write_pairs(world.folder / "pairs")
    world.eval.blimp = BlimpConfig(enabled=True, path=str(world.folder / "pairs"))
    state, run_dir = world.train()
    assert state == "finished"
    shutil.copytree(world.tokenizer, world.folder / "original")
    permute(world.tokenizer)
    return world, run_dir


@pytest.fixture
def copied(scored, tmp_path):
    world, run_dir = scored
    shutil.copytree(world.out, tmp_path / "out")
    mine = object.__new__(World)
    mine.__dict__ |= vars(world) | {"out": tmp_path / "out"}
    return mine, RunDir(tmp_path / "out" / "runs" / run_dir.run_id)


def own_blimp(run_dir):
    metrics = run_dir.result()["metrics"]
    return {k.removeprefix("eval/"): v for k, v in metrics.items() if k.startswith("eval/blimp/")}


def evaluated(run_dir, *words):
    code = sweeps(["eval", run_dir.run_id, *words, "--output-dir", str(run_dir.path.parents[1])])
    by_step = evaluations(run_dir)
    return code, {k.partition("/")[2]: v for k, v in by_step.get(4, {}).items()}


def test_eval_scores_with_the_tokenizer_that_the_run_kept(copied):
    _, run_dir = copied
    code, metrics = evaluated(run_dir, "--as", "again")
    assert code == 0
    assert metrics == own_blimp(run_dir)


def test_export_writes_the_tokenizer_that_the_run_kept(copied, tmp_path):
    world, run_dir = copied
    answer = command.export(run_dir, folder=tmp_path / "llama", step=None)
    assert answer["notes"] == []
    ids = HFTokenizer(str(tmp_path / "llama")).encode(TEXT)
    assert ids == HFTokenizer(str(world.folder / "original")).encode(TEXT)
    assert ids != HFTokenizer(str(world.tokenizer)).encode(TEXT)


def test_a_damaged_copy_is_made_again_from_the_original_only(copied, tmp_path):
    world, run_dir = copied
    (copy,) = world.out.glob("inputs/*/tokenizer.json")
    content = copy.read_bytes()
    permute(copy.parent)
    with pytest.raises(ConfigError, match=r"data\.tokenizer=.* has changed"):
        command.export(run_dir, folder=tmp_path / "a", step=None)
    config = run_dir.config()
    config.data.tokenizer = str(world.folder / "original")
    checked = inputs.check(config, output_dir=world.out, only=("tokenizer",))
    assert checked.changes == []
    assert copy.read_bytes() == content


@pytest.mark.parametrize("how", ["ids", "eos"])
def test_without_a_kept_one_a_changed_tokenizer_is_refused(copied, tmp_path, how):
    world, run_dir = copied
    forget(world)
    if how == "eos":  # the special tokens' file alone
        shutil.copytree(world.folder / "original", tmp_path / "bpe")
        (tmp_path / "bpe" / "tokenizer_config.json").write_text('{"eos_token": "a"}')
        raw = json.loads(run_dir.config_path.read_text())
        raw["data"]["tokenizer"] = str(tmp_path / "bpe")
        run_dir.config_path.write_text(json.dumps(raw))
    assert evaluated(run_dir, "--as", "again")[0] == 2
    with pytest.raises(ConfigError, match=r"fingerprint \w{12} -> \w{12}\): put back"):
        command.export(run_dir, folder=tmp_path / "llama", step=None)
    assert not (tmp_path / "llama").exists()
    assert not run_dir.evals.exists()


def test_a_changed_tokenizer_taken_on_purpose_is_in_the_record(copied, tmp_path, capsys):
    world, run_dir = copied
    forget(world)
    assert evaluated(run_dir, "--accept-changed")[0] == 2  # not under training's names
    assert "--as NAME" in capsys.readouterr().err
    code, metrics = evaluated(run_dir, "--accept-changed", "--as", "other")
    assert code == 0
    assert metrics.keys() == own_blimp(run_dir).keys()
    (stored,) = results(run_dir)
    (change,) = stored["changes"]
    assert change["planned"] == run_dir.config().data.fingerprint != change["now"]
    answer = command.export(run_dir, folder=tmp_path / "llama", step=None, accept_changed=True)
    assert "data.tokenizer" in answer["notes"][0]
    (written,) = command.show(run_dir)["changes"]
    assert (written["by"], written["now"]) == ("export", change["now"])
    ids = HFTokenizer(str(tmp_path / "llama")).encode(TEXT)
    assert ids == HFTokenizer(str(world.tokenizer)).encode(TEXT)


def test_export_takes_a_named_tokenizer_if_it_is_the_runs(copied, tmp_path):
    world, run_dir = copied
    original = str(world.folder / "original")
    for has_copy in (True, False):
        with pytest.raises(ConfigError, match=r"--tokenizer=.* is not the tokenizer"):
            command.export(
                run_dir, folder=tmp_path / "no", step=None, tokenizer=str(world.tokenizer)
            )
        folder = tmp_path / f"llama-{has_copy}"
        answer = command.export(run_dir, folder=folder, step=None, tokenizer=original)
        assert answer["notes"] == []
        assert HFTokenizer(str(folder)).encode(TEXT) == HFTokenizer(original).encode(TEXT)
        if has_copy:
            forget(world)


def test_export_without_the_data_asks_for_the_tokenizer(copied, tmp_path):
    world, run_dir = copied
    forget(world)
    raw = json.loads(run_dir.config_path.read_text())
    raw["data"]["path"] = str(tmp_path / "gone")
    run_dir.config_path.write_text(json.dumps(raw))
    with pytest.raises(ConfigError, match="--tokenizer PATH names the one"):
        command.export(run_dir, folder=tmp_path / "llama", step=None)
    original = str(world.folder / "original")
    answer = command.export(run_dir, folder=tmp_path / "llama", step=None, tokenizer=original)
    assert answer["notes"][0].startswith("--tokenizer could not be checked")


def test_export_works_where_the_tokenizer_is_gone(copied, tmp_path):
    world, run_dir = copied
    raw = json.loads(run_dir.config_path.read_text())
    raw["data"]["tokenizer"] = str(tmp_path / "gone")
    run_dir.config_path.write_text(json.dumps(raw))
    command.export(run_dir, folder=tmp_path / "llama", step=None)
    ids = HFTokenizer(str(tmp_path / "llama")).encode(TEXT)
    assert ids == HFTokenizer(str(world.folder / "original")).encode(TEXT)


# data ---------------------------------------------------------------------------------------------
def gain(world):
    write_rows(world.rows / "train-00002-of-00002.parquet", random_rows(4, seed=9))


def lose(world):
    (world.rows / "train-00001-of-00002.parquet").unlink()


def rewrite(world):
    write_rows(world.rows / "train-00001-of-00002.parquet", random_rows(40, seed=7))


def patch(world):
    """One byte of one file, times put back as they were."""
    file = world.rows / "train-00001-of-00002.parquet"
    before = file.stat()
    raw = bytearray(file.read_bytes())
    raw[100] ^= 1
    file.write_bytes(raw)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))


def repoint(world):
    shutil.move(world.rows, world.folder / "first")
    write_rows(world.folder / "second" / "train.parquet", random_rows(80, seed=5))
    world.rows.symlink_to(world.folder / "second")


@pytest.mark.parametrize(
    ("change", "word"),
    [
        (gain, "train-00002-of-00002.parquet is new"),
        (lose, "train-00001-of-00002.parquet is missing"),
        (rewrite, "train-00001-of-00002.parquet"),
        (patch, "train-00001-of-00002.parquet was written again"),
        (repoint, "data.path="),
    ],
)
def test_changed_rows_end_a_resumed_run_before_its_first_step(world, change, word):
    run_dir = world.half_way()
    change(world)
    refused(run_dir, word, "data.path", "fingerprint", "retry", "--accept-changed")
    assert len(losses(run_dir)) == 2


def test_put_back_it_goes_on_as_if_nothing_had_been(world):
    run_dir = world.half_way()
    shutil.copytree(world.rows, world.folder / "kept")
    rewrite(world)
    refused(run_dir, "data.path")
    shutil.rmtree(world.rows)
    shutil.copytree(world.folder / "kept", world.rows)
    assert world.go_on(run_dir) == "finished"
    other = World(world.folder / "other")
    _, undisturbed = other.train()
    assert losses(run_dir) == losses(undisturbed)


@pytest.mark.parametrize("limit", [parquet.HASHED_WHOLE, 0])
def test_touched_copied_and_moved_data_are_the_same(world, monkeypatch, limit):
    monkeypatch.setattr(parquet, "HASHED_WHOLE", limit)
    run_dir = world.half_way()
    for file in world.rows.iterdir():
        os.utime(file)
    assert inputs.check(run_dir.config(), output_dir=world.out).changes == []
    world.rows.rename(world.folder / "moved")
    with pytest.raises(ConfigError, match="no such local path"):
        run_experiment(run_dir.config(), run_dir)
    world.rows = world.folder / "moved"
    again = world.config()  # what the same command with the new data.path plans
    assert run_id(again) == run_dir.run_id
    run_dir.create(again)
    assert run_dir.config().data.path == str(world.rows)
    assert world.go_on(run_dir) == "finished"


def flat(file, rows):
    """Parquet whose footer says nothing of the ids but their number and range."""
    file.parent.mkdir(parents=True, exist_ok=True)
    table = pa.table({"input_ids": pa.array(list(map(list, rows)), type=pa.list_(pa.int32()))})
    pq.write_table(table, file, compression="none", use_dictionary=False, write_statistics=False)


def test_blocks_tell_what_the_footers_of_large_files_do_not(world, monkeypatch, here):
    monkeypatch.setattr(parquet, "HASHED_WHOLE", 0)
    for file in world.rows.iterdir():
        file.unlink()
    rows = random_rows(40)
    flat(world.rows / "train.parquet", rows)
    run_dir = world.half_way()
    planned = run_dir.config().data.fingerprint
    flat(world.rows / "train.parquet", rows[::-1])
    assert world.config().data.fingerprint == planned  # the identity cannot tell
    line = refused(run_dir, "train.parquet was written again")
    before, after = line.partition("(fingerprint ")[2].partition(")")[0].split(" -> ")
    assert before != after
    code = sweeps_retry(world, run_dir, "--accept-changed")
    assert (code, state_of(run_dir).state) == (0, "finished")


@pytest.mark.parametrize(
    ("limit", "digest"),
    [
        (2**20, "53cae29a3bdb84775fb7fa4b66365db37922c067d98a704aa4ed01b308e37ce0"),
        (0, "3d5b7925ca0736a317ebcf9153dd962aaecfe883cd59537b44e60a7a38b387fa"),
    ],
)
def test_fingerprints_of_earlier_versions_stand(tmp_path, monkeypatch, limit, digest):
    """Every run_id has one in it: written down before there was anything beside it."""
    monkeypatch.setattr(parquet, "HASHED_WHOLE", limit)
    rows, text = tmp_path / "train.parquet", tmp_path / "a.txt"
    rows.write_bytes(b"12345678\x04\x00\x00\x00PAR1")
    assert parquet.fingerprint([rows], tokenizer_digest="t 0") == digest
    text.write_text("a text")
    named = [("a.txt", text)]
    assert documents.fingerprint(named, text_field="text", tokenizer_digest="t 0") == (
        "f574dd9bca967a74aae0520b9e8bb34272ee4c15542e4499c6c7525a1d71b28d"
    )


@pytest.fixture
def here(monkeypatch):
    """`retry` runs what it launches in this process."""

    def relaunch(plan, run_ids, *, output_dir):
        (cell,) = [cell for cell in plan.cells if cell.run_id in run_ids]
        run_dir = RunDir(output_dir + "/runs/" + cell.run_id)
        prepare_data(plan, Path(output_dir), console=make_console())
        return int(run_experiment(run_dir.config(), run_dir) != "finished")

    monkeypatch.setattr("sweeps.launch.relaunch", relaunch)


def sweeps_retry(world, run_dir, *words):
    config = run_dir.config()
    if not (world.out / "sweeps").exists():
        store(make_plan([({}, config)], name="s"), output_dir=world.out)
    return sweeps(["retry", run_dir.run_id, *words, "--output-dir", str(world.out)])


@pytest.mark.slow  # a worker of its own
def test_retry_refuses_before_it_launches_and_writes_down_what_it_takes(world, capsys, monkeypatch):
    monkeypatch.setattr(report, "draw", lambda *_: [])  # pictures take seconds
    run_dir = world.half_way()
    rewrite(world)
    assert sweeps_retry(world, run_dir) == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert line.startswith("error: data.path=")
    assert "--accept-changed" in line
    assert len(run_dir.attempt_records()) == 1

    assert sweeps_retry(world, run_dir, "--accept-changed") == 0
    assert state_of(run_dir).state == "finished"
    first, second = run_dir.attempt_records()
    assert "changes" not in first
    (change,) = second["changes"]
    assert change["planned"] == run_dir.config().data.fingerprint
    assert change["now"] == data.fingerprint(world.config().data)
    assert state_of(run_dir).reason == "goes on with other data than planned (--accept-changed)"
    page = write_report(world.out, "s").read_text()
    assert "1 run went on with other data than planned, on purpose" in page
    rewrite_again = random_rows(40, seed=11)
    write_rows(world.rows / "train-00001-of-00002.parquet", rewrite_again)
    with pytest.raises(ConfigError, match="has changed"):  # once is not for ever
        inputs.open_for_training(run_dir, run_dir.config())


# text ---------------------------------------------------------------------------------------------
def test_text_that_is_tokenised_already_is_what_it_was(tmp_path):
    world = World(tmp_path, kind="text")
    run_dir = world.half_way()
    with open(world.rows / "a.txt", "a") as file:
        file.write("and more")
    permute(world.tokenizer)
    assert world.go_on(run_dir) == "finished"
    _, undisturbed = World(tmp_path / "other", kind="text").train()
    assert losses(run_dir) == losses(undisturbed)


def test_changed_text_is_refused_where_it_must_be_read_again(tmp_path, here):
    world = World(tmp_path, kind="text")
    run_dir = world.half_way()
    shutil.rmtree(cache_dir(world.out))
    with open(world.rows / "a.txt", "a") as file:
        file.write("and more")
    refused(run_dir, "a.txt had 2,580 bytes, has 2,588")
    assert not cache_dir(world.out).exists()
    assert sweeps_retry(world, run_dir, "--accept-changed") == 0
    assert state_of(run_dir).state == "finished"


def test_an_altered_token_cache_is_refused_and_a_touched_one_is_not(tmp_path):
    world = World(tmp_path, kind="text")
    run_dir = world.half_way()
    (ids,) = cache_dir(world.out).glob("tokens-*/ids.bin")
    os.utime(ids)
    stream = {"seed": 0, "vocab_size": 512, "cache_dir": cache_dir(world.out)}
    config = run_dir.config().data
    rows = data.open_stream(config, **stream).next_rows(2)
    array = np.fromfile(ids, dtype=np.uint16)
    array[:] = array[::-1]
    array.tofile(ids)
    with pytest.raises(data.DataError, match=r"ids\.bin has other content .* delete it"):
        run_experiment(run_dir.config(), run_dir)
    shutil.rmtree(ids.parent)
    assert world.go_on(run_dir) == "finished"
    assert (data.open_stream(config, **stream).next_rows(2) == rows).all()


# evals --------------------------------------------------------------------------------------------
WRITERS = {"paloma": write_sources, "blimp": write_pairs}


@pytest.mark.parametrize("name", EVALS)
def test_every_eval_is_fingerprinted_and_checked(tmp_path, name):
    """A new section of EvalConfig needs a path, a fingerprint and, here, texts to try."""
    world = World(tmp_path)
    texts = WRITERS[name](tmp_path / "texts")
    section = replace(getattr(world.eval, name), enabled=True, path=str(texts))
    world.eval = replace(world.eval, **{name: section})
    config = world.config()
    planned = getattr(config.eval, name).fingerprint
    assert planned == evals.texts_digest(config, name)
    assert len(planned) == 64
    files = evals.local_files(config)[name]
    assert files
    assert all(texts in file.parents for file in files)
    elsewhere = replace(section, path=str(shutil.move(texts, tmp_path / "moved")))
    world.eval = replace(world.eval, **{name: elsewhere})
    assert run_id(world.config()) == run_id(config)  # the path is outside the identity
    unplanned = replace(section, path=elsewhere.path, fingerprint="0" * 64)
    config = replace(config, eval=replace(config.eval, **{name: unplanned}))
    validate(config)
    (change,) = inputs.check(config, output_dir=world.out).changes
    assert (change.key, change.now) == (f"eval.{name}", planned)


def test_a_folder_that_lost_a_source_ends_a_resumed_run(tmp_path):
    world = World(tmp_path)
    write_sources(tmp_path / "paloma")
    world.eval.paloma = PalomaConfig(enabled=True, path=str(tmp_path / "paloma"))
    run_dir = world.half_way()
    shutil.rmtree(tmp_path / "paloma" / "wiki")
    refused(run_dir, "eval.paloma.path=", "a.jsonl.gz is missing", "--accept-changed")


def test_a_replaced_archive_is_evaluated_on_purpose_only(tmp_path, capsys):
    world = World(tmp_path)
    archive = tmp_path / "blimp.tar.xz"
    write_archive(write_pairs(tmp_path / "pairs"), archive)
    world.eval.blimp = BlimpConfig(enabled=True, path=str(archive))
    _, run_dir = world.train()
    checked = inputs.check(run_dir.config(), output_dir=world.out)
    queued = Request(name="q", eval=complete_eval(checked.config, eval=run_dir.config().eval))

    write_archive(write_pairs(tmp_path / "pairs", bad=TEXT), archive)
    assert evaluated(run_dir, "--as", "again")[0] == 2
    assert "eval.blimp.path=" in (line := capsys.readouterr().err.splitlines()[-1])
    assert "blimp.tar.xz" in line
    with pytest.raises(ConfigError, match="ask for the evaluation again"):
        evaluate(run_dir, request=queued)
    assert not list(results(run_dir))
    code, _ = evaluated(run_dir, "--as", "again", "--accept-changed")
    assert code == 0
    (stored,) = results(run_dir)
    assert stored["changes"][0]["key"] == "eval.blimp"
    assert stored["changes"][0]["now"] == stored["eval"]["fingerprint"]
    # Other texts, named on purpose, are not the run's own: as before.
    write_pairs(tmp_path / "third", bad="cat")
    assert evaluated(run_dir, f"eval.blimp.path={tmp_path / 'third'}", "--as", "third")[0] == 0


def test_the_files_are_read_once_while_they_look_the_same(world, monkeypatch):
    world.half_way()
    config = world.config()
    for file in world.out.glob("inputs/*/files.json"):  # as if the files were older
        facts = json.loads(file.read_text())
        file.write_text(json.dumps(facts | {"read": facts["read"] + 10**10}))
    monkeypatch.setattr(data, "fingerprint", None)
    assert inputs.check(config, output_dir=world.out).changes == []


def test_another_grammar_is_refused(tmp_path, monkeypatch):
    from relora_core.data import grammar

    config = complete(nano_config(model={"vocab_size": None}, output_dir=str(tmp_path)))
    assert inputs.check(config, output_dir=tmp_path).changes == []
    rows = grammar.GrammarStream.next_rows
    monkeypatch.setattr(grammar.GrammarStream, "next_rows", lambda self, n: rows(self, n)[::-1])
    (change,) = inputs.check(config, output_dir=tmp_path).changes
    assert "grammar" in change.what


def test_a_hub_data_set_is_its_commit(world, monkeypatch):
    """Its tokenizer, too, is the copy that was kept."""
    commits = ["a" * 40]
    monkeypatch.setattr(places, "hub_commit", lambda source, repo_type: commits[-1])
    config = nano_config(
        data={"kind": "pretokenized", "path": "owner/rows", "tokenizer": str(world.tokenizer)}
    )
    config.data.fingerprint = data.fingerprint(config.data)
    assert inputs.check(config, output_dir=world.out).changes == []
    permute(world.tokenizer)
    assert inputs.check(config, output_dir=world.out).changes == []
    commits.append("b" * 40)
    (change,) = inputs.check(config, output_dir=world.out).changes
    assert "owner/name@commit names the planned one" in change.what


def test_a_search_reads_something_else_only_where_that_was_taken(world, capsys):
    """And its later runs keep the ids of the plan, with the change in their records."""
    config = world.config()
    folder = study_folder(world.out, name="s")
    spec = Spec(
        config=normalise({"n_trials": 2, "objectives": ["train/loss"], "sampler": "random"}),
        space={"train.lr": Float(low=1e-3, high=1e-2, log=True)},
        bases={"": config},
        notes=["data: said when it was planned"],
    )
    study = Study.open(folder, create=spec)
    assert not search.has_changed(study)
    rewrite(world)
    now = world.config()
    assert search.has_changed(study)
    line = capsys.readouterr().err
    assert line.startswith("error: data.path=")
    assert line.count("\n") == 1
    assert "`python -m sweeps search s --accept-changed --output-dir" in line
    assert "sweep.name" in line

    accept = ["search", "s", "--accept-changed", "--output-dir", str(world.out)]
    assert sweeps(accept) == 0
    assert "taken as it is now: data.path=" in capsys.readouterr().out
    assert not search.has_changed(study)
    (planned,) = reads.as_planned([now], folder)  # the same command again goes on with the study
    assert (planned.data.fingerprint, now.data.fingerprint != planned.data.fingerprint) == (
        config.data.fingerprint,
        True,
    )
    (run_dir,) = search.prepare(study.take(search.this_process()))
    assert run_dir.config().data.fingerprint == config.data.fingerprint
    (change,) = inputs.accepted(run_dir)
    assert (change["by"], change["now"]) == ("search", now.data.fingerprint)
    assert inputs.open_for_training(run_dir, run_dir.config())
    assert state_of(run_dir).reason == "goes on with other data than planned (--accept-changed)"

    assert sweeps(["status", "--json", "--output-dir", str(world.out)]) == 0
    assert json.loads(capsys.readouterr().out)["notes"] == {"s": spec.notes}
    assert sweeps(["search", "s", "--output-dir", str(world.out)]) == 0
    assert "note: data: said when it was planned\n" in capsys.readouterr().out
    assert sweeps(accept) == 0
    assert "nothing has changed" in capsys.readouterr().out
    write_rows(world.rows / "train-00001-of-00002.parquet", random_rows(40, seed=11))
    assert search.has_changed(study)  # once is not for ever


def test_shorter_data_taken_on_purpose_are_trained_on(world, here):
    """The position in the old data is one in the new, or in its next pass."""
    run_dir = world.half_way()
    lose(world)
    write_rows(world.rows / "train-00000-of-00002.parquet", random_rows(5, seed=3))
    assert sweeps_retry(world, run_dir, "--accept-changed") == 0
    assert len(losses(run_dir)) == 4
