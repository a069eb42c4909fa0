"""The code state beside a plan restores the code, and looking changes nothing."""

from __future__ import annotations

import json
import shutil
import subprocess

import pytest

from experiments.runner import code_hash
from sweeps.snapshot import code_state, record

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
    folder.mkdir()
    git(folder, "init", "-q")
    (folder / "a.py").write_text("one\n")
    (folder / ".gitignore").write_text("*.log\n")
    git(folder, "add", ".")
    git(folder, "commit", "-qm", "first")
    return folder


def test_a_clean_checkout_has_no_diff(checkout):
    code = code_state(checkout)
    assert (code.dirty, code.diff, code.untracked) == (False, "", [])
    assert code.commit is not None
    assert len(code.commit) == 40
    assert code.code_hash == code_hash()


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


def test_without_git_there_is_still_the_digest(tmp_path):
    code = code_state(tmp_path)
    assert (code.commit, code.dirty, code.diff) == (None, False, "")
    assert code.code_hash == code_hash()
