"""Small rows of every optimizer and exact square roots, until ``cases`` and ``oracle`` have both.

What imports them says ``from cases import OPTIMIZERS as ROWS`` and ``from oracle import
exact_roots`` then, and this file goes.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy
import torch
from cases import SGD, Row
from torch import Tensor

import fastsgd


def _row(name: str, states: tuple[str, ...], **rich: object) -> Row:
    ours, stock = getattr(fastsgd, name), getattr(torch.optim, name)
    rich = {"lr": 0.07, "weight_decay": 0.1, **rich}
    return Row(name, ours, stock, ({"lr": 0.07}, rich), {"lr": 0.07}, rich, states)


ADAM_STATES = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")
ROWS = (
    SGD,
    _row("Adam", ADAM_STATES, amsgrad=True),
    _row("AdamW", ADAM_STATES, amsgrad=True),
    _row("RMSprop", ("square_avg", "momentum_buffer", "grad_avg"), momentum=0.9, centered=True),
    _row("Adagrad", ("sum",), lr_decay=0.1, initial_accumulator_value=0.3),
)
ROOT = Tensor.sqrt


def _exact(x: Tensor) -> Tensor:
    if type(x) is not Tensor or x.requires_grad or torch.compiler.is_compiling():
        return ROOT(x)
    if x.dtype == torch.float32:
        return ROOT(x.double()).float()
    if x.dtype == torch.float64:
        return torch.from_numpy(numpy.sqrt(x.numpy(), out=numpy.empty_like(x.numpy())))
    return ROOT(x)


@contextmanager
def exact_roots() -> Iterator[None]:
    """Let torch round square roots to the nearest, as processors do."""
    Tensor.sqrt = _exact  # type: ignore[method-assign]
    Tensor.sqrt_ = lambda x: x.copy_(_exact(x))  # type: ignore[method-assign]
    try:
        yield
    finally:
        del Tensor.sqrt, Tensor.sqrt_
