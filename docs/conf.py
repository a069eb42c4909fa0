"""The documentation as a site, built by Sphinx: `make docs`. Not for: the pages' text.

README is the first page, and what follows from the code (every config key) is filled in while the
site is built. Imports no torch.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import re
import sys
import textwrap
from collections.abc import Iterator, Set
from pathlib import Path
from types import ModuleType
from typing import Any, get_type_hints

from sphinx.application import Sphinx

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from relora_core import config as knobs  # noqa: E402
from sweeps.search import config as search  # noqa: E402
from sweeps.slurm import options as slurm  # noqa: E402

project = html_title = "ReLoRA Sweeps"
extensions = ["myst_parser"]
html_theme = "furo"
html_show_sphinx = html_show_copyright = False
html_copy_source = False
exclude_patterns = ["_build", "gallery/*.py"]
myst_heading_anchors = 3
myst_links_external_new_tab = False
highlight_language = "none"  # most blocks are command lines with comments of their own

PAGES = {"README.md": "index.md", "benchmarks/README.md": "benchmarks.md"}
"""File of the repository -> page of the site with its text."""
SAME = {"relora_core/config.py": "config.md"}
"""File that a page may link to -> page that says the same."""
CONTENTS = """

```{toctree}
:hidden:
:caption: Using it

Quick start <self>
gallery
concepts
data
SLURM <slurm>
Searching <searching>
Output folder <output>
evaluate
Published checkpoints <published>
troubleshooting
```

```{toctree}
:hidden:
:caption: Science

Four procedures <procedures>
Methods <equations>
metrics
The audit <audit>
The first audit <audit/first>
All methods compared <methods>
```

```{toctree}
:hidden:
:caption: Reference

config
promises
security
benchmarks
```

```{toctree}
:hidden:
:caption: Extending it

architecture
recipes
```
"""


def setup(app: Sphinx) -> None:
    app.connect("source-read", fill)


def fill(app: Sphinx, page: str, source: list[str]) -> None:
    """A page's text: another file's, or its own; links lead to pages of the site."""
    files = {target: file for file, target in PAGES.items()}
    file = files.get(f"{page}.md", f"docs/{page}.md")
    text = (ROOT / file).read_text(encoding="utf-8")
    if page == "config":
        text += config_page()
    text = relinked(text, file)
    source[0] = text + CONTENTS if page == "index" else text


def relinked(text: str, source: str) -> str:
    """`text` of the file `source`, its links leading to pages of the site; a link to a file that
    the site lacks becomes its words."""
    up = "../" * (source.count("/") - 1) if source.startswith("docs/") else ""

    def replace(match: re.Match[str]) -> str:
        words, target = match.groups()
        path, hash_, anchor = target.partition("#")
        if re.match(r"[a-z]+:", target) or not path:
            return match[0]
        file = (ROOT / source).parent.joinpath(path).resolve().relative_to(ROOT).as_posix()
        page = PAGES.get(file) or SAME.get(file)
        if page is None and file.startswith("docs/"):
            page = file.removeprefix("docs/")
        return f"[{words}]({up}{page}{hash_}{anchor})" if page else f"`{words}`"

    return re.sub(r"\[([^\]\[]*)\]\(([^)\s]+)\)", replace, text)


# config keys --------------------------------------------------------------------------------------
def config_page() -> str:
    """Every key of a run, of a SLURM job and of a search: default, bounds, scope, meaning."""
    hints = get_type_hints(knobs.RunConfig)
    sections: dict[str, Any] = {k: v for k, v in hints.items() if dataclasses.is_dataclass(v)}
    parts = ["", table(knobs.RunConfig, prefix="", source=knobs, skip=set(sections))]
    for name, kind in sections.items():
        parts += [f"## {name}", heading(kind), table(kind, prefix=f"{name}.", source=knobs)]
    parts += ["## hydra.launcher, with hydra/launcher=slurm", heading(slurm.SlurmOptions)]
    parts += [table(slurm.SlurmOptions, prefix="hydra.launcher.", source=slurm)]
    parts += ["## search, with hydra/sweeper=search", heading(search.SearchConfig)]
    parts += [table(search.SearchConfig, prefix="search.", source=search)]
    return "\n\n".join(parts) + "\n"


def heading(kind: type) -> str:
    return escape(inspect.cleandoc(kind.__doc__ or ""))


def table(kind: type, *, prefix: str, source: ModuleType, skip: Set[str] = frozenset()) -> str:
    meanings = field_docs(kind, source)
    rows = ["| key | default | values | meaning |", "|---|---|---|---|"]
    for f in dataclasses.fields(kind):
        if f.name in skip:
            continue
        mark = "*" if f.metadata.get("scientific") is False else ""
        meaning = " ".join(filter(None, (meanings.get(f.name, ""), scope(f))))
        cells = [f"`{prefix}{f.name}`{mark}", default(f), values(f), escape(meaning)]
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows)


def default(f: dataclasses.Field[Any]) -> str:
    if f.default is not dataclasses.MISSING:
        value = f.default
    elif f.default_factory is not dataclasses.MISSING:
        value = f.default_factory()
    else:
        return "required"
    words = {None: "null", True: "true", False: "false"}
    text = words[value] if value is None or isinstance(value, bool) else str(value)
    return f"`{text}`" if text else "empty"


def values(f: dataclasses.Field[Any]) -> str:
    """Choices or bounds, else the type."""
    if choices := f.metadata.get("choices"):
        return ", ".join(f"`{choice}`" for choice in choices)
    signs = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<"}
    bounds = [f"{sign} {f.metadata[key]}" for key, sign in signs.items() if key in f.metadata]
    kind = str(f.type).replace(" | None", "")
    return escape(", ".join([kind, *bounds]))


def scope(f: dataclasses.Field[Any]) -> str:
    """What the knob applies to, if not to all runs of its section."""
    words = [
        f"{key}: {', '.join(f.metadata[entry])}"
        for entry, key, _ in knobs.SCOPES
        if entry in f.metadata
    ]
    return f"({'; '.join(words)})" if words else ""


def field_docs(kind: type, source: ModuleType) -> dict[str, str]:
    """Field -> the text that stands below it in the source, of base classes too."""
    docs: dict[str, str] = {}
    for base in reversed(kind.__mro__):
        if base.__module__ == source.__name__:
            docs |= dict(_texts_below_fields(base))
    return docs


def _texts_below_fields(kind: type) -> Iterator[tuple[str, str]]:
    (node,) = ast.parse(textwrap.dedent(inspect.getsource(kind))).body
    assert isinstance(node, ast.ClassDef)
    for one, following in zip(node.body, node.body[1:], strict=False):
        if not (isinstance(one, ast.AnnAssign) and isinstance(one.target, ast.Name)):
            continue
        if isinstance(following, ast.Expr) and isinstance(following.value, ast.Constant):
            yield one.target.id, " ".join(str(following.value.value).split())


def escape(text: str) -> str:
    """For a cell of a table."""
    return text.replace("|", "\\|").replace("<", "&lt;").replace("*", "\\*")
