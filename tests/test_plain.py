"""Which tensors the kernels take without a closer look."""

from __future__ import annotations

import ctypes

import pytest
import torch
from cases import DTYPES
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import Parameter

from fastsgd import _C

# Shapes whose contiguous layout may be channels-last too, and shapes whose may not.
SHAPES = [
    (),
    (1,),
    (0,),
    (7,),
    (3, 5),
    (2, 3, 4),
    (2, 3, 4, 5),
    (2, 1, 4, 5),
    (2, 3, 1, 1),
    (1, 3, 1, 1),
    (1, 1, 1, 1),
    (2, 3, 4, 5, 6),
    (2, 1, 4, 5, 6),
    (2, 3, 1, 1, 1),
    (1, 1, 1, 1, 1),
    (1, 2, 1, 2, 1, 2, 1),
]


def fill_free_memory(byte: int) -> None:
    """Leave ``byte`` in free memory of the sizes that tensors are made of."""
    libc = ctypes.CDLL(None)
    libc.malloc.restype = ctypes.c_void_p
    libc.free.argtypes = [ctypes.c_void_p]
    blocks = [(libc.malloc(size), size) for size in range(160, 320, 16) for _ in range(200)]
    for block, size in blocks:
        ctypes.memset(block, byte, size)
    for block, _ in blocks:
        libc.free(block)


@pytest.mark.parametrize("byte", [0x00, 0xFF, 0xA5])
def test_whatever_memory_it_was_made_in(byte: int) -> None:
    """A tensor has bits that nothing writes; they say nothing."""
    fill_free_memory(byte)
    made = [torch.ones(5) for _ in range(100)]
    assert all(map(_C.is_plain, made))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_plain(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    base = torch.ones(shape, dtype=dtype)
    for tensor in (
        base,
        Parameter(base),
        base.detach(),
        base.clone(),
        Parameter(base).data,
        torch.ones(1000, dtype=dtype)[3 : 3 + base.numel()].view(shape),
        base.clone().requires_grad_() * 2,
    ):
        assert tensor.is_contiguous()
        assert _C.is_plain(tensor)


PERMUTED = {
    "transposed": lambda: torch.ones(3, 5).t(),
    "rolled": lambda: torch.ones(2, 3, 5).permute(1, 2, 0),
    "channels_last": lambda: torch.ones(2, 3, 4, 5).to(memory_format=torch.channels_last),
    "channels_last_1x1": lambda: torch.ones(2, 3, 1, 5).to(memory_format=torch.channels_last),
    "channels_last_3d": lambda: torch.ones(1, 2, 3, 4, 5).to(memory_format=torch.channels_last_3d),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("make", PERMUTED.values(), ids=PERMUTED)
def test_permuted(make, dtype: torch.dtype) -> None:
    """Dense in another order of dimensions than the usual one."""
    tensor = make().to(dtype)
    assert not tensor.is_contiguous()
    assert _C.is_plain(tensor)


class Subclass(Tensor):
    """A tensor whose operators are Python code."""

    @staticmethod
    def __new__(cls, data: Tensor) -> Subclass:
        """Wrap the shape of ``data``."""
        return Tensor._make_wrapper_subclass(cls, data.shape, dtype=data.dtype)

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        """Do nothing of what is asked."""
        raise NotImplementedError(func)


def fake() -> Tensor:
    with FakeTensorMode():
        return torch.ones(3, 5)


def inference() -> Tensor:
    with torch.inference_mode():
        return torch.ones(3, 5)


NOT_PLAIN = {
    "sliced": lambda: torch.ones(3, 5)[:, :2],
    "expanded": lambda: torch.ones(3, 1).expand(3, 5),
    "int": lambda: torch.ones(3, 5, dtype=torch.int32),
    "bool": lambda: torch.ones(3, 5, dtype=torch.bool),
    "complex": lambda: torch.ones(3, 5, dtype=torch.complex64),
    "float8": lambda: torch.ones(3, 5).to(torch.float8_e4m3fn),
    "negated": lambda: torch._neg_view(torch.ones(3, 5)),
    "conjugated": lambda: torch.ones(3, 5, dtype=torch.complex64).conj(),
    "sparse": lambda: torch.ones(3, 5).to_sparse(),
    "csr": lambda: torch.ones(3, 5).to_sparse_csr(),
    "meta": lambda: torch.ones(3, 5, device="meta"),
    "mkldnn": lambda: torch.ones(3, 5).to_mkldnn(),
    "nested": lambda: torch.nested.nested_tensor([torch.ones(3), torch.ones(5)]),
    "quantized": lambda: torch.quantize_per_tensor(torch.ones(3, 5), 0.1, 0, torch.qint8),
    "subclass": lambda: Subclass(torch.ones(3, 5)),
    "fake": fake,
    "inference": inference,
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("make", NOT_PLAIN.values(), ids=NOT_PLAIN)
def test_not_plain(make) -> None:
    assert not _C.is_plain(make())


def test_learned_before_any_mode() -> None:
    """What is plain is learned at import, whatever mode that is in."""
    import subprocess
    import sys

    code = """if True:
        import torch
        from torch._subclasses.fake_tensor import FakeTensorMode
        with FakeTensorMode(), torch.inference_mode(), torch.device("meta"):
            import fastsgd
        from fastsgd import _C
        assert _C.is_plain(torch.ones(3, 5))
        with torch.inference_mode():
            assert not _C.is_plain(torch.ones(3, 5))
    """
    subprocess.run([sys.executable, "-c", code], check=True)
