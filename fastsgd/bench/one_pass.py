"""One pass against stock's chain: `clip_grad_norm_`, `step()`, `AveragedModel`, `zero_grad()`."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import fastsgd
from fastsgd.bench.bandwidth import race_copies
from fastsgd.bench.check import threads_set_to
from fastsgd.bench.contest import Rival, Row, Settings, races_of
from fastsgd.bench.contestants import Inputs, parameters_of
from fastsgd.bench.errors import WrongResultError
from fastsgd.bench.measure import Runner
from fastsgd.bench.rules import RULES, Mode, Rule
from fastsgd.bench.shapes import SHAPES, Shape

MAX_NORM = 1.0
DECAY = 0.999
CHECK_STEPS = 3
CHECK_LR = 1e-2


@dataclass(frozen=True)
class Chain:
    """What is done around a step.

    Attributes:
        title: What the table calls it.
        shape: The name of the shape.
        rule: The name of the rule.
        averages: Keep averages of the parameters.
        zeros: Zero the gradients in place.
        bare: Race it with stock's steps alone.
    """

    title: str
    shape: str
    rule: str
    averages: bool = True
    zeros: bool = True
    bare: bool = False

    def bytes_moved(self, rule: Rule, shape: Shape) -> int:
        """What one pass reads and writes: the norm reads gradients, an average is both."""
        streams = 1 + 2 * self.averages + self.zeros
        return rule.bytes_moved(shape) + streams * shape.nbytes


CHAINS = (
    Chain("AdamW, all four", "1000x16", "adamw"),
    Chain("AdamW, all four", "2000x64", "adamw"),
    Chain("the same, bare", "2000x64", "adamw", bare=True),
    Chain("momentum, clip", "resnet-50", "momentum", averages=False, zeros=False),
    Chain("AdamW, all four", "resnet-50", "adamw"),
    Chain("AdamW, all four", "gpt-2", "adamw"),
)
NORM_SHAPE = "2000x64"


class Loop:
    """What a training loop does between two backwards, and the gradients that it starts from."""

    def __init__(self, optimizer: torch.optim.Optimizer, inputs: Inputs) -> None:
        """Keep what is stepped."""
        self.optimizer = optimizer
        self.parameters = parameters_of(optimizer)
        self.gradients = [p.grad for p in self.parameters]
        self.inputs = inputs.gradients
        self.averages: Callable[[], list[Tensor]] = list

    def backward(self) -> None:
        """Fill the gradients anew, where they were zeroed."""
        torch._foreach_copy_(self.gradients, self.inputs)  # type: ignore[arg-type]

    def __call__(self) -> None:
        """Do it."""
        raise NotImplementedError


class Ours(Loop):
    """A step that does it all."""

    def __init__(self, chain: Chain, rule: Rule, inputs: Inputs, lr: float) -> None:
        """Make the optimizer."""
        super().__init__(inputs.optimizer(rule.ours, rule, lr), inputs)
        options = {
            "max_grad_norm": MAX_NORM,
            "ema_decay": DECAY if chain.averages else None,
            "clear_grads": "zero" if chain.zeros else False,
        }
        for name, value in options.items():
            setattr(self.optimizer, name, value)
        self.averages = lambda: [self.optimizer.state[p]["ema"] for p in self.parameters]

    def __call__(self) -> None:
        """Do it."""
        self.optimizer.step()


class Stock(Loop):
    """One call after the other."""

    def __init__(self, chain: Chain, rule: Rule, mode: Mode, inputs: Inputs, lr: float) -> None:
        """Make the optimizer."""
        super().__init__(inputs.optimizer(mode, rule, lr), inputs)
        self.chain = chain
        self.model = torch.nn.ParameterList(self.parameters)
        self.averaged: AveragedModel | None = None
        self.averages = lambda: list(self.averaged.module)  # type: ignore[union-attr, arg-type]

    def __call__(self) -> None:
        """Do it."""
        torch.nn.utils.clip_grad_norm_(self.parameters, MAX_NORM)
        self.rest()

    def exact(self) -> None:
        """Do it with the norm of float64, from which stock's strays where tensors are large."""
        norms = torch.stack([p.grad.norm(dtype=torch.float64) for p in self.parameters])  # type: ignore[union-attr]
        torch.nn.utils.clip_grads_with_norm_(self.parameters, MAX_NORM, norms.norm().float())
        self.rest()

    def rest(self) -> None:
        """What follows the clipping."""
        self.optimizer.step()
        if self.chain.averages:
            if self.averaged is None:
                self.averaged = self.copied()
            self.averaged.update_parameters(self.model)
        if self.chain.zeros:
            self.optimizer.zero_grad(set_to_none=False)

    def copied(self) -> AveragedModel:
        """The model of the averages, made at the first step as states are."""
        for p in self.parameters:
            p.grad = None  # or the copy would have copies of them
        averaged = AveragedModel(self.model, multi_avg_fn=get_ema_multi_avg_fn(DECAY))
        for p, gradient in zip(self.parameters, self.gradients, strict=True):
            p.grad = gradient
        return averaged


def one_pass_rows(settings: Settings, shapes: Sequence[str] | None = None) -> Iterator[Row]:
    """Race every chain, and the norm alone."""
    for chain in chains(shapes):
        yield chain_row(chain, settings)
    if shapes is None or NORM_SHAPE in shapes:
        yield norm_row(settings)


def chains(shapes: Sequence[str] | None) -> list[Chain]:
    """The chains of the shapes; None for all."""
    return [chain for chain in CHAINS if shapes is None or chain.shape in shapes]


def chain_row(chain: Chain, settings: Settings) -> Row:
    """Check ours, then race it with stock's modes, and with a copy."""
    rule, inputs = RULES[chain.rule], Inputs.random(SHAPES[chain.shape])
    check(chain, rule, inputs)
    lr = rule.timed["lr"]
    ours = Ours(chain, rule, inputs, lr)
    ours()
    runner = Runner(ours, settings.threads, prepare=ours.backward, warm=True)
    row = Row.of(inputs.shape, chain.title, settings.threads)
    for mode in rule.rivals:
        stock = Stock(chain, rule, mode, inputs, lr)
        stock()
        step = stock.optimizer.step if chain.bare else stock
        for count in settings.counts:
            rival = Runner(step, count, prepare=stock.backward, warm=True)
            race = settings.race(runner, rival, races_of(row.rivals))
            row.rivals.append(Rival(mode.name, count, None, race))
            settings.tick()
        del stock
    if inputs.shape.large:
        row.bytes_moved = chain.bytes_moved(rule, inputs.shape)
        row.copy_bytes = rule.bytes_touched(inputs.shape)
        race_copies(row, runner, settings)
    return row


def check(chain: Chain, rule: Rule, inputs: Inputs) -> None:
    """Compare ours with stock's default code.

    Raises:
        WrongResultError: If they differ by more than rounding explains.
    """
    ours = Ours(chain, rule, inputs, CHECK_LR)
    stock = Stock(chain, rule, rule.rivals[0], inputs, CHECK_LR)
    loops: tuple[Loop, Loop] = (ours, stock)
    with threads_set_to(1):
        for loop, turn in ((ours, ours), (stock, stock.exact)):
            for _ in range(CHECK_STEPS):
                loop.backward()
                turn()
        kinds = [[p.detach() for p in loop.parameters] for loop in loops]
        pairs = list(zip(*kinds, strict=True))
        if chain.averages:
            pairs += list(zip(*(loop.averages() for loop in loops), strict=True))
        if chain.zeros:
            if any(p.grad.any() for p in loops[0].parameters):  # type: ignore[union-attr]
                raise WrongResultError(f"{chain.shape}, {chain.title}: gradients are left.")
        wrong = sum(not torch.allclose(a, b, rtol=1e-5, atol=1e-6) for a, b in pairs)
    if wrong:
        raise WrongResultError(f"{chain.shape}, {chain.title}: {wrong} tensors wrong.")


def norm_row(settings: Settings) -> Row:
    """Race the norm of gradients alone."""
    inputs = Inputs.random(SHAPES[NORM_SHAPE])
    parameters = parameters_of(inputs.optimizer(RULES["sgd"].ours, RULES["sgd"]))
    gradients = [p.grad for p in parameters]
    true = torch.cat([g.double().view(-1) for g in gradients]).norm()  # type: ignore[union-attr]
    ours = partial(fastsgd.clip_grad_norm_, parameters, torch.inf)  # which scales nothing
    if not torch.isclose(ours().double(), true, rtol=2e-7):
        raise WrongResultError(f"{NORM_SHAPE}: the norm is {ours()}, not {true}.")
    row = Row.of(inputs.shape, "norm alone", settings.threads)
    for foreach in (True, False):
        stock = partial(stock_norm, parameters, foreach)
        for count in settings.counts:
            race = settings.race(
                Runner(ours, settings.threads), Runner(stock, count), races_of(row.rivals)
            )
            name = "foreach" if foreach else "default"
            row.rivals.append(Rival(name, count, None, race))
            settings.tick()
    return row


def stock_norm(parameters: list[Tensor], foreach: bool) -> Tensor:
    """The part of stock's `clip_grad_norm_` that finds the norm."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    return torch.nn.utils.get_total_norm(gradients, foreach=foreach)


def rivals(shapes: Sequence[str] | None) -> int:
    """With how many of stock's ways ours is raced, at each thread count."""
    norm = 2 if shapes is None or NORM_SHAPE in shapes else 0
    return norm + sum(len(RULES[chain.rule].rivals) for chain in chains(shapes))
