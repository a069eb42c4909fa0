"""A SLURM cluster of the tests' own, started once by the first test that asks for it.

RELORA_SLURM=off skips these tests, RELORA_SLURM=require makes a skip a failure.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from cluster import FOREIGN, Cluster
from slurm_packages import install


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:  # the hook sees the other folders' items too
            item.add_marker(pytest.mark.slurm)
            item.add_marker(pytest.mark.timeout(1800))  # its waits are long where a machine is slow


@pytest.fixture(scope="session")
def slurm() -> None:
    """SLURM's programs are there, or the test is skipped and says why not."""
    if reason := install():
        if os.environ.get("RELORA_SLURM") == "require":
            pytest.fail(f"RELORA_SLURM=require: {reason}")
        pytest.skip(f"no SLURM here: {reason}")


@pytest.fixture(scope="session")
def accounted_session(slurm: None) -> Iterator[Cluster]:
    with Cluster(accounting=True) as cluster:
        yield cluster


@pytest.fixture(scope="session")
def bare_session(slurm: None) -> Iterator[Cluster]:
    with Cluster(accounting=False) as cluster:
        yield cluster


def _lend(cluster: Cluster, patch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    """SLURM's commands of this process speak to this cluster while the test runs."""
    for name in [name for name in os.environ if name.startswith(FOREIGN)]:
        patch.delenv(name)
    for name in ("SLURM_CONF", "PATH"):
        patch.setenv(name, cluster.env[name])
    try:
        yield cluster
    finally:
        cluster.send_user_signal(False)
        cluster.tidy()


@pytest.fixture
def accounted(accounted_session: Cluster, monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    """Two idle nodes, with slurmdbd: sacct answers."""
    yield from _lend(accounted_session, monkeypatch)


@pytest.fixture
def bare(bare_session: Cluster, monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    """Two idle nodes, without accounting: sacct fails."""
    yield from _lend(bare_session, monkeypatch)


@pytest.fixture(params=["accounted", "bare"])
def cluster(request: pytest.FixtureRequest) -> Cluster:
    """The test runs with accounting and without."""
    return request.getfixturevalue(request.param)
