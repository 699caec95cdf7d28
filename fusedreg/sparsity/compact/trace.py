"""A model's forward as a graph, every node with the value that it had on the example inputs."""

from __future__ import annotations

import itertools
import operator
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from .attention import CompactAttention

# What tracing puts in their place meanwhile would record what only computes a value.
_CALL, _GETATTR = nn.Module.__call__, nn.Module.__getattr__

# What removing channels does not change: the branches that depend on these are those of every later call.
_FIXED = ("ndim", "dtype", "device", "layout", "is_nested", "is_sparse", "is_cuda", "is_quantized", "requires_grad")

_THROUGH = (nn.Sequential, nn.TransformerEncoderLayer, nn.TransformerDecoderLayer, nn.TransformerEncoder)


_NOT_THE_USERS = (os.path.dirname(torch.__file__), os.path.dirname(__file__))


class _Proxy(fx.Proxy):
    """A value that is traced, and answers what it may: of which kind it is, and how many dimensions it has."""

    def _value(self) -> Any:
        return self.node.meta.get("value")

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        value = self.__dict__["node"].meta.get("value")
        return type(value) if isinstance(value, (Tensor, tuple)) else _Proxy

    def __getattr__(self, name: str) -> Any:
        if isinstance(self._value(), Tensor):
            if name in _FIXED:
                return getattr(self._value(), name)
            if name in ("dim", "is_floating_point", "is_complex"):
                return getattr(self._value(), name)
        return super().__getattr__(name)

    def __len__(self) -> int:
        if isinstance(self._value(), (tuple, list)):
            return len(self._value())
        return super().__len__()

    def __iter__(self) -> Iterator[Any]:
        if isinstance(self._value(), (tuple, list)):
            return (operator.getitem(self, i) for i in range(len(self._value())))
        return super().__iter__()


class Tracer(fx.Tracer):
    """Runs the model's forward once, node by node, and keeps in ``node.meta["value"]`` what each came to."""

    proxy_buffer_attributes = True
    record_stack_traces = True

    def __init__(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        super().__init__()
        self._inputs = (tuple(args), dict(kwargs))

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Proxy(node, self)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return type(m) is CompactAttention or (
            super().is_leaf_module(m, module_qualified_name) and type(m) not in _THROUGH
        )

    def create_arg(self, a: Any) -> Any:
        return a.node if issubclass(type(a), fx.Proxy) else super().create_arg(a)

    def create_args_for_root(
        self, root_fn: Callable[..., Any], is_module: bool, concrete_args: Any = None
    ) -> tuple[Any, list[Any]]:
        """Tensors among the inputs become placeholders; all else is as it is."""

        def placeholder(value: Any) -> Any:
            if not isinstance(value, Tensor):
                return value
            name = f"input_{sum(node.op == 'placeholder' for node in self.graph.nodes)}"
            self._next_value = value
            return self.create_proxy("placeholder", name, (), {})

        args, kwargs = pytree.tree_map(placeholder, self._inputs)

        def forward(root: nn.Module) -> Any:
            return root_fn(root, *args, **kwargs)

        return forward, [self.root]

    def create_node(
        self, kind: str, target: Any, args: Any, kwargs: Any, name: Any = None, type_expr: Any = None
    ) -> Any:
        node = super().create_node(kind, target, args, kwargs, name, type_expr)
        if kind != "output":
            node.meta["value"] = self._next_value if kind == "placeholder" else self._evaluate(node)
        return node

    def outputs(self, graph: fx.Graph) -> list[Any]:
        """What the traced forward came to."""
        output = next(node for node in graph.nodes if node.op == "output")
        return pytree.tree_leaves(fx.node.map_arg(output.args[0], lambda node: node.meta["value"]))

    def _evaluate(self, node: fx.Node) -> Any:
        def value_of(arg: Any) -> Any:
            return fx.node.map_arg(arg, lambda other: other.meta["value"])

        args, kwargs = value_of(node.args), value_of(node.kwargs)
        with _untraced(), torch.no_grad():
            if node.op == "get_attr":
                return attribute(self.root, str(node.target))
            if node.op == "call_function":
                return node.target(*args, **kwargs)  # type: ignore[operator]
            if node.op == "call_method":
                return getattr(args[0], str(node.target))(*args[1:], **kwargs)
            return self.root.get_submodule(str(node.target))(*args, **kwargs)


@contextmanager
def _untraced() -> Iterator[None]:
    call, getattribute = nn.Module.__call__, nn.Module.__getattr__
    nn.Module.__call__, nn.Module.__getattr__ = _CALL, _GETATTR  # type: ignore[method-assign]
    try:
        yield
    finally:
        nn.Module.__call__, nn.Module.__getattr__ = call, getattribute  # type: ignore[method-assign]


@contextmanager
def without_fast_paths() -> Iterator[None]:
    """Attention's fused paths look into their modules, which a trace does not see."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def attribute(root: nn.Module, path: str) -> Any:
    for name in path.split("."):
        root = getattr(root, name)
    return root


def where(node: fx.Node) -> str:
    """A node as its reader knows it: the module's name, or the function and the line that calls it."""
    if node.op in ("call_module", "get_attr"):
        return str(node.target)
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))
    lines = (node.stack_trace or "").splitlines()
    for place, code in reversed(list(itertools.pairwise(lines))):
        if place.lstrip().startswith("File ") and not any(each in place for each in _NOT_THE_USERS):
            return f"{name} in {code.strip()!r}"
    return str(name)
