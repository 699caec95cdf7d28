"""What is refused before a step changes anything."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor

from ..flat_parameters import is_flat
from ..memory import has_freed_memory, is_dtensor, local
from ..penalties.units import count_units
from ..rounding import are_rounded

# Steps on parameters of these are in float32, which holds gradients of all of them.
NARROW = (torch.float32, torch.bfloat16, torch.float16)


def memory_extent(tensor: Tensor) -> int:
    """How many elements lie between a tensor's first and last, both included."""
    return 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))


def overlaps_itself(tensor: Tensor) -> bool:
    """Whether two of a tensor's elements share memory, as those of an expanded tensor do."""
    if tensor.numel() == 0:
        return False
    dims = sorted((stride, size) for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if size > 1)
    extent = 1
    for stride, size in dims:
        if stride < extent:
            break
        extent += (size - 1) * stride
    else:
        return False
    if any(stride == 0 for stride, _ in dims):
        return True
    # Strides that interleave need not overlap: count.
    offsets = torch.zeros(1, dtype=torch.int64, device="cpu")
    for stride, size in dims:
        offsets = (offsets[:, None] + torch.arange(size, device="cpu") * stride).flatten()
    return offsets.unique().numel() != offsets.numel()


def check_states(param: Tensor, states: list[Tensor], scalar_states: list[Tensor]) -> None:
    """Raises if ``param`` cannot be stepped with the state that it has, before anything has changed."""
    for state in states:
        if state.shape != param.shape:
            raise ValueError(
                f"Invalid state: its shape is {tuple(state.shape)}, its parameter's {tuple(param.shape)} "
                "(allowed: the same)"
            )
    written = (param, *states, *scalar_states)
    if not torch.is_inference_mode_enabled() and any(tensor.is_inference() for tensor in written):
        raise RuntimeError("Inplace update to inference tensor outside InferenceMode is not allowed")


def check_gradient(param: Tensor, grad: Tensor, optimizer: str, group: int) -> None:
    """Raises if a step cannot be taken on ``param``, before anything has changed.

    Args:
        grad: ``param.grad``, or what was read of it (memory.py).
        optimizer: its name, for errors.
        group: the index of the parameter's group, for errors.
    """
    if not (param.is_floating_point() or param.is_complex()):
        raise ValueError(f"Invalid parameter: its dtype is {param.dtype} (allowed: floating point and complex)")
    if grad.layout != torch.strided:
        raise RuntimeError(
            f"{optimizer} does not support sparse gradients, and in param group {group} one of shape "
            f"{tuple(grad.shape)} has layout {grad.layout} (allowed: nn.Embedding(sparse=False), or "
            "torch.optim.SparseAdam for this parameter)"
        )
    param = local(param)
    for what in ("device", "dtype", "shape"):
        ours, theirs = getattr(param, what), getattr(grad, what)
        is_narrow = what == "dtype" and ours in NARROW
        if ours != theirs and not (is_narrow and theirs in NARROW):
            allowed = " or ".join(map(str, NARROW)) if is_narrow else "the same"
            raise ValueError(f"Invalid gradient: its {what} is {theirs}, its parameter's {ours} (allowed: {allowed})")
    for name, tensor in (("parameter", param), ("gradient", grad)):
        if has_freed_memory(tensor):
            raise ValueError(f"Invalid {name}: its memory was freed, its shape is {tuple(tensor.shape)}")
    if overlaps_itself(param):
        raise ValueError(
            f"Invalid parameter: elements of it share memory, shape {tuple(param.shape)}, strides {param.stride()} "
            "(allowed: one place in memory for each element; use .contiguous())"
        )


def check_units(params: list[Any], unit: str | int) -> None:
    """Raises ValueError where a parameter has no such units, or this process does not hold them whole."""
    for param in params:
        count_units(tuple(param.shape), unit, "unit", f"a parameter of shape {tuple(param.shape)}")
        shards = [each.dim for each in param.placements if each.is_shard()] if is_dtensor(param) else []
        whole_along = {"rows": [0], "columns": [1]}.get(str(unit), [])
        if is_flat(param) or not all(dim in whole_along for dim in shards):
            raise ValueError(
                f"Invalid unit value: {unit!r} for a parameter whose units are spread over processes (allowed: 'rows' "
                "of DTensors that are sharded along dimension 0, as fully_shard's, or 'columns' along dimension 1)"
            )


def check_codes_of(param: Tensor) -> None:
    """Raises ValueError where torch's checkpoints would not know what to do with states in 8 bits."""
    if is_flat(param):
        raise ValueError(
            "Invalid state_dtype value: torch.int8 for parameters of FullyShardedDataParallel, whose flat checkpoints "
            "ask for scales that they do not have (allowed: another dtype, or torch.distributed.fsdp.fully_shard)"
        )


def check_rounding(param: Tensor, dtypes: set[torch.dtype], differentiable: bool) -> None:
    """Raises where stochastic rounding cannot do what it says.

    Args:
        dtypes: of the parameter, and of its states.
    """
    if differentiable:
        raise RuntimeError("differentiable=True does not work with stochastic_rounding")
    if torch.float16 in dtypes:
        raise ValueError(
            "Invalid stochastic_rounding value: True beside a state in torch.float16 (allowed: False; it rounds to "
            "bfloat16)"
        )
    if are_rounded(dtypes) and is_flat(param):
        raise ValueError(
            "Invalid stochastic_rounding value: True for parameters of FullyShardedDataParallel, which are flat: each "
            "rank would round by another number of each element (allowed: False, or torch.distributed.fsdp.fully_shard)"
        )


def check_rounding_in_graphs(optimizer: str) -> None:
    """Raises if a CUDA graph is being captured: each of its replays would round by the same bits."""
    if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            f"{optimizer} cannot be captured into a CUDA graph with stochastic_rounding (allowed: False)"
        )


def check_graph_capture(optimizer: str) -> None:
    """Raises if a CUDA graph is being captured: its replays would not move step counts that the host keeps."""
    if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            f"{optimizer} cannot be captured into a CUDA graph with its step counts on the CPU, where a replay does "
            "not move them (allowed: fused=True, which keeps them on the GPU)"
        )


def parameters_that_share_memory(params: list[Tensor]) -> list[tuple[Tensor, Tensor]]:
    """Pairs of parameters whose ranges of memory intersect."""
    spans = []
    for param in params:
        memory = local(param)
        if memory.numel() > 0:
            begin = memory.data_ptr()
            spans.append((begin, begin + memory_extent(memory) * memory.element_size(), param))
    spans.sort(key=operator.itemgetter(0, 1))
    found = []
    farthest_end, its_param = 0, None
    for begin, end, param in spans:
        if begin < farthest_end and its_param is not None:
            found.append((its_param, param))
        if end > farthest_end:
            farthest_end, its_param = end, param
    return found


def parameters_that_share_a_scalar(scalars: list[tuple[Tensor, Tensor]]) -> list[tuple[Tensor, Tensor]]:
    """Pairs of parameters that have the same memory for a scalar state, out of (parameter, scalar state)."""
    owner: dict[int, Tensor] = {}
    found = []
    for param, scalar in scalars:
        first = owner.setdefault(scalar.data_ptr(), param)
        if first is not param:
            found.append((first, param))
    return found
