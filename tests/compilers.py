"""Marks of tests that need a C++ compiler: for the kernels for CPUs, or for torch.compile on a CPU."""

import os
import shutil

import pytest

HAS_CXX = shutil.which(os.environ.get("CXX", "c++")) is not None
needs_cxx = pytest.mark.skipif(not HAS_CXX, reason="needs a C++ compiler")
