"""A model's parameters as param groups: which weights are regularized."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from fnmatch import fnmatchcase
from typing import Any

from torch import Tensor, nn
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from .flat_parameters import originals
from .penalties import off

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
    every other parameter of fewer than two dimensions: shrinking those costs accuracy and saves nothing. Exempt are
    also the parameters that a weight is computed from (``weight_norm``, ``spectral_norm`` and every other
    parametrization): a penalty on those is none on the weight, and shrinks a direction, whose length says nothing, to
    zero.

    The groups keep the parameters' names (``param_names``, as torch has them) and their places in the model
    (``param_places``), so that fusedreg's optimizers also load a state dict that was saved without groups.

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
        UserWarning: a strength acts on less than it seems to: all parameters are exempt; or weights that are computed
            from parameters are; or most elements are, in parameters of fewer than two dimensions that are neither
            biases nor in norm layers, such as weights that were flattened. ``exempt`` says that it is meant.

    Raises:
        ValueError: one parameter of FSDP1 is made of weights and of exempt ones. Something in ``exempt`` is not there.
            A lazy module has not seen its first batch: its parameters have no dimensions so far.
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
    computed_from = _parametrized(model)
    asked_for = _find_exempt(model, exempt)
    named = list(model.named_parameters())
    weights: list[int] = []
    spared: list[int] = []
    flattened: list[int] = []
    for place, (name, param) in enumerate(named):
        if nn.parameter.is_lazy(param):
            raise ValueError(
                f"Invalid model: {name!r} is of a lazy module that has seen no batch, and has no dimensions so far "
                "(allowed: param_groups after the first call of the model)"
            )
        made_of = [
            _is_exempt(each.name, each.ndim, isinstance(each.module, _NORM_LAYERS)) for each in flat.get(id(param), ())
        ] or [_is_exempt(name.rpartition(".")[2], param.ndim, id(param) in in_norm_layer)]
        if id(param) in asked_for or id(param) in computed_from:
            made_of = [True]
        elif id(param) not in flat and id(param) not in in_norm_layer and not name.endswith("bias") and param.ndim == 1:
            flattened.append(place)
        if any(made_of) != all(made_of):
            raise ValueError(
                f"Invalid parameter: {name!r} is one of weights and of exempt ones, and can have one strength "
                "(allowed: FullyShardedDataParallel(..., use_orig_params=True))"
            )
        (spared if all(made_of) else weights).append(place)
    strengths = {"l1": l1, "l2": l2, "weight_decay": weight_decay}
    given = {key: value for key, value in strengths.items() if value is not None}
    given |= {key: options.pop(key) for key in off() if key in options}
    if not given or any(value != off()[key] for key, value in given.items()):
        what = ", ".join(f"{key}={value}" for key, value in given.items()) or "every strength"
        computed = [place for place in spared if id(named[place][1]) in computed_from.keys() - asked_for]
        elements = {place: param.numel() for place, (_, param) in enumerate(named)}
        if spared and not weights:
            _warn(f"{what} acts on nothing: all parameters are exempt (biases, norm layers, fewer than two dimensions)")
        elif sum(elements[each] for each in flattened) > sum(elements[each] for each in weights):
            largest = named[max(flattened, key=lambda place: elements[place])][0]
            _warn(f"{what} spares most elements: {largest!r} has one dimension, and counts as a bias")
        if computed:
            names = sorted({computed_from[id(named[place][1])] for place in computed})
            _warn(f"{what} spares the weights that are computed from parameters: {', '.join(names)}")
    groups = [_group(named, weights, {**options, **given}), _group(named, spared, {**options, **off()})]
    return [group for group in groups if group["params"]]


def _group(named: list[tuple[str, nn.Parameter]], places: list[int], options: dict[str, Any]) -> dict[str, Any]:
    return {
        "params": [named[place][1] for place in places],
        "param_names": [named[place][0] for place in places],
        "param_places": places,
        **options,
    }


def _warn(message: str) -> None:
    warnings.warn(message, stacklevel=3)  # whoever calls param_groups


def _is_exempt(name: str, ndim: int, is_in_norm_layer: bool) -> bool:
    return name == "bias" or ndim < 2 or is_in_norm_layer


def _parametrized(model: nn.Module) -> dict[int, str]:
    """Of each parameter that a weight is computed from, by its id, the name of that weight."""
    found: dict[int, str] = {}
    for prefix, module in model.named_modules():
        its = [
            (name, param)
            for name, each in getattr(module, "parametrizations", nn.ModuleDict()).items()
            for param in each.parameters(recurse=False)
        ]
        for hook in module._forward_pre_hooks.values():  # as both norms were before there were parametrizations
            if isinstance(hook, (WeightNorm, SpectralNorm)):
                parts = (module._parameters.get(f"{hook.name}_{part}") for part in ("g", "v", "orig"))
                its += [(hook.name, param) for param in parts if param is not None]
        found.update({id(param): f"{prefix}.{name}".lstrip(".") for name, param in its})
    return found


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
