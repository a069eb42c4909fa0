"""A frozen config leads to the same data and stores from any folder, whichever version froze it."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from experiments import addresses
from experiments.addresses import store_uri
from experiments.disk import frozen
from experiments.disk.output_dir import plan_folder
from experiments.disk.run_dir import RunDir
from experiments.identity import config_to_json, ids
from experiments.tracking import store as mlflow_store
from relora_core.config import DataConfig, EvalConfig, PalomaConfig, TrackingConfig
from sweeps.__main__ import main
from sweeps.launchers import load_launcher, store_launcher
from sweeps.planning.plan import load, make_plan, store
from sweeps.slurm.launcher import SlurmLauncher
from sweeps.slurm.options import SlurmOptions
from sweeps.tracking import bring_up_to_date
from tests import warm
from tests.sweeps.records import end_run

ROOT = Path(__file__).parents[2]


@pytest.fixture
def home(tmp_path, monkeypatch):
    """The folder that commands are given in, `p[1]`, with data beside it; `away` is another."""
    folder = tmp_path / "p[1]"
    for name in ("p[1]/rows", "p[1]/owner/local", "beside", "away"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "a.txt").touch()
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(folder)
    return folder


def typed(nano, *, path="rows", uri=None, output_dir="out", fingerprint="f"):
    return replace(
        nano(),
        output_dir=output_dir,
        data=DataConfig(
            kind="text", path=path, tokenizer=path, fingerprint=fingerprint, seq_len=16
        ),
        eval=EvalConfig(paloma=PalomaConfig(enabled=True, path=path)),
        tracking=TrackingConfig(enabled=True, uri=uri),
    )


def as_before(run_dir, config):
    """A run of an earlier version: its config as it was typed."""
    run_dir.create(config)
    run_dir.config_path.write_text(config_to_json(config))
    return run_dir


def paths(config):
    return {config.data.path, config.data.tokenizer, config.eval.paloma.path}


PATHS = {
    "rows": "{home}/rows",
    "./rows": "{home}/rows",
    "../beside": "{tmp}/beside",
    "~/beside": "{tmp}/beside",
    "owner/local": "{home}/owner/local",
    "owner/name": "owner/name",  # on the hub
    "owner/name@v1.0": "owner/name@v1.0",
    "rows/*.txt": "{tmp}/p[[]1]/rows/*.txt",
    "/abs/rows": "/abs/rows",
}
ADDRESSES = {
    "sqlite:///relative.db": "sqlite:///{home}/relative.db",
    "sqlite:///in/x.db?timeout=5": "sqlite:///{home}/in/x.db?timeout=5",
    "sqlite+pysqlite:///100%25.db": "sqlite+pysqlite:///{home}/100%25.db",
    "sqlite:////abs/x.db": "sqlite:////abs/x.db",
    "http://127.0.0.1:5000": "http://127.0.0.1:5000",
    "postgresql://me@db/x": "postgresql://me@db/x",
    None: None,
}


@pytest.mark.parametrize(("path", "right"), PATHS.items())
def test_paths_are_frozen_from_the_root_and_names_on_the_hub_stay(
    nano, home, monkeypatch, path, right
):
    right = right.format(home=home, tmp=home.parent)
    run = RunDir(home / "out" / "runs" / "r")
    run.create(typed(nano, path=path))
    monkeypatch.chdir(home.parent / "away")
    assert json.loads(run.config_path.read_text())["data"]["path"] == right
    assert paths(run.config()) == {right}
    assert run.config().output_dir == str(home / "out")


@pytest.mark.parametrize(("uri", "right"), ADDRESSES.items())
def test_a_database_is_frozen_from_the_root(nano, home, monkeypatch, uri, right):
    right = right and right.format(home=home)
    run = RunDir(home / "out" / "runs" / "r")
    run.create(typed(nano, uri=uri))
    monkeypatch.chdir(home.parent / "away")
    assert json.loads(run.config_path.read_text())["tracking"]["uri"] == right
    assert run.config().tracking.uri == right


def test_the_folder_of_the_command_may_be_a_link(nano, home, monkeypatch):
    (home.parent / "link").symlink_to(home)
    monkeypatch.chdir(home.parent / "link")
    config = frozen.absolute(typed(nano, uri="sqlite:///x.db"))
    assert Path(config.data.path).samefile(home / "rows")
    assert addresses.sqlite_path(config.tracking.uri).parent.samefile(home)


def test_freezing_renames_nothing_and_is_done_once(nano, home):
    config = typed(nano, uri="sqlite:///x.db")
    fixed = frozen.absolute(config)
    assert fixed != config
    assert ids(fixed) == ids(config)
    assert frozen.absolute(fixed) == fixed == frozen.read(fixed, output_dir=home / "out")


def test_text_named_by_a_glob_has_the_same_fingerprint_from_anywhere(home, monkeypatch):
    from relora_core.data.documents import find_files

    names = [name for name, _ in find_files("rows/*.txt")]
    anywhere = frozen.absolute_path("rows/*.txt")
    monkeypatch.chdir("/")
    assert [name for name, _ in find_files(anywhere)] == names == ["a.txt"]


# written by earlier versions ----------------------------------------------------------------------
@pytest.mark.parametrize("path", ["rows", "./rows", "owner/local", "rows/*.txt"])
@pytest.mark.parametrize("output_dir", ["out", "./out", "deep/out", "."])
def test_what_was_frozen_as_typed_is_read_where_it_was_typed(
    nano, home, monkeypatch, path, output_dir
):
    config = typed(nano, path=path, uri="sqlite:///x.db", output_dir=output_dir)
    run = as_before(RunDir(home / output_dir / "runs" / "r"), config)
    (home / "x.db").touch()
    right = frozen.absolute_path(path)
    for place in (home, home.parent / "away"):
        monkeypatch.chdir(place)
        config = run.config()
        assert config.tracking.uri == f"sqlite:///{home}/x.db"
        assert paths(config) == {right}
        assert config.output_dir == str(home / output_dir)


def test_what_was_frozen_as_typed_beside_an_absolute_folder_is_read_here(nano, home, monkeypatch):
    out = home.parent / "elsewhere"
    config = typed(nano, uri="sqlite:///x.db", output_dir=str(out))
    run = as_before(RunDir(out / "runs" / "r"), config)
    (home / "x.db").touch()
    assert run.config().tracking.uri == f"sqlite:///{home}/x.db"
    assert paths(run.config()) == {f"{home}/rows"}
    monkeypatch.chdir(home.parent / "away")
    assert run.config().tracking.uri == "sqlite:///x.db"  # nobody knows
    assert paths(run.config()) == {"rows"}


def test_the_default_database_follows_a_folder_that_is_moved(nano, home):
    run = RunDir(home / "out" / "runs" / "r")
    run.create(typed(nano))
    shutil.move(home / "out", home.parent / "moved")
    config = RunDir(home.parent / "moved" / "runs" / "r").config()
    assert store_uri(config) == f"sqlite:///{home.parent}/moved/mlflow.db"
    assert paths(config) == {f"{home}/rows"}


def test_the_same_command_knows_a_run_of_an_earlier_version_and_mends_its_paths(
    nano, home, monkeypatch
):
    config = typed(nano, uri="sqlite:///x.db")
    run = as_before(RunDir(home / "out" / "runs" / "r"), config)
    run.create(config)
    assert json.loads(run.config_path.read_text())["data"]["path"] == f"{home}/rows"
    assert ids(run.config()) == ids(config)


# plans --------------------------------------------------------------------------------------------
def grid(nano, *names):
    """Points that differ in their data, as typed."""
    return [
        ({"data.path": name}, typed(nano, path=name, fingerprint=f"f{name}", uri="sqlite:///x.db"))
        for name in names
    ]


def test_a_plan_is_frozen_from_the_root_and_its_names_are_as_typed(nano, home, monkeypatch):
    plan = store(make_plan(grid(nano, "rows", "~/beside"), name="s"), output_dir="out")
    assert [cell.name for cell in plan.cells] == ["data.path=rows", "data.path=~/beside"]
    monkeypatch.chdir(home.parent / "away")
    stored = load(plan_folder(home / "out", name="s") / "plan.json")
    assert stored == plan
    assert paths(stored.cells[0].config) == {f"{home}/rows"}
    assert {cell.config.tracking.uri for cell in stored.cells} == {f"sqlite:///{home}/x.db"}


def test_a_wider_plan_names_earlier_data_as_they_were_typed(nano, home):
    store(make_plan(grid(nano, "rows"), name="s"), output_dir="out")
    store(make_plan(grid(nano, "owner/local"), name="s"), output_dir="out")
    stored = load(plan_folder("out", name="s") / "plan.json")
    assert [cell.name for cell in stored.cells] == ["data.path=rows", "data.path=owner/local"]


def test_a_wider_plan_leaves_absolute_names_absolute(nano, home):
    one, two = f"{home}/rows", f"{home}/owner/local"
    store(make_plan(grid(nano, one), name="s"), output_dir="out")
    store(make_plan(grid(nano, two), name="s"), output_dir="out")
    stored = load(plan_folder("out", name="s") / "plan.json")
    made = make_plan([*grid(nano, one), *grid(nano, two)], name="s")
    assert [cell.name for cell in stored.cells] == [cell.name for cell in made.cells]
    assert "/owner/local" in stored.cells[1].name


# stores -------------------------------------------------------------------------------------------
def tracked(home, nano, *, uri="sqlite:///x.db", old=False):
    """A sweep of one finished run in `out`, of this version or an earlier one."""
    config = replace(nano(), output_dir="out", tracking=TrackingConfig(enabled=True, uri=uri))
    plan = store(make_plan([({}, config)], name="s"), output_dir="out")
    run = RunDir(home / "out" / "runs" / plan.cells[0].run_id)
    run.create(config)
    end_run(run, loss=1.5)
    if old:
        run.config_path.write_text(config_to_json(config))
        path = plan_folder(home / "out", name="s") / "plan.json"
        raw = json.loads(path.read_text())
        raw["cells"][0]["config"]["tracking"]["uri"] = uri
        raw["cells"][0]["config"]["output_dir"] = "out"
        path.write_text(json.dumps(raw))
    return run


def runs_in(uri):
    client = mlflow_store.connect(uri)
    found = client.search_experiments(filter_string="name = 's'")
    return [r.info.run_id for e in found for r in client.search_runs([e.experiment_id])]


@pytest.mark.slow
@pytest.mark.parametrize("old", [False, True])
def test_sync_from_another_folder_goes_to_the_one_database(
    nano, home, migrated, monkeypatch, capsys, old
):
    tracked(home, nano, old=old)
    shutil.copy(migrated, home / "x.db")
    here = bring_up_to_date("out")
    before = runs_in(f"sqlite:///{home}/x.db")
    assert len(before) == 3  # sweep, arm and run
    monkeypatch.chdir(home.parent / "away")
    assert main(["sync", "--output-dir", "../p[1]/out"]) == 0
    assert f"0 created, 0 points sent to sqlite:///{home}/x.db" in capsys.readouterr().out
    assert runs_in(f"sqlite:///{home}/x.db") == before
    assert {one.uri for one in here} == {f"sqlite:///{home}/x.db"}
    assert [p.name for p in home.parent.rglob("*.db")] == ["x.db"]


def test_sync_of_an_old_run_makes_no_second_database(nano, home, monkeypatch, capsys):
    tracked(home, nano, old=True)
    shutil.move(home / "out", home.parent / "moved")
    assert main(["sync", "--output-dir", "../moved"]) == 1
    line = capsys.readouterr().err.strip()
    assert "\n" not in line
    assert line.startswith("tracking: tracking.uri=sqlite:///x.db was written down as it was typed")
    assert not list(home.parent.rglob("*.db"))


@pytest.mark.slow
def test_a_store_that_sync_is_given_is_read_from_this_folder(nano, home, migrated, capsys):
    tracked(home, nano, old=True)
    shutil.copy(migrated, home / "y.db")
    assert main(["sync", "--output-dir", "out", "--tracking-uri", "sqlite:///y.db"]) == 0
    assert f"sent to sqlite:///{home}/y.db" in capsys.readouterr().out
    assert [p.name for p in home.parent.rglob("*.db")] == ["y.db"]


@pytest.mark.slow
def test_a_moved_folder_takes_its_database_along(nano, home, migrated):
    tracked(home, nano, uri=None)
    shutil.copy(migrated, home / "out" / "mlflow.db")
    bring_up_to_date("out")
    before = runs_in(f"sqlite:///{home}/out/mlflow.db")
    assert len(before) == 3
    moved = home.parent / "moved"
    shutil.move(home / "out", moved)
    # In another process: MLflow remembers within one.
    done = warm.run(["-m", "sweeps", "sync", "--output-dir", str(moved)], cwd=ROOT)
    assert "0 created, 0 points" in done.stdout, done.stderr
    assert runs_in(f"sqlite:///{moved}/mlflow.db") == before
    assert [p.parent for p in home.parent.rglob("*.db")] == [moved]
    assert not (home / "out").exists()
    client = mlflow_store.connect(f"sqlite:///{moved}/mlflow.db")
    places = {client.get_run(run).info.artifact_uri.partition("/mlartifacts/")[0] for run in before}
    assert places == {moved.as_uri()}
    assert any(client.list_artifacts(run) for run in before)


def test_the_page_of_an_old_store_that_is_not_there_says_so(nano, home, monkeypatch, capsys):
    tracked(home, nano, old=True)
    monkeypatch.chdir(home.parent / "away")
    assert main(["ui", "--output-dir", str(home / "out"), "--links"]) == 2
    assert "x.db does not exist" in capsys.readouterr().err
    assert not list(home.parent.rglob("*.db"))


# a launcher's Python ------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("python", "right"),
    [
        ("bin/python", "'{home}/bin/python'"),
        ("./bin/python", "'{home}/bin/python'"),
        ("/usr/bin/python3", "/usr/bin/python3"),
        ("python3", "python3"),
        ("bin/none", "bin/none"),
        ("singularity exec --nv image.sif python", "singularity exec --nv image.sif python"),
        (None, None),
    ],
)
def test_a_python_that_is_a_file_is_found_from_anywhere(home, monkeypatch, python, right):
    (home / "bin").mkdir()
    (home / "bin" / "python").touch()
    store_launcher(SlurmLauncher(options=SlurmOptions(python=python)), home)
    monkeypatch.chdir(home.parent / "away")
    assert load_launcher(home).options.python == (right and right.format(home=home))
