import os
from collections.abc import Iterator

import pytest
import torch
import torch.utils.deterministic
from hypothesis import HealthCheck, settings

settings.register_profile(
    "ci",
    derandomize=True,
    database=None,
    deadline=None,
    max_examples=25,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.register_profile("deep", settings.get_profile("ci"), derandomize=False, max_examples=500, print_blob=True)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))


@pytest.fixture(autouse=True)
def reproducible_and_nan_filled() -> Iterator[None]:
    """Seed torch; fill uninitialized memory with NaN, so that reading an unwritten slot shows."""
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True, warn_only=True)  # filling is part of this mode
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)
