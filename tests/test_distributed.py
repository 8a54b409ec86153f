"""Several processes: replicated, sharded and checkpointed training give stock's numbers.

Each test has a worker, which runs in two processes and goes through every optimizer there. Rules
work element by element, so what is right for a sharded parameter is stock's step of its shard.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import workers
from cases import HALVES, OPTIMIZERS, Row
from oracle import all_params, assert_equal
from torch import Tensor, nn
from torch.nn import Parameter
from twins import check_state, random_grad

from fastsgd import _C

if not torch.distributed.is_available():
    pytest.skip("torch was built without distributed", allow_module_level=True)

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecisionPolicy, fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel


@contextmanager
def each_row() -> Iterator[Iterator[Row]]:
    """Yield every optimizer; name the one at which the body raised."""
    now = []

    def rows() -> Iterator[Row]:
        for row in OPTIMIZERS:
            now[:] = [row]
            yield row

    try:
        yield rows()
    except Exception as error:
        raise AssertionError(f"{now} in process {dist.get_rank()}: {error}") from error


def network() -> nn.Module:
    """Return a network whose shards are uneven in the middle and empty at the end."""
    torch.manual_seed(5)
    return nn.Sequential(
        nn.Linear(9, 33), nn.Tanh(), nn.Linear(33, 65), nn.Tanh(), nn.Linear(65, 1)
    )


def backward(net: nn.Module, step: int) -> Tensor:
    """Run a batch that is another in each process."""
    torch.manual_seed(100 * step + dist.get_rank())
    loss = net(torch.randn(8, 9)).square().sum()
    loss.backward()
    return loss.detach()


def sides(row: Row) -> list[tuple[Callable[..., Any], dict[str, Any]]]:
    """Return ours and stock's, each with options."""
    return [(row.ours, {**row.rich}), (row.stock, {**row.rich, "foreach": False})]


def local(tensor: Tensor) -> Tensor:
    """Return the shard of a DTensor that is here; any other tensor as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def assert_same_in_all_processes(tensors: list[Tensor]) -> None:
    """Every process has these values."""
    for tensor in tensors:
        others = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
        dist.all_gather(others, tensor.contiguous())
        for other in others:
            assert_equal(other, tensor)


# Replicas.


def train_replicas() -> None:
    """Worker: replicas whose grads are buckets, or views of them."""
    with each_row() as rows:
        for row in rows:
            for view in (False, True):
                finals = []
                for cls, options in sides(row):
                    net = DistributedDataParallel(network(), gradient_as_bucket_view=view)
                    optimizer = cls(net.parameters(), **options)
                    losses = []
                    for step in range(4):
                        optimizer.zero_grad(set_to_none=step % 2 == 0)
                        losses.append(backward(net, step))
                        optimizer.step()
                    params = [p.detach() for p in net.parameters()]
                    states = [list(s.values()) for s in optimizer.state.values()]
                    assert_same_in_all_processes(params)
                    finals.append((losses, params, states))
                assert_equal(*finals)


def test_replicas(tmp_path: Path) -> None:
    """``DistributedDataParallel``: stock's losses, parameters and states."""
    workers.run(train_replicas, tmp_path)


def train_with_split_states() -> None:
    """Worker: each process has the states of some of the parameters."""
    with each_row() as rows:
        for row in rows:
            for view in (False, True):
                finals = []
                for cls, options in sides(row):
                    net = DistributedDataParallel(network())
                    optimizer = ZeroRedundancyOptimizer(
                        net.parameters(),
                        optimizer_class=cls,
                        parameters_as_bucket_view=view,
                        **options,
                    )
                    assert type(optimizer.optim) is cls
                    for step in range(4):
                        optimizer.zero_grad()
                        backward(net, step)
                        optimizer.step()
                    optimizer.consolidate_state_dict(to=0)
                    saved = optimizer.state_dict() if dist.get_rank() == 0 else {"state": {}}
                    params = [p.detach() for p in net.parameters()]
                    assert_same_in_all_processes(params)
                    finals.append((params, saved["state"]))
                    if saved["state"]:
                        optimizer.load_state_dict(copy.deepcopy(saved))
                assert_equal(*finals)


def test_split_states(tmp_path: Path) -> None:
    """``ZeroRedundancyOptimizer`` over our classes, its consolidated checkpoint included."""
    workers.run(train_with_split_states, tmp_path)


# Shards.


@contextmanager
def exact_roots_of_shards() -> Iterator[None]:
    """Let DTensor take the roots of its shards as ordinary tensors do."""

    def sqrt(x: DTensor) -> DTensor:
        y = x.clone()
        y.to_local().sqrt_()
        return y

    def sqrt_(x: DTensor) -> DTensor:
        x.to_local().sqrt_()
        return x

    DTensor.sqrt, DTensor.sqrt_ = sqrt, sqrt_  # type: ignore[method-assign]
    try:
        yield
    finally:
        del DTensor.sqrt, DTensor.sqrt_


class Shards:
    """Our optimizer over sharded parameters, and stock's over copies of the shards alone."""

    def __init__(self, row: Row, params: list[Tensor], flags: Any = None, **options: Any) -> None:
        """Copy the shards. The ``flags`` are options for ours only."""
        self.ours = row.ours(params, **options, **(flags or {}))
        copies = [Parameter(local(p.detach()).clone()) for p in params]
        self.stock = row.stock(copies, foreach=False, **options)

    def step(self) -> None:
        """Step both with the grads of the sharded parameters, and compare."""
        for p, q in zip(all_params(self.ours), all_params(self.stock), strict=True):
            q.grad = None if p.grad is None else local(p.grad).clone()
        self.ours.step()
        self.stock.step()
        self.check()

    def check(self) -> None:
        """Shards, and the shards of states, are stock's; whole parameters have whole states."""
        for p, q in zip(all_params(self.ours), all_params(self.stock), strict=True):
            assert_equal(local(p.detach()), q.detach())
            assert (p in self.ours.state) == (q in self.stock.state)
            own = self.ours.state.get(p, {})
            check_state({k: local(v) for k, v in own.items()}, self.stock.state.get(q, {}))
            for key, value in own.items():
                if key != "step" and isinstance(p, DTensor):
                    assert isinstance(value, DTensor), key
                    assert (value.device_mesh, value.placements) == (p.device_mesh, p.placements)
                    assert value.shape == p.shape


def all_processes() -> DeviceMesh:
    """Return the mesh of all, on the CPU whatever devices there are."""
    return init_device_mesh("cpu", (dist.get_world_size(),))


def sharded_network(**options: Any) -> nn.Module:
    """Return the network, each layer of it sharded over all processes by default."""
    net = network()
    options.setdefault("mesh", all_processes())
    for layer in net:
        if isinstance(layer, nn.Linear):
            fully_shard(layer, **options)
    return fully_shard(net, **options)


def train_shards() -> None:
    """Worker: shards, replicated shards, and mixed precision, clipped every other time."""
    options: tuple[dict[str, Any], ...] = (
        {},
        {"mesh": init_device_mesh("cpu", (1, 2), mesh_dim_names=("replicas", "shards"))},
        {"mp_policy": MixedPrecisionPolicy(param_dtype=torch.bfloat16)},
    )
    with each_row() as rows, exact_roots_of_shards():
        for row in rows:
            for chosen in options:
                net = sharded_network(**chosen)
                both = Shards(row, list(net.parameters()), **row.rich)
                for step in range(4):
                    both.ours.zero_grad()
                    backward(net, step)
                    if step % 2:
                        nn.utils.clip_grad_norm_(net.parameters(), 0.5)
                    both.step()
                counts = {local(p).numel() for p in net.parameters()}
                assert dist.get_rank() == 0 or 0 in counts, "a shard is empty"


def test_shards(tmp_path: Path) -> None:
    """``fully_shard``: parameters and states are DTensors, their shards stock's."""
    workers.run(train_shards, tmp_path)


def several_meshes(dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Return parameters of several meshes and placements, and an ordinary one."""
    flat = init_device_mesh("cpu", (2,), mesh_dim_names=("flat",))
    square = init_device_mesh("cpu", (1, 2), mesh_dim_names=("one", "two"))
    torch.manual_seed(6)
    values = [torch.randn(s).to(dtype) for s in ((33, 17), (1,), (35, 9), (5, 70), (9, 9), (65,))]
    return [
        Parameter(distribute_tensor(values[0], flat, [Shard(0)])),
        Parameter(distribute_tensor(values[1], flat, [Shard(0)])),
        Parameter(distribute_tensor(values[2], square, [Replicate(), Shard(0)])),
        Parameter(distribute_tensor(values[3], square, [Shard(0), Shard(1)])),
        Parameter(distribute_tensor(values[4], flat, [Replicate()])),
        Parameter(values[5]),
    ]


def give_grads(params: list[Tensor], step: int) -> None:
    """Give each parameter a grad of its kind; one of them has none at first."""
    for i, p in enumerate(params):
        torch.manual_seed(50 * step + i)
        whole = random_grad(torch.empty(p.shape, dtype=p.dtype))
        if step == 0 and i == 2:
            p.grad = None
        elif isinstance(p, DTensor):
            p.grad = distribute_tensor(whole, p.device_mesh, p.placements)
        else:
            p.grad = whole


def train_on_several_meshes() -> None:
    """Worker: one optimizer for parameters of several meshes."""
    with each_row() as rows, exact_roots_of_shards():
        for row in rows:
            fused = {"fused": True} if "fused" in inspect.signature(row.stock).parameters else {}
            for options, flags, dtype in (
                (row.plain, {}, torch.float32),
                (row.plain, {}, torch.float64),
                (row.rich, {"foreach": True}, torch.float32),
                (row.rich, fused, torch.float64),
                ({**row.rich, "lr": torch.tensor(0.07)}, {}, torch.float32),
            ):
                params = several_meshes(dtype)
                both = Shards(row, params, flags, **options)
                for step in range(4):
                    give_grads(params, step)
                    both.step()
                both.ours.zero_grad(set_to_none=False)
                assert all(bool((local(p.grad) == 0).all()) for p in params)


def test_several_meshes(tmp_path: Path) -> None:
    """Meshes of one and of two dimensions, shards, replicas and ordinary tensors together."""
    workers.run(train_on_several_meshes, tmp_path)


def train_half_shards() -> None:
    """Worker: shards of half types, beside the same optimizer over plain copies of them."""
    with each_row() as rows:
        for row in rows:
            for dtype in HALVES:
                params = several_meshes(dtype)
                copies = [Parameter(local(p).detach().clone()) for p in params]
                ours, plain = row.ours(params, **row.rich), row.ours(copies, **row.rich)
                for step in range(3):
                    give_grads(params, step)
                    for p, copy in zip(params, copies, strict=True):
                        copy.grad = None if p.grad is None else local(p.grad).clone()
                    versions = [p._version for p in params]
                    assert _C.step_or_route(ours) is None, "the kernels step all"
                    plain.step()
                    for p, copy, version in zip(params, copies, versions, strict=True):
                        assert_equal(local(p).detach(), copy.detach())
                        assert (p._version > version) == (p.grad is not None)


def test_half_shards(tmp_path: Path) -> None:
    """A shard of a half type is rounded once, as a plain parameter is, and counts as written."""
    workers.run(train_half_shards, tmp_path)


def train_with_grads_placed_otherwise() -> None:
    """Worker: grads, or states, that lie in other ways than their parameters."""
    flat = init_device_mesh("cpu", (2,))
    first, second, whole, sums = Shard(0), Shard(1), Replicate(), Partial()
    # The placement of a parameter, and of its grads.
    kinds = [(first, whole), (whole, first), (first, second), (whole, sums), (first, sums)]
    with each_row() as rows, exact_roots_of_shards():
        for row in rows:
            for options in (row.plain, row.rich):
                for mine, theirs in kinds:
                    outcomes = [
                        outcome(cls, {**options, **more}, flat, mine, theirs)
                        for cls, more in ((row.ours, {}), (row.stock, {"foreach": False}))
                    ]
                    assert type(outcomes[0]) is type(outcomes[1]), outcomes
                    if isinstance(outcomes[0], list):
                        assert_equal(*outcomes)


def outcome(cls: type, options: dict[str, Any], mesh: Any, mine: Any, theirs: Any) -> Any:
    """Return all values after three steps, whole; or what was raised."""
    torch.manual_seed(7)
    params = [distribute_tensor(torch.randn(s), mesh, [mine]) for s in ((33, 18), (5, 2))]
    params = [Parameter(p) for p in params]
    optimizer = cls(params, **options)
    for step in range(3):
        for p in params:
            torch.manual_seed(70 + step + dist.get_rank() * isinstance(theirs, Partial))
            shard = torch.randn(p.shape)
            p.grad = (
                DTensor.from_local(shard, mesh, [theirs], run_check=False)
                if isinstance(theirs, Partial)
                else distribute_tensor(shard, mesh, [theirs])
            )
        try:
            optimizer.step()
        except Exception as refused:  # noqa: BLE001
            return refused
    values = params + [v for state in optimizer.state.values() for v in state.values()]
    return [v.full_tensor() if isinstance(v, DTensor) else v for v in map(Tensor.detach, values)]


def test_grads_placed_otherwise(tmp_path: Path) -> None:
    """A grad that is whole where its parameter is sharded, and so on: what stock makes of it."""
    workers.run(train_with_grads_placed_otherwise, tmp_path)


def train_on_a_mesh_each() -> None:
    """Worker: parameters on meshes of one process each; a process is no part of the other's."""
    meshes = [DeviceMesh("cpu", [0]), DeviceMesh("cpu", [1])]
    with each_row() as rows, exact_roots_of_shards():
        for row in rows:
            finals = []
            for cls, options in sides(row):
                torch.manual_seed(8)
                params = [
                    Parameter(DTensor.from_local(torch.randn(33, 5), mesh, [Shard(0)]))
                    for mesh in meshes
                ]
                optimizer = cls(params, **options)
                for _ in range(3):
                    for p, mesh in zip(params, meshes, strict=True):
                        p.grad = DTensor.from_local(torch.randn(33, 5), mesh, [Shard(0)])
                    optimizer.step()
                finals.append([local(p.detach()) for p in params])
            assert_equal(*finals)


def test_a_mesh_each(tmp_path: Path) -> None:
    """Meshes that this process is no part of."""
    workers.run(train_on_a_mesh_each, tmp_path)


def step_with_states_of_inference_mode() -> None:
    """Worker: each state in turn one whose shard is an ordinary tensor, but not the whole."""
    mesh = all_processes()
    with each_row() as rows:
        for row in rows:
            p = Parameter(DTensor.from_local(torch.randn(33, 5), mesh, [Shard(0)]))
            plain = Parameter(torch.randn(9))
            optimizer = row.ours([plain, p], **row.rich)
            for q in (plain, p):
                q.grad = torch.ones_like(q)
            optimizer.step()
            for name in row.states:
                ordinary = optimizer.state[p][name]
                with torch.inference_mode():
                    whole = DTensor.from_local(local(ordinary), mesh, [Shard(0)], run_check=False)
                assert whole.is_inference()
                assert not local(whole).is_inference()
                optimizer.state[p][name] = whole
                states = [local(v) for s in optimizer.state.values() for v in s.values()]
                before = [t.detach().clone() for t in (plain, local(p), *states)]
                with pytest.raises(RuntimeError, match=rf"\[1\].*'{name}' is an inference tensor"):
                    optimizer.step()
                assert_equal([t.detach() for t in (plain, local(p), *states)], before)
                optimizer.state[p][name] = ordinary
            optimizer.step()


def test_states_of_inference_mode(tmp_path: Path) -> None:
    """Stock's error, and nothing written, where a whole has no version to count writes by."""
    workers.run(step_with_states_of_inference_mode, tmp_path)


def operators_of(act: Callable[[], Any]) -> list[str]:
    """Return the operators of torch that run during ``act``, those on shards among them."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        act()
    return [event.name for event in profile.events() if "::" in event.name]


def count_operators() -> None:
    """Worker: what torch is asked during a warm step."""
    with each_row() as rows:
        for row in rows:
            found = []
            for cls, options in sides(row):
                params = several_meshes()
                optimizer = cls(params, **options)
                for step in range(1, 4):
                    give_grads(params, step)
                    optimizer.step()
                give_grads(params, 5)
                found.append(operators_of(optimizer.step))
            assert len(found[1]) > len(params), "stock's step is made of operators"
            assert not found[0], f"{len(found[0])} operators in a warm step: {found[0][:3]}, ..."


def test_no_operator_in_a_warm_step(tmp_path: Path) -> None:
    """A warm step of sharded parameters runs no operator, so DTensor has nothing to dispatch."""
    workers.run(count_operators, tmp_path)


def train_flat_shards() -> None:
    """Worker: the older wrapper, whose parameters are flat, or ordinary views of flat memory."""
    with each_row() as rows:
        for row in rows:
            for views in (False, True):
                finals = []
                for cls, options in sides(row):
                    net = FullyShardedDataParallel(
                        network(), use_orig_params=views, device_id=torch.device("cpu")
                    )
                    optimizer = cls(net.parameters(), **options)
                    for step in range(4):
                        optimizer.zero_grad()
                        backward(net, step)
                        optimizer.step()
                    states = [list(s.values()) for s in optimizer.state.values()]
                    finals.append(([p.detach().clone() for p in net.parameters()], states))
                assert_equal(*finals)


def test_flat_shards(tmp_path: Path) -> None:
    """``FullyShardedDataParallel``, the older wrapper: parameters flat, or in their shapes."""
    workers.run(train_flat_shards, tmp_path)


# Checkpoints.

FULL = StateDictOptions(full_state_dict=True, cpu_offload=True)


def train_and_save(folder: str) -> None:
    """Worker: train sharded, save sharded and whole, go on; load into others, which go on alike."""
    with each_row() as rows:
        for row in rows:
            path = f"{folder}/{row.name}"
            net = sharded_network()
            optimizer = row.ours(net.parameters(), **row.rich)
            for step in range(3):
                optimizer.zero_grad()
                backward(net, step)
                optimizer.step()
            saved = {
                "net": get_model_state_dict(net),
                "optimizer": get_optimizer_state_dict(net, optimizer),
            }
            dcp.save(saved, checkpoint_id=path)
            whole = (
                get_model_state_dict(net, options=FULL),
                get_optimizer_state_dict(net, optimizer, options=FULL),
            )
            if dist.get_rank() == 0:
                torch.save(whole, f"{path}.pt")

            other = sharded_network()
            nn.init.zeros_(other[0].weight)
            another = row.ours(other.parameters(), **{**row.rich, "lr": 0.5})
            loaded = {
                "net": get_model_state_dict(other),
                "optimizer": get_optimizer_state_dict(other, another),
            }
            dcp.load(loaded, checkpoint_id=path)
            set_model_state_dict(other, loaded["net"])
            set_optimizer_state_dict(other, another, loaded["optimizer"])
            assert another.param_groups[0]["lr"] == row.rich["lr"]
            for model, each in ((net, optimizer), (other, another)):
                for step in range(3, 5):
                    each.zero_grad()
                    backward(model, step)
                    each.step()
            for p, q in zip(net.parameters(), other.parameters(), strict=True):
                assert_equal(local(p.detach()), local(q.detach()))
                mine, theirs = (
                    {k: local(v) for k, v in s.items()}
                    for s in (another.state[q], optimizer.state[p])
                )
                check_state(mine, theirs)


def load_alone(folder: str) -> None:
    """Worker: one process reads what two have written; ours and stock go on alike."""
    with each_row() as rows:
        for row in rows:
            weights, states = torch.load(f"{folder}/{row.name}.pt", weights_only=True)
            finals = []
            for cls, options in sides(row):
                net = network()
                optimizer = cls(net.parameters(), **{**options, "lr": 0.5})
                loaded = {
                    "net": get_model_state_dict(net),
                    "optimizer": get_optimizer_state_dict(net, optimizer),
                }
                dcp.load(loaded, checkpoint_id=f"{folder}/{row.name}")
                set_model_state_dict(net, loaded["net"])
                set_optimizer_state_dict(net, optimizer, loaded["optimizer"])
                for name, p in net.named_parameters():
                    assert_equal(p.detach(), weights[name])
                    assert_equal(dict(optimizer.state[p]), states["state"][name])
                for group in optimizer.param_groups:
                    group["foreach"] = False
                for step in range(2):
                    optimizer.zero_grad()
                    backward(net, step)
                    optimizer.step()
                finals.append([p.detach() for p in net.parameters()])
            assert_equal(*finals)


def test_checkpoints(tmp_path: Path) -> None:
    """``torch.distributed.checkpoint``, from two processes into two and into one."""
    folder = str(tmp_path / "checkpoints")
    Path(folder).mkdir()
    workers.run(train_and_save, tmp_path, folder)
    (tmp_path / "store").unlink(missing_ok=True)
    workers.run(load_alone, tmp_path, folder, world=1)


# Memory.


def resident() -> int:
    """Return the bytes of memory that this process has."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def step_for_long() -> None:
    """Worker: hundreds of steps; what the process grows by."""
    with each_row() as rows:
        for row in rows:
            params = several_meshes()
            optimizer = row.ours(params, **row.rich)
            give_grads(params, 1)
            for _ in range(100):
                optimizer.step()
            before = resident()
            for _ in range(500):
                optimizer.step()
            grown = resident() - before
            assert grown < 2**19, f"{grown} bytes in 500 steps"


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="asks Linux for the size")
def test_memory_of_many_steps(tmp_path: Path) -> None:
    """Stepping shards for long takes no more memory."""
    workers.run(step_for_long, tmp_path)
