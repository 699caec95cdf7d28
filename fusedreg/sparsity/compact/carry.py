"""Takes an optimizer from a model to its compacted copy."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from ...codes import decoded
from ...hyperparameters import spare_small
from ...optimizer import FusedRegOptimizer
from .dead import Plan
from .surgery import take


def prepare(optimizer: Optimizer, model: nn.Module, small: nn.Module, plan: Plan) -> Callable[[], None]:
    """Cuts the optimizer's state, and returns what puts it in its place. Nothing has changed before that is called.

    Raises:
        TypeError: it is no optimizer.
        ValueError: none of its parameters is the model's, or a state is neither of its parameter's shape nor a number.
    """
    if not isinstance(optimizer, Optimizer):
        raise TypeError(f"Invalid optimizer: a {type(optimizer).__name__} (allowed: a torch.optim.Optimizer)")
    news = dict(small.named_parameters(remove_duplicate=False))
    twin: dict[Tensor, nn.Parameter] = {}
    masks: dict[Tensor, dict[int, Tensor]] = {}
    for name, param in model.named_parameters(remove_duplicate=False):
        if param not in twin:
            twin[param] = news[name]
            masks[param] = {dim: mask for (key, dim), mask in plan.keep.items() if key == name}
    owned = [param for group in optimizer.param_groups for param in group["params"]]
    if not any(param in twin for param in owned):
        raise ValueError("Invalid optimizer: it has no parameter of the model (allowed: the model's own optimizer)")

    state: dict[Any, Any] = defaultdict(dict)
    for owner, values in optimizer.state.items():
        if owner in twin:
            state[twin[owner]] = {key: _cut(key, value, owner, masks[owner]) for key, value in decoded(values).items()}
        else:
            state[owner] = values
    grads = [(twin[each], take(each.grad, masks[each])) for each in owned if each in twin and each.grad is not None]
    targets = _targets(optimizer, twin)

    def put() -> None:
        for new, grad in grads:
            new.grad = grad
        for group, target in zip(optimizer.param_groups, targets, strict=True):
            group["params"] = [twin.get(param, param) for param in group["params"]]
            if target is not None:
                group["sparsity"] = target
        optimizer.state = state  # type: ignore[assignment]
        if isinstance(optimizer, FusedRegOptimizer):
            optimizer._forget()

    return put


def _cut(key: str, value: Any, param: Tensor, masks: dict[int, Tensor]) -> Any:
    if isinstance(value, Tensor):
        if value.shape == param.shape:
            return take(value, masks)
        if value.numel() == 1 or not masks:
            return value.clone()
    elif value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise ValueError(
        f"Invalid optimizer: its state {key!r} of a parameter of shape {tuple(param.shape)} cannot be cut (allowed: "
        "states of the parameter's shape, and numbers)"
    )


def _targets(optimizer: Optimizer, twin: dict[Tensor, nn.Parameter]) -> list[float | None]:
    """For each group with a sparsity, the share that leaves as many units as before: what went no longer counts."""
    pools: dict[tuple[float, Any], list[int]] = {}
    for group in spare_small(optimizer.param_groups):
        if group.get("sparsity") is not None:
            pool = pools.setdefault((float(group["sparsity"]), group["sparsity_unit"]), [0, 0])
            for param in group["params"]:
                for i, each in enumerate((param, twin.get(param, param))):
                    pool[i] += _units(each, group["sparsity_unit"])
    targets: list[float | None] = []
    for group in optimizer.param_groups:
        if group.get("sparsity") is None:
            targets.append(None)
            continue
        target = float(group["sparsity"])
        before, after = pools[target, group["sparsity_unit"]]
        targets.append(target if before == after else max(0.0, 1.0 - (1.0 - target) * before / max(after, 1)))
    return targets


def _units(param: Tensor, unit: Any) -> int:
    if unit is None:
        return param.numel()
    return param.shape[1] if unit == "columns" else param.shape[0] // (unit if isinstance(unit, int) else 1)
