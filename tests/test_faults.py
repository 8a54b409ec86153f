"""Faults in the middle: no memory, interrupts, code that raises. All is as before, or as after."""

from __future__ import annotations

import copy
import ctypes
import dis
import gc
import itertools
import random
import signal
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import isolated
import preload
import pytest
import torch
from cases import HUGE, OPTIMIZERS, Row
from onepass import Own, copies
from oracle import all_params, assert_equal
from snapshot import Snapshot, contents, same
from torch.nn import Parameter
from torch.optim import Optimizer
from twins import parameters

import fastsgd

# For what takes seconds: one that counts its steps and one that does not have all the code.
two_rows = pytest.mark.parametrize("row", OPTIMIZERS[:2], ids=repr)

SHAPES = ((70,), (5, 7), (33,))
LONG = ((HUGE,), (400_001,), (5,))  # the GIL is given up for such a step


def schedule(number: int) -> float:
    return 0.9


EXTRAS: dict[str, Any] = {
    "max_grad_norm": 0.5,
    "clip_grad_value": 0.1,
    "skip_nonfinite": True,
    "ema_decay": schedule,
    "clear_grads": "zero",
}


def give(optimizer: Optimizer) -> None:
    """Give every parameter the same grad, each time."""
    torch.manual_seed(3)
    for p in all_params(optimizer):
        p.grad = torch.randn_like(p)


def made(row: Row, shapes: Any = SHAPES, more: Any = (), **extras: Any) -> Any:
    """Return an optimizer with two groups and grads, of the same numbers each time."""
    torch.manual_seed(1)
    first, *rest = [*parameters(*shapes)(), *(Parameter(p.clone()) for p in more)]
    optimizer = row.ours([{"params": [first]}, {"params": rest}], **row.rich, **extras)
    give(optimizer)
    return optimizer


def stepped(optimizer: Any, steps: int = 1) -> Any:
    for _ in range(steps):
        optimizer.step()
        give(optimizer)
    return optimizer


def cold(optimizer: Any) -> Any:
    """Return a copy, which has states and no memory of a step, as after a checkpoint was loaded."""
    copied = copy.deepcopy(optimizer)
    give(copied)
    return copied


# What is done, by name: to which optimizer, and how.
Make = Callable[[Row], Any]
Act = Callable[[Any], Any]


def step(optimizer: Any) -> None:
    optimizer.step()


def load(optimizer: Any) -> None:
    optimizer.load_state_dict(SAVED[0])


SAVED: list[dict[str, Any]] = []


def before_a_load(row: Row) -> Any:
    """Return an optimizer, and keep the checkpoint of another that is further."""
    SAVED[:] = [copy.deepcopy(stepped(made(row, **EXTRAS), 3).state_dict())]
    return stepped(made(row, **EXTRAS))


def averaged(row: Row, steps: int) -> Any:
    """Return one with more averages than Python has numbers ready for."""
    optimizer = stepped(made(row, **EXTRAS), steps)
    vars(optimizer)["_ema_steps"] = 1000
    return optimizer


def with_another(optimizer: Any) -> Any:
    """Add a parameter whose states are still to be made."""
    optimizer.param_groups[1]["params"].append(Parameter(torch.ones(9)))
    give(optimizer)
    return optimizer


SCENARIOS: dict[str, tuple[Make, Act]] = {
    "first": (made, step),
    "first, extras": (partial(made, **EXTRAS), step),
    "cold": (lambda row: cold(stepped(made(row))), step),
    "cold, long": (lambda row: cold(stepped(made(row, LONG, ema_decay=0.9))), step),
    "warm": (lambda row: stepped(made(row), 2), step),
    "warm, extras": (lambda row: averaged(row, 2), step),
    "another, extras": (lambda row: with_another(averaged(row, 2)), step),
    "clear to None": (lambda row: stepped(made(row, clear_grads=True)), step),
    "load_state_dict": (before_a_load, load),
    "zero_grad": (made, lambda o: o.zero_grad(set_to_none=False)),
    "zero_grad to None": (made, lambda o: o.zero_grad()),
    "clip_grad_norm_": (
        made,
        lambda o: fastsgd.clip_grad_norm_(all_params(o), 0.5),
    ),
}


# Memory.

# The k-th allocation of the thread that asked for it fails, and none after it.
FAILING = """
static __thread long left;
void fail(long k) { left = k; }
long not_failed(void) { return left; }
static int refuses(void) {
  if (left == 0 || --left != 0) return 0;
  errno = ENOMEM;
  return 1;
}
"""


@pytest.fixture(scope="module")
def failing(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str | None]:
    """The environment of a process whose allocations can be made to fail, Python's too."""
    folder = tmp_path_factory.mktemp("failing")
    return {**preload.surroundings(FAILING, folder), "PYTHONMALLOC": "malloc"}


@two_rows
def test_no_memory(row: Row, failing: dict[str, str | None]) -> None:
    """Each allocation fails in its turn: one sentence, nothing done, and the next time it is."""
    isolated.run(
        f"""
        import test_faults
        for scenario in test_faults.SCENARIOS:
            print(scenario, flush=True)
            test_faults.have_each_allocation_fail({OPTIMIZERS.index(row)}, scenario)
        """,
        timeout=500,
        env=failing,
    )


def done_twice(optimizer: Any, act: Callable[[Any], Any]) -> list[Any]:
    """Do something twice; return what there is after each time."""
    found = []
    for _ in range(2):
        act(optimizer)
        found.append(contents(optimizer))
        give(optimizer)
    return found


def have_each_allocation_fail(index: int, scenario: str) -> None:
    """Do what a scenario does until it succeeds, with one more allocation granted each time."""
    torch.set_num_threads(1)  # OpenMP ends the process where it has no memory for its threads
    libc = ctypes.PyDLL(None)
    libc.not_failed.restype = ctypes.c_long
    row = OPTIMIZERS[index]
    make, act = SCENARIOS[scenario]
    after, twice = done_twice(make(row), act)
    failed = 0
    for k in itertools.count(1):
        optimizer = make(row)
        before = contents(optimizer)
        error = None
        gc.disable()
        try:
            libc.fail(k)
            act(optimizer)
        except Exception as raised:  # noqa: BLE001
            error = raised
        not_failed = libc.not_failed()
        libc.fail(0)
        gc.enable()
        if not_failed:
            break
        now = contents(optimizer)
        done = same(now, after)
        where = f"allocation {k}: {error!r}"
        assert done or same(now, before), f"neither before nor after: {where}"
        if error is not None:
            failed += 1
            assert not done or act not in (step, load), f"done, and it raised: {where}"
            assert isinstance(error, (MemoryError, RuntimeError)), where
            assert act is not step or "bad_alloc" not in str(error), where
        give(optimizer)
        act(optimizer)
        assert same(contents(optimizer), twice if done else after), f"the next: {where}"
    assert failed or scenario == "zero_grad to None", "no allocation failed"


# Interrupts.


class Interrupt(BaseException):
    """What a signal's handler raises."""


class Interrupted:
    """Interrupts Python code where the ``k``-th signal could: not everywhere.

    A signal's handler runs where a Python function begins, where a call has returned and where a
    loop goes round. Only code of the package is interrupted.
    """

    HANDLES = ("RESUME", "CALL", "JUMP_BACKWARD", "JUMP_ABSOLUTE")
    FOLDER = str(Path(fastsgd.__file__).parent)

    def __init__(self, k: int) -> None:
        self.left = k
        self.before: dict[FrameType, str] = {}  # the last instruction of each frame

    def trace(self, frame: FrameType, event: str, argument: Any) -> Any:
        """Follow instructions, as ``sys.settrace`` tells them."""
        if not frame.f_code.co_filename.startswith(self.FOLDER):
            return None
        if event == "call":
            frame.f_trace_opcodes = True
            self.before[frame] = "RESUME"
        elif event == "opcode":
            before = self.before[frame]
            self.before[frame] = dis.opname[frame.f_code.co_code[frame.f_lasti]]
            if before.startswith(self.HANDLES):
                self.left -= 1
                if self.left == 0:
                    raise Interrupt
        return self.trace

    def __call__(self, act: Callable[[], Any]) -> bool:
        """Return whether it was interrupted; it was not if it is over before."""
        traced = sys.gettrace()
        try:
            sys.settrace(self.trace)
            act()
        except Interrupt:
            return True
        finally:
            sys.settrace(traced)
            torch.set_grad_enabled(True)  # torch's own no_grad() leaves it off, if interrupted
        assert self.left > 0, "what was raised is lost"
        return False


def each_interrupt(make: Callable[[], Any], act: Act) -> Iterator[tuple[Any, list[Any]]]:
    """Interrupt everywhere in turn; yield the optimizer and what it held before."""
    for k in itertools.count(1):
        optimizer = make()
        before = contents(optimizer)
        if not Interrupted(k)(partial(act, optimizer)):
            assert k > 1, "it was nowhere to be interrupted"
            return
        yield optimizer, before


def with_hooks(row: Row) -> Any:
    optimizer = stepped(made(row))
    optimizer.register_step_pre_hook(lambda *_: None)
    optimizer.register_step_post_hook(lambda *_: None)
    return optimizer


WHOLE: dict[str, tuple[Make, Act]] = {
    **{name: SCENARIOS[name] for name in ("first", "warm, extras", "load_state_dict")},
    "hooks": (with_hooks, step),
    "closure": (lambda row: stepped(made(row)), lambda o: o.step(lambda: 1.0)),
}


@two_rows
@pytest.mark.parametrize("scenario", WHOLE)
def test_interrupted(row: Row, scenario: str) -> None:
    """All is as it was before, or as it is after, and the next time it is done."""
    make, act = WHOLE[scenario]
    after, twice = done_twice(make(row), act)
    for optimizer, before in each_interrupt(lambda: make(row), act):
        now = contents(optimizer)
        done = same(now, after)
        assert done or same(now, before)
        give(optimizer)
        act(optimizer)
        assert same(contents(optimizer), twice if done else after)


COMPLEX = torch.ones(5, dtype=torch.complex64)  # which torch's code steps


@two_rows
@pytest.mark.parametrize("extras", [{}, {"max_grad_norm": 0.5, "ema_decay": 0.9}], ids=str)
def test_interrupted_while_torch_steps_a_part(row: Row, extras: dict[str, Any]) -> None:
    """No parameter, option or grad is missing afterwards, whatever had been stepped by then."""
    flags = {"foreach": True, **row.fused} if row.takes("foreach") else {}

    def make() -> Any:
        optimizer = stepped(made(row, more=(COMPLEX, COMPLEX), **extras))
        for group in optimizer.param_groups:
            group.update(flags)
        return optimizer

    once = make()
    once.step()
    after = contents(once)
    for optimizer, before in each_interrupt(make, step):
        now = contents(optimizer)
        assert same(now[-1][:-1], before[-1][:-1])  # but for the number of averages
        for part in (0, 2):
            assert same(now[part], before[part]), "a parameter or a grad went"
        kernels = [now[1][i] for i in range(len(SHAPES))]
        assert same(kernels, before[1][: len(SHAPES)]) or same(kernels, after[1][: len(SHAPES)])
        optimizer.step()


@two_rows
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.complex64], ids=str)
def test_interrupted_ema_weights(row: Row, dtype: torch.dtype) -> None:
    """On the way into the block, in it, on the way out: parameters hold their own values again."""

    def make() -> Any:
        more = (torch.ones(9, dtype=dtype),)
        return stepped(made(row, more=more, ema_decay=0.9, ema_dtype=torch.float32), 3)

    def use(optimizer: Any) -> None:
        with optimizer.ema_weights():
            fastsgd.clip_grad_norm_([], 1.0)

    for optimizer, before in each_interrupt(make, use):
        assert same(contents(optimizer), before)
        optimizer.step()


armed = False


def interrupt(*_: Any) -> None:
    """Handle a signal that comes in time."""
    if armed:
        raise Interrupt


@two_rows
@pytest.mark.parametrize("extras", [{}, EXTRAS], ids=["plain", "extras"])
def test_signals(row: Row, extras: dict[str, Any]) -> None:
    """A signal at any instant of a long step finds it done, or not begun."""
    global armed
    if not hasattr(signal, "setitimer"):
        pytest.skip("needs an interval timer")
    optimizer = stepped(made(row, LONG, **extras), 2)
    takes = 1.0
    for _ in range(3):
        begin = time.perf_counter()
        optimizer.step()
        takes = min(takes, time.perf_counter() - begin)
        give(optimizer)
    handler = signal.signal(signal.SIGALRM, interrupt)
    interrupts = 0
    try:
        for _ in range(200):
            if interrupts == 10:
                break
            other = copy.deepcopy(optimizer)
            give(other)
            other.step()
            before, after = contents(optimizer), contents(other)
            try:
                armed = True
                signal.setitimer(signal.ITIMER_REAL, random.uniform(1e-6, takes))
                optimizer.step()
            except Interrupt:
                interrupts += 1
            finally:
                armed = False
            signal.setitimer(signal.ITIMER_REAL, 0)
            now = contents(optimizer)
            assert same(now, before) or same(now, after)
            give(optimizer)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler)
    assert interrupts > 0


# Code of somebody's own.


class Mine(Exception):
    """What that code raises."""


def test_a_post_hook_that_raises(row: Row) -> None:
    """The step is done."""
    optimizer, other = stepped(made(row)), stepped(made(row))
    other.step()

    def hook(*_: Any) -> None:
        raise Mine

    handle = optimizer.register_step_post_hook(hook)
    with pytest.raises(Mine):
        optimizer.step()
    assert same(contents(optimizer), contents(other))
    handle.remove()
    optimizer.step()
    other.step()
    assert same(contents(optimizer), contents(other))


class Refuses(Parameter):
    """A parameter that says nothing of its grad, once it is told so."""

    silent = False

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        """Raise where the grad is asked for."""
        if cls.silent and func == Parameter.grad.__get__:
            raise Mine
        return super().__torch_function__(func, types, args, kwargs or {})


@pytest.mark.parametrize("steps", [0, 2])
@pytest.mark.parametrize("extras", [{}, EXTRAS], ids=["plain", "extras"])
def test_a_parameter_that_raises(
    row: Row, extras: dict[str, Any], steps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a subclass, the last of all: nothing before it was stepped."""
    optimizer = made(row, **extras)
    optimizer.param_groups[1]["params"].append(Refuses(torch.ones(5)))
    give(optimizer)
    stepped(optimizer, steps)
    snapshot = Snapshot(optimizer)
    monkeypatch.setattr(Refuses, "silent", True)
    with pytest.raises(Mine):
        optimizer.step()
    monkeypatch.undo()
    snapshot.assert_unchanged()
    before = contents(optimizer)
    optimizer.step()
    assert not same(contents(optimizer), before)


@pytest.mark.parametrize("steps", [0, 2])
def test_a_schedule_that_raises(row: Row, steps: int) -> None:
    """The decay is asked for before anything is written, and the next step asks again."""
    asked = []

    def raises(number: int) -> float:
        asked.append(number)
        if fails:
            raise Mine
        return 0.9

    fails = False
    extras = {**EXTRAS, "ema_decay": raises}
    optimizer = stepped(made(row, **extras), steps)
    fails = True
    snapshot = Snapshot(optimizer)
    with pytest.raises(Mine):
        optimizer.step()
    snapshot.assert_unchanged()
    fails = False
    stepped(optimizer)
    assert asked[-2:] == [steps + 1] * 2
    optimizer.ema_decay = schedule
    assert same(contents(optimizer), contents(stepped(made(row, **EXTRAS), steps + 1)))


@pytest.mark.parametrize("strange", [False, True])
def test_a_schedule_is_asked_again(row: Row, strange: bool) -> None:
    """By the step after one that was skipped, which is for the same average."""
    asked = []

    def decays(number: int) -> float:
        asked.append((number, decay))
        return decay

    decay = 0.9
    params = parameters((5,), (7,))()
    if strange:
        params[1] = params[1].detach().as_subclass(Own).requires_grad_()
    optimizer = row.ours(params, **row.rich, skip_nonfinite=True, ema_decay=decays)
    for bad, decay in ((False, 0.9), (True, 0.9), (False, 0.0)):  # noqa: B007
        for p in params:
            p.grad = torch.full(p.shape, float("nan") if bad else 1.0)
        optimizer.step()
    assert asked == [(1, 0.9), (2, 0.9), (2, 0.0)]
    for p in params:
        assert torch.equal(optimizer.state[p]["ema"].as_subclass(torch.Tensor), p.detach())


# Checkpoints that are corrupt.

Corrupt = Callable[[dict[str, Any]], Any]


def steps_of_text(saved: dict[str, Any]) -> None:
    saved["param_groups"][1]["ema_steps"] = "many"


def steps_not_whole(saved: dict[str, Any]) -> None:
    saved["param_groups"][0]["ema_steps"] = float("nan")


def steps_in_a_float_tensor(saved: dict[str, Any]) -> None:
    saved["param_groups"][0]["ema_steps"] = torch.tensor(1.5)


def steps_before_the_first(saved: dict[str, Any]) -> None:
    saved["param_groups"][0]["ema_steps"] = -1


def steps_beyond_counting(saved: dict[str, Any]) -> None:
    saved["param_groups"][1]["ema_steps"] = 10**30


def without_states(saved: dict[str, Any]) -> None:
    del saved["state"]


def without_a_parameter(saved: dict[str, Any]) -> None:
    saved["param_groups"][1]["params"].pop()


CORRUPTIONS: list[Corrupt] = [
    steps_of_text,
    steps_not_whole,
    steps_in_a_float_tensor,
    steps_before_the_first,
    steps_beyond_counting,
    without_states,
    without_a_parameter,
]


@pytest.mark.parametrize("corrupt", CORRUPTIONS, ids=lambda corrupt: corrupt.__name__)
@pytest.mark.parametrize("wide", [None, torch.float32], ids=str)
def test_a_checkpoint_that_is_refused(row: Row, corrupt: Corrupt, wide: Any) -> None:
    """It is not loaded in part, and the next one is loaded."""
    extras = {"ema_decay": 0.9, "ema_dtype": wide}
    good = copy.deepcopy(stepped(made(row, **extras), 3).state_dict())
    bad = copy.deepcopy(good)
    corrupt(bad)
    optimizer = stepped(made(row, **extras))
    snapshot = Snapshot(optimizer)
    theirs = pytest.raises((ValueError, TypeError, KeyError, AttributeError))
    ours = pytest.raises(ValueError, match=r"Invalid ema_steps: .* Is the checkpoint corrupt\?")
    with ours if corrupt.__name__.startswith("steps") else theirs:
        optimizer.load_state_dict(bad)
    snapshot.assert_unchanged()
    optimizer.load_state_dict(good)
    assert same(contents(optimizer)[3:], contents(stepped(made(row, **extras), 3))[3:])


def average_of_text(average: torch.Tensor) -> Any:
    return "text"


def average_of_a_number(average: torch.Tensor) -> Any:
    return 3.0


def average_of_another_shape(average: torch.Tensor) -> Any:
    return torch.ones(2, 7)


def average_of_integers(average: torch.Tensor) -> Any:
    return average.to(torch.int64)


def average_on_meta(average: torch.Tensor) -> Any:
    return average.to("meta")


def average_expanded(average: torch.Tensor) -> Any:
    return torch.ones(1).expand(average.shape)


AVERAGES = [v for k, v in list(globals().items()) if k.startswith("average_")]


@pytest.mark.parametrize("spoil", AVERAGES, ids=lambda spoil: spoil.__name__)
@pytest.mark.parametrize("has_grad", [True, False])
def test_averages_that_do_not_fit(row: Row, spoil: Callable[[Any], Any], has_grad: bool) -> None:
    """Nothing was written; one sentence says which."""
    optimizer = stepped(made(row, **{**EXTRAS, "clear_grads": False}), 2)
    p = all_params(optimizer)[1]
    if not has_grad:  # it is not stepped, but averaged
        p.grad = None
    kept = optimizer.state[p]["ema"]
    optimizer.state[p]["ema"] = spoil(kept)
    snapshot = Snapshot(optimizer)
    with pytest.raises((RuntimeError, TypeError)) as refused:
        optimizer.step()
    snapshot.assert_unchanged()
    if has_grad:
        said = str(refused.value).splitlines()[0]
        assert "param_groups[1]['params'][0]" in said and "'ema'" in said
    optimizer.state[p]["ema"] = kept
    optimizer.step()


@pytest.mark.parametrize("spoil", AVERAGES, ids=lambda spoil: spoil.__name__)
def test_averages_that_do_not_fit_in_torchs_code(row: Row, spoil: Callable[[Any], Any]) -> None:
    """Where that steps the parameter, it steps nothing either."""
    optimizer = stepped(made(row, more=(COMPLEX, COMPLEX), ema_decay=0.9), 2)
    p = all_params(optimizer)[-1]
    kept = optimizer.state[p]["ema"]
    optimizer.state[p]["ema"] = spoil(kept.real)
    snapshot = Snapshot(optimizer)
    for act in (step, lambda o: o.ema_weights().__enter__()):
        with pytest.raises((RuntimeError, TypeError), match="state 'ema'"):
            act(optimizer)
        snapshot.assert_unchanged()
    optimizer.state[p]["ema"] = kept
    optimizer.step()


def test_average_without_memory_in_torchs_code(row: Row) -> None:
    """Nor where its storage was freed, on which torch's operators would crash."""
    optimizer = stepped(made(row, more=(COMPLEX, COMPLEX), ema_decay=0.9), 2)
    p = all_params(optimizer)[-1]
    average = optimizer.state[p]["ema"]
    kept = average.clone()
    average.untyped_storage().resize_(0)
    before = copies(all_params(optimizer))
    with pytest.raises(RuntimeError, match="state 'ema' that has a storage of 0 bytes"):
        optimizer.step()
    assert_equal(copies(all_params(optimizer)), before)
    optimizer.state[p]["ema"] = kept
    optimizer.step()
