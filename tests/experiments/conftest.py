"""A database that tests share, since making one takes seconds."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from mlflow_runs import Store


@pytest.fixture(scope="session")
def database(tmp_path_factory: pytest.TempPathFactory, migrated: Path) -> Store:
    folder = tmp_path_factory.mktemp("odd 'dir' 100% é")
    shutil.copy(migrated, folder / "mlflow.db")
    return Store(folder)


@pytest.fixture
def store(database: Store, request: pytest.FixtureRequest) -> Store:
    """The shared database with an experiment of the test's own."""
    database.experiment_id = database.experiment(request.node.name)
    return database
