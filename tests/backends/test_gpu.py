"""What only a GPU can show: no waiting, CUDA graphs, streams, the norm's bits, several GPUs, AMP.

Where there is none, much of it runs on one that the CPU pretends to be (pretend_gpu.py): so the tests themselves are
tested before the first GPU, and what torch warns of there.
"""

from __future__ import annotations

import copy
import inspect
import shutil
import warnings
from contextlib import contextmanager, nullcontext

import pytest
import torch
from helpers import (
    IDS,
    OPTIMIZER_VARIANTS,
    REGULARIZED,
    FusedRegAdam,
    FusedRegSGD,
    assert_same_bits,
    make_params,
    regularized,
    run,
    set_grads,
    snapshot,
)
from pretend_gpu import pretend_gpu

from fusedreg import backends
from fusedreg.backends.device_plan import CHUNK, MAX_PARTIAL_SUMS

IS_REAL = torch.cuda.is_available()
GPU = "cuda" if IS_REAL else "cpu"
GPU_BACKENDS = ["cuda", "triton"] if IS_REAL else ["cuda"]
pytestmark = [pytest.mark.gpu] if IS_REAL else [pytest.mark.skipif(not shutil.which("c++"), reason="no C++ compiler")]
# More than one GPU, threads that run at once, and what test_cuda_emulation.py shows already.
needs_real = pytest.mark.gpu
only_pretended = pytest.mark.skipif(IS_REAL, reason="it counts on a GPU that is pretended")
REPLAYS = 100 if IS_REAL else 4
# A step count is on the device only if the group is capturable; torch's Adagrad cannot be.
CAPTURABLE = [
    (cls, variant)
    for cls, variant in OPTIMIZER_VARIANTS
    if "capturable" in inspect.signature(cls).parameters or not any(state.is_step for state in cls.spec.scalar_states)
]
every_optimizer = pytest.mark.parametrize(("cls", "variant"), OPTIMIZER_VARIANTS, ids=IDS)


@pytest.fixture
def gpu():
    """None where it is real."""
    with nullcontext() if IS_REAL else pretend_gpu() as gpu, torch.device(GPU):
        yield gpu


@pytest.fixture(params=GPU_BACKENDS)
def backend(request, gpu):
    reason = backends.BACKENDS[request.param].unavailable_reason()
    if reason is not None:
        pytest.skip(f"backend {request.param!r}: {reason}")
    return request.param


@contextmanager
def no_waiting():
    """Any call of torch's that waits for the device raises inside ``with``."""
    try:
        with warnings.catch_warnings():  # which comes after the mode is set
            warnings.filterwarnings("ignore", "Synchronization debug mode is a prototype feature")
            torch.cuda.set_sync_debug_mode("error")
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@every_optimizer
@pytest.mark.parametrize("amp", [False, True], ids=["plain", "amp"])
def test_no_step_waits_for_the_device(cls, variant, amp, backend) -> None:
    params = make_params()
    optimizer = cls(params, backend=backend, **regularized(cls, variant))
    for i in range(3):
        set_grads(params, i)
        if amp:
            optimizer.grad_scale, optimizer.found_inf = torch.full((), 4.0), torch.zeros(())
        with no_waiting():
            optimizer.step()


@needs_real
@every_optimizer
@pytest.mark.parametrize("found_inf", [0.0, 1.0, 2.0, float("nan")])
def test_amp_is_read_on_the_device(cls, variant, found_inf, backend) -> None:
    results = []
    for name, device in ((backend, GPU), ("reference", "cpu")):
        with torch.device(device):
            params = make_params(dtype=torch.float64)
            optimizer = cls(params, backend=name, **regularized(cls, variant))
            for i in range(4):
                set_grads(params, i)
                optimizer.grad_scale = torch.tensor(4.0)
                optimizer.found_inf = torch.tensor(found_inf if i == 2 else 0.0)
                before = snapshot(optimizer)
                optimizer.step()
                if i == 2 and found_inf != 0:
                    assert_same_bits(before, snapshot(optimizer))
        results.append([param.detach().cpu() for param in params])
    for ours, truth in zip(*results, strict=True):
        torch.testing.assert_close(ours, truth, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("cls", [FusedRegAdam, FusedRegSGD])
def test_grad_scaler_with_infs(cls, backend) -> None:
    results = []
    options = {"momentum": 0.9} if cls is FusedRegSGD else {}
    for name, device in ((backend, GPU), ("reference", "cpu")):
        with torch.device(device):
            params = make_params(((6, 3),))
            optimizer = cls(params, lr=0.1, l1=0.01, max_grad_norm=1.0, backend=name, **options)
            scaler = torch.amp.GradScaler(device, init_scale=256.0, growth_interval=2)
            for i in range(8):
                set_grads(params, i)
                params[0].grad *= scaler.get_scale()
                if i in (2, 5):
                    params[0].grad[1, 1] = float("inf")
                scaler.scale(torch.zeros(()))
                scaler.step(optimizer)
                scaler.update()
            results.append((params[0].detach().cpu(), scaler.get_scale()))
    torch.testing.assert_close(results[0][0], results[1][0], rtol=1e-5, atol=1e-6)
    assert results[0][1] == results[1][1]


def warm_up_and_capture(optimizer):
    """Three steps on a side stream, and a graph of one."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            optimizer.step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        optimizer.step()
    return graph


@pytest.mark.parametrize("max_grad_norm", [None, 2.0])
@pytest.mark.parametrize(("cls", "variant"), CAPTURABLE, ids=[f"{cls.__name__}-{name}" for cls, name in CAPTURABLE])
def test_a_captured_step_replays_as_eager_steps(cls, variant, max_grad_norm, backend) -> None:
    """Replays, with the learning rate and the L1 strength changed between them."""
    settings = {**regularized(cls, variant), "max_grad_norm": max_grad_norm, "backend": backend}
    if "capturable" in inspect.signature(cls).parameters:
        settings["capturable"] = True

    def make():
        strengths = {key: torch.full((), settings[key]) for key in ("lr", "l1")}
        params = make_params(((37, 53), (129,), (3, 5, 7)))
        set_grads(params, 0)
        return params, cls(params, **{**settings, **strengths}), strengths

    def change(strengths, i):
        strengths["lr"].fill_(0.02 / (1 + i))
        strengths["l1"].fill_(0.01 * (i % 3))

    eager_params, eager, eager_strengths = make()
    params, captured, strengths = make()
    graph = warm_up_and_capture(captured)
    for _ in range(3):
        eager.step()
    for i in range(REPLAYS):
        change(strengths, i)
        change(eager_strengths, i)
        for ours, theirs in zip(params, eager_params, strict=True):
            ours.grad.normal_(generator=torch.Generator(GPU).manual_seed(i))
            theirs.grad.copy_(ours.grad)
        graph.replay()
        eager.step()
    assert_same_bits(snapshot(eager), snapshot(captured))
    if max_grad_norm is not None:
        assert eager.grad_norm == captured.grad_norm
    # and on without the graph
    captured.step()
    eager.step()
    assert_same_bits(snapshot(eager), snapshot(captured))


class Captured:
    """Adam after warm-up steps, with all that a table holds, and a graph of its step."""

    def __init__(self, backend, gpu, new_gradients: bool) -> None:
        self.gpu, self.params = gpu, make_params(((37, 53), (129,)))
        strengths = {key: torch.full((), 0.01) for key in ("lr", "l1")}
        self.optimizer = FusedRegAdam(self.params, backend=backend, capturable=True, max_grad_norm=1.0, **strengths)
        set_grads(self.params, 0)
        self.optimizer.step()
        self.optimizer.step()
        gpu.did.clear()
        self.graph = self.capture(new_gradients)
        self.held = [param.grad for param in self.params]

    def capture(self, new_gradients: bool):
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            if new_gradients:  # as a captured backward pass makes them
                for param in self.params:
                    param.grad = param.grad.clone()
            self.optimizer.step()
        return graph


@only_pretended
def test_a_capture_uploads_nothing_and_asks_for_no_pinned_memory(backend, gpu) -> None:
    captured = Captured(backend, gpu, new_gradients=False)
    assert gpu.did == {}
    assert len(captured.graph.nodes) == 3  # squares, prepare, update


@only_pretended
def test_a_capture_with_its_own_gradients_uploads_their_addresses_from_memory_pinned_before(backend, gpu) -> None:
    captured = Captured(backend, gpu, new_gradients=True)
    assert gpu.did == {"upload in a capture": 1}
    assert len(captured.graph.nodes) == 4
    # A step outside of the graph makes ready for the next capture.
    captured.optimizer.step()
    gpu.did.clear()
    captured.capture(new_gradients=True)
    assert gpu.did == {"upload in a capture": 1}


@only_pretended
@pytest.mark.parametrize("behind", [0, 1, 5])
def test_a_step_of_numbers_of_the_host_is_one_upload_and_asks_for_no_pinned_memory(behind, backend, gpu) -> None:
    """Where all that it has to say to the device has changed: a step count, a learning rate, all gradients' addresses.
    Memory for uploads comes to be as much as the host is ahead of the device."""
    params = make_params(((5, 3), (7,)))
    optimizer = FusedRegAdam(params, lr=0.1, backend=backend, l1=0.1, max_grad_norm=1.0)
    optimizer_of_reference = FusedRegAdam(
        own := make_params(((5, 3), (7,))), lr=0.1, backend="reference", l1=0.1, max_grad_norm=1.0
    )
    gpu.uploads_behind = behind
    for i in range(20):
        if i == 10:
            # As many as are on their way, one to take next, one for a capture.
            assert gpu.did["pinned"] <= behind + 2
            gpu.did.clear()
        for each, its in ((optimizer, params), (optimizer_of_reference, own)):
            each.param_groups[0]["lr"] = 0.1 / (1 + i)
            set_grads(its, i)
            each.step()
    assert gpu.did == {"upload": 10}
    for ours, theirs in zip(params, own, strict=True):
        torch.testing.assert_close(ours, theirs)


@only_pretended
@pytest.mark.parametrize("new_gradients", [False, True])
def test_a_graph_reads_nothing_that_later_steps_have_freed(new_gradients, backend, gpu) -> None:
    """Its tables, and what they are uploaded from: those of a plan are replaced in every step after the capture."""
    results = []
    for is_captured in (True, False):
        captured = Captured(backend, gpu, new_gradients)
        for i in range(4):
            for param, grad in zip(captured.params, captured.held, strict=True):
                param.grad = grad.copy_(torch.full_like(grad, 0.1 * i))
            captured.graph.replay() if is_captured else captured.optimizer.step()
            for param in captured.params:  # at other addresses
                param.grad = torch.ones_like(param)
            captured.optimizer.param_groups[0]["l2"] = 0.1 * i
            captured.optimizer.step()
            captured.optimizer.param_groups[0]["l2"] = 0.0
        results.append(snapshot(captured.optimizer))
    assert_same_bits(*results)


@pytest.mark.parametrize("unit", ["rows", "columns", "tensor"])
def test_penalties_on_units_wait_for_nothing_and_replay_to_the_bit(unit, backend) -> None:
    """As a whole, and in parts: the tensor, and columns of the long one."""

    def make():
        options = {"lr": 1e-2, "group_l1": torch.tensor(0.5), "max_unit_norm": torch.tensor(9.0), "unit": unit}
        params = make_params(((300, 40), (64, 9, 3, 3), (20_000, 7)))
        set_grads(params, 0)
        return params, FusedRegAdam(params, backend=backend, capturable=True, **options), options["group_l1"]

    eager_params, eager, eager_strength = make()
    params, captured, strength = make()
    graph = warm_up_and_capture(captured)
    eager.step()
    with no_waiting():
        for _ in range(2):
            eager.step()
    for i in range(REPLAYS):
        for each in (strength, eager_strength):
            each.fill_(0.1 * i)
        for ours, theirs in zip(params, eager_params, strict=True):
            ours.grad.normal_(generator=torch.Generator(GPU).manual_seed(i))
            theirs.grad.copy_(ours.grad)
        graph.replay()
        eager.step()
    assert_same_bits(snapshot(eager), snapshot(captured))


def test_capture_without_capturable_is_refused(backend) -> None:
    params = make_params()
    optimizer = FusedRegAdam(params, backend=backend)
    set_grads(params, 0)
    optimizer.step()
    with torch.cuda.graph(torch.cuda.CUDAGraph()):
        torch.zeros(())  # torch warns of a graph with nothing in it
        with pytest.raises(RuntimeError, match="capturable is False"):
            optimizer.step()


def test_parameters_that_share_a_step_count(backend, monkeypatch) -> None:
    """It moves twice in a step, as torch's for-loop has it, and not in two blocks at once."""
    monkeypatch.setattr(backends, "BACKENDS", {name: backends.BACKENDS[name] for name in (backend, "reference")})
    results = []
    for cls, options in ((torch.optim.Adam, {"foreach": False}), (FusedRegAdam, {})):
        params = make_params()
        optimizer = cls([{"params": params[:1]}, {"params": params[1:]}], lr=0.1, **options)
        set_grads(params, 0)
        optimizer.step()
        optimizer.state[params[1]]["step"] = optimizer.state[params[0]]["step"]
        optimizer.step()
        optimizer.step()
        results.append((params, optimizer.state[params[0]]["step"], optimizer.state[params[2]]["step"]))
    for ours, theirs in zip(*(result[0] for result in results), strict=True):
        torch.testing.assert_close(ours, theirs)
    assert results[0][1:] == results[1][1:] == (5, 3)
    optimizer._backend = backend
    optimizer._forget()
    before = snapshot(optimizer)
    with pytest.raises(RuntimeError, match=f"backend {backend!r} cannot run: two parameters share a scalar state"):
        optimizer.step()
    assert_same_bits(before, snapshot(optimizer))


def test_steps_on_a_side_stream(backend) -> None:
    results = []
    for stream in (torch.cuda.current_stream(), torch.cuda.Stream()):
        params = make_params(((300, 401), (77,)))
        optimizer = FusedRegAdam(params, backend=backend, **REGULARIZED)
        for i in range(3):
            with torch.cuda.stream(stream if i != 1 else torch.cuda.current_stream()):
                torch.cuda.synchronize()
                set_grads(params, i)
                optimizer.step()
        torch.cuda.synchronize()
        results.append(snapshot(optimizer))
    assert_same_bits(*results)


@needs_real
def test_the_norm_and_the_step_have_the_same_bits_in_every_run(backend) -> None:
    results = []
    for _ in range(3):
        params = make_params(((3000, 401), (77,), (100_003,)))
        optimizer = FusedRegAdam(params, backend=backend, **REGULARIZED)
        for i in range(2):
            set_grads(params, i)
            optimizer.step()
        results.append([*snapshot(optimizer), optimizer.grad_norm])
    assert_same_bits(results[0], results[1])
    assert_same_bits(results[0], results[2])


@needs_real
def test_the_norm_of_more_chunks_than_partial_sums(backend) -> None:
    params = make_params([((MAX_PARTIAL_SUMS + 3) * CHUNK + 5,), (3, 5)])
    optimizer = FusedRegAdam(params, backend=backend, max_grad_norm=1.0)
    run(optimizer, params, 1)
    truth = torch.cat([param.grad.double().flatten() for param in params]).norm()
    torch.testing.assert_close(optimizer.grad_norm.double(), truth, rtol=1e-6, atol=0)


def test_gradients_at_new_addresses_in_every_step(backend) -> None:
    results = []
    for hold in (False, True):
        params = make_params(((64, 64),) * 30)
        optimizer = FusedRegAdam(params, backend=backend, **REGULARIZED)
        held = []
        for i in range(5):
            set_grads(params, i)
            if hold:
                held.append([param.grad for param in params])
            optimizer.step()
        results.append(snapshot(optimizer))
    assert_same_bits(*results)


@needs_real
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_parameters_on_two_gpus(backend) -> None:
    results = []
    for devices in (("cuda:0", "cuda:1"), ("cpu", "cpu")):
        params = [p for i, device in enumerate(devices) for p in make_params_on(device, i)]
        optimizer = FusedRegAdam(params, **REGULARIZED)
        for i in range(3):
            set_grads(params, i)
            optimizer.step()
        results.append(([param.detach().cpu() for param in params], optimizer.grad_norm.cpu()))
    for ours, truth in zip(results[0][0], results[1][0], strict=True):
        torch.testing.assert_close(ours, truth, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(results[0][1], results[1][1])


def make_params_on(device, seed):
    with torch.device(device):
        return make_params(seed=seed)


@needs_real
def test_cpu_and_gpu_parameters_in_one_optimizer() -> None:
    results = []
    for devices in (("cuda", "cpu"), ("cpu", "cpu")):
        params = [p for i, device in enumerate(devices) for p in make_params_on(device, i)]
        optimizer = FusedRegAdam(params, **REGULARIZED)
        for i in range(3):
            set_grads(params, i)
            optimizer.step()
        results.append(([param.detach().cpu() for param in params], optimizer.grad_norm.cpu()))
    for ours, truth in zip(results[0][0], results[1][0], strict=True):
        torch.testing.assert_close(ours, truth, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(results[0][1], results[1][1])


@needs_real
def test_a_checkpoint_moves_between_devices(backend) -> None:
    params = make_params()
    optimizer = FusedRegAdam(params, backend=backend, **REGULARIZED)
    set_grads(params, 0)
    optimizer.step()
    with torch.device("cpu"):
        on_cpu = [param.detach().cpu().requires_grad_() for param in params]
        other = FusedRegAdam(on_cpu, **REGULARIZED)
        other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for i in range(1, 3):
        set_grads(params, i)
        set_grads(on_cpu, i)
        optimizer.step()
        other.step()
    for a, b in zip(params, on_cpu, strict=True):
        torch.testing.assert_close(a.detach().cpu(), b.detach(), rtol=1e-5, atol=1e-6)


@needs_real
def test_new_hyperparameters_and_parameters_compile_nothing(backend) -> None:
    if backend != "triton":
        pytest.skip("compiled ahead of time")
    from fusedreg.backends.triton import kernels

    def compiled() -> int:
        kinds = (kernels.update_kernel, kernels.squares_kernel, kernels.prepare_kernel)
        return sum(len(caches[0]) for kernel in kinds for caches in kernel.device_caches.values())

    params = make_params([(64, 64)] * 40)
    optimizer = FusedRegAdam(params[:1], backend=backend, **REGULARIZED)
    run(optimizer, params[:1], 1)
    first = compiled()
    optimizer.param_groups[0].update(lr=1.0, l1=0.0, betas=(0.5, 0.6), clip_value=None)
    run(optimizer, params[:1], 20)
    for some in (params[1:16], params[16:17], params[17:]):
        optimizer.add_param_group({"params": some})
        run(optimizer, params, 1)
    assert compiled() == first
