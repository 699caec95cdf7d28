"""States in 8 bits: a code for each element, and for each block of 256 of them a scale in float32.

A state with a sign is int8: an element is ``code * scale``, codes from -127 to 127. One that is never negative is
uint8: its root is ``code * scale``, codes from 0 to 255; the root is what a step divides by.

The codes lie in memory as the parameter's elements do where these lie side by side, else row by row, and blocks are
counted there, from the first code on: of a DTensor, from the first that a process holds. csrc/maths/codes.h has the
same functions, with the same bits.

The idea is that of Dettmers, Lewis, Shleifer and Zettlemoyer, "8-bit Optimizers via Block-wise Quantization",
https://arxiv.org/abs/2110.02861.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from .memory import has_layout_of, is_dtensor, local, memory_order

BLOCK = 256
LINEAR, ROOTS = torch.int8, torch.uint8
DTYPES = (LINEAR, ROOTS)
_LARGEST = {LINEAR: 127, ROOTS: 255}

# Below, a block's elements are zeros, or, of roots, the smallest that there is: its square is a normal number, and so
# is what is divided by a scale.
_SMALLEST_SCALE = {LINEAR: 2.0**-100, ROOTS: 2.0**-63}
# A scale has so few digits that its products with codes are exact: what is decoded, encoded and decoded is the same.
_SCALE_BITS = -0x100
_ONE = 1 << 23  # a code, in fixed point


def scale_name(name: str) -> str:
    """Of what stands beside a state in a parameter's dict."""
    return f"{name}_scale"


def codes_name(name: str) -> str:
    """Of codes in a native state dict: no optimizer of torch takes them for numbers."""
    return f"{name}_codes"


def are_codes(tensor: Any) -> bool:
    return isinstance(tensor, Tensor) and tensor.dtype in DTYPES


def scale_count(codes: Tensor) -> int:
    return -(-local(codes).numel() // BLOCK)


def make_codes(param: Tensor, dtype: torch.dtype, initial: float = 0.0) -> tuple[Tensor, Tensor]:
    """The codes and scales of a state of ``param``'s shape that is ``initial`` everywhere."""
    own = local(param)
    layout = torch.preserve_format if memory_order(own) is not None else torch.contiguous_format
    codes = torch.zeros_like(param, dtype=dtype, memory_format=layout, requires_grad=False)
    scales = torch.zeros(scale_count(codes), dtype=torch.float32, device=own.device)
    if initial != 0:
        encode(codes, scales, torch.full_like(local(codes), initial, dtype=torch.float32))
    return codes, scales


def are_laid_out_for(param: Tensor, codes: Tensor) -> bool:
    """Whether the kernels find the codes of ``param``'s elements where its elements are."""
    param, codes = local(param), local(codes)
    return has_layout_of(param, codes) if memory_order(param) is not None else codes.is_contiguous()


def _in_order_of(codes: Tensor, x: Tensor) -> Tensor:
    """The elements of ``x`` as those of ``codes`` follow each other in memory, zeros behind them to fill a block."""
    padded = torch.zeros(scale_count(codes) * BLOCK, dtype=x.dtype, device=x.device)
    padded.as_strided(codes.shape, codes.stride()).copy_(x)
    return padded.view(-1, BLOCK)


def encode(codes: Tensor, scales: Tensor, x: Tensor, random: Tensor | None = None) -> None:
    """Writes numbers as codes and scales.

    Zeros stay zeros. Where a number of a block is not finite, or negative where roots are stored, the whole block is
    NaN. A number above zero whose root is stored stays above zero, as a step divides by it.

    Args:
        x: of the codes' shape; float64 is first rounded to float32.
        random: 16 bits for each element, as ``rounding.random_bits`` gives them, by which a code is rounded up or down.
            None: to the nearest.
    """
    codes, x = local(codes), local(x)
    numbers = _in_order_of(codes, x.float())
    if codes.dtype == ROOTS:
        numbers = numbers.sqrt()
    most = _LARGEST[codes.dtype]
    largest = numbers.abs().amax(1) if len(numbers) else scales
    exact = ((largest / most).view(torch.int32) & _SCALE_BITS).view(torch.float32)
    scale = exact.clamp(min=_SMALLEST_SCALE[codes.dtype])
    is_finite = largest.isfinite()
    scales.copy_(torch.where(is_finite, torch.where(largest == 0, 0.0, scale), torch.nan))
    scale = torch.where(is_finite, scale, 1.0)[:, None]
    numbers = torch.where(is_finite[:, None], numbers, 0.0)
    if random is None:
        fixed, up = numbers * (float(_ONE) / scale), torch.tensor(_ONE // 2, dtype=torch.int32, device=x.device)
    else:
        fixed = (numbers / scale).clamp(-most, most) * float(_ONE)
        up = _in_order_of(codes, (random * 128 + 64).to(torch.int32))
    if codes.dtype == ROOTS:
        fixed = torch.where(numbers > 0, fixed.clamp(min=float(_ONE)), fixed)
    found = (fixed.to(torch.int32) + up) >> 23
    codes.copy_(found.view(-1).as_strided(codes.shape, codes.stride()))


def decode(codes: Tensor, scales: Tensor) -> Tensor:
    """The numbers that codes and scales stand for: float32, laid out, and spread over processes, as the codes are."""
    own = local(codes)
    numbers = _in_order_of(own, own.float()) * scales[:, None]
    if own.dtype == ROOTS:
        numbers = numbers.square()
    decoded = torch.empty_like(own, dtype=torch.float32)
    decoded.copy_(numbers.view(-1).as_strided(own.shape, own.stride()))
    if not is_dtensor(codes):
        return decoded
    from torch.distributed.tensor import DTensor

    return DTensor.from_local(
        decoded,
        codes.device_mesh,  # type: ignore[attr-defined]
        codes.placements,  # type: ignore[attr-defined]
        run_check=False,
        shape=codes.shape,
        stride=codes.stride(),
    )


def decoded(own: dict[str, Any]) -> dict[str, Any]:
    """A parameter's state with numbers in place of codes and scales; itself where it has none."""
    coded = [name for name, value in own.items() if are_codes(value)]
    scales = [scale_name(name) for name in coded]
    numbers = {name: decode(own[name], own[scale_name(name)]) for name in coded}
    return {name: numbers.get(name, value) for name, value in own.items() if name not in scales} if coded else own


def as_saved(own: dict[str, Any]) -> dict[str, Any]:
    """A parameter's state as a native state dict has it; itself where it has no codes.

    Raises:
        ValueError: codes of a DTensor, whose blocks are each process's own.
    """
    coded = [name for name, value in own.items() if are_codes(value)]
    if any(is_dtensor(own[name]) for name in coded):
        raise ValueError("Invalid native value: True with states of DTensors in 8 bits (allowed: False)")
    return {codes_name(name) if name in coded else name: value for name, value in own.items()} if coded else own


def as_loaded(own: dict[str, Any], names: Iterable[str]) -> dict[str, Any]:
    """The same back from there, where it is native.

    Raises:
        ValueError: codes without their scales.
    """
    found = dict(own)
    for name in names:
        if codes_name(name) in found:
            found[name] = found.pop(codes_name(name))
            check_codes(name, found[name], found.get(scale_name(name)))
    return found


def check_codes(name: str, codes: Any, scales: Any) -> None:
    """Raises ValueError where a state in 8 bits is not whole."""
    if (
        not are_codes(codes)
        or not isinstance(scales, Tensor)
        or (scales.dtype, scales.shape) != (torch.float32, (scale_count(codes),))
        or not scales.is_contiguous()
        or memory_order(local(codes)) is None
    ):
        raise ValueError(
            f"Invalid state {name!r}: its codes do not come with their scales (allowed: dense int8 or uint8, and "
            f"{scale_name(name)!r} in float32, one for each {BLOCK} codes)"
        )


def put(own: dict[str, Any], name: str, value: Tensor, param: Tensor, dtype: torch.dtype | None) -> None:
    """Stores a state, numbers or codes, in a dtype; one of ``DTYPES`` means codes.

    Codes that are laid out for ``param`` stay as they are, others are decoded first, and encoded to the nearest. None
    keeps numbers as they are, and codes codes.
    """
    scales = own.get(scale_name(name))
    if are_codes(value):
        dtype = value.dtype if dtype is None else dtype
        if dtype == value.dtype and are_laid_out_for(param, value):
            return
        value = decode(value, scales)  # type: ignore[arg-type]
    own.pop(scale_name(name), None)
    if dtype not in DTYPES:
        own[name] = value if dtype is None else value.to(dtype)
        return
    codes, scales = make_codes(param, dtype)
    encode(codes, scales, value.detach())
    own[name], own[scale_name(name)] = codes, scales
