"""The README's table of what is supported, made by trying everything in it.

``python tests/support.py`` prints the table, in English; ``python tests/support.py ko`` in Korean.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from cases import OPTIMIZERS, Row
from oracle import all_params
from places import emulated
from torch import Tensor
from torch.nn import Parameter
from twins import random_grad

from fastsgd import _C

Options = dict[str, Any]


def sparse(grad: Tensor) -> Tensor:
    """Return a gradient of which two rows are given."""
    rows = torch.tensor([[1, 3]])
    return torch.sparse_coo_tensor(rows, grad[[1, 3]], grad.shape, check_invariants=True)


def in_graph(values: Tensor) -> Tensor:
    """Return a tensor that autograd follows, as a differentiable step needs one."""
    p = values.requires_grad_().clone()
    p.retain_grad()
    return p


@dataclass(frozen=True)
class Feature:
    """A row of the table.

    Attributes:
        name: What it is, in English.
        korean: And in Korean.
        dtypes: Of the parameters.
        options: Of the optimizer; a constructor that does not take them refuses the feature.
        grad: What becomes of a contiguous gradient.
        param: The parameter with the values of a contiguous tensor, or others.
        attributes: Of the optimizer, as a scaler sets them.
    """

    name: str
    korean: str
    dtypes: tuple[torch.dtype, ...] = (torch.float32,)
    options: Options = field(default_factory=dict)
    grad: Callable[[Tensor], Tensor] = lambda grad: grad
    param: Callable[[Tensor], Tensor] = Parameter
    attributes: Callable[[], Options] = dict

    def build(self, row: Row) -> torch.optim.Optimizer:
        """Return an optimizer that has the feature, and gradients."""
        params = [self.param(torch.rand(5, 67, dtype=dtype) + 0.5) for dtype in self.dtypes]
        optimizer = row.ours(params, **{**row.plain, **self.options})
        for p in params:
            grad = torch.rand_like(p) + 0.5 if p.is_complex() else random_grad(p)
            p.grad = self.grad(grad.detach())
        for name, value in self.attributes().items():
            setattr(optimizer, name, value)
        return optimizer


def scaled() -> Options:
    """Return what ``GradScaler`` sets."""
    return {"grad_scale": torch.tensor(4.0), "found_inf": torch.tensor(0.0)}


HALVES = (torch.bfloat16, torch.float16)
FEATURES = (
    Feature("float32", "float32"),
    Feature("float64", "float64", (torch.float64,)),
    Feature("bfloat16, float16", "bfloat16, float16", HALVES),
    Feature(
        "several dtypes in one optimizer",
        "한 옵티마이저에 여러 dtype",
        (torch.float32, torch.float64, *HALVES),
    ),
    Feature(
        "transposed, sliced, misaligned parameters",
        "전치·슬라이스·정렬되지 않은 파라미터",
        param=lambda values: Parameter(torch.rand(71, 12)[2:69, 3:8].t()),
    ),
    Feature(
        "gradients with strides of their own, expanded ones",
        "스트라이드가 다르거나 확장된(expanded) 기울기",
        grad=lambda g: g[:, :1].expand(5, 67),
    ),
    Feature("`lr` as a tensor", "텐서 `lr`", options={"lr": torch.tensor(0.01)}),
    Feature("`maximize`", "`maximize`", options={"maximize": True}),
    Feature("`foreach`", "`foreach`", options={"foreach": True}),
    Feature("`fused`", "`fused`", options={"fused": True}),
    Feature("`capturable`", "`capturable`", options={"capturable": True}),
    Feature(
        "`GradScaler`, unscaled in the step",
        "`GradScaler`, 스텝 안에서 unscale",
        options={"fused": True},
        attributes=scaled,
    ),
    Feature(
        "`max_grad_norm`, `clip_grad_value`",
        "`max_grad_norm`, `clip_grad_value`",
        options={"max_grad_norm": 1.0, "clip_grad_value": 0.5},
    ),
    Feature("`skip_nonfinite`", "`skip_nonfinite`", options={"skip_nonfinite": True}),
    Feature("`ema_decay`", "`ema_decay`", options={"ema_decay": 0.9}),
    Feature("`clear_grads`", "`clear_grads`", options={"clear_grads": True}),
    Feature("sparse gradients", "희소(sparse) 기울기", grad=sparse),
    Feature("complex parameters", "복소수 파라미터", (torch.complex64,)),
    Feature(
        "`differentiable`", "`differentiable`", options={"differentiable": True}, param=in_graph
    ),
)

KERNELS, TORCH, REFUSED = "✓", "torch", "–"


def tried(feature: Feature, row: Row) -> str:
    """Say who steps it on the CPU: the kernels, torch's code, or nobody, as torch refuses it."""
    torch.manual_seed(0)
    try:
        optimizer = feature.build(row)
    except TypeError as error:
        if "unexpected keyword argument" not in str(error):
            raise
        return REFUSED
    before = [p.detach().clone() for p in all_params(optimizer)]
    try:
        in_kernels = _C.step(optimizer)
        if not in_kernels:
            optimizer.step()
    except RuntimeError as error:
        if not row.sparse_error or row.sparse_error not in str(error):
            raise
        return REFUSED
    for p, was in zip(all_params(optimizer), before, strict=True):
        assert not torch.equal(p.detach(), was), f"{feature.name}: {row} stepped nothing"
    return KERNELS if in_kernels else TORCH


def cell(feature: Feature, row: Row) -> str:
    """Say who steps it, which is the same on the CPU and on a device."""
    here = tried(feature, row)
    if _C.instruction_set() != "baseline":  # a device's code, run by the host
        with emulated():
            there = tried(feature, row)
        assert here == there, f"{feature.name}: {row} is {here} here and {there} on a device"
    return here


def table(korean: bool = False) -> str:
    """Return the table in Markdown."""
    names = [row.name for row in OPTIMIZERS]
    lines = ["| | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
    for feature in FEATURES:
        cells = [cell(feature, row) for row in OPTIMIZERS]
        name = feature.korean if korean else feature.name
        lines.append("| " + " | ".join([name, *cells]) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table(korean=sys.argv[1:] == ["ko"]))
