"""Stochastic gradient descent, with momentum."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from fastsgd._optimizer import FusedStep

if TYPE_CHECKING:
    from torch import Tensor
    from torch.optim.optimizer import ParamsT
    from typing_extensions import Unpack

    from fastsgd._extras import OnePass


class SGD(FusedStep, torch.optim.SGD):
    r"""Stochastic gradient descent, optionally with momentum: :class:`torch.optim.SGD`, faster.

    .. math::
       \begin{aligned}
          g &\leftarrow g + \lambda p \\
          b &\leftarrow \mu b + (1 - \tau) g
              \quad (b \leftarrow g \text{ at a parameter's first step}) \\
          p &\leftarrow p - \gamma (g + \mu b \text{ if nesterov, else } b)
       \end{aligned}

    Without momentum there is no :math:`b`, and :math:`p \leftarrow p - \gamma g`. With ``maximize``
    the gradient's sign is turned first.

    float32 and float64 parameters get the same bits that ``torch.optim.SGD(..., foreach=False)``
    gives them. bfloat16 and float16 parameters are computed in float32 and rounded once, which is
    nearer the exact step than torch's rounding after every operation.

    Args:
        params: Tensors, ``(name, tensor)`` pairs or parameter groups (dicts), as for
            :class:`torch.optim.Optimizer`. Tensors of any shape, layout and dtype that
            :class:`torch.optim.SGD` takes.
        lr: Learning rate :math:`\gamma`, at least 0; a number or a tensor of one element.
        momentum: Momentum factor :math:`\mu`, at least 0.
        dampening: Dampening :math:`\tau` of the gradient in the momentum buffer.
        weight_decay: L2 penalty :math:`\lambda`, at least 0; a number or a tensor of one element.
        nesterov: Use Nesterov momentum; needs a momentum and no dampening.
        maximize: Maximize the objective instead of minimizing it.
        foreach: Accepted as by torch; every value means the fused step.
        differentiable: Let autograd run through the step, which torch's own code then takes.
        fused: Accepted as by torch; every value means the fused step. As with torch, ``True`` also
            lets :class:`torch.amp.GradScaler` hand its scale to the step.

    State:
        ``momentum_buffer`` (Tensor, the parameter's shape and dtype), where momentum is not 0.

    Raises:
        ValueError: If an option is out of its range, in torch's words.
        RuntimeError: At a step, before anything is written, if a gradient or a state fits no
            parameter (shape, device), or memory cannot be written (an inference tensor outside
            inference mode, an expanded parameter).

    Example:
        >>> optimizer = fastsgd.SGD(model.parameters(), lr=0.1, momentum=0.9)
        >>> optimizer.zero_grad()
        >>> loss_fn(model(input), target).backward()
        >>> optimizer.step()

    Source: :class:`torch.optim.SGD`; Sutskever et al., "On the importance of initialization and
    momentum in deep learning", ICML 2013.
    """

    _rule = "sgd"

    if TYPE_CHECKING:  # for editors and type checkers; the constructor is torch's

        def __init__(
            self,
            params: ParamsT,
            lr: float | Tensor = 1e-3,
            momentum: float = 0,
            dampening: float = 0,
            weight_decay: float | Tensor = 0,
            nesterov: bool = False,
            *,
            maximize: bool = False,
            foreach: bool | None = None,
            differentiable: bool = False,
            fused: bool | None = None,
            **one_pass: Unpack[OnePass],
        ) -> None:
            """Take torch's arguments, and the options of one pass."""
