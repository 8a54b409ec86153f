"""PyTorch Lightning: ``configure_optimizers`` returns fastsgd's optimizer.

    def configure_optimizers(self):
        return fastsgd.AdamW(self.parameters(), lr=1e-3)

The Trainer's ``gradient_clip_val``, schedulers, accumulation, checkpoints and manual optimization
then find a ``torch.optim.AdamW``. Two things are worth knowing:

* A GradScaler (``precision="16-mixed"``) with ``fused=True``: Lightning refuses to clip, as the
  gradients are unscaled within the step. fastsgd can clip there: leave ``gradient_clip_val`` out,
  and give the optimizer ``max_grad_norm``.
* ``self.optimizers()`` returns Lightning's wrapper, whose class derives from the optimizer's.
  fastsgd's attributes (``grad_norm``, ``max_grad_norm``, ``ema_weights()``, ...) are there too, and
  are those of the optimizer within. The same holds for what Fabric's ``setup`` returns.

With LightningCLI the line of the configuration is

    optimizer:
      class_path: fastsgd.AdamW
      init_args: {lr: 0.001, max_grad_norm: 1.0}

and once fastsgd is imported, ``AdamW`` alone is ambiguous: write ``torch.optim.AdamW`` for torch's.

Weights and losses are compared with ``torch.optim.SGD``'s bit by bit.
"""

from __future__ import annotations

import logging
import tempfile
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from digits import check, digits, network
from pytorch_lightning.plugins import MixedPrecision
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader

import fastsgd

STEPS = 60
CLIPPED = {"gradient_clip_val": 1.0, "accumulate_grad_batches": 2}

logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
warnings.filterwarnings("ignore", module="pytorch_lightning|lightning_fabric")


class Reader(pl.LightningModule):
    """Reads digits."""

    def __init__(self, make: Callable[..., torch.optim.Optimizer]) -> None:
        """Keep how the optimizer is made."""
        super().__init__()
        self.net = network()
        self.make = make
        self.losses: list[Tensor] = []

    def configure_optimizers(self) -> dict[str, Any]:
        """Return the optimizer and a schedule."""
        optimizer = self.make(self.parameters())
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": schedule, "interval": "step"},
        }

    def training_step(self, batch: list[Tensor], _: int) -> Tensor:
        """Return the loss of a batch."""
        images, labels = batch
        loss = cross_entropy(self.net(images), labels)
        self.losses.append(loss.detach())
        return loss


class ByHand(Reader):
    """Steps by itself, through Lightning's wrapper."""

    automatic_optimization = False

    def training_step(self, batch: list[Tensor], index: int) -> None:
        """Take a step."""
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(super().training_step(batch, index))
        self.clip_gradients(optimizer, gradient_clip_val=1.0)
        optimizer.step()
        self.lr_schedulers().step()


def fit(
    reader: Reader, steps: int = STEPS, checkpoint: Path | None = None, **options: Any
) -> pl.Trainer:
    """Train it, from a checkpoint on if there is one."""
    trainer = pl.Trainer(
        accelerator="cpu",
        max_steps=steps,
        max_epochs=-1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )
    trainer.fit(reader, DataLoader(digits(), 32, drop_last=True), ckpt_path=checkpoint)
    return trainer


def scaled() -> MixedPrecision:
    """Return what ``precision="16-mixed"`` stands for on a device; on a CPU Lightning has none."""
    return MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=2.0**20))


def compare(what: str, mine: Reader, theirs: Reader, within: float = 0) -> None:
    """Compare two trainings."""
    check(f"losses, {what}", mine.losses, theirs.losses, within)
    check(f"weights, {what}", mine.parameters(), theirs.parameters(), within)


ours = partial(fastsgd.SGD, lr=0.1, momentum=0.9)
stock = partial(torch.optim.SGD, lr=0.1, momentum=0.9)


def main() -> None:
    """Train in each way with both, and compare."""
    mine, theirs = Reader(ours), Reader(stock)
    for reader in (mine, theirs):
        fit(reader, **CLIPPED)
    print(f"loss {mine.losses[0]:.3f} at first, {mine.losses[-1]:.3f} after {STEPS} steps")
    compare("clipped by the Trainer", mine, theirs)

    with tempfile.TemporaryDirectory() as folder:
        checkpoint = Path(folder) / "half.ckpt"
        fit(Reader(ours), steps=STEPS // 2, **CLIPPED).save_checkpoint(checkpoint)
        mine, theirs = Reader(ours), Reader(stock)
        for reader in (mine, theirs):
            fit(reader, checkpoint=checkpoint, **CLIPPED)
    compare("both resumed from fastsgd's checkpoint", mine, theirs)

    mine, theirs = ByHand(ours), ByHand(stock)
    for reader in (mine, theirs):
        fit(reader)
    compare("optimized by hand", mine, theirs)

    mine, theirs = Reader(partial(ours, fused=True, max_grad_norm=1.0)), Reader(stock)
    trainer = fit(mine, plugins=scaled())
    fit(theirs, plugins=scaled(), gradient_clip_val=1.0)
    compare("scaled, clipped in the step", mine, theirs, within=1e-5)  # torch's norm is rounded
    print(f"norm of the last gradients, unscaled: {trainer.optimizers[0].grad_norm:.3f}")


if __name__ == "__main__":
    main()
