"""What the loops here share: handwritten digits, a network that reads them, a comparison."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator
from functools import cache

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

torch.set_num_threads(1)  # to so small a network a second brings only waiting


@cache
def digits() -> TensorDataset:
    """Return scikit-learn's 1797 images, 8 x 8 pixels from 0 to 1, with what they show."""
    data = load_digits()
    return TensorDataset(
        torch.tensor(data.data, dtype=torch.float32) / 16, torch.tensor(data.target)
    )


def network() -> nn.Sequential:
    """Return the network; its first weights are the same every time."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10)
    )


def batches(steps: int, size: int = 32) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield images and labels, epoch after epoch, in an order that is the same every time."""
    order = torch.Generator().manual_seed(0)
    loader = DataLoader(digits(), size, shuffle=True, drop_last=True, generator=order)
    while True:
        for images, labels in loader:
            if not steps:
                return
            steps -= 1
            yield images, labels


def say(text: str) -> None:
    """Print a line; where there are several processes, in the first alone."""
    if os.environ.get("RANK", "0") == "0":
        print(text)


def check(what: str, ours: Iterable[Tensor], stock: Iterable[Tensor], within: float = 0) -> None:
    """Print that two runs gave the same numbers; end the program if they did not.

    Args:
        what: What the numbers are.
        ours: Tensors of the one run.
        stock: Tensors of the other.
        within: The relative difference to allow. With 0 the bits are compared.
    """
    for i, (a, b) in enumerate(zip(ours, stock, strict=True)):
        a, b = a.detach().reshape(-1), b.detach().reshape(-1)
        if within:
            equal = torch.allclose(a, b, rtol=within, atol=within)
        else:
            equal = torch.equal(a.view(torch.uint8), b.view(torch.uint8))
        if not equal:
            sys.exit(f"DIFFERENT: {what}: number {i}, by up to {(a - b).abs().max():.3g}")
    say(f"the same {f'within {within:g}' if within else 'bits'}: {what}")
