"""RMSprop, plain or centered, with momentum or without."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from fastsgd._optimizer import FusedStep

if TYPE_CHECKING:
    from torch import Tensor
    from torch.optim.optimizer import ParamsT
    from typing_extensions import Unpack

    from fastsgd._extras import OnePass


class RMSprop(FusedStep, torch.optim.RMSprop):
    r"""Division by a running root mean square: :class:`torch.optim.RMSprop`, faster.

    .. math::
       \begin{aligned}
          g &\leftarrow g + \lambda p \\
          v &\leftarrow \alpha v + (1 - \alpha) g^2 \\
          d &\leftarrow \sqrt{v} + \epsilon
              \quad (\text{centered: } a \leftarrow \alpha a + (1 - \alpha) g, \;
              d \leftarrow \sqrt{v - a^2} + \epsilon) \\
          p &\leftarrow p - \gamma \, g / d
              \quad (\text{momentum: } b \leftarrow \mu b + g / d, \; p \leftarrow p - \gamma b)
       \end{aligned}

    :math:`v`, :math:`a` and :math:`b` begin as 0. With ``maximize`` the gradient's sign is turned
    first.

    float32 and float64 parameters get the bits that ``torch.optim.RMSprop(..., foreach=False)``
    gives them, but for its square root, which is not always the nearest number, and ours is.
    bfloat16 and float16 parameters and their states are computed in float32 and rounded once, which
    is nearer the exact step than torch's rounding after every operation.

    Args:
        params: Tensors, ``(name, tensor)`` pairs or parameter groups (dicts), as for
            :class:`torch.optim.Optimizer`. Tensors of any shape, layout and dtype that
            :class:`torch.optim.RMSprop` takes.
        lr: Learning rate :math:`\gamma`, at least 0; a number or a tensor of one element.
        alpha: Decay :math:`\alpha` of the averages, at least 0.
        eps: Term :math:`\epsilon` of the denominator, at least 0; added after the root.
        weight_decay: L2 penalty :math:`\lambda`, at least 0; a number or a tensor of one element.
        momentum: Momentum factor :math:`\mu`, at least 0.
        centered: Divide by an estimate of the standard deviation.
        capturable: Accepted as by torch; on the CPU, where torch refuses it at the step, there is
            nothing to capture, and the step is the same.
        foreach: Accepted as by torch; every value means the fused step.
        maximize: Maximize the objective instead of minimizing it.
        differentiable: Let autograd run through the step, which torch's own code then takes.

    State:
        ``step`` (float32 Tensor without dimensions, float64 where that is the default dtype),
        ``square_avg``, with momentum ``momentum_buffer``, and if centered ``grad_avg`` (Tensors of
        the parameter's shape and dtype).

    Raises:
        ValueError: If an option is out of its range, in torch's words.
        KeyError: At a step, before anything is written, if a parameter lacks one of its states.
        RuntimeError: At a step, before anything is written, if a gradient is sparse, if a gradient
            or a state fits no parameter (shape, dtype, device), or if memory cannot be written (an
            inference tensor outside inference mode, an expanded parameter).

    Example:
        >>> optimizer = fastsgd.RMSprop(model.parameters(), lr=1e-2, momentum=0.9, centered=True)
        >>> optimizer.zero_grad()
        >>> loss_fn(model(input), target).backward()
        >>> optimizer.step()

    Source: :class:`torch.optim.RMSprop`; Tieleman and Hinton, "Lecture 6.5", COURSERA 2012; Graves,
    "Generating sequences with recurrent neural networks", 2013 (centered).
    """

    _rule = "rmsprop"

    if TYPE_CHECKING:  # for editors and type checkers; the constructor is torch's

        def __init__(
            self,
            params: ParamsT,
            lr: float | Tensor = 1e-2,
            alpha: float = 0.99,
            eps: float = 1e-8,
            weight_decay: float = 0,
            momentum: float = 0,
            centered: bool = False,
            capturable: bool = False,
            foreach: bool | None = None,
            maximize: bool = False,
            differentiable: bool = False,
            **one_pass: Unpack[OnePass],
        ) -> None:
            """Take torch's arguments, and the options of one pass."""
