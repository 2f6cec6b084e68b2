"""A thousand steps of a `KVCache` beside its oracle; `make soak` runs more."""

import pytest
from hypothesis import settings

from tests.stateful.machine import CacheMachine
from tests.strategies import one_thread, small_blocks  # noqa: F401

pytestmark = pytest.mark.usefixtures("one_thread", "small_blocks")

TestCacheMachine = CacheMachine.TestCase
TestCacheMachine.settings = settings(max_examples=20, stateful_step_count=50)
