"""Linear layers that are stored, and multiplied, without their zeros: ``to_sparse``."""

from __future__ import annotations

import copy
import warnings

import torch
from torch import Tensor, nn


class SparseLinear(nn.Module):
    """``torch.nn.Linear`` with its weight in compressed sparse rows (CSR), for inference: it has no gradients.

    The state dict has ``crow_indices`` (int32 [out_features + 1]), ``col_indices`` (int32 [nonzeros]), ``values``
    ([nonzeros]) and ``bias``: plain tensors, which every format can store.
    """

    crow_indices: Tensor
    col_indices: Tensor
    values: Tensor
    bias: Tensor | None

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        with warnings.catch_warnings():  # torch says once that this layout is in beta
            warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")
            csr = linear.weight.detach().to_sparse_csr()
        # MKL wants 32 bits, and they are half as large on disk.
        self.register_buffer("crow_indices", csr.crow_indices().int())
        self.register_buffer("col_indices", csr.col_indices().int())
        self.register_buffer("values", csr.values())
        self.register_buffer("bias", None if linear.bias is None else linear.bias.detach().clone())
        self.train(linear.training)

    def forward(self, x: Tensor) -> Tensor:
        """[..., in_features] to [..., out_features]."""
        size = (self.out_features, self.in_features)
        weight = torch.sparse_csr_tensor(self.crow_indices, self.col_indices, self.values, size, check_invariants=False)
        out = (weight @ x.reshape(-1, self.in_features).T).T
        if self.bias is not None:
            out = out + self.bias
        return out.reshape(*x.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        nonzeros = len(self.values)
        share = 1 - nonzeros / max(self.in_features * self.out_features, 1)
        return f"in_features={self.in_features}, out_features={self.out_features}, zeros={share:.1%}"


def to_sparse(model: nn.Module, *, zeros: float = 0.95, layout: str = "csr") -> nn.Module:
    """A copy of the model, for inference, whose Linear layers of many zeros do not store and multiply those.

    From which share of zeros on CSR is faster depends on the machine, the shape and the batch:
    ``python benchmarks/sparse_linear.py`` prints it for yours. Scattered zeros need very many of them; whole units that
    ``fusedreg.compact`` cuts out make every model faster, so cut first.

    Args:
        model: it is not changed. Layers whose class is ``torch.nn.Linear`` itself, in float32 or float64, are looked
            at. Those inside ``torch.nn.TransformerEncoderLayer``, whose fused path takes their weights, stay dense.
        zeros: the share of exact zeros from which on a layer becomes a ``SparseLinear``, in [0, 1].
        layout: "csr".

    Warns:
        UserWarning: no layer has so many zeros.

    Raises:
        ValueError: a share outside [0, 1], or another layout. Two zeros in four ("2:4") are refused: only the sparse
            tensor cores of GPUs multiply them faster, by ``torch.sparse.to_sparse_semi_structured``.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Linear(100, 50), torch.nn.ReLU(), torch.nn.Linear(50, 3))
        >>> torch.nn.init.sparse_(model[0].weight, sparsity=0.98)
        >>> fusedreg.to_sparse(model)[0]
        SparseLinear(in_features=100, out_features=50, zeros=98.0%)
    """
    if layout == "2:4":
        raise ValueError(
            "Invalid layout value: '2:4' (allowed: 'csr'; two zeros in four are faster on the sparse tensor cores of "
            "GPUs alone, and no CPU has them: on a GPU, call torch.sparse.to_sparse_semi_structured)"
        )
    if layout != "csr":
        raise ValueError(f"Invalid layout value: {layout!r} (allowed: 'csr')")
    if not 0.0 <= zeros <= 1.0:
        raise ValueError(f"Invalid zeros value: {zeros!r} (allowed: a number in [0, 1])")
    result = copy.deepcopy(model)
    new: dict[nn.Module, SparseLinear] = {}
    for module in result.modules():
        if (
            type(module) is nn.Linear
            and module.weight.dtype in (torch.float32, torch.float64)
            and _share(module) >= zeros
        ):
            new[module] = SparseLinear(module)
    for parent in list(result.modules()):
        for name, child in list(parent._modules.items()):
            if child in new and not isinstance(parent, nn.TransformerEncoderLayer):
                parent._modules[name] = new[child]
    if type(result) is nn.Linear and result in new:
        return new[result]
    if not any(isinstance(module, SparseLinear) for module in result.modules()):
        warnings.warn(f"no Linear layer has {zeros:.0%} zeros, so that all stay dense", stacklevel=2)
    return result


def _share(linear: nn.Linear) -> float:
    numel = linear.weight.numel()
    return int((linear.weight == 0).sum()) / numel if numel else 0.0
