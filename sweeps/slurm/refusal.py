"""Why SLURM refuses a job, and what it would grant.

Not for: the launcher's own checks (`options.py`), nor asking about jobs (`cluster.py`).
"""

from __future__ import annotations

import dataclasses
import getpass
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from relora_core.config import ConfigError, nearest
from sweeps.slurm.cluster import SPAN, SlurmError, ask, sinfo, to_seconds

ASKED = re.compile(
    "account|qos|nodes|ntasks.*|cpus-per-task|mem.*|gpus.*|gres|time|constraint|reservation|"
    "licenses|dependency|array|partition|mail-type"
)
"""Options for which SLURM may refuse a job."""


def test(script: Path) -> None:
    """ConfigError if SLURM would refuse this job, with the reason in one line; queues nothing."""
    asked = directives(script.read_text(encoding="utf-8"))
    try:
        ask(["sbatch", "--test-only", str(script)])
    except SlurmError as error:
        if error.passing:
            raise
        raise ConfigError(_refusal(str(error), asked=asked)) from None


def directives(script: str) -> dict[str, str]:
    """The `#SBATCH --option=value` lines of a job's script."""
    lines = re.findall(r"^#SBATCH\s+--([\w-]+)(?:[= ](.*))?$", script, re.M)
    return {option: value.strip() for option, value in lines}


def _refusal(message: str, *, asked: dict[str, str]) -> str:
    """SLURM's reason as it gives it, then what it would grant, as far as its tools can tell."""
    partition = asked.get("partition", "")
    try:
        names = partitions()
        if partition and not set(partition.split(",")) <= set(names):
            return (
                f"hydra.launcher.partition must be one of {', '.join(names)}, got {partition!r}."
                + nearest(partition, names)
            )
        nodes = _nodes(partition)
    except SlurmError:  # then without hints: SLURM's reason is what counts
        nodes = []
    hints = _largest_values(nodes, asked=asked)
    hints += _nearest_names(message, asked=asked, nodes=nodes)
    options = [f"{key}={value}" for key, value in asked.items() if ASKED.fullmatch(key)]
    line = (
        f"hydra.launcher must ask for what SLURM can give, got "
        f"{', '.join(options) or 'its defaults'}: {message}"
    )
    if hints:
        line += f"; nearest valid: {', '.join(hints)}"
    counts: dict[_Nodes, int] = {}
    for one in nodes:
        kind = dataclasses.replace(one, count=0, features=frozenset())
        counts[kind] = counts.get(kind, 0) + one.count
    sums = [dataclasses.replace(kind, count=count) for kind, count in counts.items()]
    return "; ".join([line, *map(str, sums[:4])])


def partitions() -> list[str]:
    """Every partition's name."""
    return sorted(set(ask(["sinfo", "-h", "-a", "-o", "%R"]).split()))


@dataclass(kw_only=True, slots=True, frozen=True)
class _Nodes:
    """Nodes of one kind in a partition, as sinfo sums them up."""

    partition: str
    count: int
    cpus: int
    memory_mb: int
    gres: str
    limit: str
    features: frozenset[str]

    @property
    def gpus(self) -> int:
        return sum(int(n) for n in re.findall(r"(?:^|,)gpu(?::[\w.-]+)*?:(\d+)", self.gres))

    def __str__(self) -> str:
        gpus = f", {self.gres}" if self.gres else ""
        return (
            f"{self.partition} has {self.count} node{'s' * (self.count > 1)} of {self.cpus} CPUs, "
            f"{self.memory_mb} MB{gpus}, time <= {self.limit}"
        )


def _nodes(partition: str) -> list[_Nodes]:
    """The nodes of these partitions, by kind."""
    kinds = []
    for row in ask(sinfo(partition, "%R|%D|%c|%m|%G|%l|%f")).splitlines():
        name, *numbers, gres, limit, features = row.split("|")
        count, cpus, memory = (int(re.sub(r"\D.*", "", n) or 0) for n in numbers)  # `16+`
        kinds.append(
            _Nodes(
                partition=name,
                count=count,
                cpus=cpus,
                memory_mb=memory,
                gres="" if gres == "(null)" else gres,
                limit=limit.strip(),
                features=frozenset() if features == "(null)" else frozenset(features.split(",")),
            )
        )
    return kinds


def _largest_values(nodes: Sequence[_Nodes], *, asked: dict[str, str]) -> list[str]:
    """For each option that asks for more than there is, the largest valid value."""
    if not nodes:
        return []

    def number(key: str) -> int:
        match = re.match(r"\d+", asked.get(key, ""))
        return int(match[0]) if match else 0

    hints = []
    by_partition: dict[str, int] = {}
    for one in nodes:
        by_partition[one.partition] = by_partition.get(one.partition, 0) + one.count
    if number("nodes") > (most := max(by_partition.values())):
        hints.append(f"nodes={most}")
    if number("gpus-per-node") > (most := max(one.gpus for one in nodes)):
        hints.append(f"gpus_per_node={most}")
    tasks = max(1, number("ntasks-per-node"))
    if tasks * number("cpus-per-task") > (most := max(one.cpus for one in nodes)):
        each = most // tasks
        hints.append(f"cpus_per_task={each}" if each else f"tasks_per_node={most}")
    if number("mem") > (most := max(one.memory_mb for one in nodes)):
        hints.append(f"mem_gb={most / 1024:.4g}" if most % 1024 else f"mem_gb={most // 1024}")
    limits = [one.limit for one in nodes]
    if all(SPAN.fullmatch(limit) for limit in limits):
        limit = max(limits, key=to_seconds)
        if number("time") * 60 > to_seconds(limit):
            hints.append(f"time={limit}")
    return hints


def _nearest_names(message: str, *, asked: dict[str, str], nodes: Sequence[_Nodes]) -> list[str]:
    """For each name that SLURM does not know, the site's nearest one."""
    features = sorted({feature for one in nodes for feature in one.features})
    # Of a feature that only other nodes have SLURM says what it says of any nodes that are lacking.
    single = re.fullmatch(r"[\w.-]+", asked.get("constraint", ""))
    candidates: dict[str, tuple[str, Sequence[str]]] = {
        "constraint": ("" if single else "feature|constraint", features)
    }
    if re.search(r"account|qos", message, re.IGNORECASE):
        accounts, qos = _associations()
        candidates |= {"account": ("account", accounts), "qos": ("qos|quality", qos)}
    if "reservation" in asked:
        names = sorted(_show("reservation", "ReservationName"))
        candidates["reservation"] = ("reservation", names)
    hints = []
    for key, (pattern, names) in candidates.items():
        value = asked.get(key, "")
        missing = value not in names and (value or key != "constraint")
        if names and missing and re.search(pattern, message, re.IGNORECASE):
            near = re.findall(r"'(.*?)'", nearest(value, list(names)))
            hints.append(f"{key}={near[0]}" if near else f"{key} one of {', '.join(names[:8])}")
    if re.search(r"licen[cs]e", message, re.IGNORECASE):
        hints += _licenses(asked.get("licenses", ""))
    return hints


def _licenses(asked: str) -> list[str]:
    """The nearest valid option: names and counts of `name:count,...` corrected."""
    licences = _show("licenses", "LicenseName")
    if not licences:
        return []
    corrected = []
    for part in asked.split(","):
        name, colon, count = part.partition(":")
        near = re.findall(r"'(.*?)'", nearest(name, list(licences)))
        if name not in licences and not near:
            return [f"licenses one of {', '.join(sorted(licences)[:8])}"]
        name = name if name in licences else near[0]
        total = re.search(r"\bTotal=(\d+)", licences[name])
        if count.isdecimal() and total and int(count) > int(total[1]):
            count = total[1]
        corrected.append(f"{name}{colon}{count}")
    return [f"licenses={','.join(corrected)}"]


def _associations() -> tuple[list[str], list[str]]:
    """Accounts and QOS that this user may use; none if sacctmgr does not answer."""
    who = [f"user={getpass.getuser()}", "format=account,qos"]
    try:
        rows = ask(["sacctmgr", "-nP", "show", "assoc", "where", *who], tries=1).splitlines()
    except (SlurmError, KeyError, OSError):
        return [], []
    cells = [row.split("|", 1) for row in rows if "|" in row]
    accounts = sorted({account for account, _ in cells if account})
    return accounts, sorted({q for _, all_ in cells for q in all_.split(",") if q})


def _show(what: str, key: str) -> dict[str, str]:
    """Name -> its line of `scontrol show`; empty if that does not answer."""
    try:
        answer = ask(["scontrol", "-o", "show", what], tries=1)
    except SlurmError:
        return {}
    return {m[1]: line for line in answer.splitlines() if (m := re.search(rf"{key}=(\S+)", line))}
