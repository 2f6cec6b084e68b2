from tests.strategies import one_thread, small_blocks  # noqa: F401
