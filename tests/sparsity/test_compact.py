"""``fusedreg.compact``: what goes, what stays, and why; the same outputs; the optimizer goes along."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fusedreg
from fusedreg.sparsity.compact.attention import CompactAttention


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@torch.no_grad()
def zero_rows(*layers: nn.Module, keep: int) -> None:
    for layer in layers:
        layer.weight[keep:] = 0


def shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(param.shape) for name, param in model.named_parameters()}


def same(model: nn.Module, small: nn.Module, *inputs: Any) -> None:
    """On inputs that the call has not seen."""
    model, small = (copy.deepcopy(each).double().eval() for each in (model, small))
    inputs = tuple(x.double() if x.is_floating_point() else x for x in inputs)
    with torch.no_grad():
        torch.testing.assert_close(small(*inputs), model(*inputs), rtol=1e-6, atol=1e-6)


class Functional(nn.Module):
    """A module out of layers and a function of it and the inputs."""

    def __init__(self, forward: Callable[..., Tensor], **layers: nn.Module | nn.Parameter) -> None:
        super().__init__()
        for name, layer in layers.items():
            setattr(self, name, layer)
        self._forward = forward

    def forward(self, *inputs: Tensor) -> Tensor:
        return self._forward(self, *inputs)


def mlp(bias: bool = True, activation: Callable[[], nn.Module] = nn.ReLU) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(6, 8, bias), activation(), nn.Linear(8, 7, bias), activation(), nn.Linear(7, 3, bias)
    )


# -- what goes


def test_dead_neurons_go_and_what_they_send_is_folded() -> None:
    model = mlp(activation=nn.Sigmoid)  # a dead neuron sends sigmoid(bias)
    zero_rows(model[0], keep=5)
    before = copy.deepcopy(model)
    small = fusedreg.compact(model, torch.randn(4, 6))
    assert shapes(small)["0.weight"] == (5, 6)
    assert shapes(small)["2.weight"] == (7, 5)
    assert small.report.folded == 3
    assert small.report.left == []
    assert small.report.max_difference < 1e-6
    same(model, small, torch.randn(9, 6))
    for (name, param), other in zip(model.named_parameters(), before.parameters(), strict=True):
        assert torch.equal(param, other), name
    assert (small[0].in_features, small[0].out_features) == (6, 5)


def test_neurons_that_nothing_reads_go() -> None:
    model = mlp()
    with torch.no_grad():
        model[2].weight[:, 3:] = 0
    small = fusedreg.compact(model, torch.randn(4, 6))
    assert shapes(small)["0.weight"] == (3, 6)
    assert small.report.folded == 0
    same(model, small, torch.randn(9, 6))


def test_removals_go_on_through_the_graph() -> None:
    """A neuron that reads dead neurons only is dead; one that only neurons read which go is not read."""
    model = mlp(activation=nn.Tanh)
    with torch.no_grad():
        model[0].weight[4:] = 0
        model[2].weight[0, :4] = 0  # reads constants only
        model[2].weight[1:, 0] = 0  # neuron 0 is read by nobody else
        model[4].weight[:, 6] = 0  # not read, and the only one that reads neuron 1
        model[2].weight[:6, 1] = 0
    small = fusedreg.compact(model, torch.randn(4, 6))
    assert shapes(small)["0.weight"] == (2, 6)
    assert shapes(small)["2.weight"] == (5, 2)
    same(model, small, torch.randn(9, 6))


def test_nothing_dead_is_a_copy() -> None:
    model = mlp()
    small = fusedreg.compact(model, torch.randn(4, 6))
    assert shapes(small) == shapes(model)
    assert small.report.max_difference == 0
    assert small.report.layers == []
    assert small[0].weight is not model[0].weight


def test_a_layer_that_is_all_zeros_keeps_one_unit() -> None:
    model = mlp()
    zero_rows(model[0], keep=0)
    small = fusedreg.compact(model, torch.randn(4, 6))
    assert shapes(small)["0.weight"] == (1, 6)
    assert shapes(small)["2.weight"] == (1, 1)
    same(model, small, torch.randn(9, 6))


def test_a_layer_without_bias_gets_one_for_a_constant() -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.Sigmoid(), nn.Linear(8, 3, bias=False))
    zero_rows(model[0], keep=2)
    small = fusedreg.compact(model, torch.randn(4, 6))
    assert shapes(small) == {"0.weight": (2, 6), "0.bias": (2,), "2.weight": (3, 2), "2.bias": (3,)}
    same(model, small, torch.randn(9, 6))


@pytest.mark.parametrize(
    ("conv", "image"),
    [
        (nn.Conv1d, (3, 9)),
        (nn.Conv2d, (3, 9, 9)),
        (nn.Conv3d, (3, 5, 5, 5)),
        (nn.ConvTranspose2d, (3, 5, 5)),
    ],
)
def test_conv_batch_norm_relu(conv: Any, image: tuple[int, ...]) -> None:
    norm = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}[len(image) - 1]
    pool = {1: nn.AdaptiveAvgPool1d, 2: nn.AdaptiveAvgPool2d, 3: nn.AdaptiveAvgPool3d}[len(image) - 1]
    model = nn.Sequential(conv(3, 8, 3), norm(8), nn.ReLU(), conv(8, 6, 3), pool(1), nn.Flatten(), nn.Linear(6, 4))
    with torch.no_grad():
        if conv is nn.ConvTranspose2d:
            model[0].weight[:, 5:] = 0
        else:
            model[0].weight[5:] = 0
        model[1].running_mean.normal_()
        model[1].bias[5:] = -1 if conv is nn.ConvTranspose2d else 1  # a constant 0, or another one
        model[1].weight[5:] = 0
    small = fusedreg.compact(model, torch.randn(4, *image))
    assert small[0].out_channels == small[1].num_features == small[3].in_channels == 5
    assert small.report.folded == (0 if conv is nn.ConvTranspose2d else 3)
    assert small.report.left == []
    same(model, small, torch.randn(3, *image))


def test_depthwise_and_grouped_convolutions_lose_groups() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Conv2d(8, 16, 3, padding=1, groups=8), nn.ReLU(),
        nn.Conv2d(16, 8, 1), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=4), nn.Flatten(), nn.Linear(8 * 9, 3),
    )  # fmt: skip
    with torch.no_grad():
        model[0].weight[5:] = 0
        model[0].bias[5:] = -1
        model[4].weight[[2, 3, 6]] = 0  # group 1, and half of group 3
        model[4].bias[[2, 3, 6]] = -1
    small = fusedreg.compact(model, torch.randn(2, 3, 5, 5))
    assert (small[2].in_channels, small[2].out_channels, small[2].groups) == (5, 10, 5)
    assert (small[6].in_channels, small[6].out_channels, small[6].groups) == (6, 6, 3)
    assert small[8].in_features == 6 * 9
    same(model, small, torch.randn(3, 3, 5, 5))


def test_residual_additions_need_both_sides() -> None:
    model = Functional(
        lambda m, x: m.c(torch.relu(m.a(x) + m.b(x))), a=nn.Linear(6, 8), b=nn.Linear(6, 8), c=nn.Linear(8, 3)
    )
    with torch.no_grad():
        model.a.weight[4:] = 0
        model.b.weight[6:] = 0
    small = fusedreg.compact(model, torch.randn(4, 6))
    assert shapes(small)["a.weight"] == shapes(small)["b.weight"] == (6, 6)
    same(model, small, torch.randn(9, 6))


def test_concatenation_flatten_split_and_pooling() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        x = torch.cat([F.relu(m.a(x)), F.max_pool2d(m.b(x), 3, 1, 1)], dim=1)
        some, others = m.c(x).chunk(2, dim=1)
        x = F.avg_pool2d(some * others, 2)
        return m.d(x.view(x.size(0), -1))

    model = Functional(
        forward, a=nn.Conv2d(3, 4, 1), b=nn.Conv2d(3, 6, 1), c=nn.Conv2d(10, 12, 1), d=nn.Linear(6 * 9, 5)
    )
    with torch.no_grad():
        model.a.weight[1:] = 0
        model.b.weight[:2] = 0
        model.c.weight[[1, 7, 2]] = 0  # 1 and 7 are a pair, 2 has another half
        model.c.bias[[1, 7]] = 0
        model.c.bias[2] = 0  # 0 times the other half
    small = fusedreg.compact(model, torch.randn(2, 3, 6, 6))
    assert shapes(small)["a.weight"][0] == 1
    assert shapes(small)["b.weight"][0] == 4
    assert shapes(small)["c.weight"] == (8, 5, 1, 1)
    assert shapes(small)["d.weight"] == (5, 4 * 9)
    assert small.report.left == []
    same(model, small, torch.randn(3, 3, 6, 6))


def test_squeeze_and_excitation_by_sizes_of_tensors() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        x = m.a(x)
        b, c, _, _ = x.shape
        gate = m.gate(F.adaptive_avg_pool2d(x, 1).view(b, c)).view(b, c, 1, 1)
        return m.b((x * gate).mean((2, 3)))

    gate = nn.Sequential(nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 8), nn.Sigmoid())
    model = Functional(forward, a=nn.Conv2d(3, 8, 3), gate=gate, b=nn.Linear(8, 3))
    with torch.no_grad():
        model.a.weight[3:] = 0
        model.a.bias[3:] = 0
    small = fusedreg.compact(model, torch.randn(2, 3, 6, 6))
    assert shapes(small)["gate.2.weight"] == (3, 4)
    same(model, small, torch.randn(3, 3, 6, 6))


def test_embedding_columns_and_tied_weights() -> None:
    embedding = nn.Embedding(11, 8)
    decoder = nn.Linear(8, 11)
    decoder.weight = embedding.weight
    model = Functional(lambda m, i: m.decoder(m.embedding(i)), embedding=embedding, decoder=decoder)
    with torch.no_grad():
        embedding.weight[:, 5:] = 0
    small = fusedreg.compact(model, torch.randint(11, (2, 4)))
    assert small.embedding.weight is small.decoder.weight
    assert (small.embedding.embedding_dim, small.decoder.in_features) == (5, 5)
    same(model, small, torch.randint(11, (3, 5)))


def test_attention_loses_heads() -> None:
    layer = nn.TransformerEncoderLayer(8, 4, 16, dropout=0.1, batch_first=True)
    model = nn.Sequential(nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), nn.Linear(8, 3))
    with torch.no_grad():
        for each in model[0].layers:
            each.self_attn.in_proj_bias.normal_()
        first, second = model[0].layers
        first.self_attn.in_proj_weight[16:20] = 0  # the values of heads 0 and 1, which send their biases on
        second.self_attn.out_proj.weight[:, 4:] = 0  # heads 2 and 3 are not read
        first.linear1.weight[3:] = 0
    small = fusedreg.compact(model, torch.randn(2, 5, 8))
    attentions = [each.self_attn for each in small[0].layers]
    assert [type(each) for each in attentions] == [CompactAttention] * 2
    assert [each.num_heads for each in attentions] == [2, 2]
    assert attentions[0].in_proj_weight.shape == (12, 8)
    assert small[0].layers[0].linear1.out_features == 3
    assert {left.reason for left in small.report.left} == {"a removal would change the statistics that it divides by"}
    same(model, small, torch.randn(3, 7, 8))
    again = fusedreg.compact(small, torch.randn(2, 5, 8))
    assert shapes(again) == shapes(small)


def test_a_mask_may_leave_no_key_to_a_head_that_sends_a_constant() -> None:
    def forward(m: Any, x: Tensor, mask: Tensor) -> Tensor:
        return m.out(m.attention(x, x, x, attn_mask=mask, need_weights=False)[0])

    model = Functional(forward, attention=nn.MultiheadAttention(8, 4, batch_first=True), out=nn.Linear(8, 3))
    with torch.no_grad():
        model.attention.in_proj_weight[16:20] = 0
        model.attention.in_proj_bias.fill_(1)
    inputs = torch.randn(2, 5, 8), torch.ones(5, 5, dtype=torch.bool).triu(1)
    assert fusedreg.compact(model, inputs).report.layers == []
    with torch.no_grad():
        model.attention.in_proj_bias[16:20] = 0
    small = fusedreg.compact(model, inputs)
    assert small.attention.num_heads == 2
    # With gradients on: torch's fused path makes NaN of a query without keys, its other path 0, as ours does.
    all_hidden = inputs[0], torch.ones(5, 5, dtype=torch.bool)
    torch.testing.assert_close(small.eval()(*all_hidden), model.eval()(*all_hidden))


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("is_batched", [True, False])
def test_compact_attention_is_torchs(batch_first: bool, need_weights: bool, is_batched: bool) -> None:
    theirs = nn.MultiheadAttention(8, 2, batch_first=batch_first).double().eval()
    ours = CompactAttention(theirs, 2)
    q, k = (torch.randn(3, length, 8).double() for length in (4, 5))
    if not batch_first:
        q, k = q.transpose(0, 1), k.transpose(0, 1)
    padding = torch.tensor([[False] * 5, [False] * 4 + [True], [False, True] * 2 + [False]])
    if not is_batched:
        q, k, padding = torch.randn(4, 8).double(), torch.randn(5, 8).double(), padding[1]
    causal = torch.ones(4, 5, dtype=torch.bool).triu(1)
    for masks in (
        {},
        {"attn_mask": causal},
        {"key_padding_mask": padding},
        {"attn_mask": causal, "key_padding_mask": padding},
    ):
        expected = theirs(q, k, k, need_weights=need_weights, **masks)
        result = ours(q, k, k, need_weights=need_weights, **masks)
        for ours_, theirs_ in zip(result, expected, strict=True):
            assert (ours_ is None) == (theirs_ is None)
            if ours_ is not None:
                torch.testing.assert_close(ours_, theirs_)


# -- what stays


def left(model: nn.Module, *inputs: Tensor, **options: Any) -> str:
    small = fusedreg.compact(model, inputs, **options)
    same(model, small, *inputs)
    return str(small.report)


def test_constants_beside_zero_padding_are_put_together_in_one_channel() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 4, 3, padding=1), nn.Flatten(), nn.Linear(64, 2))
    zero_rows(model[0], keep=3)
    x = torch.randn(2, 3, 4, 4)
    assert "1: a constant beside its padding, or under its stride, is not one constant (1 dead" in left(model, x)
    small = fusedreg.compact(model, x)
    assert small[0].out_channels == 4
    optimizer = torch.optim.SGD(model.parameters())
    assert fusedreg.compact(model, x, optimizer=optimizer)[0].out_channels == 8
    with torch.no_grad():
        model[0].bias[3:] = 0
    small = fusedreg.compact(model, x)
    assert small[0].out_channels == 3
    assert small.report.left == []


def test_average_pooling_over_padding_is_no_constant() -> None:
    pool = nn.AvgPool2d(3, 1, padding=1)
    model = nn.Sequential(nn.Conv2d(3, 8, 1), pool, nn.Conv2d(8, 4, 1), nn.Flatten(), nn.Linear(64, 2))
    zero_rows(model[0], keep=5)
    assert "8x3x1x1" not in left(model, torch.randn(2, 3, 4, 4))
    pool.count_include_pad = False
    assert "8x3x1x1 -> 5x3x1x1" in left(model, torch.randn(2, 3, 4, 4))


def test_layer_norm_is_left_whole() -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.Linear(8, 3))
    zero_rows(model[0], keep=5)
    assert "1: a removal would change the statistics that it divides by (3 dead channels)" in left(
        model, torch.randn(4, 6)
    )


def test_sizes_in_the_code_are_named() -> None:
    model = Functional(lambda m, x: m.b(m.a(x).view(-1, 8 * 4)), a=nn.Conv1d(3, 8, 1), b=nn.Linear(32, 2))
    zero_rows(model.a, keep=5)
    text = left(model, torch.randn(2, 3, 4))
    assert "the size 32 stands in the code; -1 or x.size() would follow (3 dead channels)" in text
    assert "m.a(x).view(-1, 8 * 4)" in text


def test_a_module_called_twice_with_other_constants() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        return m.read(torch.sigmoid(m.a(x))) + m.read(torch.tanh(m.a(x)))

    model = Functional(forward, a=nn.Linear(6, 8), read=nn.Linear(8, 3))
    zero_rows(model.a, keep=5)
    assert "read: its bias cannot take a constant" in left(model, torch.randn(4, 6))
    with torch.no_grad():
        model.a.bias[5:] = 0  # sigmoid(0) is still one
    assert "read: its bias cannot take a constant" in left(model, torch.randn(4, 6))


def test_a_parameter_that_another_module_has_too() -> None:
    model = Functional(lambda m, x: m.b(m.a(x)), a=nn.Linear(6, 8), b=nn.Linear(8, 3), unused=nn.Linear(6, 8))
    model.unused.weight = model.a.weight
    zero_rows(model.a, keep=5)
    assert "unused.weight is the same tensor, in a module that the forward does not call" in left(
        model, torch.randn(4, 6)
    )


@pytest.mark.parametrize(
    ("forward", "reason"),
    [
        (lambda m, x: m.b(m.a(x) if x.sum() > 0 else m.a(-x)), "torch.fx cannot trace its forward"),
        (lambda m, x: m.b(m.a(x).sort(dim=1).values), "sort is not among what compact follows"),
        (lambda m, x: m.b(m.a(x) / m.a(x).size(1)), "it computes with the number of channels"),
        (lambda m, x: m.b(m.a(x).softmax(1)), "it is over the channels"),
        (lambda m, x: m.b(m.a(x)[:, [1, 0, 2, 3, 4, 5, 6, 7]]), "its indices are computed"),
        (lambda m, x: m.b(m.a(x).unflatten(1, (2, 4)).flatten(1)), "it splits the channels"),
        (lambda m, x: m.b(F.linear(x, m.a.weight * 1, m.a.bias)), "its weight is not a parameter of the model"),
    ],
)
def test_what_is_not_followed_is_left_whole_with_the_reason(forward: Any, reason: str) -> None:
    model = Functional(forward, a=nn.Linear(6, 8), b=nn.Linear(8, 3))
    zero_rows(model.a, keep=5)
    with torch.no_grad():
        model.b.weight[:, 5:] = 0
    text = left(model, torch.rand(4, 6))
    assert reason in text
    assert "8x6" not in text


def test_names_that_an_operation_in_place_leaves_behind() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        x = m.a(x)
        y = F.relu(x, inplace=True)
        return m.b(x + y)  # x is relu(x), too

    model = Functional(forward, a=nn.Linear(6, 8), b=nn.Linear(8, 3))
    zero_rows(model.a, keep=5)
    with torch.no_grad():
        model.a.bias[5:] = -1
    small = fusedreg.compact(model, torch.randn(4, 6))
    assert shapes(small)["a.weight"] == (5, 6)
    assert small.report.folded == 0
    same(model, small, torch.randn(9, 6))


def test_hooks_and_parametrizations_are_left_whole() -> None:
    model = mlp()
    zero_rows(model[0], keep=5)
    handle = model[1].register_forward_hook(lambda module, inputs, output: output + inputs[0].mean(1, keepdim=True))
    assert "1: it has forward hooks" in left(model, torch.randn(4, 6))
    handle.remove()
    nn.utils.parametrizations.weight_norm(model[2])
    assert "2: ParametrizedLinear is not among what compact follows" in left(model, torch.randn(4, 6))


def test_the_call_compares_and_raises(monkeypatch) -> None:
    """A handler that is wrong: padding forgotten."""
    from fusedreg.sparsity.compact import follow

    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 4, 3, padding=1), nn.Flatten(), nn.Linear(64, 2))
    zero_rows(model[0], keep=5)
    monkeypatch.setattr(follow, "_is_padded", lambda module: False)
    with pytest.raises(RuntimeError, match=r"outputs differ by .*: this is a bug in fusedreg.compact"):
        fusedreg.compact(model, torch.zeros(2, 3, 4, 4))


def test_bad_input() -> None:
    with pytest.raises(TypeError, match="Invalid model: a str"):
        fusedreg.compact("model", torch.randn(2, 6))
    model = mlp()
    model.report = "mine"
    with pytest.raises(ValueError, match="has an attribute `report`"):
        fusedreg.compact(model, torch.randn(2, 6))
    random = Functional(lambda m, x: m.a(F.dropout(x, 0.5, training=True)), a=nn.Linear(6, 8))
    with pytest.raises(ValueError, match="random in eval mode"):
        fusedreg.compact(random, torch.randn(2, 6))


def test_keyword_arguments_modes_and_dtypes() -> None:
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = mlp()

        def forward(self, x: Tensor, scale: float = 1.0, *, mask: Tensor | None = None) -> dict[str, Tensor]:
            if isinstance(x, Tensor) and x.ndim != 2:
                raise ValueError("two dimensions")
            out = self.net(x if mask is None else x * mask) * scale
            return {"logits": out}

    model = Masked().bfloat16()
    model.net[1].eval()
    zero_rows(model.net[0], keep=5)
    x, mask = torch.randn(4, 6).bfloat16(), torch.ones(6).bfloat16()
    small = fusedreg.compact(model, {"x": x, "mask": mask, "scale": 2.0})
    assert shapes(small)["net.0.weight"] == (5, 6)
    assert small.net[0].weight.dtype == torch.bfloat16
    assert [module.training for module in small.modules()] == [module.training for module in model.modules()]
    assert "parameters: 143 -> 101" in str(small.report)


# -- the optimizer


def make(model: nn.Module, cls: str) -> torch.optim.Optimizer:
    if cls == "torch":
        return torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    groups = fusedreg.param_groups(model, l1=1e-5, l2=1e-3, freeze_zeros=True, exempt=["4.*"])
    options = {"momentum": 0.9} if cls == "FusedRegSGD" else {}
    return getattr(fusedreg, cls)(groups, lr=1e-2, max_grad_norm=0.5, **options)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> None:
    rng = torch.Generator().manual_seed(1)
    for _ in range(steps):
        x = torch.randn(16, 6, generator=rng, dtype=torch.float64)
        optimizer.zero_grad()
        (model(x) - x[:, :3]).square().mean().backward()
        optimizer.step()


@pytest.mark.parametrize("cls", ["FusedRegAdam", "FusedRegSGD", "FusedRegRMSprop", "torch"])
def test_training_goes_on_as_with_the_units_standing_still(cls: str) -> None:
    """Dead units of a ReLU net whose biases are not above 0 get no gradient: the whole model leaves them by itself."""
    model = mlp().double()
    optimizer = make(model, cls)
    train(model, optimizer, 20)
    dead = {0: [5, 6, 7], 2: [0, 6]}
    with torch.no_grad():
        for i, rows in dead.items():
            model[i].weight[rows] = 0
            model[i].bias[rows] = -1
            for param in (model[i].weight, model[i].bias):
                for state in optimizer.state[param].values():
                    if state.ndim:
                        state[rows] = 0
    whole, whole_optimizer = copy.deepcopy((model, optimizer))
    small = fusedreg.compact(model, torch.randn(4, 6).double(), optimizer=optimizer)
    assert small.report.folded == 0
    assert shapes(small)["2.weight"] == (5, 5)
    assert {id(p) for g in optimizer.param_groups for p in g["params"]} == {id(p) for p in small.parameters()}
    train(whole, whole_optimizer, 30)
    train(small, optimizer, 30)
    kept = {i: [j for j in range(whole[i].out_features) if j not in rows] for i, rows in dead.items()}
    torch.testing.assert_close(small[0].weight, whole[0].weight[kept[0]])
    torch.testing.assert_close(small[2].weight, whole[2].weight[kept[2]][:, kept[0]])
    torch.testing.assert_close(small[4].weight, whole[4].weight[:, kept[2]])
    torch.testing.assert_close(small[4].bias, whole[4].bias)
    first = optimizer.state[small[2].weight]
    for key, value in whole_optimizer.state[whole[2].weight].items():
        torch.testing.assert_close(first[key], value[kept[2]][:, kept[0]] if value.ndim else value)


def test_with_an_optimizer_no_layer_gets_a_bias() -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.Sigmoid(), nn.Linear(8, 3, bias=False))
    zero_rows(model[0], keep=5)
    optimizer = fusedreg.FusedRegAdam(model.parameters())
    small = fusedreg.compact(model, torch.randn(4, 6), optimizer=optimizer)
    assert shapes(small) == shapes(model)
    assert "2: its bias cannot take a constant" in str(small.report)


def test_a_schedule_goes_on_to_as_many_units() -> None:
    model = mlp().double()
    groups = fusedreg.param_groups(model, sparsity=0.6, sparsity_unit="rows", exempt=["4.*"])
    optimizer = fusedreg.FusedRegAdam(groups, lr=1e-2)
    schedule = fusedreg.SparsitySchedule(optimizer, 100, every=5)
    for _ in range(50):
        train(model, optimizer, 1)
        schedule.step()
    before = sum(int((model[i].weight != 0).any(1).sum()) for i in (0, 2))
    model = fusedreg.compact(model, torch.randn(4, 6).double(), optimizer=optimizer)
    assert sum(len(model[i].weight) for i in (0, 2)) == before
    for _ in range(50):
        train(model, optimizer, 1)
        schedule.step()
    # 15 rows, of which 60 % were to go.
    assert sum(int((model[i].weight != 0).any(1).sum()) for i in (0, 2)) == 6


def test_optimizers_that_cannot_go_along() -> None:
    model = mlp()
    zero_rows(model[0], keep=5)
    x = torch.randn(4, 6)
    with pytest.raises(TypeError, match="Invalid optimizer: a int"):
        fusedreg.compact(model, x, optimizer=1)
    with pytest.raises(ValueError, match="it has no parameter of the model"):
        fusedreg.compact(model, x, optimizer=torch.optim.SGD(mlp().parameters()))
    optimizer = torch.optim.Adafactor(model.parameters())
    model(x).sum().backward()
    optimizer.step()
    params = [*optimizer.param_groups[0]["params"]]
    with pytest.raises(ValueError, match=r"its state .row_var. of a parameter of shape"):
        fusedreg.compact(model, x, optimizer=optimizer)
    assert all(a is b for a, b in zip(params, optimizer.param_groups[0]["params"], strict=True))
