"""``zero_grad``: to None and to zeros, as stock, whatever the grads are."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import DTYPES, HUGE, LAYOUTS, ORDINARY_SHAPES, Layout, Row, flagged
from oracle import all_params, assert_equal
from torch import Tensor
from torch.nn import Parameter
from twins import Twins, parameters, random_grad

import fastsgd

Grads = Callable[[list[Tensor]], None]


def plain(params: list[Tensor]) -> None:
    for p in params:
        p.grad = random_grad(p)


def some(params: list[Tensor]) -> None:
    for p in params[::2]:
        p.grad = random_grad(p)


def requiring_grad(params: list[Tensor]) -> None:
    for p in params:
        p.grad = random_grad(p).requires_grad_()


def recorded(params: list[Tensor]) -> None:
    for p in params:
        p.grad = random_grad(p).requires_grad_() * 2


def shared(params: list[Tensor]) -> None:
    memory = torch.randn(5000)
    for p in params:
        if p.numel() > 1:
            p.grad = memory[: p.numel()].view(p.shape)


def one_for_all(params: list[Tensor]) -> None:
    grad = random_grad(params[0])
    for p in params:
        if p.shape == grad.shape:
            p.grad = grad


def of_parameters(params: list[Tensor]) -> None:
    params[0].grad = params[0].detach()


def gapped(params: list[Tensor]) -> None:
    for p in params:
        p.grad = torch.randn(*p.shape, 3)[..., 1]


def transposed(params: list[Tensor]) -> None:
    for p in params:
        if p.dim() == 2:
            p.grad = torch.randn(p.shape[::-1]).t()


def sparse(params: list[Tensor]) -> None:
    plain(params)
    p = params[0]
    index = torch.tensor([[0, 2, 0]])
    p.grad = torch.sparse_coo_tensor(index, torch.ones(3, 17), p.shape, check_invariants=False)


def negated(params: list[Tensor]) -> None:
    for p in params:
        p.grad = torch._neg_view(random_grad(p))


def infinite(params: list[Tensor]) -> None:
    for p in params:
        p.grad = torch.full_like(p, float("nan"))
        p.grad.flatten()[:1].fill_(float("-inf"))


KINDS: dict[str, Grads] = {
    f.__name__: f
    for f in (
        plain,
        some,
        requiring_grad,
        recorded,
        shared,
        one_for_all,
        of_parameters,
        gapped,
        transposed,
        sparse,
        negated,
        infinite,
    )
}
BUILD = parameters(*ORDINARY_SHAPES, (33, 17))


def seen(grad: Tensor | None, version: int | None, counted: bool) -> Any:
    """Return what a user can see of a grad after zero_grad, except its numbers."""
    if grad is None:
        return None
    shape = grad._nnz() if grad.is_sparse else grad.stride()
    # An empty grad may be skipped.
    counted = counted and not grad.is_sparse and grad.numel() > 0
    writes = grad._version - version if counted else None
    return grad.requires_grad, grad.is_leaf, grad.grad_fn is None, shape, writes


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(**flagged())
@pytest.mark.parametrize("set_to_none", [True, False])
def test_as_stock(row: Row, kind: str, flags: Any, set_to_none: bool) -> None:
    """What is in ``.grad`` afterwards, and in the tensors that were there, is what stock leaves."""
    # Stock's foreach path counts writes to shared memory in another way than its plain path.
    counted = not flags or set_to_none
    sights, values = [], []
    for cls in (row.ours, row.stock):
        torch.manual_seed(0)
        params = BUILD()
        if cls is row.stock and kind == "negated":
            flags = {}  # stock's foreach code refuses lazy negations
        optimizer = cls(params, **row.rich, **flags)
        KINDS[kind](params)
        held = [p.grad for p in params]
        versions = [None if g is None else g._version for g in held]
        optimizer.zero_grad(set_to_none)
        for p, g in zip(params, held, strict=True):
            assert p.grad is (None if set_to_none else g), "the same tensor object"
        sights.append([seen(g, v, counted) for g, v in zip(held, versions, strict=True)])
        dense = [g.detach().to_dense() for g in held if g is not None]
        values.append(dense + [p.detach() for p in params])
        if not set_to_none:
            for g, v in zip(held, versions, strict=True):
                assert g is None or not g.numel() or g._version > v, "the write is counted"
    assert sights[0] == sights[1]
    assert_equal(*values)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS, ids=repr)
def test_layouts(layout: Layout, dtype: torch.dtype) -> None:
    """Zeros reach each element of the grad and none beside it."""
    memory = torch.randn(layout.size + 130, dtype=torch.float64).to(dtype)
    before = memory.clone()
    grad = layout.param(memory[65 : 65 + layout.size])
    p = Parameter(torch.empty(grad.shape, dtype=dtype))
    p.grad = grad
    optimizer = fastsgd.SGD([p, Parameter(torch.ones(3))])  # no rule is asked
    optimizer.zero_grad(set_to_none=False)
    assert_equal(p.grad, torch.zeros_like(grad))
    inside = torch.zeros(memory.numel(), dtype=torch.bool)
    inside.as_strided(grad.shape, grad.stride(), grad.storage_offset()).fill_(True)
    assert_equal(memory[~inside], before[~inside])
    assert not memory[inside].any()


@pytest.mark.parametrize("threads", [1, 2, 8])
def test_many_and_large(row: Row, threads: int) -> None:
    """Thousands of small grads, and large ones, on any number of threads."""
    torch.set_num_threads(threads)
    params = parameters((HUGE,), *[(64,)] * 2000, (1000, 1001), ())()
    optimizer = row.ours(params, **row.plain)
    for p in params:
        p.grad = torch.full_like(p, float("nan"))
    optimizer.zero_grad(set_to_none=False)
    assert not any(p.grad.any() for p in params)
    refs = [weakref.ref(p.grad) for p in params]
    optimizer.zero_grad()
    assert all(p.grad is None for p in params)
    assert all(ref() is None for ref in refs), "the grads are freed"


def test_after_backward(row: Row) -> None:
    """Grads made by backward accumulate into the zeros, or anew."""
    net = torch.nn.Linear(9, 9)
    optimizer = row.ours(net.parameters(), **row.plain)
    x = torch.randn(4, 9)
    net(x).sum().backward()
    once = copy.deepcopy([p.grad for p in net.parameters()])
    for set_to_none in (False, True, False):
        optimizer.zero_grad(set_to_none=set_to_none)
        net(x).sum().backward()
        assert_equal([p.grad for p in net.parameters()], once)


def test_default_is_none(row: Row) -> None:
    """``zero_grad()`` sets to None; so do truthy arguments."""
    for args in ((), (True,), (1,)):
        (p,) = params = [Parameter(torch.ones(3))]
        p.grad = torch.ones(3)
        row.ours(params).zero_grad(*args)
        assert p.grad is None
    p.grad = torch.ones(3)
    row.ours([p]).zero_grad(0)
    assert_equal(p.grad, torch.zeros(3))


def test_autograd_notices(row: Row) -> None:
    """A grad that was saved for a backward and then zeroed is noticed."""
    p = Parameter(torch.ones(70))
    p.grad = torch.ones(70).requires_grad_()
    loss = (p.grad * p.grad).sum()
    row.ours([p]).zero_grad(set_to_none=False)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_subclass_grad(row: Row) -> None:
    """A grad that is a tensor subclass is cleared through its own operators."""
    from torch.testing._internal.two_tensor import TwoTensor

    p = Parameter(TwoTensor(torch.randn(5), torch.randn(5)))
    p.grad = TwoTensor(torch.randn(5), torch.randn(5))
    row.ours([p, Parameter(torch.ones(3))]).zero_grad(set_to_none=False)
    assert not p.grad.a.any() and not p.grad.b.any()
    row.ours([p]).zero_grad()
    assert p.grad is None


def test_grad_with_a_zero_of_its_own(row: Row) -> None:
    """A grad of a class that overrides torch's functions is asked to zero itself."""
    called = []

    class Asked(torch.Tensor):
        @classmethod
        def __torch_function__(
            cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            called.append(func.__name__)
            return super().__torch_function__(func, types, args, kwargs)

    p = Parameter(torch.ones(70))
    p.grad = torch.ones(70).as_subclass(Asked)
    row.ours([p, Parameter(torch.ones(3))]).zero_grad(set_to_none=False)
    assert "zero_" in called
    assert not p.grad.as_subclass(torch.Tensor).any()


def test_versions(row: Row) -> None:
    """Of every grad that is zeroed, with elements and without."""
    versions = []
    for cls in (row.ours, row.stock):
        params = parameters((70,), (0,), (3, 0), ())()
        for p in params:
            p.grad = torch.ones_like(p)
        cls(params).zero_grad(set_to_none=False)
        versions.append([p.grad._version for p in params])
    assert versions[0] == versions[1] == [1, 1, 1, 1]


def test_complex_and_integer_grads(row: Row) -> None:
    """Grads of dtypes that the step does not take are cleared too."""
    for dtype in (torch.complex64, torch.complex128, torch.int64, torch.int8):
        p = torch.ones(70, dtype=dtype)
        p.grad = torch.ones(70, dtype=dtype)
        optimizer = row.ours([p, Parameter(torch.ones(3))], **row.plain)
        optimizer.zero_grad(set_to_none=False)
        assert_equal(p.grad, torch.zeros(70, dtype=dtype))
        optimizer.zero_grad()
        assert p.grad is None


def test_meta_grads(row: Row) -> None:
    """Grads without memory."""
    p = Parameter(torch.empty(5, device="meta"))
    p.grad = torch.empty(5, device="meta")
    row.ours([p]).zero_grad(set_to_none=False)
    assert p.grad is not None
    row.ours([p]).zero_grad()
    assert p.grad is None


def test_inference_grads(row: Row) -> None:
    """Zeroing an inference tensor outside of inference mode is refused, as in stock."""
    p = Parameter(torch.ones(70))
    with torch.inference_mode():
        p.grad = torch.ones(70)
    with pytest.raises(RuntimeError, match="[Ii]nference tensor"):
        row.ours([p]).zero_grad(set_to_none=False)
    assert_equal(p.grad.clone(), torch.ones(70))
    row.ours([p]).zero_grad()
    assert p.grad is None


def test_expanded_grads(row: Row) -> None:
    """Writing zeros into an expanded grad does what it does in stock."""
    outcomes = []
    for cls in (row.ours, row.stock):
        p = Parameter(torch.ones(70))
        p.grad = torch.ones(1).expand(70)
        try:
            cls([p]).zero_grad(set_to_none=False)
            outcomes.append(p.grad.tolist())
        except RuntimeError as refused:
            outcomes.append(str(refused).split(".")[0])
    assert outcomes[0] == outcomes[1]


def test_lazy_clones(row: Row) -> None:
    """Zeroing a grad that is a lazy clone leaves the original alone."""
    original = torch.randn(70)
    kept = original.clone()
    p = Parameter(torch.ones(70))
    p.grad = torch._lazy_clone(original)
    row.ours([p]).zero_grad(set_to_none=False)
    assert_equal(original, kept)
    assert not p.grad.any()


def test_grad_mode_and_groups(row: Row) -> None:
    """In any grad mode, over all groups, with parameters that occur twice."""
    twins = Twins(row, lambda: [{"params": BUILD()} for _ in range(3)], **row.plain)
    for optimizer in twins.sides:
        one, two, _ = optimizer.param_groups
        two["params"].append(one["params"][0])
    twins.grads()
    with torch.no_grad():
        for optimizer in twins.sides:
            optimizer.zero_grad(set_to_none=False)
    twins.check()
    assert not any(p.grad.any() for p in all_params(twins.ours))
    for optimizer in twins.sides:
        optimizer.zero_grad()
    twins.check()
