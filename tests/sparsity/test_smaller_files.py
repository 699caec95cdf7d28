"""From a compacted model to a file and back, in the formats that people use; and Linear layers in CSR."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import fusedreg


class Net(nn.Module):
    """A convolution, heads and a neuron less, once it is compacted."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(3, 8, 1)
        self.attention = nn.MultiheadAttention(8, 4, batch_first=True)
        self.body = nn.Sequential(nn.Linear(8, 16), nn.Sigmoid(), nn.Linear(16, 5))
        with torch.no_grad():
            self.body[0].weight[6:] = 0
            self.attention.out_proj.weight[:, :4] = 0

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x).transpose(1, 2)
        return self.body(x + self.attention(x, x, x, need_weights=False)[0])


@pytest.fixture
def small() -> nn.Module:
    torch.manual_seed(0)
    small = fusedreg.compact(Net().eval(), torch.randn(2, 3, 6))
    assert small.body[0].out_features == 6
    assert small.attention.num_heads == 2
    return small


@pytest.fixture
def x() -> Tensor:
    return torch.randn(4, 3, 6, generator=torch.Generator().manual_seed(1))


def test_torch_save(small: nn.Module, x: Tensor, tmp_path: Path) -> None:
    torch.save(small, tmp_path / "small.pt")
    loaded = torch.load(tmp_path / "small.pt", weights_only=False)
    assert torch.equal(loaded(x), small(x))
    assert loaded.report == small.report


def test_a_state_dict_loads_into_a_model_that_was_compacted_likewise(
    small: nn.Module, x: Tensor, tmp_path: Path
) -> None:
    torch.save(small.state_dict(), tmp_path / "small.pt")
    other = fusedreg.compact(Net().eval(), torch.randn(2, 3, 6))
    assert not torch.equal(other(x), small(x))
    other.load_state_dict(torch.load(tmp_path / "small.pt"))
    assert torch.equal(other(x), small(x))


def test_safetensors(small: nn.Module, x: Tensor, tmp_path: Path) -> None:
    safetensors = pytest.importorskip("safetensors.torch")
    safetensors.save_model(small, tmp_path / "small.safetensors")
    other = fusedreg.compact(Net().eval(), torch.randn(2, 3, 6))
    safetensors.load_model(other, tmp_path / "small.safetensors")
    assert torch.equal(other(x), small(x))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
def test_torch_export(small: nn.Module, x: Tensor, tmp_path: Path) -> None:
    batch = torch.export.Dim("batch", min=2)
    program = torch.export.export(small, (x,), dynamic_shapes=({0: batch},))
    torch.export.save(program, tmp_path / "small.pt2")
    loaded = torch.export.load(tmp_path / "small.pt2").module()
    for inputs in (x, x[:2]):
        torch.testing.assert_close(loaded(inputs), small(inputs))


@pytest.mark.filterwarnings("ignore")
def test_onnx(small: nn.Module, x: Tensor, tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    reference = pytest.importorskip("onnx.reference")
    file = tmp_path / "small.onnx"
    torch.onnx.export(small, (x,), file, dynamo=True, verbose=False, external_data=False)
    model = onnx.load(file)
    onnx.checker.check_model(model)
    evaluator = reference.ReferenceEvaluator(model)
    name = model.graph.input[0].name
    (out,) = evaluator.run(None, {name: x.numpy()})
    torch.testing.assert_close(torch.from_numpy(out), small(x), rtol=1e-4, atol=1e-5)


# -- CSR


def sparse_net() -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(40, 30), nn.ReLU(), nn.Linear(30, 20, bias=False), nn.Linear(20, 5))
    for i, share in ((0, 0.96), (2, 0.9)):
        nn.init.sparse_(model[i].weight, sparsity=share)
    return model


@pytest.mark.parametrize("shape", [(40,), (3, 40), (2, 3, 40), (0, 40)])
def test_csr_computes_the_same(shape: tuple[int, ...], tmp_path: Path) -> None:
    model = sparse_net()
    sparse = fusedreg.to_sparse(model, zeros=0.9)
    assert [type(layer) is fusedreg.SparseLinear for layer in sparse] == [True, False, True, False]
    x = torch.randn(shape)
    torch.testing.assert_close(sparse(x), model(x))
    torch.save(sparse.state_dict(), tmp_path / "sparse.pt")
    assert all(tensor.layout == torch.strided for tensor in torch.load(tmp_path / "sparse.pt").values())


def test_csr_takes_layers_above_the_share_only() -> None:
    model = sparse_net()
    assert type(fusedreg.to_sparse(model)[2]) is nn.Linear
    assert type(fusedreg.to_sparse(model[0])) is fusedreg.SparseLinear
    assert type(model[0]) is nn.Linear
    with pytest.warns(UserWarning, match="no Linear layer has 99% zeros"):
        fusedreg.to_sparse(model, zeros=0.99)
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
    nn.init.sparse_(layer.linear1.weight, sparsity=0.99)
    with torch.no_grad(), pytest.warns(UserWarning, match="no Linear layer"):
        fusedreg.to_sparse(layer, zeros=0.5)(torch.randn(2, 3, 8))


def test_csr_refuses() -> None:
    with pytest.raises(ValueError, match="sparse tensor cores of GPUs alone, and no CPU has them"):
        fusedreg.to_sparse(sparse_net(), layout="2:4")
    with pytest.raises(ValueError, match="Invalid layout value: 'coo'"):
        fusedreg.to_sparse(sparse_net(), layout="coo")
    with pytest.raises(ValueError, match="Invalid zeros value: 95"):
        fusedreg.to_sparse(sparse_net(), zeros=95)
