"""What people and programs look for in a repository's first folder is there, and agrees."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
CITATION = yaml.safe_load((ROOT / "CITATION.cff").read_text())
TEMPLATES = sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml"))


def test_the_licence_is_the_one_that_is_declared():
    assert PROJECT["license"] == CITATION["license"] == "Apache-2.0"
    (name,) = PROJECT["license-files"]
    text = (ROOT / name).read_text()
    assert re.match(r"\s+Apache License\s+Version 2\.0, January 2004\s", text)
    assert "APPENDIX: How to apply the Apache License to your work." in text
    assert "Apache-2.0](LICENSE)" in (ROOT / "CONTRIBUTING.md").read_text()


def test_the_citation_has_what_its_format_asks_for_and_both_papers():
    assert {"cff-version", "message", "title", "authors"} <= set(CITATION)
    assert CITATION["cff-version"] == "1.2.0"
    assert CITATION["version"] == PROJECT["version"]
    papers = CITATION["references"]
    assert [(p["authors"][0]["family-names"], p["year"]) for p in papers] == [
        ("Weiss", 2025),
        ("Lialin", 2023),
    ]
    for paper in papers:
        assert {"type", "title", "authors"} <= set(paper)
        assert paper["doi"].removeprefix("10.48550/arXiv.") == paper["url"].rpartition("/")[2]


def test_the_changelog_is_at_this_version():
    heading = re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), flags=re.M)
    assert heading
    assert heading[1] == PROJECT["version"]


@pytest.mark.parametrize("page", ["CHANGELOG.md", "CONTRIBUTING.md"])
def test_links_of_a_page_lead_somewhere(page):
    targets = re.findall(r"\]\(([^)\s#]+)\)", (ROOT / page).read_text())
    assert [name for name in targets if not (ROOT / name).exists()] == []


def test_hooks_run_commands_of_make_check_and_fetch_nothing():
    makefile = (ROOT / "Makefile").read_text()
    recipe = makefile.partition("\ncheck:")[2].partition("\n\n")[0]
    commands = [line.strip() for line in recipe.splitlines()[1:]]
    for repo in yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]:
        assert repo["repo"] == "local"
        for hook in repo["hooks"]:
            assert hook["language"] == "system"
            assert hook["entry"].replace(".venv/bin", "$(BIN)") in commands


@pytest.mark.parametrize("file", TEMPLATES, ids=lambda file: file.stem)
def test_a_form_for_issues_has_what_github_asks_for(file):
    form = yaml.safe_load(file.read_text())
    assert {"name", "description", "body"} <= set(form)
    ids = [part["id"] for part in form["body"]]
    assert len(set(ids)) == len(ids) > 0
    assert all(part["type"] == "textarea" and part["attributes"]["label"] for part in form["body"])


def test_there_are_two_forms_for_issues():
    assert len(TEMPLATES) == 2


def test_both_images_are_made_of_the_same_files():
    """tests/test_installed.py builds the wheel from the Dockerfile's."""
    docker = (ROOT / "containers" / "Dockerfile").read_text()
    apptainer = (ROOT / "containers" / "relora-sweeps.def").read_text()
    files = apptainer.partition("%files\n")[2].partition("\n\n")[0]
    pairs = [line.split() for line in files.splitlines()]
    assert all(target == f"/src/{name}" for name, target in pairs)
    assert {name for name, _ in pairs} == copied()
    base = re.findall(r"^FROM (\S+)", docker, flags=re.M)
    assert base == re.findall(r"^From: (\S+)", apptainer, flags=re.M)


def test_nothing_tells_users_to_install_a_release_that_is_not_there():
    """The index has none: pip gets the checkout."""
    files = [
        ROOT / "README.md",
        *(ROOT / "docs").rglob("*.md"),
        *(ROOT / "relora_core").rglob("*.py"),
    ]
    for top in ("experiments", "sweeps", "hydra_plugins", "relora_sweeps", "containers", "tests"):
        files += [file for file in (ROOT / top).rglob("*.*") if file.suffix in (".py", ".def")]
    told = re.compile(r"pip install .{0,20}relora[-_]sweeps")
    assert [file.name for file in files if told.search(file.read_text())] == []


def test_the_image_of_a_job_is_shown_by_its_full_path():
    """The job's folder is not the one that the command was typed in."""
    page = (ROOT / "docs" / "slurm.md").read_text()
    images = re.findall(r"hydra\.launcher\.python='[^']* (\S+\.sif) ", page)
    assert [Path(image).is_absolute() for image in images] == [True]


def copied() -> set[str]:
    """What the Dockerfile copies of the checkout."""
    docker = (ROOT / "containers" / "Dockerfile").read_text()
    lines = re.findall(r"^COPY (.+) \S+$", docker, flags=re.M)
    return {name for line in lines for name in line.split()}
