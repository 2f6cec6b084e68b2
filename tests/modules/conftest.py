from tests.strategies import one_thread  # noqa: F401
