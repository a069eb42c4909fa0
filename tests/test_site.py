"""The documentation as a site: built without a warning, complete, and true to the code."""

import dataclasses
import html
import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

from relora_core.config import RunConfig

ROOT = Path(__file__).resolve().parents[1]
SOURCES = [
    path.read_text(encoding="utf-8")
    for top in ("relora_core", "experiments", "sweeps", "hydra_plugins")
    for path in sorted((ROOT / top).rglob("*.py"))
]


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The built site, a warning being an error."""
    pytest.importorskip("sphinx")
    folder = tmp_path_factory.mktemp("site")
    words = ["-m", "sphinx", "-W", "--keep-going", "-q", "-b", "html", "docs", str(folder)]
    done = subprocess.run(
        [sys.executable, *words, "-d", str(folder / ".doctrees")],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def straight(text: str) -> str:
    return re.sub(r"[`'\u2019]", "", text)


@pytest.mark.slow
def test_every_page_is_in_the_site_and_in_its_contents(site):
    contents = set(re.findall(r'href="([\w/]+)\.html"', (site / "index.html").read_text()))
    pages = {page.stem for page in ROOT.glob("docs/*.md")}
    assert {page for page in pages if not (site / f"{page}.html").is_file()} == set()
    assert pages - contents - {"index"} == set()
    for page in pages - {"index", "benchmarks"}:
        title = (ROOT / "docs" / f"{page}.md").read_text().partition("\n")[0].removeprefix("# ")
        shown = re.search(r"<h1>(.*?)<a ", (site / f"{page}.html").read_text(), flags=re.S)
        assert shown, page
        words = html.unescape(re.sub(r"<[^>]*>", "", shown[1]))
        assert straight(words) == straight(title), page  # no page of Sphinx's has its name


@pytest.mark.slow
def test_the_site_loads_nothing_from_elsewhere(site):
    for page in site.rglob("*.html"):
        loaded = re.findall(
            r'<(?:script|link|img)[^>]*(?:src|href)="(https?:[^"]*)"', page.read_text()
        )
        assert loaded == [], page


@pytest.mark.slow
def test_the_site_has_every_config_key(site):
    text = html.unescape(re.sub(r"<[^>]*>", "", (site / "config.html").read_text()))
    hints = RunConfig.__dataclass_fields__
    for section in hints.values():
        kind = (
            section.default_factory if section.default_factory is not dataclasses.MISSING else None
        )
        names = [f"{section.name}.{f.name}" for f in dataclasses.fields(kind)] if kind else []
        for name in names if dataclasses.is_dataclass(kind) else [section.name]:
            assert re.search(rf"(?<![\w.]){re.escape(name)}(?![\w.])", text), name


@pytest.mark.slow
def test_links_to_files_that_the_site_lacks_are_words(site):
    text = (site / "index.html").read_text()
    assert 'href="config.html"' in text
    assert "relora_core/config.py" in text
    assert not re.search(r'href="[^"]*\.(?:py|yaml|md)"', text)


def load_conf():
    spec = importlib.util.spec_from_file_location("docs_conf", ROOT / "docs" / "conf.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_meaning_of_a_key_is_the_text_below_its_field():
    pytest.importorskip("sphinx")
    conf = load_conf()
    docs = conf.field_docs(conf.knobs.GaLoreConfig, conf.knobs)
    assert docs["scale"].startswith("Factor of a target's update")
    table = conf.table(conf.knobs.GaLoreConfig, prefix="galore.", source=conf.knobs)
    assert "| `galore.update_gap` | `200` | int, ≥ 1 |" in table
    assert "| `galore.moments` | `keep` | `keep`, `reset` |" in table


def test_every_message_of_the_troubleshooting_page_is_in_the_code():
    text = (ROOT / "docs" / "troubleshooting.md").read_text()
    messages = re.findall(r"^\| `([^`]+)` \|", text, flags=re.M)
    assert len(messages) > 15
    system = {"No space left on device"}
    joined = [re.sub(r'"\s*\n\s*f?"', "", source) for source in SOURCES]
    for message in set(messages) - system:
        assert any(message in source for source in joined), message
