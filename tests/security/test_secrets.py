"""No password, token or key of the environment, of an address or of a file gets into results.

Names of files that hold them are known (`sweeps.snapshot.SECRETS`): others must be in .gitignore to
stay out of the frozen code. What a user writes into `hydra.launcher.setup` is in the job's script.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from experiments import schema
from experiments.addresses import PASSWORD, check_uri, redacted, with_password
from relora_core.config import ConfigError, TrackingConfig
from sweeps import snapshot
from sweeps.search.config import normalise
from tests import warm

ROOT = Path(__file__).resolve().parents[2]
NAMES = ("HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "WANDB_API_KEY", "MY_PASSWORD", PASSWORD)
NAMES += ("MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_TOKEN", "OPENAI_API_KEY", "SLURM_JWT")
CANARY = "-".join(("canary", "5f0e"))  # this file is in the frozen code
NANO = ("model=nano", "model.vocab_size=null", "train.steps=8", "train.batch_size=4")
NANO += ("data.seq_len=16", "schedule.warmup_steps=2", "relora.reset_frequency=4")
NANO += ("relora.restart_warmup_steps=1", "eval=none", "checkpoint.every_steps=4")


def files_with(folder: Path, word: str) -> list[str]:
    found = [path for path in folder.rglob("*") if path.is_file()]
    assert found
    return [str(path) for path in found if word.encode() in path.read_bytes()]


@pytest.mark.slow
def test_nothing_of_the_environment_is_in_the_files_of_a_sweep(
    tmp_path: Path, migrated: Path
) -> None:
    """One run ends well and one fails; every command that writes comes after.

    The report has its figures where it is asked for by name.
    """
    out = tmp_path / "out"
    out.mkdir()
    shutil.copy(migrated, out / "mlflow.db")
    secrets = {name: f"{CANARY}-{name}" for name in NAMES}
    environment = {**os.environ, **secrets, "OMP_NUM_THREADS": "1"}
    words = ["run.py", "-m", *NANO, "seed=0,1", "train.lr=1e-3", f"output_dir={out}"]
    done = warm.run([*words, "sweep.name=s"], cwd=ROOT, env=environment, figures=False)
    assert done.returncode == 0, done.stderr
    for command in ("sync", "report"):
        more = ["-m", "sweeps", command, "s", "--output-dir", str(out)]
        assert warm.run(more, cwd=ROOT, env=environment).returncode == 0
    broken = next(out.glob("runs/*/checkpoints/step-*/rng.pt"))
    shutil.rmtree(broken.parent.parent)
    broken.parent.parent.write_text("a file where a folder should be")
    (broken.parents[2] / "result.json").unlink()
    again = warm.run([*words, "sweep.name=s"], cwd=ROOT, env=environment, figures=False)
    assert again.returncode == 1
    assert list(out.glob("runs/*/error.txt"))
    assert files_with(out, CANARY) == []


# addresses --------------------------------------------------------------------------------------
ADDRESSES = (
    "postgresql://me:{}@db/x",
    "postgresql+psycopg2://me:{}@db:5432/x?sslmode=require",
    "http://me:{}@host:5000",
    "https://me:{}@host/path",
    "http://me:{}@",
    "mysql://:{}@db/x",
    "postgresql://db/x?user=me&password={}",
)


@pytest.mark.parametrize("address", ADDRESSES)
def test_a_password_in_an_address_is_refused_before_it_is_written(address: str) -> None:
    uri = address.format(CANARY)
    with pytest.raises(ConfigError) as caught:
        check_uri(TrackingConfig(enabled=True, uri=uri))
    with pytest.raises(ConfigError) as second:
        normalise({"objectives": ["train/loss"], "storage": uri}, seed=0)
    for line in map(str, (caught.value, second.value)):
        assert CANARY not in line
        assert "\n" not in line
        assert "***" in line


@given(st.text(st.characters(exclude_characters="'\"", exclude_categories=["Z", "C"]), min_size=1))
def test_no_password_is_told(password: str) -> None:
    for word in (f"x://me:q{password}@host/db", f"before x://me:q{password}@host/db after"):
        assert f"q{password}@" not in redacted(word)
        assert redacted(word).startswith(word[: word.index("q")])
        assert "host/db" in redacted(word)


@pytest.mark.parametrize(
    "uri",
    ["http://host:5000", "http://host:5000/a@b", "postgresql://me@db/x", "sqlite:////a/x:y.db"],
)
def test_addresses_without_a_password_stay_as_they_are(uri: str) -> None:
    assert redacted(uri) == uri


def test_a_database_gets_its_password_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(PASSWORD, "p@ss/w:rd")
    assert with_password("postgresql://me@db/x") == "postgresql://me:p%40ss%2Fw%3Ard@db/x"
    for uri in ("http://me@host", "sqlite:///x.db", "postgresql://db/x", "postgresql://a:b@db/x"):
        assert with_password(uri) == uri
    monkeypatch.delenv(PASSWORD)
    assert with_password("postgresql://me@db/x") == "postgresql://me@db/x"


@pytest.mark.slow
@pytest.mark.parametrize("many", [[], ["-m", "seed=0,1"]])
def test_a_command_with_a_password_writes_nothing(many: list[str], tmp_path: Path) -> None:
    words = [*NANO, *many, f"output_dir={tmp_path}/out", f"tracking.uri=http://me:{CANARY}@h:1"]
    done = warm.run(["run.py", *words], cwd=ROOT)
    assert done.returncode == 2
    assert CANARY not in done.stdout + done.stderr
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()


# code -------------------------------------------------------------------------------------------
HOLDERS = (".env", ".env.local", "deploy.pem", "conf/x.key", ".netrc", "sub/id_rsa", "secrets.yaml")
HOLDERS += (".git-credentials", "credentials/aws", "conf/secrets.yml")


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A project with code, a remote with a token in its address, and files that hold secrets."""
    root = tmp_path / "project"
    for name in ("run.py", "conf/a.yaml", "relora_core/tokens.py", "relora_core/secrets.py"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text("x = 1\n")
    git = ["git", "-C", str(root), "-c", "user.name=a", "-c", "user.email=a@b"]
    subprocess.run([*git, "init", "-q"], check=True)
    remote = f"https://me:{CANARY}@example.org/x.git"
    subprocess.run([*git, "remote", "add", "origin", remote], check=True)
    for name in HOLDERS[::2]:
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_text("old\n")
    subprocess.run([*git, "add", "-A"], check=True)
    subprocess.run([*git, "commit", "-qm", "x"], check=True)
    for name in HOLDERS:
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_text(f"PASSWORD={CANARY}\n")
    (root / "run.py").write_text("x = 2\n")
    (root / "relora_core" / "new.py").write_text("x = 3\n")
    return root


@pytest.mark.parametrize("kind", ["checkout", "no git", "copy"])
def test_frozen_code_and_its_patch_hold_no_secret_files(
    kind: str, checkout: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    if kind == "no git":
        shutil.rmtree(checkout / ".git")
    root = checkout
    if kind == "copy":
        root = snapshot.freeze(tmp_path / "first", output_dir=out, root=checkout)
    copy = snapshot.freeze(out / "code", output_dir=out, root=root)
    code = snapshot.record(out, root=root, output_dir=out)
    assert files_with(out, CANARY) == []
    for name in ("run.py", "relora_core/new.py", "relora_core/tokens.py", "relora_core/secrets.py"):
        assert (copy / name).read_bytes() == (checkout / name).read_bytes()
    if kind == "checkout":
        assert code.untracked == ["relora_core/new.py"]
        patch = (out / "code.diff").read_text()
        assert "+x = 2" in patch
        assert "+x = 3" in patch


def test_a_secret_file_alone_does_not_make_the_code_another(checkout: Path) -> None:
    git = ["git", "-C", str(checkout), "-c", "user.name=a", "-c", "user.email=a@b"]
    subprocess.run([*git, "add", "run.py", "relora_core"], check=True)
    subprocess.run([*git, "commit", "-qm", "y", "run.py", "relora_core"], check=True)
    assert not snapshot.code_state(checkout).dirty


def test_describing_a_run_tells_nothing_of_the_environment(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from experiments.environment import attempt_record

    for name in NAMES:
        monkeypatch.setenv(name, CANARY)
    assert CANARY not in repr(attempt_record()) + repr(schema.compose([]))
