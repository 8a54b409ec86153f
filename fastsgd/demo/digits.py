"""Part (d) of the lesson: one network, trained by stock and by fastsgd, compared bit by bit."""

import statistics
from collections.abc import Iterator
from contextlib import contextmanager
from time import perf_counter

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from tqdm import tqdm

import fastsgd
from fastsgd.demo.lesson import say

BATCH_SIZE = 32
BATCHES_PER_EPOCH = 45
TRAIN_IMAGES = BATCH_SIZE * BATCHES_PER_EPOCH
# A bar appears only where the training takes longer than this.
PATIENCE_SECONDS = 3.0


class Training:
    """A network, its optimizer, and the record of their training.

    Attributes:
        name: The optimizer's name, as a program writes it.
        losses: The loss of each iteration, a 0-dim tensor.
        step_seconds: The time of each `optimizer.step()`.
        seconds: The time of each whole iteration.
    """

    def __init__(self, name: str, optimizer_class: type[torch.optim.SGD], seed: int) -> None:
        """Make the network; the same seed gives the same one."""
        torch.manual_seed(seed)
        self.name = name
        self.model = nn.Sequential(
            nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10)
        )
        self.optimizer = optimizer_class(self.model.parameters(), lr=0.02, momentum=0.9)
        self.losses: list[Tensor] = []
        self.step_seconds: list[float] = []
        self.seconds: list[float] = []

    def iterate(self, images: Tensor, labels: Tensor) -> None:
        """Run the loop of part (b) once, on one batch."""
        begin = perf_counter()
        loss = cross_entropy(self.model(images), labels)
        self.optimizer.zero_grad()
        loss.backward()
        before_step = perf_counter()
        self.optimizer.step()
        end = perf_counter()
        self.losses.append(loss.detach())
        self.step_seconds.append(end - before_step)
        self.seconds.append(end - begin)

    def epoch_losses(self) -> list[float]:
        """The mean loss of each epoch."""
        losses = torch.stack(self.losses).view(-1, BATCHES_PER_EPOCH)
        return [epoch.item() for epoch in losses.mean(dim=1)]

    @torch.no_grad()
    def correct(self, images: Tensor, labels: Tensor) -> int:
        """How many images the network reads rightly."""
        return int((self.model(images).argmax(dim=1) == labels).sum())


def race(seed: int, epochs: int) -> tuple[Training, Training]:
    """Train the network twice at once, with stock and with fastsgd.

    Both take each batch in turn, so that what disturbs the machine disturbs both their times.

    Args:
        seed: Fixes the split of the images, the first weights and the order of the batches.
        epochs: How many times all training images are seen.

    Returns:
        The training with `torch.optim.SGD` and the one with `fastsgd.SGD`.
    """
    print("\n(d) A network that reads digits, trained twice")
    images, labels = shuffled_digits(seed)
    stock = Training("torch.optim.SGD", torch.optim.SGD, seed)
    ours = Training("fastsgd.SGD", fastsgd.SGD, seed)
    tensors = list(ours.model.parameters())
    say(
        f"""scikit-learn brings {len(images)} handwritten digits, 8 x 8 pixels each. A network of
        three layers, {len(tensors)} tensors with {sum(map(torch.numel, tensors))} parameters in
        all, learns from {TRAIN_IMAGES} of them in batches of {BATCH_SIZE}, {epochs} epochs
        long. There are two copies of it with the same first weights, given the same batches, on one
        CPU thread: one steps with {stock.name}, one with {ours.name}."""
    )
    bar = tqdm(
        total=epochs * BATCHES_PER_EPOCH,
        desc="    training",
        unit="step",
        leave=False,
        delay=PATIENCE_SECONDS,
        disable=None,  # where stderr is no terminal
    )
    with bar, one_thread():
        for batch in batches(epochs, seed):
            stock.iterate(images[batch], labels[batch])
            ours.iterate(images[batch], labels[batch])
            bar.update()
    print()
    new_images, new_labels = images[TRAIN_IMAGES:], labels[TRAIN_IMAGES:]
    for training in (stock, ours):
        correct = training.correct(new_images, new_labels)
        print(
            f"      {training.name + ':':<16} last loss {training.losses[-1].item():.3g}, reads "
            f"{correct} of {len(new_images)} new digits rightly ({correct / len(new_images):.1%})"
        )
    return stock, ours


@contextmanager
def one_thread() -> Iterator[None]:
    """Lend torch one thread: to so small a network a second brings only waiting, and noise."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def shuffled_digits(seed: int) -> tuple[Tensor, Tensor]:
    """The images (n, 64), scaled to 0 to 1, and their labels (n,), in random order."""
    digits = load_digits()
    images = torch.tensor(digits.data, dtype=torch.float32) / 16
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    return images[order], torch.tensor(digits.target)[order]


def batches(epochs: int, seed: int) -> Iterator[Tensor]:
    """The indices of each batch: all training images in a new random order each epoch."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        yield from torch.randperm(TRAIN_IMAGES, generator=generator).view(-1, BATCH_SIZE)


def report(stock: Training, ours: Training) -> bool:
    """Print whether the two trainings are the same, and what differs: the time.

    Returns:
        Whether every loss and every parameter is the same to the last bit.
    """
    same = report_bits(stock, ours)
    low, median, high = times_as_long(stock, ours)
    say(
        f"""A step takes {median_us(stock.step_seconds):.1f} microseconds with {stock.name} and
        {median_us(ours.step_seconds):.1f} with {ours.name} (medians). Pair by pair the first takes
        {median:.1f} times as long as the second (the median of {len(ours.losses)} pairs; half of
        them lie between {low:.1f} and {high:.1f}). A whole iteration, with forward and backward,
        takes {median_us(stock.seconds):.0f} and {median_us(ours.seconds):.0f}: only the
        optimizer's part of it has changed."""
    )
    return same


def times_as_long(stock: Training, ours: Training) -> tuple[float, float, float]:
    """The quartiles of stock's step time divided by ours, step by step."""
    pairs = zip(stock.step_seconds, ours.step_seconds, strict=True)
    low, median, high = statistics.quantiles((a / b for a, b in pairs), n=4)
    return low, median, high


def report_bits(stock: Training, ours: Training) -> bool:
    """Compare losses and parameters as integers, so that even -0 and 0 would differ."""
    differ = bits(torch.stack(stock.losses)) != bits(torch.stack(ours.losses))
    parameters = zip(stock.model.parameters(), ours.model.parameters(), strict=True)
    unequal = sum(int((bits(p) != bits(q)).sum()) for p, q in parameters)
    if differ.any():
        first = int(differ.nonzero()[0])
        say(
            f"""THE TWO DIFFER: {int(differ.sum())} of {len(differ)} losses are not the same, the
            first after {first} steps: {float(stock.losses[first]).hex()} with {stock.name},
            {float(ours.losses[first]).hex()} with {ours.name}."""
        )
    if unequal:
        say(f"THE TWO DIFFER: {unequal} of the trained parameters are not the same.")
    same = not differ.any() and not unequal
    if same:
        say(
            f"""The two are the same to the last bit: all {len(differ)} losses and all trained
            parameters were compared as bits, and none differs. (The last loss, exactly:
            {float(ours.losses[-1]).hex()} in hexadecimal, with either.)"""
        )
    return same


def bits(values: Tensor) -> Tensor:
    """The bits of float32 numbers, as integers."""
    return values.detach().view(torch.int32)


def median_us(seconds: list[float]) -> float:
    """The median, in microseconds."""
    return statistics.median(seconds) * 1e6
