"""With no regularizer on, each class is its torch twin: steps, state dicts both ways, schedulers, AMP, pickling."""

from __future__ import annotations

import copy
import inspect
import io
import pickle

import pytest
import torch
from helpers import (
    IDS,
    OPTIMIZER_FLAGS,
    REGULARIZED,
    TWINS,
    FusedRegAdam,
    FusedRegSGD,
    assert_same_bits,
    flags_of,
    make_params,
    run,
    set_grads,
    snapshot,
)

every_optimizer = pytest.mark.parametrize(("cls", "flags"), OPTIMIZER_FLAGS, ids=IDS)
# After 10 steps. float32: torch's for-loop rounds in another order, a few eps of 1.2e-7 in each step.
TWIN_TOLERANCE = {torch.float64: dict(rtol=1e-13, atol=1e-14), torch.float32: dict(rtol=5e-6, atol=1e-6)}


@pytest.mark.parametrize("cls", TWINS, ids=lambda cls: cls.__name__)
def test_signature_is_the_twins_with_ours_behind(cls) -> None:
    ours, theirs = (list(inspect.signature(c.__init__).parameters.values()) for c in (cls, TWINS[cls]))
    assert [(p.name, p.default) for p in theirs if p.kind == p.POSITIONAL_OR_KEYWORD] == [
        (p.name, p.default) for p in ours if p.kind == p.POSITIONAL_OR_KEYWORD
    ]
    keywords = {p.name: p.default for p in ours if p.kind == p.KEYWORD_ONLY}
    assert {p.name: p.default for p in theirs if p.kind == p.KEYWORD_ONLY}.items() <= keywords.items()
    assert list(keywords)[-6:] == ["l1", "l2", "l1_mode", "clip_value", "max_grad_norm", "backend"]
    assert issubclass(cls, TWINS[cls])


@every_optimizer
@pytest.mark.parametrize("dtype", TWIN_TOLERANCE, ids=str)
def test_identity_with_the_twin(cls, flags, dtype, backend) -> None:
    ours, theirs = make_params(dtype=dtype), make_params(dtype=dtype)
    options = {"lr": 0.05, "weight_decay": 0.1, **flags_of(cls, flags)}
    optimizer, twin = cls(ours, backend=backend, **options), TWINS[cls](theirs, **options)
    run(optimizer, ours, 10)
    run(twin, theirs, 10)
    for a, b in zip(snapshot(twin), snapshot_without_gain(optimizer), strict=True):
        torch.testing.assert_close(b, a, **TWIN_TOLERANCE[dtype])


def snapshot_without_gain(optimizer):
    gains = [group.pop("momentum_gain", None) for group in optimizer.param_groups]
    tensors = snapshot(optimizer)
    for group, gain in zip(optimizer.param_groups, gains, strict=True):
        group["momentum_gain"] = gain
    return tensors


@every_optimizer
@pytest.mark.parametrize("direction", ["to_torch", "from_torch"])
def test_state_dicts_go_both_ways_in_mid_training(cls, flags, direction, backend) -> None:
    options = {"lr": 0.05, "weight_decay": 0.1, **flags_of(cls, flags)}

    def make(fused_reg, params):
        return cls(params, backend=backend, **options) if fused_reg else TWINS[cls](params, **options)

    first = direction == "to_torch"
    params = make_params(dtype=torch.float64)
    before = make(first, params)
    run(before, params, 4)
    buffer = io.BytesIO()
    torch.save(before.state_dict(), buffer)
    buffer.seek(0)
    after = make(not first, params)
    after.load_state_dict(torch.load(buffer))
    run(after, params, 4, first_seed=200)

    uninterrupted = make_params(dtype=torch.float64)
    twin = make(False, uninterrupted)
    run(twin, uninterrupted, 4)
    run(twin, uninterrupted, 4, first_seed=200)
    for a, b in zip(params, uninterrupted, strict=True):
        torch.testing.assert_close(a, b, **TWIN_TOLERANCE[torch.float64])
    for param, own in zip(params, uninterrupted, strict=True):
        assert {k: (v.shape, v.dtype) for k, v in after.state[param].items()} == {
            k: (v.shape, v.dtype) for k, v in twin.state[own].items()
        }


@every_optimizer
def test_our_own_state_dict_resumes_to_the_bit(cls, flags, backend) -> None:
    options = {**REGULARIZED, **flags_of(cls, flags), "backend": backend}
    params, resumed = make_params(), make_params()
    optimizer = cls(params, **options)
    run(optimizer, params, 3)
    other = cls(resumed, **options)
    with torch.no_grad():
        for a, b in zip(resumed, params, strict=True):
            a.copy_(b)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    run(optimizer, params, 3, first_seed=7)
    run(other, resumed, 3, first_seed=7)
    assert_same_bits(snapshot(optimizer), snapshot(other))


def test_groups_of_a_torch_checkpoint_keep_our_strengths() -> None:
    params = make_params()
    optimizer = FusedRegAdam([{"params": params[:2], "l1": 0.5}, {"params": params[2:]}], l1=0.1, max_grad_norm=2.0)
    twin = torch.optim.Adam([{"params": params[:2]}, {"params": params[2:]}], lr=0.7)
    optimizer.load_state_dict(twin.state_dict())
    assert [group["l1"] for group in optimizer.param_groups] == [0.5, 0.1]
    assert [group["lr"] for group in optimizer.param_groups] == [0.7, 0.7]
    assert [group["max_grad_norm"] for group in optimizer.param_groups] == [2.0, 2.0]


@every_optimizer
@pytest.mark.parametrize("copier", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["deepcopy", "pickle"])
def test_copies_go_on_alike(cls, flags, copier, backend) -> None:
    params = make_params()
    optimizer = cls(params, backend=backend, **REGULARIZED, **flags_of(cls, flags))
    run(optimizer, params, 2)
    copied = copier(optimizer)
    own = [param for group in copied.param_groups for param in group["params"]]
    run(optimizer, params, 2, first_seed=9)
    run(copied, own, 2, first_seed=9)
    assert copied._backend == backend
    assert_same_bits(snapshot(optimizer), snapshot(copied))


@pytest.mark.parametrize(
    "make_scheduler",
    [
        lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 10),
        lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 0.1, total_steps=12),
        lambda o: torch.optim.lr_scheduler.StepLR(o, 2),
        lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda i: 1 / (1 + i)),
    ],
    ids=["cosine", "one-cycle", "step", "lambda"],
)
@pytest.mark.parametrize("cls", [FusedRegAdam, FusedRegSGD])
def test_schedulers(cls, make_scheduler, backend) -> None:
    """OneCycleLR moves betas or momentum too."""
    results = []
    options = {"momentum": 0.9} if cls is FusedRegSGD else {}
    for make in (lambda p: cls(p, lr=0.01, backend=backend, **options), lambda p: TWINS[cls](p, lr=0.01, **options)):
        params = make_params(dtype=torch.float64)
        optimizer = make(params)
        scheduler = make_scheduler(optimizer)
        for i in range(10):
            run(optimizer, params, 1, first_seed=i)
            scheduler.step()
        results.append(params)
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("cls", [FusedRegAdam, FusedRegSGD])
def test_tensor_lr_moved_in_place(cls, backend) -> None:
    results = []
    for make in (lambda p, lr: cls(p, lr=lr, backend=backend), lambda p, lr: TWINS[cls](p, lr=lr)):
        params, lr = make_params(dtype=torch.float64), torch.tensor(0.1, dtype=torch.float64)
        optimizer = make(params, lr)
        for i in range(4):
            run(optimizer, params, 1, first_seed=i)
            lr.mul_(0.5)
        results.append(params)
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)


def test_tensor_betas(backend) -> None:
    results = []
    betas = (torch.tensor(0.8, dtype=torch.float64), torch.tensor(0.95, dtype=torch.float64))
    for make in (
        lambda p: FusedRegAdam(p, lr=torch.tensor(0.1, dtype=torch.float64), betas=betas, backend=backend),
        lambda p: torch.optim.Adam(p, lr=0.1, betas=(0.8, 0.95)),
    ):
        params = make_params(dtype=torch.float64)
        run(make(params), params, 4)
        results.append(params)
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)


def test_closure(backend) -> None:
    params = make_params(((5,),))
    optimizer = FusedRegAdam(params, lr=0.1, backend=backend)
    calls = []

    def closure():
        calls.append(torch.is_grad_enabled())
        optimizer.zero_grad()
        loss = params[0].square().sum()
        loss.backward()
        return loss

    before = params[0].detach().clone()
    with torch.no_grad():
        loss = optimizer.step(closure)
    assert calls == [True]
    torch.testing.assert_close(loss.detach(), before.square().sum())
    assert not params[0].equal(before)


def test_step_hooks_run_once_each(backend) -> None:
    params = make_params()
    optimizer = FusedRegAdam(params, backend=backend)
    seen = []
    optimizer.register_step_pre_hook(lambda *_: seen.append("pre"))
    optimizer.register_step_post_hook(lambda *_: seen.append("post"))
    run(optimizer, params, 2)
    assert seen == ["pre", "post"] * 2


@pytest.mark.parametrize("cls", [FusedRegAdam, FusedRegSGD])
def test_grad_scaler_with_forced_infs(cls, backend) -> None:
    """The scaler must see its infs, back off, and skip; the steps between equal the twin's."""
    results = []
    for make in (lambda p: cls(p, lr=0.1, backend=backend), lambda p: TWINS[cls](p, lr=0.1)):
        params = make_params(((6, 3),), torch.float32)
        optimizer = make(params)
        scaler = torch.amp.GradScaler("cpu", init_scale=256.0, growth_interval=2)
        scales = []
        for i in range(8):
            optimizer.zero_grad()
            loss = (params[0] ** 2).sum() * (float("inf") if i in (2, 3, 6) else 1.0)
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            scales.append(scaler.get_scale())
        results.append((params[0].detach(), scales))
    assert results[0][1] == results[1][1]
    torch.testing.assert_close(results[0][0], results[1][0], rtol=1e-5, atol=1e-6)


def test_grad_scaler_after_unscale(backend) -> None:
    params = make_params(((6, 3),))
    optimizer = FusedRegAdam(params, lr=0.1, max_grad_norm=1.0, backend=backend)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    scaler.scale((params[0] ** 2).sum()).backward()
    scaler.unscale_(optimizer)
    expected = (2 * params[0].detach()).norm()
    scaler.step(optimizer)
    torch.testing.assert_close(optimizer.grad_norm, expected)


def test_gradient_accumulation(backend) -> None:
    results = []
    for make in (lambda p: FusedRegAdam(p, lr=0.1, backend=backend), lambda p: torch.optim.Adam(p, lr=0.1)):
        params = make_params(((6, 3),), torch.float64)
        optimizer = make(params)
        for i in range(6):
            ((params[0] - i) ** 2).sum().backward()
            if i % 3 == 2:
                optimizer.step()
                optimizer.zero_grad(set_to_none=i % 2 == 0)
        results.append(params[0].detach())
    torch.testing.assert_close(*results, rtol=1e-13, atol=1e-14)


@every_optimizer
def test_what_a_plan_rests_on_may_change(cls, flags, backend) -> None:
    """p.data swapped, added groups, replaced or loaded state, gradients that come and go: the next step sees it."""
    results = []
    for make in (
        lambda p: cls(p, lr=0.05, weight_decay=0.1, backend=backend, **flags_of(cls, flags)),
        lambda p: TWINS[cls](p, lr=0.05, weight_decay=0.1, **flags_of(cls, flags)),
    ):
        params = make_params(dtype=torch.float64)
        late = make_params(((4, 4),), torch.float64, seed=8)
        optimizer = make(params)
        run(optimizer, params, 2)
        params[0].data = params[0].data * 2
        run(optimizer, params, 1)
        params[3].data = params[3].data.transpose(0, 2).contiguous().transpose(0, 2)
        run(optimizer, params, 1)
        optimizer.add_param_group({"params": late, "lr": 0.01})
        run(optimizer, [*params, *late], 2)
        set_grads(params, 77)
        params[1].grad = None
        optimizer.step()
        set_grads(params, 78)
        optimizer.step()
        for name in list(optimizer.state[params[0]]):
            if name != "step":
                optimizer.state[params[0]][name] = optimizer.state[params[0]][name] * 0.5
        run(optimizer, params, 1)
        optimizer.state[params[1]] = {k: v.clone() for k, v in optimizer.state[params[1]].items()}
        run(optimizer, params, 1)
        optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        run(optimizer, params, 1)
        optimizer.param_groups[0]["params"].pop()
        run(optimizer, params, 1)
        results.append([*params, *late])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)


def test_a_model_moved_to_another_dtype(backend) -> None:
    """Its state moves with load_state_dict, as with torch."""
    params = make_params()
    optimizer = FusedRegAdam(params, backend=backend, **REGULARIZED)
    run(optimizer, params, 2)
    for param in params:
        param.data, param.grad = param.data.double(), None
    optimizer.load_state_dict(optimizer.state_dict())
    run(optimizer, params, 2)
    assert optimizer.state[params[0]]["exp_avg"].dtype == torch.float64


def test_state_of_another_dtype_goes_to_the_reference() -> None:
    params = make_params(((5, 5),))
    optimizer = FusedRegAdam(params, **REGULARIZED)
    run(optimizer, params, 1)
    params[0].data, params[0].grad = params[0].data.bfloat16(), None
    run(optimizer, params, 1)
    assert params[0].dtype == torch.bfloat16
    assert optimizer.state[params[0]]["exp_avg"].dtype == torch.float32


def test_foreach_and_fused_are_accepted_and_kept() -> None:
    params = make_params()
    for options in ({"foreach": True}, {"fused": True}, {"foreach": False}):
        optimizer = FusedRegAdam(params, **options)
        run(optimizer, params, 1)
        (key,) = options
        assert optimizer.param_groups[0][key] == options[key]


@pytest.mark.parametrize("cls", TWINS, ids=lambda cls: cls.__name__)
def test_differentiable_as_the_twin(cls) -> None:
    """autograd through a step: the gradient with respect to lr and to the gradient itself."""
    derivatives = []
    for make in (cls, TWINS[cls]):
        weight = torch.arange(1.0, 5.0, dtype=torch.float64).requires_grad_()
        gradient = torch.tensor([0.3, -0.27, 0.5, 1.0], dtype=torch.float64, requires_grad=True)
        leaf = weight.clone()
        optimizer = make([leaf], lr=0.1, differentiable=True, weight_decay=0.1)
        leaf.grad = gradient
        optimizer.step()
        (leaf**2).sum().backward()
        derivatives.append((weight.grad, gradient.grad))
    # The bias corrections of a differentiable step come from the float32 step count.
    torch.testing.assert_close(derivatives[0], derivatives[1], rtol=1e-6, atol=1e-7)


def test_gradcheck_through_a_regularized_step() -> None:
    def stepped(weight, gradient):
        leaf = weight.clone()
        optimizer = FusedRegAdam([leaf], differentiable=True, lr=0.1, l1=0.05, l2=0.1, weight_decay=0.1)
        leaf.grad = gradient
        optimizer.step()
        return leaf

    weight = torch.tensor([1.0, -2.0, 0.7], dtype=torch.float64, requires_grad=True)
    gradient = torch.tensor([0.3, 0.6, -0.4], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(stepped, (weight, gradient))


def test_named_parameters() -> None:
    model = torch.nn.Linear(3, 2)
    optimizer = FusedRegAdam(model.named_parameters(), l1=0.1)
    run(optimizer, list(model.parameters()), 1)
    assert optimizer.param_groups[0]["param_names"] == ["weight", "bias"]


def test_torch_compile_of_the_model_and_a_step() -> None:
    model = torch.nn.Linear(3, 2)
    optimizer = FusedRegAdam(model.parameters(), l1=0.1, lr=0.1)
    compiled = torch.compile(model, backend="eager")
    step = torch.compile(optimizer.step, backend="eager")
    before = model.weight.detach().clone()
    for _ in range(2):
        optimizer.zero_grad()
        compiled(torch.ones(4, 3)).sum().backward()
        step()
    assert optimizer.state[model.weight]["step"] == 2
    assert not before.equal(model.weight)
