"""Adam, and AdamW, which decays weights apart from the gradient."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from fastsgd._optimizer import FusedStep

if TYPE_CHECKING:
    from torch import Tensor
    from torch.optim.optimizer import ParamsT
    from typing_extensions import Unpack

    from fastsgd._extras import OnePass


class Adam(FusedStep, torch.optim.Adam):
    r"""Adaptive moment estimation: :class:`torch.optim.Adam`, faster.

    .. math::
       \begin{aligned}
          g &\leftarrow g + \lambda p
              \quad (\text{decoupled: } p \leftarrow (1 - \gamma \lambda) p) \\
          m &\leftarrow \beta_1 m + (1 - \beta_1) g \\
          v &\leftarrow \beta_2 v + (1 - \beta_2) g^2 \\
          x &\leftarrow \max(x, v) \text{ if amsgrad, else } v \\
          p &\leftarrow p - \frac{\gamma}{1 - \beta_1^t}
              \cdot \frac{m}{\sqrt{x} / \sqrt{1 - \beta_2^t} + \epsilon}
       \end{aligned}

    at a parameter's step :math:`t = 1, 2, \dots`; :math:`m`, :math:`v` and :math:`x` begin as 0.
    With ``maximize`` the gradient's sign is turned first.

    float32 and float64 parameters get the bits that ``torch.optim.Adam(..., foreach=False)`` gives
    them, but for its square root, which is not always the nearest number, and ours is. bfloat16 and
    float16 parameters and their states are computed in float32 and rounded once, which is nearer
    the exact step than torch's rounding after every operation.

    Args:
        params: Tensors, ``(name, tensor)`` pairs or parameter groups (dicts), as for
            :class:`torch.optim.Optimizer`. Tensors of any shape, layout and dtype that
            :class:`torch.optim.Adam` takes.
        lr: Learning rate :math:`\gamma`, at least 0; a number or a tensor of one element.
        betas: Decays :math:`\beta_1, \beta_2` of the averages, each in [0, 1); both numbers or both
            tensors of one element. Tensors of another dtype than float32 take torch's own code.
        eps: Term :math:`\epsilon` of the denominator, at least 0.
        weight_decay: L2 penalty :math:`\lambda`, at least 0; a number or a tensor of one element.
        amsgrad: Divide by the largest average of squares so far.
        foreach: Accepted as by torch; every value means the fused step.
        maximize: Maximize the objective instead of minimizing it.
        capturable: Accepted as by torch; on the CPU, where torch refuses it at the step, there is
            nothing to capture, and the step is the same.
        differentiable: Let autograd run through the step, which torch's own code then takes.
        fused: Accepted as by torch; every value means the fused step. As with torch, ``True`` also
            lets :class:`torch.amp.GradScaler` hand its scale to the step.
        decoupled_weight_decay: Decay the weights themselves, as :class:`AdamW` does.

    State:
        ``step`` (float32 Tensor without dimensions, float64 where that is the default dtype),
        ``exp_avg`` and ``exp_avg_sq`` (Tensors of the parameter's shape and dtype), and with
        amsgrad ``max_exp_avg_sq`` (the same).

    Raises:
        ValueError: If an option is out of its range, in torch's words.
        KeyError: At a step, before anything is written, if a parameter lacks one of its states.
        RuntimeError: At a step, before anything is written, if a gradient is sparse, if a gradient
            or a state fits no parameter (shape, dtype, device), or if memory cannot be written (an
            inference tensor outside inference mode, an expanded parameter).

    Example:
        >>> optimizer = fastsgd.Adam(model.parameters(), lr=1e-3)
        >>> optimizer.zero_grad()
        >>> loss_fn(model(input), target).backward()
        >>> optimizer.step()

    Source: :class:`torch.optim.Adam`; Kingma and Ba, "Adam: a method for stochastic optimization",
    ICLR 2015; Reddi et al., "On the convergence of Adam and beyond", ICLR 2018 (amsgrad).
    """

    _rule = "adam"

    if TYPE_CHECKING:  # for editors and type checkers; the constructor is torch's

        def __init__(
            self,
            params: ParamsT,
            lr: float | Tensor = 1e-3,
            betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
            eps: float = 1e-8,
            weight_decay: float = 0,
            amsgrad: bool = False,
            *,
            foreach: bool | None = None,
            maximize: bool = False,
            capturable: bool = False,
            differentiable: bool = False,
            fused: bool | None = None,
            decoupled_weight_decay: bool = False,
            **one_pass: Unpack[OnePass],
        ) -> None:
            """Take torch's arguments, and the options of one pass."""


class AdamW(Adam, torch.optim.AdamW):
    r"""Adam with decoupled weight decay: :class:`torch.optim.AdamW`, faster.

    :class:`Adam` where the weights are decayed apart from the gradient,
    :math:`p \leftarrow (1 - \gamma \lambda) p`, and by 0.01 if nothing else is said. It is a
    :class:`torch.optim.AdamW`, and as there an :class:`Adam`.

    Args:
        params: As for :class:`Adam`.
        lr: As for :class:`Adam`.
        betas: As for :class:`Adam`.
        eps: As for :class:`Adam`.
        weight_decay: Decay :math:`\lambda` of the weights, at least 0; times ``lr`` it is what a
            step takes of them.
        amsgrad: As for :class:`Adam`.
        maximize: As for :class:`Adam`.
        foreach: As for :class:`Adam`.
        capturable: As for :class:`Adam`.
        differentiable: As for :class:`Adam`.
        fused: As for :class:`Adam`.

    State and errors are those of :class:`Adam`.

    Example:
        >>> optimizer = fastsgd.AdamW(model.parameters(), lr=1e-3, weight_decay=0.1)
        >>> optimizer.zero_grad()
        >>> loss_fn(model(input), target).backward()
        >>> optimizer.step()

    Source: :class:`torch.optim.AdamW`; Loshchilov and Hutter, "Decoupled weight decay
    regularization", ICLR 2019.
    """

    _rule = "adam"

    if TYPE_CHECKING:  # for editors and type checkers; the constructor is torch's

        def __init__(
            self,
            params: ParamsT,
            lr: float | Tensor = 1e-3,
            betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
            eps: float = 1e-8,
            weight_decay: float = 1e-2,
            amsgrad: bool = False,
            *,
            maximize: bool = False,
            foreach: bool | None = None,
            capturable: bool = False,
            differentiable: bool = False,
            fused: bool | None = None,
            **one_pass: Unpack[OnePass],
        ) -> None:
            """Take torch's arguments, and the options of one pass."""
