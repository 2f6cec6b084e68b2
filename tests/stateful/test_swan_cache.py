"""A thousand steps of a `SwanCache` beside its oracles; `make soak` runs more."""

import pytest
from hypothesis import settings

from tests.stateful.swan_machine import SwanMachine
from tests.strategies import one_thread, small_blocks  # noqa: F401

pytestmark = [pytest.mark.usefixtures("one_thread", "small_blocks"), pytest.mark.filterwarnings("ignore:the budget of")]

TestSwanMachine = SwanMachine.TestCase
TestSwanMachine.settings = settings(max_examples=20, stateful_step_count=50)
