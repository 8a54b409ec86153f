"""``fastsgd.clip_grad_norm_``, which stands where torch's stood."""

from __future__ import annotations

import math
import warnings
from typing import Any

import capabilities
import isolated
import pytest
import torch
from cases import EXACT, HALVES, HUGE
from onepass import INF, Own, all_dtypes, assert_norm, coefficient, copies
from oracle import assert_equal
from test_clipping import SHAPES
from torch import Tensor
from torch.nn import Parameter
from torch.nn.utils import clip_grad_norm_
from twins import parameters, random_grad

import fastsgd

LIMITS = (0.5, 1e9, 0, INF, -1.0, torch.tensor(0.25))


@pytest.mark.parametrize("limit", LIMITS, ids=repr)
@pytest.mark.parametrize("norm_type", [2.0, 2, INF, 1, 3.0, 0.5])
@pytest.mark.parametrize("dtypes", [*((t,) for t in EXACT), EXACT], ids=str)
def test_function(dtypes: Any, norm_type: float, limit: Any) -> None:
    """``fastsgd.clip_grad_norm_`` multiplies as torch's, by a norm that is nearer the truth."""
    shapes = [shape for shape in SHAPES if shape and 0 not in shape]
    params = all_dtypes(*shapes, (HUGE,), dtypes=dtypes)()
    for foreach in (None, True, False):
        for p in params[1:]:
            p.grad = random_grad(p)
        before = copies(p.grad for p in params)
        held = [p.grad for p in params]
        norm = fastsgd.clip_grad_norm_(params, limit, norm_type, foreach=foreach)
        assert all(p.grad is grad for p, grad in zip(params, held, strict=True))
        if norm_type in (2, INF):
            assert_norm(norm, before, norm_type)
        factor = coefficient(norm, float(limit))
        for p, grad in zip(params[1:], before[1:], strict=True):
            assert_equal(p.grad, grad * factor)
        theirs = [Parameter(p.detach()) for p in params]
        for q, grad in zip(theirs, before, strict=True):
            q.grad = grad
        right = clip_grad_norm_(theirs, limit, norm_type, foreach=foreach)
        torch.testing.assert_close(norm, right, rtol=1e-4, atol=0)


@pytest.mark.parametrize("norm_type", [2.0, INF])
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_function_with_halves(dtype: torch.dtype, norm_type: float) -> None:
    """Half grads are as near to the truth as one rounding allows."""
    params = parameters((4097,), (33, 5), dtype=dtype)()
    for p in params:
        p.grad = random_grad(p)
    before = copies(p.grad for p in params)
    norm = fastsgd.clip_grad_norm_(params, 0.5, norm_type)
    right = torch.stack([g.double().flatten().norm(norm_type) for g in before]).norm(norm_type)
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(norm.double(), right, rtol=eps, atol=0)
    for p, grad in zip(params, before, strict=True):
        torch.testing.assert_close(
            p.grad.double(), grad.double() * 0.5 / right, rtol=2 * eps, atol=eps
        )


def of_one(p: Tensor) -> Any:
    return p


def of_generator(p: Tensor) -> Any:
    return (each for each in [p, Parameter(torch.ones(3))])


def of_none(p: Tensor) -> Any:
    return []


def of_empty_generator(p: Tensor) -> Any:
    return (each for each in ())


def of_sparse(p: Tensor) -> Any:
    p.grad = p.grad.view(3, 17).to_sparse()
    return [p]


def of_complex(p: Tensor) -> Any:
    z = Parameter(torch.ones(5, dtype=torch.complex64))
    z.grad = torch.full((5,), 3 + 4j)
    return [p, z]


def of_expanded(p: Tensor) -> Any:
    p.grad = torch.ones(1).expand(51)
    return [p]


def of_infinite(p: Tensor) -> Any:
    p.grad[50] = INF
    return [p]


def of_a_class(p: Tensor) -> Any:
    p.grad = p.grad.as_subclass(Own)
    return [p]


def of_a_class_and_complex(p: Tensor) -> Any:
    params = of_complex(p)
    params[1].grad = params[1].grad.as_subclass(Own)
    return params


KINDS = (of_one, of_generator, of_none, of_empty_generator)
KINDS += (of_sparse, of_complex, of_expanded, of_infinite, of_a_class, of_a_class_and_complex)


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("norm_type", [2.0, INF, 1.0])
@pytest.mark.parametrize("kind", KINDS, ids=lambda f: f.__name__)
def test_function_takes_what_torch_takes(kind: Any, norm_type: float, strict: bool) -> None:
    """What may be passed, warnings and refusals are torch's; a refusal leaves the grads alone."""
    found = []
    for clip in (fastsgd.clip_grad_norm_, clip_grad_norm_):
        p = Parameter(torch.ones(3, 17) if kind is of_sparse else torch.ones(51))
        values = torch.arange(1.0, 52.0)
        p.grad = values.view(p.shape)
        params = kind(p)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                said: Any = clip(params, 0.5, norm_type, error_if_nonfinite=strict)
            except Exception as error:  # noqa: BLE001
                said = type(error)
        grad = p.grad.to_dense() if p.grad.is_sparse else p.grad
        found.append(
            (said, grad, [str(each.message) for each in caught if "empty" in str(each.message)])
        )
    (mine, grad, warned), (theirs, right, warning) = found
    assert warned == warning
    assert (mine if isinstance(mine, type) else type(mine)) is (
        theirs if isinstance(theirs, type) else type(theirs)
    )
    torch.testing.assert_close(grad, right, equal_nan=True)
    if isinstance(theirs, Tensor):
        torch.testing.assert_close(mine, theirs)


def made(kind: int) -> Tensor:
    """One of the things of which a list can be made."""
    if kind == 0:
        return torch.ones(3)  # which never had a gradient
    p = Parameter(torch.ones(3))
    if kind == 1:
        p = torch.ones(3).as_subclass(Own).requires_grad_()
    if kind != 2:
        p.grad = random_grad(p)
    if kind == 3:
        p.grad = p.grad.as_subclass(Own)
    return p


@pytest.mark.parametrize("count", [0, 1, 4, 19, 20, 21, 31, 32, 33, 100])
def test_function_looks_ahead(count: int) -> None:
    """Each gradient is found, wherever in the list, whatever stands beside it."""
    for first in range(5):
        params = [made((first + i * i) % 5) for i in range(count)]
        grads = [p.grad for p in params if p.grad is not None]
        before = copies(grads)
        norm = fastsgd.clip_grad_norm_(params, 0.5)
        assert_norm(norm, [g.as_subclass(Tensor) for g in before], 2.0)
        for grad, was in zip(grads, before, strict=True):
            assert_equal(grad.as_subclass(Tensor), was.as_subclass(Tensor) * coefficient(norm, 0.5))
        held = [p.grad for p in params if p.grad is not None]
        assert all(now is grad for now, grad in zip(held, grads, strict=True))


def test_bits_on_every_instruction_set() -> None:
    """The width of the registers does not show in a norm, of whatever dtype and order."""
    code = """
    import torch
    from fastsgd import _C
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        sizes = (1, 3, 17, 100, 8191, 8192, 8193, 100_003)
        grads = [((torch.arange(n) * 7919 % 1000 - 500) / 7).to(dtype) for n in sizes]
        for infinity in (False, True):
            print(_C.norm_of(grads, False, infinity)[0].hex())
    """
    told = {
        isolated.run(code, env={"ATEN_CPU_CAPABILITY": name}) for name in capabilities.supported()
    }
    assert len(told) == 1 and len(told.pop().split()) == 8


@pytest.mark.parametrize("size", [1e200, 1.0, 1e-200, 1e-320])
def test_parts_beyond_the_range_of_squares(size: float) -> None:
    """Norms of what the kernels take and of what they leave are joined without an overflow."""
    params = [Parameter(torch.zeros(4, dtype=torch.float64)) for _ in range(2)]
    params[0].grad = torch.full((4,), size, dtype=torch.float64)
    params[1].grad = torch.full((8,), size, dtype=torch.float64)[::2]
    norm = fastsgd.clip_grad_norm_(params, 1.0)
    torch.testing.assert_close(float(norm) / size, math.sqrt(8), rtol=1e-4, atol=0)
    factor = min(1.0, 1 / (math.sqrt(8) * size + 1e-6))
    for p in params:
        torch.testing.assert_close(p.grad / size, torch.full_like(p, factor), rtol=1e-4, atol=0)


@pytest.mark.parametrize("size", [1e200, 0.9e154, 1e152, 1.0, 1e-200])
@pytest.mark.parametrize("kind", [Tensor, Own], ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("count", [2, 8192 * 10])
def test_sums_beyond_the_range_of_squares(count: int, kind: Any, size: float) -> None:
    """Also where the squares of each tensor, or of each piece, are within it, and not of all."""
    params = [torch.zeros(count, dtype=torch.float64).as_subclass(kind) for _ in range(4)]
    for p in params:
        p.requires_grad_().grad = torch.full((count,), size, dtype=torch.float64).as_subclass(kind)
    norm = math.sqrt(4 * count)
    told = fastsgd.clip_grad_norm_(params, 1.0)
    torch.testing.assert_close(float(told) / size, norm, rtol=3e-14, atol=0)
    clipped = min(1.0, 1 / (norm * size + 1e-6))
    torch.testing.assert_close(float(params[3].grad[1]) / size, clipped, rtol=1e-12, atol=0)


def test_magnitudes_of_complex_numbers() -> None:
    """They are told in float64 where another gradient is, and may be beyond float32."""
    params = [torch.zeros(3, dtype=t).requires_grad_() for t in (torch.complex64, torch.float64)]
    params[0].grad = torch.tensor([1.1 + 2.3j, 0, 3e38 + 3e38j], dtype=torch.complex64)
    params[1].grad = torch.zeros(3, dtype=torch.float64)
    told = fastsgd.clip_grad_norm_(params, INF, INF)
    assert float(told) == abs(complex(params[0].grad[2]))
    params[0].grad[2] = 0
    told = fastsgd.clip_grad_norm_(params, INF, INF)
    torch.testing.assert_close(float(told), abs(complex(params[0].grad[0])), rtol=3e-16, atol=0)
