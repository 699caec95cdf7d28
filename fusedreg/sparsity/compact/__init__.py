"""``compact``: the same model without the channels that are dead.

A call goes: the forward as a graph (trace.py) -> channels followed through it (follow.py, with channels.py and
tensors.py) -> what can go (dead.py) -> a copy, cut (surgery.py) -> compared (verify.py) -> the optimizer (carry.py).
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ...flat_parameters import is_flat
from ...memory import is_dtensor
from . import carry
from .dead import Plan, plan
from .follow import Follower, NotFollowed
from .report import CompactLayer, CompactReport, LeftWhole
from .surgery import cut
from .tensors import named_tensors
from .trace import Tracer, without_fast_paths
from .verify import Inputs, as_inputs, difference, in_float64, inputs_in_float64, run, run_and_count, with_noise

# Of the largest output, in float64, where rounding leaves 1e-15 or so: enough for sums in which much cancels.
_TOLERANCE_FLOAT64 = 1e-9
# How often what the model's own rounding does to its outputs, which is measured on the example inputs.
_ROUNDINGS = 16


def compact(model: nn.Module, example_inputs: Any, *, optimizer: Optimizer | None = None) -> nn.Module:
    """A copy of the model without dead units, which computes the same outputs in eval mode.

    A unit (a neuron, a channel, a column of an embedding, a head of ``torch.nn.MultiheadAttention``) is dead if its
    output is one constant, whatever the inputs are, or if nothing reads it: if its weights are exactly zero, or those
    that read it. All dead units go, through the whole graph, and what a removal makes dead goes too. A constant that
    is not 0 is added to the biases that read it. At least one unit of each layer stays.

    The forward is traced once with ``torch.fx`` on the example inputs. What is not followed, or where a removal would
    not be exact, is left whole, and stands in the report with the reason. The copy runs the model's own code; names of
    modules and parameters stay.

    The copy is compared with the model on the example inputs, and in float64 also on noise around them.

    Args:
        model: any module; it is not changed. It is followed in eval mode; the copy is in the mode that the model is in.
        example_inputs: a tensor, a tuple of arguments, or a dict of keyword arguments. A small batch is enough, of more
            than one example: all intermediate tensors are kept in float64.
        optimizer: the model's optimizer, any of ``torch.optim`` or fusedreg. **It is taken from the model to the
            copy**: its param groups have the copy's parameters, its state is cut like them, a ``sparsity`` becomes the
            share that leaves as many units. Schedulers that hold it go on. With it no layer without a bias gets one.

            Training then goes on as the model's would in which all units that went stand still: all of it if no
            constant was folded (``report.folded == 0``); otherwise the biases that took constants are where the whole
            model would train more parameters.

    Returns:
        The copy. ``small.report`` is a ``CompactReport``: parameters, FLOPs, layers before and after, the largest
        difference, what is left whole and why.

    Raises:
        ValueError: the model is random in eval mode, has DTensors or FSDP1's parameters, or an attribute ``report``;
            the optimizer is not the model's, or has a state that cannot be cut. Nothing has changed.
        RuntimeError: the copy's outputs are not the model's: a bug of ``compact``. Nothing has changed.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Linear(20, 50), torch.nn.ReLU(), torch.nn.Linear(50, 3))
        >>> torch.nn.init.zeros_(model[0].weight[10:])
        >>> small = fusedreg.compact(model, torch.randn(8, 20))
        >>> small[0].weight.shape, small[2].weight.shape
        (torch.Size([10, 20]), torch.Size([3, 10]))
    """
    _check(model)
    inputs = as_inputs(example_inputs).map(lambda x: x.detach())
    reference = copy.deepcopy(model).eval()
    with torch.random.fork_rng(devices=[]):
        expected, flops = run_and_count(reference, inputs)
        if difference(expected, run(reference, inputs))[0] > 0 and not _agrees(expected, run(reference, inputs)):
            raise ValueError("the model's outputs are random in eval mode, so that no copy can be compared with it")
        exact, exact_inputs = _exact(model, inputs)
        what = _plan(exact, exact_inputs, may_add_bias=optimizer is None)
        small = copy.deepcopy(model)
        changed = cut(small, what)
        in_exact = _compare_exactly(exact, exact_inputs, what)
        max_difference, small_flops = _compare(model, small, inputs, expected, exact, exact_inputs, flops)
    put = None if optimizer is None else carry.prepare(optimizer, model, small, what)
    small.report = CompactReport(  # type: ignore[assignment]
        parameters=(_size(model), _size(small)),
        flops=(flops, small_flops),
        max_difference=max_difference,
        max_difference_float64=in_exact,
        folded=what.folded,
        layers=_layers(model, changed),
        left=[LeftWhole(*each) for each in what.left],
    )
    if put is not None:
        put()
    return small


def _check(model: nn.Module) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"Invalid model: a {type(model).__name__} (allowed: a torch.nn.Module)")
    if not isinstance(getattr(model, "report", None), (CompactReport, type(None))):
        raise ValueError("the model has an attribute `report`, where compact puts its own (allowed: another name)")
    for name, tensor in named_tensors(model):
        if is_dtensor(tensor) or is_flat(tensor):
            raise ValueError(f"Invalid parameter: {name!r} is one rank's part of it (allowed: the whole model)")


def _agrees(some: list[Any], others: list[Any]) -> bool:
    gap, scale = difference(some, others)
    return gap <= 1e-3 * scale


def _exact(model: nn.Module, inputs: Inputs) -> tuple[nn.Module, Inputs]:
    """The model in float64 if it runs in that, else as it is."""
    exact, exact_inputs = in_float64(model), inputs_in_float64(inputs)
    try:
        run(exact, exact_inputs)
    except Exception:
        return copy.deepcopy(model).to("cpu").eval(), inputs.map(lambda x: x.cpu())
    return exact, exact_inputs


def _plan(exact: nn.Module, inputs: Inputs, may_add_bias: bool) -> Plan:
    root = copy.deepcopy(exact)
    whole = type(root).__name__
    if root._forward_hooks or root._forward_pre_hooks:
        return Plan(left=[(whole, "the model itself has forward hooks, which a trace does not see", 0)])
    follower = Follower(root)
    try:
        fresh = inputs.map(torch.clone)
        with without_fast_paths():
            tracer = Tracer(fresh.args, fresh.kwargs)
            graph = tracer.trace(root)
            gap, scale = difference(tracer.outputs(graph), run(exact, inputs))
    except Exception as error:  # whatever a forward raises that is traced
        return Plan(left=[(whole, f"torch.fx cannot trace its forward: {error}", 0)])
    if gap > max(_TOLERANCE_FLOAT64, 64 * _eps(exact)) * scale:
        return Plan(left=[(whole, "its forward, traced, computes something else", 0)])
    try:
        follower.run(graph)
    except NotFollowed as error:
        return Plan(left=[(whole, str(error), 0)])
    return plan(follower, may_add_bias)


def _eps(model: nn.Module) -> float:
    dtypes = [tensor.dtype for _, tensor in named_tensors(model) if tensor.is_floating_point()]
    return max((torch.finfo(dtype).eps for dtype in dtypes), default=0.0)


def _compare_exactly(exact: nn.Module, inputs: Inputs, what: Plan) -> float | None:
    """The largest difference in float64, on the example inputs and on noise around them."""
    small = copy.deepcopy(exact)
    cut(small, what)
    largest = 0.0
    tolerance = max(_TOLERANCE_FLOAT64, 256 * _eps(exact))
    for each in (inputs, with_noise(inputs)):
        try:
            expected = run(exact, each)
        except Exception:
            if each is inputs:
                raise
            continue  # noise may be nothing that the model takes
        gap, scale = difference(expected, _run_cut(small, each))
        if gap > tolerance * scale:
            raise RuntimeError(
                f"the compacted model's outputs differ by {gap:.1e}, where the largest is {scale:.1e}: this is a bug "
                "in fusedreg.compact; nothing has changed"
            )
        largest = max(largest, gap)
    return largest if _eps(exact) <= torch.finfo(torch.float64).eps else None


def _run_cut(small: nn.Module, inputs: Inputs) -> list[Any]:
    try:
        return run(small, inputs)
    except Exception as error:
        raise RuntimeError(
            f"the compacted model does not run ({error}): its forward depends on a size that was cut, in a way that a "
            "trace does not show; nothing has changed"
        ) from error


def _compare(
    model: nn.Module,
    small: nn.Module,
    inputs: Inputs,
    expected: list[Any],
    exact: nn.Module,
    exact_inputs: Inputs,
    flops: int,
) -> tuple[float, int]:
    """The largest difference in the model's own dtype, and the FLOPs of the copy."""
    modes = {module: module.training for module in small.modules()}
    small.eval()
    try:
        _run_cut(small, inputs)
        outputs, small_flops = run_and_count(small, inputs)
    finally:
        for module, mode in modes.items():
            module.training = mode
    gap, scale = difference(expected, outputs)
    rounding = difference(run(exact, exact_inputs), expected)[0]
    if gap > _ROUNDINGS * (rounding + 4 * _eps(model) * scale):
        raise RuntimeError(
            f"the compacted model's outputs differ by {gap:.1e}, where rounding has {rounding:.1e} in them: this is a "
            "bug in fusedreg.compact; nothing has changed"
        )
    return gap, small_flops


def _size(model: nn.Module) -> int:
    return sum(param.numel() for param in model.parameters())


def _layers(model: nn.Module, changed: dict[str, Tensor]) -> list[CompactLayer]:
    layers = []
    for path, module in model.named_modules():
        for name, tensor in module.named_parameters(recurse=False):
            new = changed.get(f"{path}.{name}" if path else name)
            if new is not None and new.shape != tensor.shape:
                layers.append(CompactLayer(path or name, type(module).__name__, tuple(tensor.shape), tuple(new.shape)))
                break
    return layers
