"""What has to happen before a process renders."""

from __future__ import annotations

import contextlib

__all__ = ["load_triton_first"]


def load_triton_first() -> None:
    """Load Triton, if it is installed, as it cannot be loaded any more once something was rendered in software.

    Mesa's software driver opens its LLVM to the whole process. Triton brings an LLVM of its own, which then binds to
    that one and crashes; and it is loaded sooner or later, by torch itself when an optimiser is made. In this order
    both work.
    """
    with contextlib.suppress(ImportError):
        import triton  # noqa: F401
