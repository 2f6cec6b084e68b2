"""Registers, spills and instructions of the CUDA kernels, held to the table cuda_costs.json."""

import pytest

from swan.kernels.cuda import missing
from tests.kernels import cubin
from tests.kernels.cuda_costs import ARCHS, SOURCES, advised, costs, table

pytestmark = [
    pytest.mark.skipif(missing() is not None, reason=f"{missing()}"),
    pytest.mark.skipif(cubin.disassembler() is None, reason="needs nvdisasm (in Triton's package)"),
]

QUICK = {("attend", "sm_90", name) for name in list(advised())[1::9]} | {
    (source, "sm_90", list(advised())[-12]) for source in ("pages", "pack")
}
CASES = [(source, arch, name) for source in SOURCES for arch in ARCHS for name in advised()]


@pytest.mark.parametrize(
    "case", [pytest.param(case, id=" ".join(case), marks=[] if case in QUICK else pytest.mark.slow) for case in CASES]
)
def test_costs(case):
    """Nothing is spilled; programs fit on a processor as they should, and loops do not grow."""
    source, arch, name = case
    keys, values = advised()[name]
    found, expected = costs(source, keys, values, arch), table()[case]
    assert found.keys() == expected.keys()
    for kernel, row in found.items():
        assert row.stack == row.spilled == 0
        if kernel == "attend":  # four programs of four warps, or two with many coordinates
            assert row.registers <= (128 if keys.d + values.d <= 256 else 255)
        else:
            assert row.registers * 2 * max(keys.d, values.d) <= 65536
        assert row.instructions <= 1.1 * expected[kernel].instructions, f"{kernel}: {row}, was {expected[kernel]}"
        assert row.instructions > 100


def test_the_table_has_all():
    assert set(table()) == set(CASES)
