"""The Triton backend on CPU parameters, in Triton's interpreter: the kernels' own code, carried out by numpy.

Only in a process started with TRITON_INTERPRET=1 (``make test-triton``): Triton looks when a kernel is defined.
"""

from __future__ import annotations

import os

import torch

from fusedreg.backends.base import Entry, Plan
from fusedreg.backends.cpp import DTYPES
from fusedreg.backends.memory import rejection_of_memory
from fusedreg.backends.triton import make_plan, rejection_of_rule, why_not_triton
from fusedreg.rules.spec import RuleSpec

INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"


def reason_to_skip() -> str | None:
    if not INTERPRETING:
        return "runs in Triton's interpreter: make test-triton"
    return why_not_triton()


class InterpretedTritonBackend:
    """Stands in for TritonBackend, for CPU parameters; ``scalars_on_host`` as in fusedreg/backends/tables.py."""

    name = "triton"
    device_type = "cpu"
    takes_units = True

    def __init__(self, scalars_on_host: bool) -> None:
        self.scalars_on_host = scalars_on_host
        correct_the_interpreter()

    def unavailable_reason(self) -> str | None:
        return None

    def rejection(self, spec: RuleSpec, param: torch.Tensor, states: list[torch.Tensor]) -> str | None:
        return rejection_of_rule(spec) or rejection_of_memory(param, states, "cpu", DTYPES)

    def make_plan(self, spec: RuleSpec, entries: list[Entry], differentiable: bool, state: dict) -> Plan:
        return make_plan(spec, entries, state, self.scalars_on_host)


def correct_the_interpreter() -> None:
    """Where the interpreter does what no device does."""
    import triton.language as tl
    from triton.runtime import interpreter

    cast = interpreter.InterpreterBuilder.cast_impl
    if getattr(cast, "rounds_to_nearest", False):
        return

    # It cuts float32 off to bfloat16, where devices round to the nearest, and misreads subnormal bfloat16.
    def cast_impl(self, src, dst_type):
        if src.dtype.scalar == tl.float32 and dst_type.scalar == tl.bfloat16:
            rounded = torch.from_numpy(src.data).to(torch.bfloat16).view(torch.uint16).numpy()
            return interpreter.TensorHandle(rounded, dst_type.scalar)
        if src.dtype.scalar == tl.bfloat16 and dst_type.scalar == tl.float32:
            read = torch.from_numpy(src.data.view("int16")).view(torch.bfloat16).float().numpy()
            return interpreter.TensorHandle(read, dst_type.scalar)
        return cast(self, src, dst_type)

    cast_impl.rounds_to_nearest = True
    interpreter.InterpreterBuilder.cast_impl = cast_impl

    # What a comparison of scalars says, it takes for a number of theirs when it makes a vector of it.
    splat = interpreter.InterpreterBuilder.create_splat

    def create_splat(self, ret_ty, arg):
        if arg.data.dtype == bool:
            return interpreter.TensorHandle(arg.data.repeat(ret_ty.numel).reshape(ret_ty.shape), tl.int1)
        return splat(self, ret_ty, arg)

    interpreter.InterpreterBuilder.create_splat = create_splat

    # Its scalars are arrays of one element, which numpy 2.4 takes for an index no more. Newer releases of Triton know.
    patch = interpreter._patch_lang_tensor

    def patch_lang_tensor(tensor, scope=None):
        patch(tensor, scope) if scope is not None else patch(tensor)
        tensor.__index__ = lambda self: int(self.handle.data.item())

    interpreter._patch_lang_tensor = patch_lang_tensor

    # It patches the language anew for every function that a kernel calls, which is half of its time.
    patch_lang = interpreter._patch_lang
    patched = set()

    def patch_lang_once(fn):
        modules = {module for module in (tl, tl.core) if any(value is module for value in fn.__globals__.values())}
        within_a_kernel = bool(patched)
        if within_a_kernel and modules <= patched:
            return None  # nobody restores the scope of a call
        scope = patch_lang(fn)
        patched.update(modules)
        if not within_a_kernel:
            restore = scope.restore
            scope.restore = lambda: (patched.clear(), restore())
        return scope

    interpreter._patch_lang = patch_lang_once
