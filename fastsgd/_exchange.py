"""The exchange of what parameters and their averages hold, in place and back."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastsgd import _C


def check_average(param: Tensor, average: Any, dtype: torch.dtype | None = None) -> None:
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
    elif why := _C.why_not_written(local(average)):
        text = f"that {why}"
    else:
        return None
    return kind(f"{_name(param)} has a state 'ema' {text}")


def _why_not_back(param: Tensor, average: Tensor) -> Exception | None:
    """Return why a parameter cannot be given its own values back, if it cannot."""
    if why := _C.why_not_written(local(param)):
        return RuntimeError(f"{_name(param)}, to be given its own values back, {why}")
    return _what_is_wrong(param, average, None)


def _name(param: Tensor) -> str:
    return f"a parameter of shape {tuple(param.shape)} on {param.device}"


class Exchange:
    """An exchange of what parameters and averages hold, which can be undone wherever it stopped."""

    def __init__(self, params: list[Tensor], averages: list[Tensor]) -> None:
        """Check that they can be exchanged."""
        for param, average in zip(params, averages, strict=True):
            check_average(param, average)
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
            param, average = map(local, self.pairs[i])
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
                    local(tensor).copy_(value)
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
            param, average = map(local, self.exchanged[i])
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
        params, averages = ([local(pair[side]) for pair in pairs] for side in (0, 1))
        # Done and noted without a line of Python in between, before which an interrupt could come.
        self.left.extend(map(_C.exchange, [params], [averages]))


def local(tensor: Tensor) -> Tensor:
    """Return the shard of a distributed tensor that is here; another is its own."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor
