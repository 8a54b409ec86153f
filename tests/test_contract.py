"""What users do around an optimizer: averaging, clipping, momentum cycles, sharing, deriving."""

from __future__ import annotations

import ctypes
import inspect
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import isolated
import pytest
import torch
import torch._dynamo
from cases import EXACT, OPTIMIZERS, ORDINARY_SHAPES, Row
from oracle import all_params, assert_equal
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn import Parameter
from torch.optim import swa_utils
from torch.optim.lr_scheduler import CyclicLR, OneCycleLR
from twins import ORDINARY, Twins, parameters


def options_of(row: Row) -> set[str]:
    """Return the names that the constructor takes."""
    return set(inspect.signature(row.stock).parameters)


def network() -> nn.Module:
    """Return a network with a batch norm, whose widths straddle registers."""
    return nn.Sequential(nn.Linear(9, 33), nn.BatchNorm1d(33), nn.Tanh(), nn.Linear(33, 5))


class Trainings:
    """A network and an optimizer for each side, trained on the same batches."""

    def __init__(self, row: Row, **options: Any) -> None:
        """Build both."""
        self.nets: list[nn.Module] = []
        for _ in range(2):
            torch.manual_seed(5)
            self.nets.append(network())
        params = [list(net.parameters()) for net in self.nets]
        stock = row.stock(params[1], foreach=False, **options)
        self.optimizers = (row.ours(params[0], **options), stock)
        self.batches = 0

    def backward(self) -> None:
        """Give grads of the next batch."""
        self.batches += 1
        for net, optimizer in zip(self.nets, self.optimizers, strict=True):
            torch.manual_seed(self.batches)
            optimizer.zero_grad()
            net(torch.randn(16, 9)).square().sum().backward()

    def step(self) -> None:
        """Step both."""
        for optimizer in self.optimizers:
            optimizer.step()

    def check(self) -> None:
        """Networks and states are equal."""
        assert_equal(*(list(net.state_dict().values()) for net in self.nets))
        states = [[list(s.values()) for s in o.state.values()] for o in self.optimizers]
        assert_equal(*states)


# The classes.


def test_relations_of_classes() -> None:
    """Each of ours is what its stock class is, and no stock class is one of ours."""
    for one in OPTIMIZERS:
        for other in OPTIMIZERS:
            related = issubclass(one.stock, other.stock)
            assert issubclass(one.ours, other.stock) == related
            assert issubclass(one.ours, other.ours) == related
            assert not issubclass(one.stock, other.ours)
    names = {row.name for row in OPTIMIZERS}
    assert {"Adam", "AdamW"} <= names and len(names) == len(OPTIMIZERS)


@pytest.mark.parametrize("how", ["super", "base_by_name", "from_scratch"])
def test_subclass_with_its_own_constructor(row: Row, how: str) -> None:
    """Constructors that add a default, name their base, or start at ``Optimizer``."""
    if how == "from_scratch" and row.name == "Adagrad":
        pytest.skip("its states are made by its constructor")
    common = dict(row.stock(ORDINARY(), **row.rich).defaults)

    def derive(base: type) -> type:
        class Derived(base):
            def __init__(self, params: Any, **options: Any) -> None:
                if how == "super":
                    super().__init__(params, **options)
                elif how == "base_by_name":
                    base.__init__(self, params, **options)
                else:
                    defaults = {**common, **options}
                    torch.optim.Optimizer.__init__(self, params, defaults)
                self.defaults["extra"] = 3

        return Derived

    derived = Row(row.name, derive(row.ours), derive(row.stock), (), {}, row.rich, row.states)
    twins = Twins(derived, ORDINARY, **row.rich).run(2)
    for optimizer in twins.sides:
        optimizer.add_param_group({"params": [Parameter(torch.ones(37))]})
        assert optimizer.param_groups[-1]["extra"] == 3
    twins.run(2)


def test_missing_option(row: Row) -> None:
    """A group that lost an option: as in stock, an error before anything moved, or no matter."""
    for key in row.stock(ORDINARY(), **row.rich).defaults:
        twins = Twins(row, ORDINARY, **row.rich).run(1)
        twins.grads()
        outcomes = []
        for optimizer in twins.sides:
            del optimizer.param_groups[0][key]
            try:
                optimizer.step()
                outcomes.append("stepped")
            except Exception as refused:  # noqa: BLE001
                outcomes.append(type(refused).__name__)
        if key not in ("foreach", "fused", "capturable", "differentiable"):
            assert outcomes[0] == outcomes[1], (key, outcomes)
        if outcomes == ["stepped"] * 2:
            for p, q in twins.pairs():
                assert_equal(p.detach(), q.detach())


# Averages, clipping, schedules.


@pytest.mark.parametrize("average", ["swa", "ema", "ema_of_buffers"])
def test_averaged_model(row: Row, average: str) -> None:
    """``AveragedModel`` and ``SWALR`` over trained weights, and ``update_bn`` after them."""
    both = Trainings(row, **row.rich)
    options: dict[str, Any] = {}
    if average != "swa":
        options = {"multi_avg_fn": swa_utils.get_ema_multi_avg_fn(0.7)}
        options["use_buffers"] = average == "ema_of_buffers"
    averages = [swa_utils.AveragedModel(net, **options) for net in both.nets]
    rates = [swa_utils.SWALR(o, swa_lr=0.5, anneal_epochs=3) for o in both.optimizers]
    for step in range(6):
        both.backward()
        both.step()
        both.check()
        for averaged, net, rate in zip(averages, both.nets, rates, strict=True):
            if step > 1:
                averaged.update_parameters(net)
            rate.step()
    for averaged in averages:
        torch.manual_seed(9)
        swa_utils.update_bn([torch.randn(16, 9)], averaged)
    assert_equal(*(list(averaged.state_dict().values()) for averaged in averages))
    assert not torch.equal(next(averages[0].parameters()), next(both.nets[0].parameters()))


CLIPS: dict[str, Callable[[list[Tensor]], Any]] = {
    "norm": lambda ps: nn.utils.clip_grad_norm_(ps, 0.1),
    "norm_foreach": lambda ps: nn.utils.clip_grad_norm_(ps, 0.1, foreach=True),
    "norm_inf": lambda ps: nn.utils.clip_grad_norm_(ps, 0.1, norm_type=float("inf")),
    "value": lambda ps: nn.utils.clip_grad_value_(ps, 0.01),
    "value_foreach": lambda ps: nn.utils.clip_grad_value_(ps, 0.01, foreach=True),
}


@pytest.mark.parametrize("clip", CLIPS)
def test_clipped_grads(row: Row, clip: str) -> None:
    """Clipping writes into the grads in place, and the next step sees it."""
    both = Trainings(row, **row.rich)
    for _ in range(4):
        both.backward()
        before = [p.grad.clone() for p in both.nets[0].parameters()]
        for net in both.nets:
            CLIPS[clip](list(net.parameters()))
        grads = [p.grad for p in both.nets[0].parameters()]
        assert any(not torch.equal(b, g) for b, g in zip(before, grads, strict=True))
        both.step()
        both.check()


@pytest.mark.parametrize("kind", ["CyclicLR", "OneCycleLR"])
@pytest.mark.parametrize("low", [0.0, 0.8])
def test_cycles_of_momentum(row: Row, kind: str, low: float) -> None:
    """A schedule of the momentum, or of the first beta, that also passes through 0."""
    defaults = row.stock(ORDINARY(), **row.rich).defaults
    if "momentum" not in defaults and "betas" not in defaults:
        pytest.skip("no momentum to cycle")
    range_of = {"base_momentum": low, "max_momentum": 0.9, "cycle_momentum": True}

    def schedule(optimizer: Any) -> Any:
        if kind == "CyclicLR":
            return CyclicLR(optimizer, 0.01, 0.2, step_size_up=2, **range_of)
        return OneCycleLR(optimizer, 0.2, total_steps=8, pct_start=0.5, **range_of)

    twins = Twins(row, ORDINARY, **row.rich)
    schedulers = [schedule(optimizer) for optimizer in twins.sides]
    seen = set()
    for _ in range(7):
        twins.run(1)
        for scheduler in schedulers:
            scheduler.step()
        group = twins.ours.param_groups[0]
        seen.add(group["betas"][0] if "betas" in group else group["momentum"])
    assert len(seen) >= 3 and min(seen) < low + 1e-9


@pytest.mark.parametrize("flags", [{}, {"fused": True}], ids=str)
@pytest.mark.parametrize("unscale", [False, True])
def test_skipped_steps_touch_nothing(row: Row, flags: dict[str, Any], unscale: bool) -> None:
    """An overflow, and one after it, leave parameters, every state and their tensors alone."""
    if not flags.keys() <= options_of(row):
        pytest.skip("stock has no such flag")
    for warm in (0, 2):
        optimizer = row.ours(ORDINARY(), **row.rich, **flags)
        scaler = torch.amp.GradScaler("cpu", init_scale=4.0)

        def attempt(overflow: bool, optimizer: Any = optimizer, scaler: Any = scaler) -> None:
            optimizer.zero_grad()
            for p in all_params(optimizer):
                p.grad = scaler.scale(torch.randn(p.shape))
            if overflow:
                all_params(optimizer)[1].grad[3] = float("inf")
            if unscale:
                scaler.unscale_(optimizer)
            scaler.step(optimizer)
            scaler.update()

        for _ in range(warm):
            attempt(False)
        before = picture(optimizer)
        for _ in range(2):
            attempt(True)
            after = picture(optimizer)
            if not warm:  # stock's fused steps make states that hold nothing yet
                after = {k: v for k, v in after.items() if k in before or any(map(bool, v[1:]))}
            assert after == before
        attempt(False)
        for state in optimizer.state.values():
            assert "step" not in state or state["step"].item() == warm + 1


def picture(optimizer: torch.optim.Optimizer) -> dict[Any, tuple[Any, ...]]:
    """Return the identity and the values of every parameter and state."""
    found = {}
    for i, p in enumerate(all_params(optimizer)):
        found[i] = (id(p), *p.detach().flatten().tolist())
        for key, value in optimizer.state.get(p, {}).items():
            if isinstance(value, Tensor):
                found[i, key] = (id(value), *value.flatten().tolist())
    return found


# Global settings and modes.


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_default_dtype_that_changes(row: Row, dtype: torch.dtype) -> None:
    """The counter of steps has the dtype that stock's has, made before or after the change."""
    twins = Twins(row, ORDINARY, **row.rich)
    late = all_params(twins.ours)[0].shape
    twins.grads(lambda p: None if p.shape == late else torch.randn(p.shape, dtype=torch.float32))
    twins.step()
    torch.set_default_dtype(dtype)
    twins.run(2)
    torch.set_default_dtype(torch.float32)
    twins.run(2)


@pytest.mark.parametrize("first", ["inference", "no_grad", "plain"])
@pytest.mark.parametrize("then", ["inference", "no_grad", "plain"])
@pytest.mark.parametrize("dtype", EXACT, ids=str)
def test_modes_that_change(row: Row, first: str, then: str, dtype: torch.dtype) -> None:
    """States made under one mode and stepped under another: stock's result, or its refusal."""
    modes = {"inference": torch.inference_mode, "no_grad": torch.no_grad, "plain": nullcontext}
    twins = Twins(row, parameters(*ORDINARY_SHAPES, dtype=dtype), **row.rich)
    for mode in (first, then):
        outcomes = []
        twins.grads()
        for optimizer in twins.sides:
            with modes[mode]():
                try:
                    optimizer.step()
                    outcomes.append("stepped")
                except RuntimeError:
                    outcomes.append("refused")
        assert outcomes[0] == outcomes[1]
        if outcomes[0] == "refused":
            return
        twins.check()


@pytest.mark.parametrize("swap", [False, True])
def test_model_converted_with_its_parameters_kept(row: Row, swap: bool) -> None:
    """``net.double()``, by new data or by ``swap_tensors``; states follow by a checkpoint."""
    both = Trainings(row, **row.rich)
    torch.__future__.set_swap_module_params_on_conversion(swap)
    try:
        both.backward()
        both.step()
        for net, optimizer in zip(both.nets, both.optimizers, strict=True):
            optimizer.zero_grad()
            net.double()
            optimizer.load_state_dict(optimizer.state_dict())
        torch.set_default_dtype(torch.float64)
        for _ in range(3):
            both.backward()
            both.step()
            both.check()
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
    assert next(both.nets[0].parameters()).dtype == torch.float64


def test_forward_mode(row: Row) -> None:
    """Inside a level of forward-mode AD a grad's tangent goes into the parameter, as in stock."""
    tangents = []
    for cls, more in ((row.ours, {}), (row.stock, {"foreach": False})):
        p = Parameter(torch.full((33,), 0.5))
        optimizer = cls([p], **row.plain, **more)
        with forward_ad.dual_level():
            p.grad = forward_ad.make_dual(torch.full((33,), 3.0), torch.full((33,), 2.0))
            optimizer.step()
            tangents.append(forward_ad.unpack_dual(p).tangent)
    assert_equal(*tangents)


# Files and other processes.


def test_mapped_checkpoint(row: Row, tmp_path: Path) -> None:
    """Parameters and states mapped from a file are stepped in memory; the file stays as it is."""
    both = Trainings(row, **row.rich)
    for _ in range(2):
        both.backward()
        both.step()
    sides = list(zip(both.nets, both.optimizers, strict=True))
    file = tmp_path / "checkpoint.pt"
    torch.save([(net.state_dict(), optimizer.state_dict()) for net, optimizer in sides], file)
    before = file.read_bytes()
    loaded = torch.load(file, mmap=True, weights_only=True)
    both = Trainings(row, **row.rich)
    for net, optimizer, (weights, states) in zip(both.nets, both.optimizers, loaded, strict=True):
        net.load_state_dict(weights, assign=True)
        optimizer.param_groups[0]["params"][:] = net.parameters()
        optimizer.state.clear()
        optimizer.load_state_dict(states)
    for _ in range(2):
        both.backward()
        both.step()
        both.check()
    assert file.read_bytes() == before


def test_shared_by_its_own_method(row: Row) -> None:
    """``share_memory()``, where stock has it (Adagrad): the states are shared and stay so."""
    if not hasattr(row.stock, "share_memory"):
        pytest.skip("stock has no such method")
    twins = Twins(row, ORDINARY, **row.rich)
    for optimizer in twins.sides:
        optimizer.share_memory()
    twins.run(3)
    for state in twins.ours.state.values():
        assert all(state[name].is_shared() for name in row.states)


def test_stepped_by_another_process() -> None:
    """Parameters, grads and states in shared memory, stepped there by each process in turn."""
    isolated.run(
        """
        import torch
        from torch import multiprocessing
        from cases import OPTIMIZERS
        from oracle import all_params, exact_roots
        from twins import Twins, parameters

        def steps(optimizer, count):
            with exact_roots():
                for _ in range(count):
                    optimizer.step()

        for row in OPTIMIZERS:
            twins = Twins(row, parameters((33, 17), (70,)), **row.rich)
            twins.grads()
            for optimizer in twins.sides:
                steps(optimizer, 1)
            for p in all_params(twins.ours):
                for tensor in (p, p.grad, *twins.ours.state[p].values()):
                    tensor.share_memory_()
            steps(twins.ours, 1)
            child = multiprocessing.get_context("fork").Process(target=steps, args=(twins.ours, 2))
            child.start()
            child.join()
            assert child.exitcode == 0, row
            steps(twins.ours, 1)
            steps(twins.stock, 4)
            twins.check()
        """
    )


def test_optimizers_applied_in_backward(row: Row) -> None:
    """Torch's helper that steps each parameter as soon as its grad is there."""
    if not torch.distributed.is_available():
        pytest.skip("torch was built without distributed")
    from torch.distributed.optim import _apply_optimizer_in_backward

    finals = []
    for cls, more in ((row.ours, {}), (row.stock, {"foreach": False})):
        torch.manual_seed(3)
        net = network()
        _apply_optimizer_in_backward(cls, net.parameters(), {**row.rich, **more})
        for _ in range(3):
            net(torch.randn(16, 9)).square().sum().backward()
            assert all(p.grad is None for p in net.parameters())
        finals.append(list(net.state_dict().values()))
    assert_equal(*finals)


# Compilation.


def test_graphs_of_a_compiled_function(row: Row) -> None:
    """A function that steps between two computations breaks no more than with stock.

    Stock's step is a graph of its own there, in which Adam computes its corrections in single
    precision. Ours is left to the kernels, so the numbers are those of stock uncompiled.
    """
    found, results = [], []
    stock = (row.stock, {"foreach": False})
    for (cls, more), backend in (((row.ours, {}), "eager"), (stock, "eager"), (stock, None)):
        torch.manual_seed(1)
        net = nn.Linear(33, 17)
        optimizer = cls(net.parameters(), **row.rich, **more)

        def train(x: Tensor, net: Any = net, optimizer: Any = optimizer) -> Tensor:
            loss = net(x).square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            return net(x).sum() + loss

        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        run = train if backend is None else torch.compile(train, backend=backend)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            results.append([run(torch.full((5, 33), 0.1 * step)) for step in range(4)])
        counters = torch._dynamo.utils.counters
        found.append((sum(counters["graph_break"].values()), counters["stats"]["unique_graphs"]))
    torch._dynamo.reset()
    assert found[0][0] <= found[1][0] and 0 < found[0][1] <= found[1][1], found
    assert_equal(results[0], results[2])


# Memory.


def test_thousands_of_optimizers(row: Row) -> None:
    """Making, stepping, copying, failing and dropping optimizers holds no object of any kind.

    Torch itself holds a few bytes more for a while, so that the least of several growths counts.
    """
    if not hasattr(ctypes.CDLL(None), "mallinfo2"):
        pytest.skip("the C library does not say how much is in use")
    out = isolated.run(
        f"""
        import copy, ctypes, gc
        import torch
        from cases import OPTIMIZERS

        class Use(ctypes.Structure):
            names = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost"
            _fields_ = [(name, ctypes.c_size_t) for name in names.split()]

        mallinfo = ctypes.CDLL(None).mallinfo2
        mallinfo.restype = Use

        def in_use():
            gc.collect()
            use = mallinfo()
            return use.uordblks + use.hblkhd

        row = OPTIMIZERS[{OPTIMIZERS.index(row)}]

        def live():
            params = [torch.nn.Parameter(torch.ones(n)) for n in (1, 7, 33)]
            optimizer = row.ours(params, **row.rich)
            for _ in range(3):
                for p in params:
                    p.grad = torch.ones_like(p)
                optimizer.step()
                optimizer.step(lambda: 1)
                optimizer.zero_grad()
            row.ours(params, **row.rich).load_state_dict(optimizer.state_dict())
            copy.deepcopy(optimizer)
            params[0].grad = torch.ones(1)
            params[0].grad.data = torch.ones(2)
            try:
                optimizer.step()
            except RuntimeError:
                return
            raise AssertionError("a grad of another shape was taken")

        def uses(count):
            for _ in range(count):
                live()
            return in_use()

        uses(600)
        trail = [uses(300) for _ in range(5)]
        print(min(after - before for before, after in zip(trail, trail[1:])))
        """,
        env={"PYTHONMALLOC": "malloc", "OMP_NUM_THREADS": "1"},
    )
    assert int(out) < 300 * 40, "more than 40 bytes an optimizer are held"
