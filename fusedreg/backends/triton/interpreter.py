"""Triton's interpreter, which runs the kernels' own code with numpy on CPU parameters.

Triton looks for TRITON_INTERPRET in the environment when a kernel is defined.
"""

from __future__ import annotations

from typing import Any

import torch
import triton.language as tl
from triton.runtime import interpreter

from . import kernels


def has_the_kernels() -> bool:
    return isinstance(kernels.update_kernel, interpreter.InterpretedFunction)


def correct_the_interpreter() -> None:
    """Where it does what no device does: it rounds bfloat16 otherwise, and knows less of numpy than there is now."""
    cast = interpreter.InterpreterBuilder.cast_impl
    if getattr(cast, "rounds_to_nearest", False):
        return

    # It cuts float32 off to bfloat16, where devices round to the nearest, and misreads subnormal bfloat16.
    def cast_impl(self: Any, src: Any, dst_type: Any) -> Any:
        if src.dtype.scalar == tl.float32 and dst_type.scalar == tl.bfloat16:
            rounded = torch.from_numpy(src.data).to(torch.bfloat16).view(torch.uint16).numpy()
            return interpreter.TensorHandle(rounded, dst_type.scalar)
        if src.dtype.scalar == tl.bfloat16 and dst_type.scalar == tl.float32:
            read = torch.from_numpy(src.data.view("int16")).view(torch.bfloat16).float().numpy()
            return interpreter.TensorHandle(read, dst_type.scalar)
        return cast(self, src, dst_type)

    cast_impl.rounds_to_nearest = True  # type: ignore[attr-defined]
    interpreter.InterpreterBuilder.cast_impl = cast_impl

    # What a comparison of scalars says, it takes for a number of theirs when it makes a vector of it.
    splat = interpreter.InterpreterBuilder.create_splat

    def create_splat(self: Any, ret_ty: Any, arg: Any) -> Any:
        if arg.data.dtype == bool:
            return interpreter.TensorHandle(arg.data.repeat(ret_ty.numel).reshape(ret_ty.shape), tl.int1)
        return splat(self, ret_ty, arg)

    interpreter.InterpreterBuilder.create_splat = create_splat

    # Its scalars are arrays of one element, which numpy 2.4 takes for an index no more. Newer releases of Triton know.
    patch = interpreter._patch_lang_tensor

    def patch_lang_tensor(tensor: Any, scope: Any = None) -> None:
        patch(tensor, scope) if scope is not None else patch(tensor)
        tensor.__index__ = lambda self: int(self.handle.data.item())

    interpreter._patch_lang_tensor = patch_lang_tensor

    # It patches the language anew for every function that a kernel calls, which is half of its time.
    patch_lang = interpreter._patch_lang
    patched: set[Any] = set()

    def patch_lang_once(fn: Any) -> Any:
        modules = {module for module in (tl, tl.core) if any(value is module for value in fn.__globals__.values())}
        within_a_kernel = bool(patched)
        if within_a_kernel and modules <= patched:
            return None  # nobody restores the scope of a call
        scope = patch_lang(fn)
        patched.update(modules)
        if not within_a_kernel:
            restore = scope.restore

            def restore_all() -> None:
                patched.clear()
                restore()

            scope.restore = restore_all
        return scope

    interpreter._patch_lang = patch_lang_once
