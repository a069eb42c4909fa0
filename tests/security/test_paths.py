"""What a plan, a status, a submission, a link or a name says, no command leaves its output folder.

Commands over an output folder that somebody else has written end with one line, or leave alone what
lies elsewhere: they neither write, delete nor print there.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from places import Place

from experiments.disk.output_dir import jobs_folder, run_at
from relora_core.config import ConfigError, RunConfig
from sweeps import job, retention
from sweeps.__main__ import main
from sweeps.planning.grid import check_name, safe_name
from sweeps.planning.plan import load
from sweeps.slurm import cluster
from sweeps.slurm.submission import read_submissions
from tests.conftest import nano_config

COMMANDS = {
    "status": ["status"],
    "gc": ["gc", "--yes", "--keep-latest", "1"],
    "gc snapshots": ["gc", "--yes", "--snapshots"],
    "cancel": ["cancel", "s", "--yes"],
    "retry": ["retry", "s"],
    "report": ["report", "s"],
    "sync": ["sync"],
    "plan": ["plan", "s"],
    "eval": ["eval", "s"],
    "logs": ["logs", "outside"],
}


def ends_well(words: list[str], place: Place, capsys: pytest.CaptureFixture[str]) -> str:
    """Run a command; what it said, in which no line is of the outside nor of a traceback."""
    assert main([*words, "--output-dir", str(place.out)]) == 2
    said = capsys.readouterr()
    assert "private" not in said.out
    assert "Traceback" not in said.err
    return said.out + said.err


@pytest.mark.parametrize(
    "where", ["../../outside", "OUTSIDE", "..", "", "x/../../../outside", "a/b", "a\0b", "x" * 300]
)
@pytest.mark.parametrize("command", COMMANDS)
def test_a_plan_that_names_runs_elsewhere_is_refused(
    command: str, where: str, place: Place, capsys: pytest.CaptureFixture[str]
) -> None:
    place.rename_first(where.replace("OUTSIDE", str(place.outside)))
    before = place.print()
    said = ends_well(COMMANDS[command], place, capsys)
    assert "error: " in said
    assert said.count("\n") == 1
    assert place.print() == before


@pytest.mark.parametrize("name", ["../../outside", "/tmp", "..", ""])
def test_a_plan_by_another_name_than_a_folders_is_refused(name: str, place: Place) -> None:
    place.edit(place.plan, lambda plan: plan.update(name=name))
    with pytest.raises(ConfigError):
        load(place.plan)


@pytest.mark.parametrize("what", ["run", "checkpoints", "checkpoint"])
def test_gc_removes_nothing_behind_a_link(
    what: str, place: Place, capsys: pytest.CaptureFixture[str]
) -> None:
    run, own = place.runs[0], place.runs[1]
    linked = {"run": run.path, "checkpoints": run.checkpoints}.get(
        what, run.checkpoints / "step-00000002"
    )
    target = {"run": place.outside, "checkpoints": place.outside / "checkpoints"}.get(
        what, place.outside / "checkpoints" / "step-00000002"
    )
    linked.rename(place.out / "aside")
    linked.symlink_to(target)
    before = place.print()
    assert main(["gc", "--yes", "--output-dir", str(place.out)]) == 0
    assert place.print() == before
    assert linked.is_symlink()
    assert "is a link" in " ".join(capsys.readouterr().out.split())
    assert [p.name for p in own.checkpoints.iterdir()] == ["step-00000003"]


def test_gc_follows_no_link_inside_a_checkpoint(place: Place) -> None:
    for name in ("model.safetensors", "more"):
        link = place.runs[0].checkpoints / "step-00000001" / name
        link.unlink(missing_ok=True)
        link.symlink_to(place.outside / ("checkpoints" if name == "more" else "config.json"))
    before = place.print()
    assert main(["gc", "--yes", "--output-dir", str(place.out)]) == 0
    assert place.print() == before
    assert not (place.runs[0].checkpoints / "step-00000001").exists()


def test_a_snapshot_behind_a_link_stays(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retention, "SNAPSHOT_AGE_S", -1.0)
    code = place.plan.parent / "code"
    code.mkdir()
    (code / "0123456789abcdef").symlink_to(place.outside)
    assert retention.old_snapshots(place.out, sweep="s", states={}) == []
    code.rename(place.out / "aside")
    code.symlink_to(place.outside)
    assert retention.old_snapshots(place.out, sweep="s", states={}) == []


def test_making_a_tree_removable_changes_no_mode_behind_a_link(tmp_path: Path) -> None:
    secret, tree = tmp_path / "secret", tmp_path / "tree"
    secret.write_text("x")
    secret.chmod(0o400)
    tree.mkdir()
    (tree / "link").symlink_to(secret)
    retention._make_writable(os.unlink, str(tree / "link"), None)
    assert secret.stat().st_mode & 0o777 == 0o400
    assert not (tree / "link").is_symlink()


# SLURM's files ----------------------------------------------------------------------------------
IDS = ["-u root", "--me", "1 2", "1,2", "../../1", "", "12;reboot", "$(id)", "12_x", "\n12"]


@pytest.mark.parametrize("job_id", IDS)
def test_what_is_no_job_id_reaches_no_tool(job_id: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[list[str]] = []
    monkeypatch.setattr(cluster, "ask", lambda command, **_: asked.append([*command]) or "")
    cluster.cancel([job_id, "17_3"])
    cluster.jobs([job_id])
    assert asked == [["scancel", "-Q", "17_3"]]


@pytest.mark.parametrize("kind", ["train", "eval", "search"])
@pytest.mark.parametrize("name", ["../../outside", "OUTSIDE"])
def test_a_submission_that_names_work_elsewhere_is_refused(
    name: str, kind: str, place: Place
) -> None:
    name = name.replace("OUTSIDE", str(place.outside))
    file = jobs_folder(place.out, name="s") / "0" / "submission.json"
    file.parent.mkdir(parents=True)
    raw = {"name": "s.0", "kind": kind, "tasks": [[f"../{name}"]], "signal_delay_s": 1.0}
    file.write_text(json.dumps(raw))
    with pytest.raises(ConfigError):
        job.read(file, index=0)


def test_a_submissions_folder_is_where_it_lies(place: Place) -> None:
    folder = jobs_folder(place.out, name="s")
    (folder / "abc").mkdir(parents=True)
    raw = {"submission": str(place.outside), "name": "x", "state": "submitted", "job_id": "7"}
    (folder / "abc" / "submission.json").write_text(json.dumps(raw))
    assert [one.submission for one in read_submissions(folder)] == ["abc"]


# names ------------------------------------------------------------------------------------------
@given(st.text(min_size=1, max_size=80))
def test_a_sweeps_name_is_one_folder_or_refused(name: str) -> None:
    safe = safe_name(name)
    assert safe == os.path.basename(safe)
    assert not safe.startswith((".", "-"))
    assert safe.isascii()
    if name == safe:
        assert check_name(name) == name
        return
    with pytest.raises(ConfigError) as caught:
        check_name(name)
    assert "\n" not in str(caught.value)


@given(st.text(max_size=40))
def test_a_run_is_directly_in_its_folder_or_refused(run_id: str) -> None:
    if "/" in run_id or "\0" in run_id or run_id in ("", ".", ".."):
        with pytest.raises(ConfigError):
            run_at("out", run_id)
    else:
        assert run_at("out", run_id).path == Path("out", "runs", run_id)


@given(st.text(max_size=30), st.text(max_size=30))
def test_no_knob_moves_a_runs_folder(model: str, kind: str) -> None:
    from experiments.identity import run_id

    config = nano_config()
    config.model.name, config.data.kind = model, kind
    assert os.path.basename(run_id(config)) == run_id(config)
    assert not run_id(config).startswith(".")


@pytest.mark.parametrize("name", ["../x", "a/b", "..", "", "x\0y", "/abs"])
def test_an_evaluation_has_the_name_of_a_folder(
    name: str, place: Place, nano: Callable[..., RunConfig]
) -> None:
    from experiments.run.evaluate import Request, check

    request = Request(name=name, eval=nano().eval, steps="last")
    with pytest.raises(ConfigError, match="--as must be a name"):
        check(place.runs[0], request=request)
