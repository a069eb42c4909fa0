"""What is frozen or recorded restores the code, is found again by content, and looking is safe."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from experiments import environment
from relora_core.config import ConfigError
from sweeps import snapshot
from sweeps.commands.diff import split_patch
from sweeps.snapshot import Entry, changed_files, code_state, freeze, record, tree_hash

pytestmark = pytest.mark.skipif(shutil.which("git") is None, reason="needs git")


def git(folder, *arguments):
    subprocess.run(
        ["git", "-c", "user.name=t", "-c", "user.email=t@t", "-C", str(folder), *arguments],
        check=True,
        capture_output=True,
    )


@pytest.fixture
def checkout(tmp_path):
    folder = tmp_path / "checkout with space"
    (folder / "relora_core").mkdir(parents=True)
    git(folder, "init", "-q")
    (folder / "a.py").write_text("one\n")
    (folder / "relora_core" / "model.py").write_text("width = 1\n")
    (folder / ".gitignore").write_text("*.log\n")
    git(folder, "add", ".")
    git(folder, "commit", "-qm", "first")
    return folder


@pytest.fixture
def copy(checkout, tmp_path):
    """Freezes the checkout as it is when called."""

    def build(**options: object) -> Path:
        out = tmp_path / "out"
        return freeze(out / "code", root=checkout, output_dir=out, **options)  # type: ignore[arg-type]

    return build


def files(folder):
    names = (
        os.path.relpath(os.path.join(d, f), folder) for d, _, fs in os.walk(folder) for f in fs
    )
    return sorted(set(names) - {"SNAPSHOT.json"})


# record -----------------------------------------------------------------------------------------
def test_a_clean_checkout_has_no_diff(checkout, tmp_path):
    code = record(tmp_path, root=checkout)
    assert (code.dirty, code.untracked) == (False, [])
    assert (tmp_path / "code.diff").read_text() == ""
    assert code.commit is not None
    assert len(code.commit) == 40
    assert code.code_hash == environment.code_hash(checkout)


def test_the_diff_restores_edits_and_new_files_from_the_commit(checkout, tmp_path):
    (checkout / "a.py").write_text("two\n")
    (checkout / "new é.py").write_text("three\n")
    (checkout / "noise.log").write_text("ignored")
    out = tmp_path / "plan"
    out.mkdir()
    code = record(out, root=checkout)
    assert code.dirty
    assert code.untracked == ["new é.py"]
    assert json.loads((out / "code.json").read_text())["commit"] == code.commit
    again = tmp_path / "again"
    git(tmp_path, "clone", "-q", str(checkout), str(again))
    git(again, "apply", str(out / "code.diff"))
    assert (again / "a.py").read_text() == "two\n"
    assert (again / "new é.py").read_text() == "three\n"
    assert not (again / "noise.log").exists()
    assert set(split_patch((out / "code.diff").read_text())) == {"a.py", "new é.py"}


def test_results_among_the_code_do_not_make_it_dirty(checkout):
    (checkout / "results" / "runs").mkdir(parents=True)
    (checkout / "results" / "runs" / "weights.bin").write_bytes(b"0" * 100)
    assert code_state(checkout).dirty
    assert not code_state(checkout, output_dir=checkout / "results").dirty


def test_a_name_that_is_not_utf8_can_be_recorded(checkout, tmp_path):
    (checkout / os.fsdecode(b"caf\xe9.py")).write_text("x")
    assert len(record(tmp_path, root=checkout).untracked) == 1
    assert len(json.loads((tmp_path / "code.json").read_text())["untracked"]) == 1


def test_without_git_there_is_still_the_digest(tmp_path):
    code = code_state(tmp_path)
    assert (code.commit, code.dirty) == (None, None)
    assert code.code_hash == environment.code_hash(tmp_path)


def test_a_checkout_of_another_owner_is_not_called_clean(checkout, tmp_path, monkeypatch):
    (checkout / "a.py").write_text("edited\n")
    monkeypatch.setenv("GIT_TEST_ASSUME_DIFFERENT_OWNER", "1")
    code = record(tmp_path, root=checkout)
    assert (code.commit, code.dirty) == (None, None)
    assert json.loads((tmp_path / "code.json").read_text())["dirty"] is None


# freeze -----------------------------------------------------------------------------------------
def test_the_copy_is_the_code_as_it_is_now(checkout, copy):
    (checkout / "a.py").write_text("edited\n")
    (checkout / "new é.py").write_text("new\n")
    (checkout / "noise.log").write_text("ignored")
    (checkout / "run.sh").write_text("#!/bin/sh\n")
    (checkout / "run.sh").chmod(0o755)
    (checkout / "gone.py").write_text("")
    git(checkout, "add", "gone.py")
    (checkout / "gone.py").unlink()
    made = copy()
    assert files(made) == [".gitignore", "a.py", "new é.py", "relora_core/model.py", "run.sh"]
    assert (made / "a.py").read_text() == "edited\n"
    assert os.access(made / "run.sh", os.X_OK)
    assert not os.access(made / "a.py", os.X_OK)


def test_what_changes_after_the_freeze_does_not_reach_the_copy(checkout, copy):
    made = copy()
    (checkout / "a.py").write_text("edited later\n")
    (checkout / "relora_core" / "model.py").unlink()
    assert (made / "a.py").read_text() == "one\n"
    assert (made / "relora_core" / "model.py").exists()


def test_the_same_code_is_one_copy_and_any_change_another(checkout, copy):
    first = copy()
    before = (first / "a.py").stat().st_ino
    changed = first.stat().st_ctime_ns
    assert copy() == first
    assert (first / "a.py").stat().st_ino == before
    assert first.stat().st_ctime_ns > changed  # by its age `gc` knows that it may be in use
    (checkout / "a.py").chmod(0o755)
    second = copy()
    (checkout / "a.py").rename(checkout / "b.py")
    third = copy()
    assert len({first, second, third}) == 3
    assert sorted(first.parent.iterdir()) == sorted([first, second, third])
    assert changed_files(first, second) == ["a.py"]
    assert changed_files(second, third) == ["a.py", "b.py"]
    assert changed_files(first, first) == []


def test_a_copy_says_what_it_is_a_copy_of(checkout, copy):
    (checkout / "new.py").write_text("")
    made = copy()
    facts = json.loads((made / "SNAPSHOT.json").read_text())
    assert facts["tree_hash"] == made.name
    assert facts["commit"] == code_state(checkout).commit
    assert facts["dirty"] is True
    assert facts["untracked"] == ["new.py"]
    assert facts["code_hash"] == environment.code_hash(checkout) == environment.code_hash(made)


def test_a_copy_of_a_copy_is_the_same_and_what_python_left_in_it_does_not_count(copy, tmp_path):
    made = copy()
    (made / "relora_core" / "__pycache__").mkdir()
    (made / "relora_core" / "__pycache__" / "model.pyc").write_bytes(b"1")
    again = freeze(tmp_path / "else", root=made, output_dir=tmp_path / "out2")
    assert again.name == made.name
    assert files(again) == [".gitignore", "a.py", "relora_core/model.py"]
    assert changed_files(made, again) == []


@pytest.mark.parametrize("linked", [False, True])
def test_results_inside_the_checkout_stay_out(checkout, tmp_path, linked):
    """Also where they are not ignored, and where the folder is a link to a larger disk."""
    out = checkout / "results"
    if linked:
        (tmp_path / "disk").mkdir()
        out.symlink_to(tmp_path / "disk")
    (out / "runs").mkdir(parents=True)
    (out / "runs" / "weights.bin").write_bytes(b"0" * 3_000_000)
    made = freeze(out / "code", root=checkout, output_dir=out, limit_mb=1)
    assert files(made) == [".gitignore", "a.py", "relora_core/model.py"]
    assert freeze(out / "code", root=checkout, output_dir=out, limit_mb=1) == made


def test_results_inside_the_checkout_stay_out_by_any_way_to_them(checkout, tmp_path):
    (checkout / "results").mkdir()
    (checkout / "results" / "weights.bin").write_bytes(b"0")
    (tmp_path / "way").symlink_to(checkout / "results")
    made = freeze(tmp_path / "code", root=checkout, output_dir=tmp_path / "way")
    assert files(made) == [".gitignore", "a.py", "relora_core/model.py"]


def test_a_copy_holds_no_copies(checkout, tmp_path):
    first = freeze(checkout / "copies", root=checkout, output_dir=tmp_path / "out")
    (checkout / "a.py").write_text("two\n")
    second = freeze(checkout / "copies", root=checkout, output_dir=tmp_path / "out")
    assert changed_files(first, second) == ["a.py"]


def test_links(checkout, copy, tmp_path):
    (tmp_path / "outside.py").write_text("outside\n")
    (tmp_path / "outside").mkdir()
    (checkout / "ignored.log").write_text("ignored\n")
    (checkout / "inside").symlink_to("a.py")
    (checkout / "absolute").symlink_to(checkout / "a.py")
    (checkout / "folder").symlink_to("relora_core")
    (checkout / "file").symlink_to(tmp_path / "outside.py")
    (checkout / "ignored").symlink_to("ignored.log")
    (checkout / "data").symlink_to("../outside")
    (checkout / "dangling").symlink_to("nowhere")
    (checkout / "loop").symlink_to("loop")
    made = copy()
    assert (made / "inside").readlink() == Path("a.py")
    assert (made / "absolute").readlink() == Path("a.py")
    assert (made / "folder").readlink() == Path("relora_core")
    assert not (made / "file").is_symlink()
    assert (made / "file").read_text() == "outside\n"
    assert not (made / "ignored").is_symlink()
    assert (made / "ignored").read_text() == "ignored\n"
    assert (made / "data").readlink() == tmp_path / "outside"
    assert (made / "dangling").readlink() == Path("nowhere")
    assert (made / "loop").readlink() == Path("loop")


def test_checkouts_inside_are_left_out(checkout, copy):
    for name in ("submodule", "other"):
        git(checkout, "init", "-q", name)
        (checkout / name / "x.py").write_text("x")
        git(checkout / name, "add", ".")
        git(checkout / name, "commit", "-qm", "x")
    git(checkout, "-c", "advice.addEmbeddedRepo=false", "add", "submodule")
    assert files(copy()) == [".gitignore", "a.py", "relora_core/model.py"]


def test_without_git_the_projects_own_files_are_the_code(tmp_path):
    root = tmp_path / "unpacked"
    for name in ("run.py", "conf/config.yaml", "relora_core/model.py", "outputs/x", "notes.txt"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(name)
    (root / "relora_core" / "__pycache__").mkdir()
    (root / "relora_core" / "__pycache__" / "model.pyc").write_text("")
    made = freeze(tmp_path / "code", root=root, output_dir=root / "outputs")
    assert files(made) == ["conf/config.yaml", "relora_core/model.py", "run.py"]
    assert json.loads((made / "SNAPSHOT.json").read_text())["commit"] is None


def test_a_git_hook_s_environment_does_not_mislead(checkout, copy, tmp_path, monkeypatch):
    git(tmp_path, "init", "-q", "hooked")
    monkeypatch.setenv("GIT_DIR", str(tmp_path / "hooked" / ".git"))
    monkeypatch.setenv("GIT_INDEX_FILE", str(tmp_path / "hooked" / ".git" / "index"))
    assert code_state(checkout).commit is not None
    assert "a.py" in files(copy())


def test_this_project_runs_from_its_copy(tmp_path):
    made = freeze(tmp_path / "code", output_dir=tmp_path)
    code = "import sweeps.worker, experiments.environment as e; print(e.ROOT, e.git_state())"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=made, capture_output=True, text=True, check=True
    )
    assert done.stdout.split()[0] == str(made)
    assert made.name in done.stdout


# bad input and bad luck -------------------------------------------------------------------------
def test_too_much_is_refused_by_name_before_anything_is_copied(checkout, copy, tmp_path):
    for i in range(5):
        (checkout / f"{i}.bin").write_bytes(b"0" * 1_000_000 * (i + 1))
    with pytest.raises(ConfigError) as told:
        copy(limit_mb=3)
    line = str(told.value)
    assert line.startswith("hydra.launcher.snapshot_limit_mb must be at least 16")
    assert "15.0 MB, got 3" in line
    assert "4.bin (5.0 MB), 3.bin (4.0 MB), 2.bin (3.0 MB)" in line
    assert "\n" not in line
    assert not (tmp_path / "out").exists()
    assert copy(limit_mb=16)  # what the line advises is enough


def test_results_of_other_commands_are_no_code(checkout, copy, tmp_path):
    """Several output folders may lie in one checkout, none of them ignored."""
    before = copy()
    run = checkout / "out1" / "runs" / "a"
    (run / "checkpoints").mkdir(parents=True)
    (run / "config.json").write_text("{}")
    (run / "checkpoints" / "model.safetensors").write_bytes(b"0" * 3_000_000)
    (checkout / "out1" / "sweeps").mkdir()
    (checkout / "out1" / "sweeps" / "plan.json").write_text("{}")
    assert copy(limit_mb=1) == before
    code = record(tmp_path, root=checkout, output_dir=tmp_path / "out")
    assert (code.dirty, code.untracked) == (False, [])
    assert (tmp_path / "code.diff").read_text() == ""


def test_a_package_is_code_whatever_its_files_are_called(checkout, copy):
    (checkout / "relora_core" / "runs" / "a").mkdir(parents=True)
    (checkout / "relora_core" / "runs" / "a" / "config.json").write_text("{}")
    assert {"relora_core/model.py", "relora_core/runs/a/config.json"} <= set(files(copy()))


def test_what_is_too_much_for_a_local_sweep_names_no_option_of_slurm(checkout, tmp_path):
    with open(checkout / "large.bin", "wb") as file:
        file.truncate(51_000_000)
    with pytest.raises(ConfigError, match=r"^the code to freeze must be at most 50 MB, got 51\.0"):
        snapshot.check(root=checkout, output_dir=tmp_path / "out")


@pytest.mark.parametrize("where", [".", "sweeps", "conf/../relora_core/out"])
def test_results_that_cannot_be_told_from_the_code_are_refused(checkout, where, tmp_path):
    (checkout / "conf").mkdir()
    with pytest.raises(ConfigError, match="output_dir must be apart from the code"):
        freeze(tmp_path / "code", root=checkout, output_dir=checkout / where)
    assert not (tmp_path / "code").exists()


@pytest.mark.parametrize("after", [0, 2])
def test_a_full_disk_leaves_nothing_half_made(copy, monkeypatch, tmp_path, after):
    written = []
    put = snapshot._put

    def full(path, entry):
        if len(written) == after:
            raise OSError(28, "No space left on device")
        written.append(entry)
        put(path, entry)

    monkeypatch.setattr(snapshot, "_put", full)
    with pytest.raises(OSError, match="No space left"):
        copy()
    assert not (tmp_path / "out" / "code").exists()
    monkeypatch.undo()
    assert (copy() / "a.py").exists()


def test_a_folder_that_cannot_be_written_to_is_the_systems_error(copy, tmp_path):
    (tmp_path / "out").write_text("a file where the folder should be")
    with pytest.raises(OSError, match="out"):
        copy()


def test_the_loser_of_a_race_uses_the_winners_copy(checkout, copy, monkeypatch):
    won = []
    put = snapshot._put

    def overtaken(path, entry):
        if not won:
            won.append(None)
            won.append(copy())
        put(path, entry)

    monkeypatch.setattr(snapshot, "_put", overtaken)
    lost = copy()
    assert lost == won[1]
    assert list(lost.parent.iterdir()) == [lost]


entries = st.lists(
    st.builds(
        Entry,
        name=st.text("ab/ \0", max_size=3),
        mode=st.sampled_from(["100644", "100755", "120000"]),
        content=st.binary(max_size=3),
    ),
    max_size=3,
    unique_by=lambda entry: entry.name,
)


@given(entries, entries)
def test_the_tree_hash_is_of_the_set_of_files(one, two):
    def as_set(some):
        return {(e.name, e.mode, e.content) for e in some}

    assert (tree_hash(one) == tree_hash(two)) == (as_set(one) == as_set(two))
    assert tree_hash(one) == tree_hash(one[::-1])
