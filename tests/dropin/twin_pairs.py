"""A fusedreg optimizer and the one it must equal, put through the same flow: what the suites here share.

A flow is a function of ``make``, which builds an optimizer: ``make(params, **options)``. What it returns is compared.
A test is most often a flow itself, under ``like_every_rival`` or ``like_the_twin``, with one of the configurations.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import TARGETS
from helpers import OPTIMIZERS, TWINS, known, random, regularized
from torch import Tensor, nn

PLAIN = {"lr": 0.05, "weight_decay": 0.1}


def plain(cls: type) -> dict[str, Any]:
    """Those of ``PLAIN`` that a rule knows."""
    return known(cls, **PLAIN)


def _configurations() -> dict[str, tuple[type, dict[str, Any]]]:
    """Of every rule its plain variant, and the one that needs the most states and options; of a second class, plain."""
    found: dict[str, tuple[type, dict[str, Any]]] = {}
    seen: set[str] = set()
    for cls in TWINS:
        name, spec = cls.__name__.removeprefix("FusedReg").lower(), cls.spec
        group = cls([torch.zeros(1)]).param_groups[0]

        def size(variant: str, spec=spec, group=group) -> tuple[int, int]:
            options = {**group, **spec.variants[variant]}
            return len(spec.needed_states(options)), len(spec.variants[variant])

        found[name] = (cls, {})
        if spec.name not in seen and len(spec.variants) > 1:
            fullest = max(spec.variants, key=size)
            found[f"{name}-{fullest}"] = (cls, dict(spec.variants[fullest]))
        seen.add(spec.name)
    return found


CONFIGURATIONS = _configurations()


def has_option(configuration: str, option: str) -> bool:
    """Whether the twin knows an option by this name."""
    return option in inspect.signature(TWINS[CONFIGURATIONS[configuration][0]].__init__).parameters


every_configuration = pytest.mark.parametrize("configuration", CONFIGURATIONS)
FEW = ("adam", "sgd-dampening")
few_configurations = pytest.mark.parametrize("configuration", FEW)
# About what is torch's own: a rule that torch.optim lacks has a stand-in for a twin.
every_configuration_of_torch = pytest.mark.parametrize(
    "configuration", [name for name, (cls, _) in CONFIGURATIONS.items() if cls.spec.twin is not None]
)
OF_TORCH = [cls for cls in TWINS if cls.spec.twin is not None]
every_class_of_torch = pytest.mark.parametrize("cls", OF_TORCH, ids=lambda cls: cls.__name__)
every_class = pytest.mark.parametrize("cls", TWINS, ids=lambda cls: cls.__name__)


def _rivals() -> list[Any]:
    """(target, rival): each backend plain against the twin; regularized against the reference, if it is not that."""
    found = []
    for target in TARGETS:
        found.append(pytest.param(target.values[0], "twin", marks=target.marks, id=f"{target.id}-as-twin"))
        if target.values[0][0] != "reference":
            found.append(pytest.param(target.values[0], "reference", marks=target.marks, id=f"{target.id}-regularized"))
    return found


every_rival = pytest.mark.parametrize(("backend", "rival"), _rivals(), indirect=["backend"])


def tolerance(dtype: torch.dtype, steps: int = 10) -> dict[str, float]:
    """Four roundings of values near 1 in each step: a rule's operations come in another order than in torch's loop.

    bfloat16 and float16 are rounded once in a step, and may fall on the other side of a tie.
    """
    eps = torch.finfo(dtype).eps * steps * (1 if dtype in (torch.bfloat16, torch.float16) else 4)
    return {"rtol": eps, "atol": eps}


# What we keep in a parameter's state, and its twin does not.
OURS_ALONE = {scalar.name for cls in OPTIMIZERS for scalar in cls.spec.scalar_states if not scalar.is_step}


def contents(optimizer: torch.optim.Optimizer) -> list[dict[str, Tensor]]:
    """Copies of each parameter and its state, by name; the names count in a comparison.

    What the twin does not keep is left out: what it is for is seen in what the weights become.
    Step counts are brought to the CPU: torch before 2.12 put them on the default device, by mistake.
    """
    found = []
    for group in optimizer.param_groups:
        for param in group["params"]:
            own = optimizer.state.get(param, {})
            state = {k: v for k, v in own.items() if isinstance(v, Tensor) and k not in OURS_ALONE}
            found.append({"param": param.detach().clone()} | {k: v.detach().clone() for k, v in state.items()})
            if "step" in state:
                found[-1]["step"] = state["step"].detach().cpu()
    return found


def assert_close(ours: Any, theirs: Any, dtype: torch.dtype | None = None, steps: int = 20) -> None:
    """Tensors and numbers, in lists and dicts as they come, each within the tolerance of its dtype, or of ``dtype``."""
    if isinstance(theirs, dict):
        assert list(ours) == list(theirs)
        ours, theirs = list(ours.values()), list(theirs.values())
    if isinstance(theirs, list):
        for a, b in zip(ours, theirs, strict=True):
            assert_close(a, b, dtype, steps)
    else:
        is_exact = not isinstance(theirs, Tensor) or not (theirs.is_floating_point() or theirs.is_complex())
        own = torch.float64 if is_exact else theirs.dtype
        torch.testing.assert_close(ours, theirs, **tolerance(dtype or own, steps))


@functools.cache
def _makes_state_late(twin: type) -> bool:
    param = torch.nn.Parameter(torch.ones(1))
    optimizer = twin([param])
    optimizer.state.clear()
    param.grad = torch.ones(1)
    try:
        optimizer.step()
    except KeyError:
        return False
    return True


def twin_must_make_state_late(configuration: str, rival: str) -> None:
    """For a parameter that has lost its state, or has come into a group behind the optimizer's back."""
    twin = TWINS[CONFIGURATIONS[configuration][0]]
    if rival == "twin" and not _makes_state_late(twin):
        pytest.skip(f"torch {torch.__version__}'s {twin.__name__} makes state in its constructor alone")


def assert_alike(
    flow: Callable[..., Any],
    configuration: str,
    backend: str,
    rival: str = "twin",
    dtype: torch.dtype | None = None,
    steps: int = 20,
    **options: Any,
) -> None:
    """Compares what ``flow`` returns with ours and with its rival: the twin, or all regularizers on the reference.

    A flow that returns a tuple returns tensors, which must be close, and anything else, which must be equal. ``dtype``
    is the coarsest one computed in, where that is not the tensors' own; ``steps``, over how many roundings add up.
    """
    cls, flags = CONFIGURATIONS[configuration]
    if rival == "twin":
        options = {**plain(cls), **flags, **options}
        makers = [lambda params, **more: cls(params, backend=backend, **{**options, **more})]
        makers.append(lambda params, **more: TWINS[cls](params, **{**options, **more}))
    else:
        options = {**regularized(cls), **flags, **options}
        makers = [
            lambda params, name=name, **more: cls(params, backend=name, **{**options, **more})
            for name in (backend, "reference")
        ]
    (ours, *our_exact), (theirs, *their_exact) = (
        result if isinstance(result, tuple) else (result,) for result in map(flow, makers)
    )
    assert theirs is not None, "nothing is compared"
    assert_close(ours, theirs, dtype, steps)
    assert our_exact == their_exact


def _test_of(flow: Callable[..., Any], *compared: str) -> Callable[..., None]:
    """The test that compares ``flow``, which gets ``make`` and whatever else it names: fixtures and parameters."""
    own = list(inspect.signature(flow).parameters)[1:]

    @functools.wraps(flow)
    def test(**given: Any) -> None:
        mine = {name: given[name] for name in own}
        assert_alike(functools.partial(flow, **mine), **{name: given[name] for name in compared})

    # Pytest reads here what to hand over.
    asked = [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY) for name in dict.fromkeys([*compared, *own])]
    test.__signature__ = inspect.Signature(asked)
    return test


def like_the_twin(flow: Callable[..., Any]) -> Callable[..., None]:
    """A test, of a flow: what it returns must be the twin's, on each backend."""
    return _test_of(flow, "configuration", "backend")


def like_every_rival(flow: Callable[..., Any]) -> Callable[..., None]:
    """A test, of a flow: plain, what it returns must be the twin's; regularized, what the reference returns."""
    return every_rival(_test_of(flow, "configuration", "backend", "rival"))


def as_resumed(optimizer: torch.optim.Optimizer, cls: type, make: Callable[[list[Tensor]], Any]) -> Any:
    """What a resumed run is compared with: the uninterrupted one. Out of its own state dict where the rule has scalars
    beside ``step``, as NAdam's mu_product: torch casts them to the parameter's dtype when it loads."""
    if not any(scalar.is_step and scalar.name != "step" for scalar in cls.spec.scalar_states):
        return optimizer
    resumed = make([param for group in optimizer.param_groups for param in group["params"]])
    resumed.load_state_dict(optimizer.state_dict())
    return resumed


def on_default_device(shape: tuple[int, ...], seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return random(shape, torch.Generator().manual_seed(seed)).to(torch.get_default_device(), dtype)


def make_model(dtype: torch.dtype = torch.float64) -> nn.Module:
    """Two layers of odd sizes, always with the same weights."""
    model = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)).to(dtype)
    for seed, param in enumerate(model.parameters()):
        param.data.copy_(on_default_device(param.shape, seed, dtype) / 2)
    return model


def loss_of(model: nn.Module, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return (model(on_default_device((11, 5), seed, dtype)) - 1).square().mean()


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int, seed: int = 0, dtype=torch.float64) -> None:
    for i in range(steps):
        optimizer.zero_grad()
        loss_of(model, seed + i, dtype).backward()
        optimizer.step()
