"""What the fast path does not take goes through stock's single-tensor path and gets its result."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import EXACT, REFUSE_SPARSE, TAKE_SPARSE, Row, flagged
from life import recorded
from oracle import all_params, assert_equal
from snapshot import Snapshot
from torch import Tensor, nn
from torch.nn import Parameter
from torch.testing._internal.two_tensor import TwoTensor
from twins import ORDINARY, Twins, check_state, parameters, random_grad
from watched import Watched

from fastsgd import _C

takes_sparse = pytest.mark.parametrize("row", TAKE_SPARSE, ids=repr)


def sparse_grad(p: Tensor, coalesced: bool = True) -> Tensor:
    """Return a sparse grad over a few rows of ``p``, one of them named twice."""
    index = torch.tensor([[0, 2, p.shape[0] - 1, 0]])
    values = random_grad(torch.empty(4, *p.shape[1:], dtype=p.dtype))
    grad = torch.sparse_coo_tensor(index, values, p.shape, check_invariants=False)
    return grad.coalesce() if coalesced else grad


# Sparse grads.


@pytest.mark.parametrize(**flagged(rows=TAKE_SPARSE))
@pytest.mark.parametrize("coalesced", [False, True])
@pytest.mark.parametrize("dtype", EXACT, ids=str)
def test_sparse_grads(row: Row, dtype: torch.dtype, coalesced: bool, flags: Any) -> None:
    """Sparse grads among dense ones, with every option that stock takes with them."""
    for chosen in row.sparse:
        twins = Twins(row, parameters((9, 5), (70,), (33, 17), dtype=dtype), **chosen, **flags)
        for _ in range(3):
            twins.grads()
            twins.each(lambda o: give_sparse(o, coalesced))
            twins.step()
            for p, q in twins.pairs():
                assert_equal(p.detach(), q.detach())
                if q in twins.stock.state:
                    mine = {k: v.to_dense() for k, v in twins.ours.state[p].items()}
                    theirs = {k: v.to_dense() for k, v in twins.stock.state[q].items()}
                    check_state(mine, theirs)


def give_sparse(optimizer: torch.optim.Optimizer, coalesced: bool) -> None:
    """Make the grad of the last parameter sparse."""
    p = all_params(optimizer)[-1]
    p.grad = sparse_grad(p, coalesced)


@pytest.mark.parametrize(**flagged(rows=REFUSE_SPARSE))
@pytest.mark.parametrize("step", [0, 1, 2])
def test_sparse_grads_refused(row: Row, step: int, flags: Any) -> None:
    """Where stock takes none: its error, and nothing was written; then on with dense grads."""
    build = parameters((70,), (9, 5), (33, 17))
    twins = Twins(row, build, **row.rich, **flags).run(step)
    twins.grads()
    dense = all_params(twins.ours)[-1].grad
    give_sparse(twins.ours, True)
    snapshot = Snapshot(twins.ours)
    with pytest.raises(RuntimeError) as theirs:
        optimizer = row.stock(build(), foreach=False)
        give_sparse(optimizer, True)
        optimizer.step()
    with pytest.raises(RuntimeError) as mine:
        twins.ours.step()
    assert str(mine.value).splitlines()[0] == str(theirs.value) == row.sparse_error
    snapshot.assert_unchanged()
    all_params(twins.ours)[-1].grad = dense
    twins.step()
    twins.check()
    twins.run(2)


@takes_sparse
def test_sparse_then_dense(row: Row) -> None:
    """A parameter whose grads turn sparse and dense again."""
    twins = Twins(row, parameters((9, 5), (33, 17)), **row.plain)
    for step in range(5):
        twins.grads()
        if step % 2:
            twins.each(lambda o: give_sparse(o, True))
        twins.step()
        for p, q in twins.pairs():
            assert_equal(p.detach(), q.detach())


@takes_sparse
def test_values_of_a_sparse_grad_in_another_parameter(row: Row) -> None:
    """Stock's order decides which values they are."""
    twins = Twins(row, parameters((4,), (4,)), **row.sparse[1])
    for _ in range(2):
        for optimizer in twins.sides:
            p, q = all_params(optimizer)
            p.grad = torch.ones(4)
            q.grad = torch.sparse_coo_tensor(
                torch.arange(4)[None], p.data, is_coalesced=True, check_invariants=False
            )
        twins.step()
        for p, q in twins.pairs():
            assert_equal(p.detach(), q.detach())


@takes_sparse
def test_embedding(row: Row) -> None:
    """``nn.Embedding(sparse=True)`` in a model with dense layers, through autograd."""
    nets: list[nn.Module] = []

    def build() -> list[Tensor]:
        nets.append(nn.Sequential(nn.Embedding(50, 17, sparse=True), nn.Linear(17, 3)))
        return list(nets[-1].parameters())

    twins = Twins(row, build, **row.sparse[1])
    for step in range(5):
        for net, optimizer in zip(nets, twins.sides, strict=True):
            optimizer.zero_grad()
            net(torch.tensor([1, 2, 2, step])).square().sum().backward()
            optimizer.step()
    for p, q in twins.pairs():
        assert_equal(p.detach(), q.detach())


# Complex.


@pytest.mark.parametrize("lazy", [False, True])
@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128], ids=str)
def test_complex(row: Row, dtype: torch.dtype, lazy: bool) -> None:
    """Complex parameters, beside real ones; with lazily conjugated grads, where stock takes those.

    Rules that square step the real parts and the imaginary parts, of which there is no lazy view.
    """
    if lazy and row.squares:
        pytest.skip("stock takes no lazy conjugates here: see the next test")

    def build() -> list[Tensor]:
        return [Parameter(torch.randn(33, 5, dtype=dtype)), *ORDINARY()]

    for options in (row.plain, row.rich, {**row.rich, "maximize": True}):
        twins = Twins(row, build, **options)
        for _ in range(3):

            def give(optimizer: Any) -> None:
                for p in all_params(optimizer):
                    grad = torch.randn_like(p)
                    p.grad = grad.conj() if lazy else grad

            twins.each(give)
            twins.step()
            twins.check()


def test_lazily_conjugated_grad(row: Row) -> None:
    """A lazily conjugated grad: stock's result or stock's error."""

    def build() -> list[Tensor]:
        return [Parameter(torch.randn(33, 5, dtype=torch.complex64))]

    twins = Twins(row, build, **row.plain)
    twins.grads(lambda p: torch.randn(p.shape, dtype=p.dtype).conj())
    outcomes = []
    for optimizer in twins.sides:
        try:
            optimizer.step()
            outcomes.append("stepped")
        except RuntimeError as refused:
            outcomes.append(str(refused))
    assert outcomes[0] == outcomes[1]
    assert (outcomes[0] != "stepped") == row.squares
    twins.check()


def test_conjugated_parameter(row: Row) -> None:
    """A parameter that is a lazy conjugate; its imaginary part is a lazily negated real one."""
    if row.squares:
        pytest.skip("stock views complex parameters as real ones, which these cannot be")

    def build() -> list[Tensor]:
        z = torch.randn(70, dtype=torch.complex64).conj()
        return [z.detach().requires_grad_(), z.imag.detach().requires_grad_()]

    twins = Twins(row, build, **row.rich)
    assert all_params(twins.ours)[0].is_conj() and all_params(twins.ours)[1].is_neg()
    for _ in range(3):

        def give(optimizer: Any) -> None:
            for p in all_params(optimizer):
                p.grad = torch.randn(p.shape, dtype=p.dtype)

        twins.each(give)
        twins.step()
        twins.check()


def test_negated_parameter_and_state(row: Row) -> None:
    """Lazily negated parameters and states."""
    twins = Twins(row, lambda: [Parameter(torch._neg_view(torch.randn(131)))], **row.rich)
    for _ in range(3):

        def give(optimizer: Any) -> None:
            for p in all_params(optimizer):
                p.grad = torch.randn(131)
                for key, value in optimizer.state[p].items() if p in optimizer.state else ():
                    optimizer.state[p][key] = torch._neg_view(-value.clone().neg().neg())

        twins.each(give)
        twins.step()
        for p, q in twins.pairs():
            assert_equal(p.detach(), q.detach())
            for name in row.states:
                assert_equal(twins.ours.state[p][name], twins.stock.state[q][name])


def test_zero_tensor_grad(row: Row) -> None:
    """A grad that has no memory because it is all zeros."""
    twins = Twins(row, parameters((131,), (5,)), **row.rich)
    for _ in range(3):
        twins.grads()
        for optimizer in twins.sides:
            all_params(optimizer)[0].grad = torch._efficientzerotensor(131)
        twins.step()
        for p, q in twins.pairs():
            assert_equal(p.detach(), q.detach())


# differentiable.


@pytest.mark.parametrize("tensor_lr", [False, True])
def test_differentiable(row: Row, tensor_lr: bool) -> None:
    """``differentiable=True``: the gradient of the stepped parameters is stock's."""
    results, refusals = [], []
    for cls in (row.ours, row.stock):
        torch.manual_seed(1)
        weight = torch.randn(33, dtype=torch.float64, requires_grad=True)
        rate = torch.tensor(0.1, requires_grad=True)
        p = weight.clone()
        q = torch.randn(5, dtype=torch.float64, requires_grad=True).clone()
        # Stock's own states are written in place after autograd saved them for a tensor lr.
        options = {**row.plain, "lr": rate} if tensor_lr else row.rich
        optimizer = cls([p, q], **options, differentiable=True)
        # Squares of earlier grads are added up in place, after autograd saved them.
        for _ in range(1 if row.squares else 3):
            now = p.clone()  # the step writes into p, which autograd must not have saved
            p.grad, q.grad = now * now + weight, q * 2
            try:
                optimizer.step()
            except TypeError as refused:  # some of stock's rules take no such lr
                refusals.append(str(refused))
                break
        else:
            assert not refusals
        if refusals:
            continue
        p.square().sum().backward()
        results.append([weight.grad, rate.grad if tensor_lr else None, p.detach(), q.detach()])
    if refusals:
        assert tensor_lr and refusals[0] == refusals[1]
        return
    mine, theirs = ([t for t in result if t is not None] for result in results)
    assert_equal(mine, theirs)
    assert mine[0].abs().min() > 0


def test_weight_decay_that_requires_grad(row: Row) -> None:
    """Stock writes into the grads then, or refuses; so do we."""
    for requires_grad in (False, True):
        decay = torch.tensor(0.1, requires_grad=requires_grad)
        twins = Twins(row, ORDINARY, **{**row.rich, "weight_decay": decay})
        for _ in range(3):
            twins.grads()
            if not twins.step_if_allowed(halfway=True):
                assert requires_grad and row.squares
                break
            twins.check()


def test_differentiable_flag_in_the_group(row: Row) -> None:
    """A checkpoint of a differentiable optimizer, loaded into an ordinary one."""
    twins = Twins(row, ORDINARY, **row.rich)
    for optimizer in twins.sides:
        optimizer.param_groups[0]["differentiable"] = True
    twins.run(3)


# Tensor subclasses.


class Logged(torch.Tensor):
    """A subclass that notes which functions are called on it."""

    calls: list[str] = []

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Note the call."""
        cls.calls.append(getattr(func, "__name__", str(func)))
        return super().__torch_function__(func, types, args, kwargs or {})


class Quiet(Parameter):
    """A subclass of Parameter that changes nothing."""


def test_subclass_with_torch_function(row: Row) -> None:
    """The functions of an unknown subclass are called as stock calls them."""
    twins = Twins(
        row,
        lambda: [torch.randn(131).as_subclass(Logged).requires_grad_(), *parameters((70,))()],
        **row.rich,
    )
    for _ in range(2):
        twins.grads(lambda p: torch.randn(p.shape))
        logs = []
        for optimizer in twins.sides:
            Logged.calls = []
            optimizer.step()
            logs.append([c for c in Logged.calls if c.endswith("_") and not c.endswith("__")])
        assert logs[0] == logs[1] and "add_" in logs[0]
        for p, q in twins.pairs():
            assert_equal(p.detach().as_subclass(torch.Tensor), q.detach().as_subclass(torch.Tensor))


def test_grad_of_a_subclass(row: Row) -> None:
    """An ordinary parameter with a grad of an unknown subclass."""
    twins = Twins(row, parameters((131,), (70,)), **row.rich)
    for _ in range(2):
        twins.grads()
        for optimizer in twins.sides:
            p = all_params(optimizer)[0]
            p.grad = p.grad.as_subclass(Logged)
        twins.step()
        for p, q in twins.pairs():
            assert_equal(p.detach(), q.detach())
            for name in row.states:
                mine, theirs = twins.ours.state[p][name], twins.stock.state[q][name]
                assert type(mine) is type(theirs)
                assert_equal(mine.as_subclass(torch.Tensor), theirs.as_subclass(torch.Tensor))


class Tagged(Quiet):
    """One that adds what no tensor has, and is made and shown in its own way."""

    loader: Any = None

    def __new__(cls, data: Tensor, tag: str = "") -> Any:
        """Make one with a tag."""
        made = super().__new__(cls, data)
        made.tag = tag
        return made

    def __repr__(self) -> str:
        """Show the tag."""
        return f"Tagged({self.tag!r})"

    def load(self, values: Tensor) -> None:
        """Take values."""
        self.data.copy_(values)


@pytest.mark.parametrize("kind", [Quiet, Tagged], ids=lambda c: c.__name__)
def test_subclass_of_parameter(row: Row, kind: type) -> None:
    """One that changes nothing of what a tensor does is taken by the kernels, while it is so."""
    mine: Any = type("Mine", (kind,), {})
    twins = Twins(row, lambda: [mine(torch.randn(131)), *parameters((70,))()], **row.rich)
    taken: list[Tensor] = []
    with recorded(taken):
        twins.run(3)
        assert not taken
        calls = []
        for name in ("add_", "addcdiv_", "__hash__"):  # of all rules' code, and of none
            was = getattr(Tensor, name)

            def noted(self: Tensor, *args: Any, was: Any = was, **kwargs: Any) -> Any:
                calls.append(was)
                return was(self, *args, **kwargs)

            setattr(mine, name, noted)
            twins.run(1)
            (strange,) = {*taken}
            assert type(strange) is mine
            taken.clear()
            delattr(mine, name)
            twins.run(1)
            assert not taken
    assert calls


def test_functions_of_a_subclass_of_parameter(row: Row) -> None:
    """Those that stock calls are called."""

    class Loud(Parameter):
        calls: list[str] = []

    for name in ("add_", "addcdiv_", "mul_", "data"):
        was: Any = getattr(Tensor, name)

        def noted(self: Tensor, *args: Any, was: Any = was, name: str = name, **more: Any) -> Any:
            Loud.calls.append(name)
            return was(self, *args, **more) if callable(was) else was.__get__(self)

        setattr(Loud, name, noted if callable(was) else property(noted))
    twins = Twins(row, lambda: [Loud(torch.randn(131)), *parameters((70,))()], **row.rich)
    twins.grads(lambda p: torch.randn(p.shape))
    calls = []
    for optimizer in twins.sides:
        Loud.calls.clear()
        optimizer.step()
        calls.append([*Loud.calls])
    assert calls[0] == calls[1] != []
    for p, q in twins.pairs():
        assert_equal(p.detach(), q.detach())


def test_wrapper_subclass(row: Row) -> None:
    """A subclass that holds other tensors and has no memory itself."""
    from torch.testing._internal.two_tensor import TwoTensor

    def build() -> list[Tensor]:
        pair = TwoTensor(torch.randn(33, 5), torch.randn(33, 5))
        return [Parameter(pair), *parameters((70,))()]

    for options in (row.plain, row.rich):
        twins = Twins(row, build, **options)
        for _ in range(3):

            def give(optimizer: Any) -> None:
                p, q = all_params(optimizer)
                p.grad = TwoTensor(torch.randn(33, 5), torch.randn(33, 5))
                q.grad = torch.randn(70)

            twins.each(give)
            twins.step()
            (p, r), (q, s) = (all_params(o) for o in twins.sides)
            assert_equal([p.a.detach(), p.b.detach()], [q.a.detach(), q.b.detach()])
            assert_equal(r.detach(), s.detach())


def test_lazy_module(row: Row) -> None:
    """Uninitialized parameters, materialized after the optimizer was made."""
    finals = []
    for cls in (row.ours, row.stock):
        torch.manual_seed(0)
        net = nn.Sequential(nn.LazyLinear(17), nn.LazyLinear(3))
        if row.eager:
            with pytest.raises(ValueError, match="uninitialized parameter"):
                cls(net.parameters())
            net(torch.ones(2, 5))
        optimizer = cls(net.parameters(), **row.rich)
        optimizer.step()
        optimizer.zero_grad()
        for _ in range(3):
            net(torch.ones(2, 5)).square().sum().backward()
            optimizer.step()
        finals.append([p.detach() for p in net.parameters()])
    assert_equal(*finals)


def test_masked_and_parametrized(row: Row) -> None:
    """Parametrizations (weight norm) give ordinary leaves: nothing special, but much used."""
    finals = []
    for cls in (row.ours, row.stock):
        torch.manual_seed(0)
        net = nn.utils.parametrizations.weight_norm(nn.Linear(17, 5))
        optimizer = cls(net.parameters(), **row.rich)
        for _ in range(3):
            optimizer.zero_grad()
            net(torch.ones(2, 17)).square().sum().backward()
            optimizer.step()
        finals.append([p.detach() for p in net.parameters()])
    assert_equal(*finals)


@pytest.mark.parametrize("where", ["parameter", "counter"])
def test_option_in_written_memory(row: Row, where: str) -> None:
    """An lr that the step itself changes is read when stock reads it."""
    if where == "counter" and not row.counts:
        pytest.skip("counts no steps")
    finals = []
    for cls, more in ((row.ours, {}), (row.stock, {"foreach": False})):
        params = [Parameter(torch.full((n,), 0.5)) for n in (33, 17)]
        optimizer = cls(params, **{**row.plain, **more})
        for step in range(3):
            for p in params:
                p.grad = torch.full_like(p, 2.0 + step)
            if step == 1:
                lr = params[0].detach()[3] if where == "parameter" else None
                optimizer.param_groups[0]["lr"] = (
                    optimizer.state[params[0]]["step"] if lr is None else lr
                )
            optimizer.step()
        finals.append([p.detach() for p in params])
    assert_equal(*finals)


# Both in one step.


def strange(kind: str) -> Callable[[], Tensor]:
    """Return a builder of a parameter that the fast path does not take."""
    return {
        "complex": lambda: Parameter(torch.randn(9, 5, dtype=torch.complex64)),
        "subclass": lambda: torch.randn(9, 5).as_subclass(Logged).requires_grad_(),
        "sparse grad": lambda: Parameter(torch.randn(9, 5)),
    }[kind]


@pytest.mark.parametrize(**flagged())
@pytest.mark.parametrize("kind", ["complex", "subclass", "sparse grad"])
def test_fast_and_fallback_in_one_optimizer(row: Row, kind: str, flags: Any) -> None:
    """Every parameter gets its step once, in groups and order of any kind; hooks run once."""
    if kind == "sparse grad" and not row.sparse:
        pytest.skip("stock takes no sparse grads here")
    options = row.sparse[1] if kind == "sparse grad" else row.rich

    def build() -> list[dict[str, Any]]:
        one, two, three = (parameters((70,), (33, 17))() for _ in range(3))
        return [
            {"params": [one[0], strange(kind)(), one[1]]},
            {"params": two, "lr": 0.02},
            {"params": [strange(kind)()], "lr": 0.03},
            {"params": [*three, strange(kind)()], "weight_decay": 0.0},
        ]

    twins = Twins(row, build, **options, **flags)
    calls = []
    twins.ours.register_step_post_hook(lambda *_: calls.append(1))

    def give(optimizer: Any) -> None:
        for p in all_params(optimizer):
            if kind == "sparse grad" and p.shape == (9, 5):
                p.grad = sparse_grad(p)
            else:
                p.grad = torch.randn(p.shape, dtype=p.dtype)

    for _ in range(3):
        twins.each(give)
        lists = [g["params"] for g in twins.ours.param_groups]
        twins.step()
        for p, q in twins.pairs():
            assert_equal(p.detach().as_subclass(torch.Tensor), q.detach().as_subclass(torch.Tensor))
        flag = {k: v for k, v in flags.items()}
        for group, params in zip(twins.ours.param_groups, lists, strict=True):
            assert group["params"] is params, "the user's list is put back"
            assert {k: group[k] for k in flag} == flag, "the user's flags are put back"
    assert len(calls) == 3


def test_fallback_that_raises_puts_everything_back(row: Row) -> None:
    """Flags and lists are restored when stock's code raises."""
    optimizer = row.ours(
        [Parameter(torch.randn(5)), Parameter(torch.randn(3, dtype=torch.complex64))],
        **row.rich,
        **row.fused,
    )
    group = optimizer.param_groups[0]
    flags = {k: group.get(k) for k in ("fused", "foreach")}
    params = group["params"]
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.step()
    optimizer.state[params[1]][row.states[0]] = torch.ones(2, dtype=torch.complex64)
    with pytest.raises(RuntimeError):
        optimizer.step()
    assert group["params"] is params and {k: group.get(k) for k in flags} == flags


@pytest.mark.parametrize("extras", [{}, {"max_grad_norm": 1.0, "ema_decay": 0.5}], ids=str)
@pytest.mark.parametrize("alone", [False, True])
def test_nobody_sees_a_part(row: Row, extras: dict[str, Any], alone: bool) -> None:
    """While torch's code steps its part, or all, the optimizer looks as it did before."""
    watched = Watched(torch.randn(9))
    others = [Watched(torch.randn(5))] if alone else parameters((33,), (5, 7))()
    params: list[Tensor] = [*others, watched]
    optimizer = row.ours(
        [{"params": params[:1]}, {"params": params[1:]}],
        **row.rich,
        **({"foreach": True} if alone else row.fused),
        **extras,
    )

    def seen() -> Any:
        groups = [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups]
        saved = [group["params"] for group in optimizer.state_dict()["param_groups"]]
        return [optimizer.max_grad_norm, all_params(optimizer), groups, saved]

    before, looks = seen(), []

    def look() -> None:
        watched.on_write = None
        looks.append(seen())
        optimizer.max_grad_norm = 7.0
        watched.on_write = look

    for p in params:
        p.grad = torch.ones(p.shape)
    watched.on_write = look
    optimizer.step()
    assert looks and optimizer.max_grad_norm == 7.0
    for each in looks:
        assert all(p is q for p, q in zip(each[1], before[1], strict=True))
        assert each[2:] == before[2:] and each[0] in (before[0], 7.0)


def test_averages_put_in_place_in_torchs_part(row: Row) -> None:
    """The kernels do not step averages, whoever put them there meanwhile."""
    p, watched = Parameter(torch.ones(5)), Watched(torch.ones(3))
    optimizer = row.ours([p, watched], **row.rich, max_grad_norm=1.0, ema_decay=0.5)
    for _ in range(2):
        p.grad, watched.grad = torch.ones(5), torch.ones(3)
        optimizer.step()
    block, before = optimizer.ema_weights(), p.detach().clone()

    watched.once("on_write", block.__enter__)
    with pytest.raises(RuntimeError, match=r"step\(\) inside ema_weights\(\)"):
        optimizer.step()
    block.__exit__(None, None, None)
    assert_equal(p.detach(), before)


class Answers(Tensor):
    """A tensor that answers even what its layout is by Python code."""

    asked = 0

    @staticmethod
    def __new__(cls, like: Tensor) -> Answers:
        """Wrap nothing."""
        return Tensor._make_wrapper_subclass(
            cls, like.shape, dtype=like.dtype, dispatch_layout=True
        )

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Count, and say nothing else."""
        cls.asked += 1
        return torch.strided


def test_no_python_code_while_a_step_is_planned(row: Row) -> None:
    """What is planned already would not be kept alive meanwhile."""
    params = parameters((3,), (3,))()
    optimizer = row.ours(params, **row.rich)
    params[0].grad, params[1].grad = torch.ones(3), Answers(torch.ones(3))
    Answers.asked = 0
    assert _C.step_or_route(optimizer) == []
    assert Answers.asked == 0


@pytest.mark.parametrize("extras", [{}, {"max_grad_norm": 1e9, "ema_decay": 0.5}], ids=str)
@pytest.mark.parametrize("foreign", [False, True])
@pytest.mark.parametrize("derived", [False, True])
def test_a_group_added_in_torchs_part(
    row: Row, extras: dict[str, Any], foreign: bool, derived: bool
) -> None:
    """It is stepped too, as stock's loop over the groups comes to it; once, in whoever's code."""
    twins = Twins(row, lambda: [*parameters((5,))(), Watched(torch.randn(9))], **row.rich)
    if derived:
        twins.ours.__class__ = type("Derived", (row.ours,), {})
    for name, value in extras.items():
        setattr(twins.ours, name, value)

    def add_group(optimizer: torch.optim.Optimizer) -> None:
        p = torch.randn(7, dtype=torch.complex64 if foreign else torch.float32)
        params = [Parameter(p), Parameter(torch.randn(3))]
        for p in params:
            p.grad = torch.ones_like(p)
        watched = all_params(optimizer)[1]
        watched.once("on_write", lambda: optimizer.add_param_group({"params": params}))

    twins.grads()
    twins.each(add_group)
    twins.step()
    assert len(twins.ours.param_groups) == 2
    for p, q in twins.pairs():
        assert_equal(p.detach(), q.detach())


@pytest.mark.parametrize("act", ["adds", "takes away"])
@pytest.mark.parametrize("derived", [False, True])
def test_groups_that_change_before_torch_takes_more(row: Row, act: str, derived: bool) -> None:
    """When the kernels ask for the gradient of one, which turns out to be torch's."""
    watched, first, more = Watched(torch.randn(9)), *parameters((5,), (3,))()
    cls = type("Derived", (row.ours,), {}) if derived else row.ours
    optimizer = cls([{"params": [watched]}, {"params": [first]}, {"params": [more]}], **row.rich)
    late = Parameter(torch.randn(2, dtype=torch.complex64))
    for p in (*all_params(optimizer), late):
        p.grad = torch.ones_like(p)
    before = {p: p.detach().clone() for p in all_params(optimizer)}
    written: list[int] = []

    def change() -> None:  # once torch's part is stepped
        if not written:
            return
        watched.on_grad = None
        if act == "adds":
            optimizer.add_param_group({"params": [late]})
        else:
            optimizer.param_groups.pop()
            optimizer.param_groups[1]["params"].append(late)

    watched.once("on_write", lambda: written.append(1))
    watched.on_grad = change
    optimizer.step()
    assert written and watched.on_grad is None
    assert not torch.equal(first, before[first]) and not torch.equal(watched, before[watched])
    assert torch.equal(more, before[more]) == (act == "takes away")
    assert late in optimizer.state or not row.states


def test_a_group_taken_away_in_torchs_part(row: Row) -> None:
    """Each of the others is stepped once, wherever it stands then."""
    groups = [[Watched(torch.randn(9))], parameters((5,))(), [*parameters((3,), (4,))()]]
    groups[2].append(Watched(torch.randn(2)))
    params = [p for group in groups for p in group]
    optimizer = row.ours([{"params": group} for group in groups], **row.rich)
    stock = row.stock([{"params": [Parameter(p.detach().clone())]} for p in params], **row.rich)
    for p, q in zip(params, all_params(stock), strict=True):
        p.grad = torch.randn(p.shape)
        q.grad = p.grad.clone()
    gone, kept = params[1], [p for p in params if p is not params[1]]
    gone_was = gone.detach().clone()
    groups[0][0].once("on_write", lambda: optimizer.param_groups.pop(1))
    optimizer.step()
    stock.step()
    assert all_params(optimizer) == kept and torch.equal(gone, gone_was)
    for p, q in zip(params, all_params(stock), strict=True):
        if p is not gone:
            assert_equal(p.detach(), q.detach())


@pytest.mark.parametrize("whose", ["class", "object", "ruled", "behind"])
def test_parameters_gathered_by_an_own_method(row: Row, whose: str) -> None:
    """Stock's step asks `_init_group` for gradients, which may then be others."""

    def centred(init_group: Any) -> Any:
        def centre(*arguments: Any) -> Any:  # of a group, then its parameters and gradients
            result = init_group(*arguments)
            grads = arguments[2 + (whose != "object")]
            grads[:] = [grad - grad.mean() for grad in grads]
            return result

        return centre

    def derive(base: Any) -> type:
        own = {"_init_group": centred(base._init_group)}
        if whose == "behind":  # of a base after ours, and before stock's
            behind = type("Own", (row.stock,), own)
            return type("Derived", (base, behind), {}) if base is row.ours else behind
        if whose == "object":
            own.clear()
        if whose == "ruled" and base is row.ours:
            own["_rule"] = base._rule
        return type("Derived", (base,), own)

    twins = Twins(row.derived(derive), ORDINARY, **row.rich)
    if whose == "object":
        for optimizer in twins.sides:
            optimizer._init_group = centred(optimizer._init_group)  # type: ignore[attr-defined]
    twins.run(3)


BEYOND: dict[str, dict[str, Any]] = {
    "lr of halves": {"lr": 1e5},
    "decay of halves": {"weight_decay": 1e5},
    "lr of bfloat16": {"lr": 3.395e38},
    "lr": {"lr": 1e39},
    "negative": {"lr": -1e39},
    "tensor": {"lr": torch.tensor(1e39, dtype=torch.float64)},
    "weight_decay": {"weight_decay": 1e39},
    "eps": {"eps": 1e39},
    "bias": {"lr": 1e38, "betas": (0.999, 0.999)},
    "infinity": {"lr": torch.inf},
}


@pytest.mark.parametrize("edit", BEYOND.values(), ids=BEYOND)
@pytest.mark.parametrize(
    ("dtype", "steps"),
    [(torch.float32, 0), (torch.float32, 1), (torch.bfloat16, 0), (torch.float16, 0)],
    ids=str,
)
def test_scalars_beyond_a_dtype(row: Row, dtype: torch.dtype, steps: int, edit: Any) -> None:
    """Some of torch's operators refuse what would be infinite in the dtype, and others do not."""
    twins = Twins(row, parameters((5,), (70,), dtype=dtype), lr=0.5)
    doubles = Twins(row, parameters((33,), dtype=torch.float64), lr=0.5)
    if not edit.keys() <= twins.ours.defaults.keys():
        pytest.skip(f"{row} has no such option")
    if dtype == torch.bfloat16 and 1e5 in edit.values():
        pytest.skip("bfloat16 holds it, and the kernels round once")
    for each in (twins, doubles):
        each.grads(torch.ones_like)
        for _ in range(steps):
            each.step()
        for optimizer in each.sides:
            optimizer.param_groups[0].update(copy.deepcopy(edit))
    twins.step_if_allowed(halfway=True)
    for p, q in twins.pairs():
        assert_equal(p.detach(), q.detach())
    assert _C.step_or_route(doubles.ours) is None
    doubles.stock.step()
    doubles.check()


def test_what_a_step_sets_stays(row: Row) -> None:
    """What an own `_init_group` sets, in slots too; and nothing ends with torch's part."""
    ends = []

    class Own(row.ours):  # type: ignore[misc, name-defined]
        __slots__ = ("parts",)

        def _init_group(self, group: Any, *rest: Any) -> Any:
            self.parts = getattr(self, "parts", 0) + 1
            group["seen"] = group.get("seen", 0) + 1
            return super()._init_group(group, *rest)

        def __del__(self) -> None:
            ends.append(1)

    params = [*parameters((5,))(), Parameter(torch.randn(3, dtype=torch.complex64))]
    optimizer = Own(params, **row.rich)
    for _ in range(2):
        for p in params:
            p.grad = torch.ones_like(p)
        optimizer.step()
    assert optimizer.parts == 2 and optimizer.param_groups[0]["seen"] == 2 and not ends
    del optimizer
    gc.collect()
    assert ends == [1]


def test_fallback_with_a_scaler(row: Row) -> None:
    """A fused optimizer with a complex parameter under GradScaler's attributes."""
    twins = Twins(
        row,
        lambda: [Parameter(torch.randn(9, dtype=torch.complex64)), *parameters((70,))()],
        **row.rich,
        **row.fused,
    )
    for found_inf in (1.0, 0.0, 0.0):
        twins.grads(lambda p: torch.randn(p.shape, dtype=p.dtype))
        for p in all_params(twins.ours):
            p.grad *= 4.0
        twins.ours.grad_scale = torch.tensor(4.0)
        twins.ours.found_inf = torch.tensor(found_inf)
        twins.ours.step()
        assert twins.ours.grad_scale == 4.0 and twins.ours.found_inf == found_inf
        if not found_inf:
            twins.stock.step()
            for p, q in twins.pairs():
                assert_equal(p.detach(), q.detach())


def in_inference_mode(values: Tensor) -> Tensor:
    with torch.inference_mode():
        return values.clone()


@pytest.mark.parametrize("steps", [0, 2])
@pytest.mark.parametrize(
    ("bad", "says"),
    [(lambda g: g[:1].expand(g.shape), "expanded"), (in_inference_mode, "inference tensor")],
    ids=["expanded", "inference"],
)
@pytest.mark.parametrize("share", [False, True])
def test_grads_that_cannot_be_unscaled(
    row: Row, bad: Any, says: str, share: bool, steps: int
) -> None:
    """The step of a fused optimizer divides all of them by the scale, or none."""
    params = [Parameter(torch.randn(9)), *parameters((70,), (9,))()]
    kinds: list[Any] = [p if share else p.detach().as_subclass(Logged) for p in params]
    params = [kind.requires_grad_() for kind in kinds]
    if share:
        params[2].data = params[0].data
    optimizer = row.ours(params, **row.rich, **row.fused)
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(4.0), torch.tensor(0.0)
    for _ in range(steps):
        for p in params:
            p.grad = torch.randn(p.shape)
        optimizer.step()
    for p in params:
        p.grad = torch.randn(p.shape)
    params[2].grad = bad(params[2].grad)
    before = Snapshot(optimizer)
    with pytest.raises(RuntimeError, match=says):
        optimizer.step()
    before.assert_unchanged()


def test_copies_of_strange_optimizers(row: Row) -> None:
    """Deepcopy of a mixed optimizer."""
    twins = Twins(row, lambda: [strange("complex")(), *parameters((70,))()], **row.rich)

    def give(optimizer: Any) -> None:
        for p in all_params(optimizer):
            p.grad = torch.randn(p.shape, dtype=p.dtype)

    for _ in range(3):
        twins.ours = copy.deepcopy(twins.ours)
        twins.each(give)
        twins.step()
        twins.check()


@pytest.mark.parametrize("complex_first", [False, True])
def test_memory_shared_by_a_complex_and_a_real_parameter(row: Row, complex_first: bool) -> None:
    """One of two parameters over the same memory is for stock: then both are, in stock's order."""

    def params() -> list[torch.Tensor]:
        z = Parameter(torch.randn(131, dtype=torch.complex64))
        real = torch.view_as_real(z.detach()).requires_grad_()
        return [z, real] if complex_first else [real, z]

    twins = Twins(row, params, **{**row.rich, "weight_decay": 0.1})
    for _ in range(3):
        twins.grads(lambda p: torch.randn_like(p.detach()))
        twins.step()
        twins.check()


def test_memory_shared_with_a_parameter_of_a_subclass(row: Row) -> None:
    """A subclass is for stock; what shares its memory is too, in stock's order."""

    def params() -> list[torch.Tensor]:
        a = Parameter(torch.randn(64))
        return [a, a.detach().view(64).as_subclass(Logged).requires_grad_()]

    twins = Twins(row, params, **{**row.rich, "weight_decay": 0.1})
    for _ in range(3):
        twins.grads(lambda p: torch.randn(64))
        for optimizer in twins.sides:
            optimizer.step()
        ours, stock = (all_params(side)[0].detach() for side in twins.sides)
        assert_equal(ours, stock)


def test_memory_shared_with_a_state_of_a_subclass(row: Row) -> None:
    """A state of a subclass takes its parameter to stock, and what shares its memory too."""
    twins = Twins(row, lambda: [Parameter(5 + torch.rand(64)) for _ in range(2)], **row.rich).run(1)
    for optimizer in twins.sides:
        p, q = all_params(optimizer)
        optimizer.state[q][row.states[0]] = p.detach().as_subclass(Logged)
    twins.grads()
    twins.step()
    for mine, theirs in twins.pairs():
        assert_equal(mine.detach(), theirs.detach())


@pytest.mark.parametrize("extras", [{}, {"max_grad_norm": 1e6, "ema_decay": 0.9}], ids=str)
def test_views_of_one_buffer(row: Row, extras: dict[str, Any]) -> None:
    """Neighbours in one memory do not share it: stock takes the one of a subclass alone."""

    def params() -> list[torch.Tensor]:
        views = list(torch.randn(5 * 67).split(67))
        views[2] = views[2].as_subclass(Logged)
        return [view.requires_grad_() for view in views]

    twins = Twins(row, params, **{**row.rich, "weight_decay": 0.1})
    for name, value in extras.items():
        setattr(twins.ours, name, value)
    for step in range(3):
        for optimizer in twins.sides:
            buffer = torch.linspace(-step - 1, 2, 5 * 67)
            for p, grad in zip(all_params(optimizer), buffer.split(67), strict=True):
                p.grad = grad
        taken: list[Tensor] = []
        with recorded(taken):
            twins.step()
        assert [type(p) for p in taken] == [Logged]
        for p, q in twins.pairs():
            assert_equal(p.detach().as_subclass(torch.Tensor), q.detach().as_subclass(torch.Tensor))


def tied(params: list[Tensor]) -> list[int]:
    params[4].data = params[1].data
    return [1, 4]


def interleaved(params: list[Tensor]) -> list[int]:
    columns = torch.randn(67, 4)
    params[0].data, params[5].data = columns[:, :2], columns[:, 2:]
    return [0, 5]


def partly(params: list[Tensor]) -> list[int]:
    memory = torch.randn(150)
    for i in (5, 2, 3):
        params[i].data = memory[20 * i : 20 * i + 67]
    return [2, 3, 5]


def named_twice(params: list[Tensor]) -> list[int]:
    params.insert(3, params[1])
    return [1, 3]


@pytest.mark.filterwarnings("ignore:optimizer contains a parameter group with duplicate")
@pytest.mark.parametrize("extras", [{}, {"max_grad_norm": 1e6, "ema_decay": 0.9}], ids=str)
@pytest.mark.parametrize(
    "share", [tied, interleaved, partly, named_twice], ids=lambda f: f.__name__
)
def test_few_of_many_share_memory(row: Row, share: Any, extras: dict[str, Any]) -> None:
    """They are for stock, which knows their order; the others are not, and none once they part."""
    if share is named_twice and extras:
        pytest.skip("which has one average, of the second step: test_averages")
    sharing: list[int] = []

    def params() -> list[torch.Tensor]:
        made = [Parameter(torch.randn(67)) for _ in range(6)]
        sharing[:] = share(made)
        return made

    def groups() -> list[dict[str, Any]]:
        made = params()
        return [{"params": made[:3]}, {"params": made[3:], "lr": 0.03}]

    build = params if share is named_twice else groups
    twins = Twins(row, build, **{**row.rich, "weight_decay": 0.1})
    for name, value in extras.items():
        setattr(twins.ours, name, value)
    taken: list[Tensor] = []

    def check() -> None:
        for p, q in twins.pairs():
            assert_equal(p.detach(), q.detach())
        if not extras:
            twins.check()

    with recorded(taken):
        for step in range(4):
            taken.clear()
            twins.grads()
            twins.step()
            check()
            numbers = {
                i for i, p in enumerate(all_params(twins.ours)) if any(p is q for q in taken)
            }
            in_order = step and not row.counts and not extras
            assert numbers == (set() if in_order else {*sharing})
        if share is named_twice:
            return
        for optimizer in twins.sides:
            for p in all_params(optimizer):
                p.data = p.data.clone()
        taken.clear()
        twins.grads()
        twins.step()
        check()
        assert not taken


def test_memory_hidden_in_a_wrapper(row: Row) -> None:
    """A parameter whose inner tensors share memory with an ordinary one: stock's order."""
    finals = []
    for cls, options in ((row.ours, {}), (row.stock, {"foreach": False})):
        memory = torch.linspace(1, 2, 131)
        plain = Parameter(memory)
        wrapper = Parameter(TwoTensor(memory.clone(), memory.clone()))
        optimizer = cls([wrapper, plain], **row.plain, **options)
        for _ in range(2):
            wrapper.grad = TwoTensor(plain.detach(), plain.detach())
            plain.grad = torch.ones(131)
            optimizer.step()
        finals.append([plain.detach(), wrapper.detach().a, wrapper.detach().b])
    assert_equal(*finals)


class Odd(float):
    """A number with arithmetic of its own."""

    def __neg__(self) -> float:
        """Say something else than minus."""
        return -2 * float(self)

    def __rsub__(self, other: float) -> float:
        """Likewise."""
        return other - 2 * float(self)


def test_number_with_arithmetic_of_its_own(row: Row) -> None:
    """Stock computes with it, so stock steps."""
    for name in ("lr", "weight_decay"):
        twins = Twins(row, parameters((131,)), **row.rich)
        for optimizer in twins.sides:
            optimizer.param_groups[0][name] = Odd(0.05)
        for _ in range(2):
            twins.grads()
            twins.step()
            twins.check()
