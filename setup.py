"""Puts run.py and conf/ into the wheel's relora_sweeps/. All else is in pyproject.toml.

An editable install needs neither: there they stay where they are.
"""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py


class BuildWithConf(build_py):
    """The packages, with run.py and conf/ beside each other as in a checkout."""

    def run(self) -> None:
        if self.editable_mode:
            return super().run()
        # Modules of an earlier build that have been renamed since would get into the wheel.
        shutil.rmtree(self.build_lib, ignore_errors=True)
        super().run()
        target = Path(self.build_lib) / "relora_sweeps"
        shutil.copytree("conf", target / "conf")
        shutil.copy2("run.py", target / "run.py")


setup(cmdclass={"build_py": BuildWithConf})
