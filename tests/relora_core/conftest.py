import pytest
from training import Undisturbed

from relora_core import native


@pytest.fixture(params=["native", "torch"])
def kernels(request):
    """Both implementations of what `relora_core.kernels` computes on a CPU."""
    with native.kept():
        if native.choose(request.param) != request.param:
            pytest.skip(f"no native kernels here: {native.problem()}")
        yield request.param


@pytest.fixture
def compiler():
    """Native kernels can be built; what the test chooses is forgotten after it."""
    with native.kept():
        if native.choose("native") != "native":
            pytest.skip(f"no native kernels here: {native.problem()}")
        yield


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """Config -> (record, folder) of a run that nobody ended."""
    return Undisturbed(lambda: tmp_path_factory.mktemp("undisturbed"))
