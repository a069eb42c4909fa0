"""MLflow's pages over one store, in a real browser that reaches nothing but this machine.

RELORA_BROWSER=off skips these tests, =require makes a skip a failure. Screenshots go to
RELORA_ARTIFACTS, or build/screenshots.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import psutil
import pytest
from chromium import ARGS, install, program
from records import record_sweep

from sweeps.__main__ import main
from tests import warm

if TYPE_CHECKING:
    from playwright.sync_api import Browser, BrowserContext, Page

ROOT = Path(__file__).resolve().parents[2]
SWEEP = [
    *("-m", "model=nano", "relora.r=4,8", "seed=0,1,2", "sweep.name=ranks"),
    *("train.steps=30", "train.batch_size=4", "data.seq_len=16", "schedule.warmup_steps=5"),
    *("relora.reset_frequency=10", "relora.restart_warmup_steps=2", "checkpoint.every_steps=30"),
    *("eval.paloma.max_documents=1", "eval.paloma.every_steps=10"),
    *("eval.blimp.max_pairs=2", "eval.blimp.every_steps=10"),
    *("runtime.threads=1", "runtime.device=cpu", "runtime.log_every_steps=2"),
]
NOISE = re.compile(
    r"users/current|AG Grid|ResizeObserver loop|GPU stall|GL Driver|WebGL|net::ERR_ABORTED"
)
"""What MLflow's pages say on the console when all is well."""
QUIET = """try {
  localStorage.setItem('mlflow.workflowType_v1', '"machine_learning"');
  localStorage.setItem('mlflow.assistant.fab.autoOpenedOnFirstLoad_v1', 'true');
  localStorage.setItem('mlflow.assistant.panelOpen_v1', 'false');
} catch (error) {}"""
"""A user who has closed MLflow's assistant panel; sandboxed frames have no storage."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:  # the hook sees the other folders' items too
            item.add_marker(pytest.mark.browser)
            item.add_marker(pytest.mark.timeout(1800))  # its waits are long where a machine is slow


@pytest.fixture(scope="module")
def chromium() -> Iterator[Browser]:
    """A browser, or the test is skipped and says why."""
    if reason := install():
        if os.environ.get("RELORA_BROWSER") == "require":
            pytest.fail(f"RELORA_BROWSER=require: {reason}")
        pytest.skip(f"no browser here: {reason}")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=program(), chromium_sandbox=False, args=ARGS
        )
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def store(chromium: Browser, tmp_path_factory: pytest.TempPathFactory, migrated: Path) -> Path:
    """An output folder with a sweep that was trained (2 ranks, 3 seeds) and a wider, made-up one.

    Asks for the browser first: without one nothing need be trained.
    """
    out = tmp_path_factory.mktemp("browser") / "out"
    record_sweep(out, name="wide", ranks=[4, 8, 16, 32], seeds=[0, 1, 2])
    shutil.copy(migrated, out / "mlflow.db")
    done = warm.run(["run.py", *SWEEP, f"output_dir={out}"], cwd=ROOT, figures=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert main(["sync", "--output-dir", str(out)]) == 0
    return out


@dataclass(kw_only=True, slots=True)
class Ui:
    """`python -m sweeps ui`, at work."""

    process: subprocess.Popen[str]
    said: str
    base: str

    def links(self, sweep: str) -> dict[str, str]:
        """Title -> address, as printed below the sweep's name."""
        _, _, after = self.said.partition(f"\nsweep {sweep}\n")
        lines = after.partition("\n\n")[0].splitlines()
        return {line.partition("http")[0].strip(): line.split()[-1] for line in lines}


@pytest.fixture(scope="module")
def ui(store: Path) -> Iterator[Ui]:
    """The UI over the store; it must end on Ctrl-C and leave no process behind."""
    command = [sys.executable, "-m", "sweeps", "ui", "--output-dir", str(store)]
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
        start_new_session=True,
    )
    guard = threading.Timer(300, process.kill)
    guard.start()
    said = ""
    while "Ctrl-C ends it" not in said:
        line = process.stdout.readline()  # type: ignore[union-attr]
        assert line, f"the UI ended: {said}"
        said += line
    guard.cancel()
    base = re.search(r"(http://127\.0\.0\.1:\d+) is up", said)
    assert base, said
    yield Ui(process=process, said=said, base=base[1])
    family = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGINT)
    assert process.wait(120) == 0
    process.stdout.close()  # type: ignore[union-attr]
    assert [child for child in family if child.is_running()] == []


@dataclass(kw_only=True)  # without slots: Playwright hangs its own names on a handler's object
class Window:
    """A browser profile: its pages, and what they did that they should not."""

    context: BrowserContext
    base: str
    folder: Path
    offsite: list[str] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)

    def open(self, url: str) -> Page:
        """A new page at `url`: the UI loses itself on a change of address within one."""
        page = self.context.new_page()
        page.on("console", self._heard)
        page.on("pageerror", lambda error: self._note(str(error)))
        page.goto(url, wait_until="domcontentloaded")
        return page

    def _requested(self, request: object) -> None:
        url = request.url  # type: ignore[attr-defined]
        if not url.startswith((self.base, "blob:", "data:")):
            self.offsite.append(url)

    def _heard(self, message: object) -> None:
        if message.type == "error":  # type: ignore[attr-defined]
            where = message.location.get("url", "")  # type: ignore[attr-defined]
            self._note(f"{message.text} {where}")  # type: ignore[attr-defined]

    def _note(self, text: str) -> None:
        if not NOISE.search(text):
            self.errors.append(text)

    def shoot(self, page: Page, name: str) -> None:
        """Keep a screenshot, once the page has come to rest."""
        page.wait_for_timeout(600)
        page.screenshot(path=self.folder / f"{name}.png")


def _window(chromium: Browser, ui: Ui) -> Window:
    folder = Path(os.environ.get("RELORA_ARTIFACTS") or ROOT / "build" / "screenshots")
    folder.mkdir(parents=True, exist_ok=True)
    context = chromium.new_context(viewport={"width": 1600, "height": 1000})
    context.set_default_timeout(120_000)
    made = Window(context=context, base=ui.base, folder=folder)
    context.on("request", made._requested)
    return made


@pytest.fixture(scope="module")
def used(chromium: Browser, ui: Ui) -> Iterator[Window]:
    made = _window(chromium, ui)
    made.context.add_init_script(QUIET)
    yield made
    made.context.close()


@pytest.fixture
def window(used: Window) -> Iterator[Window]:
    """The browser of someone who has been here before. Afterwards all must be well."""
    used.offsite.clear()
    used.errors.clear()
    yield used
    for page in used.context.pages:
        page.close()
    assert (used.offsite, used.errors) == ([], [])


@pytest.fixture
def fresh_window(chromium: Browser, ui: Ui) -> Iterator[Window]:
    """A browser that has never seen MLflow. Afterwards all must be well."""
    made = _window(chromium, ui)
    yield made
    made.context.close()
    assert (made.offsite, made.errors) == ([], [])


@pytest.fixture(scope="module")
def eventually() -> Callable[..., None]:
    """Asks again until the answer is right, as pages fill bit by bit."""

    def check(ask: Callable[[], object], wanted: object, *, within_s: float = 120.0) -> None:
        until = time.monotonic() + within_s
        while (found := ask()) != wanted and time.monotonic() < until:
            time.sleep(0.2)
        assert found == wanted

    return check
