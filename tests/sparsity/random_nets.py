"""Random architectures: layers, norms, skips and shapes in any order, with zeros in any pattern."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ACTIVATIONS: tuple[Callable[[], nn.Module], ...] = (
    nn.ReLU,
    lambda: nn.ReLU(inplace=True),
    nn.Sigmoid,  # these two do not map 0 to 0
    nn.Softplus,
    nn.GELU,
    nn.Tanh,
    lambda: nn.LeakyReLU(0.1, inplace=True),
    nn.Hardswish,
)
FUNCTIONS: tuple[Callable[[Tensor], Tensor], ...] = (
    F.relu,
    torch.sigmoid,
    lambda x: F.relu(x, inplace=True),
    lambda x: x.clamp(-1, 1),
    lambda x: 1 - x,
    lambda x: 2 * x + 0.5,
    lambda x: x.exp() if False else x.tanh(),
    lambda x: F.elu_(x),
    lambda x: x * torch.sigmoid(x),
    lambda x: torch.where(x > 0, x, 0.1 * x),  # not followed
    lambda x: x + x.mean(dim=1, keepdim=True),  # looks at all channels
)


class Step(nn.Module):
    """One operation. ``apply`` gets the current tensor and those that were kept."""

    def __init__(
        self, apply: Callable[[Step, Tensor, list[Tensor]], Tensor], **modules: nn.Module | nn.Parameter
    ) -> None:
        super().__init__()
        self._apply_step = apply
        for name, module in modules.items():
            setattr(self, name, module)

    def forward(self, x: Tensor, kept: list[Tensor]) -> Tensor:
        return self._apply_step(self, x, kept)


class RandomNet(nn.Module):
    def __init__(self, seed: int, kind: str) -> None:
        super().__init__()
        self.rng = random.Random(seed)
        self.kind = kind
        self.steps = nn.ModuleList()
        self.shape: tuple[int, ...] = {"vector": (6,), "image": (3, 6, 6), "sequence": (5, 8)}[kind]
        self.kept_shapes: list[tuple[int, ...]] = []
        self.tied: nn.Embedding | None = None
        if kind == "sequence":
            self.tied = nn.Embedding(11, 8)
        for _ in range(self.rng.randint(1, 9)):
            if self.rng.random() < 0.3:
                self._add(lambda self, x, kept: (kept.append(x), x)[1])
                self.kept_shapes.append(self.shape)
            getattr(self, f"_{kind}")()
        if kind == "image":
            self._end_of_image()
        self._add(lambda self, x, kept: self.m(x), m=nn.Linear(self.shape[-1], 4, bias=self.rng.random() < 0.7))
        del self.rng

    def example(self, count: int, seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        if self.kind == "sequence":
            return torch.randint(11, (count, 5), generator=generator)
        return torch.randn(count, *((6,) if self.kind == "vector" else (3, 6, 6)), generator=generator)

    def forward(self, x: Tensor) -> Tensor:
        kept: list[Tensor] = []
        if self.tied is not None:
            x = self.tied(x)
        for step in self.steps:
            x = step(x, kept)
        return x

    # -- how it is made

    def _add(self, apply: Any, **modules: Any) -> None:
        self.steps.append(Step(apply, **modules))

    def _common(self) -> None:
        """What works for any shape, of which the channels are ``self.shape[0]``, or the last for sequences."""
        rng, last = self.rng, self.kind == "sequence"
        channels = self.shape[-1] if last else self.shape[0]
        choice = rng.randrange(8)
        if choice == 0:
            self._add(lambda self, x, kept: self.m(x), m=rng.choice(ACTIVATIONS)())
        elif choice == 1:
            function = rng.choice(FUNCTIONS)
            self._add(lambda self, x, kept: function(x))
        elif choice == 2:
            same = [i for i, shape in enumerate(self.kept_shapes) if shape == self.shape]
            if same:
                i, op = rng.choice(same), rng.choice((torch.add, torch.mul, torch.sub, lambda a, b: a.add_(b)))
                self._add(lambda self, x, kept: op(x, kept[i]))
        elif choice == 3:
            fitting = [
                i
                for i, shape in enumerate(self.kept_shapes)
                if len(shape) == len(self.shape)
                and (shape[:-1] == self.shape[:-1] if last else shape[1:] == self.shape[1:])
            ]
            if fitting:
                i, dim = rng.choice(fitting), -1 if last else 1
                self._add(lambda self, x, kept: torch.cat([x, kept[i]], dim=dim))
                total = channels + self.kept_shapes[i][-1 if last else 0]
                self.shape = (*self.shape[:-1], total) if last else (total, *self.shape[1:])
        elif choice == 4:
            shape = (channels,) if last else (channels, *(1 for _ in self.shape[1:]))
            scale = nn.Parameter(torch.randn(shape))
            op = rng.choice((torch.add, torch.mul))
            self._add(lambda self, x, kept: op(x, self.scale), scale=scale)
        elif choice == 5:
            self._add(lambda self, x, kept: self.m(x), m=nn.Dropout(0.3))
        elif choice == 6 and channels % 2 == 0:
            dim = -1 if last else 1
            if rng.random() < 0.5:
                self._add(lambda self, x, kept: F.glu(x, dim=dim))
            else:
                self._add(lambda self, x, kept: torch.mul(*x.chunk(2, dim=dim)))
            self.shape = (*self.shape[:-1], channels // 2) if last else (channels // 2, *self.shape[1:])
        elif choice == 7 and len(self.steps) > 1:
            again = [step for step in self.steps if hasattr(step, "again") and step.again == self.shape]
            if again:
                step = rng.choice(again)
                self._add(lambda self, x, kept: self.m(x), m=step.m)

    def _linear(self) -> None:
        rng, width = self.rng, self.rng.choice((1, 3, 6, 8))
        layer = nn.Linear(self.shape[-1], width, bias=rng.random() < 0.7)
        self._add(lambda self, x, kept: self.m(x), m=layer)
        if width == self.shape[-1]:
            self.steps[-1].again = self.shape
        self.shape = (*self.shape[:-1], width)

    def _vector(self) -> None:
        rng = self.rng
        choice = rng.randrange(10)
        if choice < 4:
            self._linear()
        elif choice == 4:
            self._add(lambda self, x, kept: self.m(x), m=nn.BatchNorm1d(self.shape[0], affine=rng.random() < 0.8))
        elif choice == 5 and self.shape[0] > 1:
            self._add(lambda self, x, kept: self.m(x), m=nn.LayerNorm(self.shape[0]))
        elif choice == 6:
            self._add(lambda self, x, kept: self.m(x), m=nn.PReLU(rng.choice((1, self.shape[0]))))
        else:
            self._common()

    def _sequence(self) -> None:
        rng = self.rng
        choice = rng.randrange(10)
        if choice < 3:
            self._linear()
        elif choice == 3 and self.shape[-1] > 1:
            self._add(lambda self, x, kept: self.m(x), m=nn.LayerNorm(self.shape[-1]))
        elif choice in (4, 5) and self.shape[-1] % 2 == 0:
            heads = rng.choice([n for n in (1, 2, 4) if self.shape[-1] % n == 0])
            attention = nn.MultiheadAttention(self.shape[-1], heads, batch_first=True, bias=rng.random() < 0.7)
            need = rng.random() < 0.5
            self._add(lambda self, x, kept: self.m(x, x, x, need_weights=need)[0], m=attention)
        elif choice == 6:
            # Mixes positions, for each channel alike.
            mix = nn.Linear(5, 5)
            self._add(lambda self, x, kept: self.m(x.transpose(1, 2)).mT, m=mix)
        elif choice == 7 and self.shape[-1] == 8:
            decoder = nn.Linear(8, 11, bias=False)
            decoder.weight = self.tied.weight
            self._add(lambda self, x, kept: self.m(x), m=decoder)
            self.shape = (5, 11)
        else:
            self._common()

    def _image(self) -> None:
        rng, (channels, size, _) = self.rng, self.shape
        choice = rng.randrange(14)
        if choice < 4:
            width, kernel = rng.choice((2, 4, 6)), rng.choice((1, 3))
            if size < kernel:
                return
            padding = rng.choice((0, kernel // 2, "same"))
            mode = rng.choice(("zeros", "zeros", "reflect", "circular")) if size > 2 else "zeros"
            layer = nn.Conv2d(channels, width, kernel, padding=padding, padding_mode=mode, bias=rng.random() < 0.7)
            self._add(lambda self, x, kept: self.m(x), m=layer)
            if width == channels and padding != 0:
                self.steps[-1].again = self.shape
            size = size if padding != 0 else size - kernel + 1
            self.shape = (width, size, size)
        elif choice == 4:
            groups = rng.choice([n for n in (1, 2, 3, channels) if channels % n == 0])
            layer = nn.Conv2d(
                channels, channels * rng.choice((1, 2)), 3, padding=1, groups=groups, bias=rng.random() < 0.7
            )
            self._add(lambda self, x, kept: self.m(x), m=layer)
            self.shape = (layer.out_channels, size, size)
        elif choice == 5 and size < 8:
            groups = rng.choice([n for n in (1, 2, channels) if channels % n == 0])
            layer = nn.ConvTranspose2d(channels, channels, 2, stride=rng.choice((1, 2)), groups=groups)
            self._add(lambda self, x, kept: self.m(x), m=layer)
            size = (size - 1) * layer.stride[0] + 2
            self.shape = (channels, size, size)
        elif choice in (6, 7):
            norm = rng.choice((nn.BatchNorm2d, nn.BatchNorm2d, nn.InstanceNorm2d))
            if norm is nn.InstanceNorm2d and size == 1:
                return
            self._add(lambda self, x, kept: self.m(x), m=norm(channels, affine=rng.random() < 0.8))
        elif choice == 8:
            self._add(lambda self, x, kept: self.m(x), m=nn.GroupNorm(1, channels))
        elif choice == 9 and size > 2:
            pad = rng.choice((0, 1))
            pool = rng.choice((nn.MaxPool2d(2, 1, pad), nn.AvgPool2d(2, 1, pad, count_include_pad=rng.random() < 0.5)))
            self._add(lambda self, x, kept: self.m(x), m=pool)
            size = size + 2 * pad - 1
            self.shape = (channels, size, size)
        elif choice == 10:
            value = rng.choice((0.0, 1.0))
            self._add(lambda self, x, kept: F.pad(x, (1, 0, 0, 1), value=value))
            self.shape = (channels, size + 1, size + 1)
        elif choice == 11:
            gate = nn.Sequential(nn.Linear(channels, 2), nn.ReLU(), nn.Linear(2, channels), nn.Sigmoid())

            def squeeze_and_excite(self: Any, x: Tensor, kept: list[Tensor]) -> Tensor:
                b, c, _, _ = x.shape
                return x * self.m(F.adaptive_avg_pool2d(x, 1).view(b, c)).view(b, c, 1, 1)

            self._add(squeeze_and_excite, m=gate)
        else:
            self._common()

    def _end_of_image(self) -> None:
        choice, (channels, size, _) = self.rng.randrange(4), self.shape
        if choice == 0:
            self._add(lambda self, x, kept: x.mean(dim=(2, 3)))
            self.shape = (channels,)
            return
        length = channels * size * size
        ways: list[Any] = [
            lambda self, x, kept: torch.flatten(x, 1),
            lambda self, x, kept: x.view(x.size(0), -1),
            lambda self, x, kept: x.reshape(-1, length),  # the size stands in the code
        ]
        self._add(ways[choice - 1])
        self.shape = (length,)


@torch.no_grad()
def fill(model: nn.Module, seed: int, share: float) -> None:
    """Random numbers everywhere, and zeros: rows, columns, single weights, whole tensors."""
    generator = torch.Generator().manual_seed(seed)

    def chance() -> float:
        return float(torch.rand((), generator=generator))

    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if not tensor.is_floating_point():
            continue
        tensor.copy_(0.5 * torch.randn(tensor.shape, generator=generator))
        if name.endswith("running_var"):
            tensor.abs_().add_(0.5)
        elif name.endswith("running_mean"):
            pass
        elif chance() < 0.1:
            tensor.zero_()
        else:
            if chance() < 0.6:
                tensor[torch.rand(tensor.shape[0], generator=generator) < share] = 0
            if tensor.ndim > 1 and chance() < 0.4:
                tensor[:, torch.rand(tensor.shape[1], generator=generator) < share] = 0
            if chance() < 0.2:
                tensor[torch.rand(tensor.shape, generator=generator) < 0.5] = 0
