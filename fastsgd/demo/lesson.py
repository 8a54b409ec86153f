"""Parts (a) to (c) of the lesson: gradients, a training loop by hand, and the same as a module."""

import inspect
import textwrap
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss
from torch.optim import Optimizer

import fastsgd

Model = Callable[[Tensor], Tensor]


def say(text: str) -> None:
    """Print a paragraph, indented and wrapped."""
    words = " ".join(text.split())
    lines = textwrap.wrap(words, 88, break_long_words=False, break_on_hyphens=False)
    print("\n" + textwrap.indent("\n".join(lines), "    "))


def show_source(code: Callable[..., object]) -> None:
    """Print the very code that runs, so that what is shown cannot differ from what is done."""
    lines = inspect.getsource(code).splitlines()
    print("\n" + "\n".join(f"      | {line}".rstrip() for line in lines) + "\n")


def gradients_add_up() -> None:
    """Part (a): what `backward` does to `.grad`, and what `zero_grad` does."""
    print("\n(a) Gradients add up until they are cleared")
    say(
        """w is a number to be learned, and z = 2 * w. When w grows by 1, z grows by 2: that 2 is
        the gradient of z with respect to w. z.backward() works it out and ADDS it to w.grad."""
    )
    print()
    w = torch.tensor(1.0, requires_grad=True)
    optimizer = fastsgd.SGD([w], lr=0.01)
    for turn in (1, 2, 3):
        z = 2 * w
        z.backward()
        show_grad(f"after backward number {turn}", w)
    say(
        """The gradient is still 2, but w.grad has become the sum of three. An optimizer that
        stepped now would go three times too far. So each turn of a training loop clears first."""
    )
    print()
    optimizer.zero_grad()
    show_grad("after optimizer.zero_grad()", w)
    z = 2 * w
    z.backward()
    show_grad("after one more backward", w)
    optimizer.zero_grad(set_to_none=False)
    show_grad("after optimizer.zero_grad(set_to_none=False)", w)


def show_grad(when: str, w: Tensor) -> None:
    """Print a line with the gradient of the number w."""
    print(f"      {when + ':':<46} w.grad = {None if w.grad is None else f'{w.grad.item():g}'}")


def fit(model: Model, x: Tensor, y: Tensor, optimizer: Optimizer) -> None:
    """Train for 300 epochs on one example."""
    for epoch in range(1, 301):
        loss = mse_loss(model(x), y)  # how wrong: the mean of the squared errors
        optimizer.zero_grad()  # forget the gradients of the epoch before
        loss.backward()  # which way each parameter makes the loss grow
        optimizer.step()  # take each parameter a little the other way
        if epoch == 1 or epoch % 100 == 0:
            print(f"      epoch {epoch:3}: loss {loss.item():.3g}")


def by_hand(seed: int) -> None:
    """Part (b): linear regression on two tensors."""
    print("\n(b) A training loop")
    say(
        """x holds four ones and the answer wanted is y, three zeros. The model is x @ W + b; W and
        b start at random, so its first answers are wrong. This loop, fit, makes them right:"""
    )
    show_source(fit)
    torch.manual_seed(seed)
    x = torch.ones(4)
    y = torch.zeros(3)
    W = torch.rand(4, 3, requires_grad=True)
    b = torch.rand(3, requires_grad=True)
    fit(lambda x: x @ W + b, x, y, fastsgd.SGD([W, b], lr=0.01))
    say(
        """step() is the optimizer's part, and the part that fastsgd makes faster. Plain SGD does
        W = W - lr * W.grad, and the same with b; here lr, the learning rate, is 0.01."""
    )


class LinearRegression(nn.Module):
    """The model of part (b) as PyTorch programs write it."""

    def __init__(self) -> None:
        """Make W and b: nn.Linear holds them."""
        super().__init__()
        self.linear = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        """Compute x @ W + b."""
        z: Tensor = self.linear(x)
        return z


def as_a_module(seed: int) -> None:
    """Part (c): the model of part (b) as an `nn.Module`."""
    print("\n(c) The same as a module")
    say(
        """A module keeps its parameters (W is linear.weight, transposed; b is linear.bias) and
        lists them with model.parameters(), so that the loop stays as it is whatever the model:"""
    )
    show_source(LinearRegression)
    torch.manual_seed(seed)
    model = LinearRegression()
    fit(model, torch.ones(4), torch.zeros(3), fastsgd.SGD(model.parameters(), lr=0.01))
    say(
        """As a rule this loss starts lower than that of (b): nn.Linear starts its weights on both
        sides of zero (here between -1/2 and 1/2), where torch.rand starts them between 0 and 1."""
    )
