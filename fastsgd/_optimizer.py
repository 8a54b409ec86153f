"""What makes an optimizer of torch's take its steps in fastsgd's kernels.

A class that derives from :class:`FusedStep` and from one of torch's optimizers is that optimizer:
torch's class validates options, names states and loads checkpoints. ``step`` and ``zero_grad`` are
replaced. What the kernels do not take goes through torch's own single-tensor code.
"""

from __future__ import annotations

import functools
import inspect
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.autograd.profiler import record_function
from torch.compiler import is_compiling
from torch.optim.optimizer import Optimizer, _use_grad_for_differentiable

from fastsgd import _C, _build_info, _norm
from fastsgd._averages import Average, WithAverages
from fastsgd._check import rebuild_command
from fastsgd._extras import DOC, WithExtras, checked_decay, signature_with_extras

Step = Callable[..., Any]
# For each group, indices of parameters; without any group, every parameter is meant.
Routes = list[list[int]]


class FusedStep(WithAverages):
    """Mixin, before a torch optimizer among the bases, that steps it in one call.

    A class says in ``_rule`` which rule its step follows: its name in the list of rules of csrc.
    The rule's hyper-parameters, and ``maximize``, must be keys of every group. It takes the options
    of :class:`fastsgd._extras.WithExtras` besides its torch class's.
    """

    _rule: str

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Give a class that names a rule the step of that rule."""
        super().__init_subclass__(**kwargs)
        if "_rule" in cls.__dict__:
            # As torch wrote it: without the wrapper that runs the hooks, which step() runs itself.
            written = inspect.unwrap(super().step)
            cls.step = _make_step(_use_grad_for_differentiable(written))  # type: ignore[method-assign]
            cls.__doc__ = (cls.__doc__ or "").rstrip() + "\n" + DOC
            cls.__init__ = _make_init(super(WithExtras, cls).__init__)  # type: ignore[method-assign]

    @property
    def grad_norm(self) -> Tensor | None:
        """The total norm of the gradients at the last step, before clipping.

        A new tensor without dimensions on the first parameter's device, float64 if any gradient
        was, else float32; None before a step that had a use for it (``max_grad_norm``,
        ``skip_nonfinite`` or ``error_if_nonfinite``).
        """
        return _C.grad_norm(self)

    @property
    def skipped_steps(self) -> int:
        """How many steps ``skip_nonfinite`` has skipped since the optimizer was made or copied."""
        return _C.skipped_steps(self)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Reset the gradients of all parameters, in one call.

        Args:
            set_to_none: Set them to None, as torch does by default; else fill them with zeros, in
                one parallel pass. A gradient that is part of a graph is detached from it first.
        """
        if is_compiling():
            super().zero_grad(set_to_none)
            return
        others = _C.zero_grad(self, set_to_none, False)
        if others is None:  # someone profiles
            with record_function(f"Optimizer.zero_grad#{type(self).__name__}.zero_grad"):
                others = _C.zero_grad(self, set_to_none, True)
        if others is NotImplemented:  # the groups are kept in some way of their own
            super().zero_grad(set_to_none)
            return
        for param in others or ():
            _reset_grad(param, set_to_none)


def _make_init(stock_init: Callable[..., None]) -> Callable[..., None]:
    """Return the constructor of a class whose torch class has ``stock_init``."""

    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:  # noqa: N807
        WithExtras.__init__(self, *args, **kwargs)

    __init__.__signature__ = signature_with_extras(stock_init)  # type: ignore[attr-defined]
    __init__.__doc__ = stock_init.__doc__
    return __init__


def _make_step(stock_step: Step) -> Step:
    """Return the ``step`` method of a class whose torch class steps by ``stock_step``."""

    @functools.wraps(stock_step)
    def unobserved(self: FusedStep, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        routes = _C.step_or_route(self)
        if routes is not None:
            step_as_stock = functools.partial(_step_as_stock, stock_step=stock_step)
            if "_extras" in self.__dict__:
                _step_with_extras(self, step_as_stock, routes)
            else:
                _step_in_parts(self, step_as_stock, routes)
        return loss

    # The hooks, their protocol and the profiler's record are torch's own code.
    observed = Optimizer.profile_hook_step(unobserved)

    @functools.wraps(stock_step)
    def step(self: FusedStep, *args: Any, **kwargs: Any) -> Any:
        if is_compiling() and "_extras" not in self.__dict__:
            # torch breaks the graph in there, and what called step() then calls it untraced.
            return stock_step(self, *args, **kwargs)
        if not args and not kwargs and _C.step(self):
            return None
        return observed(self, *args, **kwargs)

    step.hooked = True  # type: ignore[attr-defined]  # keeps torch from wrapping it once more
    return step


# --- torch's own path ---------------------------------------------------------------------------


def _step_in_parts(optimizer: Optimizer, step_as_stock: Step, routes: Routes) -> None:
    """Step the parameters that ``routes`` names in torch's code, then the others in the kernels."""
    groups = optimizer.param_groups
    if not routes:
        step_as_stock(optimizer)
        return
    theirs = [
        [group["params"][i] for i in route] for group, route in zip(groups, routes, strict=True)
    ]
    ours = [
        [param for i, param in enumerate(group["params"]) if i not in route]
        for group, route in zip(groups, map(set, routes), strict=True)
    ]
    if any(theirs):
        with _params_replaced(groups, theirs):
            step_as_stock(optimizer)
    with _params_replaced(groups, ours):
        routes_left = _C.step_or_route(optimizer)
        if routes_left is not None:
            _step_in_parts(optimizer, step_as_stock, routes_left)


def _step_as_stock(optimizer: Optimizer, stock_step: Step) -> None:
    """Step every parameter in torch's single-tensor code, gradient scaling done before it."""
    scale, found_inf = (getattr(optimizer, name, None) for name in ("grad_scale", "found_inf"))
    if found_inf is not None and found_inf.item():
        return
    params = _params_of(optimizer)
    _warn_of_devices(params)
    scaling = {name: None for name in ("grad_scale", "found_inf") if hasattr(optimizer, name)}
    with _unfused(optimizer.param_groups), _attributes_replaced(optimizer, scaling):
        if scale is not None:
            _unscale(params, scale)
        stock_step(optimizer)


def _params_of(optimizer: Optimizer) -> list[Tensor]:
    return [param for group in optimizer.param_groups for param in group["params"]]


def _unscale(params: list[Tensor], scale: Tensor) -> None:
    """Divide the gradients by a scale in place, as torch's fused steps do."""
    with torch.no_grad():
        for param in params:
            if param.grad is not None:
                param.grad.div_(scale.to(param.grad.device))


@contextmanager
def _unfused(groups: list[dict[str, Any]]) -> Iterator[None]:
    """Turn torch's other code off, for CPU parameters.

    There its fused code is wrong in places, and its capturable code is only for other devices.
    """
    flags = ("foreach", "fused", "capturable")
    changed = [
        (group, {flag: group[flag] for flag in flags if group.get(flag)})
        for group in groups
        if any(param.device.type == "cpu" for param in group["params"])
    ]
    try:
        for group, was in changed:
            group.update(dict.fromkeys(was, False))
        yield
    finally:
        for group, was in changed:
            group.update(was)


@contextmanager
def _params_replaced(groups: list[dict[str, Any]], params: list[list[Tensor]]) -> Iterator[None]:
    was = [group["params"] for group in groups]
    try:
        for group, replacement in zip(groups, params, strict=True):
            group["params"] = replacement
        yield
    finally:
        for group, original in zip(groups, was, strict=True):
            group["params"] = original


@contextmanager
def _attributes_replaced(owner: object, attributes: dict[str, Any]) -> Iterator[None]:
    was = {name: getattr(owner, name) for name in attributes}
    try:
        for name, value in attributes.items():
            setattr(owner, name, value)
        yield
    finally:
        for name, value in was.items():
            setattr(owner, name, value)


# --- extras where torch's code takes a part -------------------------------------------------------


def _step_with_extras(optimizer: FusedStep, step_as_stock: Step, routes: Routes) -> None:
    """Step in parts, with what the kernels would do around it done here for torch's part."""
    extras = optimizer.__dict__["_extras"]
    found_inf = getattr(optimizer, "found_inf", None)
    taken = found_inf is None or not found_inf.item()
    if taken:
        scale = getattr(optimizer, "grad_scale", None)
        factor = _factor(optimizer, scale)
    if taken and factor is not None:
        averaged = optimizer.__dict__.get("_ema_steps", 0)
        decay = optimizer.ema_decay
        if callable(decay):
            decay = checked_decay(decay(averaged + 1))
        average = Average(optimizer, decay or 0.0, not averaged, optimizer.ema_dtype)

        def step_part(optimizer: FusedStep) -> None:
            params = _params_of(optimizer)
            if decay is not None:
                average.begin(params)
            unscaled = {name: None for name in ("grad_scale",) if scale is not None}
            with (
                _grads_treated(params, scale, factor, optimizer.clip_grad_value),
                _attributes_replaced(optimizer, unscaled),
            ):
                step_as_stock(optimizer)
            if decay is not None:
                average.end(params)

        bound = {key: extras[key] for key in ("clip_grad_value", "ema_dtype") if key in extras}
        for_kernels = {**bound, "factor": factor, "ema_decay": decay}
        with _attributes_replaced(optimizer, {"_extras": for_kernels}):
            _step_in_parts(optimizer, step_part, routes)
        if decay is not None:
            optimizer.__dict__["_ema_steps"] = averaged + 1
    if optimizer.clear_grads:
        FusedStep.zero_grad(optimizer, set_to_none=optimizer.clear_grads is True)


def _factor(optimizer: FusedStep, scale: Tensor | None) -> float | None:
    """Return what gradients are to be multiplied by; None where the step is to be skipped."""
    max_norm = optimizer.max_grad_norm
    if max_norm is None and not optimizer.skip_nonfinite and not optimizer.error_if_nonfinite:
        return 1.0
    grads = [param.grad for param in _params_of(optimizer) if param.grad is not None]
    with torch.no_grad():
        norm = _norm.total_norm(grads, optimizer.norm_type)
        if scale is not None:
            norm = norm / scale.to(norm.device)
        finite = bool(norm.isfinite())
        norm = norm.to(_norm.norm_dtype(grads))
        _C.note(optimizer, norm, optimizer.skip_nonfinite and not finite)
        if optimizer.error_if_nonfinite:
            _norm.raise_if_nonfinite(norm, optimizer.norm_type)
        if optimizer.skip_nonfinite and not finite:
            return None
        return 1.0 if max_norm is None else _norm.clip_factor(norm, max_norm).item()


@contextmanager
def _grads_treated(
    params: list[Tensor], scale: Tensor | None, factor: float, bound: float | None
) -> Iterator[None]:
    """Put copies that are unscaled and clipped in the gradients' place."""

    def treated(values: Tensor) -> Tensor:
        if scale is not None:
            values = values / scale.to(values.device)
        if factor != 1:
            values = values * factor
        return values if bound is None else values.clamp(-bound, bound)

    def copy(grad: Tensor) -> Tensor:
        if not grad.is_sparse:
            return treated(grad)
        if bound is not None:  # which is for the sum of what stands at one place
            grad = grad.coalesce()
        values = treated(grad._values())
        return torch.sparse_coo_tensor(
            grad._indices(), values, grad.shape, is_coalesced=grad.is_coalesced()
        )

    if scale is None and factor == 1 and bound is None:
        yield
        return
    with torch.no_grad():
        copies = [
            (param, param.grad, copy(param.grad)) for param in params if param.grad is not None
        ]
    try:
        for param, _, copied in copies:
            param.grad = copied
        yield
    finally:
        for param, grad, _ in copies:
            param.grad = grad


_warned_of: set[str] = set()


def _warn_of_devices(params: list[Tensor]) -> None:
    """Say once why parameters on a device take torch's path, where there are no kernels for it."""
    for device in {param.device for param in params if param.device.type != "meta"}:
        if _C.has_kernels_for(device):
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


def _reset_grad(param: Tensor, set_to_none: bool) -> None:
    """Reset the gradient of one parameter that may be any kind of tensor, as torch does."""
    if param.grad is None:
        return
    if set_to_none:
        param.grad = None
        return
    if param.grad.grad_fn is not None:
        param.grad.detach_()
    else:
        param.grad.requires_grad_(False)
    param.grad.zero_()
