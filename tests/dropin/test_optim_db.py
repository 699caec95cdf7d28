"""torch's own table of optimizer inputs: what its CI feeds Adam, AdamW and SGD, fed to ours and to the twin.

The table is torch/testing/_internal/common_optimizers.py. Every configuration there, with every implementation flag,
must give the twin's parameters and states; every error input must give the twin's error.
"""

from __future__ import annotations

import functools
import importlib.util
import inspect
import re
import sys
import types
from pathlib import Path
from unittest import mock

import pytest
import torch
from helpers import SHAPES, TWINS, known, make_params, run
from twin_pairs import OF_TORCH, contents, every_class, tolerance

pytestmark = pytest.mark.usefixtures("in_one_thread")


class _Stub(types.ModuleType):
    """Stands in for the test machinery around the table: it needs packages, and sets flags for the whole process."""

    _TestParametrizer = object
    TEST_WITH_TORCHDYNAMO = False

    def __getattr__(self, name: str) -> object:
        if name.startswith("__"):
            raise AttributeError(name)
        return mock.MagicMock(name=name)


def _load_table() -> types.ModuleType:
    machinery = ("common_device_type", "common_methods_invocations", "common_utils")
    stubs = {f"torch.testing._internal.{name}": _Stub(name) for name in machinery}
    path = Path(torch.__file__).parent / "testing/_internal/common_optimizers.py"
    spec = importlib.util.spec_from_file_location("torchs_table_of_optimizers", path)
    table = importlib.util.module_from_spec(spec)
    with mock.patch.dict(sys.modules, stubs):
        spec.loader.exec_module(table)
    return table


TABLE = _load_table()
INFOS = {cls: info for cls, twin in TWINS.items() for info in TABLE.optim_db if info.optim_cls is twin}


def _configurations() -> list:
    found = []
    for cls, info in INFOS.items():
        inputs = TABLE._get_optim_inputs_including_global_cliquey_kwargs("cpu", torch.float32, info)
        # For CUDA alone are listed: capturable, and foreach, which runs on a CPU as well.
        inputs += [each for each in info.optim_inputs_func(device="cuda") if each.kwargs.get("capturable")]
        for each in info.optim_inputs_func(device="cpu"):
            inputs.append(TABLE.OptimizerInput(None, {**each.kwargs, "foreach": True}, f"{each.desc} & foreach"))
        found += [pytest.param(cls, each.kwargs, id=f"{cls.__name__}-{each.desc}".replace(" ", "-")) for each in inputs]
    return found


CONFIGURATIONS = _configurations()
configurations = pytest.mark.parametrize(("cls", "options"), CONFIGURATIONS)


def test_the_table_is_all_there() -> None:
    """Every flag that the table has must come up in a configuration, or this suite proves less than it says."""
    flags = {(cls, key) for cls, options in (each.values for each in CONFIGURATIONS) for key in options if options[key]}
    for cls, info in INFOS.items():
        assert {"foreach", "differentiable"} <= set(info.supported_impls) <= {"foreach", "fused", "differentiable"}
        assert {(cls, flag) for flag in (*info.supported_impls, *known(cls, weight_decay=0, maximize=True))} <= flags
        assert ((cls, "capturable") in flags) == info.has_capturable_arg
    # whatever a rule's spec names, and an own option of each
    own = {(cls, each.name) for cls in INFOS for each in cls.spec.hyperparameters}
    assert {option for _, option in own - flags} <= {"eps", "alpha", "betas", "step_sizes", "lambd"}


def _train(cls, options, dtype):
    params = make_params(SHAPES, dtype)
    # torch steps differentiably on what is no leaf
    params = [param.detach() for param in params] if options.get("differentiable") else params
    optimizer = cls(params, **options)
    run(optimizer, params, 10)
    return contents(optimizer)


def _twins_options(options):
    on_cpu = torch.get_default_device().type == "cpu"
    return {key: value for key, value in options.items() if not (key == "capturable" and on_cpu)}


def _tolerance(cls, options, dtype):
    """Options that are tensors, and the step count of a differentiable or capturable step, are float32 in torch. So is
    all that ASGD's foreach makes of its step count."""
    tensors = any(isinstance(value, (torch.Tensor, tuple)) for value in options.values())
    tensors |= bool(options.get("foreach")) and cls.spec.name == "asgd"
    real = torch.float32 if tensors or options.get("differentiable") or options.get("capturable") else dtype
    return tolerance(real)


def _with_a_decay(cls, options):
    return {**known(cls, weight_decay=0.2), **options}


@configurations
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_every_configuration(cls, options, dtype, backend) -> None:
    ours = _train(cls, {**options, "backend": backend}, dtype)
    theirs = _train(TWINS[cls], _twins_options(options), dtype)
    torch.testing.assert_close(ours, theirs, **_tolerance(cls, options, dtype))


@configurations
def test_every_configuration_on_complex_parameters(cls, options, backend) -> None:
    """torch's fused step takes no complex numbers; its for-loop stands in."""
    dtype = torch.complex128
    ours = _train(cls, {**_with_a_decay(cls, options), "backend": backend}, dtype)
    unfused = {"fused": False} if "fused" in inspect.signature(TWINS[cls]).parameters else {}
    theirs = _train(TWINS[cls], {**_with_a_decay(cls, _twins_options(options)), **unfused}, dtype)
    torch.testing.assert_close(ours, theirs, **_tolerance(cls, options, dtype))


def _error_inputs() -> list:
    found = []
    for cls, info in INFOS.items():
        for index, error in enumerate(info.optim_error_inputs_func("cpu", torch.float32)):
            desc = re.sub(r"[^\w]+", "-", error.optimizer_error_input.desc)
            found.append(pytest.param(cls, error, id=f"{cls.__name__}-{index}-{desc}"))
    return found


@pytest.mark.parametrize(("cls", "error"), _error_inputs())
def test_every_error_input(cls, error) -> None:
    assert error.error_on == TABLE.OptimizerErrorEnum.CONSTRUCTION_ERROR
    given = error.optimizer_error_input
    for make in (TWINS[cls], cls):
        params = [torch.nn.Parameter(torch.ones(1, 1))] if given.params is None else given.params
        if isinstance(params, list):
            # torch writes the defaults into the caller's dict
            params = [dict(group) if isinstance(group, dict) else group for group in params]
        with pytest.raises(error.error_type, match=error.error_regex):
            make(params, **given.kwargs)


def _message(raising) -> tuple[type, str]:
    with pytest.raises(Exception) as caught:  # noqa: PT011 (its type and text are what is compared)
        raising()
    return caught.type, str(caught.value)


BAD_GROUPS = {
    "not-a-dict": lambda known, new: [new],
    "no-params": lambda known, new: {"lr": 0.1},
    "a-set": lambda known, new: {"params": {new}},
    "not-iterable": lambda known, new: {"params": None},
    "not-a-tensor": lambda known, new: {"params": [new, 3.0]},
    "not-a-leaf": lambda known, new: {"params": [new * 2]},
    "known-already": lambda known, new: {"params": [new, known]},
    "named-in-part": lambda known, new: {"params": [("new", new), torch.ones(2)]},
    "named-unlike-the-others": lambda known, new: {"params": [("new", new)]},
}


@every_class
@pytest.mark.parametrize("bad", BAD_GROUPS)
def test_groups_that_cannot_be_added(cls, bad) -> None:
    """The twin's error, and no group more afterwards."""
    messages = []
    for make in (TWINS[cls], cls):
        known, new = make_params(((3,), (2, 3)))
        optimizer = make([known])
        messages.append(_message(functools.partial(optimizer.add_param_group, BAD_GROUPS[bad](known, new))))
        assert len(optimizer.param_groups) == 1
    assert messages[0] == messages[1]


BAD_PARAMS = {
    "nothing": lambda param: [],
    "an-exhausted-generator": lambda param: (each for each in ()),
    "a-dict": lambda param: {"weight": param},
    "a-number": lambda param: 5,
    "a-string": lambda param: "weight",
    "a-set-in-a-group": lambda param: [{"params": {param}}],
    "a-leaf-and-not": lambda param: [param, param * 2],
}


@every_class
@pytest.mark.parametrize("bad", BAD_PARAMS)
def test_parameters_that_cannot_be_taken(cls, bad) -> None:
    messages = [
        _message(lambda make=make: make(BAD_PARAMS[bad](make_params(((3,),))[0]))) for make in (TWINS[cls], cls)
    ]
    assert messages[0] == messages[1]


BAD_OPTIONS = [
    {"lr": -0.1},
    {"weight_decay": -0.1},
    {"fused": True, "foreach": True},
    {"fused": True, "differentiable": True},
    {"eps": -1e-8},
    {"betas": (1.0, 0.9)},
    {"betas": (0.9, -0.1)},
    {"betas": (0.9, 0.99, 0.999)[:1]},
    {"momentum": -0.5},
    {"nesterov": True},
    {"nesterov": True, "momentum": 0.9, "dampening": 0.1},
    {"alpha": -0.5},
    {"lr_decay": -0.5},
    {"initial_accumulator_value": -0.5},
]


def _takes(cls, options) -> bool:
    if cls.spec.name == "asgd" and "alpha" in options:  # another alpha, and torch does not check it
        return False
    return set(options) <= set(inspect.signature(TWINS[cls]).parameters)


@pytest.mark.parametrize(
    ("cls", "options"),
    [
        pytest.param(cls, options, id=f"{cls.__name__}-{options}")
        for cls in OF_TORCH
        for options in BAD_OPTIONS
        if _takes(cls, options)
    ],
)
def test_options_that_are_not_allowed(cls, options) -> None:
    messages = [_message(lambda make=make: make(make_params(((3,),)), **options)) for make in (TWINS[cls], cls)]
    assert messages[0] == messages[1]


@every_class
def test_an_unknown_option(cls) -> None:
    with pytest.raises(TypeError, match=f"{cls.__name__}.*unexpected keyword argument 'temperature'"):
        cls(make_params(), temperature=0.9)
    with pytest.raises(TypeError, match="unexpected keyword argument 'clip_valeu'; did you mean 'clip_value'"):
        cls(make_params(), clip_valeu=0.9)
    if known(cls, weight_decay=0.9):
        with pytest.raises(TypeError, match="unexpected keyword argument 'weight_deacy'; did you mean 'weight_decay'"):
            cls(make_params(), weight_deacy=0.9)
