"""What only a GPU shows, for both of its backends: graphs, streams, AMP without a wait, the same bits, compilations."""

from __future__ import annotations

import pytest
import torch
from helpers import REGULARIZED, FusedRegAdam, assert_same_bits, make_params, run, set_grads, snapshot

from fusedreg import backends

pytestmark = pytest.mark.gpu


@pytest.fixture(params=["cuda", "triton"])
def name(request):
    reason = backends.BACKENDS[request.param].unavailable_reason()
    if reason is not None:
        pytest.skip(f"backend {request.param!r}: {reason}")
    with torch.device("cuda"):
        yield request.param


def test_a_graph_takes_the_steps_that_eager_mode_takes(name) -> None:
    """lr moves in place between replays, and eager steps go on after the graph."""
    results = []
    for graphed in (False, True):
        lr = torch.tensor(0.02, device="cuda")
        params = make_params()
        optimizer = FusedRegAdam(params, backend=name, capturable=True, **{**REGULARIZED, "lr": lr})
        set_grads(params, 0)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            optimizer.step()
        torch.cuda.current_stream().wait_stream(side)
        step = optimizer.step
        if graphed:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                optimizer.step()
            step = graph.replay
        gradients = [param.grad for param in params]
        for seed in range(1, 6):
            set_grads(params, seed)
            for param, gradient in zip(params, gradients, strict=True):
                param.grad = gradient.copy_(param.grad)
            lr.mul_(0.9)
            step()
        set_grads(params, 9)
        optimizer.step()
        results.append([*snapshot(optimizer), optimizer.grad_norm])
    assert_same_bits(*results)


def test_a_step_on_another_stream(name) -> None:
    results = []
    for other in (False, True):
        params = make_params(((1000, 1000), (7,)))
        optimizer = FusedRegAdam(params, backend=name, **REGULARIZED)
        run(optimizer, params, 2)
        stream = torch.cuda.Stream() if other else torch.cuda.current_stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            run(optimizer, params, 2, first_seed=7)
        torch.cuda.current_stream().wait_stream(stream)
        run(optimizer, params, 1, first_seed=9)
        results.append(snapshot(optimizer))
    assert_same_bits(*results)


def test_a_step_does_not_wait_for_the_device(name) -> None:
    params = make_params()
    optimizer = FusedRegAdam(params, backend=name, **REGULARIZED)
    optimizer.grad_scale, optimizer.found_inf = (torch.tensor(v, device="cuda") for v in (4.0, 0.0))
    run(optimizer, params, 2)
    set_grads(params, 5)
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        optimizer.step()
    finally:
        torch.cuda.set_sync_debug_mode(before)


def test_the_same_bits_in_every_run(name) -> None:
    results = []
    for _ in range(3):
        params = make_params(((3000, 1001), (77,), (64, 64)))
        optimizer = FusedRegAdam(params, backend=name, **REGULARIZED)
        run(optimizer, params, 3)
        results.append([*snapshot(optimizer), optimizer._grad_norm])
    assert_same_bits(results[0], results[1])
    assert_same_bits(results[0], results[2])


def test_new_hyperparameters_and_parameters_compile_nothing(name) -> None:
    if name != "triton":
        pytest.skip("compiled ahead of time")
    from fusedreg.triton import kernels

    def compiled() -> int:
        kinds = (kernels.update_kernel, kernels.squares_kernel, kernels.prepare_kernel)
        return sum(len(caches[0]) for kernel in kinds for caches in kernel.device_caches.values())

    params = make_params([(64, 64)] * 40)
    optimizer = FusedRegAdam(params[:1], backend=name, **REGULARIZED)
    run(optimizer, params[:1], 1)
    first = compiled()
    optimizer.param_groups[0].update(lr=1.0, l1=0.0, betas=(0.5, 0.6), clip_value=None)
    run(optimizer, params[:1], 20)
    for some in (params[1:16], params[16:17], params[17:]):
        optimizer.add_param_group({"params": some})
        run(optimizer, params, 1)
    assert compiled() == first
