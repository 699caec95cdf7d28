"""Every length, alignment and layout gives the reference's result, and no element outside a view is written."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import needs_cpp
from helpers import OPTIMIZERS, REGULARIZED, FusedRegAdam, FusedRegSGD, make_params, regularized

from fusedreg.backends.base import Entry
from fusedreg.backends.tables import CompiledTables, PythonTables

pytestmark = needs_cpp

SENTINEL = 12345.0


def most_states(cls: type) -> dict[str, Any]:
    """The options of the variant that needs the most state tensors."""
    sizes = {
        name: len(cls.spec.needed_states(cls([torch.zeros(1)], **options).param_groups[0]))
        for name, options in cls.spec.variants.items()
    }
    return dict(cls.spec.variants[max(sizes, key=sizes.__getitem__)])


# One optimizer of each rule.
CONFIGURATIONS = {cls.spec.name: (cls, most_states(cls)) for cls in reversed(OPTIMIZERS)}
DTYPES = {"fp32": torch.float32, "fp64": torch.float64, "bf16": torch.bfloat16, "fp16": torch.float16}


def view_with_sentinels(values: torch.Tensor, offset: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A misaligned 1-d view in the middle of a buffer of sentinels, holding `values`."""
    buffer = torch.full((values.numel() + offset + 70,), SENTINEL, dtype=values.dtype)
    view = buffer[offset : offset + values.numel()]
    view.copy_(values)
    return buffer, view


# How 16 bits are read and written is the same in all rules.
@pytest.mark.parametrize(
    ("configuration", "dtype"),
    [(name, dtype) for name in CONFIGURATIONS for dtype in DTYPES if dtype == "fp32" or name in ("adam", "sgd")],
)
def test_every_length_and_misalignment_around_the_vector_width(configuration, dtype, instruction_set) -> None:
    (cls, flags), dtype = CONFIGURATIONS[configuration], DTYPES[dtype]
    lengths_and_offsets = [(length, (7 * length) % 17) for length in range(131)]
    steps, buffers, results = 2, [], {}
    weights = [torch.randn(length, dtype=torch.float64).to(dtype) for length, _ in lengths_and_offsets]
    gradients = [[torch.randn(w.shape, dtype=torch.float64).to(dtype) for w in weights] for _ in range(steps)]
    for backend in ("cpp", "reference"):
        params = []
        for weight, (_, offset) in zip(weights, lengths_and_offsets, strict=True):
            buffer, view = view_with_sentinels(weight, offset)
            buffers.append((buffer, offset, weight.numel()))
            params.append(view.requires_grad_())
        optimizer = cls(params, backend=backend, **{**regularized(cls), **flags})
        for step in range(steps):
            for param, gradient, (_, offset) in zip(params, gradients[step], lengths_and_offsets, strict=True):
                buffer, view = view_with_sentinels(gradient, (offset * 5) % 13)
                buffers.append((buffer, (offset * 5) % 13, gradient.numel()))
                param.grad = view
            optimizer.step()
        results[backend] = [param.detach() for param in params]
    tolerance = {torch.float64: 1e-13, torch.float32: 3e-6, torch.bfloat16: 0.04, torch.float16: 0.005}[dtype]
    for ours, truth in zip(results["cpp"], results["reference"], strict=True):
        torch.testing.assert_close(ours, truth, rtol=tolerance, atol=tolerance)
    for buffer, offset, length in buffers:
        assert (buffer[:offset] == SENTINEL).all()
        assert (buffer[offset + length :] == SENTINEL).all()


@pytest.mark.parametrize("numel", [32767, 32768, 32769, 65536 + 1, 3 * 32768 + 5])
def test_lengths_around_the_chunk_size(numel, two_threads) -> None:
    results = []
    for backend in ("cpp", "reference"):
        torch.manual_seed(2)
        param = torch.nn.Parameter(torch.randn(numel, dtype=torch.float64))
        param.grad = torch.randn(numel, dtype=torch.float64)
        FusedRegAdam([param], backend=backend, **REGULARIZED).step()
        results.append(param.detach())
    torch.testing.assert_close(*results, rtol=1e-12, atol=1e-13)


def strided(t):  # every second column of a wider tensor
    return t.new_full((t.shape[0], 2 * t.shape[1]), SENTINEL)[:, ::2].copy_(t)


def transposed(t):
    return t.t().contiguous().t()


def rows_of_wider(t):
    return t.new_full((t.shape[0], t.shape[1] + 3), SENTINEL)[:, 1:-2].copy_(t)


def gaps_between_rows(t):
    return t.new_full((2 * t.shape[0], t.shape[1]), SENTINEL)[::2].copy_(t)


def same(t):
    return t.clone()


LAYOUTS = {f.__name__: f for f in (same, strided, transposed, rows_of_wider, gaps_between_rows)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("grad_layout", LAYOUTS)
@pytest.mark.parametrize("param_layout", LAYOUTS)
@pytest.mark.parametrize("configuration", CONFIGURATIONS)
def test_layouts(configuration, param_layout, grad_layout, dtype) -> None:
    """A layout changes nothing but the place in a vector (an ulp), and sentinels in the gaps stay."""
    cls, flags = CONFIGURATIONS[configuration]
    values = torch.randn(9, 14).to(dtype)
    gradients = [torch.randn(9, 14).to(dtype) for _ in range(3)]
    results = []
    for layout, its_grad_layout in ((same, same), (LAYOUTS[param_layout], LAYOUTS[grad_layout])):
        param = layout(values).requires_grad_()
        optimizer = cls([param], backend="cpp", **{**regularized(cls), **flags})
        for gradient in gradients:
            param.grad = its_grad_layout(gradient)
            optimizer.step()
        results.append((param, optimizer.state[param]))
    (plain, plain_state), (laid_out, state) = results
    assert laid_out.stride() == LAYOUTS[param_layout](values).stride()
    ulps = 4 * torch.finfo(dtype).eps
    torch.testing.assert_close(laid_out, plain, rtol=ulps, atol=ulps)
    for name in cls.spec.needed_states(optimizer.param_groups[0]):
        torch.testing.assert_close(state[name], plain_state[name], rtol=ulps, atol=ulps)
    if param_layout not in ("same", "transposed"):
        base = laid_out._base if laid_out._base is not None else laid_out
        inside = torch.zeros_like(base, dtype=torch.bool)
        inside.as_strided(laid_out.shape, laid_out.stride(), laid_out.storage_offset()).fill_(True)
        assert (base.detach()[~inside] == SENTINEL).all()
        assert (~inside).any()


def test_channels_last_with_a_contiguous_gradient() -> None:
    results = []
    values, gradient = torch.randn(4, 3, 5, 6), torch.randn(4, 3, 5, 6)
    for memory_format in (torch.contiguous_format, torch.channels_last):
        param = torch.nn.Parameter(values.clone(memory_format=memory_format))
        optimizer = FusedRegAdam([param], backend="cpp", **REGULARIZED)
        for _ in range(3):
            param.grad = gradient.clone(memory_format=torch.contiguous_format)
            optimizer.step()
        results.append(param.detach())
    assert results[0].equal(results[1])


def copies_in(do) -> int:
    with torch.autograd.profiler.profile() as profile:
        do()
    return sum(event.name == "aten::copy_" for event in profile.function_events)


@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize("format_of_param", ["contiguous", "channels_last"])
def test_only_strides_that_say_something_are_compared(size, format_of_param) -> None:
    """A 1x1 convolution is the same in memory in both formats, whatever its strides say: nothing is copied."""
    strides = {
        "contiguous": (4 * size * size, size * size, size, 1),
        "channels_last": (4 * size * size, 1, 4 * size, 4),
    }
    its, others = (format_of_param, *(each for each in strides if each != format_of_param))
    made = [torch.randn(24 * size * size).as_strided((6, 4, size, size), strides[each]) for each in (its, others)]
    param = torch.nn.Parameter(made[0])
    optimizer = FusedRegAdam([param], backend="cpp", **REGULARIZED)
    param.grad = made[1]
    optimizer.step()
    assert (copies_in(optimizer.step) > 0) == (size == 3)
    own = optimizer.state[param]
    entry = Entry(param, 0, own, (own["exp_avg"], own["exp_avg_sq"], None), (own["step"],))
    for kind in (CompiledTables, PythonTables):
        tables = kind(FusedRegAdam.spec, [entry], optimizer.state, True)
        assert (copies_in(lambda: tables.refresh(None)) > 0) == (size == 3), kind  # noqa: B023


def test_expanded_gradient_and_state_of_other_strides() -> None:
    results = []
    values = torch.randn(6, 8)
    for lay_out in (same, transposed):
        param = torch.nn.Parameter(values.clone())
        optimizer = FusedRegAdam([param], backend="cpp", **REGULARIZED)
        param.grad = torch.randn(1, generator=torch.Generator().manual_seed(5)).expand(6, 8)
        optimizer.step()
        state = optimizer.state[param]
        state["exp_avg"] = lay_out(state["exp_avg"])
        state["exp_avg_sq"] = lay_out(state["exp_avg_sq"])
        optimizer.step()
        results.append((param.detach(), state["exp_avg"], state["exp_avg_sq"]))
    for a, b in zip(*results, strict=True):
        assert a.equal(b)


def test_gradient_that_is_its_parameters_own_memory() -> None:
    results = []
    for alias in (True, False):
        param = make_params(((41,),))[0]
        param.grad = param.detach() if alias else param.detach().clone()
        FusedRegSGD([param], lr=0.1, l1=0.01, backend="cpp").step()
        results.append(param.detach())
    assert results[0].equal(results[1])


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_parameters_that_share_memory_go_one_after_the_other(backend) -> None:
    """As torch's for-loop does; side by side in threads, the outcome would be chance."""
    results = []
    for cls, options in ((torch.optim.SGD, {}), (FusedRegSGD, {"backend": backend})):
        base = torch.arange(1.0, 11.0)
        views = [base[part].requires_grad_() for part in (slice(0, 10), slice(1, 3), slice(5, 9), slice(8, 10))]
        for i, view in enumerate(views):
            view.grad = torch.full(view.shape, 0.5 + i)
        cls([views[i] for i in (2, 0, 3, 1)], lr=0.1, weight_decay=0.1, **options).step()
        results.append(base)
    torch.testing.assert_close(*results)


@pytest.mark.filterwarnings("ignore:optimizer contains a parameter group with duplicate parameters")
def test_a_parameter_listed_twice_is_stepped_twice() -> None:
    results = []
    for cls in (torch.optim.Adam, FusedRegAdam):
        param = make_params(((5, 5),))[0]
        param.grad = torch.ones(5, 5)
        optimizer = cls([param, param], lr=0.1)
        optimizer.step()
        results.append((param.detach(), optimizer.state[param]["step"]))
    torch.testing.assert_close(results[0], results[1])


def test_complex_parameters_as_torch() -> None:
    results = []
    for cls in (torch.optim.Adam, FusedRegAdam):
        torch.manual_seed(3)
        param = torch.nn.Parameter(torch.randn(7, 5, dtype=torch.complex64))
        optimizer = cls([param], lr=0.1, weight_decay=0.1)
        for conjugate in (False, True):
            gradient = torch.randn(7, 5, dtype=torch.complex64)
            param.grad = gradient.conj() if conjugate else gradient
            optimizer.step()
        results.append(param.detach())
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("shape", [(7, 5), (1, 1)])
def test_a_gradient_that_is_negated_only_when_it_is_read(shape, backend) -> None:
    """The imaginary part of a conjugated tensor: its memory holds the numbers with the other sign."""
    torch.manual_seed(3)
    start, gradient = torch.randn(shape), torch.randn(shape, dtype=torch.complex64)
    results = []
    for negated in (gradient.conj().imag, torch._neg_view(gradient.imag.clone()), -gradient.imag):
        param = torch.nn.Parameter(start.clone())
        param.grad = negated
        FusedRegAdam([param], lr=0.1, backend=backend).step()
        assert param.grad is negated
        results.append(param.detach())
    torch.testing.assert_close(results[0], results[2], rtol=0, atol=0)
    torch.testing.assert_close(results[1], results[2], rtol=0, atol=0)
