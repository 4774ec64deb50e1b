"""Ops of an engine without torch's dispatcher, where nobody looks on.

Through it and the wrapping of torch.library a call takes 0.1 to 0.3 ms longer; an update makes 60, and on two threads
with bfloat16 they were a twelfth of it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

__all__ = ["function", "unseen", "unseen_backward"]

_PLAIN = (Tensor, torch.nn.Parameter)


def unseen(x: Tensor) -> bool:
    """Whether an op of ``x`` may run as a plain function: no compiler, mode or functional transform listens."""
    return (
        type(x) in _PLAIN
        and not torch.compiler.is_compiling()
        and torch._C._len_torch_dispatch_stack() == 0
        and not torch._C._are_functorch_transforms_active()
    )


def unseen_backward(gradient: Tensor) -> bool:
    """The same for a backward op. Where that is to be differentiated in turn, the registered op says that it cannot."""
    return not torch.is_grad_enabled() and unseen(gradient)


def function(
    forward: Callable[..., Any], save: Callable[..., None], differentiate: Callable[..., tuple[Any, ...]]
) -> Callable[..., Any]:
    """The forward of an op as a function of its own, with the autograd formula that its op has.

    Args:
        forward, save, differentiate: the op's function, and what its ``register_autograd`` got. Of their arguments only
            tensors, not lists of them, get gradients.
    """

    class Direct(torch.autograd.Function):
        # Not in the newer form with setup_context, which looks up the signature at every call.
        @staticmethod
        def forward(ctx: Any, *inputs: Any) -> Any:
            output = forward(*inputs)
            save(ctx, inputs, output)
            return output

        @staticmethod
        def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
            return differentiate(ctx, *grads)

    return Direct.apply
