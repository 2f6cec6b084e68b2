import pytest
import torch

from swan.kernels import cpu
from tests.compilers import needs_cxx


@pytest.fixture(scope="module", params=[pytest.param(name, marks=needs_cxx) for name in cpu.variants()])
def cpu_variant(request):
    """Each variant of the kernels that this CPU can run, in turn."""
    cpu.build(request.param)
    torch.compiler.reset()  # the variant is a constant of compiled code
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("SWAN_CPU", request.param)
        yield request.param
