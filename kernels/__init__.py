"""Triton kernels, one file per op; installed as ``gac_fast.kernels``. They know no model."""
