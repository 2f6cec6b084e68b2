"""Tests inside vLLM: `make test-vllm` runs them, in an environment of its own; elsewhere there are none."""

import importlib.util

import pytest

from tests.vllm.served import Served

collect_ignore_glob = [] if importlib.util.find_spec("vllm") else ["test_*.py"]


@pytest.fixture(scope="session")
def served(tmp_path_factory) -> Served:
    return Served(tmp_path_factory.mktemp("served"))
