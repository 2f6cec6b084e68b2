"""Fused kernels over `Packed`, one file each. Nothing here is imported before it is used."""
