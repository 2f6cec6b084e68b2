import pytest
import torch

from swan.kernels import cpu
from tests.compilers import needs_cxx

# Each has to be compiled first. "generic" is the only one of some CPUs, else `make test-all` runs it.
VARIANTS = [
    pytest.param(
        name, marks=[needs_cxx, *([pytest.mark.slow] if name == "generic" and len(cpu.variants()) > 1 else [])]
    )
    for name in cpu.variants()
]


@pytest.fixture(scope="module", params=VARIANTS)
def cpu_variant(request):
    """Each variant of the kernels that this CPU can run, in turn."""
    cpu.build(request.param)
    torch.compiler.reset()  # the variant is a constant of compiled code
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("SWAN_CPU", request.param)
        yield request.param
