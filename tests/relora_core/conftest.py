import pytest

from relora_core import native


@pytest.fixture(params=["native", "torch"])
def kernels(request):
    """Both implementations of what `relora_core.kernels` computes on a CPU."""
    if native.choose(request.param) != request.param:
        pytest.skip(f"no native kernels here: {native.problem()}")
    yield request.param
    native.choose("auto")
