"""With no regularizer on, each class looks, feels and steps like its torch twin."""

from __future__ import annotations

import inspect

import pytest
import torch
from helpers import (
    IDS,
    OPTIMIZER_VARIANTS,
    TWINS,
    FusedRegAdam,
    FusedRegAdamW,
    known,
    make_params,
    run,
    set_grads,
    variant_of,
)
from torch.optim import Adam, AdamW, Optimizer
from twin_pairs import (
    CONFIGURATIONS,
    PLAIN,
    assert_alike,
    assert_close,
    contents,
    every_class,
    every_class_of_torch,
    every_configuration,
    like_the_twin,
    make_model,
    plain,
    train,
)
from typing_extensions import Unpack, get_type_hints

from fusedreg.penalties import OPTIONS, PENALTY_MODES, Regularizers
from fusedreg.regularizers import OF_THE_OPTIMIZER
from fusedreg.rules.spec import LR, WEIGHT_DECAY

OURS = [*(option.name for option in OPTIONS), *OF_THE_OPTIMIZER]
every_optimizer = pytest.mark.parametrize(("cls", "flags"), OPTIMIZER_VARIANTS, ids=IDS)


pytestmark = pytest.mark.usefixtures("in_one_thread")


# -- looks


@every_class
def test_signature_is_the_twins_with_ours_behind(cls) -> None:
    ours, theirs = (list(inspect.signature(c.__init__).parameters.values()) for c in (cls, TWINS[cls]))
    assert [(p.name, p.default) for p in theirs if p.kind == p.POSITIONAL_OR_KEYWORD] == [
        (p.name, p.default) for p in ours if p.kind == p.POSITIONAL_OR_KEYWORD
    ]
    keywords = {p.name: p.default for p in ours if p.kind == p.KEYWORD_ONLY}
    assert {p.name: p.default for p in theirs if p.kind == p.KEYWORD_ONLY} == keywords
    assert [(p.name, p.kind) for p in ours[-1:]] == [("regularizers", inspect.Parameter.VAR_KEYWORD)]
    # what type checkers, and command lines made from signatures, see of it
    assert set(get_type_hints(Regularizers)) == set(OURS)
    assert get_type_hints(cls.__init__)["regularizers"] == Unpack[Regularizers]


@every_class
def test_every_option_is_documented(cls) -> None:
    for option in OURS:
        assert f"    {option} (" in cls.__doc__
    has_twin = cls.spec.twin is not None
    assert f"{'torch.optim.' if has_twin else ''}{TWINS[cls].__name__} with" in cls.__doc__
    for option in (*cls.spec.options, *(() if has_twin else (LR, WEIGHT_DECAY))):
        assert f"    {option.name} (" in cls.__doc__
    for mode in PENALTY_MODES:
        assert (f'``"{mode}"``' in cls.__doc__) == (mode in cls.spec.modes)
    assert f'``"{cls.spec.modes[0]}"`` (default)' in cls.__doc__


@every_class
def test_the_old_name_of_penalty_mode(cls, backend) -> None:
    """As a keyword, in a group, in a state dict, and set on a group: it is read, with a warning."""
    params, first = make_params(), cls.spec.modes[0]
    with pytest.warns(DeprecationWarning, match="'l1_mode' is now called 'penalty_mode'"):
        optimizer = cls(params, backend=backend, l1=0.1, l1_mode=first)
    assert optimizer.param_groups[0]["penalty_mode"] == first
    assert "l1_mode" not in optimizer.param_groups[0]
    with pytest.warns(DeprecationWarning, match="'l1_mode'"):
        optimizer = cls([{"params": params, "l1_mode": "subgradient"}], backend=backend)
    assert optimizer.param_groups[0]["penalty_mode"] == "subgradient"
    old = optimizer.state_dict()
    old["param_groups"][0]["l1_mode"] = old["param_groups"][0].pop("penalty_mode")
    fresh = cls(params, backend=backend)
    with pytest.warns(DeprecationWarning, match="'l1_mode'"):
        fresh.load_state_dict(old)
    assert fresh.param_groups[0]["penalty_mode"] == "subgradient"
    fresh.param_groups[0]["l1_mode"] = first
    set_grads(params, 1)
    with pytest.warns(DeprecationWarning, match="'l1_mode'"):
        fresh.step()
    assert fresh.param_groups[0]["penalty_mode"] == first
    wrong = pytest.raises(ValueError, match="Invalid penalty_mode value: 'nothing'")
    with wrong, pytest.warns(DeprecationWarning, match="'l1_mode'"):
        cls(params, l1_mode="nothing")


@every_class_of_torch
def test_kinship(cls) -> None:
    """isinstance, as libraries ask it; and the methods of the twin, with none that ours hides."""
    optimizer = cls(make_params())
    assert isinstance(optimizer, (TWINS[cls], Optimizer))
    assert issubclass(cls, TWINS[cls])
    public = {name for name in dir(TWINS[cls]) if not name.startswith("_")}
    assert public <= set(dir(cls))
    assert {name for name in vars(optimizer) if not name.startswith("_")} == {"defaults", "param_groups", "state"}


@every_class
def test_keys_of_groups_and_defaults(cls) -> None:
    ours, theirs = cls(make_params()), TWINS[cls](make_params())
    for our_keys, their_keys in ((ours.defaults, theirs.defaults), (ours.param_groups[0], theirs.param_groups[0])):
        assert set(our_keys) - set(their_keys) == set(OURS) - set(OF_THE_OPTIMIZER)
        assert {k: v for k, v in theirs.defaults.items()}.items() <= our_keys.items()
        assert set(their_keys) <= set(our_keys)


@every_class
def test_repr_is_the_twins_with_ours_between(cls) -> None:
    """A line for each option, sorted; without our lines, and under the twin's name, it is the twin's."""
    for params in (make_params(), [{"params": make_params()[:2]}, {"params": make_params()[2:], "lr": 0.3}]):
        ours, theirs = repr(cls(params, l1=0.125)), repr(TWINS[cls](params))
        assert "    l1: 0.125\n" in ours
        lines = [line for line in ours.splitlines() if line.strip().partition(":")[0] not in OURS]
        # the groups were shared dicts: theirs came second and shows ours as well
        expected = [line for line in theirs.splitlines() if line.strip().partition(":")[0] not in OURS]
        assert lines == [expected[0].replace(TWINS[cls].__name__, cls.__name__), *expected[1:]]


@every_class
def test_labels_in_a_profile(cls) -> None:
    """torch names a step and a zero_grad after the class; a profile must show ours."""
    params = make_params()
    optimizer = cls(params)
    set_grads(params, 1)
    with torch.autograd.profiler.profile() as profile:
        optimizer.step()
        optimizer.zero_grad()
    names = [event.name for event in profile.function_events]
    assert names.count(f"Optimizer.step#{cls.__name__}.step") == 1
    assert names.count(f"Optimizer.zero_grad#{cls.__name__}.zero_grad") == 1


@every_class
def test_arguments_by_position(cls) -> None:
    """A call that names nothing means the same."""

    def other_than(default):
        if isinstance(default, tuple):
            return (default[0] / 2, default[1] * 0.99)
        return default if default is None or isinstance(default, bool) else default / 2 + 0.01

    parameters = list(inspect.signature(TWINS[cls]).parameters.values())[1:]
    arguments = [other_than(each.default) for each in parameters if each.kind == each.POSITIONAL_OR_KEYWORD]
    ours, theirs = cls(make_params(), *arguments), TWINS[cls](make_params(), *arguments)
    assert theirs.defaults.items() <= ours.defaults.items()
    with pytest.raises(TypeError, match="positional"):
        cls(make_params(), *arguments, 0.5)


@every_class
def test_ways_to_give_parameters(cls, backend) -> None:
    """A generator, a list, a dict's values, groups, named parameters, names in groups, a single tensor in a group."""

    def ways(model):
        yield model.parameters()
        yield list(model.parameters())
        yield dict(model.named_parameters()).values()
        yield [{"params": model[0].parameters()}, {"params": model[2].parameters(), "lr": 0.01}]
        yield model.named_parameters()
        yield [{"params": model[0].named_parameters()}, {"params": model[2].named_parameters("head")}]
        yield [{"params": model[0].weight}, {"params": [model[0].bias, *model[2].parameters()]}]
        yield ({"params": layer.parameters()} for layer in (model[0], model[2]))

    for index in range(len(list(ways(make_model())))):
        results = []
        for make, more in ((cls, {"backend": backend}), (TWINS[cls], {})):
            model = make_model()
            optimizer = make(list(ways(model))[index], **more)
            train(model, optimizer, 2)
            results.append((contents(optimizer), [group.get("param_names") for group in optimizer.param_groups]))
        assert_close(results[0][0], results[1][0])
        assert results[0][1] == results[1][1]


@every_class
def test_a_subclass_with_defaults_of_its_own(cls, backend) -> None:
    """As users write them: another default, an option the more, a step that does something first."""

    class Mine(cls):
        def __init__(self, params, lr=0.07, **options):
            super().__init__(params, lr=lr, backend=backend, **options)
            self.calls = 0

        def step(self, closure=None):
            self.calls += 1
            return super().step(closure)

    params, theirs = make_params(dtype=torch.float64), make_params(dtype=torch.float64)
    decay = known(cls, weight_decay=0.2)
    mine, twin = Mine(params, **decay), TWINS[cls](theirs, lr=0.07, **decay)
    run(mine, params, 3)
    run(twin, theirs, 3)
    assert mine.calls == 3
    assert_close(contents(mine), contents(twin))


@every_class
@pytest.mark.parametrize("options", [{"foreach": True}, {"foreach": False}, {"fused": True}, {"fused": False}], ids=str)
def test_foreach_and_fused_are_accepted_and_kept(cls, options, backend) -> None:
    """Nothing comes of them but the places of the step counts."""
    if not set(options) <= set(inspect.signature(TWINS[cls]).parameters):
        pytest.skip("the twin has no such option")
    params, theirs = make_params(), make_params()
    optimizer, twin = cls(params, backend=backend, **plain(cls), **options), TWINS[cls](theirs, **plain(cls), **options)
    run(optimizer, params, 2)
    run(twin, theirs, 2)
    assert optimizer.param_groups[0].items() >= options.items()
    assert optimizer.defaults.items() >= options.items()
    assert_close(contents(optimizer), contents(twin))


@pytest.mark.parametrize("options", [{}, {"fused": True}, {"capturable": True}], ids=str)
@pytest.mark.parametrize("cls", [FusedRegAdam, FusedRegAdamW])
def test_where_step_counts_are(cls, options, backend) -> None:
    """On the CPU, and beside the parameters where a kernel or a CUDA graph counts; a float32 of no dimension."""
    params = make_params(dtype=torch.float64)
    optimizer = cls(params, backend=backend, **options)
    run(optimizer, params, 2)
    for param in params:
        step = optimizer.state[param]["step"]
        assert (step.dtype, step.shape, step.item()) == (torch.float32, (), 2)
        assert step.device.type == (param.device.type if options else "cpu")


# -- steps


@every_optimizer
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_identity_with_the_twin(cls, flags, dtype, backend) -> None:
    ours, theirs = make_params(dtype=dtype), make_params(dtype=dtype)
    options = {**plain(cls), **variant_of(cls, flags)}
    optimizer, twin = cls(ours, backend=backend, **options), TWINS[cls](theirs, **options)
    run(optimizer, ours, 10)
    run(twin, theirs, 10)
    assert_close(contents(optimizer), contents(twin), steps=10)


@every_configuration
def test_identity_over_a_thousand_steps(configuration, backend) -> None:
    """Bias corrections far from the start, moments that have settled."""

    def flow(make):
        params = make_params(((7, 3), (5,)), torch.float64)
        optimizer = make(params, lr=1e-3)
        run(optimizer, params, 1000)
        return contents(optimizer)

    assert_alike(flow, configuration, backend, steps=1000)


@every_configuration
@pytest.mark.parametrize("lr", [0.0, 1e-12, 1e4], ids=str)
def test_extreme_rates(configuration, lr, backend) -> None:
    def flow(make):
        params = make_params(((7, 3), (5,)), torch.float64)
        optimizer = make(params, lr=lr)
        run(optimizer, params, 3)
        return [{k: v / max(lr, 1) for k, v in each.items()} for each in contents(optimizer)]

    # an SGD whose rate times decay is 1000 multiplies its weights by that in each step
    assert_alike(flow, configuration, backend, **known(CONFIGURATIONS[configuration][0], weight_decay=0.0))


@like_the_twin
@pytest.mark.parametrize("configuration", ["adam", "adam-amsgrad", "adamw"])
def test_zero_betas_and_eps(make):
    """Without memory, and without a floor: the sign of the gradient."""
    params = make_params(((7, 3), (5,)), torch.float64)
    optimizer = make(params, betas=(0.0, 0.0), eps=0.0)
    run(optimizer, params, 3)
    return contents(optimizer)


@every_configuration
def test_gradients_of_zero_and_huge_ones(configuration, backend) -> None:
    """0 / eps, squares that underflow or overflow float32, and at last gradients that are no numbers."""
    if CONFIGURATIONS[configuration][1].get("centered"):
        pytest.skip("infinity less infinity: whether the mean's square overflows depends on how often it is rounded")

    def flow(make):
        params = make_params(((7,), (6,)), torch.float32)
        optimizer = make(params)
        lasts = (0.5, 0.25, float("inf"), float("nan"))
        for last in lasts[: 3 if configuration.startswith("rprop") else 4]:  # the twin hides a NaN
            params[0].grad = torch.tensor([0.0, -0.0, 1e-30, 1e-20, 1e18, 1e20, 3e38])
            params[1].grad = torch.tensor([0.0, 1.0, last, -last, 1e-8, 3.0])
            optimizer.step()
        weights = [param.detach() for param in params]
        # where weights are huge, what counts is the proportion
        finite = [torch.nan_to_num(w / w.abs().clamp(min=1), 0.0, 0.0, 0.0) for w in weights]
        return finite, [w.isnan().tolist() for w in weights], [w.isposinf().tolist() for w in weights]

    assert_alike(flow, configuration, backend)


def test_decoupled_decay_as_an_option_of_adam(backend) -> None:
    """FusedRegAdam(decoupled_weight_decay=True) is AdamW, as the twin."""
    results = []
    for make, more in (
        (FusedRegAdam, {"decoupled_weight_decay": True, "backend": backend}),
        (Adam, {"decoupled_weight_decay": True}),
        (FusedRegAdamW, {"backend": backend}),
        (AdamW, {}),
    ):
        params = make_params(dtype=torch.float64)
        optimizer = make(params, **PLAIN, **more)
        run(optimizer, params, 4)
        results.append(contents(optimizer))
    for each in results[1:]:
        assert_close(each, results[0])


# -- differentiable steps


@pytest.fixture
def _every_warning():
    """torch says some things only once in a process, whoever asks first."""
    before = torch.is_warn_always_enabled()
    torch.set_warn_always(True)
    yield
    torch.set_warn_always(before)


def _differentiate(make, **options):
    """The derivatives of a loss after two steps: by the weight, the gradients, and every option given as a float."""
    tensors = {
        key: torch.tensor(value, dtype=torch.float64, requires_grad=True)
        for key, value in options.items()
        if isinstance(value, float)
    }
    weight = torch.arange(1.0, 5.0, dtype=torch.float64).requires_grad_()
    leaf = weight.clone()
    optimizer = make([leaf], differentiable=True, **{**options, **tensors})
    gradients = []
    for sign in (1, -0.8):
        gradients.append((torch.tensor([0.3, -0.27, 0.5, 1.0], dtype=torch.float64) * sign).requires_grad_())
        # no leaf: the twin writes it where weight_decay is a tensor
        leaf.grad = gradients[-1] * 1
        optimizer.step()
    (leaf**2).sum().backward()
    found = {"weight": weight.grad} | {f"gradient {i}": each.grad for i, each in enumerate(gradients)}
    return found | {key: tensor.grad for key, tensor in tensors.items()} | {"end": leaf.detach()}


@pytest.mark.usefixtures("_every_warning")
@pytest.mark.parametrize(
    "options", [{}, {"lr": 0.1}, {"lr": 0.1, "weight_decay": 0.2}], ids=lambda options: "-".join(options) or "plain"
)
@every_class
def test_differentiable_as_the_twin(cls, options) -> None:
    """autograd through steps, with respect to lr and weight_decay too, without a warning.

    SGD without momentum: the twin cuts its first buffer from the graph. Ours does not; gradcheck, below, looks at that.
    """
    try:
        theirs = _differentiate(TWINS[cls], **options)
    except (TypeError, RuntimeError):  # gradcheck, below, looks at ours
        pytest.skip("the twin's differentiable step does not take these options as tensors, or has no derivative")
    ours = _differentiate(cls, **options)
    if cls.spec.name == "asgd":  # the twin reads its lr as a number
        assert theirs.pop("lr", None) is None
        ours.pop("lr", None)
    assert all(derivative is not None for derivative in theirs.values())
    # The bias corrections of a differentiable step come from the float32 step count.
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.usefixtures("_every_warning")
@pytest.mark.parametrize("cls", [FusedRegAdam, FusedRegAdamW])
def test_differentiable_betas_as_the_twin(cls) -> None:
    def run_with(make):
        betas = tuple(torch.tensor(value, dtype=torch.float64, requires_grad=True) for value in (0.8, 0.95))
        return _differentiate(make, betas=betas) | {"beta1": betas[0].grad, "beta2": betas[1].grad}

    torch.testing.assert_close(run_with(cls), run_with(TWINS[cls]), rtol=1e-5, atol=1e-6)


@every_configuration
def test_gradcheck_through_a_regularized_step(configuration) -> None:
    cls, more = CONFIGURATIONS[configuration]

    def stepped(weight, gradient):
        leaf = weight.clone()
        optimizer = cls([leaf], differentiable=True, lr=0.1, l1=0.05, l2=0.1, **known(cls, weight_decay=0.1), **more)
        leaf.grad = gradient
        optimizer.step()
        return leaf

    weight = torch.tensor([1.0, -2.0, 0.7], dtype=torch.float64, requires_grad=True)
    gradient = torch.tensor([0.3, 0.6, -0.4], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(stepped, (weight, gradient))
