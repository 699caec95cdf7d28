"""State that a step creates, and takes back where it is then not taken."""

from __future__ import annotations

from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from .. import codes
from ..memory import widest
from ..penalties import state_dtype_of
from ..rules.spec import Group, RuleSpec, ScalarState, TensorState


class Created:
    """Makes the state that a rule needs; on an error inside of ``with``, everything is as it was before.

    State that was made for a step which is not taken would read as if it had been.
    """

    def __init__(self, spec: RuleSpec, state: dict[Any, Any]) -> None:
        self._spec = spec
        self._state = state
        self._before: dict[Tensor, dict[str, Any] | None] = {}
        self._moved: list[tuple[Tensor, Tensor]] = []

    def __enter__(self) -> Created:
        return self

    def __exit__(
        self, error_type: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if error_type is None:
            return
        for param, before in self._before.items():
            if before is None:
                self._state.pop(param, None)
            else:
                self._state[param].clear()
                self._state[param].update(before)

    def state_of(
        self, param: Tensor, group: Group, scalars_on_device: bool
    ) -> tuple[dict[str, Any], tuple[Tensor | None, ...], tuple[Tensor | None, ...], tuple[Tensor | None, ...]]:
        """A parameter's state, its tensor states, its scalar states and the tensor states' scales in the spec's order,
        None where not needed.

        Scalar states that come to another device have their value only after ``copy_moved``.

        Args:
            scalars_on_device: step counts stand beside their parameters, whatever the group says.
        """
        spec = self._spec
        self._before[param] = dict(self._state[param]) if param in self._state else None
        needs_some = bool(spec.needed_states(group) or spec.needed_scalar_states(group))
        # as in torch, what needs no state gets no entry
        own = self._state[param] if needs_some or param in self._state else {}
        # Scalars first: whether they begin depends on whether the tensors that they accompany were there.
        scalar_states = [
            self._scalar_state(scalar, own, param, group, scalars_on_device) if scalar.needed(group) else None
            for scalar in spec.scalar_states
        ]
        states = [
            self._tensor_state(state, own, param, group) if state.needed(group) else None for state in spec.states
        ]
        scales = [
            None if not codes.are_codes(state) else own[codes.scale_name(declared.name)]
            for declared, state in zip(spec.states, states, strict=True)
        ]
        return own, tuple(states), tuple(scalar_states), tuple(scales)

    @staticmethod
    def _tensor_state(declared: TensorState, own: dict[str, Any], param: Tensor, group: Group) -> Tensor:
        name, dtype = declared.name, declared.stored_as(state_dtype_of(group))
        now, initial = own.get(name), declared.initial(group)
        if now is None and dtype in codes.DTYPES:
            own[name], own[codes.scale_name(name)] = codes.make_codes(param, dtype, initial)
        elif now is None:
            tensor = torch.zeros_like(param, dtype=dtype, memory_format=torch.preserve_format)
            if initial != 0:
                (torch.view_as_real(tensor) if tensor.is_complex() else tensor).fill_(initial)
            own[name] = tensor
        else:  # out of a checkpoint that went round load_state_dict, or the option has just been set, or a layout
            codes.put(own, name, now, param, dtype)
        return own[name]

    @torch.no_grad()
    def copy_moved(self) -> None:
        """Copies the scalar states that have come to another device, all at once: one by one, each copy would wait."""
        ways: dict[Any, list[tuple[Tensor, Tensor]]] = {}
        for before, after in self._moved:
            ways.setdefault((before.device, after.device, before.dtype), []).append((before, after))
        for moved in ways.values():
            there = torch.stack([before.reshape(()) for before, _ in moved]).to(moved[0][1].device)
            torch._foreach_copy_([after for _, after in moved], list(there.unbind()))
        self._moved = []

    def _scalar_state(
        self, declared: ScalarState, own: dict[str, Any], param: Tensor, group: Group, on_device: bool
    ) -> Tensor:
        now = own.get(declared.name)
        is_fused = bool(group.get("fused"))
        if declared.is_step and not declared.is_beside:
            on_device = on_device or is_fused or bool(group.get("capturable"))
        else:
            on_device = on_device or param.is_cuda
        is_double = not declared.is_step or (torch.get_default_dtype() == torch.float64 and not is_fused)
        is_wide = is_double or (isinstance(now, Tensor) and now.dtype == torch.float64)
        on_device = on_device and not (is_wide and widest(param.device) != torch.float64)
        device = param.device if on_device else torch.device("cpu")
        if declared.accompanies is not None:
            companion = own.get(declared.accompanies)
            if companion is None:
                now = 0.0
            elif now is None:
                now = float("nan")  # nobody counted
        if isinstance(now, Tensor) and now.dtype in (torch.float32, torch.float64):
            if group.get("differentiable") and now.requires_grad and now.is_leaf:
                raise RuntimeError(f"`requires_grad` is not supported for `{declared.name}` in differentiable mode")
            if now.device != device and (on_device or now.device != param.device):
                own[declared.name] = torch.empty((), dtype=now.dtype, device=device)
                self._moved.append((now, own[declared.name]))
            return own[declared.name]
        dtype = torch.float64 if is_double else torch.float32
        value = float(declared.initial(group) if now is None else now)
        if device.type == "cpu":
            own[declared.name] = torch.tensor(value, dtype=dtype, device=device)  # known under FakeTensorMode, too
        else:
            own[declared.name] = torch.full((), value, dtype=dtype, device=device)  # does not wait for the device
        return own[declared.name]
