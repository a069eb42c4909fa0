"""Makes the pictures of docs/gallery.md: runs its commands, and copies the files that it names.

    python docs/gallery/make.py FOLDER [SECTION ...]     a quarter of an hour on two cores

Each picture of the page follows a comment with the file that the commands above it write, below
FOLDER. Runs that are there already are not trained again.
"""

import re
import shutil
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]


def main() -> None:
    folder, sections = Path(sys.argv[1]), sys.argv[2:]
    folder.mkdir(parents=True, exist_ok=True)
    for section in (HERE.parent / "gallery.md").read_text().split("\n## ")[1:]:
        title = section.partition("\n")[0]
        if sections and title not in sections:
            continue
        text = section.replace("\\\n", " ")
        for command in re.findall(r"^    python (.*)$", text, flags=re.M):
            words = command.replace("run.py", f"{ROOT}/run.py")
            print(f"{title}: {command}", flush=True)
            subprocess.run(
                f"'{sys.executable}' {words}",
                shell=True,
                check=True,
                cwd=folder,
                env={"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin", "HOME": str(folder)},
            )
        for source, picture in re.findall(r"<!-- (\S+) -->\n!\[[^\]]*\]\((\S+)\)", section):
            shutil.copyfile(folder / source, HERE.parent / picture)


if __name__ == "__main__":
    main()
