"""Timings: swan beside the strongest dense attention."""

from swan.evaluation.bench.capacity import bench_capacity
from swan.evaluation.bench.common import FORMS, SHAPES, Setup, add_speedups
from swan.evaluation.bench.decode import IMPLS, bench_decode, plot_decode
from swan.evaluation.bench.model import bench_model
from swan.evaluation.bench.prefill import bench_prefill
from swan.evaluation.bench.step import bench_step, break_even

__all__ = [
    "FORMS", "IMPLS", "SHAPES", "Setup", "add_speedups", "bench_capacity", "bench_decode", "bench_model",
    "bench_prefill", "bench_step", "break_even", "plot_decode",
]  # fmt: skip
