"""A model's parameters as param groups: which weights are regularized."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from .flat_parameters import originals
from .penalties import of_the_weights

_NORM_LAYERS = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)


def param_groups(
    model: nn.Module,
    *,
    l1: float | None = None,
    l2: float | None = None,
    weight_decay: float | None = None,
    exempt: Iterable[str | type[nn.Module] | nn.Module | Tensor] = (),
    **options: Any,
) -> list[dict[str, Any]]:
    """Splits a model's parameters into regularized weights and exempt ones.

    Exempt, with ``weight_decay=0`` and every penalty and constraint off, are biases, the parameters of norm layers, and
    every other parameter of fewer than two dimensions: shrinking those costs accuracy and saves nothing.

    DTensors and FSDP1's parameters are taken for what they are whole, with the names and dimensions of the model.

    Args:
        model: the module whose parameters are split; a shared parameter is listed once.
        l1: strength on the weights; None leaves it to the optimizer's own argument.
        l2: likewise.
        weight_decay: likewise.
        exempt: what is exempt too, such as the output layer where ``sparsity_unit="rows"`` takes whole units: names of
            ``model.named_parameters()``, in which ``*`` and ``?`` stand for anything (fnmatch), types of modules,
            modules, or parameters. Modules mean all parameters in them.
        **options: any other group option. Penalties, constraints and targets (``freeze_zeros``, ``sparsity``, ...) are
            for the weights alone; the others (``lr``, ``clip_value``, ...) are given to both groups.

    Returns:
        One or two param groups, the regularized weights first, in the order of ``model.named_parameters()``.

    Warns:
        UserWarning: all parameters are exempt, and so a strength acts on nothing.

    Raises:
        ValueError: one parameter of FSDP1 is made of weights and of exempt ones. Something in ``exempt`` is not there.
        TypeError: something in ``exempt`` is none of what it may be.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.LayerNorm(3))
        >>> weights, exempt = param_groups(model, l1=1e-4)
        >>> len(weights["params"]), len(exempt["params"])
        (1, 3)
    """
    in_norm_layer = {
        id(param) for module in model.modules() if isinstance(module, _NORM_LAYERS) for param in module.parameters()
    }
    flat = originals(model)
    weights: list[torch.nn.Parameter] = []
    spared: list[torch.nn.Parameter] = []
    asked_for = _find_exempt(model, exempt)
    for name, param in model.named_parameters():
        made_of = [
            _is_exempt(each.name, each.ndim, isinstance(each.module, _NORM_LAYERS)) for each in flat.get(id(param), ())
        ] or [_is_exempt(name.rpartition(".")[2], param.ndim, id(param) in in_norm_layer)]
        if id(param) in asked_for:
            made_of = [True]
        if any(made_of) != all(made_of):
            raise ValueError(
                f"Invalid parameter: {name!r} is one of weights and of exempt ones, and can have one strength "
                "(allowed: FullyShardedDataParallel(..., use_orig_params=True))"
            )
        (spared if all(made_of) else weights).append(param)
    off = {"weight_decay": 0.0, **{option.name: option.default for option in of_the_weights()}}
    strengths = {"l1": l1, "l2": l2, "weight_decay": weight_decay}
    given = {key: value for key, value in strengths.items() if value is not None}
    given |= {key: options.pop(key) for key in off if key in options}
    if spared and not weights and (not given or any(value != off[key] for key, value in given.items())):
        what = ", ".join(f"{key}={value}" for key, value in given.items()) or "every strength"
        message = f"{what} acts on nothing: all parameters are exempt (biases, norm layers, fewer than two dimensions)"
        warnings.warn(message, stacklevel=2)
    groups = [
        {"params": weights, **options, **given},
        {"params": spared, **options, **off},
    ]
    return [group for group in groups if group["params"]]


def _is_exempt(name: str, ndim: int, is_in_norm_layer: bool) -> bool:
    return name == "bias" or ndim < 2 or is_in_norm_layer


def _find_exempt(model: nn.Module, exempt: Iterable[str | type[nn.Module] | nn.Module | Tensor]) -> set[int]:
    """The ids of the parameters that ``exempt`` means."""
    if isinstance(exempt, (str, type, nn.Module, Tensor)):
        raise TypeError(f"Invalid exempt: a {type(exempt).__name__} (allowed: a list of them)")
    found: set[int] = set()
    for each in exempt:
        if isinstance(each, str):
            named = model.named_parameters(remove_duplicate=False)
            its = {id(param) for name, param in named if fnmatchcase(name.replace("_fsdp_wrapped_module.", ""), each)}
        elif isinstance(each, type) and issubclass(each, nn.Module):
            modules = (module for module in model.modules() if isinstance(module, each))
            its = {id(param) for module in modules for param in module.parameters()}
        elif isinstance(each, nn.Module):
            its = {id(param) for module in model.modules() if module is each for param in module.parameters()}
        elif isinstance(each, Tensor):
            its = {id(param) for param in model.parameters() if param is each}
        else:
            raise TypeError(
                f"Invalid exempt: a {type(each).__name__} in it (allowed: names, types of modules, modules, parameters)"
            )
        if not its:
            what = f"a tensor of shape {tuple(each.shape)}" if isinstance(each, Tensor) else repr(each)
            raise ValueError(f"Invalid exempt: the model has no parameter that {what} means")
        found |= its
    return found
