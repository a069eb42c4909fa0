"""Addresses of tracking stores and databases: checked, made absolute, shown without passwords.

Loads no MLflow. Not for: contacting a store (`tracking/store.py`).
"""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import quote, unquote, urlsplit

from relora_core import shared
from relora_core.config import ConfigError, RunConfig, TrackingConfig, nearest

SCHEMES = ("sqlite", "postgresql", "mysql", "mssql", "http", "https")
DRIVERS = {"postgresql": "psycopg2", "mysql": "MySQLdb", "mssql": "pyodbc"}
"""What SQLAlchemy imports for a dialect where the URI names no driver."""
LOGIN = "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"
PASSWORD = "RELORA_DB_PASSWORD"
"""Environment variable with a database's password: the address itself is written to files."""
LOOPBACK = ("127.0.0.1", "localhost", "::1")


def check_uri(tracking: TrackingConfig, *, recorded: bool = True) -> None:
    """ConfigError if `tracking.uri` cannot be a store. Contacts none.

    `recorded`: it will be written into the records of runs, so it may hold no password.
    """
    uri = tracking.uri
    if not tracking.enabled or uri is None:
        return
    scheme, separator, _ = uri.partition("://")
    dialect, _, driver = scheme.partition("+")
    if recorded:
        check_secret("tracking.uri", uri)
    if not separator or scheme == "file":
        path = re.sub(r"^(file:(//)?|sqlite:/*)", "", uri)
        path = path if path.endswith(".db") else f"{path}/mlflow.db"
        raise ConfigError(
            f"tracking.uri must be a database or a server (MLflow's file store is closed), got "
            f"{uri!r}; nearest valid: sqlite:///{path}"
        )
    if dialect not in SCHEMES:
        raise ConfigError(
            f"tracking.uri must begin with one of {', '.join(s + '://' for s in SCHEMES)}, "
            f"got {redacted(uri)!r}.{nearest(dialect, SCHEMES)}"
        )
    if dialect == "sqlite":
        _check_sqlite(uri)
    elif dialect in ("http", "https") and not urlsplit(uri).hostname:
        raise ConfigError(
            f"tracking.uri must name a host, as in http://127.0.0.1:5000, got {redacted(uri)!r}"
        )
    elif dialect in DRIVERS and not importlib.util.find_spec(driver or DRIVERS[dialect]):
        raise ConfigError(
            f"tracking.uri needs the Python package {driver or DRIVERS[dialect]} for {dialect}, "
            f"which is not installed, got {redacted(uri)!r}"
        )


def check_home(key: str, uri: str) -> None:
    """ConfigError if a database's address begins with `~`, which SQLite does not expand."""
    dialect, sign, name = uri.partition(":///")
    if sign and dialect.startswith("sqlite") and name.startswith("~"):
        path = quote(os.path.expanduser(unquote(name)), safe="/~")
        raise ConfigError(
            f"{key} must be a path from the root, or from here, got {uri!r}; nearest valid: "
            f"{dialect}:///{path}"
        )


def _check_sqlite(uri: str) -> None:
    check_home("tracking.uri", uri)
    path = sqlite_path(uri)
    if path is None:
        raise ConfigError(
            f"tracking.uri must name a database file, as in sqlite:///mlflow.db, got {uri!r}"
        )
    if not path.parent.is_dir():
        raise ConfigError(
            f"tracking.uri must name a file in an existing folder, got {uri!r} and "
            f"{path.parent} does not exist"
        )
    if path.is_dir():
        raise ConfigError(
            f"tracking.uri must name a file, got the folder {path}; nearest valid: "
            f"sqlite:///{path}/mlflow.db"
        )
    if line := read_only(path):
        raise ConfigError(f"tracking.uri must be writable, got {uri!r}: {line}")


def read_only(database: Path) -> str | None:
    """A line if we cannot write to a database, or make files beside it as SQLite does."""
    return shared.find_obstacle(database) or shared.find_obstacle(database.parent)


def rooted(path: Path) -> Path:
    """The absolute path. Symbolic links are kept, unless the path has a `..`."""
    path = path.absolute()
    return path.resolve() if ".." in path.parts else path


def sqlite_path(uri: str) -> Path | None:
    """The absolute path of a sqlite URI's file; None for other stores and databases in memory."""
    if not re.match(r"sqlite(\+\w+)?:///", uri):
        return None
    name = unquote(uri.split(":///", 1)[1].split("?", 1)[0])
    return Path(name).absolute() if name and name != ":memory:" else None


def sqlite_uri(path: Path, *, dialect: str = "sqlite", options: str = "") -> str:
    """The address of a database file.

    SQLAlchemy ends the path at `?` and reads `%20` as a space; MLflow, unless a driver is named,
    makes a folder named as the address spells it, escapes included.
    """
    plain = str(path.absolute())
    quoted = plain.replace("%", "%25").replace("?", "%3F")
    if quoted != plain and dialect == "sqlite":
        dialect = "sqlite+pysqlite"
    return f"{dialect}:///{quoted}{options}"


RELATIVE = re.compile(
    r"(?P<dialect>sqlite(\+\w+)?):///(?P<name>(?!/|file:|:memory:)[^?]+)(?P<options>.*)"
)


def relative_database(uri: str | None) -> bool:
    """Whether the address names a database by a path from the working directory."""
    return uri is not None and RELATIVE.fullmatch(uri) is not None


def located(uri: str, bases: Sequence[Path], *, new: bool = False) -> str:
    """A relative address made absolute, from the first of `bases` that has the database.

    Unchanged if none has it; with `new` the first counts, even so.
    """
    if (match := RELATIVE.fullmatch(uri)) is None:
        return uri
    for path in (rooted(base / unquote(match["name"])) for base in bases):
        if new or path.exists():
            return sqlite_uri(path, dialect=match["dialect"], options=match["options"])
    return uri


def check_given(uri: str) -> str:
    """The absolute form of an address that was given to one command; ConfigError if it is bad."""
    check_uri(TrackingConfig(enabled=True, uri=uri), recorded=False)
    return located(uri, [Path.cwd()], new=True)


def local_folder(place: str) -> Path | None:
    """The local folder that an artifact location names, or None."""
    parts = urlsplit(place)
    if parts.scheme == "file":
        return Path(unquote(parts.path))
    return Path(place) if not parts.scheme and place else None


def redacted(text: str) -> str:
    """`text` without the passwords of addresses in it, of any characters but spaces and quotes."""
    text = re.sub(r"(://[^/@:\s]*):(?!\d+/)[^\s'\"]*@", r"\1:***@", text)
    return re.sub(r"(?i)([?&](?:password|passwd|pwd|\w*token)=)[^\s'\"&]+", r"\1***", text)


def check_secret(key: str, uri: str) -> None:
    """ConfigError where an address that will be written down holds a password."""
    if redacted(uri) == uri:
        return
    web = uri.startswith(("http://", "https://"))
    where = LOGIN if web else PASSWORD
    raise ConfigError(
        f"{key} must hold no password, since it stands in the records of every run, got "
        f"{redacted(uri)!r}; the environment's {where} may hold it"
    )


def with_password(uri: str) -> str:
    """Add $RELORA_DB_PASSWORD to a database's address that has a user but no password."""
    password = os.environ.get(PASSWORD)
    if not password or uri.startswith(("http://", "https://")):
        return uri
    return re.sub(r"(://[^/@:]+)@", lambda m: f"{m[1]}:{quote(password, safe='')}@", uri, count=1)


def default_uri(output_dir: Path | str) -> str:
    """The database in `output_dir`."""
    return sqlite_uri(Path(output_dir) / "mlflow.db")


def misplaced_note(uri: str) -> str | None:
    """A line if an earlier version put this address's database into another folder."""
    path = sqlite_path(uri)
    if path is None or path.exists() or "%" not in str(path):
        return None
    other = Path(os.path.normpath(unquote(str(path))))
    if not other.is_file():
        return None
    return (
        f"an earlier version kept {path} in {other}, which is left as it is; all that is in the "
        "runs' records is shown anew"
    )


def store_uri(config: RunConfig) -> str:
    """The address of the run's store."""
    return config.tracking.uri or default_uri(config.output_dir)


def experiment_name(config: RunConfig) -> str:
    """The name of the run's MLflow experiment."""
    return config.tracking.experiment or config.sweep.name or config.experiment


def ui_command(output_dir: Path | str, *, sweep: str | None = None) -> str:
    """The shell command that shows a sweep, or everything below `output_dir`, in a browser."""
    words = ["python", "-m", "sweeps", "ui", *([sweep] if sweep else [])]
    if Path(output_dir) != Path("outputs"):
        words += ["--output-dir", str(output_dir)]
    return shlex.join(words)
