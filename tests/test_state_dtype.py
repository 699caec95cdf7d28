"""``state_dtype``: states are made in a dtype of their own, and are kept in it."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from helpers import OPTIMIZERS, assert_same_bits, make_params, one_thread, run, set_grads, snapshot, through_a_file
from torch import nn

import fusedreg
from fusedreg import FusedRegAdam, FusedRegSGD
from fusedreg.memory import rejection_of_memory
from fusedreg.parity import regularized

SHAPES = ((7, 13), (33,), (), (0, 4))
BF16 = torch.bfloat16


def states_of(optimizer: torch.optim.Optimizer, which: str = "states") -> list[torch.Tensor]:
    names = {each.name for each in getattr(optimizer.spec, which)}
    return [value for own in optimizer.state.values() for name, value in own.items() if name in names]


def dtypes_of(optimizer: torch.optim.Optimizer) -> set[torch.dtype]:
    return {state.dtype for state in states_of(optimizer)}


@pytest.mark.parametrize("param_dtype", [torch.float32, BF16, torch.float64], ids=str)
@pytest.mark.parametrize("cls", OPTIMIZERS, ids=lambda cls: cls.__name__)
def test_states_are_made_in_it_and_numbers_are_not(cls, param_dtype, backend) -> None:
    if backend not in ("cpp", "reference"):
        pytest.skip("it takes states of the parameter's dtype")
    with one_thread():
        state_dtype = torch.float32 if param_dtype == BF16 else BF16
        params = make_params(SHAPES, param_dtype)
        optimizer = cls(params, backend=backend, state_dtype=state_dtype, **regularized(cls))
        plain = cls(make_params(SHAPES, param_dtype), backend=backend, **regularized(cls))
        run(optimizer, params, 2)
        run(plain, plain.param_groups[0]["params"], 2)
    assert dtypes_of(optimizer) <= {state_dtype}
    assert len(states_of(optimizer)) == len(states_of(plain))
    numbers = [[each.dtype for each in states_of(one, "scalar_states")] for one in (optimizer, plain)]
    assert numbers[0] == numbers[1]
    for param, other in zip(params, plain.param_groups[0]["params"], strict=True):
        assert param.dtype == param_dtype
        torch.testing.assert_close(param, other, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("param_dtype", [torch.float32, BF16], ids=str)
def test_the_oracle_widens_them_and_rounds_them_once(param_dtype) -> None:
    """Adam's formulas, in float32 between two roundings."""
    params = make_params(((7, 13),), param_dtype)
    w, m, v = params[0].detach().clone(), torch.zeros(7, 13, dtype=BF16), torch.zeros(7, 13, dtype=BF16)
    optimizer = FusedRegAdam(params, lr=0.1, state_dtype=BF16, backend="reference")
    for step in range(1, 6):
        set_grads(params, step)
        g = params[0].grad.float()
        optimizer.step()
        wide_m, wide_v = 0.9 * m.float() + (1 - 0.9) * g, 0.999 * v.float() + (1 - 0.999) * g * g
        d = wide_v.sqrt() / (1 - 0.999**step) ** 0.5 + 1e-8
        w = (w.float() - 0.1 * (wide_m / (1 - 0.9**step)) / d).to(param_dtype)
        m, v = wide_m.to(BF16), wide_v.to(BF16)
        own = optimizer.state[params[0]]
        assert_same_bits([params[0].detach(), own["exp_avg"], own["exp_avg_sq"]], [w, m, v])


# -- checkpoints


def trained(cls: type, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    params = make_params(SHAPES, dtype)
    optimizer = cls(params, **options)
    run(optimizer, params, 3)
    return optimizer


def resumed(optimizer: torch.optim.Optimizer, saved: dict[str, Any], **options: Any) -> Any:
    params = [param.detach().clone().requires_grad_() for param in optimizer.param_groups[0]["params"]]
    cls = FusedRegAdam if type(optimizer) is torch.optim.Adam else type(optimizer)
    ours = cls(params, **options)
    ours.load_state_dict(saved)
    return ours


@pytest.mark.parametrize("cls", OPTIMIZERS, ids=lambda cls: cls.__name__)
@pytest.mark.parametrize("param_dtype", [torch.float32, BF16], ids=str)
def test_a_checkpoint_goes_on_bit_for_bit(cls, param_dtype) -> None:
    """Wider than the parameters, too, whose dtype torch casts states to when it loads them."""
    with one_thread():
        optimizer = trained(cls, param_dtype, state_dtype=torch.float32 if param_dtype == BF16 else BF16)
        others = [
            resumed(optimizer, through_a_file(optimizer.state_dict()), state_dtype=optimizer.defaults["state_dtype"]),
            copy.deepcopy(optimizer),
            pickle.loads(pickle.dumps(optimizer)),
        ]
        run(optimizer, optimizer.param_groups[0]["params"], 2)
        for other in others:
            assert other.param_groups[0]["state_dtype"] == optimizer.param_groups[0]["state_dtype"]
            run(other, other.param_groups[0]["params"], 2)
            assert_same_bits(snapshot(other), snapshot(optimizer))


def test_how_state_is_stored_is_the_loading_optimizer_s_to_say() -> None:
    plain, narrow = trained(FusedRegAdam), trained(FusedRegAdam, state_dtype=BF16)
    twin = trained(torch.optim.Adam)
    for source, options, dtype in [
        (plain, {"state_dtype": BF16}, BF16),
        (twin, {"state_dtype": BF16}, BF16),
        (narrow, {}, torch.float32),
        (narrow, {"state_dtype": torch.float16}, torch.float16),
    ]:
        saved = copy.deepcopy(source.state_dict())
        ours = resumed(source, saved, **options)
        assert ours.param_groups[0]["state_dtype"] == options.get("state_dtype")
        for own, theirs in zip(ours.state.values(), saved["state"].values(), strict=True):
            for name in ("exp_avg", "exp_avg_sq"):
                assert_same_bits([own[name]], [theirs[name].to(dtype)])
            assert own["step"].dtype == torch.float32
        run(ours, ours.param_groups[0]["params"], 1)
        assert dtypes_of(ours) == {dtype}
    # and the twin takes ours, in its own dtype
    other = torch.optim.Adam(make_params(SHAPES))
    other.load_state_dict(narrow.state_dict())
    run(other, other.param_groups[0]["params"], 1)
    assert {own["exp_avg"].dtype for own in other.state.values()} == {torch.float32}


@pytest.mark.filterwarnings("ignore:torch.distributed is", "ignore:TypedStorage is deprecated")  # torch 2.10's own use
@pytest.mark.parametrize("flat", [False, True])
def test_distributed_checkpoints(flat, tmp_path) -> None:
    """By name, through files, into another dtype."""
    checkpointing = pytest.importorskip("torch.distributed.checkpoint.state_dict")
    dcp = torch.distributed.checkpoint
    options = checkpointing.StateDictOptions(flatten_optimizer_state_dict=flat)

    def make(state_dtype: torch.dtype | None) -> tuple[nn.Module, FusedRegAdam]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
        return model, FusedRegAdam(fusedreg.param_groups(model, state_dtype=state_dtype), lr=0.01)

    for first, second in [(BF16, BF16), (None, BF16), (BF16, None)]:
        model, optimizer = make(first)
        model(torch.ones(5, 4)).square().sum().backward()
        optimizer.step()
        path = tmp_path / f"{first}-{second}"
        saved = checkpointing.get_optimizer_state_dict(model, optimizer, options=options)
        dcp.save({"optimizer": saved}, checkpoint_id=path, no_dist=True)
        other, ours = make(second)
        target = checkpointing.get_optimizer_state_dict(other, ours, options=options)
        dcp.load({"optimizer": target}, checkpoint_id=path, no_dist=True)
        checkpointing.set_optimizer_state_dict(other, ours, target, options=options)
        assert dtypes_of(ours) == {second or torch.float32}
        for one, two in zip(states_of(optimizer), states_of(ours), strict=True):
            torch.testing.assert_close(two, one.to(two.dtype), rtol=0, atol=0)
        assert all(group["state_dtype"] == second for group in ours.param_groups)


# -- what it stands beside


def test_a_group_of_its_own_and_a_change_of_mind() -> None:
    first, second = make_params(((4, 3), (5,)))
    optimizer = FusedRegAdam([{"params": [first], "state_dtype": BF16}, {"params": [second]}], lr=0.1)
    run(optimizer, [first, second], 2)
    dtype_of = lambda param: optimizer.state[param]["exp_avg_sq"].dtype  # noqa: E731
    assert (dtype_of(first), dtype_of(second)) == (BF16, torch.float32)
    optimizer.param_groups[1]["state_dtype"] = torch.float16
    before = optimizer.state[second]["exp_avg"]
    set_grads([first, second], 0)
    second.grad = torch.ones(5).to_sparse()  # a step that raises leaves all as it was
    with pytest.raises(RuntimeError, match="sparse"):
        optimizer.step()
    assert optimizer.state[second]["exp_avg"] is before
    run(optimizer, [first, second], 1)
    assert (dtype_of(first), dtype_of(second)) == (BF16, torch.float16)
    optimizer.param_groups[1]["state_dtype"] = None  # what is there stays
    run(optimizer, [first, second], 1)
    assert dtype_of(second) == torch.float16


def test_a_conversion_is_taken_back_where_the_step_fails(monkeypatch) -> None:
    params = make_params(((4, 3),))
    optimizer = FusedRegSGD(params, lr=0.1, momentum=0.9)
    run(optimizer, params, 1)
    before = optimizer.state[params[0]]["momentum_buffer"]
    optimizer.param_groups[0]["state_dtype"] = BF16
    set_grads(params, 1)
    monkeypatch.setattr(fusedreg.backends.CppBackend, "make_plan", lambda *_: 1 / 0)
    monkeypatch.setattr(fusedreg.backends.ReferenceBackend, "make_plan", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        optimizer.step()
    assert optimizer.state[params[0]]["momentum_buffer"] is before


@pytest.mark.parametrize("dtype", [torch.int16, torch.complex64, torch.float8_e4m3fn, "bfloat16", 16, True])
def test_no_such_dtype(dtype) -> None:
    with pytest.raises(ValueError, match=r"Invalid state_dtype value: .* \(allowed: None, torch.bfloat16"):
        FusedRegAdam(make_params(), state_dtype=dtype)


def test_dtypes_that_do_not_go_with_the_parameters() -> None:
    wide = make_params(((3,),), torch.float64)
    FusedRegAdam(wide, state_dtype=torch.float64)
    with pytest.raises(ValueError, match=r"for a group with torch.float32 parameters .* steps are in float32"):
        FusedRegAdam(make_params(((3,),)), state_dtype=torch.float64)
    complex_param = torch.zeros(3, dtype=torch.complex64, requires_grad=True)
    with pytest.raises(ValueError, match=r"torch.bfloat16 for a group with torch.complex64 .* \(allowed: None\)"):
        FusedRegAdam([complex_param], state_dtype=BF16)
    optimizer = FusedRegAdam(wide)
    with pytest.raises(ValueError, match=r"torch.complex64"):
        optimizer.add_param_group({"params": [complex_param], "state_dtype": BF16})
    assert len(optimizer.param_groups) == 1
    # a model that is converted afterwards
    optimizer = FusedRegAdam(wide, state_dtype=torch.float64)
    wide[0].data = wide[0].data.float()
    set_grads(wide, 1)
    with pytest.raises(ValueError, match="steps are in float32"):
        optimizer.step()
    assert not optimizer.state


def test_differentiable() -> None:
    w = torch.ones(3, requires_grad=True)
    lr = torch.tensor(0.1, requires_grad=True)
    param = w.clone()
    optimizer = FusedRegAdam([param], lr=lr, differentiable=True, state_dtype=BF16)
    param.grad = torch.full((3,), 0.5)
    optimizer.step()
    param.sum().backward()
    assert optimizer.state[param]["exp_avg"].dtype == BF16
    assert float(lr.grad) == pytest.approx(-3.0, rel=1e-5)


def test_a_backend_of_one_dtype_refuses_before_the_first_step() -> None:
    """There is no state so far that it could look at, and its kernels would write beyond what is then made."""
    param = torch.ones(3)
    reason = rejection_of_memory(param, [], BF16, None, "cpu", (torch.float32,))
    assert reason == (
        "beside torch.float32 parameters it takes states of torch.float32, and state_dtype is torch.bfloat16"
    )
    assert rejection_of_memory(param, [], torch.float32, None, "cpu", (torch.float32,)) is None
    assert rejection_of_memory(param, [param.to(BF16)], torch.float32, None, "cpu", (torch.float32,)) is None


@pytest.mark.parametrize("state_dtype", [BF16, "int8"], ids=str)
@pytest.mark.parametrize("cls", [FusedRegAdam, FusedRegSGD])
def test_target_sparsity(cls, state_dtype, backend) -> None:
    """The scores read states where they are, or decode them: the same zeros by the kernel and by torch."""
    if backend not in ("cpp", "reference"):
        pytest.skip("it takes states of the parameter's dtype")
    zeros = []
    for is_strided in (False, True):  # the kernel takes dense parameters alone
        params = [torch.nn.Parameter(p.detach().clone()) for p in make_params(((20, 30), (1000,)))]
        if is_strided:
            params = [torch.nn.Parameter(torch.zeros(*p.shape, 2)[..., 0].copy_(p.detach())) for p in params]
        optimizer = cls(params, lr=0.01, backend=backend, state_dtype=state_dtype, sparsity=0.75)
        schedule = fusedreg.SparsitySchedule(optimizer, 20, every=5)
        for step in range(20):
            set_grads(params, step)
            optimizer.step()
            schedule.step()
        zeros.append([p.detach() == 0 for p in params])
    assert sum(int(each.sum()) for each in zeros[0]) == 0.75 * 1600
    for ours, theirs in zip(*zeros, strict=True):
        assert torch.equal(ours, theirs)


def test_compact_takes_them_along() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))
    optimizer = FusedRegAdam(model.parameters(), lr=0.01, state_dtype=BF16)
    with torch.no_grad():
        model[0].weight[2:4] = 0
        model[0].bias[2:4] = 0
    model(torch.randn(5, 4)).square().mean().backward()
    optimizer.param_groups[0]["lr"] = 0.0  # makes the states
    optimizer.step()
    small = fusedreg.compact(model, torch.randn(5, 4), optimizer=optimizer)
    assert small[0].weight.shape == (4, 4)
    assert optimizer.state[small[0].weight]["exp_avg_sq"].shape == (4, 4)
    assert dtypes_of(optimizer) == {BF16}
    small(torch.randn(5, 4)).square().mean().backward()
    optimizer.step()
    assert dtypes_of(optimizer) == {BF16}
