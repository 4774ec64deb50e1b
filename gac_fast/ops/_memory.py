"""What training asks of the C library's allocator."""

from __future__ import annotations

import os

import torch

from gac_fast.ops import _dispatch

__all__ = ["keep_freed_memory"]

ENVIRONMENT_VARIABLE = "GAC_FAST_KEEP_MEMORY"


def keep_freed_memory() -> bool:
    """Let freed blocks of up to 256 MiB stay with the process, up to 1 GiB of them unused.

    By default glibc hands large blocks back to the system, and every update pays for getting them anew, page by page:
    a tenth of its time on one thread, more on two, which wait for one another there. Holds for the whole process.
    Nothing happens without the C++ engine or glibc, or where ``GAC_FAST_KEEP_MEMORY=0`` or a ``MALLOC_`` variable of
    glibc says what the user wants.

    Returns:
        whether it is so now.
    """
    if os.environ.get(ENVIRONMENT_VARIABLE, "1") == "0" or any(name.startswith("MALLOC_") for name in os.environ):
        return False
    if _dispatch.problem("block", "cpp", torch.device("cpu")) is not None:
        return False
    return bool(_dispatch.cpp_engine()._keep_freed_memory())
