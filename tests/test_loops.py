"""The loops of ``examples/loops``: each runs as a user runs it, and compares itself with torch's.

An example ends with an error where its numbers are not those of ``torch.optim``. What it has to
have compared before it ends is said here, a row for each.
"""

from __future__ import annotations

import importlib.util
import re
from dataclasses import dataclass
from pathlib import Path

import isolated
import pytest
import torch

import fastsgd

FOLDER = Path(__file__).parents[1] / "examples" / "loops"
SHARED = "digits.py"
SURROUNDINGS = {
    "GLOO_SOCKET_IFNAME": "lo",
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "TRANSFORMERS_OFFLINE": "1",
}


@dataclass
class Loop:
    """An example."""

    file: str
    # What it says that it has compared, in this order.
    compares: dict[str, str]
    needs: str = "torch"
    processes: int = 1
    # What else it prints.
    prints: str = ""

    def __repr__(self) -> str:
        """Name the file."""
        return self.file

    def command(self) -> list[str]:
        """Return the arguments of Python that run it."""
        path = str(FOLDER / self.file)
        if self.processes == 1:
            return [path]
        count = str(self.processes)
        return ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", count, path]


BITS = "bits"
AMP = "within 0.05" if torch.cuda.is_available() else BITS
LEARNS = r"loss (\d\.\d+) (?:at first, |to )(\d\.\d+)"

LOOPS = [
    Loop(
        "plain.py",
        {
            "losses of the plain loop": BITS,
            "weights of the plain loop": BITS,
            "weights, clipped": BITS,
            "averages of the weights": BITS,
        },
        prints=r"read rightly: 9\d\.\d%, with the averages 9\d\.\d%\nnorm of the last .*: 0\.\d+",
    ),
    Loop(
        "amp.py",
        {
            f"{what}, clipped {where}, fused={fused}": AMP
            for fused in (False, True)
            for where in ("by hand", "in the step")
            for what in ("losses", "weights")
        },
        prints=r"fastsgd, fused=True: .*, [1-9] steps overflowed",
    ),
    Loop(
        "with_lightning.py",
        {
            "losses, clipped by the Trainer": BITS,
            "weights, clipped by the Trainer": BITS,
            "losses, both resumed from fastsgd's checkpoint": BITS,
            "weights, both resumed from fastsgd's checkpoint": BITS,
            "losses, optimized by hand": BITS,
            "weights, optimized by hand": BITS,
            "losses, scaled, clipped in the step": "within 1e-05",
            "weights, scaled, clipped in the step": "within 1e-05",
        },
        needs="pytorch_lightning",
        prints=r"norm of the last gradients, unscaled: [1-9]\.\d+",
    ),
    Loop(
        "with_trainer.py",
        {
            "losses, optimizers=(AdamW, scheduler)": "within 0.001",
            "weights, optimizers=(AdamW, scheduler)": "within 0.001",
            "losses, optimizer_cls_and_kwargs=(SGD, ...)": BITS,
            "weights, optimizer_cls_and_kwargs=(SGD, ...)": BITS,
            "losses, fastsgd's checkpoint resumed with torch.optim.SGD": BITS,
            "weights, fastsgd's checkpoint resumed with torch.optim.SGD": BITS,
            "losses, fastsgd's checkpoint resumed with fastsgd.SGD": BITS,
            "weights, fastsgd's checkpoint resumed with fastsgd.SGD": BITS,
            "averages, resumed": BITS,
        },
        needs="transformers",
    ),
    Loop(
        "with_accelerate.py",
        {
            "losses, clipped by accelerate": BITS,
            "weights, clipped by accelerate": BITS,
            "weights, fastsgd's state resumed with fastsgd.SGD": BITS,
            "weights, fastsgd's state resumed with torch.optim.SGD": BITS,
            "losses, clipped in the step": "within 0.0001",
            "weights, clipped in the step": "within 0.0001",
        },
        needs="accelerate",
        prints=r"norm of the last gradients: [1-9]\.\d+",
    ),
    Loop(
        "ddp.py",
        {
            "losses, replicas": BITS,
            "weights, replicas": BITS,
            "weights of each process and the first": BITS,
            "losses, states divided": BITS,
            "weights, states divided": BITS,
            "losses, clipped in the step": BITS,
            "weights, clipped in the step": BITS,
        },
        processes=2,
    ),
    Loop(
        "fsdp2.py",
        {
            "losses": BITS,
            "shards": BITS,
            "the norm": "within 1e-05",
            "losses, clipped": BITS,
            "shards, clipped": BITS,
        },
        processes=2,
    ),
    Loop(
        "checkpoint.py",
        {
            **{
                f"weights, {name}, {way}": bits
                for name, bits in (("SGD", BITS), ("AdamW", "within 1e-05"))
                for way in ("fastsgd to torch", "torch to fastsgd", "fastsgd to fastsgd")
            },
            "averages, fastsgd to fastsgd": BITS,
        },
    ),
    Loop(
        "cuda_graph.py",
        {"weights": "within 0.001"} if fastsgd.cuda_available() else {},
        prints="" if fastsgd.cuda_available() else "Nothing to capture: torch finds no CUDA device",
    ),
]


def skip_without(loop: Loop) -> None:
    """Skip where what an example needs is missing."""
    for name in ("sklearn", loop.needs):
        pytest.importorskip(name)
    if loop.processes > 1 and not torch.distributed.is_available():
        pytest.skip("torch was built without distributed")


@pytest.mark.parametrize("loop", LOOPS, ids=repr)
def test_example(loop: Loop) -> None:
    """It ends well, has compared all that it should, and its loss has fallen."""
    skip_without(loop)
    text = isolated.python(*loop.command(), env=SURROUNDINGS)
    compared = re.findall(r"^the same (bits|within [\d.e-]+): (.*)$", text, re.MULTILINE)
    assert [(what, how) for how, what in compared] == list(loop.compares.items()), text
    assert re.search(loop.prints, text), text
    losses = re.findall(LEARNS, text)
    assert all(float(last) < 0.8 * float(first) for first, last in losses), text
    assert losses or loop.file in ("checkpoint.py", "cuda_graph.py"), text


@pytest.mark.parametrize("loop", [loop for loop in LOOPS if loop.processes == 1][:-1], ids=repr)
def test_a_difference_is_told(loop: Loop) -> None:
    """One bit of one weight that is another at each step ends each example with an error."""
    skip_without(loop)
    code = f"""
    import math, runpy, sys
    import fastsgd, torch

    class OneBitOff(fastsgd.SGD):
        def step(self, closure=None):
            loss = super().step(closure)
            first = self.param_groups[0]["params"][0].data.view(-1)[:1]
            first.copy_(torch.nextafter(first, torch.full_like(first, math.inf)))
            return loss

    fastsgd.SGD = OneBitOff
    sys.path.insert(0, {str(FOLDER)!r})
    runpy.run_path({str(FOLDER / loop.file)!r}, run_name="__main__")
    """
    with pytest.raises(AssertionError, match=r"^ended with 1\n(.|\n)*DIFFERENT: (losses|weights)"):
        isolated.run(code, env=SURROUNDINGS)


@pytest.mark.parametrize(
    "ours, stock, within, same",
    [
        ([1.0, 2.0], [1.0, 2.0], 0, True),
        ([0.0], [-0.0], 0, False),
        ([1.0], [1.0 + 2**-23], 0, False),
        ([1.0], [1.0 + 2**-23], 1e-6, True),
        ([1.0], [1.1], 1e-2, False),
    ],
)
def test_comparison(
    ours: list[float],
    stock: list[float],
    within: float,
    same: bool,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """What the examples compare by."""
    pytest.importorskip("sklearn")
    spec = importlib.util.spec_from_file_location("loops_shared", FOLDER / SHARED)
    shared = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(shared)
    tensors = [torch.tensor(5.0), torch.tensor(ours)], [torch.tensor(5.0), torch.tensor(stock)]
    if same:
        shared.check("a pair", *tensors, within)
        assert capsys.readouterr().out.endswith(": a pair\n")
    else:
        with pytest.raises(SystemExit, match="DIFFERENT: a pair: number 1, by up to"):
            shared.check("a pair", *tensors, within)
    with pytest.raises(ValueError):
        shared.check("one more", tensors[0], tensors[1][:1])


def test_every_example_has_a_row() -> None:
    """Here, and in the table of the folder's page."""
    files = {path.name for path in FOLDER.glob("*.py")}
    assert files == {loop.file for loop in LOOPS} | {SHARED}
    page = (FOLDER / "README.md").read_text()
    assert set(re.findall(r"^\| \[(\w+\.py)\]\(\1\) \|", page, re.MULTILINE)) == files - {SHARED}
