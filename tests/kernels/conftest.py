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
    """Each variant of the kernels that this CPU can run, in turn, on two threads that share the work."""
    cpu.build(request.param)
    torch.compiler.reset()  # the variant is a constant of compiled code
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("SWAN_CPU", request.param)
        yield request.param
    torch.set_num_threads(threads)
