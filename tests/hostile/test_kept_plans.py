"""A plan that is kept sees whatever becomes of its tensors between two steps.

Where nothing has, a step compares a few fields of each tensor (``Fields`` in csrc/plan/tensors_aten.h): here each of
them is the only one that differs. The step is then the reference's, which keeps nothing but the objects.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import EXTENSION
from helpers import FusedRegAdam, set_grads
from torch import Tensor

IS_WHEEL = EXTENSION is not None and ".abi3." in str(EXTENSION.__file__)
State = dict[str, Tensor]
Change = Callable[[Tensor, State], object]
CHANGES: dict[str, Change] = {}
REFUSED = ValueError, RuntimeError


def change(of: str) -> Callable[[Change], Change]:
    def keep(function: Change) -> Change:
        CHANGES[f"{of}-{function.__name__}"] = function
        return function

    return keep


def of_any(function: Callable[[Tensor], object]) -> Callable[[Tensor], object]:
    """A change of the parameter, of its gradient, or of a state tensor."""
    CHANGES[f"param-{function.__name__}"] = lambda param, state: function(param)
    CHANGES[f"gradient-{function.__name__}"] = lambda param, state: function(param.grad)
    CHANGES[f"state-{function.__name__}"] = lambda param, state: function(state["exp_avg"])
    return function


@of_any
def elsewhere(tensor: Tensor) -> None:
    tensor.data = tensor.data.clone()


@of_any
def other_strides_of_the_same_memory(tensor: Tensor) -> None:
    tensor.data = tensor.data.t()


@of_any
def transposed_in_place(tensor: Tensor) -> None:
    tensor.detach().t_()
    with torch.no_grad():
        tensor.t_()


@of_any
def another_offset_in_the_same_memory(tensor: Tensor) -> None:
    room = tensor.untyped_storage().nbytes() // tensor.element_size()
    assert room >= 2 * tensor.numel()
    whole = torch.empty(0, dtype=tensor.dtype).set_(tensor.untyped_storage())
    whole[16:32].copy_(tensor.detach().flatten())
    whole[:16].fill_(7.0)
    tensor.data = whole[16:32].view(4, 4)


@of_any
def memory_that_was_freed_and_is_elsewhere(tensor: Tensor) -> list[Tensor]:
    storage, before, values = tensor.untyped_storage(), tensor.data_ptr(), tensor.detach().clone()
    size, in_its_place = storage.nbytes(), []
    while tensor.data_ptr() in (0, before):
        storage.resize_(0)
        in_its_place.append(torch.empty(size, dtype=torch.uint8))
        storage.resize_(size)
    with torch.no_grad():
        tensor.copy_(values)
    return in_its_place


@of_any
def shared_until_somebody_writes(tensor: Tensor) -> tuple[Tensor, Tensor]:
    return torch._lazy_clone(tensor.detach()), tensor.detach().clone()


@of_any
def another_shape(tensor: Tensor) -> None:
    tensor.data = tensor.data.reshape(2, 8)


@of_any
def fewer_rows_of_the_same_memory(tensor: Tensor) -> None:
    tensor.data = tensor.data[:2]


@of_any
def another_number_of_dimensions(tensor: Tensor) -> None:
    tensor.data = tensor.data.reshape(4, 4, 1)


@change("param")
def in_freed_memory(param: Tensor, state: State) -> None:
    param.untyped_storage().resize_(0)


@change("gradient")
def in_freed_memory_too(param: Tensor, state: State) -> None:
    param.grad.untyped_storage().resize_(0)


@change("param")
def negated_when_it_is_read(param: Tensor, state: State) -> None:
    param.data = torch._neg_view(-param.data)


@of_any
def negated_where_it_is(tensor: Tensor) -> None:
    if IS_WHEEL:
        pytest.skip("it looks for that when it makes a plan")
    tensor.data = torch._neg_view(tensor.data)


@change("state")
def another_that_is_negated(param: Tensor, state: State) -> None:
    state["exp_avg"] = torch._neg_view(-state["exp_avg"])


@change("gradient")
def negated_when_it_is_read_too(param: Tensor, state: State) -> None:
    param.grad = torch._neg_view(-param.grad)


@change("gradient")
def fewer_elements_in_place(param: Tensor, state: State) -> None:
    param.grad.resize_(4, 2)


@change("param")
def double_precision(param: Tensor, state: State) -> None:
    param.data = param.data.double()


@change("gradient")
def double_precision_too(param: Tensor, state: State) -> None:
    param.grad.data = param.grad.data.double()


@change("param")
def all_in_double_precision(param: Tensor, state: State) -> None:
    for tensor in (param, param.grad, state["exp_avg"], state["exp_avg_sq"]):
        tensor.data = tensor.data.double()


@change("param")
def all_in_another_shape(param: Tensor, state: State) -> None:
    for tensor in (param, param.grad, state["exp_avg"], state["exp_avg_sq"]):
        tensor.data = tensor.data.reshape(2, 8)


@change("param")
def exchanged_behind_the_object(param: Tensor, state: State) -> Tensor:
    other = torch.nn.Parameter(param.detach() + 1)
    other.grad = param.grad.clone()
    torch.utils.swap_tensors(param, other)
    return other


@change("param")
def in_inference_mode(param: Tensor, state: State) -> None:
    with torch.inference_mode():
        param.data = param.data.clone()


@change("gradient")
def another_tensor(param: Tensor, state: State) -> None:
    param.grad = param.grad * 2


@change("gradient")
def of_another_layout(param: Tensor, state: State) -> None:
    param.grad = param.grad.t().contiguous().t()


@change("gradient")
def gone(param: Tensor, state: State) -> None:
    param.grad = None


@change("gradient")
def expanded(param: Tensor, state: State) -> None:
    param.grad = torch.tensor(0.5).expand(4, 4)


@change("gradient")
def of_known_zeros(param: Tensor, state: State) -> None:
    param.grad = torch._efficientzerotensor(4, 4)


@change("gradient")
def sparse(param: Tensor, state: State) -> None:
    param.grad = torch.eye(4).to_sparse()


@change("gradient")
def made_in_inference_mode(param: Tensor, state: State) -> None:
    with torch.inference_mode():
        param.grad = torch.full((4, 4), 0.5)


@change("gradient")
def with_a_graph(param: Tensor, state: State) -> None:
    param.grad = (torch.full((4, 4), 0.5, requires_grad=True) * 2).detach().requires_grad_()


class Doubled(Tensor):
    """Numbers that are not what its own memory holds."""

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args = [arg.inner * 2 if isinstance(arg, Doubled) else arg for arg in args]
        return func(*args, **(kwargs or {}))


@change("gradient")
def of_a_subclass_that_answers_itself(param: Tensor, state: State) -> None:
    grad = torch.full((4, 4), 0.5)
    param.grad = Tensor._make_subclass(Doubled, grad)
    param.grad.inner = grad


@change("state")
def replaced(param: Tensor, state: State) -> None:
    state["exp_avg"] = state["exp_avg"] + 1


@change("state")
def replaced_by_none_and_back(param: Tensor, state: State) -> None:
    was, state["exp_avg"] = state["exp_avg"], None  # type: ignore[assignment]
    state["exp_avg"] = was


@change("state")
def with_an_item_more(param: Tensor, state: State) -> None:
    state["mask"] = torch.ones(2)


@change("state")
def of_the_count_replaced(param: Tensor, state: State) -> None:
    state["step"] = torch.tensor(7.0)


@change("state")
def of_the_count_written(param: Tensor, state: State) -> None:
    state["step"].fill_(7.0)


@change("state")
def of_the_count_elsewhere(param: Tensor, state: State) -> None:
    state["step"].data = torch.tensor(7.0)


@change("state")
def of_the_count_in_double_precision(param: Tensor, state: State) -> None:
    state["step"].data = torch.tensor(7.0, dtype=torch.float64)


@change("state")
def of_the_count_shared_until_somebody_writes(param: Tensor, state: State) -> tuple[Tensor, Tensor]:
    return torch._lazy_clone(state["step"]), state["step"].clone()


@change("state")
def emptied(param: Tensor, state: State) -> None:
    state.clear()


def with_room(tensor: Tensor) -> Tensor:
    """In memory for twice as many."""
    return torch.cat([tensor.detach().flatten(), torch.full((16,), 7.0)])[:16].view(4, 4)


def after(name: str, backend: str) -> list[Any]:
    """What three parameters come to, of which one is changed between steps; or what the step raises."""
    params = [torch.nn.Parameter(with_room(torch.linspace(-1, 1, 16) * (i + 1))) for i in range(3)]
    optimizer = FusedRegAdam(params, lr=0.1, l1=0.01, backend=backend)
    set_grads(params, 0)
    optimizer.step()
    for param in params:
        state = optimizer.state[param]
        param.grad = with_room(param.grad)
        for each in ("exp_avg", "exp_avg_sq"):
            state[each].data = with_room(state[each])
    for _ in range(2):
        optimizer.step()
    kept = CHANGES[name](params[1], optimizer.state[params[1]])
    try:
        optimizer.step()
        optimizer.step()
    except REFUSED as error:
        results: list[Any] = [type(error)]
        params = [params[0], params[2]]
    else:
        results = [None]
    if isinstance(kept, tuple):
        torch.testing.assert_close(*kept, rtol=0, atol=0)  # nobody has written it
    for param in params:
        results += [param.detach().clone(), dict(optimizer.state[param])]
    return results


@pytest.mark.filterwarnings("ignore:An output with one or more elements was resized")
@pytest.mark.parametrize("name", CHANGES)
def test_as_the_reference(name, backend) -> None:
    ours, truth = after(name, backend), after(name, "reference")
    assert ours[0] is truth[0]
    torch.testing.assert_close(ours[1:], truth[1:], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("of", ["gradient", "all"])
def test_the_same_memory_as_numbers_of_another_dtype(of, backend) -> None:
    results = []
    for each in (backend, "reference"):
        param = torch.nn.Parameter(torch.linspace(-1, 1, 16).bfloat16())
        optimizer = FusedRegAdam([param], lr=0.1, backend=each)
        set_grads([param], 0)
        for _ in range(3):
            optimizer.step()
        state = optimizer.state[param]
        for tensor in (param, param.grad, state["exp_avg"], state["exp_avg_sq"]) if of == "all" else (param.grad,):
            tensor.data = tensor.data.view(torch.float16)
        if of == "gradient" and each not in ("cpp", "reference"):
            with pytest.raises(RuntimeError, match="it takes gradients of"):
                optimizer.step()
            return
        optimizer.step()
        results.append(param.detach())
    torch.testing.assert_close(*results, rtol=0.02, atol=0.02)
