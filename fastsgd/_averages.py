"""Averages of parameters as an optimizer has them: in checkpoints, copies, and in use."""

from __future__ import annotations

import operator
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer
from torch.utils.hooks import RemovableHandle

from fastsgd._exchange import Exchange
from fastsgd._extras import (
    WithExtras,
    inside_ema_weights,
    of_the_optimizer_within,
    refuse_in_group,
    refuse_inside_ema_weights,
)

HALVES = (torch.bfloat16, torch.float16)


def dtype_of_average(param: Tensor, ema_dtype: torch.dtype | None) -> torch.dtype:
    """Return the dtype of a parameter's average: float32 for halves, if so asked."""
    return torch.float32 if ema_dtype is not None and param.dtype in HALVES else param.dtype


class WithAverages(WithExtras):
    """Mixin that keeps averages in checkpoints, and puts them in the parameters' place."""

    @of_the_optimizer_within
    def state_dict(self) -> dict[str, Any]:
        """Return torch's; the number of averages so far is the groups' key ``ema_steps``."""
        refuse_inside_ema_weights(self, "state_dict()")
        # Before all others, which see it, and may make something else of the whole.
        _put(add_steps, self._optimizer_state_dict_post_hooks, self.register_state_dict_post_hook)
        return super().state_dict()

    @of_the_optimizer_within
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a checkpoint of torch's or of ours. One that raises is not loaded at all."""
        refuse_inside_ema_weights(self, "load_state_dict()")
        _put(  # after all others: it sees what is loaded in the end
            note_loaded,
            self._optimizer_load_state_dict_pre_hooks,
            self.register_load_state_dict_pre_hook,
            last=True,
        )
        _put(  # before all others, which see what it has made
            take_averages,
            self._optimizer_load_state_dict_post_hooks,
            self.register_load_state_dict_post_hook,
        )
        own = self.__dict__
        kept = ("state", "param_groups", "_ema_steps")
        before: dict[str, Any] = {key: own[key] for key in kept if key in own}
        try:
            super().load_state_dict(state_dict)
        except BaseException:
            own.pop("_ema_steps", None)
            own.update(before)  # torch makes new ones, and leaves these as they are
            raise
        finally:
            own.pop("_loading", None)

    def _before_setting(self, name: str, value: Any) -> None:
        """Have the averages that there are in the dtype that they are to be kept in."""
        super()._before_setting(name, value)
        if name != "ema_dtype" or value is self.ema_dtype:
            return
        refuse_inside_ema_weights(self, "setting ema_dtype")
        with torch.inference_mode(False):
            averages = [
                (own, own["ema"].to(dtype_of_average(param, value)))
                for param, own in _states_of_params(self).items()
                if param.dtype in HALVES and isinstance(own.get("ema"), Tensor)
            ]
        for own, average in averages:
            own["ema"] = average

    def _take_averages(self, loaded: dict[str, Any]) -> None:
        """Take from what torch has loaded what is ours."""
        for group in self.param_groups:
            refuse_in_group(group)
        steps = [
            _checked_steps(group.pop("ema_steps"))
            for group in self.param_groups
            if "ema_steps" in group
        ]
        states = _states_of_params(self)
        for own in states.values():
            if isinstance(own.get("ema"), dict) and not own["ema"]:  # of none in a flat checkpoint
                del own["ema"]
        averages = any(own.get("ema") is not None for own in states.values())
        if steps or averages or "_ema_steps" in self.__dict__:
            self.__dict__["_ema_steps"] = max(steps, default=1 if averages else 0)
        if averages and self.ema_dtype is not None:
            self._load_wide_averages(loaded)

    def _load_wide_averages(self, loaded: dict[str, Any]) -> None:
        """Take float32 averages of halves as they are saved, and not in the parameter's dtype."""
        ids = [i for group in loaded["param_groups"] for i in group["params"]]
        params = [param for group in self.param_groups for param in group["params"]]
        for i, param in zip(ids, params, strict=True):
            own = loaded["state"].get(i)
            average = own.get("ema") if isinstance(own, dict) else None
            if isinstance(average, Tensor):  # what else it may be is an error of the step
                dtype = dtype_of_average(param, self.ema_dtype)
                self.state[param]["ema"] = average.to(device=param.device, dtype=dtype)

    @of_the_optimizer_within
    @contextmanager
    def ema_weights(self) -> Iterator[None]:
        """Have the parameters hold their averages within a ``with`` block.

        What parameters and averages hold is exchanged in place, and exchanged back at the end of
        the block, also if it raises, bit for bit. No copy is made but of what the kernels do not
        take, and of the parameters' own values where averages of halves are float32, which are
        rounded for the block. Parameters that have no average, as they never had a gradient, are
        their own.

        Raises:
            RuntimeError: Without ``ema_decay``, before the first step, or inside another such
                block; and inside this one by ``step()`` and whatever would save the averages for
                parameters: ``state_dict()``, ``load_state_dict()``, ``add_param_group()``, copies.

        Example:
            >>> with optimizer.ema_weights():
            ...     validate(model)
        """
        if self.ema_decay is None:
            raise RuntimeError("ema_weights() needs averages: make the optimizer with ema_decay.")
        refuse_inside_ema_weights(self, "ema_weights()")
        if not self.__dict__.get("_ema_steps"):
            raise RuntimeError(
                "ema_weights() before the first step: there are no averages yet. Take a step, or "
                "load a checkpoint that has them."
            )
        averages = {
            param: own["ema"]
            for param, own in _states_of_params(self).items()
            if own.get("ema") is not None
        }
        exchange = Exchange(list(averages), list(averages.values()))
        extras = self.__dict__["_extras"]

        block = object()  # this one: another thread may be in another

        def leave() -> None:
            exchange.undo()
            if extras.get("swapped") is block:
                del extras["swapped"]

        finished = False
        try:
            if extras.setdefault("swapped", block) is not block:
                raise inside_ema_weights("ema_weights()")
            exchange.make()
            yield
            finished = True
        finally:
            try:
                leave()
            except BaseException:  # an interrupt
                leave()
                raise
            if finished:  # what was raised in the block goes on else
                exchange.check_all_back()

    def __getstate__(self) -> dict[str, Any]:
        """Return torch's, with what is asked for besides torch's step."""
        refuse_inside_ema_weights(self, "copying or pickling")
        own, state = self.__dict__, super().__getstate__()
        kept = ["_ema_steps"]
        if "_extras" in own:
            state["_extras"] = dict(own["_extras"])  # a copy has its own
            # Torch leaves it out. Without it a GradScaler does not call step() on overflow, and
            # nothing clears the gradients then.
            kept.append("_step_supports_amp_scaling")
        state.update({key: own[key] for key in kept if key in own})
        return state


def _states_of_params(optimizer: Optimizer) -> dict[Tensor, dict[str, Any]]:
    """Return the states of parameters, without what else may be in an optimizer's state."""
    return {
        param: own
        for param, own in optimizer.state.items()
        if isinstance(param, Tensor) and isinstance(own, dict)
    }


def _put(
    hook: Callable[..., None],
    hooks: OrderedDict[int, Any],
    register: Callable[..., RemovableHandle],
    last: bool = False,
) -> None:
    """Have a hook be the first of all, or the last.

    One that is there stays as it is: torch may be going over them just now.
    """
    ends = reversed(hooks.values()) if last else iter(hooks.values())
    if next(ends, None) is hook:
        return
    key = next((key for key, value in hooks.items() if value is hook), None)
    if key is None:
        register(hook, prepend=not last)
    else:
        hooks.move_to_end(key, last=last)


def note_loaded(optimizer: Optimizer, state_dict: dict[str, Any]) -> None:
    """Note what is loaded, as torch takes averages in the parameter's dtype."""
    optimizer.__dict__["_loading"] = dict(state_dict)


def take_averages(optimizer: Optimizer) -> None:
    """Take from what torch has loaded what is ours."""
    loaded = optimizer.__dict__.pop("_loading", None)
    if loaded is not None and isinstance(optimizer, WithAverages):
        optimizer._take_averages(loaded)


def add_steps(optimizer: Optimizer, state_dict: dict[str, Any]) -> None:
    """Enter the number of averages, if they are counted, into the groups of a state dict.

    It may be 0 though there are averages: those that a step has begun which a device then skipped.
    """
    if "_ema_steps" in optimizer.__dict__:
        steps = averages_of(optimizer)
        for group in state_dict.get("param_groups", ()):
            group["ema_steps"] = steps


def averages_of(optimizer: Optimizer) -> int:
    """Return how many averages there were; a device that counts them is waited for."""
    steps = optimizer.__dict__.get("_ema_steps", 0)
    if isinstance(steps, Tensor) and steps.is_cuda:
        torch.cuda.synchronize(steps.device)  # whatever stream they were counted on
    return int(steps)


def _checked_steps(value: Any) -> int:
    try:
        steps = operator.index(value)
    except TypeError:  # which one of a float tensor raises, too
        steps = -1
    if 0 <= steps < 1 << 53:
        return steps
    raise ValueError(
        f"Invalid ema_steps: {value!r}. It is how many averages there were. Is the checkpoint "
        "corrupt?"
    )
