"""What is made in a folder that its group may write to is the group's; elsewhere the umask decides.

And what is closed to somebody is named in one line: file, owner, way out.
"""

from __future__ import annotations

import ast
import os
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from relora_core import atomic, shared

ROOT = Path(__file__).resolve().parents[2]
OTHER, LAB = 54321, 54322
"""A user and a group that this machine has no name for."""
ROOT_ONLY = pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")


@pytest.fixture(params=[0o077, 0o022, 0o002])
def umask(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    monkeypatch.setattr(shared, "UMASK", request.param)
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def modes(folder: Path) -> dict[str, int]:
    return {p.name: stat.S_IMODE(p.lstat().st_mode) for p in folder.rglob("*")}


def fill(folder: Path) -> None:
    shared.make_folder(folder / "deep" / "deeper")
    with shared.open_file(folder / "opened", "w") as file:
        file.write("x")
    shared.touch(folder / "touched")
    shared.write_text(folder / "text", "x")
    atomic.write_json(folder / "deep" / "json", {})
    atomic.create_text(folder / "created", "x")
    made = Path(tempfile.mkdtemp(dir=folder, prefix="made"))
    (made / "inside").write_text("x")
    made.rename(folder / "published")
    shared.open_up(folder / "published")


FOLDERS = ("deep", "deeper", "published")


@pytest.mark.parametrize("setgid", [0, stat.S_ISGID])
def test_a_groups_folder_holds_what_the_group_can_write(tmp_path: Path, umask: int, setgid: int):
    folder = tmp_path / "lab"
    folder.mkdir()
    folder.chmod(setgid | 0o770)
    fill(folder)
    for name, mode in modes(folder).items():
        wanted = setgid | 0o070 if name in FOLDERS else 0o060
        assert mode & wanted == wanted, (name, oct(mode))
    others = {mode & 0o007 for name, mode in modes(folder).items() if name not in FOLDERS}
    assert others == {0o006 & ~umask}  # nothing is given to the world


def test_elsewhere_the_umask_decides(tmp_path: Path, umask: int):
    folder = tmp_path / "own"
    folder.mkdir()
    folder.chmod(0o755)
    fill(folder)
    for name, mode in modes(folder).items():
        plain = 0o777 & ~umask if name in FOLDERS else 0o666 & ~umask
        if name == "deeper" or name == "json":  # in `deep`, which umask 002 gives to the group
            continue
        assert mode == plain or name == "inside", (name, oct(mode))


def test_a_link_that_somebody_has_put_there_opens_nothing(tmp_path: Path):
    folder, secret = tmp_path / "lab", tmp_path / "secret"
    folder.mkdir()
    folder.chmod(0o770)
    secret.write_text("")
    secret.chmod(0o600)
    (folder / "link").symlink_to(secret)
    shared.share(folder / "link")
    shared.touch(folder / "link")
    shared.share_all(folder)
    assert stat.S_IMODE(secret.stat().st_mode) == 0o600


@ROOT_ONLY
def test_a_folder_of_another_group_without_setgid_gets_files_of_that_group(tmp_path: Path):
    folder = tmp_path / "lab"
    folder.mkdir()
    os.chown(folder, -1, LAB)
    folder.chmod(0o770)
    fill(folder)
    assert {path.lstat().st_gid for path in folder.rglob("*")} == {LAB}
    assert (folder / "deep").stat().st_mode & stat.S_ISGID  # what others make below is the group's


# another user -------------------------------------------------------------------------------------
@pytest.fixture
def place() -> Iterator[Path]:
    """A folder that other users can come to: pytest's own let nobody in."""
    folder = Path(tempfile.mkdtemp(prefix="relora-"))
    folder.chmod(0o755)
    yield folder
    shutil.rmtree(folder)


def as_other(look: Callable[[], object]) -> str:
    """What a function says in a process of another user, who is in the group LAB."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.setgroups([LAB])
            os.setegid(OTHER)
            os.seteuid(OTHER)
            text = str(look())
        except BaseException as error:
            text = repr(error)
        os.write(writing, text.encode())
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as answer:
        text = answer.read()
    os.waitpid(pid, 0)
    return text


def tried(path: Path) -> str | None:
    """Why nothing could be written there, as a command says it."""
    try:
        atomic.write_text(path, "x")
    except OSError as error:
        return shared.explain(error)
    return "written"


@ROOT_ONLY
def test_a_second_user_writes_where_the_first_did(place: Path):
    folder = place / "lab"
    folder.mkdir()
    os.chown(folder, -1, LAB)
    folder.chmod(0o2770)
    before = os.umask(0o077)
    try:
        fill(folder)
        for name in ("opened", "created", "deep/json", "deep/new", "published/inside"):
            assert as_other(lambda name=name: tried(folder / name)) == "written"
    finally:
        os.umask(before)
    assert (folder / "deep" / "json").stat().st_uid == OTHER


@ROOT_ONLY
@pytest.mark.parametrize(
    ("mode", "line"),
    [
        (0o755, "{f} is read-only for you (owner root, whose `chmod g+w` opens it to group "),
        (0o2760, "{f} is read-only for you (owner root, whose `chmod g+wx` opens it to group "),
        (0o3770, "{f}/file cannot be replaced by you (owner root, in a folder with the sticky"),
    ],
)
def test_what_is_closed_is_said_with_its_owner(place: Path, mode: int, line: str):
    folder = place / "lab"
    folder.mkdir()
    (folder / "file").write_text("")
    os.chown(folder, -1, LAB)
    folder.chmod(mode)
    shown = as_other(lambda: tried(folder / "file"))
    assert shown.startswith(line.format(f=folder))
    assert "\n" not in shown
    assert shown.endswith("look without writing")


def test_what_is_ones_own_is_no_mystery(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Root may write anywhere, so that access is refused here by hand."""
    assert shared.find_obstacle(tmp_path / "new") is None
    monkeypatch.setattr(os, "access", lambda *_, **__: False)
    monkeypatch.setattr(os, "supports_effective_ids", set())
    assert shared.find_obstacle(tmp_path / "a" / "b") == (
        f"{tmp_path} is read-only, though it is yours (`chmod u+w` opens it)"
    )
    assert shared.explain(OSError(28, "No space left on device", str(tmp_path))) is None


# no way around ------------------------------------------------------------------------------------
ELSEWHERE = {
    "relora_core/shared.py": "the way itself",
    "relora_core/native.py": "a cache that must be ours alone",
    "relora_core/checkpoint.py": "a new folder, which share() opens",
    "relora_core/export.py": "likewise, and share_all() what is in it",
    "relora_core/data/text.py": "in a temporary folder that open_up() opens",
    "experiments/disk/flock.py": "it is there already",
    "sweeps/search/journal.py": "likewise",
    "sweeps/local/warm.py": "likewise",
    "sweeps/slurm/launcher.py": "in a temporary folder that goes",
}
MAKERS = ("mkdir", "makedirs", "touch", "write_text", "write_bytes")
ONES_OWN = ("atomic", "shared")


def around(path: Path) -> list[str]:
    """Lines that make a file or a folder without thought for the group."""
    lines = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.Call):
            continue
        name = node.func.attr if isinstance(node.func, ast.Attribute) else ""
        owner = getattr(getattr(node.func, "value", None), "id", "")
        words = [a.value for a in node.args if isinstance(a, ast.Constant)]
        plain = isinstance(node.func, ast.Name) and node.func.id == "open"
        writes = plain and any(isinstance(w, str) and set(w) & set("wax+") for w in words)
        if writes or (name in MAKERS and owner not in ONES_OWN):
            lines.append(f"{path.relative_to(ROOT)}:{node.lineno}")
    return lines


def test_no_file_of_an_output_folder_is_made_another_way():
    parts = ("relora_core", "experiments", "sweeps")
    files = [path for part in parts for path in ROOT.glob(f"{part}/**/*.py")]
    strays = {str(p.relative_to(ROOT)): lines for p in files if (lines := around(p))}
    assert sorted(strays) == sorted(ELSEWHERE), strays
