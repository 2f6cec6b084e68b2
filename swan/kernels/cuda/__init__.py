"""The kernels for NVIDIA GPUs: CUDA sources, compiled at run time by NVRTC for the GPU at hand, without nvcc."""

from swan.kernels.cuda.build import compiled, missing
from swan.kernels.cuda.launch import Kernel

__all__ = ["Kernel", "compiled", "missing"]
