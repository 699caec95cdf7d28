"""``fusedreg.compact`` beside Torch-Pruning and torch.nn.utils.prune, on the same nets with the same rows of zeros.

Run it with ``python benchmarks/compact_peers.py``. Each net has hidden units whose weights are exactly zero. Each way
is to make it smaller and keep its outputs in eval mode. Printed: how far the outputs are off, how many parameters are
left, and how long it took.

- Torch-Pruning (https://github.com/VainF/Torch-Pruning) gets, layer by layer, the rows that are zero, and removes them
  with what its dependency graph couples to them. It is for pruning with training afterwards and does not promise equal
  outputs: what a removed unit still sends, its bias through the activation, is lost.
- torch.nn.utils.prune masks the zeros and makes the masks permanent. Nothing gets smaller.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.utils import prune

import fusedreg

Way = Callable[[nn.Module, Tensor], nn.Module]


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 32, 3, padding=1), nn.Conv2d(32, 32, 3, padding=1), nn.Linear(32, 10)
        self.norm = nn.BatchNorm2d(32)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.a(x)))
        return self.c(torch.relu(x + self.b(x)).mean((2, 3)))


def nets() -> dict[str, tuple[nn.Module, Tensor]]:
    """Nets, each with half of its hidden units dead, and inputs."""
    mlp = nn.Sequential(nn.Linear(20, 64), nn.Sigmoid(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 5))
    conv = nn.Sequential(
        nn.Conv2d(3, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.Conv2d(32, 32, 3, padding=1), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10),
    )  # fmt: skip
    depthwise = nn.Sequential(
        nn.Conv2d(3, 32, 1), nn.ReLU(), nn.Conv2d(32, 32, 3, groups=32), nn.ReLU(), nn.Conv2d(32, 10, 1),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(),
    )  # fmt: skip
    residual = Residual()
    attention = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)
    with torch.no_grad():
        for layer in (mlp[0], mlp[2], conv[0], conv[3], depthwise[0], residual.a, residual.b, attention.linear1):
            layer.weight[len(layer.weight) // 2 :] = 0
            layer.bias.normal_()
        for norm in (conv[1], residual.norm):
            norm.bias.normal_()
        residual.b.weight[:8] = 0  # dead here, and alive on the other side of the sum
        attention.self_attn.out_proj.weight[:, 16:] = 0
    image = torch.randn(8, 3, 12, 12)
    return {
        "MLP, sigmoid": (mlp, torch.randn(8, 20)),
        "conv, batch norm, padding": (conv, image),
        "depthwise conv": (depthwise, image),
        "residual sum": (residual, image),
        "attention, half its heads": (attention, torch.randn(8, 6, 32)),
    }


def by_compact(model: nn.Module, x: Tensor) -> nn.Module:
    return fusedreg.compact(model, x)


def by_torch_pruning(model: nn.Module, x: Tensor) -> nn.Module:
    import torch_pruning as tp

    model = copy.deepcopy(model)
    graph = tp.DependencyGraph().build_dependency(model, example_inputs=x)
    for layer in list(model.modules()):
        if isinstance(layer, (nn.Linear, nn.Conv2d)):
            dead = (layer.weight.flatten(start_dim=1) == 0).all(dim=1).nonzero().flatten().tolist()
            if not dead:
                continue
            cut = tp.prune_linear_out_channels if isinstance(layer, nn.Linear) else tp.prune_conv_out_channels
            group = graph.get_pruning_group(layer, cut, idxs=dead)
            if graph.check_pruning_group(group):
                group.prune()
    return model


def by_masks(model: nn.Module, x: Tensor) -> nn.Module:
    model = copy.deepcopy(model)
    for layer in list(model.modules()):
        if isinstance(layer, (nn.Linear, nn.Conv2d)):
            prune.custom_from_mask(layer, "weight", layer.weight != 0)
            prune.remove(layer, "weight")
    return model


WAYS: dict[str, Way] = {
    "fusedreg.compact": by_compact,
    "Torch-Pruning": by_torch_pruning,
    "torch.nn.utils.prune": by_masks,
}


def main() -> None:
    torch.manual_seed(0)
    print(f"{'net':<26} {'way':<21} {'outputs off by':>14} {'of':>7} {'parameters':>18} {'seconds':>8}")
    for name, (model, x) in nets().items():
        model.eval()
        by_compact(model, x)  # the first call imports much of torch
        for way, make in WAYS.items():
            start = time.perf_counter()
            small = make(model, x)
            took = time.perf_counter() - start
            with torch.no_grad():
                expected, outputs = model(x), small.eval()(x)
            before, after = (sum(param.numel() for param in each.parameters()) for each in (model, small))
            off = float((expected - outputs).abs().max())
            print(
                f"{name:<26} {way:<21} {off:>14.1e} {float(expected.abs().max()):>7.2f} {before:>9,} -> {after:<6,}"
                f"{took:>7.2f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
