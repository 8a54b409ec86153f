"""The rows that generic tests walk: optimizers with their options, dtypes, sizes, layouts."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

import fastsgd

devices = ["cpu"]

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
EXACT = (torch.float32, torch.float64)
HALVES = (torch.bfloat16, torch.float16)

# Below, at and above the widths of registers, unrolled loops and small blocks.
SIZES = (1, 2, 3, 5, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 129, 255, 256, 257)
LARGER = (1023, 1024, 1025, 4095, 4097, 16383, 16385, 65535, 65537)
HUGE = 300_001  # several chunks, several threads


@dataclass(frozen=True)
class Row:
    """An optimizer under test.

    Attributes:
        name: The name of both classes.
        ours: The class under test.
        stock: The class that it replaces.
        options: Every combination of options that means something.
        plain: Options that leave no state.
        rich: Options that use every state and every term of the rule.
        states: Names of the states that ``rich`` makes.
        bad: Options that stock refuses.
    """

    name: str
    ours: type
    stock: type
    options: tuple[Mapping[str, Any], ...]
    plain: Mapping[str, Any]
    rich: Mapping[str, Any]
    states: tuple[str, ...]
    bad: tuple[Mapping[str, Any], ...] = field(default=())

    def __repr__(self) -> str:
        """Return the name, for test ids."""
        return self.name


def sgd_options() -> Iterator[dict[str, Any]]:
    """Every combination of SGD's options that its constructor takes."""
    momenta: tuple[dict[str, Any], ...] = (
        {},
        {"dampening": 0.3},
        {"momentum": 0.9},
        {"momentum": 0.9, "dampening": 0.3},
        {"momentum": 0.9, "nesterov": True},
    )
    decays: tuple[dict[str, Any], ...] = ({}, {"weight_decay": 0.1})
    signs: tuple[dict[str, Any], ...] = ({}, {"maximize": True})
    rates: tuple[dict[str, Any], ...] = ({"lr": 0.07}, {"lr": torch.tensor(0.07)})
    for parts in itertools.product(momenta, decays, signs, rates):
        yield {k: v for part in parts for k, v in part.items()}


SGD = Row(
    "SGD",
    fastsgd.SGD,
    torch.optim.SGD,
    options=tuple(sgd_options()),
    plain={"lr": 0.07},
    rich={"lr": 0.07, "momentum": 0.9, "weight_decay": 0.1, "nesterov": True},
    states=("momentum_buffer",),
    bad=(
        {"lr": -0.1},
        {"lr": "0.1"},
        {"lr": torch.tensor([0.1, 0.2])},
        {"lr": torch.tensor(-0.1)},
        {"momentum": -0.5},
        {"momentum": None},
        {"weight_decay": -1},
        {"weight_decay": [0.1]},
        {"nesterov": True},
        {"nesterov": True, "momentum": 0},
        {"nesterov": True, "momentum": 0.9, "dampening": 0.1},
        {"foreach": True, "fused": True},
        {"differentiable": True, "fused": True},
        {"betas": (0.9, 0.999)},
    ),
)

OPTIMIZERS = (SGD,)


def label(options: Mapping[str, Any]) -> str:
    """Return a short test id for options."""
    words = []
    for key, value in options.items():
        words.append(f"{key}=tensor" if isinstance(value, Tensor) else f"{key}={value}")
    return ",".join(words) or "default"


# Every optimizer with every combination of its options.
COMBINATIONS = [(row, options) for row in OPTIMIZERS for options in row.options]
COMBINATION_IDS = [f"{row.name}-{label(options)}" for row, options in COMBINATIONS]


@dataclass(frozen=True)
class Layout:
    """How a parameter and its grad lie in memory.

    Attributes:
        name: Test id.
        size: Elements of the memory that the parameter is a view of.
        param: Takes that memory, returns the view.
        grad: Takes values (contiguous, of the parameter's shape), returns them laid out as a grad.
    """

    name: str
    size: int
    param: Callable[[Tensor], Tensor]
    grad: Callable[[Tensor], Tensor] = lambda values: values

    def __repr__(self) -> str:
        """Return the name, for test ids."""
        return self.name


def strided(order: tuple[int, ...]) -> Callable[[Tensor], Tensor]:
    """Lay values out with the dimensions in ``order`` in memory (the last is the fastest)."""

    def lay(values: Tensor) -> Tensor:
        inverse = [order.index(d) for d in range(len(order))]
        return values.permute(order).contiguous().permute(inverse)

    return lay


def gapped(values: Tensor) -> Tensor:
    """Lay values out with unused memory after each."""
    wide = torch.full((*values.shape, 3), float("nan"), dtype=values.dtype)
    wide[..., 1] = values
    return wide[..., 1]


def shifted(by: int) -> Callable[[Tensor], Tensor]:
    """Lay values out contiguously, ``by`` elements after the start of their storage."""

    def lay(values: Tensor) -> Tensor:
        storage = torch.full((values.numel() + by,), float("nan"), dtype=values.dtype)
        return storage[by:].view(values.shape).copy_(values)

    return lay


def first_expanded(dim: int) -> Callable[[Tensor], Tensor]:
    """Repeat the values at index 0 of ``dim`` with stride 0."""
    return lambda values: values.narrow(dim, 0, 1).clone().expand(values.shape)


def all_expanded(values: Tensor) -> Tensor:
    """Repeat the first value with stride 0 everywhere."""
    return values.flatten()[0].clone().expand(values.shape)


def negated(values: Tensor) -> Tensor:
    """Return the values as a lazy negation of memory that holds their opposites."""
    return torch._neg_view(-values)


def flat(n: int, offset: int = 0) -> Callable[[Tensor], Tensor]:
    """Take ``n`` elements from ``offset``."""
    return lambda memory: memory[offset : offset + n]


LAYOUTS = (
    Layout("zero_dim", 3, lambda m: m[1]),
    Layout("empty", 8, lambda m: m[:0]),
    Layout("empty_3d", 8, lambda m: m[:0].view(3, 0, 2)),
    *(Layout(f"contiguous_{n}", n, flat(n)) for n in SIZES + LARGER),
    *(Layout(f"misaligned_{k}", 200 + k, flat(131, k)) for k in (1, 2, 3, 5, 7, 9, 15)),
    *(Layout(f"grad_misaligned_{k}", 131, flat(131), shifted(k)) for k in (1, 3, 7)),
    Layout("both_misaligned", 140, flat(131, 3), shifted(5)),
    Layout("transposed_param", 35 * 18, lambda m: m.view(35, 18).t()),
    Layout("transposed_grad", 35 * 18, lambda m: m.view(18, 35), strided((1, 0))),
    Layout("transposed_both", 35 * 18, lambda m: m.view(35, 18).t(), strided((1, 0))),
    Layout("transposed_large", 601 * 307, lambda m: m.view(601, 307).t()),
    Layout(
        "channels_last_param",
        4 * 5 * 6 * 7,
        lambda m: m.view(4, 6, 7, 5).permute(0, 3, 1, 2),
    ),
    Layout(
        "channels_last_grad", 4 * 5 * 6 * 7, lambda m: m.view(4, 5, 6, 7), strided((0, 2, 3, 1))
    ),
    Layout(
        "channels_last_both",
        4 * 5 * 6 * 7,
        lambda m: m.view(4, 6, 7, 5).permute(0, 3, 1, 2),
        strided((0, 2, 3, 1)),
    ),
    Layout("permuted_3d", 5 * 6 * 7, lambda m: m.view(5, 6, 7).permute(2, 0, 1)),
    Layout(
        "permuted_differently",
        5 * 6 * 7,
        lambda m: m.view(5, 6, 7).permute(2, 0, 1),
        strided((1, 2, 0)),
    ),
    Layout("five_dims", 2 * 3 * 4 * 5 * 3, lambda m: m.view(3, 2, 5, 4, 3).permute(4, 1, 0, 2, 3)),
    Layout("columns_sliced", 20 * 80, lambda m: m.view(20, 80)[:, :16]),
    Layout("columns_sliced_far", 20 * 80, lambda m: m.view(20, 80)[:, 61:]),
    Layout("columns_sliced_wide", 9 * 4099, lambda m: m.view(9, 4099)[:, 1:4098]),
    Layout("one_column", 50 * 40, lambda m: m.view(50, 40)[:, 7:8]),
    Layout("rows_sliced", 20 * 33, lambda m: m.view(20, 33)[3:11]),
    Layout("every_second", 400, lambda m: m[::2]),
    Layout("every_third_column", 20 * 80, lambda m: m.view(20, 80)[:, 1::3]),
    Layout("slice_transposed", 20 * 80, lambda m: m.view(20, 80)[2:9, 5:40].t()),
    Layout("slice_3d", 6 * 7 * 40, lambda m: m.view(6, 7, 40)[1:5, 2:4, 3:36]),
    Layout("slice_strided_3d", 6 * 7 * 40, lambda m: m.view(6, 7, 40)[::2, 1::3, ::4]),
    Layout(
        "slice_with_transposed_grad", 20 * 80, lambda m: m.view(20, 80)[:, :16], strided((1, 0))
    ),
    Layout("slice_with_gapped_grad", 20 * 80, lambda m: m.view(20, 80)[:, :16], gapped),
    Layout("gapped_grad", 70, lambda m: m.view(10, 7), gapped),
    Layout("odd_strides_of_one", 100, lambda m: m.as_strided((1, 37), (71, 1))),
    Layout("odd_strides_of_one_column", 100, lambda m: m.as_strided((37, 1), (1, 53))),
    Layout("expanded_grad", 20 * 33, lambda m: m.view(20, 33), all_expanded),
    Layout("expanded_grad_rows", 20 * 33, lambda m: m.view(20, 33), first_expanded(0)),
    Layout("expanded_grad_columns", 20 * 33, lambda m: m.view(20, 33), first_expanded(1)),
    Layout(
        "expanded_grad_permuted",
        5 * 7 * 3,
        lambda m: m.view(5, 7, 3),
        lambda values: strided((2, 0, 1))(values[:, :1]).expand(values.shape),
    ),
    Layout("expanded_grad_1d", 1000, flat(1000), all_expanded),
    Layout("slice_with_expanded_grad", 20 * 80, lambda m: m.view(20, 80)[:, :16], all_expanded),
    Layout("negated_grad", 131, flat(131), negated),
    Layout("negated_transposed_grad", 35 * 18, lambda m: m.view(35, 18).t(), negated),
    Layout("huge", HUGE, flat(HUGE)),
    Layout("huge_misaligned", HUGE + 3, flat(HUGE, 3), shifted(1)),
    Layout("huge_slice", 500 * 700, lambda m: m.view(500, 700)[:, 1:690]),
    Layout("huge_short_rows", 150_001 * 4, lambda m: m.view(150_001, 4)[:, 1:]),
    Layout("huge_rows_of_16", 30_001 * 18, lambda m: m.view(30_001, 18)[:, 1:17]),
    Layout("huge_transposed_grad", 503 * 701, lambda m: m.view(503, 701), strided((1, 0))),
    Layout(
        "huge_channels_last_grad",
        211 * 255 * 9,
        lambda m: m.view(211, 255, 3, 3),
        strided((0, 2, 3, 1)),
    ),
)

# Layouts of parameters that a layer of a real model may have, for tests of something else.
ORDINARY_SHAPES = ((33, 17), (17,), (), (0,), (4, 3, 3, 3), (1025,))
