"""Hugging Face's ``Trainer``: the optimizer is passed in, or its class.

    Trainer(..., optimizer_cls_and_kwargs=(fastsgd.AdamW, {"lr": 1e-3}))
    Trainer(..., optimizers=(fastsgd.AdamW(model.parameters(), lr=1e-3), scheduler))

``TrainingArguments(optim="adamw_torch")`` and the other names mean torch's own classes, or those of
other packages: no name means fastsgd. The first line leaves the groups to the Trainer (no weight
decay for biases and norms), and is the one to take with ``model_init`` and with FSDP, where an
optimizer made before the model is wrapped is refused. Both override ``optim``.

The Trainer clips by itself, and finds the norm for its log in any case. So clipping stays with
``TrainingArguments(max_grad_norm=...)``. What else a step of fastsgd can do goes among the keyword
arguments, as ``ema_decay`` does here. The Trainer has accelerate wrap the optimizer: fastsgd's own
attributes are at ``trainer.optimizer.optimizer``.

A model of GPT-2's kind, made from a configuration, learns to count by threes. With SGD, losses and
weights are compared with torch's bit by bit. AdamW's differ by the last bits of square roots, which
torch does not always round to the nearest number. Nothing is fetched and nothing is reported.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
from digits import check
from torch import Tensor
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    Trainer,
    TrainingArguments,
    get_cosine_schedule_with_warmup,
    logging,
)
from transformers.trainer_callback import PrinterCallback

import fastsgd

logging.set_verbosity_error()
logging.disable_progress_bar()

STEPS = 40
LENGTH, MODULUS = 16, 23


def countings() -> list[dict[str, Tensor]]:
    """Return sequences: start, start + 3, start + 6, ... (mod 23)."""
    rows = [(start + 3 * torch.arange(LENGTH)) % MODULUS for start in range(MODULUS)]
    return [{"input_ids": row, "labels": row} for row in rows]


def model(seed: int = 0) -> GPT2LMHeadModel:
    """Return the model, its first weights those of the seed."""
    torch.manual_seed(seed)
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=MODULUS,
            n_positions=LENGTH,
            n_embd=32,
            n_layer=2,
            n_head=2,
            resid_pdrop=0,
            embd_pdrop=0,
            attn_pdrop=0,
            bos_token_id=None,
            eos_token_id=None,
        )
    )


def train(
    net: GPT2LMHeadModel, folder: Path, checkpoint: Path | None = None, **how: Any
) -> Trainer:
    """Train the model, with the optimizer that ``how`` tells, and return what has trained it."""
    arguments = TrainingArguments(
        output_dir=folder,
        max_steps=STEPS,
        per_device_train_batch_size=8,
        gradient_accumulation_steps=2,
        weight_decay=0.01,
        max_grad_norm=1.0,
        logging_steps=1,
        save_steps=STEPS // 2,
        save_strategy="steps",
        seed=0,
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
    )
    trainer = Trainer(net, arguments, train_dataset=countings(), **how)
    trainer.remove_callback(PrinterCallback)  # which would print every loss
    trainer.train(resume_from_checkpoint=checkpoint and str(checkpoint))
    return trainer


def compare(what: str, ours: Trainer, stock: Trainer, within: float = 0) -> None:
    """Compare two trainings: the losses that the Trainers log, and the weights."""
    losses, stock_losses = (
        torch.tensor([log["loss"] for log in each.state.log_history if "loss" in log])
        for each in (ours, stock)
    )
    print(f"loss {losses[0]:.3f} at first, {losses[-1]:.3f} after {len(losses)} steps")
    check(f"losses, {what}", losses, stock_losses, within)
    check(f"weights, {what}", ours.model.parameters(), stock.model.parameters(), within)


def made_here(optimizer_class: type[torch.optim.AdamW], folder: Path) -> Trainer:
    """Train with an optimizer and a scheduler that are passed in."""
    net = model()
    optimizer = optimizer_class(net.parameters(), lr=1e-2)
    scheduler = get_cosine_schedule_with_warmup(optimizer, 5, STEPS)
    return train(net, folder, optimizers=(optimizer, scheduler))


def made_there(
    optimizer_class: type[torch.optim.SGD], folder: Path, half: Path | None = None, **options: Any
) -> Trainer:
    """Train with an optimizer that the Trainer makes, from a checkpoint on if there is one."""
    net = model(seed=0 if half is None else 1)
    how = optimizer_class, {"lr": 0.1, "momentum": 0.9, **options}
    return train(net, folder, half, optimizer_cls_and_kwargs=how)


def main() -> None:
    """Train in each way with both, and compare."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        ours = made_here(fastsgd.AdamW, folder / "AdamW")
        stock = made_here(torch.optim.AdamW, folder / "stock AdamW")
        compare("optimizers=(AdamW, scheduler)", ours, stock, within=1e-3)

        ours = made_there(fastsgd.SGD, folder / "SGD", ema_decay=0.9)
        stock = made_there(torch.optim.SGD, folder / "stock SGD")
        compare("optimizer_cls_and_kwargs=(SGD, ...)", ours, stock)

        half = folder / "SGD" / f"checkpoint-{STEPS // 2}"
        resumed = made_there(torch.optim.SGD, folder, half)
        compare("fastsgd's checkpoint resumed with torch.optim.SGD", resumed, ours)
        resumed = made_there(fastsgd.SGD, folder, half, ema_decay=0.9)
        compare("fastsgd's checkpoint resumed with fastsgd.SGD", resumed, ours)
        optimizers = [each.optimizer.optimizer for each in (resumed, ours)]  # in accelerate's
        with optimizers[0].ema_weights(), optimizers[1].ema_weights():
            check("averages, resumed", resumed.model.parameters(), ours.model.parameters())


if __name__ == "__main__":
    main()
