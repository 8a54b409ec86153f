"""Adagrad."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from fastsgd._optimizer import FusedStep

if TYPE_CHECKING:
    from torch import Tensor
    from torch.optim.optimizer import ParamsT
    from typing_extensions import Unpack

    from fastsgd._extras import OnePass


class Adagrad(FusedStep, torch.optim.Adagrad):
    r"""Division by the root of all squares so far: :class:`torch.optim.Adagrad`, faster.

    .. math::
       \begin{aligned}
          g &\leftarrow g + \lambda p \\
          s &\leftarrow s + g^2 \\
          p &\leftarrow p - \frac{\gamma}{1 + (t - 1) \eta} \cdot \frac{g}{\sqrt{s} + \epsilon}
       \end{aligned}

    at a parameter's step :math:`t = 1, 2, \dots`; :math:`s` begins as the initial accumulator
    value. With ``maximize`` the gradient's sign is turned first.

    float32 and float64 parameters get the bits that ``torch.optim.Adagrad(..., foreach=False)``
    gives them, but for its square root, which is not always the nearest number, and ours is.
    bfloat16 and float16 parameters and their states are computed in float32 and rounded once, which
    is nearer the exact step than torch's rounding after every operation.

    Args:
        params: Tensors, ``(name, tensor)`` pairs or parameter groups (dicts), as for
            :class:`torch.optim.Optimizer`. Tensors of any shape, layout and dtype that
            :class:`torch.optim.Adagrad` takes. Sparse gradients take torch's own code.
        lr: Learning rate :math:`\gamma`, at least 0; a number or a tensor of one element.
        lr_decay: Decay :math:`\eta` of the learning rate, at least 0.
        weight_decay: L2 penalty :math:`\lambda`, at least 0; a number or a tensor of one element.
        initial_accumulator_value: What :math:`s` begins as, at least 0.
        eps: Term :math:`\epsilon` of the denominator, at least 0.
        foreach: Accepted as by torch; every value means the fused step.
        maximize: Maximize the objective instead of minimizing it.
        differentiable: Let autograd run through the step, which torch's own code then takes.
        fused: Accepted as by torch; every value means the fused step. As with torch, ``True`` also
            lets :class:`torch.amp.GradScaler` hand its scale to the step.

    State:
        ``step`` (float32 Tensor without dimensions, float64 where that is the default dtype) and
        ``sum`` (Tensor of the parameter's shape and dtype), both made with the optimizer, as in
        torch.

    Raises:
        ValueError: If an option is out of its range, in torch's words.
        KeyError: At a step, before anything is written, if a parameter lacks one of its states.
        RuntimeError: At a step, before anything is written, if a gradient or a state fits no
            parameter (shape, dtype, device), or if memory cannot be written (an inference tensor
            outside inference mode, an expanded parameter).

    Example:
        >>> optimizer = fastsgd.Adagrad(model.parameters(), lr=1e-2)
        >>> optimizer.zero_grad()
        >>> loss_fn(model(input), target).backward()
        >>> optimizer.step()

    Source: :class:`torch.optim.Adagrad`; Duchi et al., "Adaptive subgradient methods for online
    learning and stochastic optimization", JMLR 12, 2011.
    """

    _rule = "adagrad"

    if TYPE_CHECKING:  # for editors and type checkers; the constructor is torch's

        def __init__(
            self,
            params: ParamsT,
            lr: float | Tensor = 1e-2,
            lr_decay: float = 0,
            weight_decay: float = 0,
            initial_accumulator_value: float = 0,
            eps: float = 1e-10,
            foreach: bool | None = None,
            *,
            maximize: bool = False,
            differentiable: bool = False,
            fused: bool | None = None,
            **one_pass: Unpack[OnePass],
        ) -> None:
            """Take torch's arguments, and the options of one pass."""
