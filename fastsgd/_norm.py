"""The total norm of gradients, wherever and however they are kept, and ``clip_grad_norm_``."""

from __future__ import annotations

import math
import types
import warnings
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._subclasses import FakeTensor
from torch.compiler import is_compiling

from fastsgd import _C


def total_norm(tensors: Sequence[Tensor], norm_type: float) -> Tensor:
    """Return the norm of order 2 or inf of all tensors together, in float64.

    Args:
        tensors: Of any class, dtype, layout and device; of distributed ones the shards of all
            processes count.
        norm_type: 2 or inf.

    Returns:
        A tensor without dimensions on the first one's device.
    """
    if not tensors:
        return torch.tensor(0.0, dtype=torch.float64, device="cpu")
    infinity = math.isinf(norm_type)
    parts: list[Tensor] = []
    left = list(tensors)
    for ready in (None, _plain):  # few need to be made ready
        if ready is not None:
            left = [ready(tensor, infinity) for tensor in left]
        norm, count, _, numbers = _C.norm_of(left, False, infinity)
        if count:
            parts.append(torch.tensor(norm, dtype=torch.float64, device="cpu"))
        left = [left[i] for i in numbers]
    shards: dict[Any, list[Tensor]] = {}
    for tensor in (tensor.detach() for tensor in left):
        if hasattr(tensor, "device_mesh"):
            mesh_and_dims, shard = _shard_of(tensor)
            shards.setdefault(mesh_and_dims, []).append(shard)
        else:
            parts.append(_norm(tensor, norm_type))
    for (mesh, dims), locals_here in shards.items():
        parts.append(_norm_over_mesh(total_norm(locals_here, norm_type), norm_type, mesh, dims))
    return _joined([part.to(tensors[0].device) for part in parts], norm_type)


def _shard_of(tensor: Any) -> tuple[tuple[Any, tuple[int, ...]], Tensor]:
    """Return a mesh with its dimensions over which a tensor is sharded, and the shard here."""
    if any(placement.is_partial() for placement in tensor.placements):
        whole = torch.distributed.tensor.Replicate()
        tensor = tensor.redistribute(
            placements=[whole if each.is_partial() else each for each in tensor.placements]
        )
    # Not by is_shard(), which FSDP2's shards of shards, those of tensor parallelism, deny.
    dims = tuple(i for i, each in enumerate(tensor.placements) if not each.is_replicate())
    return (tensor.device_mesh, dims), tensor.to_local()


def _joined(parts: list[Tensor], norm_type: float) -> Tensor:
    return parts[0] if len(parts) == 1 else _norm_of_values(torch.stack(parts), norm_type)


def _norm_of_values(values: Tensor, norm_type: float) -> Tensor:
    """Return the norm of a tensor's elements in float64, also where squares leave its range."""
    norm: Tensor = torch.linalg.vector_norm(values, norm_type, dtype=torch.float64)
    if math.isinf(norm_type) or values.dtype != torch.float64:
        return norm
    greatest = torch.linalg.vector_norm(values, math.inf)
    scale = greatest.clamp_min(torch.finfo(torch.float64).tiny)
    scaled = torch.linalg.vector_norm(values / scale, norm_type) * scale
    leaves = (greatest < 1e-140) | ((greatest > 1e140) & greatest.isfinite())
    return torch.where(leaves, scaled, norm)


def _magnitudes(values: Tensor) -> Tensor:
    """Return those of complex numbers, none of which overflows in float32."""
    return values.to(torch.complex128).abs()


def _plain(tensor: Tensor, infinity: bool) -> Tensor:
    """Return one with the same norm that the kernels can take, if it is torch's own on the CPU."""
    if type(tensor) not in (Tensor, torch.nn.Parameter) or tensor.device.type != "cpu":
        return tensor
    tensor = tensor.detach()
    if tensor.is_sparse:
        tensor = tensor.coalesce().values()
    if tensor.is_complex():
        tensor = _magnitudes(tensor) if infinity else torch.view_as_real(tensor.resolve_conj())
    return tensor.resolve_neg().contiguous()


def _norm(tensor: Tensor, norm_type: float) -> Tensor:
    if tensor.is_sparse:
        tensor = tensor.coalesce().values()
    if tensor.is_complex():
        tensor = _magnitudes(tensor)
    if tensor.numel() == 0:
        return torch.zeros((), dtype=torch.float64, device=tensor.device)
    return _norm_of_values(tensor, norm_type)


def _norm_over_mesh(norm: Tensor, norm_type: float, mesh: Any, dims: tuple[int, ...]) -> Tensor:
    """Join the norms of the shards that the processes along some dimensions of a mesh hold."""
    if norm.is_meta:
        return norm
    norm = norm.to(mesh.device_type)
    if math.isinf(norm_type):
        # The greatest of several may leave out a NaN, so that is told apart.
        found = torch.stack([norm.nan_to_num(0.0, torch.inf), norm.isnan().to(norm.dtype)])
        _reduce(found, torch.distributed.ReduceOp.MAX, mesh, dims)
        greatest, any_nan = found.unbind()
        return greatest.masked_fill(any_nan > 0, torch.nan)
    # Scaled by powers of 2 as well, for where squares leave the range of float64.
    scales = torch.tensor([1.0, 2.0**-600, 2.0**600], dtype=norm.dtype, device=norm.device)
    squares = (norm * scales).square()
    _reduce(squares, torch.distributed.ReduceOp.SUM, mesh, dims)
    as_is, down, up = squares.sqrt() / scales
    small = squares[0] < 2.0**-900
    return torch.where(squares[0].isinf(), down, torch.where(small, up, as_is))


def _reduce(values: Tensor, how: Any, mesh: Any, dims: tuple[int, ...]) -> None:
    for dim in dims:
        torch.distributed.all_reduce(values, how, group=mesh.get_group(dim))


def _is_finite(tensor: Tensor) -> bool:
    values = tensor.coalesce().values() if tensor.is_sparse else tensor
    return bool(values.isfinite().all())


class Found:
    """The norm of the gradients of parameters, of those that kernels can take found already.

    Attributes:
        value: That norm, and ``count``, of how many.
        left: Numbers of the parameters whose gradients are still to be looked at, or are None;
            ``others`` are the gradients.
        dtype: What the norm of all has: float64 where any gradient is, else float32, for halves
            too.
    """

    def __init__(self, params: list[Tensor], norm_type: float) -> None:
        """Look at the gradients."""
        self.params = params
        self.norm_type = norm_type
        found = _C.norm_of(params, True, math.isinf(norm_type))
        self.value, self.count, any_double, self.left = found
        self.others = [grad for i in self.left if (grad := params[i].grad) is not None]
        doubles = (torch.float64, torch.complex128)
        any_double = any_double or any(grad.dtype in doubles for grad in self.others)
        self.dtype = torch.float64 if any_double else torch.float32

    def norm(self) -> Tensor:
        """Return the norm of all in float64, on the first one's device."""
        if not self.others:
            return torch.tensor(self.value, dtype=torch.float64, device="cpu")
        parts = [total_norm(self.others, self.norm_type)]
        if self.count:
            parts.insert(0, torch.tensor(self.value, dtype=torch.float64, device="cpu"))
        first = next(param.grad for param in self.params if param.grad is not None)
        return _joined([part.to(first.device) for part in parts], self.norm_type)

    def is_finite(self) -> bool:
        """Whether all elements are, though their squares may not be."""
        return math.isfinite(self.value) and all(_is_finite(grad) for grad in self.others)

    def is_unknown(self, norm: Tensor) -> bool:
        """Whether their norm has no value: they are on meta, or a mode makes it a fake tensor."""
        all_meta = norm.is_meta and not self.count and all(grad.is_meta for grad in self.others)
        return all_meta or isinstance(norm, FakeTensor)


def clip_factor(norm: Tensor, max_norm: float) -> Tensor:
    """Return what gradients of a norm are multiplied by, as torch computes it."""
    return torch.clamp(max_norm / (norm + 1e-6), max=1.0)


def raise_if_nonfinite(norm: Tensor, norm_type: float) -> None:
    """Raise torch's error where a norm is an infinity or a NaN."""
    if not torch.isfinite(norm):
        raise RuntimeError(
            f"The total norm of order {norm_type} for gradients from `parameters` is non-finite, "
            "so it cannot be clipped. To disable this error and scale the gradients by the "
            "non-finite norm anyway, set `error_if_nonfinite=False`"
        )


def clip_grad_norm_(
    parameters: Tensor | Iterable[Tensor],
    max_norm: float,
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
    foreach: bool | None = None,
) -> Tensor:
    r"""Scale gradients in place so that their norm is at most ``max_norm``.

    :func:`torch.nn.utils.clip_grad_norm_` in one call, for loops that clip by themselves. Each
    gradient is multiplied by :math:`\min(1, \text{max\_norm} / (\text{norm} + 10^{-6}))`.
    Optimizers of fastsgd do the same within their step (``max_grad_norm``), without writing the
    gradients.

    Args:
        parameters: The tensors whose gradients are clipped, or one.
        max_norm: Greatest norm of all gradients together.
        norm_type: Order of the norm. Other orders than 2 and inf are left to torch, as all are in a
            function that is being compiled.
        error_if_nonfinite: Raise if the norm is an infinity or a NaN, before anything is written.
        foreach: Accepted as by torch; every value means the same.

    Returns:
        The norm before clipping, a tensor without dimensions on the first gradient's device. It is
        float64 if any gradient is, else float32, for gradients of 16 bits too, whose own dtype
        holds a norm badly; the nearest number to the exact norm, or next to it, and the same for
        any number of threads and any order of the parameters. (Where float64 gradients are among
        others, those others' squares are added up in float64: it is within 3e-14 of the exact one.)

    Raises:
        RuntimeError: If the norm is not finite and ``error_if_nonfinite`` is set.

    Example:
        >>> loss_fn(model(input), target).backward()
        >>> norm = fastsgd.clip_grad_norm_(model.parameters(), max_norm=1.0)

    Source: :func:`torch.nn.utils.clip_grad_norm_`.
    """
    norm_type = float(norm_type)
    max_norm = float(max_norm)
    if norm_type not in (2.0, math.inf) or is_compiling():
        return torch.nn.utils.clip_grad_norm_(
            parameters, max_norm, norm_type, error_if_nonfinite, foreach
        )
    params = parameters
    if not isinstance(params, list):
        params = [parameters] if isinstance(parameters, Tensor) else list(parameters)
        if not params and isinstance(parameters, types.GeneratorType):
            warnings.warn(
                "`parameters` is an empty generator, no gradient clipping will occur.",
                stacklevel=2,
            )
    infinity = math.isinf(norm_type)
    found = Found(params, norm_type)
    others = found.others
    if not others:
        value = found.value
        norm = torch.scalar_tensor(value, dtype=found.dtype, device="cpu")
        if error_if_nonfinite:
            raise_if_nonfinite(norm, norm_type)
        clipped_by = _C.clip_factor(value, found.dtype == torch.float64, max_norm)
        if clipped_by != 1:
            _scale(params, found.left, clipped_by)
        return norm
    if not found.count:
        there = _C.clip_there(params, max_norm, infinity, error_if_nonfinite)
        if there is not None:
            if error_if_nonfinite:  # then nothing was written
                raise_if_nonfinite(there, norm_type)
            return there
    if any(grad.layout != torch.strided for grad in others):  # which torch refuses
        return torch.nn.utils.clip_grad_norm_(params, max_norm, norm_type, error_if_nonfinite)
    with torch.no_grad():
        norm = found.norm().to(found.dtype)
        if error_if_nonfinite:
            raise_if_nonfinite(norm, norm_type)
        factor = clip_factor(norm, max_norm)
        if found.count:
            _scale(params, found.left, factor.item())
        for grad in others:
            # A part of a distributed one, whatever it is of, is multiplied as the whole is.
            part = grad.to_local() if hasattr(grad, "to_local") else grad
            part.mul_(factor.to(part.device))
    return norm


@torch.no_grad()
def _scale(params: list[Tensor], but: list[int], factor: float) -> None:
    """Multiply gradients by a factor, but those of some numbers."""
    for i in set(_C.scale(params, True, factor)).difference(but):
        grad = params[i].grad
        if grad is not None:
            grad.mul_(factor)
