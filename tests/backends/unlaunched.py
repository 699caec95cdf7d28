"""Triton without a device: kernels are compiled, loaded and launched as for one, on CPU parameters, and run nowhere."""

from __future__ import annotations

from typing import Any

from triton.backends.compiler import GPUTarget

from fusedreg import backends


class Driver:
    """As far as Triton asks for one. It lists the launches."""

    def __init__(self, module: Any = None) -> None:
        """``module`` is what Triton gets for what it loads. With None it loads again in every launch, and does not
        unload by another driver."""
        self.utils, self._module = self, module
        self.launched: list[tuple[Any, ...]] = []

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0  # what the plan says, too, where there is no GPU

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": 2**16}

    def load_binary(self, name: str, kernel: bytes, shared: int, device: int) -> tuple[Any, ...]:
        return self._module, name, 64, 0, 1024

    def unload_module(self, module: Any) -> None: ...

    def launcher_cls(self, source: Any, metadata: Any) -> Any:
        return lambda *args: self.launched.append(args)


class UnlaunchedTritonBackend(backends.TritonBackend):
    device_type = "cpu"
    takes_units = True

    def unavailable_reason(self) -> None:
        return None

    def rejection(self, spec, param, states, state_dtype=None, grad_dtype=None) -> None:
        return None
