"""What `make release-check` looks for; the build itself needs the network and is not run here."""

import re

import pytest

from tests import release

PACKAGE = ["swan/__init__.py", "swan/kernels/cuda/attend.cu", "swan/kernels/cuda/mix.cuh", "swan/kernels/cpu/common.h"]
WHOLE = [*PACKAGE, "LICENSE", "swan_attention-1.dist-info/METADATA"]


def test_a_whole_archive_has_no_faults():
    assert release.faults(WHOLE, PACKAGE) == []


@pytest.mark.parametrize("absent", ["LICENSE", *PACKAGE[1:]])
def test_what_an_archive_lacks_is_named(absent):
    assert release.faults([name for name in WHOLE if name != absent], PACKAGE) == [f"{absent} is missing"]


@pytest.mark.parametrize("foreign", ["tests/test_import.py", "benchmarks/gpu.sh", "swan/__pycache__/a.pyc"])
def test_what_should_not_be_in_an_archive_is_named(foreign):
    assert release.faults([*WHOLE, foreign], PACKAGE) == [f"{foreign} should not be there"]


def test_the_oldest_versions_of_make_are_those_of_pyproject():
    oldest = re.search(r"^OLDEST := ([^#]*)", (release.ROOT / "Makefile").read_text(), re.MULTILINE)[1].split()
    assert oldest == release.lowest(["transformers", "einops", "numpy", "safetensors"])
