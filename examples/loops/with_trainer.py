"""Hugging Face's ``Trainer``: the optimizer is passed in, or its class.

    Trainer(..., optimizer_cls_and_kwargs=(fastsgd.AdamW, {"lr": 1e-3}))
    Trainer(..., optimizers=(fastsgd.AdamW(model.parameters(), lr=1e-3), scheduler))

``TrainingArguments(optim="adamw_torch")`` and the other names mean torch's own classes, or those of
other packages: no name means fastsgd. The first line leaves the groups to the Trainer (no weight
decay for biases and norms), and is the one to take with ``model_init`` and with FSDP, where an
optimizer made before the model is wrapped is refused. Both override ``optim``.

The Trainer clips by itself, and finds the norm for its log in any case. So clipping stays with
``TrainingArguments(max_grad_norm=...)``. What else a step of fastsgd can do, such as ``ema_decay``,
goes among the keyword arguments.

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
    net: GPT2LMHeadModel, folder: str, resume: str | None = None, **how: Any
) -> tuple[list[Tensor], GPT2LMHeadModel]:
    """Train the model; return the losses that the Trainer logs, and the model."""
    arguments = TrainingArguments(
        output_dir=folder,
        max_steps=STEPS,
        per_device_train_batch_size=8,
        gradient_accumulation_steps=2,
        learning_rate=1e-3,
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
    trainer.train(resume_from_checkpoint=resume)
    logs = [log["loss"] for log in trainer.state.log_history if "loss" in log]
    return torch.tensor(logs).unbind(), net


def with_scheduler(optimizer_class: type[torch.optim.AdamW]) -> dict[str, Any]:
    """Return a model and the argument ``optimizers`` for it."""
    net = model()
    optimizer = optimizer_class(net.parameters(), lr=1e-2)
    return {
        "net": net,
        "optimizers": (optimizer, get_cosine_schedule_with_warmup(optimizer, 5, STEPS)),
    }


def main() -> None:
    """Train in each way with both, and compare."""
    with tempfile.TemporaryDirectory() as folder:
        ours, net = train(**with_scheduler(fastsgd.AdamW), folder=folder)
        stock, stock_net = train(**with_scheduler(torch.optim.AdamW), folder=folder)
        print(f"AdamW: loss {ours[0]:.3f} at first, {ours[-1]:.3f} after {STEPS} steps")
        check("losses, optimizers=(AdamW, scheduler)", ours, stock, 1e-3)
        check(
            "weights, optimizers=(AdamW, scheduler)", net.parameters(), stock_net.parameters(), 1e-3
        )

    with tempfile.TemporaryDirectory() as folder:
        options = {"lr": 0.1, "momentum": 0.9}
        ours, net = train(model(), folder, optimizer_cls_and_kwargs=(fastsgd.SGD, options))
        half = str(Path(folder) / f"checkpoint-{STEPS // 2}")
        stock, stock_net = train(
            model(), f"{folder}/stock", optimizer_cls_and_kwargs=(torch.optim.SGD, options)
        )
        print(f"SGD: loss {ours[0]:.3f} at first, {ours[-1]:.3f} after {STEPS} steps")
        check("losses, optimizer_cls_and_kwargs=(SGD, ...)", ours, stock)
        check(
            "weights, optimizer_cls_and_kwargs=(SGD, ...)", net.parameters(), stock_net.parameters()
        )
        for name, optimizer_class in (("fastsgd", fastsgd.SGD), ("torch.optim", torch.optim.SGD)):
            _, resumed = train(
                model(seed=1), folder, half, optimizer_cls_and_kwargs=(optimizer_class, options)
            )
            what = f"weights, fastsgd's checkpoint resumed with {name}.SGD"
            check(what, resumed.parameters(), net.parameters())


if __name__ == "__main__":
    main()
