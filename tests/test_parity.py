"""The same numbers as stock: every combination of options, step after step."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import capabilities
import isolated
import pytest
import torch
from cases import (
    COMBINATION_IDS,
    COMBINATIONS,
    DTYPES,
    EXACT,
    HALVES,
    HUGE,
    OPTIMIZERS,
    ORDINARY_SHAPES,
    SIZES,
    Row,
    flagged,
)
from oracle import ROOT, Float64Step, all_params, assert_equal, exact_root, roots, stock_roots
from torch import Tensor
from torch.nn import Parameter
from twins import Twins, parameters, random_grad

STEPS = 50
HALF_STEPS = 15  # each is compared with a step from the same state


def walk(row: Row, options: Any, dtype: torch.dtype, steps: int) -> None:
    """Walk a trajectory, comparing with the oracle of the dtype at every step."""
    twins = Twins(row, parameters(*ORDINARY_SHAPES, (97,), dtype=dtype), **options)
    start = [p.detach().clone() for p in all_params(twins.ours)]
    for _ in range(steps):
        twins.grads()
        if dtype in EXACT:
            twins.step()
            twins.check()
        else:
            expected = Float64Step(row.stock, twins.ours)
            twins.ours.step()
            expected.check()
    for p, before in zip(all_params(twins.ours), start, strict=True):
        assert p.numel() == 0 or not torch.equal(p.detach(), before), (
            "nothing moved: the row's lr is too small"
        )
        assert p.isfinite().all()


@pytest.mark.parametrize("dtype", EXACT, ids=str)
@pytest.mark.parametrize(("row", "options"), COMBINATIONS, ids=COMBINATION_IDS)
def test_bit_identical(row: Row, options: Any, dtype: torch.dtype) -> None:
    """float32 and float64 have stock's bits after each of 50 steps, parameters and states."""
    walk(row, options, dtype, STEPS)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize(("row", "options"), COMBINATIONS, ids=COMBINATION_IDS)
def test_half_is_float64_rounded_once(row: Row, options: Any, dtype: torch.dtype) -> None:
    """bfloat16 and float16 are within one unit of the float64 step at each of 15 steps."""
    walk(row, options, dtype, HALF_STEPS)


@pytest.mark.parametrize("dtype", EXACT, ids=str)
@pytest.mark.parametrize(
    ("row", "options"), [(row, o) for row in OPTIMIZERS for o in row.structures], ids=repr
)
def test_stock_as_it_is(row: Row, options: Any, dtype: torch.dtype) -> None:
    """Stock's bits, unmended, of every element none of whose roots stock has rounded wrong."""
    twins = Twins(row, parameters((20_000,), dtype=dtype), **options)
    right = torch.ones(20_000, dtype=torch.bool)

    def root(x: Tensor) -> Tensor:
        found = ROOT(x)
        right.logical_and_(found == exact_root(x))
        return found

    def root_(x: Tensor) -> Tensor:
        return x.copy_(root(x))

    for _ in range(10):
        twins.grads()
        twins.ours.step()
        with roots(sqrt=root, sqrt_=root_):
            twins.stock.step()
        for p, q in twins.pairs():
            assert torch.equal(p[right], q[right])
            for name in twins.stock.state.get(q, {}).keys() - {"step"}:
                mine, theirs = twins.ours.state[p][name], twins.stock.state[q][name]
                assert torch.equal(mine[right], theirs[right]), name
    assert right.sum() > 1000, "hardly any root is right on this machine, so this shows nothing"


@pytest.mark.parametrize(
    ("row", "options"), [(row, o) for row in OPTIMIZERS for o in row.structures], ids=repr
)
def test_as_near_the_truth_as_stock(row: Row, options: Any) -> None:
    """After 1000 steps, the error against float64 is stock's, on average and at the worst."""
    torch.set_num_threads(1)
    torch.manual_seed(1)
    start = torch.randn(4097)
    options = {**options, "lr": 0.003}
    params = [Parameter(start.to(t)) for t in (torch.float32, torch.float32, torch.float64)]
    optimizers = [
        cls([p], **options, foreach=False)
        for p, cls in zip(params, (row.ours, row.stock, row.stock), strict=True)
    ]
    with stock_roots():
        for _ in range(1000):
            grad = random_grad(start)
            for p, optimizer in zip(params, optimizers, strict=True):
                p.grad = grad.to(p.dtype)
                optimizer.step()
    mine, theirs, exact = (p.detach().double() for p in params)
    # Near 0 a unit says nothing: there it is that of the parameters' usual size.
    size = torch.maximum(exact.abs(), exact.square().mean().sqrt())
    unit = torch.exp2(torch.frexp(size).exponent.double() - 24)
    errors = [(x - exact).abs() / unit for x in (mine, theirs)]
    average, worst = ([f(e) for e in errors] for f in (lambda e: e.square().mean().sqrt(), max))
    assert 0 < average[0] <= average[1] * 1.01
    assert worst[0] <= worst[1] + 2


@pytest.mark.parametrize(**flagged({"foreach": True}, {"fused": True}, {"foreach": False}))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_flags_change_no_number(row: Row, dtype: torch.dtype, flags: Any) -> None:
    """``foreach`` and ``fused`` are taken and mean the same step."""
    flagged = Twins(row, parameters(*ORDINARY_SHAPES, dtype=dtype), **row.rich, **flags)
    plain = Twins(row, parameters(*ORDINARY_SHAPES, dtype=dtype), **row.rich)
    for _ in range(5):
        for twins in (flagged, plain):
            twins.grads()
            twins.ours.step()
        for p, q in zip(all_params(flagged.ours), all_params(plain.ours), strict=True):
            assert_equal(p, q)
    for key, value in flags.items():
        assert flagged.ours.param_groups[0][key] is value, "the flag that the user gave is kept"


def test_half_beats_stock(row: Row) -> None:
    """Half types end nearer the float64 truth than stock's default, which rounds each operation."""
    for dtype in HALVES:
        twins = Twins(row, parameters((4099,), dtype=dtype), **row.rich)
        errors = [0.0, 0.0]
        for _ in range(20):
            twins.grads()
            expected = Float64Step(row.stock, twins.ours)
            for side, optimizer in enumerate(twins.sides):
                optimizer.step()
                exact = all_params(expected.exact)[0].detach()
                errors[side] += float(
                    (all_params(optimizer)[0].detach().double() - exact).abs().sum()
                )
            # The same start for the next step.
            mine, theirs = all_params(twins.ours)[0], all_params(twins.stock)[0]
            theirs.data.copy_(mine)
            for key, value in twins.ours.state[mine].items():
                twins.stock.state[theirs][key].copy_(value)
        assert errors[0] < errors[1], errors


@pytest.mark.parametrize("rich", [False, True])
def test_mixed_dtypes(row: Row, rich: bool) -> None:
    """Each parameter of one optimizer, whatever the dtype beside it, gets the step of its own."""

    def build() -> list[Tensor]:
        found = []
        for shape in ((65,), (7, 5), (1025,), ()):
            for dtype in DTYPES:
                found += parameters(shape, dtype=dtype)()
        return found

    twins = Twins(row, build, **(row.rich if rich else row.plain))
    for _ in range(STEPS):
        twins.grads()
        expected = Float64Step(row.stock, twins.ours)
        twins.step()
        expected.check()
        for p, q in twins.pairs():
            if p.dtype in EXACT:
                assert_equal(p, q)
                for key, value in twins.stock.state.get(q, {}).items():
                    assert_equal(twins.ours.state[p][key], value)


@pytest.mark.parametrize("dtype", EXACT, ids=str)
def test_groups_with_their_own_options(row: Row, dtype: torch.dtype) -> None:
    """A group for each combination of options, in one optimizer."""

    def build() -> list[dict[str, Any]]:
        return [
            {"params": parameters((65,), (n + 1,), dtype=dtype)(), **options}
            for n, options in enumerate(row.options)
        ]

    Twins(row, build, **row.plain).run(10)


def test_many_groups(row: Row) -> None:
    """As many groups as tensors."""

    def build() -> list[dict[str, Any]]:
        return [
            {"params": parameters((n % 70 + 1,))(), **row.rich, "lr": 0.01 * (n % 7 + 1)}
            for n in range(465)
        ]

    Twins(row, build, **row.plain).run(3)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_one_group_or_many(row: Row, dtype: torch.dtype) -> None:
    """A group of all tensors, and a group for each, give the same bits."""
    for options in row.structures:
        shapes = [(n,) for n in SIZES] * 3
        finals = []
        for together in (True, False):
            torch.manual_seed(0)
            params = parameters(*shapes, dtype=dtype)()
            groups = [{"params": params}] if together else [{"params": [p]} for p in params]
            optimizer = row.ours(groups, **options)
            for _ in range(3):
                for p in params:
                    p.grad = random_grad(p)
                optimizer.step()
            finals.append(
                ([p.detach() for p in params], [dict(optimizer.state[p]) for p in params])
            )
        assert_equal(*finals)


@pytest.mark.parametrize("threads", [1, 2, 3, 8])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_thread_counts(row: Row, dtype: torch.dtype, threads: int) -> None:
    """The bits do not depend on how the work is divided."""
    shapes = [(HUGE,), (513, 1023), *[(n,) for n in SIZES], (100_003,), *[(64,)] * 100]
    if threads > 2:  # a team larger than the machine may be spared unless there is much to do
        shapes.append((2_500_001,))
    twins = Twins(row, parameters(*shapes, dtype=dtype), **row.rich)
    alone = Twins(row, parameters(*shapes, dtype=dtype), **row.rich)
    for _ in range(3):
        twins.grads()
        alone.grads()
        torch.set_num_threads(threads)
        twins.ours.step()
        torch.set_num_threads(1)
        alone.ours.step()
        if dtype in EXACT:
            twins.stock.step()
            twins.check()
        for p, q in zip(all_params(twins.ours), all_params(alone.ours), strict=True):
            assert_equal(p, q)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_team_among_small_tensors(row: Row, dtype: torch.dtype) -> None:
    """Workers take whole tensors, and parts of those where one's share ends."""
    sizes = [(n,) for n in (1000, 0, 1003, 64, 1, 997)] * 500
    extras = {"max_grad_norm": 0.5, "ema_decay": 0.9, "clear_grads": "zero"}
    extras["ema_dtype"] = torch.float32  # which halves' shares are to reckon with
    start = parameters(*sizes, dtype=dtype)()
    optimizers = [row.ours(copy.deepcopy(start), **row.rich, **extras) for _ in range(2)]
    for _ in range(2):
        for threads, optimizer in zip((1, 2), optimizers, strict=True):
            torch.manual_seed(3)
            for p in all_params(optimizer):
                p.grad = random_grad(p)
            torch.set_num_threads(threads)
            optimizer.step()
    one, two = optimizers
    assert_equal(one.grad_norm, two.grad_norm)
    for p, q in zip(all_params(one), all_params(two), strict=True):
        assert_equal(p, q)
        assert_equal(dict(one.state[p]), dict(two.state[q]))
        assert not q.grad.any()


def test_a_team_at_work() -> None:
    """The threads of torch's runtime are there after a long step, whatever compiled ours."""
    isolated.run(
        """
        import os
        import torch
        import fastsgd

        torch.set_num_threads(1)
        p = torch.nn.Parameter(torch.zeros(12_000_000))
        p.grad = torch.ones_like(p)
        optimizer = fastsgd.SGD([p], lr=0.1)
        torch.set_num_threads(3)
        before = len(os.listdir("/proc/self/task"))
        optimizer.step()
        assert len(os.listdir("/proc/self/task")) == before + 2
        """
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_numbers_that_are_not_finite(row: Row, dtype: torch.dtype) -> None:
    """Infinities, NaN, the largest, subnormal and negative zero grads do what they do in stock."""
    info = torch.finfo(dtype)
    # A 16th of the largest: a sum of a few must not overflow float32, whose range is bfloat16's.
    # Nor must a square, which overflows in stock too.
    large = 2.0**60 if row.squares and dtype is torch.bfloat16 else info.max / 16
    odd = [float("inf"), -float("inf"), float("nan"), large, -large, info.tiny, -0.0]
    odd += [info.tiny * info.eps, info.smallest_normal / 2, 1.0]
    twins = Twins(row, parameters((len(odd) * 13,), (len(odd),), dtype=dtype), **row.rich)
    for step in range(4):
        values = torch.tensor(odd, dtype=torch.float64).roll(step).to(dtype)
        for optimizer in twins.sides:
            for p in all_params(optimizer):
                p.grad = values.repeat(p.numel() // len(odd))
        expected = Float64Step(row.stock, twins.ours) if dtype in HALVES else None
        twins.step()
        if not expected:
            twins.check()
        else:
            for p, q in expected.twins:
                exact = q.detach().to(dtype)
                assert torch.equal(p.isnan(), exact.isnan())
                assert torch.equal(p.isinf(), exact.isinf())
        for optimizer in twins.sides:  # start again from numbers
            for p in all_params(optimizer):
                p.data.nan_to_num_(0.5, 0.5, 0.5).clamp_(-2, 2)
                for value in optimizer.state[p].values():
                    value.nan_to_num_(0.5, 0.5, 0.5).clamp_(-2, 2)


@pytest.mark.parametrize(
    "lr",
    [
        0,
        1,
        1e-3,
        3.0,
        -0.01,
        1e-30,
        torch.tensor(0.1),
        torch.tensor(0.1, dtype=torch.float64),
        torch.tensor(0.1, dtype=torch.bfloat16),
        torch.tensor(1),
        torch.tensor([0.1]),
        torch.tensor([[0.1]]),
        torch.tensor(0.1, requires_grad=True),
    ],
    ids=repr,
)
@pytest.mark.parametrize("dtype", EXACT, ids=str)
def test_learning_rates(row: Row, dtype: torch.dtype, lr: Any) -> None:
    """Numbers and one-element tensors of any dtype, set by hand between steps."""
    twins = Twins(row, parameters((131,), (3, 5), dtype=dtype), **row.rich)
    twins.run(1)
    for optimizer in twins.sides:
        optimizer.param_groups[0]["lr"] = lr
    twins.run(2)


def test_tensor_lr_changed_in_place(row: Row) -> None:
    """A tensor lr is read at every step."""
    lr = torch.tensor(0.1)
    build = parameters((131,))
    twins = Twins(row, build, **row.plain)
    for optimizer in twins.sides:
        optimizer.param_groups[0]["lr"] = lr
    twins.run(1)
    lr.fill_(0.003)
    twins.run(1)


CHILD = """
    import sys, torch
    from torch import Tensor
    from cases import OPTIMIZERS, DTYPES, EXACT
    from oracle import Float64Step, assert_equal, exact_roots
    import fastsgd._C

    mended = exact_roots()  # for as long as it is held
    mended.__enter__()
    inputs, results, threads = sys.argv[1:] if len(sys.argv) > 1 else {argv!r}
    torch.set_num_threads(int(threads))
    saved = torch.load(inputs)
    out = []
    for row in OPTIMIZERS:
        for options in row.options:
            for dtype in DTYPES:
                make = lambda cls, **more: cls(
                    [torch.nn.Parameter(p.to(dtype, copy=True)) for p in saved["params"]],
                    **options, **more)
                ours, stock = make(row.ours), make(row.stock, foreach=False)
                for grads in saved["grads"]:
                    for optimizer in (ours, stock):
                        for p, g in zip(optimizer.param_groups[0]["params"], grads):
                            p.grad = g.to(dtype)
                    exact = Float64Step(row.stock, ours) if dtype not in EXACT else None
                    ours.step()
                    if exact:
                        exact.check()
                    else:
                        stock.step()
                        for p, q in zip(ours.param_groups[0]["params"],
                                        stock.param_groups[0]["params"]):
                            assert_equal(p, q, msg=lambda m: f"{{options}} {{dtype}}: {{m}}")
                            for key, value in stock.state.get(q, {{}}).items():
                                assert_equal(ours.state[p][key], value)
                out.append([p.detach().clone() for p in ours.param_groups[0]["params"]])
    torch.save(out, results)
    print(fastsgd._C.instruction_set(), len(out))
"""


def test_instruction_sets(tmp_path: Path) -> None:
    """Each set of kernels agrees with stock under that set; AVX2 and AVX-512 with each other."""
    torch.manual_seed(3)
    shapes = [(131,), (33, 5), (), (1,), (16,), (4_001,)]
    params = [torch.randn(s, dtype=torch.float64) for s in shapes]
    grads = [[random_grad(p) for p in params] for _ in range(3)]
    torch.save({"params": params, "grads": grads}, tmp_path / "inputs")
    results = {}
    for name, kernels in capabilities.supported().items():
        argv = [str(tmp_path / "inputs"), str(tmp_path / name), "1"]
        said = isolated.run(CHILD.format(argv=argv), env={"ATEN_CPU_CAPABILITY": name}, timeout=300)
        chosen, count = said.split()
        assert chosen == kernels, f"ATEN_CPU_CAPABILITY={name} ran the {chosen} kernels"
        assert int(count) == len(COMBINATIONS) * len(DTYPES)
        results[name] = torch.load(tmp_path / name)
    if "avx512" in results:
        for narrow, wide in zip(results["avx2"], results["avx512"], strict=True):
            for p, q in zip(narrow, wide, strict=True):
                assert_equal(p, q)


def test_long_trajectory_on_a_model(row: Row) -> None:
    """A network trained by both, through autograd, ends with the same bits."""
    torch.set_num_threads(1)

    def build() -> list[Tensor]:
        net = torch.nn.Sequential(
            torch.nn.Conv2d(3, 8, 3),
            torch.nn.BatchNorm2d(8),
            torch.nn.Flatten(),
            torch.nn.Linear(8 * 36, 10),
        )
        nets.append(net)
        return list(net.parameters())

    nets: list[torch.nn.Module] = []
    twins = Twins(row, build, **row.rich)
    for step in range(STEPS):
        losses = []
        for net, optimizer in zip(nets, twins.sides, strict=True):
            torch.manual_seed(step)
            x, y = torch.randn(16, 3, 8, 8), torch.randint(10, (16,))
            loss = torch.nn.functional.cross_entropy(net(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
        assert_equal(*losses)
    twins.check()
