"""torch's own path: the step of what the kernels do not take, in torch's single-tensor code."""

from __future__ import annotations

import warnings
from collections import deque
from collections.abc import Callable
from functools import partial
from operator import setitem
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer

from fastsgd import _C, _build_info
from fastsgd._check import rebuild_command

Step = Callable[..., Any]
# For each group, indices of parameters that are torch's to step. Without any group, all are; where
# all groups are empty, none is.
Routes = list[list[int]]
# What is known of a step's gradients and averages where anything is done around it: a factor, and a
# decay or None.
Known = tuple[()] | tuple[float, float | None]


def step_in_parts(
    optimizer: Optimizer,
    step_as_stock: Step,
    routes: Routes,
    known: Known = (),
) -> None:
    """Step the parameters that ``routes`` names in torch's code, then the others in the kernels.

    Args:
        optimizer: The optimizer.
        step_as_stock: Steps all parameters of one in torch's code.
        routes: Who is to take which.
        known: All that the kernels are to do around the rule, but for clipping by value; empty
            where nothing is done around it.
    """
    if not routes:
        step_as_stock(optimizer)
        return
    theirs = [
        [group["params"][i] for i in route]
        for group, route in zip(optimizer.param_groups, routes, strict=True)
    ]
    stepped = [param for part in theirs for param in part]
    if stepped:
        before = params_of(optimizer)
        _step_part(optimizer, step_as_stock, theirs)
        if not _is_ours(optimizer):  # whose loop over the groups has come to those added meanwhile
            known_before = set(map(id, before))
            stepped += [param for param in params_of(optimizer) if id(param) not in known_before]
    if _C.step_rest(optimizer, _routes_of(optimizer, stepped), *known):
        return
    groups = list(optimizer.param_groups)
    ours = [  # of which torch must take some after all
        [param for i, param in enumerate(group["params"]) if i not in part]
        for group, part in zip(groups, map(set, _routes_of(optimizer, stepped)), strict=True)
    ]
    with_changes(_params(groups, ours), partial(_step_the_rest, optimizer, step_as_stock, known))


def _routes_of(optimizer: Optimizer, params: list[Tensor]) -> Routes:
    """Return where these stand now: code that ran meanwhile may have changed the groups."""
    named = set(map(id, params))
    return [
        [i for i, param in enumerate(group["params"]) if id(param) in named]
        for group in optimizer.param_groups
    ]


def _is_ours(optimizer: Optimizer) -> bool:
    """Whether its class is one of this package's, or says at least whose rule it follows."""
    return "_rule" in vars(type(optimizer))


def _step_part(optimizer: Optimizer, step_as_stock: Step, params: list[list[Tensor]]) -> None:
    """Step some parameters of each group.

    Torch's code is given a stand-in. The optimizer itself stays whole: another thread may save a
    checkpoint meanwhile. Where it is of a class of somebody's own, whose code may look at more of
    it, its groups have only those parameters until they are stepped.
    """
    groups = optimizer.param_groups
    if not _is_ours(optimizer):
        with_changes(_params(groups, params), partial(step_as_stock, optimizer))
        return
    parts = [{**group, "params": part} for group, part in zip(groups, params, strict=True) if part]
    step_as_stock(_stand_in(optimizer, parts))


def _stand_in(optimizer: Optimizer, groups: list[dict[str, Any]]) -> Optimizer:
    """Return one of the optimizer's class with its states, and with groups of its own."""
    stand_in: Optimizer = object.__new__(type(optimizer))
    vars(stand_in).update(vars(optimizer), param_groups=groups)
    return stand_in


def _step_the_rest(optimizer: Optimizer, step_as_stock: Step, known: Known) -> None:
    routes_left = _C.step_or_route(optimizer, *known)
    if routes_left is not None:
        step_in_parts(optimizer, step_as_stock, routes_left, known)


def step_as_stock(optimizer: Optimizer, stock_step: Step) -> None:
    """Step every parameter in torch's single-tensor code, gradient scaling done before it."""
    scale = getattr(optimizer, "grad_scale", None)
    found_inf = getattr(optimizer, "found_inf", None)
    if found_inf is not None and found_inf.item():
        return
    params = params_of(optimizer)
    warn_of_devices(params)
    if scale is not None:
        _unscale(params, scale)
    changes = _changes(optimizer)
    if changes and _is_ours(optimizer):  # which stays as it is, for other threads
        optimizer = _stand_in(optimizer, [dict(group) for group in optimizer.param_groups])
        changes = _changes(optimizer)
    with_changes(changes, partial(stock_step, optimizer))


def params_of(optimizer: Optimizer) -> list[Tensor]:
    return [param for group in optimizer.param_groups for param in group["params"]]


def _unscale(params: list[Tensor], scale: Tensor) -> None:
    """Divide the gradients by a scale in place, as torch's fused steps do; all of them, or none."""
    for param in params:
        grad = param.grad
        if grad is None or grad.layout != torch.strided or grad.is_nested:
            continue
        if why := _C.why_not_written(grad):
            raise RuntimeError(f"A grad {why}")
    with torch.no_grad():
        for param in params:
            if param.grad is not None:
                param.grad.div_(scale.to(param.grad.device))


# Whose, of which name, what it was, and what it is to be.
Change = tuple[Any, str, Any, Any]


def with_changes(
    changes: list[Change],
    call: Callable[[], object],
    put: Callable[[Any, str, Any], None] = setitem,
) -> None:
    """Call with things changed, and put them back, whatever the call raises.

    An interrupt may come between any two lines of Python, those of a context manager's end among
    them, and would leave the optimizer without some of its parameters. None comes within a call of
    C code, so a single one puts everything back.
    """
    if not changes:
        call()
        return
    whose, names, was, values = ([change[i] for change in changes] for i in range(4))
    put_back: Callable[[], object] = partial(deque, map(put, whose, names, was), maxlen=0)
    try:
        deque(map(put, whose, names, values), maxlen=0)
        call()
    finally:
        put_back()


def _changes(optimizer: Optimizer) -> list[Change]:
    """Return what has torch step in its single-tensor code, gradients that are unscaled."""
    return [
        *_flags(optimizer.param_groups),
        *attributes(optimizer, grad_scale=None, found_inf=None),
    ]


def attributes(owner: object, **values: Any) -> list[Change]:
    """Return what changes those of these attributes that an object has to other values."""
    own = vars(owner)
    return [(own, name, own[name], value) for name, value in values.items() if name in own]


def _params(groups: list[dict[str, Any]], params: list[list[Tensor]]) -> list[Change]:
    return [
        (group, "params", group["params"], replacement)
        for group, replacement in zip(groups, params, strict=True)
    ]


_FLAGS = ("foreach", "fused", "capturable")


def _flags(groups: list[dict[str, Any]]) -> list[Change]:
    """Return what turns torch's other code off, for CPU parameters.

    There its fused code is wrong in places, and its capturable code is only for other devices.
    """
    return [
        (group, flag, group[flag], False)
        for group in groups
        if any(map(group.get, _FLAGS)) and any(p.device.type == "cpu" for p in group["params"])
        for flag in _FLAGS
        if group.get(flag)
    ]


_warned_of: set[str] = set()


def warn_of_devices(params: list[Tensor]) -> None:
    """Say once why parameters on a device take torch's path, where there are no kernels for it."""
    for device in _C.devices_of(params):
        if device.type == "meta" or _C.has_kernels_for(device):
            continue
        text = _why_not_on(device)
        if text not in _warned_of:
            _warned_of.add(text)
            warnings.warn(text, stacklevel=2)


def _why_not_on(device: torch.device) -> str:
    fate = (
        f"parameters on {device.type} are stepped by torch's own code, with torch's results and "
        "torch's speed."
    )
    if device.type != "cuda":
        return f"fastsgd has kernels for the CPU and for CUDA: {fate}"
    rebuild = f"rebuild fastsgd with {rebuild_command()}"
    kernels = _build_info.CUDA_KERNELS
    if kernels is not None:
        major, minor = torch.cuda.get_device_capability(device)
        return (
            f"fastsgd's CUDA kernels were compiled by {kernels}, not for {device} "
            f"({torch.cuda.get_device_name(device)}, sm_{major}{minor}): {fate} For the fast path, "
            f"set TORCH_CUDA_ARCH_LIST={major}.{minor} and {rebuild}."
        )
    return (
        f"fastsgd has no CUDA kernels, as {_build_info.NO_CUDA_KERNELS} when it was built: {fate} "
        f"For the fast path, {_build_info.CUDA_CURE}, then {rebuild}."
    )
