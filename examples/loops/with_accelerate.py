"""Hugging Face's Accelerate: ``prepare`` takes fastsgd's optimizer as it takes torch's.

    optimizer = fastsgd.SGD(model.parameters(), lr=0.1, momentum=0.9)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)

``prepare`` returns an ``AcceleratedOptimizer``, which holds the optimizer and passes on ``step``
where gradients are synchronized. It passes on no attributes: what is fastsgd's own is asked of, and
set at, ``optimizer.optimizer``.

``accelerator.clip_grad_norm_`` works as ever. With ``max_grad_norm`` in the optimizer it can go,
and with it the question whether this is a step that accumulates: the step clips where there is one.

Weights and losses are compared with ``torch.optim.SGD``'s bit by bit.
"""

from __future__ import annotations

import tempfile
from typing import Any

import torch
from accelerate import Accelerator
from digits import check, digits, network
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader

import fastsgd


class Training:
    """A training whose gradients accumulate over two batches."""

    def __init__(self, optimizer_class: type[torch.optim.SGD], **options: Any) -> None:
        """Prepare the model, the optimizer, the data and the schedule."""
        self.accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
        model = network()
        optimizer = optimizer_class(model.parameters(), lr=0.1, momentum=0.9, **options)
        scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, total_iters=60)
        loader = DataLoader(digits(), 32, drop_last=True)
        self.model, self.optimizer, self.loader, self.scheduler = self.accelerator.prepare(
            model, optimizer, loader, scheduler
        )
        self.losses: list[Tensor] = []

    def epoch(self, clip: bool = True) -> None:
        """Go once through the images; ``clip`` before steps, or leave that to them."""
        for images, labels in self.loader:
            with self.accelerator.accumulate(self.model):
                loss = cross_entropy(self.model(images), labels)
                self.accelerator.backward(loss)
                if clip and self.accelerator.sync_gradients:
                    self.accelerator.clip_grad_norm_(self.model.parameters(), 1.0)
                self.optimizer.step()
                self.scheduler.step()
                self.optimizer.zero_grad()
                self.losses.append(loss.detach())


def compare(what: str, ours: Training, stock: Training, within: float = 0) -> None:
    """Compare two trainings."""
    check(f"losses, {what}", ours.losses, stock.losses, within)
    check(f"weights, {what}", ours.model.parameters(), stock.model.parameters(), within)


def main() -> None:
    """Train with both, and compare."""
    ours, stock = Training(fastsgd.SGD), Training(torch.optim.SGD)
    with tempfile.TemporaryDirectory() as folder:
        ours.epoch()
        ours.accelerator.save_state(folder)
        ours.epoch()
        stock.epoch()
        stock.epoch()
        print(f"loss {ours.losses[0]:.3f} at first, {ours.losses[-1]:.3f} after two epochs")
        compare("clipped by accelerate", ours, stock)

        for name, optimizer_class in (("fastsgd", fastsgd.SGD), ("torch.optim", torch.optim.SGD)):
            resumed = Training(optimizer_class)
            resumed.accelerator.load_state(folder)
            resumed.epoch()
            what = f"weights, fastsgd's state resumed with {name}.SGD"
            check(what, resumed.model.parameters(), ours.model.parameters())

    ours = Training(fastsgd.SGD, max_grad_norm=1.0)
    ours.epoch(clip=False)
    ours.epoch(clip=False)
    compare("clipped in the step", ours, stock, within=1e-4)  # torch's norm is rounded
    print(f"norm of the last gradients: {ours.optimizer.optimizer.grad_norm:.3f}")


if __name__ == "__main__":
    main()
