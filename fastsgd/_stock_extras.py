"""What is done around the rule where torch's code steps a part of the parameters."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer

from fastsgd import _C, _norm
from fastsgd._averages import WithAverages, averages_of, dtype_of_average
from fastsgd._exchange import check_average
from fastsgd._stock import (
    Change,
    Routes,
    Step,
    attributes,
    params_of,
    step_in_parts,
    with_changes,
)


def step_with_extras(optimizer: WithAverages, step_as_stock: Step, routes: Routes) -> None:
    """Step in parts, with what the kernels would do around it done here for torch's part."""
    if optimizer.clear_grads == "zero":
        _refuse_what_cannot_be_zeroed(optimizer, routes)
    found_inf = getattr(optimizer, "found_inf", None)
    taken = found_inf is None or not found_inf.item()
    if taken:
        scale = getattr(optimizer, "grad_scale", None)
        factor = _factor(optimizer, scale)
    if taken and factor is not None:
        averaged = averages_of(optimizer)
        decay = optimizer.ema_decay
        if callable(decay):
            decay = _C.decay(optimizer)
        average = _Average(optimizer, decay or 0.0, not averaged, optimizer.ema_dtype)

        def step_part(optimizer: WithAverages) -> None:
            params = params_of(optimizer)
            if decay is not None:
                average.begin(params)
            step = partial(step_as_stock, optimizer)
            if scale is not None:
                step = partial(with_changes, attributes(optimizer, grad_scale=None), step)
            treated = _treated(params, scale, factor, optimizer.clip_grad_value)
            with_changes(treated, step, put=setattr)
            if decay is not None:
                average.end(params)

        step_in_parts(optimizer, step_part, routes, (factor, decay))
        if decay is not None:  # of which the kernels may have counted their part
            _note_averages(optimizer, averaged + 1)


def _refuse_what_cannot_be_zeroed(optimizer: WithAverages, routes: Routes) -> None:
    """Raise before the step where zeroing the gradients after it would.

    Those that the kernels are to take they have looked at.
    """
    groups = optimizer.param_groups
    parts = [group["params"][i] for group, part in zip(groups, routes, strict=False) for i in part]
    for param in parts if routes else params_of(optimizer):
        if param.grad is not None and (why := _C.why_not_zeroed(param.grad)):
            raise RuntimeError(f"A grad {why}: set clear_grads to True instead.")


def _factor(optimizer: WithAverages, scale: Tensor | None) -> float | None:
    """Return what gradients are to be multiplied by; None where the step is to be skipped."""
    max_norm = optimizer.max_grad_norm
    if max_norm is None and not optimizer.skip_nonfinite and not optimizer.error_if_nonfinite:
        return 1.0
    params = params_of(optimizer)
    found = _norm.Found(params, optimizer.norm_type)
    with torch.no_grad():
        norm = found.norm()
        if scale is not None:
            norm = norm / scale.to(norm.device)
        unknown = found.is_unknown(norm)
        finite = unknown or bool(norm.isfinite())
        # Or others are to ask, too.
        alone = not any(hasattr(grad, "device_mesh") for grad in found.others)
        if not finite and optimizer.skip_nonfinite and alone:  # squares may be beyond float64
            finite = _norm.Found(params, math.inf).is_finite()
        norm = norm.to(found.dtype)
        _C.note(optimizer, norm, optimizer.skip_nonfinite and not finite)
        if optimizer.error_if_nonfinite and not unknown:
            _norm.raise_if_nonfinite(norm, optimizer.norm_type)
        if optimizer.skip_nonfinite and not finite:
            return None
        if max_norm is None or unknown:
            return 1.0
        return _norm.clip_factor(norm, max_norm).item()


@torch.no_grad()
def _treated(
    params: list[Tensor], scale: Tensor | None, factor: float, bound: float | None
) -> list[Change]:
    """Return what puts copies that are unscaled and clipped in the gradients' place."""

    def treated(values: Tensor) -> Tensor:
        if scale is not None:  # one without dimensions would take the scale's dtype
            values = (values / scale.to(values.device)).to(values.dtype)
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
            grad._indices(),
            values,
            grad.shape,
            is_coalesced=grad.is_coalesced(),
            check_invariants=False,
        )

    if scale is None and factor == 1 and bound is None:
        return []
    changes: list[Change] = []
    for param in params:
        grad = param.grad
        if grad is None:
            continue
        if grad.dtype == param.dtype and grad.shape == param.shape:
            changes.append((param, "grad", grad, copy(grad)))
        else:  # which could not be given to the parameter again
            changes.append((grad, "data", grad.data, copy(grad.data)))
    return changes


def _note_averages(optimizer: Optimizer, count: int) -> None:
    """Note how many averages there were; once that is a tensor, on which graphs count, it stays."""
    steps = optimizer.__dict__.get("_ema_steps")
    if isinstance(steps, Tensor):
        with torch.inference_mode():  # in which it may have been made
            steps.fill_(count)
    else:
        optimizer.__dict__["_ema_steps"] = count


class _Average:
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
                check_average(param, average, dtype_of_average(param, self.wide))
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
            if param in self.before:  # which has no states yet where the rule keeps none
                state = self.optimizer.state.setdefault(param, {})
                state["ema"] = self.before[param]
            if state.get("ema") is None:
                continue
            if self.starts:
                state["ema"].copy_(param)
            else:
                state["ema"].lerp_(param.detach().to(state["ema"].dtype), 1 - self.decay)

    def _copy(self, param: Tensor) -> Tensor:
        return param.detach().to(dtype_of_average(param, self.wide), copy=True)
