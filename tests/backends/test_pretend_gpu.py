"""The pretended GPU finds what it is there for."""

from __future__ import annotations

import shutil

import pytest
import torch
from helpers import FusedRegAdam, make_params, set_grads
from pretend_gpu import pretend_gpu

pytestmark = pytest.mark.skipif(shutil.which("c++") is None, reason="needs a C++ compiler")


@pytest.fixture
def gpu():
    with pretend_gpu() as gpu:
        yield gpu


@pytest.fixture
def stepped(gpu):
    params = make_params(((5, 3),))
    optimizer = FusedRegAdam(params, backend="cuda", capturable=True)
    set_grads(params, 0)
    optimizer.step()
    return optimizer


def test_torch_warns_of_the_prototype_once_and_after_it_has_set_the_mode(gpu) -> None:
    with pytest.warns(UserWarning, match="prototype feature"):
        torch.cuda.set_sync_debug_mode("error")
    assert torch.cuda.get_sync_debug_mode() == 2
    torch.cuda.set_sync_debug_mode("default")


@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
def test_a_step_that_reads_a_number_of_the_device_raises(stepped, monkeypatch) -> None:
    torch.cuda.set_sync_debug_mode("error")
    monkeypatch.setattr(stepped, "grad_scale", torch.ones(()), raising=False)
    stepped.step()
    with pytest.raises(RuntimeError, match="synchronizing"):
        stepped.grad_scale.item()


def test_an_empty_graph_is_warned_of(gpu) -> None:
    with pytest.warns(UserWarning, match="The CUDA Graph is empty"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        pass


def test_work_on_a_stream_that_did_not_wait_raises(stepped) -> None:
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream), pytest.raises(AssertionError, match="another one may still be working"):
        stepped.step()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        stepped.step()
    with pytest.raises(AssertionError, match="another one may still be working"):
        stepped.step()


def test_a_capture_moves_nothing_and_a_replay_does(stepped) -> None:
    param = stepped.param_groups[0]["params"][0]
    before, graph = param.detach().clone(), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        stepped.step()
    assert param.equal(before)
    graph.replay()
    assert not param.equal(before)
    assert stepped.state[param]["step"] == 2
