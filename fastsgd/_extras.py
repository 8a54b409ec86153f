"""What fastsgd's optimizers do in a step besides torch's: its options, checked.

They belong to an optimizer and not to a group, as a norm is that of all groups' gradients. They
are kept in the optimizer's attribute ``_extras``, a dict, which is there only if any was asked for.
"""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable
from numbers import Real
from typing import (
    Any,
    Concatenate,
    Generic,
    Literal,
    NoReturn,
    ParamSpec,
    TypedDict,
    TypeVar,
    overload,
)

import torch
from torch.optim.optimizer import Optimizer

Values = dict[str, Any]
P = ParamSpec("P")
T = TypeVar("T")
V = TypeVar("V")
# What two of the options may be.
Decay = float | Callable[[int], float] | None
Clearing = bool | Literal["zero"]


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def _number(name: str, value: Any) -> float:
    if not _is_number(value):
        raise TypeError(f"{name} must be a number, not {type(value).__name__}")
    if not 0 <= value:
        raise ValueError(f"Invalid {name}: {value}. It must be a number, and at least 0.")
    try:
        return float(value)
    except OverflowError:
        raise ValueError(f"Invalid {name}: it is beyond float64. For no bound, pass inf.") from None


def _optional_number(name: str, value: Any) -> float | None:
    return None if value is None else _number(name, value)


def _flag(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, not {value!r}")
    return value


def _norm_type(name: str, value: Any) -> float:
    if value in (2, math.inf, "inf"):
        return float(value)
    raise ValueError(
        f"Invalid {name}: {value!r}. A step clips by the norm of order 2 or inf: for another, call "
        "torch.nn.utils.clip_grad_norm_ before it."
    )


def checked_decay(value: Any) -> float:
    """Return the decay of an average as a float, in torch's words if it is none."""
    if _is_number(value):
        if 0 <= value <= 1:
            return float(value)
        raise ValueError(
            f"Invalid decay value {value} provided. Please provide a value in [0,1] range."
        )
    raise TypeError(f"ema_decay must be a number or a callable, not {type(value).__name__}")


def _decay(name: str, value: Any) -> Decay:
    return value if value is None or callable(value) else checked_decay(value)


def _dtype(name: str, value: Any) -> torch.dtype | None:
    if value is None or value is torch.float32:
        return value
    raise ValueError(f"Invalid {name}: {value!r}. It is None (the parameter's) or torch.float32.")


def _clear(name: str, value: Any) -> Clearing:
    if value is True or value is False:
        return value
    if value == "zero":
        return "zero"
    raise ValueError(f"Invalid {name}: {value!r}. It is False, True (to None) or 'zero'.")


def unwrapped(optimizer: Any) -> Any:
    """Return the optimizer within a wrapper that derives from its class, as Lightning's do.

    They hold it in ``optimizer``; what they have of their own are not an optimizer's attributes.
    """
    while "param_groups" not in optimizer.__dict__ and hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    return optimizer


def of_the_optimizer_within(method: Callable[Concatenate[Any, P], T]) -> Callable[..., T]:
    """Have a method of such a wrapper be that of the optimizer within."""

    @functools.wraps(method)
    def call(self: Any, *args: P.args, **kwargs: P.kwargs) -> T:
        within = unwrapped(self)
        if within is self:
            return method(self, *args, **kwargs)
        result: T = getattr(within, method.__name__)(*args, **kwargs)
        return result

    return call


class Extra(Generic[V]):
    """An option of an optimizer, read and set as an attribute; setting it checks it first."""

    def __init__(self, default: V, check: Callable[[str, Any], V], doc: str) -> None:
        """Keep what is said of it."""
        self.default = default
        self.check = check
        self.__doc__ = doc

    def __set_name__(self, owner: type, name: str) -> None:
        """Enter it into the list of all."""
        self.name = name
        EXTRAS[name] = self

    @overload
    def __get__(self, optimizer: None, owner: type) -> Extra[V]: ...
    @overload
    def __get__(self, optimizer: Optimizer, owner: type) -> V: ...
    def __get__(self, optimizer: Optimizer | None, owner: type) -> Extra[V] | V:
        """Return its value; of the class, itself."""
        if optimizer is None:
            return self
        values: Values = unwrapped(optimizer).__dict__.get("_extras", {})
        value: V = values.get(self.name, self.default)
        return value

    def __set__(self, optimizer: Any, value: V) -> None:
        """Set it, if it is valid together with the others."""
        value = self.check(self.name, value)
        optimizer = unwrapped(optimizer)
        if not hasattr(optimizer, "param_groups"):  # __init__ will check it with the others
            optimizer.__dict__.setdefault("_extras", {})[self.name] = value
            return
        extras: Values = optimizer.__dict__.get("_extras", {})
        changed = {**extras, self.name: value}
        if changed.get("skip_nonfinite") and changed.get("error_if_nonfinite"):
            raise ValueError(
                "skip_nonfinite and error_if_nonfinite cannot both be True: a step with gradients "
                "that are not finite is either skipped or an error."
            )
        if value != self.default and optimizer.defaults.get("differentiable"):
            raise ValueError(
                f"{self.name} cannot be had with differentiable=True, whose steps are torch's own "
                "code: leave one of the two out."
            )
        for group in optimizer.param_groups:
            refuse_parts(changed, group["params"])
        optimizer._before_setting(self.name, value)
        if value != self.default or extras:
            extras[self.name] = value
            optimizer.__dict__["_extras"] = extras
            if optimizer.defaults.get("fused"):  # which a copy may have lost
                optimizer.__dict__.setdefault("_step_supports_amp_scaling", True)


def refuse_parts(extras: Values, params: list[Any]) -> None:
    """Raise where a norm is asked for of parameters that are parts, as each process has some."""
    asked = names_asked(extras, MEASURING) if extras else []
    if asked and any(getattr(param, "_fsdp_flattened", False) for param in params):
        raise ValueError(
            f"{asked[0]} cannot be had with FullyShardedDataParallel, which gives the optimizer of "
            "each process a part of the parameters, and so a norm of its own. Use fully_shard, or "
            "call the wrapper's clip_grad_norm_ before step()."
        )


def refuse_in_group(group: Any) -> None:
    """Raise where a group has an option that is the optimizer's."""
    if isinstance(group, dict) and not EXTRAS.keys().isdisjoint(group):
        raise_in_group(next(name for name in EXTRAS if name in group))


def raise_in_group(name: str) -> NoReturn:
    """Say that an option is none of a group's."""
    raise ValueError(
        f"{name} belongs to the optimizer and not to a group: take it out of the group, and pass "
        f"it to the constructor, or set optimizer.{name}. (A ZeroRedundancyOptimizer, which hands "
        "options to groups, cannot have it.)"
    )


MEASURING = ("max_grad_norm", "skip_nonfinite", "error_if_nonfinite")
ACTING = (*MEASURING, "clip_grad_value", "ema_decay", "clear_grads")


def any_asked(optimizer: Optimizer) -> bool:
    """Whether anything is done around the rule; `norm_type` and `ema_dtype` alone do nothing."""
    return bool(names_asked(optimizer.__dict__.get("_extras", {}), ACTING))


def names_asked(extras: Values, names: tuple[str, ...]) -> list[str]:
    """Return those of some options that are neither unset nor off, which 0 is not."""
    values = [(name, extras.get(name)) for name in names]
    return [name for name, value in values if value is not None and value is not False]


class OnePass(TypedDict, total=False):
    """The options as type checkers see them; what they mean is said in ``DOC``."""

    max_grad_norm: float | None
    norm_type: float
    error_if_nonfinite: bool
    clip_grad_value: float | None
    skip_nonfinite: bool
    ema_decay: Decay
    ema_dtype: torch.dtype | None
    clear_grads: Clearing


# What the docstring of every optimizer ends with.
DOC = """
    One pass. Every optimizer of fastsgd also takes, keyword-only, what training loops do around a
    step, and does it in the step's own pass over memory. Each is an attribute too, which may be set
    between steps. They belong to the optimizer, not to a group, and cannot be had with
    ``differentiable=True``.

    Args:
        max_grad_norm: Scale all gradients together down to this norm, at least 0, as
            :func:`torch.nn.utils.clip_grad_norm_` does, but without writing them: the step takes
            ``g * min(1, max_grad_norm / (norm + 1e-6))``. None (the default) for none.
        norm_type: Order of the norm, 2 (the default) or inf.
        error_if_nonfinite: Raise torch's RuntimeError where the norm is not finite; a device is
            waited for, to know it.
        clip_grad_value: Take the elements of gradients, after ``max_grad_norm``, as clamped to this
            distance from 0, as :func:`torch.nn.utils.clip_grad_value_` does. None for none.
        skip_nonfinite: Leave parameters, states, step counts and averages alone in a step in which
            any element of any gradient is infinite or NaN, and count it in ``skipped_steps``.
        ema_decay: Keep an exponential moving average of each parameter in its state ``ema``,
            ``ema = ema_decay * ema + (1 - ema_decay) * p`` after each step, the parameter itself
            after the first: as :class:`torch.optim.swa_utils.AveragedModel` with
            :func:`~torch.optim.swa_utils.get_ema_multi_avg_fn`. A number in [0, 1], or a callable
            that is given the number of the average, from 1 on, and returns one. None for none. A
            device that may have skipped steps, or repeated them in a graph, is asked for the
            number, and waited for; a graph cannot be captured with a callable.
        ema_dtype: None to keep averages in the parameter's dtype; ``torch.float32`` to keep those
            of bfloat16 and float16 parameters in float32.
        clear_grads: True to set every gradient to None after the step; ``"zero"`` to keep the
            tensors and fill them with zeros. A step that is skipped clears them too; but a
            :class:`torch.amp.GradScaler` that finds an overflow does not call ``step()`` unless
            ``fused=True``, and then nothing is cleared.

    Attributes:
        grad_norm: The total norm at the last step that measured one, before clipping, of unscaled
            gradients. (One that a GradScaler has the step skip measures none.)
        skipped_steps: How many steps ``skip_nonfinite`` has skipped.

    ``with optimizer.ema_weights():`` has the parameters hold their averages for a while.

    Raises:
        ValueError: If one of these is out of its range, is none of those that it can be, or stands
            in a group.
        TypeError: If a number or a flag is of another type.
"""

# By name, in the order in which the constructors take them.
EXTRAS: dict[str, Extra[Any]] = {}


class WithExtras(Optimizer):
    """Mixin with the options, that passes what torch's class takes on to it."""

    max_grad_norm = Extra[float | None](
        None,
        _optional_number,
        "Norm to which all gradients together are scaled down, or None.",
    )
    norm_type = Extra[float](2.0, _norm_type, "Order of the norm, 2 or inf.")
    error_if_nonfinite = Extra[bool](False, _flag, "Raise where the norm is not finite.")
    clip_grad_value = Extra[float | None](
        None, _optional_number, "Greatest magnitude of an element of a gradient, or None."
    )
    skip_nonfinite = Extra[bool](False, _flag, "Skip a step with gradients that are not finite.")
    ema_decay = Extra[Decay](
        None, _decay, "Decay of an average of each parameter, a schedule of it, or None."
    )
    ema_dtype = Extra[torch.dtype | None](
        None, _dtype, "None for the parameter's dtype, torch.float32 for at least that."
    )
    clear_grads = Extra[Clearing](
        False, _clear, "Clear the gradients after a step, to None (True) or to zeros ('zero')."
    )

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Make torch's optimizer, and set what is not its."""
        early: Values = self.__dict__.pop("_extras", {})  # set by a subclass before this
        extras = {name: kwargs.pop(name) for name in EXTRAS if name in kwargs}
        super().__init__(*args, **kwargs)
        for name, value in {**early, **extras}.items():
            setattr(self, name, value)

    def __repr__(self) -> str:
        """Return torch's, with the options that are asked for."""
        extras: Values = unwrapped(self).__dict__.get("_extras", {})
        asked = [
            f"    {name}: {extras[name]}\n"
            for name, extra in EXTRAS.items()
            if name in extras and extras[name] != extra.default
        ]
        text = super().__repr__()
        if not asked or not text.endswith(")"):
            return text
        return "".join([text[:-1], "\nOne pass\n", *asked, ")"])

    def _before_setting(self, name: str, value: Any) -> None:
        """Change what goes with an option that is about to be set, or raise."""

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group as torch does; one that has an option which no group can have is refused."""
        within = unwrapped(self)
        refuse_inside_ema_weights(within, "add_param_group()")
        refuse_in_group(param_group)
        super().add_param_group(param_group)
        try:
            refuse_parts(within.__dict__.get("_extras", {}), self.param_groups[-1]["params"])
        except ValueError:
            del self.param_groups[-1]
            raise


def signature_with_extras(stock_init: Callable[..., None]) -> inspect.Signature:
    """Return the signature of torch's constructor with the options added, keyword-only."""
    stock = inspect.signature(stock_init)
    added = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=extra.default)
        for name, extra in EXTRAS.items()
    ]
    return stock.replace(parameters=[*stock.parameters.values(), *added])


def refuse_inside_ema_weights(optimizer: Optimizer, what: str) -> None:
    """Raise where the parameters hold their averages just now."""
    if "swapped" in optimizer.__dict__.get("_extras", ()):
        raise inside_ema_weights(what)


def inside_ema_weights(what: str) -> RuntimeError:
    """Return the error."""
    return RuntimeError(
        f"{what} inside ema_weights(): the parameters hold their averages, and their own values "
        "are in the optimizer's state. Leave the block first."
    )
