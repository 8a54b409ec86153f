"""What makes an optimizer of torch's take its steps in fastsgd's kernels.

A class that derives from :class:`FusedStep` and from one of torch's optimizers is that optimizer:
torch's class validates options, names states and loads checkpoints. ``step`` and ``zero_grad`` are
replaced. What the kernels do not take goes through torch's own single-tensor code.
"""

from __future__ import annotations

import functools
import inspect
import threading
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor
from torch._compile import _disable_dynamo
from torch.autograd.profiler import record_function
from torch.compiler import is_compiling
from torch.optim.optimizer import Optimizer, _use_grad_for_differentiable

from fastsgd import _C
from fastsgd._averages import WithAverages
from fastsgd._extras import DOC, WithExtras, any_asked, signature_with_extras, unwrapped
from fastsgd._stock import Step, step_as_stock, step_in_parts
from fastsgd._stock_extras import step_with_extras

STEP_DOC = """Perform a single optimization step, and what the options of one pass do around it.

Args:
    closure (Callable, optional): A closure that reevaluates the model and returns the loss.

Returns:
    What the closure returns; None without one.

Raises:
    RuntimeError: If the norm is not finite and ``error_if_nonfinite`` is set, inside
        ``ema_weights()``, and where torch raises one. Nothing has changed then.
"""
P = ParamSpec("P")
T = TypeVar("T")
# Of this thread: the optimizer, of a derived class, whose own step is under way.
_derived = threading.local()


def _is_stepped(optimizer: object) -> bool:
    """Whether this thread is in a step of a derived class's, whose hooks have run."""
    return getattr(_derived, "steps", None) is optimizer


def _call_noted(func: Callable[..., T], args: tuple[Any, ...], kwargs: dict[str, Any]) -> T:
    """Call a derived class's step, which is under way meanwhile."""
    before = getattr(_derived, "steps", None)
    _derived.steps = args[0] if args else kwargs.get("self")
    try:
        return func(*args, **kwargs)
    finally:
        _derived.steps = before


class FusedStep(WithAverages):
    """Mixin, before a torch optimizer among the bases, that steps it in one call.

    A class says in ``_rule`` which rule its step follows: its name in the list of rules of csrc.
    The rule's hyper-parameters, and ``maximize``, must be keys of every group. It takes the options
    of :class:`fastsgd._extras.WithExtras` besides its torch class's.
    """

    _rule: str

    @staticmethod
    def profile_hook_step(func: Callable[P, T]) -> Callable[P, T]:
        """Return torch's wrapper of the step of a derived class, which runs the hooks.

        Torch wraps such a step itself. While it runs, the step of ours that it calls runs none.
        """

        # A class of __main__ is pickled by value, with these functions: so they name others alone.
        @functools.wraps(func)
        def noted(*args: P.args, **kwargs: P.kwargs) -> T:
            return _call_noted(func, args, kwargs)

        observed = Optimizer.profile_hook_step(noted)

        @functools.wraps(func)
        def step(*args: P.args, **kwargs: P.kwargs) -> T:
            within = bool(args) and _is_stepped(args[0])  # by one that is derived from this class
            return (func if within else observed)(*args, **kwargs)

        return step

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
        """The total norm of the gradients at the last step that measured it, before clipping.

        Steps with ``max_grad_norm``, ``skip_nonfinite`` or ``error_if_nonfinite`` do; others leave
        it as it was. A new tensor without dimensions on the first gradient's device, float64 if any
        gradient was, else float32; None before the first such step. A device is not waited for.
        """
        return _C.grad_norm(unwrapped(self))

    @property
    def skipped_steps(self) -> int:
        """How many steps ``skip_nonfinite`` has skipped since the optimizer was made or copied.

        A device is waited for, to know it.

        Raises:
            RuntimeError: While a CUDA graph is being captured, if a device counts them.
        """
        return _C.skipped_steps(unwrapped(self))

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
        FusedStep.__init__(self, *args, **kwargs)

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
            in_torch = functools.partial(step_as_stock, stock_step=stock_step)
            if any_asked(self):
                step_with_extras(self, in_torch, routes)
                if self.clear_grads:
                    FusedStep.zero_grad(self, set_to_none=self.clear_grads is True)
            else:
                step_in_parts(self, in_torch, routes)
        return loss

    # The hooks, their protocol and the profiler's record are torch's own code.
    observed = Optimizer.profile_hook_step(unobserved)

    def stepped(self: FusedStep, *args: Any, **kwargs: Any) -> Any:
        return (unobserved if _is_stepped(self) else observed)(self, *args, **kwargs)

    untraced = _disable_dynamo(stepped)  # without importing dynamo

    @functools.wraps(stock_step)
    def step(self: FusedStep, *args: Any, **kwargs: Any) -> Any:
        if is_compiling():
            return untraced(self, *args, **kwargs)  # which breaks the graph, as torch's own does
        if (not (args or kwargs) or _no_closure(args, kwargs)) and _C.step(self):
            return None
        return stepped(self, *args, **kwargs)

    step.__doc__ = STEP_DOC
    step.hooked = True  # type: ignore[attr-defined]  # keeps torch from wrapping it once more
    return step


def _no_closure(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether the one argument of a call of ``step`` is a closure that is None."""
    if args:
        return len(args) == 1 and not kwargs and args[0] is None
    return len(kwargs) == 1 and kwargs.get("closure", args) is None


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
