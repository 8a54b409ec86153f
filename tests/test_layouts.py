"""Every way in which a parameter and its grad may lie in memory; nothing beside them is touched."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import isolated
import pytest
import torch
from cases import DTYPES, EXACT, HALVES, HUGE, LAYOUTS, OPTIMIZERS, SIZES, Layout, Row
from oracle import Float64Step, all_params, assert_equal, strides
from snapshot import Snapshot
from torch import Tensor
from torch.nn import Parameter
from twins import Twins, parameters, random_grad

MARGIN = 67  # canaries before and after the memory of a parameter
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "maximize": {"maximize": True},
    "decay": {"weight_decay": 0.1},
    "both": {"maximize": True, "weight_decay": 0.1},
}


def option_sets(row: Row) -> list[dict[str, Any]]:
    """Every set of states, with the changes that stock makes to a grad beforehand.

    With each of them where the grad decides how a new state is laid out: where none is filled.
    """
    changes = [VARIANTS["plain"], VARIANTS["both"]] if row.counts else VARIANTS.values()
    return [{**base, **change} for base in row.structures for change in changes]


def lay_out(layout: Layout, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return the whole memory with its margins, and a parameter in it."""
    memory = torch.randn(layout.size + 2 * MARGIN, dtype=torch.float64).to(dtype)
    view = layout.param(memory[MARGIN : MARGIN + layout.size])
    p = Parameter(view)
    assert p.numel() == 0 or p.untyped_storage().data_ptr() == memory.untyped_storage().data_ptr()
    return memory, p


def touched(p: Tensor, memory: Tensor) -> Tensor:
    """Return which elements of ``memory`` belong to the parameter."""
    marks = torch.zeros(memory.numel(), dtype=torch.bool)
    marks.as_strided(p.shape, p.stride(), p.storage_offset()).fill_(True)
    return marks


def not_expanded(grad: Tensor) -> Tensor:
    """Return a grad whose elements each have memory of their own.

    Stock's loops over a stride of 0 leave a few float64 elements of the tail without the fused
    multiply-add that all others get: which ones is an accident of its compiler. Right is what stock
    does with the same numbers in ordinary memory.
    """
    return grad.contiguous() if 0 in grad.stride() and grad.numel() > 1 else grad


def state_strides(
    row: Row, layout: Layout, dtype: torch.dtype, options: dict[str, Any]
) -> dict[str, tuple[int, ...]]:
    """Return the strides of the states that stock makes for a layout."""
    _, p = lay_out(layout, dtype)
    p.grad = layout.grad(random_grad(torch.empty(p.shape, dtype=dtype)))
    optimizer = row.stock([p], **options, foreach=False)
    optimizer.step()
    return {key: strides(value) for key, value in optimizer.state.get(p, {}).items()}


LARGE = 10_000


def layouts() -> Iterator[tuple[Row, Layout, torch.dtype]]:
    """Every layout for every optimizer.

    How memory is visited and converted is no business of a rule: one shows it for every dtype, the
    others with the narrowest that there is and with one that is not converted.
    """
    for row, layout, dtype in itertools.product(OPTIMIZERS, LAYOUTS, DTYPES):
        if row is OPTIMIZERS[0] or dtype in (torch.float32, torch.bfloat16):
            yield row, layout, dtype


@pytest.mark.parametrize(("row", "layout", "dtype"), list(layouts()), ids=str)
def test_layout(row: Row, layout: Layout, dtype: torch.dtype) -> None:
    """Right numbers, right strides of states, unharmed canaries and grads."""
    if dtype in HALVES and "negated" in layout.name:
        pytest.skip("lazy negations take stock's path, with stock's rounding of half types")
    sets = option_sets(row)
    if layout.size >= LARGE:
        sets = sets[-1:] if row.counts else [sets[0], sets[-1]]
    for options in sets:
        memories: list[Tensor] = []

        def build(memories: list[Tensor] = memories) -> list[Tensor]:
            memory, p = lay_out(layout, dtype)
            memories.append(memory)
            return [p]

        twins = Twins(row, build, **options)
        mine, theirs = memories
        ours, stocks = (all_params(o)[0] for o in twins.sides)
        expected_strides = state_strides(row, layout, dtype, options)
        canaries = ~touched(ours, mine)
        before = mine.clone()
        for _ in range(3 if layout.size < LARGE else 2):
            grad = random_grad(torch.empty(ours.shape, dtype=dtype))
            ours.grad, stocks.grad = layout.grad(grad), not_expanded(layout.grad(grad))
            kept = ours.grad.clone()
            expected = Float64Step(row.stock, twins.ours) if dtype in HALVES else None
            twins.step()
            if expected:
                expected.check()
            else:
                assert_equal(mine, theirs)
                for key, value in twins.stock.state.get(stocks, {}).items():
                    assert_equal(twins.ours.state[ours][key], value)
            made = {k: strides(v) for k, v in twins.ours.state.get(ours, {}).items()}
            assert made == expected_strides
            assert_equal(ours.grad, kept)
            assert_equal(mine[canaries], before[canaries])
        if ours.numel() > 1:  # a single half may be too large to move
            assert not torch.equal(mine, before)


@pytest.mark.parametrize("dtype", EXACT, ids=str)
def test_all_layouts_in_one_optimizer(row: Row, dtype: torch.dtype) -> None:
    """A step over every layout at once."""
    for options in (row.plain, row.rich):
        twins = Twins(row, lambda: [lay_out(lay, dtype)[1] for lay in LAYOUTS], **options)
        for _ in range(3):
            for (p, q), layout in zip(twins.pairs(), LAYOUTS, strict=True):
                grad = random_grad(torch.empty(p.shape, dtype=dtype))
                p.grad, q.grad = layout.grad(grad), not_expanded(layout.grad(grad))
            twins.step()
            for p, q in twins.pairs():
                assert_equal(p.detach(), q.detach())


def test_sizes_in_one_optimizer(row: Row) -> None:
    """Every size up to 300, side by side in one block of memory, with every offset."""

    def build() -> list[Tensor]:
        return [Parameter(p) for p in torch.randn(300 * 301 // 2).split(list(range(301)))]

    for threads in (1, 2, 8):
        torch.set_num_threads(threads)
        Twins(row, build, **row.rich).run(3)


# Memory that is written twice in a step, or read after it was written: stock's order is kept.


def overlapping(n: int, by: int) -> Callable[[], list[Tensor]]:
    """Build parameters of ``n`` elements, each starting ``by`` after the one before."""

    def build() -> list[Tensor]:
        memory = torch.randn(n + 3 * by)
        return [Parameter(memory[k * by : k * by + n]) for k in range(4)]

    return build


def same_memory(shape: tuple[int, ...]) -> Callable[[], list[Tensor]]:
    """Build several parameters over one tensor, one of them transposed."""

    def build() -> list[Tensor]:
        memory = torch.randn(shape)
        return [Parameter(memory), Parameter(memory.t()), Parameter(torch.randn(3))] + [
            Parameter(memory.view(-1))
        ]

    return build


def interleaved() -> list[Tensor]:
    """Build parameters whose memory is interleaved, and share no element."""
    memory = torch.randn(64, 96)
    return [Parameter(memory[:, k::3]) for k in range(3)] + [Parameter(memory[:, 5:6])]


ALIASED = {
    "overlap_small": overlapping(40, 9),
    "overlap_by_one": overlapping(1000, 1),
    "overlap_large": overlapping(HUGE, 1001),
    "overlap_far": overlapping(HUGE, HUGE - 1),
    "same_memory": same_memory((33, 17)),
    "same_memory_large": same_memory((601, 703)),
    "interleaved": interleaved,
}


@pytest.mark.parametrize("threads", [1, 2, 8])
@pytest.mark.parametrize("dtype", EXACT, ids=str)
@pytest.mark.parametrize("name", ALIASED)
def test_parameters_that_share_memory(
    row: Row, name: str, dtype: torch.dtype, threads: int
) -> None:
    """Parameters that overlap are stepped one after the other."""
    torch.set_default_dtype(dtype)
    torch.set_num_threads(threads)
    for options in (row.plain, row.rich, {**row.rich, "maximize": True}):
        Twins(row, ALIASED[name], **options).run(4)


@pytest.mark.parametrize("n", [n for n in (*SIZES, 5000) if n > 8])
def test_internally_overlapping_parameter(row: Row, n: int) -> None:
    """A parameter with rows that overlap: as stock's elementwise operators walk it."""

    def build() -> list[Tensor]:
        return [Parameter(torch.randn(n + 8).as_strided((3, n), (2, 1)))]

    def grad(p: Tensor) -> Tensor:
        return torch.randn(p.shape)

    for options in (row.plain, row.rich):
        Twins(row, build, **options).run(2, grad)


@pytest.mark.filterwarnings("ignore:optimizer contains a parameter group with duplicate")
@pytest.mark.parametrize("n", [17, HUGE])
@pytest.mark.parametrize("edited", [False, True])
def test_same_parameter_twice_in_a_group(row: Row, n: int, edited: bool) -> None:
    """A duplicate gets two updates in a row; on a first step each makes a state, the last stays."""
    torch.set_num_threads(2)

    def build() -> list[Tensor]:
        p, q, r = (Parameter(torch.randn(n)) for _ in range(3))
        return [p, q, r] if edited else [p, q, p, r, q]

    for options in (row.plain, row.rich, {**row.rich, "maximize": True}):
        twins = Twins(row, build, **options)
        if edited:
            twins.run(1)
            for optimizer in twins.sides:
                params = optimizer.param_groups[0]["params"]
                params.append(params[0])
                params.insert(1, params[2])
        twins.run(4)


@pytest.mark.parametrize("n", [17, HUGE])
def test_same_parameter_in_two_groups(row: Row, n: int) -> None:
    """Edited lists may name a parameter in two groups: the second sees the first's state."""
    torch.set_num_threads(2)

    def build() -> list[dict[str, Any]]:
        groups = [{"params": [Parameter(torch.randn(n)), Parameter(torch.randn(5))]} for _ in "ab"]
        return [groups[0], {**groups[1], "lr": 0.01}]

    for options in (row.plain, row.rich):
        for first_step in (True, False):
            twins = Twins(row, build, **options)
            if not first_step:
                twins.run(1)
            for optimizer in twins.sides:
                one, two = optimizer.param_groups
                two["params"].append(one["params"][0])
            twins.run(4)


@pytest.mark.parametrize("n", [17, HUGE])
def test_state_shared_by_two_parameters(row: Row, n: int) -> None:
    """Two parameters with one state tensor: the second update starts from the first's."""
    torch.set_num_threads(2)
    twins = Twins(row, lambda: [Parameter(torch.randn(n)) for _ in range(3)], **row.rich)
    twins.run(1)
    for optimizer in twins.sides:
        params = all_params(optimizer)
        for name in row.states:
            optimizer.state[params[2]][name] = optimizer.state[params[0]][name]
    twins.run(3)


@pytest.mark.parametrize("threads", [1, 2, 8])
def test_shared_state_comes_and_goes(row: Row, threads: int) -> None:
    """What was found about shared memory must not outlive the options it was found under."""
    torch.set_num_threads(threads)
    twins = Twins(
        row, lambda: [Parameter(torch.randn(4 * HUGE)) for _ in range(2)], **row.rich
    ).run(1)
    for optimizer in twins.sides:
        p, q = all_params(optimizer)
        for name in row.states:
            optimizer.state[q][name] = optimizer.state[p][name]
    twins.run(1)
    for optimizer in twins.sides:  # now without states
        optimizer.param_groups[0].update(row.off)
    twins.run(1)
    for optimizer in twins.sides:  # and with them, over the same grads
        optimizer.param_groups[0].update(row.rich)
    for _ in range(5):
        twins.step()
        twins.check()


@pytest.mark.parametrize("threads", [2, 8])
def test_shared_grad_that_is_unscaled_later(row: Row, threads: int) -> None:
    """Two parameters may read one grad at once; once the step unscales it, no longer."""
    finals = []
    for count in (1, threads):
        torch.manual_seed(0)
        torch.set_num_threads(count)
        params = [Parameter(torch.randn(10 * HUGE)) for _ in range(2)]
        grad = torch.randn(10 * HUGE)
        optimizer = row.ours(params, **row.rich, **row.fused)
        for p in params:
            p.grad = grad
        optimizer.step()
        optimizer.step()
        optimizer.grad_scale, optimizer.found_inf = torch.tensor(2.0), torch.tensor(0.0)
        for _ in range(4):
            optimizer.step()
        finals.append([*(p.detach() for p in params), grad])
    assert_equal(*finals)


@pytest.mark.parametrize("n", [17, 1000])
@pytest.mark.parametrize("what", ["parameter", "grad", "other parameter", "other grad", "shifted"])
def test_state_shares_memory(row: Row, n: int, what: str) -> None:
    """A state that lies in a parameter or a grad: stock's operators one after the other."""
    twins = Twins(row, lambda: [Parameter(torch.randn(n)) for _ in range(3)], **row.rich)
    twins.run(1)
    twins.grads()
    for optimizer in twins.sides:
        p, q, _ = all_params(optimizer)
        wide = torch.arange(n + 1.0)
        if what == "shifted":
            p.grad = wide[1:]
        alias = {
            "parameter": p.detach(),
            "grad": p.grad,
            "other parameter": q.detach(),
            "other grad": q.grad,
            "shifted": wide[:-1],
        }[what]
        for name in row.states:
            optimizer.state[p][name] = alias
    outcomes = []
    for optimizer in twins.sides:
        try:
            optimizer.step()
            outcomes.append(None)
        except RuntimeError as refused:
            outcomes.append(str(refused).split(".")[0])
    assert outcomes[0] == outcomes[1]
    if outcomes[0] is None:
        twins.check()


@pytest.mark.parametrize("n", [17, 1000, HUGE])
@pytest.mark.parametrize("options", ["plain", "rich", "middle", "maximize"])
@pytest.mark.parametrize("where", ["itself", "earlier", "later", "earlier, shifted"])
def test_grad_shares_memory_with_a_parameter(row: Row, n: int, options: str, where: str) -> None:
    """A grad that is a view of a parameter is read when stock reads it."""
    chosen = {
        "plain": row.plain,
        "rich": row.rich,
        "middle": row.middle,
        "maximize": {"lr": 0.1, "maximize": True},
    }[options]
    torch.set_num_threads(2)
    twins = Twins(row, lambda: [Parameter(torch.randn(n + 1)[1:]) for _ in range(3)], **chosen)
    for _ in range(3):
        twins.grads()
        for optimizer in twins.sides:
            a, b, c = all_params(optimizer)
            if where == "itself":
                b.grad = b.detach()
            elif where == "earlier":
                b.grad = a.detach()
            elif where == "later":
                b.grad = c.detach()
            else:
                b.grad = a.detach().as_strided((n,), (1,), 0)
        twins.step()
        twins.check()


@pytest.mark.parametrize("n", [1, 1000, HUGE])
@pytest.mark.parametrize("where", ["earlier", "later", "state", "step"])
def test_grad_that_stands_elsewhere_too(row: Row, n: int, where: str) -> None:
    """After ordinary steps a grad is, as the same tensor, a parameter or a state of another."""
    if where == "step" and not (row.counts and n == 1):
        pytest.skip("no counter has this shape")
    torch.set_num_threads(2)
    shape = () if n == 1 else (n,)
    twins = Twins(row, parameters(shape, shape, shape), **row.rich).run(2)
    for _ in range(2):
        twins.grads()
        for optimizer in twins.sides:
            a, b, c = all_params(optimizer)
            b.grad = {
                "earlier": a,
                "later": c,
                "state": optimizer.state[c][row.states[0]],
                "step": optimizer.state[c].get("step"),
            }[where]
        twins.step()
        for p, q in twins.pairs():
            assert_equal(p.detach(), q.detach())


@pytest.mark.parametrize("n", [17, 1000, HUGE])
@pytest.mark.parametrize("options", ["rich", "middle", "decay", "maximize"])
def test_grad_partly_overlaps_its_parameter(row: Row, n: int, options: str) -> None:
    """Where stock makes a copy of the grad first, a grad shifted by one element is fine."""
    chosen = {
        "rich": row.rich,
        "middle": row.middle,
        "decay": {"lr": 0.1, "weight_decay": 0.1},
        "maximize": {"lr": 0.1, "maximize": True},
    }[options]
    torch.set_num_threads(2)
    for shift in (1, -1):
        twins = Twins(row, lambda: [Parameter(torch.randn(n + 2)[1:-1])], **chosen)
        for _ in range(3):
            for optimizer in twins.sides:
                (p,) = all_params(optimizer)
                p.grad = p.detach().as_strided((n,), (1,), 1 + shift)
            twins.step()
            twins.check()


def test_grad_partly_overlaps_and_is_written(row: Row) -> None:
    """Where stock makes no copy it refuses; so do we, and no parameter is written."""

    def build() -> list[Tensor]:
        memory = torch.randn(130)
        p, good = Parameter(memory[:-1]), Parameter(torch.randn(5))
        p.grad, good.grad = memory[1:], torch.randn(5)
        return [good, p]

    twins = Twins(row, build, **row.plain)
    before = [p.detach().clone() for p in all_params(twins.ours)]
    if twins.step_if_allowed(halfway=True):
        assert row.takes_overlap, "stock's step raises, by the row"
        twins.check()
    else:
        assert_equal([p.detach() for p in all_params(twins.ours)], before)


def test_one_grad_for_all(row: Row) -> None:
    """Parameters may share one grad tensor."""
    for options in (row.plain, row.rich):
        twins = Twins(row, lambda: [Parameter(torch.randn(1000)) for _ in range(4)], **options)
        for _ in range(3):
            twins.grads()
            for optimizer in twins.sides:
                for p in all_params(optimizer):
                    p.grad = all_params(optimizer)[0].grad
            twins.step()
            twins.check()


# Parameters that stock refuses.


@pytest.mark.parametrize("shape", [(5,), (5, 7), (HUGE,)], ids=str)
@pytest.mark.parametrize("rich", [False, True])
def test_expanded_parameter(row: Row, shape: tuple[int, ...], rich: bool) -> None:
    """A parameter with stride 0 raises stock's error, and nothing moved."""
    good = Parameter(torch.randn(9))
    bad = Parameter(torch.randn(shape[:-1] + (1,)).expand(shape))
    for p in (good, bad):
        p.grad = torch.randn(p.shape)
    optimizer = row.ours([good, bad], **(row.rich if rich else row.plain))
    snapshot = Snapshot(optimizer)
    with pytest.raises(RuntimeError, match="more than one element of the written-to tensor"):
        optimizer.step()
    snapshot.assert_unchanged()


# Shapes and strides that differ after the user changed something.

BROADCASTS = [
    ((3, 4), (4,)),
    ((3, 4), (1, 4)),
    ((3, 4), (3, 1)),
    ((3, 4), ()),
    ((3, 4), (1,)),
    ((70, 65), (65,)),
    ((2, 3, 4), (3, 1)),
    ((600, 700), (1, 700)),
]


def with_grad(p: Tensor, grad: Tensor) -> Parameter:
    """Return a parameter that has a grad of another shape, as after a swap of ``p.data``."""
    made = Parameter(torch.empty_like(grad))
    made.grad = grad
    made.data = p
    return made


@pytest.mark.parametrize(("shape", "grad_shape"), BROADCASTS, ids=str)
@pytest.mark.parametrize("dtype", EXACT, ids=str)
def test_grad_broadcasts(
    row: Row, shape: tuple[int, ...], grad_shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    """A grad that stock broadcasts to the parameter."""
    for options in option_sets(row):

        def build() -> list[Tensor]:
            p = with_grad(torch.randn(shape, dtype=dtype), torch.randn(grad_shape, dtype=dtype))
            return [Parameter(torch.randn(3)), p]

        twins = Twins(row, build, **options)
        for _ in range(3):
            twins.step()
            twins.check()


def test_transposed_data_swapped_in(row: Row) -> None:
    """After a swap the parameter's strides differ from the grad's and from the state's."""
    twins = Twins(row, lambda: [Parameter(torch.randn(33, 17))], **row.rich)
    twins.run(2)
    for optimizer in twins.sides:
        for p in all_params(optimizer):
            p.data = p.detach().t().contiguous().t()
    for _ in range(2):
        twins.step()
        twins.check()
    twins.run(2)


FOREIGN: dict[str, Callable[[Tensor], Tensor]] = {
    "transposed": lambda t: t.t().contiguous().t(),
    "gapped": lambda t: torch.stack([t, t], -1)[..., 1],
    "sliced": lambda t: torch.cat([t, t], 1)[:, : t.shape[1]],
    "misaligned": lambda t: torch.cat([t.new_zeros(3), t.flatten()])[3:].view(t.shape),
    "contiguous": lambda t: t.contiguous().clone(),
}


@pytest.mark.parametrize("foreign", FOREIGN)
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_state_with_foreign_strides(
    row: Row, foreign: str, transposed: bool, dtype: torch.dtype
) -> None:
    """States may be laid out unlike their parameter; they keep their strides and memory."""

    def build() -> list[Tensor]:
        p = torch.randn(33, 17, dtype=torch.float64).to(dtype)
        return [Parameter(FOREIGN["transposed"](p) if transposed else p)]

    twins = Twins(row, build, **row.rich).run(1 if dtype in EXACT else 0)
    if dtype in HALVES:
        twins.grads()
        twins.step()
    kept = {}
    for optimizer in twins.sides:
        (p,) = all_params(optimizer)
        for name in row.states:
            optimizer.state[p][name] = FOREIGN[foreign](optimizer.state[p][name])
            if optimizer is twins.ours:
                kept[name] = optimizer.state[p][name]
    for _ in range(3):
        twins.grads()
        expected = Float64Step(row.stock, twins.ours) if dtype in HALVES else None
        twins.step()
        if expected:
            expected.check()
        else:
            twins.check()
    (p,) = all_params(twins.ours)
    for name in row.states:
        assert twins.ours.state[p][name] is kept[name]


@pytest.mark.parametrize("threads", [1, 3, 7])
@pytest.mark.parametrize("across", ["grad", "grad and states"])
@pytest.mark.parametrize("dtype", EXACT, ids=str)
def test_long_rows_across(row: Row, dtype: torch.dtype, across: str, threads: int) -> None:
    """Shares end within rows, and rows and columns of each plane are no multiples of a block's."""

    def lay(values: Tensor) -> Tensor:
        return values.transpose(1, 2).contiguous().transpose(1, 2)

    torch.set_num_threads(threads)
    shape = (3, 515, 1001)
    twins = Twins(row, lambda: [Parameter(torch.randn(shape, dtype=dtype))], **row.rich).run(1)
    for optimizer in twins.sides if across == "grad and states" else ():
        for p in all_params(optimizer):
            for name in row.states:
                optimizer.state[p][name] = lay(optimizer.state[p][name])
    for _ in range(2):
        for p, q in twins.pairs():
            p.grad = lay(random_grad(p))
            q.grad = p.grad.clone()
        twins.step()
        twins.check()


def test_on_a_small_stack() -> None:
    """A thread of somebody's own may have little, and all that lies across goes over the stack."""
    isolated.run(
        """
        import threading
        import torch
        from cases import OPTIMIZERS

        def work():
            for row in OPTIMIZERS:
                for dtype in (torch.float32, torch.float64):
                    p = torch.nn.Parameter(torch.randn(300, 300, dtype=dtype))
                    optimizer = row.ours([p], **row.rich)
                    for _ in range(2):
                        p.grad = torch.randn(300, 300, dtype=dtype).t()
                        optimizer.step()
                        p.data = p.data.t()

        threading.stack_size(STACK)
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
        """.replace("STACK", str(96 << 10))
    )


# Without states they take as much memory as they do.
simplest = pytest.mark.parametrize("row", OPTIMIZERS[:1], ids=repr)


@pytest.mark.slow
@simplest
def test_more_elements_than_an_int_counts(row: Row) -> None:
    """A bfloat16 tensor beyond 2^31 elements: about 8.6 GiB."""
    n = 2**31 + 1025
    p = Parameter(torch.empty(n, dtype=torch.bfloat16))
    spots = [0, 1, n // 2, 2**31 - 1, 2**31, 2**31 + 1, n - 1000, n - 2, n - 1]
    with torch.no_grad():
        p.fill_(2.0)
        for k, spot in enumerate(spots):
            p[spot] = 0.25 * (k + 1)
    p.grad = torch.full((n,), 0.5, dtype=torch.bfloat16)
    p.grad[spots] = 0.125
    row.ours([p], lr=1.0).step()
    with torch.no_grad():
        for k, spot in enumerate(spots):
            assert p[spot].item() == 0.25 * (k + 1) - 0.125
            p[spot] = 1.5
        for part in p.split(2**27):
            assert bool((part == 1.5).all())


@pytest.mark.slow
@simplest
def test_strides_beyond_an_int(row: Row) -> None:
    """A column of a tensor whose rows lie more than 2^31 elements apart."""
    memory = torch.zeros(2**31 + 4097, dtype=torch.bfloat16)
    p = Parameter(memory.as_strided((2, 65), (2**31 + 4000, 1)))
    p.grad = torch.ones(2, 65, dtype=torch.bfloat16)
    row.ours([p], lr=1.0).step()
    assert int(memory.count_nonzero()) == 130
    assert bool((p == -1).all())
