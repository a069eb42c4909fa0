"""What README, docs/ and the packages' docstrings say of files is true, and README stays short."""

import ast
import re
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
CODE = ("relora_core", "experiments", "sweeps", "hydra_plugins", "relora_sweeps")
PACKAGES = sorted(
    file.parent.relative_to(ROOT).as_posix()
    for top in CODE
    for file in (ROOT / top).rglob("__init__.py")
)
PAGES = ["README.md", *sorted(p.relative_to(ROOT).as_posix() for p in ROOT.glob("docs/**/*.md"))]
FOLDERS = (*CODE, "conf", "tests", "docs", "benchmarks")


def text_of(page: str) -> str:
    """A page without its code blocks."""
    text = re.sub(r"^```.*?^```$", "", (ROOT / page).read_text(), flags=re.M | re.S)
    return "\n".join(line for line in text.splitlines() if not line.startswith("    "))


def anchors(page: str) -> set[str]:
    """Where links into a page may lead, as GitHub names its headings."""
    headings = re.findall(r"^#+ (.+)$", text_of(page), flags=re.M)
    return {re.sub(r"[^\w -]", "", h).strip().lower().replace(" ", "-") for h in headings}


@pytest.mark.parametrize("package", PACKAGES)
def test_a_package_names_its_files_and_folders_and_no_others(package):
    folder = ROOT / package
    docstring = ast.get_docstring(ast.parse((folder / "__init__.py").read_text())) or ""
    named = re.findall(r"^ *(\w+(?:\.py|\.cpp|/)) +\S", docstring, flags=re.M)
    there = [p.name for p in folder.iterdir() if p.suffix in (".py", ".cpp")]
    there += [f"{p.parent.name}/" for p in folder.glob("*/__init__.py")]
    there.remove("__init__.py")
    assert Counter(named) == Counter(there)


def test_the_readme_is_short():
    lines = (ROOT / "README.md").read_text().splitlines()
    assert len(lines) <= 200
    prose = [line for line in text_of("README.md").splitlines() if not line.startswith("|")]
    assert [line for line in prose if len(line) > 120] == []


@pytest.mark.parametrize("page", PAGES)
def test_every_link_leads_somewhere(page):
    targets = re.findall(r"\]\(([^)\s]+)\)", text_of(page))
    for target in targets:
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        file = ((ROOT / page).parent / path).resolve() if path else ROOT / page
        assert file.exists(), target
        if anchor:
            assert anchor in anchors(file.relative_to(ROOT).as_posix()), target


@pytest.mark.parametrize("page", PAGES)
def test_every_path_in_a_page_exists(page):
    words = re.findall(r"`([^`\s]+)`", text_of(page))
    paths = [word for word in words if word.split("/")[0] in FOLDERS and "/" in word]
    assert [path for path in paths if "<" not in path and not list(ROOT.glob(path))] == []


def test_every_promise_names_a_test():
    rows = [line for line in text_of("docs/promises.md").splitlines() if line.startswith("| ")]
    promises = [row for row in rows if not row.startswith("| promise |")]
    assert len(promises) > 20
    for row in promises:
        tests = re.findall(r"`(tests/[^`]+)`", row)
        assert tests, row
        for test in tests:
            path = ROOT / test
            assert path.is_file() or (path.is_dir() and any(path.glob("test_*.py"))), test


SOURCES = sorted(path for package in CODE for path in (ROOT / package).rglob("*.py"))


def test_every_file_that_a_docstring_names_exists():
    """`x.py`, with or without its folder."""
    files = [f"/{path.relative_to(ROOT)}" for path in (*SOURCES, *ROOT.glob("*.py"))]
    wrong = []
    for source in SOURCES:
        docstring = ast.get_docstring(ast.parse(source.read_text(encoding="utf-8"))) or ""
        for named in re.findall(r"`([\w/]+\.py)`", docstring):
            if not any(file.endswith(f"/{named}") for file in files):
                wrong.append(f"{source.relative_to(ROOT)}: {named}")
    assert wrong == []
