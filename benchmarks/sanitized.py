"""Every kernel, over little memory: what compute-sanitizer can bear.

    compute-sanitizer python benchmarks/sanitized.py

All structures of all rules in every dtype, flat and strided, in small and in large blocks of
arguments and with tables; with all that a step does besides; and what there is beside steps.
`--device cpu` has the host do what a device would, to try it.
"""

import argparse
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

import fastsgd
from fastsgd import _C

# One for each kernel of a rule: `structure` in csrc/rules.
STRUCTURES: list[tuple[type[torch.optim.Optimizer], dict[str, Any]]] = [
    (fastsgd.SGD, {}),
    (fastsgd.SGD, {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1}),
    (fastsgd.Adam, {"weight_decay": 0.1}),
    (fastsgd.AdamW, {"amsgrad": True}),
    (fastsgd.RMSprop, {}),
    (fastsgd.RMSprop, {"centered": True}),
    (fastsgd.RMSprop, {"momentum": 0.9}),
    (fastsgd.RMSprop, {"centered": True, "momentum": 0.9}),
    (fastsgd.Adagrad, {"lr_decay": 0.1}),
]
HALVES = (torch.bfloat16, torch.float16)
DTYPES = (torch.float32, torch.float64, *HALVES)
SIZES = [(), (0,), (3,), (131,), (33, 17), (4099,)]
EXTRAS = {
    "max_grad_norm": 0.5,
    "clip_grad_value": 0.1,
    "skip_nonfinite": True,
    "ema_decay": 0.9,
    "clear_grads": "zero",
}


def extras(dtype: torch.dtype) -> Iterator[dict[str, Any]]:
    """What a step is to do besides: nothing, and everything."""
    yield {}
    yield {**EXTRAS, "norm_type": 2.0}
    yield {**EXTRAS, "norm_type": torch.inf}
    if dtype in HALVES:
        yield {**EXTRAS, "ema_dtype": torch.float32}


def parameters(dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    """Parameters with grads: each in memory of its own, and one whose grad lies otherwise."""
    made = [torch.randn(size).to(device, dtype) for size in SIZES]
    made.append(torch.randn(40, 30).to(device, dtype)[1:, 3:])
    params = [Parameter(values) for values in made]
    for p in params:
        p.grad = torch.empty(p.shape, dtype=dtype, device=device)
    return params


def train(optimizer: torch.optim.Optimizer, params: Sequence[Tensor], loses: bool = False) -> None:
    """Step: then with a grad that is not finite, then with two lost, where averages go on alone."""
    for step in range(3):
        for p in params:
            values = torch.randn(p.shape)
            if step == 1 and p.dim() == 2:
                values[-1, -1] = torch.inf
            p.grad.copy_(values)
        if loses and step == 2:
            params[3].grad = params[-1].grad = None
        assert _C.step(optimizer), "a part went to torch's own path"


def structures(device: torch.device) -> None:
    """All rules: alone, with all that is around them, and in groups with scaled grads."""
    for cls, options in STRUCTURES:
        for dtype in DTYPES:
            print(cls.__name__, options, dtype, flush=True)  # how far it came, if it is stopped
            for more in extras(dtype):
                params = parameters(dtype, device)
                optimizer = cls(params, **{"lr": 0.01, **options, **more})
                # Wide averages of what has no grad are torch's.
                train(optimizer, params, loses=bool(more) and "ema_dtype" not in more)
                optimizer.zero_grad(set_to_none=False)
                if more:
                    with optimizer.ema_weights():
                        pass
            for scaled in (False, True):
                in_groups(cls, options, parameters(dtype, device), scaled)


def in_groups(cls: Any, options: dict[str, Any], params: Sequence[Tensor], scaled: bool) -> None:
    """More groups than small arguments hold, and a rate that only the device knows."""
    device = params[0].device
    groups = [{"params": [p], "weight_decay": 0.01 * n} for n, p in enumerate(params, 1)]
    optimizer = cls(groups, **{"lr": torch.tensor(0.01, device=device), **options})
    if scaled:
        optimizer.grad_scale = torch.tensor(1024.0, device=device)
        optimizer.found_inf = torch.tensor(0.0, device=device)
    train(optimizer, params)


def norms(device: torch.device) -> None:
    """The norm of a list, which then is scaled."""
    for norm_type in (2.0, torch.inf):
        params = [p for dtype in DTYPES for p in parameters(dtype, device)]
        for p in params:
            p.grad.copy_(torch.randn(p.shape))
        fastsgd.clip_grad_norm_(params, 0.5, norm_type)


def many(tensors: int, groups: int, device: torch.device) -> None:
    """So many tensors, and groups of other options; all in one piece of memory."""
    values, grads = (torch.randn(tensors, 5).to(device) for _ in range(2))
    params = [Parameter(row) for row in values]
    for more in ({}, EXTRAS):
        for p, grad in zip(params, grads, strict=True):
            p.grad = grad
        apart = [{"params": params[g::groups], "lr": 1e-3 * (g + 1)} for g in range(groups)]
        optimizer = fastsgd.SGD(apart, **more)
        assert _C.step(optimizer), "a part went to torch's own path"
        optimizer.zero_grad(set_to_none=False)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run all of it."""
    parser = argparse.ArgumentParser(description="Run every kernel over little memory.")
    parser.add_argument("--device", default="cuda", help="cuda, cuda:1, ...; cpu to try it")
    device = torch.device(parser.parse_args(arguments).device)
    torch.manual_seed(0)
    if device.type == "cpu":
        _C.emulate_device(True)
    try:
        structures(device)
        norms(device)
        many(600, 1, device)
        many(4200, 400, device)
    finally:
        if device.type == "cpu":
            _C.emulate_device(False)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    print(f"{len(STRUCTURES)} structures, {len(DTYPES)} dtypes: all in the kernels")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
