"""What a step may change, to be compared with what it is after a step that raised."""

from __future__ import annotations

from typing import Any

import torch
from oracle import all_params, assert_equal
from torch import Tensor


class Snapshot:
    """All of an optimizer that a step may change."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        """Copy it."""
        self.optimizer = optimizer
        self.now = self.look()

    def look(self) -> dict[str, Any]:
        """Return values, versions, identities and keys."""
        params = [p for p in all_params(self.optimizer) if isinstance(p, Tensor)]
        return {
            "parameters": [p.detach().clone() for p in params],
            "grads": [None if p.grad is None else p.grad.detach().clone() for p in params],
            "versions": [(version(p), version(p.grad)) for p in params],
            "states": {
                id(p): {
                    k: (id(v), version(v), v.clone() if isinstance(v, Tensor) else v)
                    for k, v in own.items()
                }
                if isinstance(own, dict)
                else own
                for p, own in self.optimizer.state.items()
            },
            "groups": options(self.optimizer),
        }

    def assert_unchanged(self) -> None:
        """Look again and compare."""
        then = self.look()
        for key in ("parameters", "grads"):
            for old, new in zip(self.now[key], then[key], strict=True):
                assert (old is None) == (new is None)
                if old is not None:
                    assert_equal(new, old)
        assert then["versions"] == self.now["versions"]
        assert then["groups"] == self.now["groups"]
        assert then["states"].keys() == self.now["states"].keys(), "states came or went"
        for key, own in self.now["states"].items():
            new = then["states"][key]
            assert type(new) is type(own)
            if isinstance(own, dict):
                assert list(new) == list(own)
                for name, (which, counter, value) in own.items():
                    assert new[name][:2] == (which, counter), f"{name} was replaced or written"
                    if isinstance(value, Tensor):
                        assert_equal(new[name][2], value)


def options(optimizer: torch.optim.Optimizer) -> list[Any]:
    """Return the options of each group, and of the optimizer, with the number of its averages."""
    own = vars(optimizer)
    groups = [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups]
    return [*groups, dict(own.get("_extras", {})), int(own.get("_ema_steps", 0))]


def contents(optimizer: torch.optim.Optimizer) -> list[Any]:
    """Return copies of all that a step may change, which ``same`` compares with another's."""

    def copied(value: Any) -> Any:
        return value.detach().clone() if isinstance(value, Tensor) else value

    params = all_params(optimizer)
    return [
        [len(group["params"]) for group in optimizer.param_groups],
        [copied(p) for p in params],
        [copied(p.grad) for p in params],
        [
            {k: copied(v) for k, v in optimizer.state[p].items()}
            for p in params
            if p in optimizer.state
        ],
        [p in optimizer.state for p in params],
        options(optimizer),
    ]


def same(one: Any, other: Any) -> bool:
    """Whether two contents are equal, to the last bit."""
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, dict) and isinstance(other, dict):
        return list(one) == list(other) and same([*one.values()], [*other.values()])
    return type(one) is type(other) and bool(one == other)


def version(tensor: Any) -> int | None:
    """Return the version of a tensor that counts it."""
    if not isinstance(tensor, Tensor):
        return None
    try:
        return tensor._version
    except RuntimeError:  # made in inference mode
        return None
