"""Steps on a CUDA device, ours against stock's modes and against a copy of memory, in one run.

    python benchmarks/on_cuda.py --json benchmarks/results/$(date +%F)-cuda.json

Each line is checked against the same steps in float64 before it is timed, and has the bars that it
is to reach. One that fails says so, and the others go on; the file has each as soon as it is found.
`--device cpu` runs the same code over CPU tensors, to test it: its figures are none.

(It is not named after CUDA alone, as NVIDIA's package `cuda`, which torch imports, is.)
"""

import argparse
import gc
import statistics
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from kept import keep
from torch import Tensor
from torch.optim import Optimizer

import fastsgd
from fastsgd.bench.check import CHECK_LR, CHECK_STEPS, make_steps, wrong_elements
from fastsgd.bench.contestants import Inputs, parameters_of, set_options
from fastsgd.bench.device import asked_of_device
from fastsgd.bench.errors import WrongResultError
from fastsgd.bench.measure import Spread, undisturbed
from fastsgd.bench.one_pass import Chain, Ours, Stock
from fastsgd.bench.one_pass import check as check_chain
from fastsgd.bench.rules import RULES, Mode, Rule
from fastsgd.bench.shapes import SHAPES, Shape

MORE_SHAPES = {
    "1000x1024": Shape("1000x1024", ((1024,),) * 1000),
    "100x65536": Shape("100x65536", ((65536,),) * 100),
    "1 Gi": Shape("1 Gi", ((2**26,),) * 16),
}
CHAIN = Chain("AdamW, clip, average", "gpt-2", "adamw", zeros=False)
CHAIN_BARS = ("launches", 2), ("waits", 0), ("fused_ratio", 2), ("of_copy", 0.90)
NOT_MEASURED, MISSED = "not measured", "MISSED"
PAIRS = 15
CALLS = 20  # of a block whose calls are short: fewer than a device's queue holds
BLOCK_SECONDS = 0.05  # of one whose calls are long


@dataclass(frozen=True)
class Bar:
    """What a figure of a line is to reach: at least, or at most where it is a time or a count."""

    figure: str
    limit: float

    def verdict(self, figures: dict[str, float]) -> str:
        """Whether it does; torch may lack what it is compared with."""
        if self.figure not in figures:
            return NOT_MEASURED
        value = figures[self.figure]
        at_most = self.figure in ("launches", "copies", "waits", "host_us")
        return "met" if (value <= self.limit if at_most else value >= self.limit) else MISSED


@dataclass
class Line:
    """What was found of one shape and one rule.

    Attributes:
        shape: The shape's name.
        rule: The rule's.
        figures: By name: `host_us` (a call, not waited for), `total_us` (until the device is done),
            `host_ratio` over stock's fused, `total_ratio` over the better of fused and foreach,
            `fused_ratio` and `foreach_ratio` of the same, `of_copy` (bytes a second over a copy's),
            `launches`, `copies` and `waits` of a step.
        spreads: The quartiles of the ratios.
        bars: What the figures are to reach, and whether they do.
        left_out: Why a mode of stock's is.
        error: What ended the line before its time.
    """

    shape: str
    rule: str
    figures: dict[str, float] = field(default_factory=dict)
    spreads: dict[str, Spread] = field(default_factory=dict)
    bars: list[tuple[Bar, str]] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)
    error: str | None = None

    def judge(self, bars: list[Bar]) -> None:
        """Keep the bars, each with whether it is met."""
        self.bars = [(bar, bar.verdict(self.figures)) for bar in bars]

    @property
    def well(self) -> bool:
        """Whether nothing failed and no bar is missed."""
        return self.error is None and all(verdict != MISSED for _, verdict in self.bars)

    def __str__(self) -> str:
        """Show what was found."""
        figures = ", ".join(f"{name} {value:.4g}" for name, value in self.figures.items())
        bars = ", ".join(f"{bar.figure} {bar.limit:g} {verdict}" for bar, verdict in self.bars)
        rows = [f"{self.shape:12} {self.rule:9} {figures}", f"{'':23}bars: {bars}"]
        rows += [f"{'':23}{name} is left out: {why}" for name, why in self.left_out.items()]
        return "\n".join(rows + ([f"{'':23}FAILED: {self.error}"] if self.error else []))


BARS: list[tuple[str, str, list[Bar]]] = [
    ("resnet-50", "sgd", [Bar("host_us", 25), Bar("host_ratio", 10)]),
    ("resnet-50", "momentum", [Bar("host_us", 25), Bar("host_ratio", 10)]),
    ("resnet-50", "adamw", [Bar("host_us", 25), Bar("host_ratio", 10)]),
    # torch 2.11 has no fused Adagrad for a device: then there is no host_ratio.
    ("resnet-50", "adagrad", [Bar("host_us", 25), Bar("host_ratio", 10), Bar("foreach_ratio", 5)]),
    ("resnet-50", "rmsprop", [Bar("host_us", 25), Bar("foreach_ratio", 5)]),
    ("1000x1024", "adamw", [Bar("fused_ratio", 10)]),
    ("100x65536", "momentum", [Bar("total_ratio", 3)]),
    ("gpt-2", "adamw", [Bar("of_copy", 0.92), Bar("fused_ratio", 1)]),
    ("gpt-2", "momentum", [Bar("of_copy", 0.92), Bar("fused_ratio", 1)]),
    ("gpt-2-bf16", "adamw", [Bar("of_copy", 0.90)]),
    ("1 Gi", "adam", [Bar("of_copy", 0.92)]),
]


class Timer:
    """Times calls on a device."""

    def __init__(self, device: torch.device) -> None:
        """Take the device."""
        self.device = device

    def wait(self) -> None:
        """Wait for all that was asked of the device."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def seconds(self, call: Callable[[], object], calls: int) -> tuple[float, float]:
        """The time of a call: until it returned, and until the device was done."""
        self.wait()
        start = time.perf_counter()
        for _ in range(calls):
            call()
        returned = time.perf_counter()
        self.wait()
        return (returned - start) / calls, (time.perf_counter() - start) / calls

    def race(
        self, ours: Callable[[], object], rival: Callable[[], object]
    ) -> tuple[list[tuple[float, float]], list[tuple[float, float]]]:
        """Time both in turn, pair by pair."""
        calls = []
        for call in (ours, rival):
            _, once = self.seconds(call, 2)
            calls.append(max(1, min(CALLS, int(BLOCK_SECONDS / once))))
        times: tuple[list[Any], list[Any]] = ([], [])
        with undisturbed():
            for _ in range(PAIRS):
                times[0].append(self.seconds(ours, calls[0]))
                times[1].append(self.seconds(rival, calls[1]))
        return times


def values(shape: Shape, device: torch.device, seed: int) -> list[Tensor]:
    """Normal values, the same at each call."""
    generator = torch.Generator(device).manual_seed(seed)
    like = {"generator": generator, "device": device, "dtype": shape.dtype}
    return [torch.randn(size, **like) for size in shape.sizes]


def optimizer_of(shape: Shape, mode: Mode, rule: Rule, device: torch.device) -> Optimizer:
    """An optimizer over random parameters, each with a gradient, after the checked steps."""
    inputs = Inputs(shape, values(shape, device, 1), values(shape, device, 2))
    optimizer = inputs.optimizer(mode, rule, CHECK_LR)
    del inputs  # it has as much memory again, where the states are to go
    for _ in range(CHECK_STEPS):
        optimizer.step()
    return optimizer


def check(shape: Shape, rule: Rule, optimizer: Optimizer, device: torch.device) -> int:
    """How many elements are not what the same steps in float64 make of them, rounding aside."""
    wrong = 0
    starts, grads = values(shape, device, 1), values(shape, device, 2)
    for start, grad, p in zip(starts, grads, parameters_of(optimizer), strict=True):
        for a, g, b in zip(
            *(x.detach().view(-1).split(2**24) for x in (start, grad, p)), strict=True
        ):
            true = a.to(torch.float64, copy=True)
            make_steps(true, g.to(torch.float64), rule)
            wrong += wrong_elements(a, true, b)
    return wrong


def measure(line: Line, shape: Shape, rule: Rule, timer: Timer) -> None:
    """Check, then race with each of stock's modes, and with a copy."""
    device = timer.device
    ours = optimizer_of(shape, rule.ours, rule, device)
    wrong = check(shape, rule, ours, device)
    if wrong:
        raise WrongResultError(f"{wrong} elements are wrong; nothing is timed.")
    set_options(ours, rule.timed)
    host, total = zip(*(timer.seconds(ours.step, CALLS) for _ in range(PAIRS)), strict=True)
    line.figures["host_us"] = 1e6 * statistics.median(host)
    line.figures["total_us"] = 1e6 * statistics.median(total)
    for mode in rule.rivals:
        if mode.name == "default" or shape.elements >= 2**30:
            continue
        try:
            rival = optimizer_of(shape, mode, rule, device)
        except RuntimeError as error:
            line.left_out[mode.name] = first_sentence(error)
            continue
        set_options(rival, rule.timed)
        a, b = timer.race(ours.step, rival.step)
        for which, name in ((0, "host"), (1, "total")):
            ratios = [y[which] / x[which] for x, y in zip(a, b, strict=True)]
            spread = Spread.of(ratios)
            line.spreads[f"{name} {mode.name}"] = spread
            if name == "total":
                line.figures[f"{mode.name}_ratio"] = spread.median
            elif mode.name == "fused":
                line.figures["host_ratio"] = spread.median
        del rival
    ratios = [line.figures[n] for n in ("fused_ratio", "foreach_ratio") if n in line.figures]
    if ratios:
        line.figures["total_ratio"] = min(ratios)
    if shape.large:
        moved, touched = rule.bytes_moved(shape), rule.bytes_touched(shape)
        line.figures["of_copy"] = of_copy(ours.step, moved, touched, timer)


def first_sentence(error: BaseException) -> str:
    """What an error says, without the advice after it."""
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"


def of_copy(step: Callable[[], object], moved: int, touched: int, timer: Timer) -> float:
    """Bytes a second of a step, over those of a copy within as much memory."""
    source = torch.ones(touched // 2 // torch.float32.itemsize, device=timer.device)
    target = torch.zeros_like(source)
    a, b = timer.race(step, lambda: target.copy_(source))
    return statistics.median(
        moved / x[1] / (2 * source.nbytes / y[1]) for x, y in zip(a, b, strict=True)
    )


def measure_chain(line: Line, chain: Chain, timer: Timer) -> None:
    """Check a step that clips and averages, then race it with stock's chain, and with a copy."""
    shape, rule = SHAPES[chain.shape], RULES[chain.rule]
    inputs = Inputs(shape, values(shape, timer.device, 1), values(shape, timer.device, 2))
    check_chain(chain, rule, inputs)
    lr = rule.timed["lr"]
    ours = Ours(chain, rule, inputs, lr)
    for _ in range(2):
        ours()
    line.figures.update(asked_of_device(ours))
    moved, touched = chain.bytes_moved(rule, shape), rule.bytes_touched(shape)
    line.figures["of_copy"] = of_copy(ours, moved, touched, timer)
    for mode in rule.rivals:
        if mode.name == "default":
            continue
        stock = Stock(chain, rule, mode, inputs, lr)
        a, b = timer.race(ours, stock)
        spread = Spread.of([y[1] / x[1] for x, y in zip(a, b, strict=True)])
        line.spreads[f"total {mode.name}"] = spread
        line.figures[f"{mode.name}_ratio"] = spread.median
        del stock


def count_launches(line: Line, device: torch.device) -> None:
    """What a step of many tensors asks of the device, by the profiler. Its grads have moved."""
    params = [
        torch.nn.Parameter(torch.ones(16, device=device, dtype=dtype))
        for _ in range(5000)
        for dtype in (torch.float32, torch.bfloat16)
    ]
    optimizer = fastsgd.AdamW([{"params": params[g::465]} for g in range(465)])
    for _ in range(3):
        kept = [p.grad for p in params]
        for p in params:
            p.grad = torch.ones_like(p)
        line.figures.update(asked_of_device(optimizer.step))
        del kept


Job = tuple[Line, list[Bar], Callable[[Line], None]]


def jobs(timer: Timer, shapes: list[str] | None) -> Iterator[Job]:
    """Every line, with its bars and what finds its figures."""
    if shapes is None:
        line = Line("10,000 tensors, 2 dtypes, 465 groups", "adamw")
        bars = [Bar("launches", 2), Bar("copies", 2), Bar("waits", 0)]
        yield line, bars, lambda line: count_launches(line, timer.device)
    for name, rule, bars in BARS:
        if shapes is None or name in shapes:
            shape = (SHAPES | MORE_SHAPES)[name]
            yield (
                Line(name, rule),
                bars,
                partial(measure, shape=shape, rule=RULES[rule], timer=timer),
            )
    if shapes is None or CHAIN.shape in shapes:
        bars = [Bar(figure, limit) for figure, limit in CHAIN_BARS]
        yield Line(CHAIN.shape, CHAIN.title), bars, partial(measure_chain, chain=CHAIN, timer=timer)


def done(job: Job) -> Line:
    """The line, with its figures or what was wrong."""
    line, bars, act = job
    try:
        act(line)
    except Exception as error:
        line.error = first_sentence(error)
        traceback.print_exc()
    gc.collect()  # the frames of an error hold its tensors
    line.judge(bars)
    return line


def answers(timer: Timer) -> str | None:
    """Return what is wrong with the device, with which no more can be done."""
    try:
        timer.wait()
        if timer.device.type == "cuda":
            torch.cuda.empty_cache()
    except RuntimeError as error:
        return first_sentence(error)
    return None


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, and write JSON if asked; 1 where a bar is missed or something failed."""
    parser = argparse.ArgumentParser(description="Time steps on a CUDA device.")
    parser.add_argument("--device", default="cuda", help="cuda, cuda:1, ...; cpu to try the code")
    parser.add_argument("--model", nargs="+", choices=sorted(SHAPES | MORE_SHAPES), metavar="NAME")
    parser.add_argument(
        "--json", type=Path, help="written after each line; what else is in it stays"
    )
    options = parser.parse_args(arguments)
    device = torch.device(options.device)
    on_cuda = device.type == "cuda"
    if on_cuda and not fastsgd.cuda_available():
        parser.error("there is no CUDA device, or this build has no kernels for it")
    name = torch.cuda.get_device_name(device) if on_cuda else "the CPU"
    print(f"fastsgd {fastsgd.__version__} and torch {torch.__version__} on {name}")
    facts = {"device": name, "torch": torch.__version__, "fastsgd": fastsgd.__version__}
    facts["date"] = time.strftime("%Y-%m-%d")
    found: list[Line] = []
    timer = Timer(device)
    for job in jobs(timer, options.model):
        line = done(job)
        found.append(line)
        lost = answers(timer)
        if lost is not None:
            line.error = f"{line.error or 'the line was done'}; then the device was lost: {lost}"
        print(line, flush=True)
        if options.json:
            keep(options.json, facts | {"lines": [asdict(line) for line in found]})
        if lost is not None:
            break
    return int(not all(line.well for line in found))


if __name__ == "__main__":
    raise SystemExit(main())
