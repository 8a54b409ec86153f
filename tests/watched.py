"""A parameter that does something when it is looked at, or written."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch.nn import Parameter


class Watched(Parameter):
    """A parameter of a subclass, so that whoever meets it runs Python code: what a test sets."""

    on_grad: Callable[[], Any] | None = None  # called before it is asked for its grad
    on_write: Callable[[], Any] | None = None  # before an operator writes a tensor next to it

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call what is set, if this is what it is for."""
        watched = next((each for each in args if isinstance(each, cls)), None)
        act = None
        if watched is not None and func == Parameter.grad.__get__:
            act = watched.on_grad
        elif watched is not None and func.__name__.endswith("_") and func.__name__[0] != "_":
            act = watched.on_write
        if act is not None:
            act()
        return super().__torch_function__(func, types, args, kwargs or {})

    def once(self, name: str, act: Callable[[], Any]) -> None:
        """Set ``on_grad`` or ``on_write`` to what is to be done once."""

        def do() -> None:
            setattr(self, name, None)
            act()

        setattr(self, name, do)
