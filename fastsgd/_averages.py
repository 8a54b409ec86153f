"""Averages of parameters: those that torch's code has stepped, and averages in use."""

from __future__ import annotations

import operator
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer

from fastsgd import _C
from fastsgd._extras import (
    WithExtras,
    inside_ema_weights,
    of_the_optimizer_within,
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
        self._have_steps_added()  # whatever class it was made of
        return super().state_dict()

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Make torch's optimizer; its state dicts will have the number of averages."""
        super().__init__(*args, **kwargs)
        self._have_steps_added()

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take torch's state; hooks, of which it has none, are not copied."""
        super().__setstate__(state)
        self._have_steps_added()

    def _have_steps_added(self) -> None:
        # A hook, before all others: they see it, and may make something else of the whole.
        if add_steps not in self._optimizer_state_dict_post_hooks.values():
            self.register_state_dict_post_hook(add_steps, prepend=True)

    @of_the_optimizer_within
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a checkpoint of torch's or of ours. One that raises is not loaded at all."""
        refuse_inside_ema_weights(self, "load_state_dict()")
        own = self.__dict__
        kept = ("state", "param_groups", "_ema_steps")
        before: dict[str, Any] = {key: own[key] for key in kept if key in own}
        try:
            self._load(state_dict)
        except BaseException:
            own.pop("_ema_steps", None)
            own.update(before)  # torch makes new ones, and leaves these as they are
            raise

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

    def _load(self, state_dict: dict[str, Any]) -> None:
        loaded: dict[str, Any] = {}
        # The last of the hooks, and so it sees what is loaded in the end.
        hook = self.register_load_state_dict_pre_hook(lambda _, final: loaded.update(final))
        try:
            super().load_state_dict(state_dict)
        finally:
            hook.remove()
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
        the block, also if it raises, bit for bit; no copy is made. (float32 averages of halves are
        rounded; there the parameters' own values are copied for as long.) Parameters that have no
        average, as they never had a gradient, are their own.

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
        exchange = _Exchange(list(averages), list(averages.values()))
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
        state = super().__getstate__()
        for key in ("_extras", "_ema_steps"):
            if key in self.__dict__:
                value = self.__dict__[key]
                state[key] = dict(value) if key == "_extras" else value  # a copy has its own
        return state


def _states_of_params(optimizer: Optimizer) -> dict[Tensor, dict[str, Any]]:
    """Return the states of parameters, without what else may be in an optimizer's state."""
    return {
        param: own
        for param, own in optimizer.state.items()
        if isinstance(param, Tensor) and isinstance(own, dict)
    }


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


def note_averages(optimizer: Optimizer, count: int) -> None:
    """Note how many averages there were; once that is a tensor, on which graphs count, it stays."""
    steps = optimizer.__dict__.get("_ema_steps")
    if isinstance(steps, Tensor):
        with torch.inference_mode():  # in which it may have been made
            steps.fill_(count)
    else:
        optimizer.__dict__["_ema_steps"] = count


def _checked_steps(value: Any) -> int:
    try:
        return operator.index(value)
    except TypeError:
        raise ValueError(
            f"Invalid ema_steps: {value!r}. It is how many averages there were. Is the checkpoint "
            "corrupt?"
        ) from None


def _check(param: Tensor, average: Any, dtype: torch.dtype | None = None) -> None:
    """Raise where an average is none of a parameter, or of another dtype than it is to have."""
    if wrong := _what_is_wrong(param, average, dtype):
        raise wrong


def _what_is_wrong(param: Tensor, average: Any, dtype: torch.dtype | None) -> Exception | None:
    kind: type[Exception] = RuntimeError
    if not isinstance(average, Tensor):
        kind = TypeError
        text = f"that must be a Tensor, not {type(average).__name__}. Is the checkpoint corrupt?"
    elif param.shape != average.shape or param.device != average.device:
        where = f"of shape {tuple(average.shape)} on {average.device}"
        text = f"{where}. Was the parameter's data swapped?"
    elif not (average.is_floating_point() or average.is_complex()):
        text = f"of {average.dtype}, which no average has. Is the checkpoint corrupt?"
    elif dtype not in (None, average.dtype):
        cure = "Was the parameter's data or its dtype changed?"
        text = f"of {average.dtype}, which must have {dtype}. {cure}"
    elif why := _C.why_not_written(_local(average)):
        text = f"that {why}"
    else:
        return None
    return kind(f"{_name(param)} has a state 'ema' {text}")


def _why_not_back(param: Tensor, average: Tensor) -> Exception | None:
    """Return why a parameter cannot be given its own values back, if it cannot."""
    if why := _C.why_not_written(_local(param)):
        return RuntimeError(f"{_name(param)}, to be given its own values back, {why}")
    return _what_is_wrong(param, average, None)


def _name(param: Tensor) -> str:
    return f"a parameter of shape {tuple(param.shape)} on {param.device}"


class _Exchange:
    """An exchange of what parameters and averages hold, which can be undone wherever it stopped."""

    def __init__(self, params: list[Tensor], averages: list[Tensor]) -> None:
        """Check that they can be exchanged."""
        for param, average in zip(params, averages, strict=True):
            _check(param, average)
        self.pairs = list(zip(params, averages, strict=True))
        # Of each exchange by the kernels, there and back, the numbers of the pairs that it left.
        self.left: list[list[int]] = []
        # What those pairs held. An average of another dtype than its parameter keeps what it holds.
        self.held: dict[int, tuple[Tensor, Tensor | None]] = {}
        # The pairs that are exchanged back, and what those held that the kernels left then.
        self.exchanged: list[tuple[Tensor, Tensor]] = []
        self.back: dict[int, tuple[Tensor, Tensor]] = {}
        # Why some cannot be exchanged back: a parameter has other data than it had.
        self.spoilt: list[Exception] = []

    @torch.no_grad()
    def make(self) -> None:
        """Exchange."""
        self._in_kernels(self.pairs)
        for i in self.left[0]:
            param, average = map(_local, self.pairs[i])
            was = param.clone()
            self.held[i] = was, average.clone() if average.dtype == was.dtype else None
            param.copy_(average)
            if average.dtype == was.dtype:
                average.copy_(was)

    @torch.no_grad()
    def undo(self) -> None:
        """Exchange back what has been exchanged and not yet back."""
        # What was exchanged last comes first, as parameters may share memory.
        while self.held:
            i, held = next(reversed(self.held.items()))
            wrong = _why_not_back(*self.pairs[i])
            if wrong:
                self.spoilt.append(wrong)
            for tensor, value in zip(self.pairs[i], held, strict=True):
                if value is not None and not wrong:
                    _local(tensor).copy_(value)
            del self.held[i]
        if len(self.left) == 1:
            self.exchanged = []
            for pair in [p for i, p in enumerate(self.pairs) if i not in self.left[0]][::-1]:
                if wrong := _why_not_back(*pair):
                    self.spoilt.append(wrong)
                else:
                    self.exchanged.append(pair)
            self._in_kernels(self.exchanged)
        while len(self.left) == 2 and self.left[1]:
            i = self.left[1][0]  # by torch's operators, as a mode is on that was not
            param, average = map(_local, self.exchanged[i])
            if i not in self.back:
                self.back[i] = param.clone(), average.clone()
            average.copy_(self.back[i][0])
            param.copy_(self.back[i][1])
            del self.left[1][0]

    def check_all_back(self) -> None:
        """Raise where a parameter could not be given its own values back."""
        if self.spoilt:
            raise self.spoilt[0]

    def _in_kernels(self, pairs: list[tuple[Tensor, Tensor]]) -> None:
        params, averages = ([_local(pair[side]) for pair in pairs] for side in (0, 1))
        # Done and noted without a line of Python in between, before which an interrupt could come.
        self.left.extend(map(_C.exchange, [params], [averages]))


def _local(tensor: Tensor) -> Tensor:
    """Return the shard of a distributed tensor that is here; another is its own."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


class Average:
    """The averaging of one step, for parameters that torch's code steps."""

    def __init__(self, optimizer: Optimizer, decay: float, starts: bool, wide: Any) -> None:
        """Keep what the step has found out."""
        self.optimizer = optimizer
        self.decay = decay
        self.starts = starts
        self.wide = wide

    def begin(self, params: list[Tensor]) -> None:
        """Before the step: check, and one that starts late starts as it is now."""
        for param in params:
            if (average := self.optimizer.state.get(param, {}).get("ema")) is not None:
                _check(param, average, dtype_of_average(param, self.wide))
        self.before = {
            param: self._copy(param)
            for param in params
            if param.grad is not None and self.optimizer.state.get(param, {}).get("ema") is None
        }

    @torch.no_grad()
    def end(self, params: list[Tensor]) -> None:
        """After the step."""
        for param in dict.fromkeys(params):  # one that is named twice has one average
            state = self.optimizer.state.get(param, {})
            if param in self.before:
                state = self.optimizer.state[param]
                state["ema"] = self.before[param]
            if state.get("ema") is None:
                continue
            if self.starts:
                state["ema"].copy_(param)
            else:
                state["ema"].lerp_(param.detach().to(state["ema"].dtype), 1 - self.decay)

    def _copy(self, param: Tensor) -> Tensor:
        return param.detach().to(dtype_of_average(param, self.wide), copy=True)
