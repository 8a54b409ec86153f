"""Checkpoints: ``torch.distributed.checkpoint``, from fastsgd to torch's optimizer and back.

    state = {"model": model_state, "optimizer": optimizer_state}  # of get_state_dict(...)
    dcp.save(state, checkpoint_id=folder)

States have torch's names, shapes and dtypes, and groups torch's keys. So ``state_dict()``,
``get_state_dict`` and ``set_state_dict`` are used as ever, and a checkpoint of either optimizer
loads into the other. Each training here is stopped half-way, and gone on with by the other
optimizer from a checkpoint on disk; weights are compared bit by bit with one that was not stopped.

Averages (``ema_decay``) are states too, and the checkpoint has them. A checkpoint without
averages, such as torch's, has nothing to load for them: set ``optimizer.ema_decay`` after loading.
"""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Callable
from functools import partial
from itertools import islice
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from digits import batches, check, network
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.nn.functional import cross_entropy

import fastsgd

HALF = 30

warnings.filterwarnings("ignore", message="torch.distributed is disabled")

Optimizer = torch.optim.Optimizer


def train(model: nn.Module, optimizer: Optimizer, first: int, last: int) -> None:
    """Train on the batches from one number to another."""
    for images, labels in islice(batches(last), first, None):
        loss = cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def save(folder: Path, model: nn.Module, optimizer: Optimizer) -> None:
    """Write a checkpoint; of a sharded model each process writes its shards."""
    model_state, optimizer_state = get_state_dict(model, optimizer)
    dcp.save({"model": model_state, "optimizer": optimizer_state}, checkpoint_id=folder)


def load(folder: Path, model: nn.Module, optimizer: Optimizer) -> None:
    """Read a checkpoint into a model and its optimizer."""
    model_state, optimizer_state = get_state_dict(model, optimizer)
    state = {"model": model_state, "optimizer": optimizer_state}
    dcp.load(state, checkpoint_id=folder)
    set_state_dict(
        model,
        optimizer,
        model_state_dict=state["model"],
        optim_state_dict=state["optimizer"],
    )


def exchange(
    what: str, ours: Callable[..., Optimizer], stock: Callable[..., Optimizer], within: float = 0
) -> None:
    """Stop and go on, with ours and torch's taking turns."""
    whole = network()
    train(whole, stock(whole.parameters()), 0, 2 * HALF)
    for first, second in ((ours, stock), (stock, ours), (ours, ours)):
        model, other = network(), network()
        optimizer = first(model.parameters())
        train(model, optimizer, 0, HALF)
        with tempfile.TemporaryDirectory() as folder:
            save(Path(folder), model, optimizer)
            optimizer = second(other.parameters())
            load(Path(folder), other, optimizer)
        train(other, optimizer, HALF, 2 * HALF)
        names = " to ".join("fastsgd" if each is ours else "torch" for each in (first, second))
        check(f"weights, {what}, {names}", other.parameters(), whole.parameters(), within)


def averages() -> None:
    """Stop and go on, with averages."""

    def schedule(average: int) -> float:
        return min(0.95, average / (average + 3))

    make = partial(fastsgd.AdamW, lr=1e-2, ema_decay=schedule)
    (whole, optimizer), (other, resumed) = (
        (model, make(model.parameters())) for model in (network(), network())
    )
    train(whole, optimizer, 0, HALF)
    with tempfile.TemporaryDirectory() as folder:
        save(Path(folder), whole, optimizer)
        load(Path(folder), other, resumed)
    train(whole, optimizer, HALF, 2 * HALF)
    train(other, resumed, HALF, 2 * HALF)
    with optimizer.ema_weights(), resumed.ema_weights():
        check("averages, fastsgd to fastsgd", other.parameters(), whole.parameters())


def main() -> None:
    """Exchange checkpoints of both kinds."""
    sgd, adamw = {"lr": 0.1, "momentum": 0.9}, {"lr": 1e-3}
    exchange("SGD", partial(fastsgd.SGD, **sgd), partial(torch.optim.SGD, **sgd))
    # torch's square roots are not always the nearest numbers, and ours are.
    exchange("AdamW", partial(fastsgd.AdamW, **adamw), partial(torch.optim.AdamW, **adamw), 1e-5)
    averages()


if __name__ == "__main__":
    main()
