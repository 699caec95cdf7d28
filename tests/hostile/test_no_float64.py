"""A device without float64, as Apple's MPS: nothing is made there that it does not have.

The device is pretended: "meta" tensors, which have no numbers, under a mode that raises as MPS does.
"""

from __future__ import annotations

import pytest
import torch
from helpers import IDS, OPTIMIZER_VARIANTS, FusedRegSGD, regularized
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fusedreg.memory import widest


class NoFloat64(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for each in tree_leaves(result):
            if isinstance(each, torch.Tensor) and each.is_meta and each.dtype == torch.float64:
                raise TypeError(
                    "Cannot convert a MPS Tensor to float64 dtype as the MPS framework doesn't support float64. Please "
                    "use float32 instead."
                )
        return result


@pytest.fixture
def no_float64():
    widest.cache_clear()
    with NoFloat64():
        yield
    widest.cache_clear()


def make_params():
    params = [torch.zeros(shape, device="meta", requires_grad=True) for shape in ((3, 2), (5,))]
    for param in params:
        param.grad = torch.zeros_like(param)
    return params


@pytest.mark.parametrize(("cls", "variant"), OPTIMIZER_VARIANTS, ids=IDS)
def test_a_step_makes_no_float64_there(cls, variant, no_float64) -> None:
    optimizer = cls(make_params(), **regularized(cls, variant))
    optimizer.step()
    optimizer.step()
    assert optimizer.grad_norm.dtype == torch.float32
    assert optimizer.grad_norm.is_meta


def test_scalar_states_in_double_stay_on_the_host(no_float64) -> None:
    optimizer = FusedRegSGD(make_params(), lr=0.1, momentum=0.9)
    optimizer._scalars_on_device = True  # as a GradScaler's first step has it
    optimizer.step()
    for own in optimizer.state.values():
        assert own["momentum_gain"].device.type == "cpu"
