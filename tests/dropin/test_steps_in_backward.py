"""One optimizer for each parameter has no norm of the model. For torch's own: tests/distributed/test_wrappers.py."""

from __future__ import annotations

import sys
import types
from typing import Any

import pytest
import torch
from torch import nn

from fusedreg import FusedRegAdam


def step_in_backward(model: nn.Module, **options: Any) -> None:
    """As in torch's tutorial on saving memory."""
    optimizers = {param: FusedRegAdam([param], **options) for param in model.parameters()}

    def step(param: nn.Parameter) -> None:
        optimizers[param].step()
        optimizers[param].zero_grad()

    for param in model.parameters():
        param.register_post_accumulate_grad_hook(step)


def backward(model: nn.Module) -> None:
    model(torch.ones(2, 4)).square().mean().backward()


@pytest.mark.parametrize("max_grad_norm", [1.0, float("inf")])
def test_a_norm_in_a_backward_pass_is_refused(max_grad_norm: float) -> None:
    model = nn.Linear(4, 3)
    before = [param.clone() for param in model.parameters()]
    step_in_backward(model, max_grad_norm=max_grad_norm)
    with pytest.raises(
        RuntimeError, match="does not work in an optimizer of one parameter that steps inside of a back"
    ):
        backward(model)
    assert all(map(torch.equal, before, model.parameters()))


def test_clip_value_is_not() -> None:
    """And the steps are those that are taken behind the pass."""
    model, other = nn.Linear(4, 2), nn.Linear(4, 2)
    other.load_state_dict(model.state_dict())
    step_in_backward(model, clip_value=0.1)
    optimizer = FusedRegAdam(other.parameters(), clip_value=0.1)
    for _ in range(3):
        backward(model)
        optimizer.zero_grad()
        backward(other)
        optimizer.step()
    assert all(map(torch.equal, model.parameters(), other.parameters()))


def test_a_norm_of_offloaded_copies_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """torchao needs a GPU for it: a module of its name calls the step as it does."""
    module = types.ModuleType("torchao.optim.cpu_offload")
    exec("def step(optimizers):\n    for each in optimizers:\n        each.step()", module.__dict__)
    monkeypatch.setitem(sys.modules, "torchao.optim.cpu_offload", module)
    copies = [torch.ones(3), torch.ones(2)]
    for each in copies:
        each.grad = torch.ones_like(each)
    module.step([FusedRegAdam([{"params": each}], clip_value=1.0) for each in copies])
    with pytest.raises(RuntimeError, match="does not work in torchao's CPUOffloadOptimizer"):
        module.step([FusedRegAdam([{"params": each}], max_grad_norm=1.0) for each in copies])


def test_one_parameter_that_is_the_model_is_its_own_norm() -> None:
    param = nn.Parameter(torch.ones(3))
    optimizer = FusedRegAdam([param], max_grad_norm=1.0)
    param.sum().backward()
    optimizer.step()
