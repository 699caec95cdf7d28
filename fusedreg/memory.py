"""What memory a tensor has in this process: a DTensor's own part, and gradients that keep their numbers elsewhere."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def _dtensor() -> Any:
    # Whoever holds one has imported it; the import costs a second.
    module = sys.modules.get("torch.distributed.tensor")
    return None if module is None else module.DTensor


def is_dtensor(tensor: Tensor) -> bool:
    cls = _dtensor()
    return cls is not None and isinstance(tensor, cls)


def local(tensor: Any) -> Tensor:
    """The part of a DTensor that this process holds; any other tensor itself."""
    return tensor._local_tensor if is_dtensor(tensor) else tensor


def offsets_of(tensor: Any) -> tuple[int, ...]:
    """Where the part of a tensor that this process holds begins, in each dimension."""
    if not is_dtensor(tensor):
        return (0,) * tensor.ndim
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    _, offsets = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    return tuple(offsets)


def is_plain(tensor: Tensor) -> bool:
    """Whether a tensor's numbers are in memory of its own, where a kernel can read them."""
    return (
        tensor.layout == torch.strided
        and type(tensor).__torch_dispatch__ is Tensor.__torch_dispatch__
        and not tensor._is_zerotensor()
    )


def has_layout_of(param: Tensor, other: Tensor) -> bool:
    """Whether a tensor of the same shape has its elements in the same order. The stride of a size of 1 says nothing."""
    strides = zip(param.shape, param.stride(), other.stride(), strict=True)
    return all(size == 1 or ours == theirs for size, ours, theirs in strides)


def memory_order(tensor: Tensor) -> list[int] | None:
    """A dense tensor's dimensions of more than one element, the outermost in memory first; None if it is not dense."""
    dims = [dim for dim in range(tensor.ndim) if tensor.shape[dim] > 1]
    dims.sort(key=tensor.stride, reverse=True)
    extent = 1
    for dim in reversed(dims):
        if tensor.stride(dim) != extent:
            return None
        extent *= tensor.shape[dim]
    return dims


def copy_of(tensor: Tensor, like: Tensor | None = None) -> Tensor:
    """One that is laid out as ``like``, or contiguous, for kernels that a tensor is not laid out for."""
    if like is not None:
        return torch.empty_like(like, dtype=tensor.dtype, requires_grad=False).copy_(tensor.detach())
    return torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device).copy_(tensor.detach())


@functools.cache
def widest(device: torch.device) -> torch.dtype:
    """float64, or float32 on a device that has no other: Apple's MPS, some of Intel's."""
    if device.type in ("cpu", "cuda"):
        return torch.float64
    try:
        torch.zeros((), dtype=torch.float64, device=device).add_(1)
    except (TypeError, RuntimeError):
        return torch.float32
    return torch.float64


def has_freed_memory(tensor: Tensor) -> bool:
    return tensor.numel() > 0 and tensor.device.type != "meta" and is_plain(tensor) and tensor.data_ptr() == 0


def needs_reading(param: Tensor) -> bool:
    """Whether ``param.grad`` must go through ``read_gradient`` before a kernel can take it."""
    return is_dtensor(param) or not (param.grad is None or is_plain(param.grad) or type(param.grad) is type(param))


def read_gradient(param: Any) -> Tensor | None:
    """``param.grad`` as plain memory, laid out over processes as ``param`` is; ``param.grad`` itself stays as it is.

    A gradient that is laid out otherwise (each process holds a summand, or all of it) is redistributed: that is a
    collective. One that is still on its way is waited for.

    Raises:
        ValueError: only one of the two is a DTensor, or they are on different meshes.
        RuntimeError: a subclass of Tensor that cannot be copied to plain memory, or not all of it.
    """
    grad = param.grad
    if grad is None:
        return None
    if type(param) is type(grad) is _dtensor():
        ours, theirs = param._spec, grad._spec
        if theirs is not ours:
            if theirs.mesh is not ours.mesh and theirs.mesh != ours.mesh:
                raise ValueError(f"Invalid gradient: its mesh is {theirs.mesh}, its parameter's {ours.mesh}")
            if theirs.placements != ours.placements:
                with torch.no_grad():
                    grad = grad.redistribute(placements=ours.placements)
        grad = grad._local_tensor
        if type(grad) is Tensor:  # the most common case: microseconds count
            return grad
    elif is_dtensor(param) or is_dtensor(grad):
        kinds = [type(each).__name__ for each in (grad, param)]
        raise ValueError(f"Invalid gradient: it is a {kinds[0]}, its parameter a {kinds[1]} (allowed: the same)")
    if hasattr(grad, "trigger_wait"):  # the result of a collective that is under way
        grad = grad.trigger_wait()
    if grad.layout != torch.strided or is_plain(grad) or type(grad) is type(local(param)):
        return grad
    return _copy_to_memory(grad, local(param))


@torch.no_grad()
def _copy_to_memory(grad: Tensor, like: Tensor) -> Tensor:
    if isinstance(grad, torch.masked.MaskedTensor):
        raise RuntimeError("a gradient is a MaskedTensor, and says nothing of some elements (allowed: to_tensor(0))")
    # Into zeros and into ones, to see whether the subclass writes every element.
    plain, again = (torch.full_like(like, fill, requires_grad=False) for fill in (0, 1))
    try:
        plain.copy_(grad)
        again.copy_(grad)
    except Exception as error:
        raise RuntimeError(
            f"a gradient is a {type(grad).__name__}, which has no plain memory to read: {error}"
        ) from error
    if (plain.eq(0) & again.eq(1)).any():
        raise RuntimeError(f"a gradient is a {type(grad).__name__}, which has no plain memory to read")
    return plain


def rejection_of_memory(
    param: Tensor,
    states: list[Tensor],
    state_dtype: torch.dtype | None,
    grad_dtype: torch.dtype | None,
    device_type: str,
    dtypes: tuple[torch.dtype, ...],
    state_dtypes: Callable[[torch.dtype], tuple[torch.dtype, ...]] = lambda dtype: (dtype,),
) -> str | None:
    """Why a backend that works on plain memory of ``device_type`` cannot take a parameter, or None.

    Args:
        state_dtype: as in ``Backend.rejection``.
        grad_dtype: likewise.
        state_dtypes: those that a state, or a gradient, may have, by the dtype of its parameter.
    """
    if param.device.type != device_type:
        return f"it runs on {device_type.upper()} parameters, and one is on {param.device}"
    if param.dtype not in dtypes:
        return f"it has no kernel for {param.dtype} parameters"
    for tensor in map(local, (param, *states)):
        if not is_plain(tensor):
            return f"it needs plain memory, and a tensor is a {type(tensor).__name__} of layout {tensor.layout}"
    allowed = state_dtypes(param.dtype)
    if state_dtype is not None and state_dtype not in allowed:
        return (
            f"beside {param.dtype} parameters it takes states of {' or '.join(map(str, allowed))}, and state_dtype is "
            f"{state_dtype}"
        )
    if grad_dtype is not None and grad_dtype not in allowed:
        kinds = " or ".join(str(each) for each in allowed if each.is_floating_point or each.is_complex)
        return f"beside {param.dtype} parameters it takes gradients of {kinds}, and one is {grad_dtype}"
    for state in states:
        is_of_dtype = state_dtype is not None or state.dtype in allowed
        if not is_of_dtype or state.shape != param.shape or state.device != param.device:
            return (
                f"it needs state of the parameter's shape and device, and {' or '.join(map(str, allowed))}, and one is "
                f"{state.dtype} of {tuple(state.shape)} on {state.device} beside {param.dtype} of "
                f"{tuple(param.shape)} on {param.device}"
            )
        if is_dtensor(state) != is_dtensor(param) or local(state).shape != local(param).shape:
            return "it needs state that is laid out over processes as its parameter is"
    return None
