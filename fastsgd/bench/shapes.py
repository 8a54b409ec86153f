"""The parameter shapes that are timed, written as short formulas of the architectures.

Counts of tensors and elements are those of torchvision (MobileNetV3-large, ResNet-50, ViT-B/16)
and of Hugging Face (GPT-2); each is checked when the shape is made.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from math import prod

import torch

Size = tuple[int, ...]

# What a model can be timed in, and how its name then ends.
DTYPES = {
    "float32": torch.float32,
    "float64": torch.float64,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
SUFFIXES = {
    torch.float32: "",
    torch.float64: "-f64",
    torch.bfloat16: "-bf16",
    torch.float16: "-f16",
}


@dataclass(frozen=True)
class Shape:
    """The parameters of one model.

    Attributes:
        name: What the command line and the table call it.
        sizes: The size of each parameter tensor, in the model's order.
        dtype: The dtype of parameters and gradients: one for all, or one for each.
        groups: How many tensors each parameter group has, in order; one group has all by default.
    """

    name: str
    sizes: tuple[Size, ...] = field(repr=False)
    dtype: torch.dtype | tuple[torch.dtype, ...] = field(default=torch.float32, repr=False)
    groups: tuple[int, ...] = field(default=(), repr=False)

    @property
    def tensors(self) -> int:
        """How many tensors."""
        return len(self.sizes)

    @property
    def elements(self) -> int:
        """How many elements in all tensors together."""
        return sum(map(prod, self.sizes))

    @property
    def dtypes(self) -> tuple[torch.dtype, ...]:
        """The dtype of each tensor."""
        return self.dtype if isinstance(self.dtype, tuple) else (self.dtype,) * self.tensors

    @property
    def nbytes(self) -> int:
        """The memory of all tensors."""
        pairs = zip(self.sizes, self.dtypes, strict=True)
        return sum(prod(size) * dtype.itemsize for size, dtype in pairs)

    def in_dtype(self, dtype: torch.dtype) -> "Shape":
        """The same model in another dtype, which its name tells."""
        own = "" if isinstance(self.dtype, tuple) else SUFFIXES[self.dtype]
        return replace(self, name=self.name.removesuffix(own) + SUFFIXES[dtype], dtype=dtype)

    @property
    def large(self) -> bool:
        """Whether memory bandwidth decides: it fits no core's caches by far."""
        return self.elements >= 20_000_000


def conv(out: int, of: int, kernel: int = 1, groups: int = 1) -> Iterator[Size]:
    """A convolution without a bias."""
    yield (out, of // groups, kernel, kernel)


def norm(channels: int) -> Iterator[Size]:
    """The scale and shift of a batch or layer norm."""
    yield (channels,)
    yield (channels,)


def linear(out: int, of: int) -> Iterator[Size]:
    """A weight and a bias."""
    yield (out, of)
    yield (out,)


def resnet50() -> Iterator[Size]:
    """He et al. 2015, table 1, the 50-layer column."""
    yield from conv(64, 3, 7)
    yield from norm(64)
    channels = 64
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(blocks):
            yield from conv(width, channels)
            yield from norm(width)
            yield from conv(width, width, 3)
            yield from norm(width)
            yield from conv(4 * width, width)
            yield from norm(4 * width)
            if block == 0:  # the shortcut changes its width with the stage
                yield from conv(4 * width, channels)
                yield from norm(4 * width)
            channels = 4 * width
    yield from linear(1000, channels)


# Howard et al. 2019, table 1: kernel, expanded channels, out channels, squeeze-and-excite.
MOBILENET_V3_LARGE = (
    (3, 16, 16, False),
    (3, 64, 24, False),
    (3, 72, 24, False),
    (5, 72, 40, True),
    (5, 120, 40, True),
    (5, 120, 40, True),
    (3, 240, 80, False),
    (3, 200, 80, False),
    (3, 184, 80, False),
    (3, 184, 80, False),
    (3, 480, 112, True),
    (3, 672, 112, True),
    (5, 672, 160, True),
    (5, 960, 160, True),
    (5, 960, 160, True),
)


def mobilenet_v3_large() -> Iterator[Size]:
    """Howard et al. 2019, table 1."""
    yield from conv(16, 3, 3)
    yield from norm(16)
    channels = 16
    for kernel, expanded, out, squeezes in MOBILENET_V3_LARGE:
        if expanded != channels:
            yield from conv(expanded, channels)
            yield from norm(expanded)
        yield from conv(expanded, expanded, kernel, groups=expanded)
        yield from norm(expanded)
        if squeezes:  # two 1 x 1 convolutions with biases
            squeezed = multiple_of_8(expanded / 4)
            yield from conv(squeezed, expanded)
            yield (squeezed,)
            yield from conv(expanded, squeezed)
            yield (expanded,)
        yield from conv(out, expanded)
        yield from norm(out)
        channels = out
    yield from conv(960, channels)
    yield from norm(960)
    yield from linear(1280, 960)
    yield from linear(1000, 1280)


def multiple_of_8(channels: float) -> int:
    """The nearest multiple of 8 that is no more than a tenth smaller."""
    nearest = int(channels + 4) // 8 * 8
    return nearest if nearest >= 0.9 * channels else nearest + 8


def transformer_layer(width: int) -> Iterator[Size]:
    """Norm, attention (query, key and value in one), projection, norm, and the two of the MLP."""
    yield from norm(width)
    yield from linear(3 * width, width)
    yield from linear(width, width)
    yield from norm(width)
    yield from linear(4 * width, width)
    yield from linear(width, 4 * width)


def vit_b_16() -> Iterator[Size]:
    """Dosovitskiy et al. 2020: ViT-Base with 16 x 16 patches of a 224 x 224 image."""
    yield (1, 1, 768)  # the class token
    yield from conv(768, 3, 16)
    yield (768,)
    yield (1, (224 // 16) ** 2 + 1, 768)
    for _ in range(12):
        yield from transformer_layer(768)
    yield from norm(768)
    yield from linear(1000, 768)


def gpt2() -> Iterator[Size]:
    """Radford et al. 2019, the smallest; the output shares the embedding's weight."""
    yield (50257, 768)
    yield (1024, 768)
    for _ in range(12):
        yield from transformer_layer(768)
    yield from norm(768)


def known(sizes: Callable[[], Iterator[Size]], tensors: int, elements: int) -> tuple[Size, ...]:
    """The sizes, after a look at their known counts."""
    shape = Shape(sizes.__name__, tuple(sizes()))
    found = (shape.tensors, shape.elements)
    if found != (tensors, elements):
        raise AssertionError(f"{shape.name} has {found}, not {(tensors, elements)}")
    return shape.sizes


GPT2 = known(gpt2, 148, 124_439_808)

SHAPES = {
    shape.name: shape
    for shape in (
        Shape("lesson", ((4, 3), (3,))),
        Shape("1000x16", ((16,),) * 1000),
        Shape("2000x64", ((64,),) * 2000),
        Shape("465-groups", ((4096,),) * 465, groups=(1,) * 465),
        Shape("mobilenet-v3", known(mobilenet_v3_large, 174, 5_483_032)),
        Shape("resnet-50", known(resnet50, 161, 25_557_032)),
        Shape("vit-b-16", known(vit_b_16, 152, 86_567_656)),
        Shape("gpt-2", GPT2),
        Shape("gpt-2-bf16", GPT2, torch.bfloat16),
    )
}
