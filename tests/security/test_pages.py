"""Words from runs stay words in pages; archives are not unpacked; servers are for this host."""

from __future__ import annotations

import argparse
import io
import tarfile
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from experiments.disk.state import RunState
from experiments.disk.states import State
from experiments.report.document import (
    Bullets,
    Code,
    Document,
    Notice,
    Picture,
    Section,
    Table,
    to_html,
)
from experiments.tracking import note as mlflow_note
from relora_core.config import BlimpConfig, ConfigError
from relora_core.evals import blimp
from sweeps.__main__ import build_parser
from sweeps.commands import ui

HOSTILE = (
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "'><svg/onload=alert(1)>",
    "`</code><script>alert(1)</script>`",
    "</style></title></pre><iframe src=javascript:alert(1)>",
    "&lt;script&gt;",
    "```\n<script>alert(1)</script>\n```",
)


class Tags(HTMLParser):
    """The elements of a page, and the attributes that would run something."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.handlers: list[str | None] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.handlers += [k for k, _ in attrs if k.startswith("on")]
        self.handlers += [v for k, v in attrs if k in ("href", "src") and "script:" in (v or "")]


def page(text: str, *, picture: Path) -> str:
    table = Table(name="t", title=text, columns=[text, "b"], rows=[[text, text]], note=text)
    folded = Table(name="f", title=text, columns=[text], rows=[[text]], folded=True)
    drawn = Picture(name="p", title=text, caption=text, svg=picture, png=picture)
    blocks = [text, Code(text), Notice(text), Bullets([text]), table, folded, drawn]
    return to_html(Document(title=text, lead=[text], sections=[Section(title=text, blocks=blocks)]))


@pytest.fixture(scope="module")
def picture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("picture") / "p.svg"
    path.write_text("<svg xmlns='http://www.w3.org/2000/svg'/>")
    return path


@given(
    st.one_of(
        st.sampled_from(HOSTILE), st.text("<>&'\"`/= scriptonload\n", min_size=1, max_size=60)
    )
)
def test_a_report_has_the_elements_that_it_has_with_harmless_words(
    picture: Path, text: str
) -> None:
    found, plain = Tags(page(text, picture=picture)), Tags(page("words", picture=picture))
    code = [tag for tag in found.tags if tag == "code"]
    assert [tag for tag in found.tags if tag != "code"] == [t for t in plain.tags if t != "code"]
    assert len(code) >= plain.tags.count("code")  # `word` in a text is code
    assert found.handlers == []


def note(text: str, *, command: str) -> str:
    state = RunState(run_id="r", state=State.FAILED, reason=text)
    run = SimpleNamespace(run_id="r", name=text, state=state)
    arm = SimpleNamespace(arm_id="a", name=text, runs=[run], finished=0)
    view = SimpleNamespace(
        name="s", question=text, arms=[arm], collapsed=[text], commands=[command]
    )
    assert "<" not in mlflow_note.sentence(cast(Any, view))
    return mlflow_note.note(cast(Any, view), experiment_id="1", output_dir="out", summaries={})


@pytest.mark.parametrize("text", HOSTILE)
def test_a_note_on_mlflows_pages_holds_no_element(text: str) -> None:
    assert "<" not in note(text, command="python run.py")
    assert note("words", command=f"python run.py '{text}'").count("```") == 2


# archives ---------------------------------------------------------------------------------------
def archive(path: Path, members: list[tarfile.TarInfo], *, content: bytes = b"{}\n") -> Path:
    with tarfile.open(path, "w") as file:
        for member in members:
            member.size = len(content) if member.isfile() else 0
            file.addfile(member, io.BytesIO(content) if member.isfile() else None)
    return path


def link(name: str, target: str, kind: bytes) -> tarfile.TarInfo:
    member = tarfile.TarInfo(name)
    member.type, member.linkname = kind, target
    return member


def test_an_archive_is_not_unpacked_and_its_links_lead_nowhere(tmp_path: Path) -> None:
    secret = tmp_path / "secret.jsonl"
    secret.write_text("private\n")
    inside = tmp_path / "in"
    inside.mkdir()
    odd = [tarfile.TarInfo(name) for name in ("../../out.jsonl", "/tmp/out.jsonl", "data/../x")]
    odd += [link("data/a.jsonl", str(secret), tarfile.SYMTYPE)]
    odd += [link("data/b.jsonl", "../../../secret.jsonl", tarfile.LNKTYPE)]
    odd += [link("data/c.jsonl", "", tarfile.FIFOTYPE), link("data/d.jsonl", "", tarfile.CHRTYPE)]
    path = archive(inside / "blimp.tar", odd)
    with pytest.raises(ConfigError) as caught:
        blimp.inspect(BlimpConfig(path=str(path)))
    assert "private" not in str(caught.value)
    assert "\n" not in str(caught.value)
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["blimp.tar", "in", "secret.jsonl"]


def test_an_archive_that_unpacks_to_too_much_is_refused_unread(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "bomb.tar"
    whole = tarfile.TarInfo("data/a.jsonl")
    whole.size = 1 << 40
    path.write_bytes(whole.tobuf() + b"\0" * 10240)
    with pytest.raises(ConfigError, match="bytes unpacked"):
        blimp.inspect(BlimpConfig(path=str(path)))
    monkeypatch.setattr(blimp, "MAX_BYTES", 5)
    many = archive(tmp_path / "many.tar", [tarfile.TarInfo(f"data/{i}.jsonl") for i in range(3)])
    with pytest.raises(ConfigError, match="bytes unpacked"):
        blimp.inspect(BlimpConfig(path=str(many)))


# servers ----------------------------------------------------------------------------------------
def test_pages_are_for_this_machine_unless_asked(capsys: pytest.CaptureFixture[str]) -> None:
    arguments: argparse.Namespace = build_parser().parse_args(["ui"])
    assert arguments.host == "127.0.0.1"
    ui._print_hints("http://0.0.0.0:5000", host="0.0.0.0", port=5000)
    assert "there is no password" in capsys.readouterr().out
