"""Random shapes, strides, options and sharing of memory, ours and stock side by side."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from cases import EXACT, OPTIMIZERS, Row
from oracle import Float64Step, all_params, assert_equal
from strategies import BOUNDED, options_of, place, tensors
from torch.nn import Parameter
from twins import Twins

pytest.importorskip("hypothesis")
from hypothesis import given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402


@pytest.mark.parametrize("row", OPTIMIZERS, ids=repr)
@BOUNDED
@given(data=st.data())
def test_shapes_strides_and_options(row: Row, data: Any) -> None:
    """Groups of any options over parameters and grads of any layout, three steps."""
    groups = data.draw(
        st.lists(
            st.tuples(options_of(row), st.lists(tensors(), min_size=1, max_size=4)),
            min_size=1,
            max_size=3,
        )
    )
    threads = data.draw(st.sampled_from([1, 2, 8]))

    def build() -> list[dict[str, Any]]:
        return [
            {
                "params": [Parameter(place(shape, view, dtype)) for shape, view, _, dtype in many],
                **copy.deepcopy(options),
            }
            for options, many in groups
        ]

    kinds = [kind for _, many in groups for kind in many]
    was = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        twins = Twins(row, build, lr=0.1)
        for step in range(3):
            torch.manual_seed(step)
            for (p, q), (shape, _, view, dtype) in zip(twins.pairs(), kinds, strict=True):
                p.grad = place(shape, view, dtype)
                # Stock's loops over stride 0 round a few elements in another way.
                expanded = any(s == 0 < n - 1 for s, n in zip(view[0], shape, strict=True))
                q.grad = p.grad.contiguous() if expanded else p.grad
            expected = Float64Step(row.stock, twins.ours)
            twins.step()
            expected.check()
            for p, q in twins.pairs():
                assert p.stride() == q.stride()
                assert (p in twins.ours.state) == (q in twins.stock.state)
                if p.dtype not in EXACT:
                    continue
                assert_equal(p.detach(), q.detach())
                for key, value in twins.stock.state.get(q, {}).items():
                    assert_equal(twins.ours.state[p][key], value)
    finally:
        torch.set_num_threads(was)


ACTS = ("share states", "own states", "share grads", "new grads", "share memory", "own memory")


@pytest.mark.parametrize("row", OPTIMIZERS, ids=repr)
@settings(BOUNDED, max_examples=15)
@given(
    acts=st.lists(st.sampled_from([*ACTS, "options"]), min_size=2, max_size=8),
    options=st.lists(st.sampled_from(["plain", "rich"]), min_size=12, max_size=12),
    ends=st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=12, max_size=12),
    threads=st.sampled_from([2, 8]),
)
def test_sharing_comes_and_goes(
    row: Row, acts: list[str], options: list[str], ends: list[tuple[int, int]], threads: int
) -> None:
    """Tensors large enough for several threads begin and cease to share memory between steps."""
    was = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        twins = Twins(row, lambda: [Parameter(torch.randn(70_000)) for _ in range(4)], **row.rich)
        twins.run(1)
        for act, chosen, (i, j) in zip(acts, options, ends, strict=False):

            def do(optimizer: Any, act: str = act, chosen: str = chosen, i: int = i, j: int = j):
                p, q = all_params(optimizer)[i], all_params(optimizer)[j]
                if act == "share states":
                    optimizer.state[p].update(optimizer.state[q])
                elif act == "own states":
                    own = {k: v.clone() for k, v in optimizer.state[p].items()}
                    optimizer.state[p].update(own)
                elif act == "share grads":
                    p.grad = q.grad
                elif act == "new grads":
                    for p in all_params(optimizer):
                        p.grad = torch.randn_like(p)
                elif act == "share memory":
                    p.data = q.data
                elif act == "own memory":
                    p.data = torch.randn_like(p)
                else:
                    optimizer.param_groups[0].update(row.off if chosen == "plain" else row.rich)

            twins.each(do)
            for _ in range(2):
                torch.set_num_threads(threads)
                twins.ours.step()
                torch.set_num_threads(1)
                twins.stock.step()
                for p, q in twins.pairs():
                    assert torch.equal(p, q)
    finally:
        torch.set_num_threads(was)
