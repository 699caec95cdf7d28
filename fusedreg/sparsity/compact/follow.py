"""Follows channels through a graph, node by node.

Every node gets an abstract value (tensors.py). What is in the table at the end is understood. All else looks at every
channel that it gets, so that none of those goes, and gives something of which nothing is known.
"""

from __future__ import annotations

import math
import operator
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from .attention import CompactAttention
from .channels import Channels
from .tensors import ChannelCount, Followed, Store, Stored
from .trace import where

UNEXPECTED = "compact does not know this way to call it"


class NotFollowed(Exception):
    """Why an operation is left whole."""


@dataclass(frozen=True, eq=False)
class Bias:
    """Where a constant can be added to the outputs of a reading."""

    stored: Stored | None
    offset: int = 0
    module: str | None = None
    """The layer that can be given one, where there is none."""


@dataclass(frozen=True, eq=False)
class Reading:
    """Outputs that are sums over inputs, each times its weight: the only place where channels end."""

    where: str
    outputs: Tensor
    inputs: Tensor
    sums: Tensor
    """[outputs, inputs]: the weights, added up over a kernel's taps."""
    is_read: Tensor
    """[outputs, inputs]: whether any of them is not zero."""
    known: Tensor
    """[inputs]: whether what comes in is a constant."""
    constant: Tensor
    """[inputs]: whether it is, and adds one constant to all of an output."""
    value: Tensor
    bias: Bias
    weight: Stored | None = None
    """A convolution's, whose constants can be put together in one channel."""
    dim: int = 0
    """Which of its dimensions the inputs are."""


@dataclass(frozen=True, eq=False)
class Attention:
    """A MultiheadAttention whose heads are followed."""

    path: str
    heads: Tensor


@dataclass
class Call:
    """A node, as a handler sees it."""

    node: fx.Node
    module: nn.Module | None

    @property
    def where(self) -> str:
        return where(self.node)

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.node.meta["value"].shape)

    @property
    def is_float(self) -> bool:
        value = self.node.meta["value"]
        return isinstance(value, Tensor) and value.is_floating_point()


class Follower:
    """The walk over a graph, and what it finds."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.channels = Channels()
        self.store = Store(model, self.channels)
        self.readings: list[Reading] = []
        self.attentions: list[Attention] = []
        self.grouped: dict[str, Tensor] = {}
        """Convolutions in groups: for each group a channel."""
        self.norms: dict[str, Tensor] = {}
        """Norm layers that have no tensors, but know how many channels they get."""
        self.left: dict[tuple[str, str], None] = {}
        """What is left whole, (where, reason), in the order of the forward."""
        self.arrays: list[Tensor] = []
        """The channels of each tensor of the graph."""
        self.calls: Counter[str] = Counter()
        """How often the forward calls each layer."""
        self._values: dict[fx.Node, Any] = {}

    def run(self, graph: fx.Graph) -> None:
        nodes = list(graph.nodes)
        place = {node: i for i, node in enumerate(nodes)}
        for node in nodes:
            value = self._values[node] = self._follow(node)
            for each in value if isinstance(value, tuple) else (value,):
                if isinstance(each, Followed) and each.dim is not None:
                    self.arrays.append(each.ids)
            written = _written_in_place(node, self.model)
            if written is not None:
                self._rename(node, written, place)
        self.store.pin_what_others_use()

    def _rename(self, node: fx.Node, written: fx.Node, place: dict[fx.Node, int]) -> None:
        """After a write in place, every older name of that memory means what was written."""
        memory = _memory(written.meta["value"])
        for older in list(self._values):
            value = older.meta.get("value")
            if older is node or not isinstance(value, Tensor) or memory is None or _memory(value) != memory:
                continue
            is_read_later = any(place[user] > place[node] for user in older.users)
            if _same_view(value, written.meta["value"]) and isinstance(self._values[older], Followed):
                self._values[older] = self._values[node]
            elif is_read_later or isinstance(self._values[older], Stored):
                raise NotFollowed(f"{where(node)} writes in place into what {where(older)} shows a part of")

    def _follow(self, node: fx.Node) -> Any:
        if node.op == "placeholder":
            return Followed(tuple(node.meta["value"].shape))
        if node.op == "get_attr":
            value = node.meta["value"]
            if not isinstance(value, Tensor):
                return value
            return self.store.find(str(node.target), value) or Followed(tuple(value.shape))
        args = fx.node.map_arg(node.args, self._values.__getitem__)
        kwargs = fx.node.map_arg(node.kwargs, self._values.__getitem__)
        if node.op == "output":
            self._look_at_all((args, kwargs), "the model's output", "")
            return None
        module = self.model.get_submodule(str(node.target)) if node.op == "call_module" else None
        call = Call(node, module)
        self.calls[str(node.target)] += module is not None
        if module is None and not any(
            isinstance(each, (Followed, Stored, ChannelCount)) for each in _flat((args, kwargs))
        ):
            if isinstance(node.meta["value"], Tensor):
                return Followed(call.shape)
            if not isinstance(node.target, str) and node.target is not getattr:
                return node.meta["value"]
        try:
            handler = self._handler(node, module)
            return handler(self, call, *args, **kwargs)
        except NotFollowed as error:
            return self._leave(call, args, kwargs, str(error))
        except Exception as error:  # whatever a way to call it does to what expects another
            return self._leave(call, args, kwargs, f"{UNEXPECTED}: {error}")

    def _handler(self, node: fx.Node, module: nn.Module | None) -> Callable[..., Any]:
        key: Any = node.target if module is None else type(module)
        if module is not None and (module._forward_hooks or module._forward_pre_hooks):
            raise NotFollowed("it has forward hooks (torch.nn.utils.prune's go with prune.remove)")
        if key not in HANDLERS:
            name = key if isinstance(key, str) else getattr(key, "__name__", str(key))
            raise NotFollowed(f"{name} is not among what compact follows")
        return HANDLERS[key]

    def _leave(self, call: Call, args: Any, kwargs: Any, reason: str) -> Any:
        saw = self._look_at_all((args, kwargs), call.where, reason)
        if call.module is not None:
            for name, tensor in (*call.module.named_parameters(), *call.module.named_buffers()):
                stored = self.store.find(f"{call.node.target}.{name}", tensor)
                if stored is not None:
                    saw |= stored.tensor.ndim > 0 and isinstance(tensor, nn.Parameter)
                    self.store.pin(stored, range(tensor.ndim), call.where, reason)
        if saw:
            self.left[call.where, reason] = None
        return _unknown(call.node.meta["value"])

    def _look_at_all(self, values: Any, where: str, reason: str) -> bool:
        saw = False
        for each in _flat(values):
            if isinstance(each, Stored):
                self.store.pin(each, range(each.tensor.ndim), where, reason)
                saw |= each.tensor.ndim > 0
            elif isinstance(each, Followed) and each.dim is not None:
                self.channels.pin(each.ids, where, reason, each.known)
                saw = True
            elif isinstance(each, ChannelCount):
                self.channels.pin(each.ids, where, reason)
                saw = True
        return saw

    # -- for handlers

    def own(self, call: Call, name: str) -> Stored | None:
        """The module's own parameter or buffer of this name."""
        tensor = getattr(call.module, name, None)
        return None if tensor is None else self.store.find(f"{call.node.target}.{name}", tensor)

    def stay(self, value: Followed, where: str, reason: str = "") -> None:
        """Nothing of it goes."""
        if value.dim is not None:
            self.channels.pin(value.ids, where, reason, value.known)
            if reason:
                self.left[where, reason] = None

    def at(self, value: Any, dim: int, where: str, reason: str = "") -> Followed:
        """The tensor with its channels in ``dim``; where it has none there, with new ones, all of which stay."""
        if not isinstance(value, Followed):
            raise NotFollowed("a parameter stands where a tensor of the graph is expected")
        dim %= len(value.shape)
        if value.dim == dim:
            return value
        self.stay(value, where, reason or "channels of two dimensions meet")
        return self.fresh(value.shape, dim, where)

    def fresh(self, shape: Any, dim: int, where: str) -> Followed:
        """A tensor that has no channels, with some that stay."""
        size = shape[dim]
        ids = self.channels.new(size)
        self.channels.pin(ids, where)
        return Followed(tuple(shape), dim, ids, torch.zeros(size, dtype=torch.bool), torch.zeros(size).double())

    def read(
        self,
        where: str,
        x: Followed,
        outputs: Tensor,
        weight: Tensor,
        bias: Bias,
        uniform: Tensor | None = None,
        stored: Stored | None = None,
        dim: int = 0,
    ) -> tuple[Tensor, Tensor]:
        """Registers a reading; returns which outputs are constants, and which ones.

        Args:
            weight: [outputs, inputs, taps].
            uniform: of the inputs, whether a constant comes to one constant for each output.
            stored, dim: the weight as it is stored, and where it has the inputs, if constants may be put together.
        """
        taps = weight.flatten(start_dim=2) if weight.ndim > 2 else weight.unsqueeze(2)
        is_read, sums = (taps != 0).any(dim=2), taps.sum(dim=2)
        constant = x.known if uniform is None else x.known & uniform
        self.readings.append(
            Reading(where, outputs, x.ids, sums, is_read, x.known, constant, x.value, bias, stored, dim)
        )
        known = ~(is_read & ~constant).any(dim=1)
        value = sums @ torch.where(constant, x.value.to(sums.dtype), 0.0)
        if bias.stored is not None:
            value = value + bias.stored.tensor[bias.offset : bias.offset + len(value)]
        return known & value.isfinite(), torch.where(known & value.isfinite(), value, 0.0)


def _flat(values: Any) -> Iterable[Any]:
    if isinstance(values, (tuple, list)):
        for each in values:
            yield from _flat(each)
    elif isinstance(values, dict):
        yield from _flat(tuple(values.values()))
    elif isinstance(values, slice):
        yield from (values.start, values.stop, values.step)
    else:
        yield values


def _unknown(value: Any) -> Any:
    if isinstance(value, Tensor):
        return Followed(tuple(value.shape))
    if isinstance(value, (tuple, list)) and not isinstance(value, torch.Size):
        return tuple(_unknown(each) for each in value)
    return value


# -- writes in place

_WRITES = {
    getattr(operator, f"i{name}"): None
    for name in ("add", "sub", "mul", "truediv", "floordiv", "pow", "mod", "matmul", "and", "or", "xor")
}


def _written_in_place(node: fx.Node, model: nn.Module) -> fx.Node | None:
    """The node whose memory this one writes into."""
    inputs = [arg for arg in node.args if isinstance(arg, fx.Node)]
    if not inputs:
        return None
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    if node.op == "call_module":
        return inputs[0] if getattr(model.get_submodule(str(node.target)), "inplace", False) else None
    if node.op not in ("call_function", "call_method"):
        return None
    if node.target in _WRITES:
        return inputs[0] if isinstance(node.meta["value"], Tensor) else None
    if "out" in node.kwargs:
        raise NotFollowed(f"{where(node)} writes its result into out=")
    if node.target is operator.setitem or (name.endswith("_") and not name.endswith("__")):
        return inputs[0]
    # As a keyword or by its place, which differs: anything that is True and gives back the memory that it got.
    if any(each is True for each in (*node.args, *node.kwargs.values())):
        memory = _memory(node.meta["value"])
        if memory is not None and memory == _memory(inputs[0].meta["value"]):
            return inputs[0]
    return None


def _memory(value: Any) -> int | None:
    return (value.untyped_storage().data_ptr() or None) if isinstance(value, Tensor) else None


def _same_view(some: Tensor, other: Tensor) -> bool:
    return some.shape == other.shape and some.stride() == other.stride() and some.data_ptr() == other.data_ptr()


# -- sums over channels: Linear, convolutions


def _linear(f: Follower, call: Call, x: Any, weight: Any, bias: Any = None, module: str | None = None) -> Followed:
    if not isinstance(weight, Stored) or weight.tensor.ndim != 2 or not isinstance(bias, (Stored, type(None))):
        raise NotFollowed("its weight is not a parameter of the model")
    if isinstance(x, Followed) and x.dim not in (None, len(x.shape) - 1):
        # It mixes another dimension, for each channel alike.
        f.store.pin(weight, (0, 1), call.where)
        if bias is not None:
            f.store.pin(bias, (0,), call.where)
        return x.over(call.shape, x.dim).unknown()
    x = f.at(x, -1, call.where)
    f.channels.join(x.ids, f.store.ids(weight, 1))
    outputs = f.store.ids(weight, 0)
    if bias is not None:
        f.channels.join(outputs, f.store.ids(bias, 0))
    known, value = f.read(call.where, x, outputs, weight.tensor.detach(), Bias(bias, module=module))
    return Followed(call.shape, len(call.shape) - 1, outputs, known, value)


def _linear_module(f: Follower, call: Call, x: Any) -> Followed:
    return _linear(f, call, x, f.own(call, "weight"), f.own(call, "bias"), str(call.node.target))


def _conv_module(f: Follower, call: Call, x: Any) -> Followed:
    module = call.module
    assert isinstance(module, nn.modules.conv._ConvNd)
    weight, bias = f.own(call, "weight"), f.own(call, "bias")
    assert weight is not None
    x = f.at(x, len(x.shape) - weight.tensor.ndim + 1, call.where)
    assert x.dim is not None
    outputs = f.channels.new(module.out_channels)
    if bias is not None:
        f.channels.join(outputs, f.store.ids(bias, 0))
    if module.transposed:
        # Its taps overlap otherwise at borders than inside, and between strides.
        uniform = x.value == 0
    elif module.padding_mode == "zeros":
        uniform = (x.value == 0) | (not _is_padded(module))
    else:
        uniform = torch.ones_like(x.known)
    w = weight.tensor.detach()
    path = str(call.node.target)
    if module.groups > 1:
        return _grouped_conv(f, call, x, weight, outputs, uniform, bias)
    if module.transposed:
        w = w.transpose(0, 1)
    ins, outs = (0, 1) if module.transposed else (1, 0)
    f.channels.join(x.ids, f.store.ids(weight, ins))
    f.channels.join(outputs, f.store.ids(weight, outs))
    known, value = f.read(call.where, x, outputs, w, Bias(bias, module=path), uniform, weight, ins)
    return Followed(call.shape, x.dim, outputs, known, value)


def _grouped_conv(
    f: Follower, call: Call, x: Followed, weight: Stored, outputs: Tensor, uniform: Tensor, bias: Stored | None
) -> Followed:
    """Groups go as a whole, each with its inputs and outputs: their sizes must stay equal."""
    module = call.module
    assert isinstance(module, nn.modules.conv._ConvNd)
    groups, w = module.groups, weight.tensor.detach()
    each = f.grouped.setdefault(str(call.node.target), f.channels.new(groups))
    f.channels.join(x.ids, each.repeat_interleave(module.in_channels // groups))
    f.channels.join(outputs, each.repeat_interleave(module.out_channels // groups))
    if module.transposed:
        f.channels.join(x.ids, f.store.ids(weight, 0))
        f.store.pin(weight, (1,), call.where)
        w = w.unflatten(0, (groups, -1)).transpose(1, 2).flatten(0, 1)
    else:
        f.channels.join(outputs, f.store.ids(weight, 0))
        f.store.pin(weight, (1,), call.where)
    w = w.flatten(start_dim=2)  # [outputs, inputs of a group, taps]
    constant, value = (
        each.unflatten(0, (groups, -1)).repeat_interleave(module.out_channels // groups, dim=0)
        for each in (x.known & uniform, torch.where(x.known, x.value, 0.0))
    )
    is_known = ~((w != 0).any(dim=2) & ~constant).any(dim=1)
    result = (w.sum(dim=2) * value).sum(dim=1)
    if bias is not None:
        result = result + bias.tensor.detach()
    return Followed(call.shape, x.dim, outputs, is_known, result).constant(is_known, result)


def _is_padded(module: nn.modules.conv._ConvNd) -> bool:
    if isinstance(module.padding, str):
        return module.padding == "same" and any(size > 1 for size in module.kernel_size)
    return any(module.padding)


# -- a number for a number


def _apply(call: Call, *vectors: Any) -> Tensor:
    """What the node makes of channels that are constants, given as vectors in the place of its first arguments."""
    node = call.node
    vectors = tuple(each.clone() if isinstance(each, Tensor) else each for each in vectors)
    rest = node.args[len(vectors) :]
    with torch.no_grad():
        if call.module is not None:
            return call.module(*vectors)
        if isinstance(node.target, str):
            return getattr(vectors[0], node.target)(*vectors[1:], *rest, **node.kwargs)
        return node.target(*vectors, *rest, **node.kwargs)


def _unary(f: Follower, call: Call, x: Any, *rest: Any, **kwargs: Any) -> Followed:
    if not isinstance(x, Followed) or any(
        isinstance(each, (Followed, Stored, ChannelCount)) for each in _flat((rest, kwargs))
    ):
        raise NotFollowed("it acts on a parameter, or two tensors meet in it")
    if x.dim is None:
        return Followed(call.shape)
    if not call.is_float:
        return x.over(call.shape, x.dim).unknown()
    if call.node.op != "call_module" and any(
        isinstance(each, fx.Node) for each in _flat((call.node.args[1:], call.node.kwargs))
    ):
        return x.unknown()
    return x.constant(x.known, _apply(call, x.value))


def _identity(f: Follower, call: Call, x: Any, *_: Any, **__: Any) -> Followed:
    if not isinstance(x, Followed) or tuple(x.shape) != call.shape:
        raise NotFollowed("it acts on a parameter")
    source = call.node.args[0]
    is_same = isinstance(source, fx.Node) and source.meta["value"].dtype == call.node.meta["value"].dtype
    return x if is_same or x.dim is None else x.unknown()


def _dropout(f: Follower, call: Call, x: Any, p: float = 0.5, training: bool = True, *_: Any, **__: Any) -> Followed:
    if call.module.training if call.module is not None else training:
        raise NotFollowed("it is random in eval mode, too")
    return _identity(f, call, x)


def _prelu(f: Follower, call: Call, x: Any, weight: Any = None) -> Followed:
    weight = f.own(call, "weight") if call.module is not None else weight
    if not isinstance(x, Followed) or not isinstance(weight, Stored):
        raise NotFollowed("its weight is not a parameter of the model")
    if weight.tensor.numel() == 1:
        f.store.pin(weight, range(weight.tensor.ndim), call.where)
    else:
        x = f.at(x, min(1, len(x.shape) - 1), call.where)
        f.channels.join(x.ids, f.store.ids(weight, 0))
    if x.dim is None:
        return Followed(call.shape)
    slope = weight.tensor.detach().to(x.value.dtype)
    return x.constant(x.known, torch.where(x.value > 0, x.value, slope * x.value))


def _binary(f: Follower, call: Call, a: Any, b: Any, **kwargs: Any) -> Any:
    if isinstance(a, tuple) and isinstance(b, tuple):
        return a + b
    name = getattr(call.node.target, "__name__", call.node.target)
    is_product = str(name).strip("_") in ("mul", "imul", "multiply")
    if isinstance(a, ChannelCount) or isinstance(b, ChannelCount):
        if is_product and isinstance(a, ChannelCount) and type(b) is int:
            return ChannelCount(a.ids.repeat_interleave(b))
        if is_product and isinstance(b, ChannelCount) and type(a) is int:
            return ChannelCount(b.ids.repeat_interleave(a))
        raise NotFollowed("it computes with the number of channels")
    if any(isinstance(each, (Followed, Stored)) for each in kwargs.values()):
        raise NotFollowed("it has a tensor as an option")
    operands = [each for each in (a, b) if isinstance(each, (Followed, Stored))]
    for each in (a, b):
        if not isinstance(each, (Followed, Stored, int, float)):
            raise NotFollowed(f"it combines a tensor and a {type(each).__name__}")
    places = [each.dim - len(each.shape) for each in operands if isinstance(each, Followed) and each.dim is not None]
    if not places:
        f._look_at_all(operands, call.where, "")
        return Followed(call.shape)
    place, size = places[0], call.shape[places[0]]
    aligned = [_aligned(f, call, each, place, size) if each in operands else each for each in (a, b)]
    with_channels = [each for each in aligned if isinstance(each, Followed)]
    if not with_channels:
        return Followed(call.shape)
    for each in with_channels[1:]:
        f.channels.join(with_channels[0].ids, each.ids)
    known, vectors = torch.ones(size, dtype=torch.bool), []
    for each in aligned:
        known = known & (each.known if isinstance(each, Followed) else each is not None)
        vectors.append(each.value if isinstance(each, Followed) else 1.0 if each is None else each)
    value = _apply(call, *vectors)
    if is_product:
        # Nothing times zero is anything else, as long as it is finite.
        zero = torch.zeros(size, dtype=torch.bool)
        for each in aligned:
            if isinstance(each, Followed):
                zero |= each.known & (each.value == 0)
        known, value = known | zero, torch.where(zero, 0.0, value)
    result = replace(with_channels[0], shape=call.shape, dim=len(call.shape) + place)
    return result.constant(known, value) if call.is_float else result.unknown()


def _aligned(f: Follower, call: Call, operand: Followed | Stored, place: int, size: int) -> Followed | None:
    """An operand's channels at a place counted from the end; None where one unknown number stands for all of them."""
    shape = operand.shape if isinstance(operand, Followed) else tuple(operand.tensor.shape)
    dim = len(shape) + place
    if isinstance(operand, Stored):
        others = [each for each in range(len(shape)) if each != dim]
        f.store.pin(operand, others, call.where)
        if dim < 0 or shape[dim] != size:
            f.store.pin(operand, (dim,) if dim >= 0 else (), call.where)
            return None
        rows = operand.tensor.detach().movedim(dim, 0).reshape(size, -1)
        known, value = (rows == rows[:, :1]).all(dim=1), rows[:, 0]
        template = Followed((size,), 0, f.store.ids(operand, dim), known, value)
        return template.constant(known, value)
    if dim < 0 or shape[dim] != size:
        f.stay(operand, call.where, "one channel is spread over several" if operand.dim is not None else "")
        return None
    if operand.dim == dim:
        return operand
    if size == 1:
        f.stay(operand, call.where, "channels of two dimensions meet")
        return None
    return f.at(operand, dim, call.where)


# -- norm layers


def _batch_norm(f: Follower, call: Call, x: Any) -> Followed:
    module = call.module
    assert isinstance(module, nn.modules.batchnorm._NormBase)
    is_instance_norm = isinstance(module, nn.modules.instancenorm._InstanceNorm)
    spatial = {"1": 1, "2": 2, "3": 3}[type(module).__name__[-2]]
    x = f.at(x, len(x.shape) - spatial - 1 if is_instance_norm else 1, call.where)
    for name in ("weight", "bias", "running_mean", "running_var"):
        stored = f.own(call, name)
        if stored is not None:
            f.channels.join(x.ids, f.store.ids(stored, 0))
    if module.weight is None and module.running_mean is None:
        path = str(call.node.target)
        f.channels.join(x.ids, f.norms.setdefault(path, x.ids))
    weight, bias = module.weight, module.bias
    zeros = torch.zeros_like(x.value)
    shift = zeros if bias is None else bias.detach().to(zeros.dtype)
    is_flat = torch.zeros_like(x.known) if weight is None else weight.detach() == 0
    if module.running_mean is None or module.running_var is None or is_instance_norm:
        # What it subtracts is the mean of a constant, rounded, and it divides by almost nothing.
        return x.constant(is_flat, shift)
    value = F.batch_norm(x.value[None], module.running_mean, module.running_var, weight, bias, eps=module.eps)[0]
    return x.constant(x.known | is_flat, torch.where(is_flat, shift, value.detach()))


def _statistics(f: Follower, call: Call, x: Any, *_: Any, **__: Any) -> Any:
    raise NotFollowed("a removal would change the statistics that it divides by")


# -- embeddings


def _embedding(f: Follower, call: Call, x: Any) -> Followed:
    module = call.module
    assert isinstance(module, nn.Embedding)
    weight = f.own(call, "weight")
    assert weight is not None
    if module.max_norm is not None:
        raise NotFollowed("max_norm rescales its rows by norms over all columns")
    f.store.pin(weight, (0,), call.where)
    rows = weight.tensor.detach()
    known = (rows == rows[:1]).all(dim=0)
    value = rows[0] if len(rows) else torch.zeros(rows.shape[1])
    return Followed(call.shape, len(call.shape) - 1, f.store.ids(weight, 1), known, value).constant(known, value)


# -- pooling, padding


def _spatial(x: Any, count: int) -> Followed:
    if not isinstance(x, Followed):
        raise NotFollowed("it acts on a parameter")
    if x.dim is not None and x.dim >= len(x.shape) - count:
        raise NotFollowed("it pools over the channels")
    return x


def _pool(count: int) -> Callable[..., Followed]:
    def handler(f: Follower, call: Call, x: Any, *_: Any, **__: Any) -> Followed:
        if not isinstance(call.node.meta["value"], Tensor):
            raise NotFollowed("it returns indices")
        return _spatial(x, count).over(call.shape, x.dim)

    return handler


def _avg_pool(count: int) -> Callable[..., Followed]:
    def handler(f: Follower, call: Call, x: Any, *args: Any, **kwargs: Any) -> Followed:
        names = ("kernel_size", "stride", "padding", "ceil_mode", "count_include_pad", "divisor_override")
        options: dict[str, Any] = {
            "padding": 0,
            "count_include_pad": True,
            **dict(zip(names, args, strict=False)),
            **kwargs,
        }
        if call.module is not None:
            options = {name: getattr(call.module, name, None) for name in names}
        x = _spatial(x, count).over(call.shape, x.dim)
        is_padded = any(_flat(options["padding"])) and options["count_include_pad"]
        has_divisor = options.get("divisor_override") is not None
        return replace(x, known=x.known & (x.value == 0)) if is_padded or has_divisor else x

    return handler


def _interpolate(f: Follower, call: Call, x: Any, *_: Any, **__: Any) -> Followed:
    return _spatial(x, len(x.shape) - 2).over(call.shape, x.dim)


def _pad(f: Follower, call: Call, x: Any, pad: Any, mode: str = "constant", value: Any = None) -> Followed:
    if not isinstance(x, Followed) or not all(type(each) is int for each in _flat(pad)):
        raise NotFollowed("how much it pads is computed")
    if x.dim is None:
        return Followed(call.shape)
    count = len(x.shape) - x.dim
    if len(pad) >= 2 * count and any(pad[2 * count - 2 : 2 * count]):
        raise NotFollowed("it pads the channels")
    if mode != "constant":
        return x.over(call.shape, x.dim)
    return replace(x.over(call.shape, x.dim), known=x.known & (x.value == (value or 0.0)))


def _pad_module(f: Follower, call: Call, x: Any) -> Followed:
    module: Any = call.module
    is_constant = isinstance(module, nn.modules.padding._ConstantPadNd)
    mode = "constant" if is_constant else "other"
    return _pad(f, call, x, module.padding, mode, module.value if is_constant else None)


# -- shapes


def _size(f: Follower, call: Call, x: Any, dim: Any = None) -> Any:
    if isinstance(x, Stored):
        sizes: tuple[Any, ...] = tuple(ChannelCount(f.store.ids(x, each)) for each in range(x.tensor.ndim))
    else:
        sizes = tuple(ChannelCount(x.ids) if each == x.dim else size for each, size in enumerate(x.shape))
    return sizes if dim is None else sizes[dim]


def _getattr(f: Follower, call: Call, x: Any, name: str) -> Any:
    if name == "shape" and isinstance(x, (Followed, Stored)):
        return _size(f, call, x)
    if name in ("T", "mT") and isinstance(x, Followed) and (len(x.shape) == 2 or name == "mT"):
        return _transpose(f, call, x, -2, -1)
    if name == "data" and isinstance(x, Followed):
        return x
    if not any(isinstance(each, (Followed, Stored, ChannelCount)) for each in _flat(x)):
        return call.node.meta["value"]
    raise NotFollowed(f".{name} is not among what compact follows")


def _reshape(f: Follower, call: Call, x: Any, *sizes: Any, shape: Any = None) -> Followed:
    if shape is not None:
        sizes = tuple(shape)
    elif len(sizes) == 1 and isinstance(sizes[0], (tuple, list)):
        sizes = tuple(sizes[0])
    if not isinstance(x, Followed) or any(not isinstance(each, (int, ChannelCount)) for each in sizes):
        raise NotFollowed("it reshapes a parameter, or to a dtype")
    if x.dim is None:
        f._look_at_all(sizes, call.where, "")
        return Followed(call.shape)
    result = _regroup(x, call.shape)
    assert result.dim is not None
    for i, size in enumerate(sizes):
        if isinstance(size, ChannelCount):
            if i == result.dim and size.ids.shape == result.ids.shape:
                f.channels.join(size.ids, result.ids)
            else:
                raise NotFollowed("it computes with the number of channels")
        elif i == result.dim and size != -1:
            raise NotFollowed(f"the size {size} stands in the code; -1 or x.size() would follow")
    return result


def _regroup(x: Followed, shape: tuple[int, ...]) -> Followed:
    """Where a reshape puts the channels: into a dimension that is made of whole old ones."""
    assert x.dim is not None
    old, d = x.shape, x.dim
    if old[d] <= 1:
        raise NotFollowed("a single channel is reshaped")
    for e in range(len(shape)):
        before, after = math.prod(shape[:e]), math.prod(shape[: e + 1])
        begins = [a for a in range(d + 1) if math.prod(old[:a]) == before]
        ends = [b for b in range(d, len(old)) if math.prod(old[: b + 1]) == after]
        if not begins or not ends:
            continue
        a, b = begins[-1], ends[0]
        if a == 0 and math.prod(old[:d]) > 1:
            raise NotFollowed("it puts examples and channels into one dimension")
        places = torch.arange(old[d]).repeat_interleave(math.prod(old[d + 1 : b + 1])).repeat(math.prod(old[a:d]))
        return x.pick(shape, e, places)
    raise NotFollowed("it splits the channels")


def _flatten(f: Follower, call: Call, x: Any, *_: Any, **__: Any) -> Followed:
    if not isinstance(x, Followed):
        raise NotFollowed("it acts on a parameter")
    return Followed(call.shape) if x.dim is None else _regroup(x, call.shape)


def _unflatten(f: Follower, call: Call, x: Any, dim: Any = None, *_: Any, **__: Any) -> Followed:
    if call.module is not None:
        dim = call.module.dim
    if not isinstance(x, Followed) or type(dim) is not int:
        raise NotFollowed("it acts on a parameter")
    if x.dim is None:
        return Followed(call.shape)
    if dim % len(x.shape) == x.dim:
        raise NotFollowed("it splits the channels")
    return x.over(call.shape, x.dim + (len(call.shape) - len(x.shape) if dim % len(x.shape) < x.dim else 0))


def _expand(f: Follower, call: Call, x: Any, *sizes: Any) -> Followed:
    if len(sizes) == 1 and isinstance(sizes[0], (tuple, list)):
        sizes = tuple(sizes[0])
    if not isinstance(x, Followed):
        raise NotFollowed("it expands a parameter")
    if x.dim is None:
        f._look_at_all(sizes, call.where, "")
        return Followed(call.shape)
    dim = x.dim + len(call.shape) - len(x.shape)
    for i, size in enumerate(sizes):
        if isinstance(size, ChannelCount):
            if i != dim or size.ids.shape != x.ids.shape:
                raise NotFollowed("it computes with the number of channels")
            f.channels.join(size.ids, x.ids)
        elif i == dim and size != -1:
            raise NotFollowed(f"the size {size} stands in the code; -1 would follow")
    return x.over(call.shape, dim)


def _moved(x: Any, order: Iterable[int]) -> Followed:
    if not isinstance(x, Followed):
        raise NotFollowed("it acts on a parameter")
    order = [each % len(x.shape) for each in order]
    return x.over((x.shape[each] for each in order), None if x.dim is None else order.index(x.dim))


def _permute(f: Follower, call: Call, x: Any, *dims: Any, **kwargs: Any) -> Followed:
    dims = tuple(_flat((dims, kwargs)))
    if any(type(each) is not int for each in dims):
        raise NotFollowed("its order is computed")
    return _moved(x, dims)


def _transpose(f: Follower, call: Call, x: Any, dim0: Any, dim1: Any) -> Followed:
    if not isinstance(x, Followed) or type(dim0) is not int or type(dim1) is not int:
        raise NotFollowed("it acts on a parameter")
    order = list(range(len(x.shape)))
    order[dim0], order[dim1] = order[dim1], order[dim0]
    return _moved(x, order)


def _squeeze(f: Follower, call: Call, x: Any, dim: Any = None) -> Followed:
    if not isinstance(x, Followed):
        raise NotFollowed("it acts on a parameter")
    if x.dim is None:
        return Followed(call.shape)
    if type(dim) is not int:
        raise NotFollowed("without a number of a dimension it would squeeze a last channel away")
    dim %= len(x.shape)
    if dim == x.dim:
        raise NotFollowed("it squeezes the channels")
    return x.over(call.shape, x.dim - (dim < x.dim and x.shape[dim] == 1))


def _unsqueeze(f: Follower, call: Call, x: Any, dim: Any) -> Followed:
    if not isinstance(x, Followed) or type(dim) is not int:
        raise NotFollowed("it acts on a parameter")
    if x.dim is None:
        return Followed(call.shape)
    return x.over(call.shape, x.dim + (dim % (len(x.shape) + 1) <= x.dim))


def _getitem(f: Follower, call: Call, x: Any, index: Any) -> Any:
    if isinstance(x, (tuple, list)):
        return x[index]
    if not isinstance(x, Followed):
        raise NotFollowed("it takes a part of a parameter")
    if x.dim is None:
        f._look_at_all(index, call.where, "")
        return Followed(call.shape)
    indices = list(index) if isinstance(index, tuple) else [index]
    if any(
        not (each is None or each is ... or isinstance(each, slice) or type(each) is int) for each in indices
    ) or any(isinstance(each, ChannelCount) for each in _flat(indices)):
        raise NotFollowed("its indices are computed")
    missing = len(x.shape) - sum(each is not None and each is not ... for each in indices)
    if ... in indices:
        i = indices.index(...)
        indices[i : i + 1] = [slice(None)] * missing
    else:
        indices += [slice(None)] * missing
    old, new = 0, 0
    for each in indices:
        if each is None:
            new += 1
            continue
        if old == x.dim:
            if each != slice(None):
                raise NotFollowed("it takes a part of the channels")
            return x.over(call.shape, new)
        old, new = old + 1, new + isinstance(each, slice)
    raise AssertionError("an index for each dimension")


# -- several tensors


def _cat(f: Follower, call: Call, tensors: Any, dim: Any = 0, axis: Any = None) -> Followed:
    dim = dim if axis is None else axis
    if not all(isinstance(each, Followed) for each in tensors) or type(dim) is not int:
        raise NotFollowed("a parameter is among what it puts together")
    dim %= len(call.shape)
    tensors = [each for each in tensors if each.shape != (0,)]
    places = {each.dim for each in tensors} - {None}
    if not places:
        return Followed(call.shape)
    if dim in places:
        parts = [f.at(each, dim, call.where) for each in tensors]
        ids, known, value = (torch.cat(each) for each in zip(*((p.ids, p.known, p.value) for p in parts), strict=True))
        return Followed(call.shape, dim, ids, known, value)
    place = min(places)
    return _together(f, call, tensors, place, place)


def _stack(f: Follower, call: Call, tensors: Any, dim: Any = 0) -> Followed:
    if not all(isinstance(each, Followed) for each in tensors) or type(dim) is not int:
        raise NotFollowed("a parameter is among what it puts together")
    places = {each.dim for each in tensors} - {None}
    if not places:
        return Followed(call.shape)
    place = min(places)
    return _together(f, call, tensors, place, place + (dim % len(call.shape) <= place))


def _together(f: Follower, call: Call, tensors: list[Followed], place: int, new: int) -> Followed:
    parts = [f.at(each, place, call.where) for each in tensors]
    first, known = parts[0], parts[0].known
    for each in parts[1:]:
        f.channels.join(first.ids, each.ids)
        known = known & each.known & (each.value == first.value)
    return replace(first, shape=call.shape, dim=new, known=known)


def _parts(x: Followed, count: int) -> list[Followed]:
    assert x.dim is not None
    if x.shape[x.dim] % count:
        raise NotFollowed("its parts are not equal")
    return [x.pick(x.shape, x.dim, places) for places in torch.arange(x.shape[x.dim]).chunk(count)]


def _chunk(f: Follower, call: Call, x: Any, chunks: Any, dim: Any = 0) -> tuple[Followed, ...]:
    if not isinstance(x, Followed) or type(chunks) is not int or type(dim) is not int:
        raise NotFollowed("it acts on a parameter")
    shapes = [tuple(each.shape) for each in call.node.meta["value"]]
    if x.dim is None or dim % len(x.shape) != x.dim:
        return tuple(x.over(shape, x.dim) for shape in shapes)
    parts = _parts(x, chunks)
    for each in parts[1:]:
        f.channels.join(parts[0].ids, each.ids)
    return tuple(each.over(shape, x.dim) for each, shape in zip(parts, shapes, strict=True))


def _split(f: Follower, call: Call, x: Any, size: Any = None, dim: Any = 0, **kwargs: Any) -> tuple[Followed, ...]:
    if not isinstance(x, Followed) or type(dim) is not int:
        raise NotFollowed("it acts on a parameter")
    if x.dim is not None and dim % len(x.shape) == x.dim:
        raise NotFollowed("the sizes of its parts stand in the code; chunk would follow")
    return tuple(x.over(each.shape, x.dim) for each in call.node.meta["value"])


def _glu(f: Follower, call: Call, x: Any, dim: Any = -1) -> Followed:
    dim = call.module.dim if isinstance(call.module, nn.GLU) else dim
    if not isinstance(x, Followed) or type(dim) is not int:
        raise NotFollowed("it acts on a parameter")
    if x.dim is None or dim % len(x.shape) != x.dim:
        return x.over(call.shape, x.dim).unknown() if x.dim is not None else Followed(call.shape)
    a, b = _parts(x, 2)
    f.channels.join(a.ids, b.ids)
    is_zero = a.known & (a.value == 0)
    return a.over(call.shape, x.dim).constant(
        is_zero | (a.known & b.known), torch.where(is_zero, 0.0, a.value * b.value.sigmoid())
    )


# -- over dimensions


def _dims(x: Followed, dim: Any) -> set[int]:
    dims = tuple(_flat(dim))
    if any(type(each) is not int for each in dims):
        return set(range(len(x.shape)))
    return {each % len(x.shape) for each in dims}


def _reduce(keeps_constants: bool) -> Callable[..., Followed]:
    def handler(f: Follower, call: Call, x: Any, dim: Any = None, keepdim: bool = False, **_: Any) -> Followed:
        if not isinstance(x, Followed) or not isinstance(call.node.meta["value"], Tensor):
            raise NotFollowed("it acts on a parameter, or returns indices")
        if x.dim is None:
            return Followed(call.shape)
        dims = _dims(x, dim)
        if x.dim in dims:
            raise NotFollowed("it is over the channels")
        new = x.over(call.shape, x.dim - (0 if keepdim else sum(each < x.dim for each in dims)))
        return new if keeps_constants else replace(new, known=new.known & (new.value == 0))

    return handler


def _softmax(f: Follower, call: Call, x: Any, dim: Any = None, *_: Any, **__: Any) -> Followed:
    dim = call.module.dim if call.module is not None else dim
    if not isinstance(x, Followed):
        raise NotFollowed("it acts on a parameter")
    if x.dim is None:
        return Followed(call.shape)
    if type(dim) is not int or dim % len(x.shape) == x.dim:
        raise NotFollowed("it is over the channels")
    return x.unknown()


# -- attention


def _attention(
    f: Follower,
    call: Call,
    query: Any,
    key: Any,
    value: Any,
    key_padding_mask: Any = None,
    need_weights: bool = True,
    attn_mask: Any = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
) -> Any:
    module = call.module
    assert isinstance(module, (nn.MultiheadAttention, CompactAttention))
    in_weight, in_bias = f.own(call, "in_proj_weight"), f.own(call, "in_proj_bias")
    if in_weight is None or module.bias_k is not None or module.add_zero_attn:
        raise NotFollowed("attention is followed with one in_proj_weight, and without add_bias_kv and add_zero_attn")
    if any(user.target is not operator.getitem or user.args[1] != 0 for user in call.node.users):
        raise NotFollowed("its attention weights are used, too")
    if isinstance(attn_mask, Followed) and len(attn_mask.shape) == 3:
        raise NotFollowed("its mask is another for each head")
    path = str(call.node.target)
    out_weight = f.store.find(f"{path}.out_proj.weight", module.out_proj.weight)
    out_bias = f.store.find(f"{path}.out_proj.bias", module.out_proj.bias)
    assert out_weight is not None
    size, heads = module.head_dim, module.num_heads
    each_head = f.channels.new(heads)
    rows = each_head.repeat_interleave(size)
    f.channels.join(f.store.ids(in_weight, 0), rows.repeat(3))
    if in_bias is not None:
        f.channels.join(f.store.ids(in_bias, 0), rows.repeat(3))
    known, constant = torch.zeros(0, dtype=torch.bool), torch.zeros(0)
    for i, x in enumerate((query, key, value)):
        x = f.at(x, -1, call.where)
        f.channels.join(x.ids, f.store.ids(in_weight, 1))
        part = in_weight.tensor.detach()[i * len(rows) : (i + 1) * len(rows)]
        known, constant = f.read(call.where, x, rows, part, Bias(in_bias, offset=i * len(rows)))
    # The weights over the keys add up to 1, unless a mask leaves none.
    if attn_mask is not None or key_padding_mask is not None:
        known = known & (constant == 0)
    inner = Followed((len(rows),), 0, rows, known, constant)
    f.arrays.append(each_head)
    f.channels.join(f.store.ids(out_weight, 1), rows)
    outputs = f.store.ids(out_weight, 0)
    if out_bias is not None:
        f.channels.join(f.store.ids(out_bias, 0), outputs)
    known, constant = f.read(f"{path}.out_proj", inner, outputs, out_weight.tensor.detach(), Bias(out_bias))
    f.attentions.append(Attention(path, each_head))
    weights = call.node.meta["value"][1]
    shape = tuple(call.node.meta["value"][0].shape)
    return Followed(shape, len(shape) - 1, outputs, known, constant), _unknown(weights)


# -- the table


def _table() -> dict[Any, Callable[..., Any]]:
    table: dict[Any, Callable[..., Any]] = {}

    def add(handler: Callable[..., Any], names: str, in_place: bool = False) -> None:
        """Functions of torch and torch.nn.functional, and methods of tensors, under these names."""
        for name in names.split():
            for each in (name, f"{name}_") if in_place else (name,):
                for space in (torch, F):
                    if hasattr(space, each):
                        table[getattr(space, each)] = handler
                if hasattr(Tensor, each):
                    table[each] = handler

    def add_modules(handler: Callable[..., Any], names: str) -> None:
        for name in names.split():
            table[getattr(nn, name)] = handler

    add(
        _unary,
        "relu relu6 leaky_relu elu selu celu gelu silu mish sigmoid tanh softplus softsign hardtanh hardswish "
        "hardsigmoid hardshrink softshrink tanhshrink logsigmoid threshold abs exp expm1 neg square sqrt rsqrt sin cos "
        "clamp clip log1p pow erf",
        in_place=True,
    )
    table[operator.neg] = table[operator.pow] = _unary
    add_modules(
        _unary,
        "ReLU ReLU6 LeakyReLU ELU SELU CELU GELU SiLU Mish Sigmoid Tanh Softplus Softsign Hardtanh Hardswish "
        "Hardsigmoid Hardshrink Softshrink Tanhshrink LogSigmoid Threshold",
    )
    add(_binary, "add sub mul div true_divide multiply subtract divide maximum minimum", in_place=True)
    for name in ("add", "sub", "mul", "truediv"):
        table[getattr(operator, name)] = table[getattr(operator, f"i{name}")] = _binary
    add(_identity, "contiguous clone detach float double to type_as")
    add_modules(_identity, "Identity")
    add(_dropout, "dropout dropout1d dropout2d dropout3d alpha_dropout feature_alpha_dropout")
    add_modules(_dropout, "Dropout Dropout1d Dropout2d Dropout3d AlphaDropout FeatureAlphaDropout")
    add(_prelu, "prelu")
    add_modules(_prelu, "PReLU")
    add(_linear, "linear")
    add_modules(_linear_module, "Linear")
    table[nn.modules.linear.NonDynamicallyQuantizableLinear] = _linear_module
    add_modules(_conv_module, "Conv1d Conv2d Conv3d ConvTranspose1d ConvTranspose2d ConvTranspose3d")
    add_modules(_batch_norm, "BatchNorm1d BatchNorm2d BatchNorm3d InstanceNorm1d InstanceNorm2d InstanceNorm3d")
    add(_statistics, "layer_norm rms_norm group_norm local_response_norm normalize")
    add_modules(_statistics, "LayerNorm RMSNorm GroupNorm LocalResponseNorm")
    add_modules(_embedding, "Embedding")
    add_modules(_attention, "MultiheadAttention")
    table[CompactAttention] = _attention
    for n in (1, 2, 3):
        add(_pool(n), f"max_pool{n}d adaptive_avg_pool{n}d adaptive_max_pool{n}d")
        add_modules(_pool(n), f"MaxPool{n}d AdaptiveAvgPool{n}d AdaptiveMaxPool{n}d")
        add(_avg_pool(n), f"avg_pool{n}d")
        add_modules(_avg_pool(n), f"AvgPool{n}d")
        add_modules(_pad_module, f"ConstantPad{n}d ZeroPad{n}d ReflectionPad{n}d ReplicationPad{n}d")
    add(_pad, "pad")
    add(_interpolate, "interpolate")
    add_modules(_interpolate, "Upsample UpsamplingNearest2d UpsamplingBilinear2d")
    add(_flatten, "flatten")
    add_modules(_flatten, "Flatten")
    add(_unflatten, "unflatten")
    add_modules(_unflatten, "Unflatten")
    add(_reshape, "reshape view")
    add(_expand, "expand")
    add(_permute, "permute")
    add(_transpose, "transpose swapaxes swapdims")
    add(_squeeze, "squeeze")
    add(_unsqueeze, "unsqueeze")
    add(_cat, "cat concat concatenate")
    add(_stack, "stack")
    add(_chunk, "chunk")
    add(_split, "split")
    add(_glu, "glu")
    add_modules(_glu, "GLU")
    add(_reduce(True), "mean amax amin")
    add(_reduce(False), "sum")
    add(_softmax, "softmax log_softmax softmin")
    add_modules(_softmax, "Softmax LogSoftmax Softmin")
    table["size"] = _size
    table[getattr] = _getattr
    table[operator.getitem] = _getitem
    return table


HANDLERS = _table()
