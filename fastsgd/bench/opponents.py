"""Other libraries' optimizers, raced where they are installed: the extra `[opponents]`."""

from collections.abc import Container, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

import torch
from torch.optim import Optimizer

from fastsgd.bench.rules import Mode, Rule
from fastsgd.bench.shapes import Shape

FLOATS = frozenset({torch.float32, torch.bfloat16})


@dataclass(frozen=True)
class Opponent:
    """A library with optimizers that do what some of the rules do.

    Attributes:
        name: The package.
        module: Where in it the classes are.
        classes: For each rule that it has, the class and what that needs to do as stock does.
        dtypes: Of parameters that it takes.
    """

    name: str
    module: str
    classes: Mapping[str, tuple[str, Mapping[str, Any]]] = field(repr=False)
    dtypes: frozenset[torch.dtype] = FLOATS

    def enters(self, rule: Rule, shape: Shape) -> bool:
        """Whether it has the rule for parameters of such dtypes."""
        return rule.name in self.classes and self.dtypes.issuperset(shape.dtypes)

    def mode(self, rule: Rule) -> Mode:
        """Its optimizer; the class is looked for when one is made."""
        name, options = self.classes[rule.name]

        def optimizer(*args: Any, **kwargs: Any) -> Optimizer:
            made: Optimizer = getattr(import_module(self.module), name)(*args, **kwargs)
            return made

        return Mode(self.name, optimizer, options)


# Only optimizers with the states that stock has: 8-bit states are another rule. Left out as well is
# what writes into gradients, as a step here finds those of the last one: optimi's SGD does with
# weight decay, and its compensated sums do.
OPTIMI = {"kahan_sum": False}
OPTIMI_ADAM = OPTIMI | {"betas": (0.9, 0.999), "eps": 1e-8}

OPPONENTS = (
    Opponent(
        "deepspeed",
        "deepspeed.ops.adam",
        {
            "adamw": ("DeepSpeedCPUAdam", {"adamw_mode": True}),
            "adam": ("DeepSpeedCPUAdam", {"adamw_mode": False}),
        },
    ),
    Opponent(
        "optimi",
        "optimi",
        {
            "sgd": ("SGD", OPTIMI),
            "adamw": ("AdamW", OPTIMI_ADAM),
            "adam": ("Adam", OPTIMI_ADAM),
        },
    ),
    Opponent(
        "bitsandbytes",
        "bitsandbytes.optim",
        {
            "momentum": ("SGD", {"optim_bits": 32}),
            "adamw": ("AdamW", {"optim_bits": 32}),
            "adam": ("Adam", {"optim_bits": 32}),
            "adagrad": ("Adagrad", {"optim_bits": 32}),
        },
    ),
    Opponent(
        "torchao",
        "torchao.optim",
        {"adamw": ("_AdamW", {}), "adamw-amsgrad": ("_AdamW", {})},
    ),
)


def found(names: Container[str] | None = None) -> tuple[list[Opponent], dict[str, str]]:
    """Those that can be imported, and a word on each: its version, or why it is left out.

    Args:
        names: Which to look for; None for all.
    """
    present, words = [], {}
    for opponent in OPPONENTS:
        if names is not None and opponent.name not in names:
            continue
        try:
            package = import_module(opponent.name)
            import_module(opponent.module)
        except Exception as error:  # whatever goes wrong in there, the run goes on without it
            missing = isinstance(error, ModuleNotFoundError) and error.name == opponent.name
            words[opponent.name] = "not installed" if missing else type(error).__name__
        else:
            present.append(opponent)
            words[opponent.name] = str(getattr(package, "__version__", "of unknown version"))
    return present, words
