"""FSDP1's parameters, by the names and shapes that they had before torch laid them end to end and shared them out.

``FullyShardedDataParallel`` makes one FlatParameter of a wrapped module's parameters, and keeps in it what they were.
Each rank has a part of it. With ``use_orig_params=True`` the module shows its own parameters, flat views of that part.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from torch import Tensor, nn


class Original(NamedTuple):
    """A parameter as it was."""

    name: str
    """In its own module: ``weight``."""
    ndim: int
    module: nn.Module


def is_flat(param: Tensor) -> bool:
    """Whether this is FSDP1's, a rank's part of one parameter or of several."""
    return getattr(param, "_fsdp_flattened", False)


def originals(model: nn.Module) -> dict[int, list[Original]]:
    """Of each of FSDP1's parameters, by its id, those that it is made of."""
    found: dict[int, list[Original]] = {}
    for wrapped in _wrapped_modules(model):
        flat = wrapped._flat_param
        if flat is None:
            continue
        own = [
            Original(info.param_name, len(shape), info.module)
            for info, shape in zip(flat._param_infos, flat._shapes, strict=True)
        ]
        if flat._params is None:
            found[id(flat)] = own
        else:
            found.update((id(param), [original]) for param, original in zip(flat._params, own, strict=True))
    return found


def whole_parameters(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """``model.named_parameters()``, FSDP1's whole and with their own names.

    Collective: they are gathered, those of one wrapped module at a time, and are there until the next is asked for.
    """
    wrapped = _wrapped_modules(model)
    if not wrapped:
        yield from model.named_parameters()
        return
    for prefix, module in model.named_modules():
        if module is not model and module not in wrapped:
            continue
        seen: set[int] = set()  # not of all modules: what was gathered for one is gone, and its ids come again
        for name, param in _gathered(module, wrapped):
            if id(param) not in seen:
                seen.add(id(param))
                yield f"{prefix}.{name}".replace("_fsdp_wrapped_module.", "").removeprefix("."), param


def _gathered(module: nn.Module, wrapped: list[Any]) -> Iterator[tuple[str, Tensor]]:
    """The parameters in a module that are not in another wrapped one, inside of it."""
    if module not in wrapped:
        yield from _outside(module, wrapped)
        return
    with type(wrapped[0]).summon_full_params(module, recurse=False, writeback=False):
        yield from _outside(module, wrapped)


def _outside(module: nn.Module, wrapped: list[Any], prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    for name, param in module._parameters.items():
        if param is not None:
            yield prefix + name, param
    for name, child in module.named_children():
        if child not in wrapped:
            yield from _outside(child, wrapped, f"{prefix}{name}.")


def _wrapped_modules(model: nn.Module) -> list[Any]:
    if not any(map(is_flat, model.parameters())):
        return []
    from torch.distributed.fsdp import FullyShardedDataParallel  # a second, where it is not there already

    return FullyShardedDataParallel.fsdp_modules(model)
