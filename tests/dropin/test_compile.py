"""torch.compile of the model, of the step and of a whole training step ends where the twin does without it.

Without: a compiled step of the twin's computes its scalars in float32.
"""

from __future__ import annotations

import shutil

import pytest
import torch
from helpers import FusedRegAdam, make_params, one_thread, set_grads
from twin_pairs import (
    assert_alike,
    contents,
    every_rival,
    few_configurations,
    loss_of,
    make_model,
    on_default_device,
    train,
)

# Dynamo warns of its own doings, and looks at .grad of what is no leaf.
pytestmark = pytest.mark.filterwarnings("ignore")

COMPILERS = [
    "eager",
    pytest.param(
        "inductor",
        marks=[
            pytest.mark.slow,
            pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="no C++ compiler"),
        ],
    ),
]
every_compiler = pytest.mark.parametrize("compiler", COMPILERS)


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch.compiler.reset()
    with one_thread():
        yield
    torch.compiler.reset()


def compile_the_first(compiler):
    """torch.compile for the first run of a flow, which is ours; its rival runs as it is."""
    runs = []

    def compile_or_not(function):
        runs.append(function)
        return torch.compile(function, backend=compiler) if len(runs) == 1 else function

    return compile_or_not


@every_compiler
@every_rival
@few_configurations
def test_a_compiled_model(configuration, compiler, backend, rival) -> None:
    compile_ours = compile_the_first(compiler)

    def flow(make):
        model = make_model()
        optimizer = make(model.parameters())
        train(compile_ours(model), optimizer, 4)
        return contents(optimizer)

    assert_alike(flow, configuration, backend, rival)


@every_compiler
@every_rival
@few_configurations
def test_a_compiled_step(configuration, compiler, backend, rival) -> None:
    """A new lr must reach the compiled step."""
    compile_ours = compile_the_first(compiler)

    def flow(make):
        params = make_params(((6, 3), (5,)), torch.float64)
        optimizer = make(params)
        step = compile_ours(optimizer.step)
        for i in range(5):
            set_grads(params, i)
            step()
            optimizer.param_groups[0]["lr"] *= 0.7
        return contents(optimizer)

    assert_alike(flow, configuration, backend, rival)


@every_rival
@few_configurations
def test_a_compiled_training_step(configuration, backend, rival) -> None:
    """Forward, backward, step and zero_grad in one function, graph breaks and all."""
    compile_ours = compile_the_first("eager")

    def flow(make):
        model = make_model()
        optimizer = make(model.parameters())

        @compile_ours
        def training_step(inputs):
            loss = (model(inputs) - 1).square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            return loss

        losses = [training_step(on_default_device((11, 5), i)).detach() for i in range(4)]
        return [losses, contents(optimizer)]

    assert_alike(flow, configuration, backend, rival)


def test_a_compiled_step_with_hooks_and_a_closure(backend) -> None:
    compile_ours = compile_the_first("eager")

    def flow(make):
        model = make_model()
        optimizer = make(model.parameters())
        seen = []
        optimizer.register_step_pre_hook(lambda *_: seen.append("pre"))
        optimizer.register_step_post_hook(lambda *_: seen.append("post"))

        def closure():
            optimizer.zero_grad()
            loss = loss_of(model, len(seen))
            loss.backward()
            return loss

        step = compile_ours(optimizer.step)
        losses = [step(closure).detach() for _ in range(3)]
        return [losses, contents(optimizer)], seen

    assert_alike(flow, "adam", backend)


def test_later_compiled_steps_recompile_nothing(backend) -> None:
    """Two steps settle (the first creates the state); then a new lr, as a scheduler sets it, compiles nothing anew."""
    model = make_model()
    optimizer = FusedRegAdam(model.parameters(), lr=0.01, l1=0.01, max_grad_norm=1.0, backend=backend)

    @torch.compile(backend="eager")
    def training_step(inputs):
        model(inputs).square().mean().backward()
        optimizer.step()

    for i in range(5):
        optimizer.zero_grad()
        with torch._dynamo.config.patch(error_on_recompile=i >= 2):
            training_step(on_default_device((11, 5), i))
        optimizer.param_groups[0]["lr"] *= 0.9
    assert optimizer.state[model[0].weight]["step"] == 5


def test_a_skipped_step_is_skipped_when_compiled(backend) -> None:
    compile_ours = compile_the_first("eager")

    def flow(make):
        params = make_params(((6, 3),))
        optimizer = make(params, fused=True)
        scaler = torch.amp.GradScaler(torch.get_default_device().type, init_scale=8.0)
        optimizer.step = compile_ours(optimizer.step)
        for i in range(4):
            optimizer.zero_grad()
            scaler.scale(((params[0] - i) ** 2).sum() * (float("inf") if i == 2 else 1.0)).backward()
            scaler.step(optimizer)
            scaler.update()
        return contents(optimizer), scaler.get_scale()

    assert_alike(flow, "adam", backend)
