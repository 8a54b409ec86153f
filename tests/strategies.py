"""What random tests draw: shapes, views of memory, options of groups."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import DTYPES, Row
from torch import Tensor

pytest.importorskip("hypothesis")
from hypothesis import HealthCheck, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

# The same examples at each run.
BOUNDED = settings(
    max_examples=100,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(HealthCheck),
)

# Mostly small, some beyond registers, a few beyond chunks.
lengths = st.one_of(st.integers(0, 9), st.integers(10, 70), st.sampled_from([127, 128, 129, 1025]))
shapes = st.one_of(
    st.lists(st.integers(0, 9), max_size=4).map(tuple),
    st.lists(st.integers(1, 40), min_size=1, max_size=2).map(tuple),
    lengths.map(lambda n: (n,)),
)


@st.composite
def views(draw: Any, shape: tuple[int, ...]) -> tuple[tuple[int, ...], int]:
    """Draw strides and offset of a view of ``shape`` whose elements share no memory."""
    order = draw(st.permutations(range(len(shape))))
    found = [0] * len(shape)
    step = draw(st.sampled_from([1, 1, 1, 2, 3]))
    for d in order:
        found[d] = step
        step *= max(shape[d], 1) + draw(st.sampled_from([0, 0, 0, 1, 5]))
    return tuple(found), draw(st.sampled_from([0, 0, 1, 3, 8]))


@st.composite
def expanded_views(draw: Any, shape: tuple[int, ...]) -> tuple[tuple[int, ...], int]:
    """Draw strides and offset where some dimensions may have stride 0."""
    full, offset = draw(views(shape))
    kept = [s if draw(st.integers(0, 3)) else 0 for s in full]
    return tuple(kept), offset


def place(shape: tuple[int, ...], view: tuple[tuple[int, ...], int], dtype: torch.dtype) -> Tensor:
    """Return random memory as a view of ``shape``."""
    steps, offset = view
    reach = sum((n - 1) * s for n, s in zip(shape, steps, strict=True)) if 0 not in shape else 0
    memory = torch.randn(offset + max(reach, 0) + 1 + 8, dtype=torch.float64)
    memory = torch.where(memory.abs() < 1e-3, 0.5, memory).to(dtype)
    return memory.as_strided(shape, steps, offset)


@st.composite
def sgd_options(draw: Any) -> dict[str, Any]:
    """Options of a group, as a constructor takes them."""
    options: dict[str, Any] = {"lr": draw(st.sampled_from([0.0, 1e-3, 0.07, 1.0]))}
    if draw(st.booleans()):
        options["lr"] = torch.tensor(options["lr"])
    if draw(st.integers(0, 3)):
        options["momentum"] = draw(st.sampled_from([0.5, 0.9, 1.0]))
        if draw(st.booleans()):
            options["nesterov"] = True
        else:
            options["dampening"] = draw(st.sampled_from([0.0, 0.3, 1.0, 1.5]))
    options["weight_decay"] = draw(st.sampled_from([0, 0, 0.1, 2]))
    options["maximize"] = draw(st.booleans())
    return options


@st.composite
def other_options(draw: Any, row: Row) -> dict[str, Any]:
    """The same, from the combinations of the row."""
    options = dict(draw(st.sampled_from(row.options)))
    if not isinstance(options["lr"], Tensor):
        options["lr"] = draw(st.sampled_from([0.0, 1e-3, 0.07, 1.0]))
    options["weight_decay"] = draw(st.sampled_from([0, 0, 0.1, 2]))
    options["maximize"] = draw(st.booleans())
    return options


def options_of(row: Row) -> Any:
    """Options of a group."""
    return sgd_options() if row.name == "SGD" else other_options(row)


@st.composite
def tensors(draw: Any) -> tuple[tuple[int, ...], Any, Any, torch.dtype]:
    """A parameter: shape, its view, its grad's view, dtype."""
    shape = draw(shapes)
    grad = draw(st.one_of(views(shape), expanded_views(shape)))
    return shape, draw(views(shape)), grad, draw(st.sampled_from(DTYPES))
