"""What other devices get, run on the host: their tables, cut into chunks, and their kernels' code.

The tests of the CPU's kernels are run again, with plain CPU tensors standing for a device's.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from cases import EXACT, ORDINARY_SHAPES, Row
from oracle import all_params, assert_equal
from test_layouts import *  # noqa: F403
from test_parity import *  # noqa: F403
from torch import Tensor
from torch.nn import Parameter
from twins import parameters, random_grad

from fastsgd import _C


def tensor_betas(row: Row) -> bool:
    """Whether betas may be tensors, whose powers torch takes from a library of its own."""
    return any(isinstance(o.get("betas", (0,))[0], Tensor) for o in row.options)


@pytest.fixture(autouse=True)
def emulated(settings: None, request: pytest.FixtureRequest) -> Iterator[None]:
    """Let the host do what a device would."""
    if _C.instruction_set() == "baseline":
        pytest.skip("devices fuse multiply-adds, which torch does not do here")
    name = request.node.name
    if "betas=tensors" in name or (
        "own_options" in name and tensor_betas(request.node.callspec.params["row"])
    ):
        pytest.skip("torch's power of a float32 tensor is a unit off now and then")
    _C.emulate_device(True)
    yield
    _C.emulate_device(False)


def step_on_the_cpu(optimizer: torch.optim.Optimizer) -> None:
    """Step with the CPU's own kernels."""
    _C.emulate_device(False)
    assert _C.step(optimizer)
    _C.emulate_device(True)


def step_on_the_device(optimizer: torch.optim.Optimizer) -> None:
    """Step as a device would, and nowhere else."""
    assert _C.step(optimizer), "a part went to torch's own path"


def on_both(row: Row, build: Any, **options: Any) -> tuple[Any, Any]:
    """Return two optimizers over equal parameters."""
    optimizers = []
    for _ in range(2):
        torch.manual_seed(1)
        optimizers.append(row.ours(build(), **copy.deepcopy(options)))
    return tuple(optimizers)


def assert_alike(a: torch.optim.Optimizer, b: torch.optim.Optimizer) -> None:
    """Parameters and states are equal, bit for bit."""
    assert_equal([p.detach() for p in all_params(a)], [p.detach() for p in all_params(b)])
    states = [[optimizer.state[p] for p in all_params(optimizer)] for optimizer in (a, b)]
    assert_equal(*states)


def give(optimizers: Any, seed: int, scale: float = 1) -> None:
    """Give all parameters of all optimizers the same random grads."""
    for optimizer in optimizers:
        torch.manual_seed(seed)
        for p in all_params(optimizer):
            p.grad = random_grad(p) * scale


HALF_AND_DOUBLE = (torch.float32, torch.bfloat16, torch.float64, torch.float16)


def mixed(count: int) -> Any:
    """Return a build of many parameters of all dtypes, in groups of their own options."""

    def build() -> list[dict[str, Any]]:
        shapes = [(), (0,), (3,), (131,), (5, 7), (1024,), (4099,)]
        params = [
            Parameter(torch.randn(shapes[i % 7], dtype=torch.float64).to(HALF_AND_DOUBLE[i % 4]))
            for i in range(count)
        ]
        return [{"params": params[g::5], "lr": 0.01 * (g + 1)} for g in range(5)]

    return build


@pytest.mark.parametrize("count", [40, 700, 4500])
def test_argument_sizes(row: Row, count: int) -> None:
    """Gradients' addresses in few arguments, in many, and in a table, when there are more."""
    pair = on_both(row, mixed(count), **row.rich)
    for step in range(3):
        give(pair, step)
        step_on_the_device(pair[0])
        step_on_the_cpu(pair[1])
        assert_alike(*pair)


def test_more_groups_than_arguments_hold(row: Row) -> None:
    """Hyper-parameters in a table; they change between steps, as with a scheduler."""

    def build() -> list[dict[str, Any]]:
        return [{"params": parameters((n % 37,))(), "lr": 0.001 * (n + 1)} for n in range(400)]

    pair = on_both(row, build, **row.rich)
    for step in range(4):
        give(pair, step)
        for optimizer in pair:
            for group in optimizer.param_groups:
                group["lr"] *= 0.9
        step_on_the_device(pair[0])
        step_on_the_cpu(pair[1])
        assert_alike(*pair)


@pytest.mark.parametrize("dtype", EXACT, ids=str)
def test_chunks(row: Row, dtype: torch.dtype) -> None:
    """Tensors of a chunk, of some, one element more or less; aligned, misaligned, and alike."""

    def build() -> list[Tensor]:
        sizes = [n + more for n in (1024, 16384, 65536) for more in (-1, 0, 1)]
        params = [Parameter(torch.randn(n, dtype=dtype)) for n in sizes]
        for offset in range(1, 5):
            params.append(Parameter(torch.randn(5000 + offset, dtype=dtype)[offset:]))
        return params

    pair = on_both(row, build, **row.rich)
    for step in range(3):
        give(pair, step)
        step_on_the_device(pair[0])
        step_on_the_cpu(pair[1])
        assert_alike(*pair)


def test_more_layouts_than_16_bits_count(row: Row) -> None:
    """Tensors that do not lie flat, each a little: every one has a layout of its own."""

    def build() -> list[Tensor]:
        many = torch.randn(2**15 + 10, 3, 4)
        return [Parameter(part[:, :3] if i % 2 else part[:, 1:]) for i, part in enumerate(many)]

    pair = on_both(row, build, **row.plain)
    for optimizer in pair:
        for p in all_params(optimizer):
            p.grad = p.detach().clone()
    step_on_the_device(pair[0])
    step_on_the_cpu(pair[1])
    assert_alike(*pair)


@pytest.mark.parametrize("dtype", EXACT, ids=str)
def test_a_learning_rate_on_the_device(row: Row, dtype: torch.dtype) -> None:
    """The address of a tensor lr is read at each step, its value where the step is done."""
    options = {**row.rich, "lr": torch.tensor(0.1, dtype=dtype)}
    pair = on_both(row, parameters((1,), (131,), (33, 17)), **options)
    for step in range(3):
        give(pair, step)
        for optimizer in pair:
            optimizer.param_groups[0]["lr"].mul_(0.5)
        step_on_the_device(pair[0])
        step_on_the_cpu(pair[1])
        assert_alike(*pair)


def test_scaled_gradients(row: Row) -> None:
    """grad_scale and found_inf are read on the device: skipped steps leave values and counters."""
    pair = on_both(row, parameters(*ORDINARY_SHAPES), **row.rich, **row.fused)
    taken = 0
    for step, found_inf in enumerate((1.0, 0.0, 1.0, 1.0, 0.0, 0.0)):
        give(pair, step, 1024)
        device, cpu = pair
        for optimizer in pair:
            optimizer.grad_scale = torch.tensor(1024.0)
            optimizer.found_inf = torch.tensor(found_inf)
        before = [p.detach().clone() for p in all_params(device)]
        grads = [p.grad.clone() for p in all_params(device)]
        step_on_the_device(device)
        step_on_the_cpu(cpu)
        taken += not found_inf
        if found_inf:
            assert_equal([p.detach() for p in all_params(device)], before)
            assert_equal([p.grad for p in all_params(device)], grads)
        if row.counts:
            assert {int(s["step"]) for s in device.state.values()} == {taken}
        if taken:
            assert_alike(*pair)
        else:
            assert row.eager or not any(s[row.states[0]].any() for s in device.state.values())


def test_emulation_ends(row: Row) -> None:
    """An optimizer that goes from the CPU to a device and back goes on as if it had not."""
    pair = on_both(row, parameters(*ORDINARY_SHAPES), **row.rich)
    for step in range(6):
        give(pair, step)
        (step_on_the_device if step % 2 else step_on_the_cpu)(pair[0])
        step_on_the_cpu(pair[1])
        assert_alike(*pair)


def test_all_options_within_a_unit(row: Row) -> None:
    """With tensor betas too, whose powers are computed in double and rounded."""
    for options in row.options:
        pair = on_both(row, parameters((131,)), **options)
        for step in range(5):
            give(pair, step)
            step_on_the_device(pair[0])
            step_on_the_cpu(pair[1])
        for p, q in zip(*map(all_params, pair), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)
