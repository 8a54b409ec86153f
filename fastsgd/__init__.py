"""PyTorch's optimizers, whose step is one fast C++ call.

float32 and float64 get stock's numbers on the CPU, bit for bit but for square roots, which are the
nearest numbers here; what is of 16 bits is rounded once a step.
``fastsgd.SGD(model.parameters())`` stands where ``torch.optim.SGD(model.parameters())`` stood, and
nothing else in the program changes.
"""

from fastsgd import _check

_check.check()

# The check must come before anything that loads _C.
from fastsgd._norm import clip_grad_norm_  # noqa: E402
from fastsgd.adagrad import Adagrad  # noqa: E402
from fastsgd.adam import Adam, AdamW  # noqa: E402
from fastsgd.rmsprop import RMSprop  # noqa: E402
from fastsgd.sgd import SGD  # noqa: E402

__version__ = "0.1.0"
__all__ = [
    "SGD",
    "Adagrad",
    "Adam",
    "AdamW",
    "RMSprop",
    "__version__",
    "clip_grad_norm_",
    "cuda_available",
]


def cuda_available() -> bool:
    """Return whether this build holds CUDA kernels and torch finds a device to run them on.

    Without them CUDA parameters are stepped by torch's own code. ``python -m fastsgd info`` says
    why there are none.
    """
    import torch

    from fastsgd._build_info import CUDA_KERNELS

    return CUDA_KERNELS is not None and torch.cuda.is_available()
