"""A step that raises has changed nothing; autograd, threads, forks, shared memory are respected."""

from __future__ import annotations

import copy
import sys
import threading
from collections.abc import Callable
from typing import Any

import isolated
import pytest
import torch
from cases import DTYPES, HUGE, OPTIMIZERS, ORDINARY_SHAPES, TAKE_FUSED, Row
from oracle import all_params, assert_equal
from snapshot import Snapshot
from torch import Tensor
from torch.nn import Parameter
from twins import ORDINARY, Twins, parameters, random_grad
from watched import Watched

Spoil = Callable[[torch.optim.Optimizer, Tensor], None]


def grad_of_another_shape(optimizer: Any, p: Tensor) -> None:
    p.data = torch.randn(3)


def grad_of_more_dimensions(optimizer: Any, p: Tensor) -> None:
    p.data = torch.randn(p.shape[-1])


def grad_larger_than_a_scalar(optimizer: Any, p: Tensor) -> None:
    p.data = torch.randn(())


def grad_of_other_data(optimizer: Any, p: Tensor) -> None:
    p.grad.data = torch.randn(2, 7)


def grad_set_elsewhere(optimizer: Any, p: Tensor) -> None:
    p.grad.set_(torch.randn(3))


def grad_resized(optimizer: Any, p: Tensor) -> None:
    p.grad.resize_(4, 7)


def inference_parameter(optimizer: Any, p: Tensor) -> None:
    with torch.inference_mode():
        made = torch.randn(5)
    optimizer.param_groups[0]["params"].append(made)
    made.grad = torch.ones(5)


def expanded_parameter(optimizer: Any, p: Tensor) -> None:
    p.data = torch.randn(1).expand(p.shape)


def state_of_another_shape(optimizer: Any, p: Tensor) -> None:
    for key in optimizer.state[p]:
        optimizer.state[p][key] = torch.randn(2, 7)


def state_smaller(optimizer: Any, p: Tensor) -> None:
    for key in optimizer.state[p]:
        optimizer.state[p][key] = torch.randn(())


def state_expanded(optimizer: Any, p: Tensor) -> None:
    for key in optimizer.state[p]:
        optimizer.state[p][key] = torch.randn(1).expand(p.shape)


def state_of_text(optimizer: Any, p: Tensor) -> None:
    for key in optimizer.state[p]:
        optimizer.state[p][key] = "text"


def state_of_a_number(optimizer: Any, p: Tensor) -> None:
    for key in optimizer.state[p]:
        optimizer.state[p][key] = 3.0


def state_of_integers(optimizer: Any, p: Tensor) -> None:
    for key in optimizer.state[p]:
        optimizer.state[p][key] = torch.ones(p.shape, dtype=torch.int64)


def state_on_meta(optimizer: Any, p: Tensor) -> None:
    for key in optimizer.state[p]:
        optimizer.state[p][key] = torch.empty(p.shape, device="meta")


def state_is_a_list(optimizer: Any, p: Tensor) -> None:
    optimizer.state[p] = [1, 2]


def state_is_inference(optimizer: Any, p: Tensor) -> None:
    with torch.inference_mode():
        for key in optimizer.state[p]:
            optimizer.state[p][key] = torch.randn(p.shape)


def without_version(tensor: Tensor) -> Tensor:
    """Return an ordinary tensor by all its properties that yet counts no writes."""
    with torch.inference_mode():
        made = torch.empty(0)
    made.data = tensor.detach().clone()
    return made


def state_without_version(optimizer: Any, p: Tensor) -> None:
    for key in optimizer.state[p]:
        optimizer.state[p][key] = without_version(torch.ones(p.shape))


def parameter_without_version(optimizer: Any, p: Tensor) -> None:
    other = without_version(p)
    other.grad = p.grad
    for group in optimizer.param_groups:
        group["params"] = [other if q is p else q for q in group["params"]]
    if p in optimizer.state:
        optimizer.state[other] = optimizer.state.pop(p)


def state_without_version_but_small(optimizer: Any, p: Tensor) -> None:
    state_without_version(optimizer, p)
    if "step" in optimizer.state[p]:
        optimizer.state[p]["step"] = without_version(torch.tensor(1.0))


def state_is_complex(optimizer: Any, p: Tensor) -> None:
    for key in optimizer.state[p]:
        optimizer.state[p][key] = torch.randn(p.shape, dtype=torch.complex64)


def state_is_real(optimizer: Any, p: Tensor) -> None:
    p.data = p.data.to(torch.complex64)
    p.grad = torch.ones_like(p)


def missing_option(optimizer: Any, p: Tensor) -> None:
    del optimizer.param_groups[-1]["lr"]


def option_of_text(optimizer: Any, p: Tensor) -> None:
    optimizer.param_groups[-1]["lr"] = "0.1"


def option_none(optimizer: Any, p: Tensor) -> None:
    optimizer.param_groups[-1]["weight_decay"] = None


def large_tensor_lr(optimizer: Any, p: Tensor) -> None:
    optimizer.param_groups[-1]["lr"] = torch.tensor([0.1, 0.2])


def complex_lr(optimizer: Any, p: Tensor) -> None:
    optimizer.param_groups[-1]["lr"] = 0.1 + 1j


def stranger_among_parameters(optimizer: Any, p: Tensor) -> None:
    optimizer.param_groups[0]["params"].append("text")


def none_among_parameters(optimizer: Any, p: Tensor) -> None:
    optimizer.param_groups[0]["params"].append(None)


def no_params(optimizer: Any, p: Tensor) -> None:
    del optimizer.param_groups[-1]["params"]


SPOILS = [
    v
    for v in list(globals().values())
    if list(getattr(v, "__annotations__", ())) == ["optimizer", "p", "return"]
]


@pytest.mark.parametrize("first_step", [False, True])
@pytest.mark.parametrize("spoil", SPOILS, ids=lambda f: f.__name__)
def test_a_step_that_raises_changed_nothing(row: Row, spoil: Spoil, first_step: bool) -> None:
    """The good parameters before and after the bad one, states, versions and options stay.

    Stock raises too (often after it has written some of it).
    """
    if first_step and spoil.__name__.startswith("state_"):
        pytest.skip("there is no state to spoil")
    outcomes = []
    for cls, more in ((row.ours, {}), (row.stock, {"foreach": False})):
        torch.manual_seed(0)
        groups = [{"params": parameters((70,), (5, 7), (33, 17))()} for _ in range(3)]
        optimizer = cls(groups, **row.rich, **more)
        for p in all_params(optimizer):
            p.grad = random_grad(p)
        if not first_step:
            optimizer.step()
        spoil(optimizer, all_params(optimizer)[4])
        outcomes.append(optimizer)
    ours, stock = outcomes
    if spoil is no_params:
        with pytest.raises(KeyError):
            ours.step()
        return
    snapshot = Snapshot(ours)
    with pytest.raises(Exception) as refused:  # noqa: PT011, B017
        ours.step()
    snapshot.assert_unchanged()
    with pytest.raises(Exception):  # noqa: PT011, B017
        stock.step()
    assert str(refused.value), "an error says something"


@pytest.mark.parametrize("spoil", [grad_of_another_shape, state_of_text], ids=lambda f: f.__name__)
def test_usable_after_an_error(row: Row, spoil: Spoil) -> None:
    """Once the fault is repaired the optimizer goes on as if nothing had happened."""
    twins = Twins(row, parameters((70,), (5, 7), (33,)), **row.rich).run(2)
    twins.grads()
    p = all_params(twins.ours)[1]
    kept, state = p.data, dict(twins.ours.state[p])
    spoil(twins.ours, p)
    with pytest.raises(Exception):  # noqa: PT011, B017
        twins.ours.step()
    p.data = kept
    twins.ours.state[p].update(state)
    twins.step()
    twins.check()
    twins.run(2)


def test_a_released_storage() -> None:
    """A parameter whose memory was given back (stock crashes): an error and nothing written.

    Without a grad it is left alone.
    """
    said = isolated.run(
        """
        import torch
        from cases import OPTIMIZERS
        from oracle import assert_equal
        whats = ("parameter", "grad", "no grad")
        for row, what in ((row, what) for row in OPTIMIZERS for what in (*whats, *row.states)):
            good, bad = (torch.nn.Parameter(torch.ones(1000)) for _ in range(2))
            optimizer = row.ours([good, bad], **row.rich)
            for p in (good, bad):
                p.grad = torch.ones(1000)
            optimizer.step()
            before = good.detach().clone()
            if what == "no grad":
                bad.grad = None
            victim = {"parameter": bad, "grad": bad.grad, "no grad": bad,
                      **optimizer.state[bad]}[what]
            victim.untyped_storage().resize_(0)
            try:
                optimizer.step()
            except RuntimeError as refused:
                assert what != "no grad", (row, refused)
                assert_equal(good.detach(), before)
                print(row.name, what, "|", str(refused).splitlines()[0])
            else:
                assert what == "no grad", (row, what)
                assert not torch.equal(good, before)
        """
    )
    assert len(said.splitlines()) == sum(2 + len(row.states) for row in OPTIMIZERS)


def test_a_released_storage_outside_of_a_step() -> None:
    """What else uses gradients and averages says so too, and has written nothing."""
    said = isolated.run(
        """
        import torch, fastsgd
        from oracle import assert_equal

        LAYOUTS = {
            "contiguous": lambda p: torch.ones(40, 30, dtype=p.dtype),
            "gapped": lambda p: torch.ones(40, 60, dtype=p.dtype)[:, :30],
            "expanded": lambda p: torch.ones(30, dtype=p.dtype).expand(40, 30),
            "in a graph": lambda p: torch.ones(40, 30, dtype=p.dtype).requires_grad_(),
        }

        def average_freed(o):
            o.state[o.param_groups[0]["params"][1]]["ema"].untyped_storage().resize_(0)

        def parameter_freed(o):
            o.param_groups[0]["params"][1].untyped_storage().resize_(0)

        def use_averages(o):
            with o.ema_weights():
                pass

        def clip(o):
            fastsgd.clip_grad_norm_(o.param_groups[0]["params"], 0.5)

        def zero(o):
            o.zero_grad(set_to_none=False)

        def grad_freed(o):
            o.param_groups[0]["params"][1].grad.untyped_storage().resize_(0)

        for dtype in (torch.float32, torch.bfloat16, torch.complex64):
            for name, layout in LAYOUTS.items():
                for spoil, act in ((grad_freed, clip), (grad_freed, zero),
                                   (average_freed, use_averages), (parameter_freed, use_averages)):
                    good, bad = (torch.nn.Parameter(torch.ones(40, 30, dtype=dtype)) for _ in "ab")
                    optimizer = fastsgd.SGD([good, bad], lr=0.5, ema_decay=0.5)
                    for p in (good, bad):
                        p.grad = torch.ones_like(p)
                    optimizer.step()
                    bad.grad = layout(bad)
                    spoil(optimizer)
                    before = good.detach().clone(), optimizer.state[good]["ema"].clone()
                    try:
                        act(optimizer)
                    except RuntimeError as refused:
                        print(act.__name__, "|", str(refused).splitlines()[0])
                    else:
                        raise SystemExit(f"{act.__name__}, {name}, {dtype}: no error")
                    assert_equal([good.detach(), optimizer.state[good]["ema"]], list(before))
                    assert act is zero or bool((good.grad == 1).all())
        """
    )
    where = {
        "clip": "parameters[1]: the storage of its grad",
        "zero": "param_groups[0]['params'][1]: the storage of its grad",
        "use_averages": (
            "the storage of a parameter",
            "a parameter of shape (40, 30) on cpu has a state 'ema' that has a storage of 0 bytes",
        ),
    }
    lines = said.splitlines()
    assert len(lines) == 3 * 4 * 4
    for line in lines:
        act, _, message = line.partition(" | ")
        assert message.startswith(where[act]), message
        assert message.endswith("too few for its shape [40, 30]. Was it freed or resized?")


def test_a_storage_too_small() -> None:
    """Memory that ends before the parameter does."""
    isolated.run(
        """
        import torch
        from cases import OPTIMIZERS
        for row in OPTIMIZERS:
            p = torch.nn.Parameter(torch.ones(1000))
            p.grad = torch.ones(1000)
            p.untyped_storage().resize_(400)
            optimizer = row.ours([p], **row.rich)
            try:
                optimizer.step()
            except RuntimeError:
                pass
            else:
                raise SystemExit(f"{row.name} wrote beyond the memory")
        """
    )


# Version counters.


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_versions(row: Row, dtype: torch.dtype) -> None:
    """Parameters and states count their writes; grads, only read, do not; nor what has no grad."""
    optimizer = row.ours(parameters(*ORDINARY_SHAPES, (9,), dtype=dtype)(), **row.rich)
    *moving, still = all_params(optimizer)
    for p in moving:
        p.grad = random_grad(p)
    for _ in range(3):
        states = [v for p in moving for v in optimizer.state.get(p, {}).values()]
        before = [t._version for t in (*moving, *states)]
        grads = [p.grad._version for p in moving]
        optimizer.step()
        after = [t._version for t in (*moving, *states)]
        assert all(a > b for a, b in zip(after, before, strict=True))
        assert grads == [p.grad._version for p in moving]
        assert still._version == 0


@pytest.mark.parametrize("row", TAKE_FUSED, ids=repr)
def test_version_of_unscaled_grads(row: Row) -> None:
    """Grads that a fused step unscales are written, and count it."""
    optimizer = row.ours(parameters((70,), (5,))(), **row.rich, fused=True)
    for p in all_params(optimizer):
        p.grad = torch.ones_like(p) * 4
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    scaler.scale(torch.ones(()))
    before = [p.grad._version for p in all_params(optimizer)]
    scaler.step(optimizer)
    for p, b in zip(all_params(optimizer), before, strict=True):
        assert p.grad._version > b
        assert_equal(p.grad, torch.ones_like(p))


def test_autograd_notices(row: Row) -> None:
    """A parameter that was changed between forward and backward."""
    for n in (3, 70, HUGE):
        p = Parameter(torch.ones(n))
        p.grad = torch.ones(n)
        optimizer = row.ours([p], **row.plain)
        loss = (p * p).sum()
        optimizer.step()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


def test_autograd_notices_views(row: Row) -> None:
    """Also through a view of it, and through a parameter that is a view."""
    base = torch.ones(40, 20)
    p = Parameter(torch.ones(70))
    q = base[:, :16].requires_grad_()
    for t in (p, q):
        t.grad = torch.ones_like(t)
    loss = (p[3:9] ** 2).sum() + (q[1] ** 2).sum()
    row.ours([p, q], **row.plain).step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


# Shared memory that must not be seen to change.


@pytest.mark.parametrize("n", [5, 1000, HUGE])
def test_lazy_clones(row: Row, n: int) -> None:
    """Copy-on-write parameters, grads and states: writes do not reach the tensor they came from."""
    twins = Twins(row, lambda: [Parameter(torch.randn(n)), Parameter(torch.randn(5))], **row.rich)
    twins.run(1)
    for _ in range(2):
        twins.grads()
        originals = []
        for optimizer in twins.sides:
            p = all_params(optimizer)[0]
            originals += [p.data, p.grad]
            p.data = torch._lazy_clone(p.data)
            p.grad = torch._lazy_clone(p.grad)
            for name in row.states:
                originals.append(optimizer.state[p][name])
                optimizer.state[p][name] = torch._lazy_clone(optimizer.state[p][name])
        kept = [t.clone() for t in originals]
        twins.step()
        twins.check()
        assert_equal(originals, kept)


def test_lazy_clones_of_one_tensor(row: Row) -> None:
    """Two parameters that are lazy clones of one tensor are not the same memory."""

    def build() -> list[Tensor]:
        memory = torch.randn(1000)
        return [Parameter(torch._lazy_clone(memory)) for _ in range(3)]

    Twins(row, build, **row.rich).run(3)


def test_parameters_in_shared_memory(row: Row) -> None:
    """``share_memory_`` as in Hogwild training."""

    def build() -> list[Tensor]:
        return [p.share_memory_() for p in ORDINARY()]

    twins = Twins(row, build, **row.rich).run(3)
    assert all(p.is_shared() for p in all_params(twins.ours))


def test_parameters_over_numpy_memory(row: Row) -> None:
    """Memory that numpy owns is written where it is."""
    numpy = pytest.importorskip("numpy")
    arrays = [numpy.ones(131, dtype=numpy.float32) for _ in range(2)]
    pairs = iter(arrays)
    Twins(row, lambda: [Parameter(torch.from_numpy(next(pairs)))], **row.rich).run(3)
    assert (arrays[0] == arrays[1]).all() and (arrays[0] != 1).all()


# Threads and processes.


def test_keys_that_run_code_when_they_go() -> None:
    """A group's key of a class of its own, whose end clears the groups: not during a step."""
    isolated.run(
        """
        import torch
        from cases import OPTIMIZERS

        class Key(str):
            def __del__(self):
                self.optimizer.param_groups[0]["params"].clear()

        for row in OPTIMIZERS:
            params = [torch.nn.Parameter(torch.ones(1 << 20)) for _ in range(2)]
            for p in params:
                p.grad = torch.ones_like(p)
            optimizer = row.ours([{"params": [p]} for p in params], **row.rich)
            del p, params
            group = optimizer.param_groups[1]
            key = Key("lr")
            key.optimizer = optimizer
            group[key] = group.pop("lr")
            del key
            optimizer.step()
            lr = group.pop("lr")
            optimizer.param_groups[0]["params"].append(torch.nn.Parameter(torch.ones(1 << 20)))
            optimizer.param_groups[0]["params"][0].grad = torch.ones(1 << 20)
            group["".join(["l", "r"])] = lr
            optimizer.step()
        """
    )


def test_a_version_is_not_counted_before_the_write(row: Row) -> None:
    """While a long step writes without the GIL, autograd in another thread must not trust it."""
    torch.set_num_threads(1)
    p = parameters((8_000_000,))()[0]
    p.grad = random_grad(p)
    optimizer = row.ours([p], **row.rich)
    optimizer.step()
    seen, ready, done = [], threading.Event(), threading.Event()

    def watch() -> None:
        last, values = p.detach()[-1], p.detach()
        before = last.clone()
        ready.set()
        while not done.is_set():
            version = values._version
            seen.append((version, bool(last == before)))

    for _ in range(3):
        ready.clear()
        done.clear()
        version = p._version
        thread = threading.Thread(target=watch, daemon=True)
        thread.start()
        ready.wait(60)
        try:
            optimizer.step()
        finally:
            done.set()
        thread.join(60)
        assert not [v for v, unwritten in seen if v > version and unwritten]
        seen.clear()


def test_two_threads_step_two_optimizers(row: Row) -> None:
    """At the same time, small and large, with hooks and without."""
    twins = [
        Twins(row, parameters((HUGE,), *[(64,)] * 50, (33, 17)), seed=k + 1, **row.rich)
        for k in range(4)
    ]
    expected = [copy.deepcopy(t.stock) for t in twins]
    grads = [[random_grad(p) for p in all_params(t.ours)] for t in twins]
    errors: list[BaseException] = []
    start = threading.Barrier(len(twins))

    def work(optimizer: torch.optim.Optimizer, grads: list[Tensor]) -> None:
        try:
            start.wait()
            for step in range(12):
                for p, g in zip(all_params(optimizer), grads, strict=True):
                    p.grad = g * (step + 1)
                optimizer.step()
                optimizer.zero_grad(set_to_none=bool(step % 2))
        except BaseException as error:  # noqa: BLE001
            errors.append(error)

    threads = [
        threading.Thread(target=work, args=(t.ours, g)) for t, g in zip(twins, grads, strict=True)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
        assert not thread.is_alive()
    assert not errors, errors
    start = threading.Barrier(1)
    for optimizer, g, t in zip(expected, grads, twins, strict=True):
        work(optimizer, g)
        for p, q in zip(all_params(t.ours), all_params(optimizer), strict=True):
            assert_equal(p.detach(), q.detach())


@pytest.mark.parametrize("n", [17, 1000])
def test_two_threads_step_one_optimizer(row: Row, n: int) -> None:
    """Steps that keep the GIL take turns, once the states are there: no step is lost or torn."""
    steps, optimizers = 200, []
    for _ in range(2):
        optimizer = row.ours(parameters((n,), (33, 17), (5,), (0,))(), **row.rich)
        torch.manual_seed(0)
        for p in all_params(optimizer):
            p.data = torch.randn_like(p)
            p.grad = random_grad(p)
        optimizer.step()
        optimizers.append(optimizer)
    together, alone = optimizers
    start, errors = threading.Barrier(2), []

    def work() -> None:
        try:
            start.wait()
            for _ in range(steps):
                together.step()
        except BaseException as error:  # noqa: BLE001
            errors.append(error)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        threads = [threading.Thread(target=work) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(120)
            assert not thread.is_alive()
    finally:
        sys.setswitchinterval(interval)
    assert not errors, errors
    for _ in range(2 * steps):
        alone.step()
    for p, q in zip(all_params(together), all_params(alone), strict=True):
        assert_equal(p.detach(), q.detach())
        assert_equal(together.state[p], alone.state[q])


@pytest.mark.parametrize("act", ["step", "zero_grad"])
def test_the_interpreter_ends_during_a_step(act: str) -> None:
    """A daemon's thread, which then wants the GIL back, does not keep the process from ending."""
    isolated.run(
        f"""
        import threading, time
        import torch, fastsgd
        p = torch.nn.Parameter(torch.ones(5_000_000))
        p.grad = torch.ones_like(p)
        optimizer = fastsgd.AdamW([p], max_grad_norm=1.0, ema_decay=0.9)
        optimizer.step()
        begun = threading.Event()
        def work():
            while True:
                begun.set()
                optimizer.{act}({"set_to_none=False" if act == "zero_grad" else ""})
        threading.Thread(target=work, daemon=True).start()
        begun.wait()
        time.sleep(0.05)
        """
    )


def test_python_runs_during_a_long_step(row: Row) -> None:
    """Another thread gets to run while a step works on large memory."""
    p = Parameter(torch.zeros(30_000_000))
    p.grad = torch.ones_like(p)
    torch.set_num_threads(1)
    optimizer = row.ours([p], **row.rich)
    optimizer.step()
    ticks, during = [0], []
    stop = threading.Event()

    def tick() -> None:
        while not stop.is_set():
            ticks[0] += 1

    thread = threading.Thread(target=tick)
    thread.start()
    try:
        for _ in range(5):
            before = ticks[0]
            optimizer.step()
            during.append(ticks[0] - before)
    finally:
        stop.set()
        thread.join()
    assert max(during) > 1000, during


FORK = """
    import os, signal, sys, torch
    from cases import OPTIMIZERS
    from oracle import assert_equal, all_params, exact_roots
    mended = exact_roots()  # for as long as it is held
    mended.__enter__()
    torch.set_num_threads(2)  # no more than the machine has, or nothing is parallel

    def make(cls, row, **more):
        torch.manual_seed(0)
        params = [torch.nn.Parameter(torch.randn(n)) for n in (2_000_000, 5, 300_000)]
        for p in params:
            p.grad = torch.randn_like(p)
        return cls(params, **row.rich, **more)

    row = OPTIMIZERS[{index}]
    ours, stock = make(row.ours, row), make(row.stock, row, foreach=False)
    for _ in range({before}):
        ours.step(); stock.step()
    # torch's own parallel code hangs in a forked child, so the right answer is made before.
    stock.step(); stock.step()
    torch.set_num_threads(2)
    pid = os.fork()
    if pid == 0:
        signal.alarm(20)
        ours.step()
        ours.step()
        same = all(bytes(p.detach().numpy()) == bytes(q.detach().numpy())
                   for p, q in zip(all_params(ours), all_params(stock)))
        ours.zero_grad(set_to_none=False)
        clear = not any(any(bytes(p.grad.numpy())) for p in all_params(ours))
        os._exit(0 if same and clear else 1)
    _, status = os.waitpid(pid, 0)
    assert status == 0, f"the child ended with {{status}}"
    ours.step(); ours.step()  # and the parent goes on
    for p, q in zip(all_params(ours), all_params(stock)):
        assert_equal(p, q)
    print("done")
"""


@pytest.mark.parametrize("before", [0, 1, 2])
def test_fork(row: Row, before: int) -> None:
    """A child forked after parallel steps may step; the parent goes on with all its threads."""
    if not hasattr(__import__("os"), "fork"):
        pytest.skip("no fork here")
    pytest.importorskip("numpy")
    code = FORK.format(index=OPTIMIZERS.index(row), before=before)
    assert isolated.run(code, timeout=100).strip() == "done"


def test_data_loader_workers_fork() -> None:
    """Training with forked DataLoader workers, the everyday fork."""
    isolated.run(
        """
        import torch
        from torch.utils.data import DataLoader, TensorDataset
        from cases import OPTIMIZERS
        data = TensorDataset(torch.randn(16, 1000))
        for row in OPTIMIZERS:
            net = torch.nn.Linear(1000, 1000)
            optimizer = row.ours(net.parameters(), **row.rich)
            for _ in range(2):
                for (x,) in DataLoader(data, batch_size=4, num_workers=2,
                                       multiprocessing_context="fork"):
                    optimizer.zero_grad()
                    net(x).square().mean().backward()
                    optimizer.step()
        """,
        timeout=100,
    )


def test_import_in_a_fresh_interpreter_without_numpy() -> None:
    """The package needs torch and nothing else."""
    isolated.run(
        """
        import sys
        for name in ("numpy", "sklearn", "matplotlib", "tqdm", "pytest", "hypothesis"):
            sys.modules[name] = None
        import torch, fastsgd
        for name in NAMES:
            p = torch.nn.Parameter(torch.ones(70))
            p.grad = torch.ones(70)
            getattr(fastsgd, name)([p], lr=0.1).step()
            assert float(p[0].detach()) < 1
        """.replace("NAMES", str([row.name for row in OPTIMIZERS]))
    )


# Python code that runs in the middle of a step.


def test_grads_freed_in_the_middle_of_a_step(row: Row) -> None:
    """A parameter of a subclass drops the grads of those before it, which were planned already."""
    params = [Parameter(torch.randn(3000)) for _ in range(50)]
    watched = Watched(torch.randn(5))
    optimizer = row.ours([*params, watched], **row.rich)
    for p in params:
        p.grad = torch.randn(3000)
    optimizer.step()
    rubbish = []

    def drop() -> None:
        for p in params:
            p.grad = None
        rubbish.extend(torch.full((3000,), float("nan")) for _ in range(100))

    watched.on_grad = drop
    optimizer.step()
    assert rubbish, "the grad was not asked for"
    assert all(p.isfinite().all() for p in params)


def test_nothing_is_kept_after_a_step_that_raised(row: Row) -> None:
    """An optimizer whose step raised, and its parameters, are freed when they are let go."""
    import gc
    import weakref

    good, bad = Parameter(torch.randn(5)), Parameter(torch.randn(3))
    good.grad, bad.grad = torch.randn(5), torch.randn(3)
    bad.data = torch.randn(4)
    optimizer = row.ours([good, bad], **row.rich)
    good.owners = [optimizer]
    with pytest.raises(RuntimeError):
        optimizer.step()
    reference = weakref.ref(optimizer)
    del optimizer, good, bad
    gc.collect()
    assert reference() is None


def test_options_of_a_group_without_grads(row: Row) -> None:
    """Nobody computes with them, so nobody minds them."""
    twins = Twins(row, lambda: [Parameter(torch.randn(n)) for n in (17, 5)], **row.plain)
    for optimizer in twins.sides:
        p, q = all_params(optimizer)
        optimizer.param_groups[0]["params"] = [p]
        optimizer.add_param_group({"params": [q]})
        optimizer.param_groups[1]["lr"] = None
        p.grad = torch.ones(17)
        optimizer.step()
    twins.check()


def test_a_copy_of_the_attributes(row: Row) -> None:
    """A subclass may pickle and copy all attributes, what the step remembers included."""
    import copy
    import pickle

    p = Parameter(torch.randn(17))
    p.grad = torch.randn(17)
    optimizer = row.ours([p], **row.rich)
    optimizer.step()
    attributes = {k: v for k, v in vars(optimizer).items() if k != "step"}
    pickle.dumps(attributes)
    clone = row.ours.__new__(row.ours)
    clone.__dict__.update(copy.deepcopy(attributes))
    q = all_params(clone)[0]
    q.grad = p.grad.clone()
    for each in (optimizer, clone):
        each.step()
    assert_equal(p.detach(), q.detach())
