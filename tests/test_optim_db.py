"""PyTorch's own test material for optimizers, driven against ours."""

from __future__ import annotations

import copy
import importlib.util
import warnings
from typing import Any

import pytest
import torch
from cases import FLAGS, OPTIMIZERS, Row
from oracle import assert_equal
from torch.nn import Parameter

for needed in ("expecttest", "hypothesis"):
    if importlib.util.find_spec(needed) is None:
        pytest.skip(f"torch's test material needs the package {needed}", allow_module_level=True)

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from torch.testing._internal.common_optimizers import OptimizerErrorEnum, optim_db

DTYPE = torch.float32
INFOS = [(row, info) for row in OPTIMIZERS for info in optim_db if info.optim_cls is row.stock]
INPUTS = [
    (row, info, kwargs)
    for row, info in INFOS
    for kwargs in info.optim_inputs_func(device="cpu", dtype=DTYPE)
]


def name(value: Any) -> str | None:
    """Return a test id."""
    if isinstance(value, Row):
        return value.name
    return getattr(value, "desc", "").replace(" ", "_") or None


each_input = pytest.mark.parametrize(("row", "info", "given"), INPUTS, ids=name)
each_info = pytest.mark.parametrize(("row", "info"), INFOS, ids=name)


def test_every_optimizer_is_there() -> None:
    """``optim_db`` knows each of our optimizers and has inputs for it."""
    assert {row.name for row, _ in INFOS} == {row.name for row in OPTIMIZERS}
    assert len(INPUTS) >= 5 * len(OPTIMIZERS)


@pytest.fixture(autouse=True)
def one_thread() -> None:
    """The networks are too small for more."""
    torch.set_num_threads(1)


def problem(dtype: torch.dtype = DTYPE) -> tuple[torch.nn.Module, torch.Tensor, torch.Tensor]:
    """Return a small network, inputs and targets."""
    torch.manual_seed(1)
    net = torch.nn.Sequential(
        torch.nn.Linear(10, 33), torch.nn.Sigmoid(), torch.nn.Linear(33, 1), torch.nn.Sigmoid()
    ).to(dtype)
    return net, torch.rand(16, 10, dtype=dtype), torch.rand(16, 1, dtype=dtype)


@pytest.mark.parametrize("flags", FLAGS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@each_input
def test_trains_as_stock(row: Row, info: Any, given: Any, dtype: torch.dtype, flags: Any) -> None:
    """Every input of the database: the losses, parameters and states of stock."""
    if not row.takes(*flags):
        pytest.skip("stock has no such flag")
    sides = []
    for cls, more in ((row.ours, flags), (row.stock, {"foreach": False})):
        net, x, y = problem(dtype)
        optimizer = cls(net.parameters(), **copy.deepcopy(given.kwargs), **more)
        losses = []
        for _ in range(7):
            optimizer.zero_grad()
            loss = torch.nn.functional.mse_loss(net(x), y)
            loss.backward()
            if len(losses) == 3:  # a parameter without a grad
                net[0].bias.grad = None
            optimizer.step()
            losses.append(loss.item())
        state = [optimizer.state[p] for p in net.parameters() if p in optimizer.state]
        sides.append((losses, [p.detach() for p in net.parameters()], state))
    assert_equal(*sides)


@each_input
def test_as_a_string_of_groups(row: Row, info: Any, given: Any) -> None:
    """Parameters in groups, one with a larger lr."""
    sides = []
    for cls, more in ((row.ours, {}), (row.stock, {"foreach": False})):
        net, x, y = problem()
        kwargs = copy.deepcopy(given.kwargs)
        lr = kwargs.get("lr", 1e-3)
        groups = [
            {"params": list(net[0].parameters())},
            {"params": list(net[2].parameters()), "lr": lr * 3, "weight_decay": 0.25},
        ]
        optimizer = cls(groups, **kwargs, **more)
        for _ in range(5):
            optimizer.zero_grad()
            torch.nn.functional.mse_loss(net(x), y).backward()
            optimizer.step()
        sides.append([p.detach() for p in net.parameters()])
    assert_equal(*sides)


@pytest.mark.parametrize("schedulers", range(7))
@each_info
def test_goes_the_right_way_with_schedulers(row: Row, info: Any, schedulers: int) -> None:
    """The database's schedulers, alone and together."""
    if schedulers >= len(info.scheduler_inputs):
        pytest.skip("no such row")
    sides = []
    for cls, more in ((row.ours, {}), (row.stock, {"foreach": False})):
        net, x, y = problem()
        optimizer = cls(net.parameters(), lr=0.01 if row.squares else 0.1, **more)
        made = [make(optimizer) for make in info.scheduler_inputs[schedulers]]
        losses = []
        for _ in range(20):
            optimizer.zero_grad()
            loss = torch.nn.functional.mse_loss(net(x), y)
            loss.backward()
            optimizer.step()
            for scheduler in made:
                reduce = isinstance(scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau)
                scheduler.step(*([loss] if reduce else []))
            losses.append(loss.item())
        sides.append(losses)
    assert sides[0] == sides[1]
    assert sides[0][-1] < sides[0][0]


@each_info
def test_errors(row: Row, info: Any) -> None:
    """Every bad input of the database raises its exception with its words."""
    count = 0
    for device in ("cpu",):
        for bad in info.optim_error_inputs_func(device, DTYPE):
            given = bad.optimizer_error_input
            params = given.params or [Parameter(torch.randn(2, 3))]
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                if bad.error_on is OptimizerErrorEnum.CONSTRUCTION_ERROR:
                    if issubclass(bad.error_type, Warning):
                        with pytest.warns(bad.error_type, match=bad.error_regex):
                            row.ours(params, **given.kwargs)
                    else:
                        with pytest.raises(bad.error_type, match=bad.error_regex):
                            row.ours(params, **given.kwargs)
                else:
                    optimizer = row.ours(params, **given.kwargs)
                    with pytest.raises(bad.error_type, match=bad.error_regex):
                        optimizer.step()
            count += 1
    assert count >= 3


@each_input
def test_state_dict_and_deepcopy(row: Row, info: Any, given: Any) -> None:
    """Save, load into stock and back, copy; go on with equal bits."""
    net, x, y = problem()
    ours = row.ours(net.parameters(), **copy.deepcopy(given.kwargs))
    for _ in range(3):
        ours.zero_grad()
        torch.nn.functional.mse_loss(net(x), y).backward()
        ours.step()
    other = copy.deepcopy(net)
    stock = row.stock(other.parameters(), **copy.deepcopy(given.kwargs), foreach=False)
    saved = copy.deepcopy(ours.state_dict())
    for group in saved["param_groups"]:
        group["foreach"] = False
    stock.load_state_dict(saved)
    third, again = copy.deepcopy((net, ours))
    for model, optimizer in ((net, ours), (other, stock), (third, again)):
        for _ in range(3):
            optimizer.zero_grad()
            torch.nn.functional.mse_loss(model(x), y).backward()
            optimizer.step()
    for p, q, r in zip(*(m.parameters() for m in (net, other, third)), strict=True):
        assert_equal(p, q)
        assert_equal(p, r)


@pytest.mark.parametrize(("row", "info"), [i for i in INFOS if i[0].sparse], ids=name)
def test_sparse(row: Row, info: Any) -> None:
    """The database's settings for sparse grads."""
    kwargs, schedulers = info.metadata_for_sparse
    sides = []
    for cls, more in ((row.ours, {}), (row.stock, {"foreach": False})):
        p = Parameter(torch.tensor([1.5, 1.5]))
        optimizer = cls([p], **kwargs, **more)
        made = [make(optimizer) for make in schedulers]
        for step in range(20):
            p.grad = torch.sparse_coo_tensor(
                [[step % 2]], [2.0 * float(p[step % 2].detach())], (2,), check_invariants=False
            )
            optimizer.step()
            for scheduler in made:
                reduce = isinstance(scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau)
                scheduler.step(*([float(p.detach().sum())] if reduce else []))
        sides.append(p.detach())
    assert_equal(*sides)


@each_input
def test_complex(row: Row, info: Any, given: Any) -> None:
    """A complex parameter steps as its two real parts do, but for the rounding of products."""
    torch.manual_seed(0)
    z = Parameter(torch.randn(33, 5, dtype=torch.complex64))
    r = Parameter(torch.view_as_real(z.detach()).clone())
    ours = [row.ours([p], **copy.deepcopy(given.kwargs)) for p in (z, r)]
    for _ in range(3):
        z.grad = torch.randn_like(z)
        r.grad = torch.view_as_real(z.grad).clone()
        for optimizer in ours:
            optimizer.step()
    torch.testing.assert_close(torch.view_as_real(z.detach()), r.detach())
