"""A plain loop: one line changes. Then the same loop in one pass.

    -optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    +optimizer = fastsgd.SGD(model.parameters(), lr=0.1, momentum=0.9)

What is around the step stays as it is: here a scheduler, which sets ``lr`` and ``momentum`` in the
groups. Losses and weights are compared bit by bit with ``torch.optim.SGD``'s.

``one_pass`` leaves clipping, averaging and clearing to the step; ``four_calls`` does them around
``torch.optim.SGD``'s. There ``fastsgd.clip_grad_norm_`` clips, as torch's rounds the norm otherwise
and the bits would differ by that.
"""

from __future__ import annotations

import torch
from digits import batches, check, digits, network
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import fastsgd

STEPS = 200


def train(optimizer_class: type[torch.optim.SGD]) -> tuple[list[Tensor], nn.Module]:
    """Train the network; return the losses and the network."""
    model = network()
    optimizer = optimizer_class(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=STEPS)
    losses = []
    for images, labels in batches(STEPS):
        loss = cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()
        losses.append(loss.detach())
    return losses, model


def one_pass() -> tuple[nn.Module, fastsgd.SGD]:
    """Clip, step, average and clear in one call."""
    model = network()
    optimizer = fastsgd.SGD(
        model.parameters(),
        lr=0.1,
        momentum=0.9,
        max_grad_norm=1.0,
        ema_decay=0.95,
        clear_grads=True,
    )
    for images, labels in batches(STEPS):
        cross_entropy(model(images), labels).backward()
        optimizer.step()
    return model, optimizer


def four_calls() -> tuple[nn.Module, AveragedModel]:
    """Do the same with torch's optimizer."""
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.95))
    for images, labels in batches(STEPS):
        cross_entropy(model(images), labels).backward()
        fastsgd.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        averaged.update_parameters(model)
        optimizer.zero_grad()
    return model, averaged


@torch.no_grad()
def accuracy(model: nn.Module) -> float:
    """Return the share of all digits that are read rightly."""
    images, labels = digits().tensors
    return (model(images).argmax(1) == labels).float().mean().item()


def main() -> None:
    """Run each loop with both, and compare."""
    (ours, model), (stock, stock_model) = train(fastsgd.SGD), train(torch.optim.SGD)
    print(f"loss {ours[0]:.3f} at first, {ours[-1]:.3f} after {STEPS} steps")
    check("losses of the plain loop", ours, stock)
    check("weights of the plain loop", model.parameters(), stock_model.parameters())

    (model, optimizer), (stock_model, averaged) = one_pass(), four_calls()
    check("weights, clipped", model.parameters(), stock_model.parameters())
    alone = accuracy(model)
    with optimizer.ema_weights():
        check("averages of the weights", model.parameters(), averaged.module.parameters())
        print(f"read rightly: {alone:.1%}, with the averages {accuracy(model):.1%}")
    print(f"norm of the last gradients, before clipping: {optimizer.grad_norm:.3f}")


if __name__ == "__main__":
    main()
