"""No override and no YAML file, of whatever origin, makes a command call code that it names.

Shell lines for SLURM jobs (`hydra.launcher.setup`, `teardown`, `python`) are meant to be run, and a
`hydra_plugins` package on Python's path is imported by Hydra: whoever writes those is trusted.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from experiments import schema
from relora_core.config import ConfigError
from tests import warm

ROOT = Path(__file__).resolve().parents[2]
SPAWN = "distutils.spawn.spawn"
"""Hydra's own list of what must not be called does not have it."""
CALL = "{_target_: " + SPAWN + ", cmd: [touch, CANARY]}"
FACTORY = "{version: 1, filters: {x: {(): " + SPAWN + ", cmd: [touch, CANARY]}}}"
FILES = {
    "sweeper": "# @package _global_\nhydra: {sweeper: {params: {x: " + CALL + "}}}\n",
    "arms": "# @package _global_\nhydra: {sweeper: {arms: {a: [" + CALL + "]}}}\n",
    "launcher": "# @package _global_\nhydra: {launcher: " + CALL + "}\n",
    "callbacks": "# @package _global_\nhydra: {callbacks: {x: " + CALL + "}}\n",
    "logging": "# @package _global_\nhydra: {hydra_logging: " + FACTORY + "}\n",
    "job logging": "# @package _global_\nhydra: {job_logging: " + FACTORY + "}\n",
    "log file": "# @package _global_\nhydra: {job_logging: {version: 1, handlers: {x: "
    "{class: logging.FileHandler, filename: CANARY}}, root: {handlers: [x]}}}\n",
    "hidden": "# @package _global_\nhydra:\n  sweeper:\n    params:\n"
    '      x: ${oc.create:"{_target_: ' + SPAWN + ', cmd: [touch, CANARY]}"}\n',
    "elsewhere": "# @package _global_\nx: " + CALL + "\nhydra: {sweeper: {params: {x: '${x}'}}}\n",
    "section": "# @package _global_\ntrain: " + CALL + "\n",
    "top": "# @package _global_\n_target_: " + SPAWN + "\ncmd: [touch, CANARY]\n",
    "python object": "x: !!python/object/apply:os.system ['touch CANARY']\n",
    "bytes": "x: \xff\xfe\n",
}
OVERRIDES = {
    "launcher": [f"hydra.launcher._target_={SPAWN}"],
    "another plugin": ["hydra.sweeper._target_=hydra_plugins.evil.Sweeper"],
    "inside the launcher": [
        "hydra/launcher=slurm",
        f"+hydra.launcher.extra._target_={SPAWN}",
        "+hydra.launcher.extra.cmd=[touch,CANARY]",
    ],
    "callback": [f"+hydra.callbacks.x._target_={SPAWN}", "+hydra.callbacks.x.cmd=[touch,CANARY]"],
    "arguments": ["+hydra.launcher._args_=[1]"],
}


def words(case: str, folder: Path) -> list[str]:
    """Overrides, with the file of that name where it is one of FILES."""
    canary = str(folder / "canary")
    if case in OVERRIDES:
        return [word.replace("CANARY", canary) for word in OVERRIDES[case]]
    (folder / "conf" / "sweep").mkdir(parents=True)
    text = FILES[case].replace("CANARY", canary)
    (folder / "conf" / "sweep" / "evil.yaml").write_bytes(text.encode("latin-1"))
    return [f"hydra.searchpath=[file://{folder}/conf]", "sweep=evil"]


@pytest.mark.parametrize("case", [*FILES, *OVERRIDES])
def test_what_names_code_does_not_compose(case: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        schema.compose(words(case, tmp_path))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "canary").exists()


@pytest.mark.slow
@pytest.mark.parametrize("many", [False, True], ids=["run", "sweep"])
@pytest.mark.parametrize("case", [*FILES, *OVERRIDES])
def test_commands_call_none_of_it_and_say_so_in_one_line(
    case: str, many: bool, tmp_path: Path
) -> None:
    given = [*words(case, tmp_path), f"output_dir={tmp_path}/out", *(["-m", "seed=1"] * many)]
    done = warm.run(["run.py", *given], cwd=ROOT)
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    assert sorted(p.name for p in tmp_path.iterdir() if p.name != "conf") == []


def test_what_this_project_chooses_itself_is_allowed() -> None:
    for launcher in ("local", "slurm"):
        for sweeper in ("relora_grid", "search"):
            chosen = [f"hydra/launcher={launcher}", f"hydra/sweeper={sweeper}"]
            assert schema.compose(chosen).method == "relora"


@pytest.mark.slow
def test_configs_in_the_current_folder_are_not_read(tmp_path: Path) -> None:
    (tmp_path / "conf").mkdir()
    for name in ("config.yaml", "conf/config.yaml", "hydra.yaml"):
        (tmp_path / name).write_text(FILES["callbacks"].replace("CANARY", f"{tmp_path}/canary"))
    package = tmp_path / "hydra_plugins" / "evil"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(f"open({str(tmp_path / 'canary')!r}, 'w')\n")
    words = [str(ROOT / "run.py"), "--plan", "seed=1", f"output_dir={tmp_path}/out"]
    done = subprocess.run(
        [sys.executable, *words], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert not (tmp_path / "canary").exists()
