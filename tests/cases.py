"""The rows that generic tests walk: optimizers with their options, dtypes, sizes, layouts."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

import fastsgd

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
EXACT = (torch.float32, torch.float64)
HALVES = (torch.bfloat16, torch.float16)

# Below, at and above the widths of registers, unrolled loops and small blocks.
SIZES = (1, 2, 3, 5, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 129, 255, 256, 257)
LARGER = (1023, 1024, 1025, 4095, 4097, 16383, 16385, 65535, 65537)
HUGE = 300_001  # several chunks, several threads


Options = Mapping[str, Any]


@dataclass(frozen=True)
class Row:
    """An optimizer under test.

    Attributes:
        name: The name of both classes.
        ours: The class under test.
        stock: The class that it replaces.
        options: Every combination of options that means something, and that the kernels take.
            Each must move a bfloat16 parameter within a few steps.
        plain: Options that leave the fewest states.
        rich: Options that use every state and every term of the rule, as soon as in the first
            steps: most tests take no more. Numbers, and what ``plain`` has too.
        states: Names of the states of the parameter's shape that ``rich`` makes.
        plain_states: Names of those that ``plain`` makes.
        structures: Options for each set of states there is, ``plain`` first and ``rich`` last.
        structural: Names of the options that decide which states there are.
        bad: Options that stock refuses.
        edits: Changes to a group's options between steps, in this order; the first follow on
            ``rich`` where the rule counts, else on ``plain``.
        counts: There is a state ``step``. Where it counts a parameter's steps, all states are made
            at once, or stock misses one.
        eager: The states are made with the optimizer.
        sparse: Options with which stock takes sparse grads.
        sparse_error: What stock says of a sparse grad where it takes none.
        squares: The rule squares grads, in single precision for half types.
        takes_overlap: Stock steps a parameter whose grad lies in a part of its memory, as it reads
            the grad only before it writes the parameter.
    """

    name: str
    ours: type
    stock: type
    options: tuple[Options, ...]
    plain: Options
    rich: Options
    states: tuple[str, ...]
    plain_states: tuple[str, ...] = ()
    structures: tuple[Options, ...] = ()
    structural: tuple[str, ...] = ()
    bad: tuple[Options, ...] = ()
    edits: tuple[Options, ...] = ()
    counts: bool = True
    eager: bool = False
    sparse: tuple[Options, ...] = ()
    sparse_error: str = ""
    squares: bool = True
    takes_overlap: bool = False

    def __repr__(self) -> str:
        """Return the name, for test ids."""
        return self.name

    def takes(self, *names: str) -> bool:
        """Whether the constructor has these options."""
        return set(names) <= inspect.signature(self.stock).parameters.keys()

    @property
    def middle(self) -> Options:
        """Options between ``plain`` and ``rich``, where there are any."""
        return self.structures[len(self.structures) // 2]

    @property
    def fused(self) -> dict[str, Any]:
        """The flag ``fused``, where there is one."""
        return {"fused": True} if self.takes("fused") else {}

    @property
    def off(self) -> dict[str, Any]:
        """Changes that make ``plain`` of ``rich`` in a group."""
        return {key: type(value)(self.plain.get(key, 0)) for key, value in self.rich.items()}

    def derived(self, derive: Callable[[type], type]) -> Row:
        """Return the row of two classes that ``derive`` makes of these."""
        return replace(self, ours=derive(self.ours), stock=derive(self.stock))


Choices = tuple[Options, ...]
SIGNS: Choices = ({}, {"maximize": True})
DECAYS: Choices = ({}, {"weight_decay": 0.1})
RATES: Choices = ({"lr": 0.07}, {"lr": torch.tensor(0.07)})
# What every constructor refuses.
BAD: Choices = (
    {"lr": -0.1},
    {"lr": "0.1"},
    {"lr": torch.tensor([0.1, 0.2])},
    {"lr": torch.tensor(-0.1)},
    {"weight_decay": -1},
    {"weight_decay": [0.1]},
    {"nonsense": 1},
)
FUSED: Choices = ({"foreach": True, "fused": True}, {"differentiable": True, "fused": True})
# What may be done to the options of a group of every optimizer.
EDITS: Choices = (
    {"weight_decay": 0.1},
    {"maximize": True},
    {"maximize": False, "lr": 1},
    {"lr": 0.1, "maximize": 0},
    {"weight_decay": torch.tensor(0.2)},
    {"lr": torch.tensor([0.05]), "weight_decay": 0},
    {"lr": torch.tensor(0.05, dtype=torch.float64), "weight_decay": 0.3},
    {"weight_decay": -0.1, "lr": -0.01},
    {"lr": 0.02, "weight_decay": 0.0, "foreach": True, "fused": False},
    {"foreach": None, "fused": None, "unknown": "kept"},
)


def product(*choices: Choices) -> Iterator[dict[str, Any]]:
    """Every combination of one choice of each."""
    for parts in itertools.product(*choices):
        yield {k: v for part in parts for k, v in part.items()}


SGD = Row(
    "SGD",
    fastsgd.SGD,
    torch.optim.SGD,
    options=tuple(
        product(
            (
                {},
                {"dampening": 0.3},
                {"momentum": 0.9},
                {"momentum": 0.9, "dampening": 0.3},
                {"momentum": 0.9, "nesterov": True},
            ),
            DECAYS,
            SIGNS,
            RATES,
        )
    ),
    plain={"lr": 0.07},
    rich={"lr": 0.07, "momentum": 0.9, "weight_decay": 0.1, "nesterov": True},
    states=("momentum_buffer",),
    structures=(
        {"lr": 0.07},
        {"lr": 0.07, "momentum": 0.9, "dampening": 0.3},
        {"lr": 0.07, "momentum": 0.9, "weight_decay": 0.1, "nesterov": True},
    ),
    structural=("momentum",),
    bad=(
        *BAD,
        *FUSED,
        {"momentum": -0.5},
        {"momentum": None},
        {"nesterov": True},
        {"nesterov": True, "momentum": 0},
        {"nesterov": True, "momentum": 0.9, "dampening": 0.1},
        {"betas": (0.9, 0.999)},
    ),
    edits=(
        {"momentum": 0.9},
        {"nesterov": True},
        {"nesterov": False, "dampening": 0.2},
        {"momentum": 0.0},
        {"momentum": 0.5, "maximize": False},
        {"lr": 1, "momentum": True, "dampening": 0},
        {"lr": 0.1, "nesterov": 1, "momentum": 0.7, "maximize": 0},
        {"momentum": torch.tensor(0.6), "weight_decay": torch.tensor(0.2)},
        {"momentum": torch.tensor(0.6, dtype=torch.float64), "dampening": torch.tensor(0.1)},
        {"lr": torch.tensor([0.05]), "momentum": 0.9, "dampening": 2.0, "nesterov": True},
        {"momentum": -0.5, "weight_decay": -0.1, "lr": -0.01},
        *EDITS,
    ),
    counts=False,
    sparse=(
        {"lr": 0.07},
        {"lr": 0.1, "momentum": 0.9},
        {"lr": 0.1, "momentum": 0.9, "nesterov": True},
        {"lr": 0.1, "maximize": True},
    ),
    squares=False,
)


def tensors(*values: float) -> tuple[Tensor, ...]:
    """Return a float32 tensor for each."""
    return tuple(torch.tensor(value) for value in values)


AMSGRAD: Choices = ({}, {"amsgrad": True})
# Stock interpolates towards the gradient in one of two ways, according to 1 - beta1: both, and at
# the border. A large eps shows where it is added.
BETAS: Choices = (
    {"betas": (0.5, 0.9)},
    {"betas": (0.3, 0.99), "eps": 0.1},
    {"betas": tensors(0.9, 0.999)},
    {"betas": tensors(0.3, 0.99), "lr": torch.tensor(0.07)},
    {"betas": (0.0, 0.5)},
)
ADAM_BAD: Choices = (
    *BAD,
    *FUSED,
    {"eps": -1e-8},
    {"betas": (1.0, 0.9)},
    {"betas": (0.9, -0.1)},
    {"betas": (0.9, torch.tensor(0.9))},
    {"betas": (torch.tensor([0.9, 0.8]), torch.tensor(0.9))},
    {"betas": 0.9},
    {"lr": torch.tensor(0.1), "foreach": True},
    {"betas": tensors(0.9, 0.99), "foreach": True},
    {"momentum": 0.9},
)
ADAM_EDITS: Choices = (
    {"amsgrad": False},
    {"betas": (0.5, 0.9), "eps": 0.1},
    {"betas": [0.3, 0.99], "amsgrad": 1},
    {"betas": tensors(0.6, 0.7)},
    {"betas": (torch.tensor([0.6]), torch.tensor([0.7]))},
    {"betas": (0, 0), "eps": 1, "decoupled_weight_decay": True},
    {"betas": (0.9, 0.999), "eps": 1e-8, "decoupled_weight_decay": False},
    {"decoupled_weight_decay": 1},
    *EDITS,
    # Away from the gradient: weights of interpolation below 0, on both sides of the other border.
    {"betas": (1.3, 0.9), "lr": 1e-3},
    {"betas": (1.7, 0.9)},
)
ADAM_SPARSE = "Adam does not support sparse gradients, please consider SparseAdam instead"

ADAM = Row(
    "Adam",
    fastsgd.Adam,
    torch.optim.Adam,
    options=(
        *product(
            AMSGRAD,
            (*DECAYS, {"weight_decay": 0.1, "decoupled_weight_decay": True}),
            SIGNS,
            RATES,
        ),
        *product(AMSGRAD, DECAYS, RATES[:1], BETAS),
    ),
    plain={"lr": 0.07},
    rich={"lr": 0.07, "weight_decay": 0.1, "amsgrad": True},
    states=("exp_avg", "exp_avg_sq", "max_exp_avg_sq"),
    plain_states=("exp_avg", "exp_avg_sq"),
    structures=({"lr": 0.07}, {"lr": 0.07, "weight_decay": 0.1, "amsgrad": True}),
    structural=("amsgrad",),
    bad=ADAM_BAD,
    edits=ADAM_EDITS,
    sparse_error=ADAM_SPARSE,
    takes_overlap=True,
)

ADAMW = replace(
    ADAM,
    name="AdamW",
    ours=fastsgd.AdamW,
    stock=torch.optim.AdamW,
    options=(
        *product(AMSGRAD, ({}, {"weight_decay": 0.1}, {"weight_decay": 0}), SIGNS, RATES),
        *product(AMSGRAD, RATES[:1], BETAS),
    ),
    bad=(*ADAM_BAD, {"decoupled_weight_decay": False}),
)

RMSPROP = Row(
    "RMSprop",
    fastsgd.RMSprop,
    torch.optim.RMSprop,
    options=(
        *product(({}, {"momentum": 0.9}), ({}, {"centered": True}), DECAYS, SIGNS, RATES),
        *product(
            ({}, {"momentum": 0.9}),
            ({}, {"centered": True}),
            ({"alpha": 0.4, "eps": 0.1}, {"alpha": 0.5}),
            RATES[:1],
        ),
    ),
    plain={"lr": 0.07},
    rich={"lr": 0.07, "momentum": 0.9, "centered": True, "weight_decay": 0.1},
    states=("square_avg", "momentum_buffer", "grad_avg"),
    plain_states=("square_avg",),
    structures=(
        {"lr": 0.07},
        {"lr": 0.07, "centered": True},
        {"lr": 0.07, "momentum": 0.9},
        {"lr": 0.07, "momentum": 0.9, "centered": True, "weight_decay": 0.1},
    ),
    structural=("momentum", "centered"),
    bad=(
        *BAD,
        {"eps": -1e-8},
        {"alpha": -0.1},
        {"momentum": -0.5},
        {"momentum": None},
        {"fused": True},
        {"betas": (0.9, 0.999)},
    ),
    edits=(
        {"momentum": 0.0},
        {"momentum": 0.5, "centered": False},
        {"centered": 1, "alpha": 0.3},
        {"alpha": 1, "eps": 1},
        {"alpha": 0.9, "eps": 1e-3, "momentum": True},
        {"momentum": 0.9},
        *EDITS,
        {"alpha": 1.3, "centered": True},  # as with Adam's betas, which see
        {"alpha": 1.7},
    ),
    sparse_error="RMSprop does not support sparse gradients",
)

ADAGRAD = Row(
    "Adagrad",
    fastsgd.Adagrad,
    torch.optim.Adagrad,
    options=(
        *product(
            ({}, {"lr_decay": 0.1}), ({}, {"initial_accumulator_value": 0.3}), DECAYS, SIGNS, RATES
        ),
        {"lr": 0.07, "eps": 0.1},
        {"lr": 0.07, "lr_decay": 2, "initial_accumulator_value": 1},
    ),
    plain={"lr": 0.07},
    rich={"lr": 0.07, "lr_decay": 0.1, "initial_accumulator_value": 0.3, "weight_decay": 0.1},
    states=("sum",),
    plain_states=("sum",),
    structures=(
        {"lr": 0.07},
        {"lr": 0.07, "lr_decay": 0.1, "initial_accumulator_value": 0.3, "weight_decay": 0.1},
    ),
    bad=(
        *BAD,
        *FUSED,
        {"eps": -1e-8},
        {"lr_decay": -0.1},
        {"lr_decay": None},
        {"initial_accumulator_value": -0.1},
        {"momentum": 0.9},
    ),
    edits=(
        {"lr_decay": 1},
        {"lr_decay": 0.3, "eps": 0.1},
        {"eps": 1},
        {"initial_accumulator_value": 7.0, "eps": 1e-10},
        *EDITS,
    ),
    eager=True,
    sparse=({"lr": 0.07}, {"lr": 0.1, "lr_decay": 0.1}, {"lr": 0.1, "maximize": True}),
)

OPTIMIZERS = (SGD, ADAM, ADAMW, RMSPROP, ADAGRAD)


def label(options: Mapping[str, Any]) -> str:
    """Return a short test id for options."""
    words = []
    for key, value in options.items():
        pair = isinstance(value, tuple) and isinstance(value[0], Tensor)
        shown = "tensor" if isinstance(value, Tensor) else value
        words.append(f"{key}=tensors{[v.item() for v in value]}" if pair else f"{key}={shown}")
    return ",".join(words) or "default"


# Every optimizer with every combination of its options.
COMBINATIONS = [(row, options) for row in OPTIMIZERS for options in row.options]
COMBINATION_IDS = [f"{row.name}-{label(options)}" for row, options in COMBINATIONS]


FLAGS: Choices = ({}, {"fused": True}, {"foreach": True})


def flagged(*flags: Options, rows: tuple[Row, ...] = OPTIMIZERS) -> dict[str, Any]:
    """Return what parametrizes a test with every optimizer and those of the flags it takes."""
    found = [(row, each) for row in rows for each in flags or FLAGS if row.takes(*each)]
    ids = [f"{row.name}-{label(each)}" for row, each in found]
    return {"argnames": ("row", "flags"), "argvalues": found, "ids": ids}


# By what stock does with sparse grads.
TAKE_SPARSE = tuple(row for row in OPTIMIZERS if row.sparse)
REFUSE_SPARSE = tuple(row for row in OPTIMIZERS if not row.sparse)

TAKE_FUSED = tuple(row for row in OPTIMIZERS if row.fused)


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
