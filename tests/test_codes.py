"""``state_dtype="int8"``: codes and scales, by the oracle, by the kernels, and in state dicts."""

from __future__ import annotations

import copy
import io
import math
import pickle
from typing import Any

import pytest
import torch
from helpers import OPTIMIZER_VARIANTS, OPTIMIZERS, TWINS, assert_same_bits, one_thread, run, set_grads, snapshot
from torch import Tensor, nn

import fusedreg
from fusedreg import FusedRegAdam, FusedRegRMSprop, FusedRegSGD
from fusedreg.backends import BACKENDS
from fusedreg.codes import BLOCK, DTYPES, LINEAR, ROOTS, are_codes, decode, encode, make_codes, scale_name
from fusedreg.parity import known, regularized

EACH = [name for name in ("cpp", "reference") if BACKENDS[name].unavailable_reason() is None]
each_backend = pytest.mark.parametrize("backend", EACH)
needs_cpp = pytest.mark.skipif("cpp" not in EACH, reason="the extension is not built")
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=["linear", "roots"])
SIZES = (1, 2, 255, 256, 257, 1000)
BITS = 1 << 16


def needed(cls: type, variant: str) -> list[Any]:
    options = cls.spec.variants[variant]
    group = cls([torch.zeros(1)], **options).param_groups[0]
    return [state for state in cls.spec.states if state.needed(group)]


# The rules with their variants, and among them those that keep all that they need in 8 bits.
WITH_STATES = [(cls, variant) for cls, variant in OPTIMIZER_VARIANTS if needed(cls, variant)]
IN_CODES = [each for each in WITH_STATES if all(state.codes for state in needed(*each))]
REFUSED = [each for each in WITH_STATES if each not in IN_CODES]
PLAIN = [each for each in IN_CODES if each[1] == "plain" or (each[0] is FusedRegSGD and each[1] == "momentum")]


def named(cases: list[tuple[type, str]]) -> Any:
    ids = [f"{cls.__name__}-{variant}" for cls, variant in cases]
    return pytest.mark.parametrize(("cls", "variant"), cases, ids=ids)


def encoded(x: Tensor, dtype: torch.dtype, random: Tensor | None = None) -> tuple[Tensor, Tensor]:
    codes, scales = make_codes(x, dtype)
    encode(codes, scales, x, random)
    return codes, scales


def numbers(n: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    """Over many orders of magnitude, in each block and from block to block."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, generator=generator) * torch.exp(2 * torch.randn(n, generator=generator))
    x *= torch.exp(4 * torch.randn(-(-n // BLOCK), generator=generator)).repeat_interleave(BLOCK)[:n]
    return x.square() if dtype == ROOTS else x


def bits(n: int, seed: int = 0) -> Tensor:
    return torch.randint(BITS, (n,), generator=torch.Generator().manual_seed(seed))


def as_stored(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x.double().sqrt() if dtype == ROOTS else x.double()


# -- what codes stand for


@each_dtype
@pytest.mark.parametrize("n", SIZES)
def test_half_a_code_to_the_nearest_and_one_at_random(n, dtype) -> None:
    x = numbers(n, dtype)
    steps = as_stored(x, dtype).abs().split(BLOCK)
    # A hundredth for the scale, which is cut off; and a root above zero has one code at the least.
    unit = torch.cat([block.max().expand(len(block)) for block in steps]) / {LINEAR: 127, ROOTS: 255}[dtype]
    error = (as_stored(decode(*encoded(x, dtype)), dtype) - as_stored(x, dtype)).abs()
    is_raised = (dtype == ROOTS) & (as_stored(x, dtype) < unit / 2)
    assert (error <= torch.where(is_raised, 1.0, 0.51) * unit).all()
    error = (as_stored(decode(*encoded(x, dtype, bits(n))), dtype) - as_stored(x, dtype)).abs()
    assert (error <= 1.01 * unit).all()


@each_dtype
@pytest.mark.parametrize("random", [False, True], ids=["nearest", "random"])
@pytest.mark.parametrize("n", [0, *SIZES])
def test_decoded_and_encoded_again_they_are_the_same(n, random, dtype) -> None:
    for seed in range(5):
        codes, scales = encoded(numbers(n, dtype, seed), dtype, bits(n, seed) if random else None)
        assert scales.numel() == math.ceil(n / BLOCK)
        exact = codes.double() * scales.double().repeat_interleave(BLOCK)[:n]  # no product is rounded
        assert torch.equal(exact, exact.float().double())
        assert_same_bits(list(encoded(decode(codes, scales), dtype)), [codes, scales])
        # and by any bits: what is a code already stays it
        assert_same_bits(list(encoded(decode(codes, scales), dtype, bits(n, 9))), [codes, scales])


@each_dtype
def test_random_rounding_is_right_in_the_mean(dtype) -> None:
    n = 100 * BLOCK
    for share in (2**-12, 0.1, 0.5, 0.9):
        x = torch.full((n,), 1.0)
        x[::2] = (10 + share) / {LINEAR: 127, ROOTS: 255}[dtype]
        if dtype == ROOTS:
            x = x.square()
        codes, scales = encoded(x, dtype, bits(n))
        assert ((codes[::2] == 10) | (codes[::2] == 11)).all()
        share = float(as_stored(x, dtype)[0] / scales[0].double()) - 10
        up = int((codes[::2] == 11).sum())
        assert abs(up - n / 2 * share) <= 5 * math.sqrt(n / 2 * share * (1 - share)) + 1e-9


@each_dtype
@pytest.mark.parametrize("random", [None, 0, BITS - 1])
def test_zeros_stay_zeros_and_what_divides_a_step_none(random, dtype) -> None:
    x = numbers(1000, dtype)
    x[::3] = 0.0
    x[256:512] = 0.0
    x[512] = -0.0
    x[700:768] = torch.finfo(torch.float32).tiny / 8
    codes, scales = encoded(x, dtype, None if random is None else torch.full((1000,), random))
    found = decode(codes, scales)
    assert (found[x == 0] == 0).all()
    assert scales[1] == 0
    if dtype == ROOTS:
        assert (found[x > 0] > 0).all()
        assert (found[found > 0] >= torch.finfo(torch.float32).tiny).all()


@each_dtype
def test_the_smallest_blocks(dtype) -> None:
    """Of numbers that are hardly there, and without a number that is not."""
    for exponent in (-149, -140, -127, -110, -100, -90, -60):
        x = torch.tensor([2.0**exponent, 0.0, 2.0 ** max(exponent - 3, -149)])
        codes, scales = encoded(x, dtype)
        found = decode(codes, scales)
        assert found.isfinite().all()
        assert found[1] == 0
        assert_same_bits([decode(*encoded(found, dtype))], [found])
        if dtype == ROOTS:
            assert (found[::2] > 0).all()
            assert (found <= x.clamp(min=2.0**-126) * 1.01).all()
        else:
            assert (found - x).abs().max() <= max(2.0**-101, 2.0**exponent / 100)


@each_dtype
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, -1.0])
def test_what_is_no_number_is_seen(bad, dtype) -> None:
    if bad == -1.0 and dtype == LINEAR:
        pytest.skip("a number")
    x = numbers(1000, dtype)
    x[300] = bad
    found = decode(*encoded(x, dtype))
    assert found[256:512].isnan().all()
    assert found[:256].isfinite().all()
    assert found[512:].isfinite().all()


@pytest.mark.parametrize("layout", ["channels_last", "transposed", "gaps"])
def test_blocks_are_counted_in_memory(layout) -> None:
    w = torch.randn(3, 5, 7, 4)
    w = {
        "channels_last": lambda: w.to(memory_format=torch.channels_last),
        "transposed": lambda: w.permute(3, 1, 0, 2).contiguous().permute(2, 1, 3, 0),
        "gaps": lambda: torch.zeros(3, 5, 7, 4, 2)[..., 0].copy_(w),
    }[layout]()
    codes, scales = encoded(w, LINEAR)
    flat = w.as_strided((420,), (1,)) if layout != "gaps" else w.flatten()
    expected, its_scales = encoded(flat, LINEAR)
    assert_same_bits([codes.as_strided((420,), (1,)), scales], [expected, its_scales])
    assert decode(codes, scales).stride() == codes.stride()


# -- the kernels


def moments(backend: str, grads: list[Tensor], **options: Any) -> list[Tensor]:
    """The codes and scales that Adam stores of a gradient and its square, exactly."""
    params = [nn.Parameter(torch.zeros_like(grad)) for grad in grads]
    options = {"state_dtype": "int8", **options}
    optimizer = FusedRegAdam(params, lr=0.0, betas=(0.0, 0.0), backend=backend, **options)
    for param, grad in zip(params, grads, strict=True):
        param.grad = grad
    optimizer.step()
    return [value for param in params for value in optimizer.state[param].values() if value.ndim]


def every_kind() -> Tensor:
    """Every exponent, both signs, zeros; one of a kind that is none in some blocks."""
    generator = torch.Generator().manual_seed(0)
    exponents = torch.arange(255).repeat_interleave(40)
    mantissas = torch.randint(1 << 23, (10200,), generator=generator) * (torch.arange(10200) % 7 != 0)
    x = (exponents << 23 | mantissas).to(torch.int32).view(torch.float32) * (1 - 2 * (torch.arange(10200) % 2))
    mixed = numbers(10200, LINEAR)
    mixed[::11] = 0.0
    mixed[1600], mixed[3200], mixed[4800] = math.nan, math.inf, -math.inf
    mixed[5120:5376] = 0.0
    return torch.cat([x, mixed])


@needs_cpp
@pytest.mark.parametrize("rounds", [False, True], ids=["nearest", "stochastic"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_the_kernels_have_the_oracle_s_bits(instruction_set, two_threads, dtype, rounds) -> None:
    large = every_kind()
    buffer = torch.empty(1001, dtype=dtype)
    grads = [large.to(dtype), *(numbers(n, LINEAR, n).to(dtype) for n in SIZES), torch.zeros(0, dtype=dtype)]
    grads += [buffer[1:].copy_(numbers(1000, LINEAR)), numbers(300 * 7, LINEAR).view(7, 300).to(dtype).t()]
    options = {"stochastic_rounding": rounds, "rounding_seed": 7}
    expected = moments("reference", grads, **options)
    assert_same_bits(moments("cpp", grads, **options), expected)
    torch.set_num_threads(1)
    assert_same_bits(moments("cpp", grads, **options), expected)
    if rounds:
        assert not torch.equal(moments("cpp", grads)[0], expected[0])


LAYOUTS = {
    "contiguous": lambda w: w.clone(),
    "channels_last": lambda w: w.clone(memory_format=torch.channels_last) if w.ndim == 4 else w.clone(),
    "transposed": lambda w: w.mT.contiguous().mT if w.ndim >= 2 else w.clone(),
    "gaps": lambda w: torch.zeros(*w.shape, 2, dtype=w.dtype)[..., 0].copy_(w),
}


@needs_cpp
@pytest.mark.parametrize("rounds", [False, True], ids=["nearest", "stochastic"])
@pytest.mark.parametrize("grad_layout", ["contiguous", "its own"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout(layout, grad_layout, rounds) -> None:
    """In all of a step, where the gradient is laid out otherwise, too, and copied."""
    results = []
    for backend in EACH:
        generator = torch.Generator().manual_seed(0)

        def exact(shape: tuple[int, ...], generator: torch.Generator = generator) -> Tensor:
            return torch.randint(-128, 129, shape, generator=generator) / 64

        shapes = ((41, 59), (3, 5, 7, 4), (1000,), (), (0, 3))
        params = [nn.Parameter(LAYOUTS[layout](exact(shape))) for shape in shapes]
        assert params[1].is_contiguous() == (layout == "contiguous")
        options = {"stochastic_rounding": rounds, "state_dtype": "int8"}
        optimizer = FusedRegSGD(params, lr=0.25, momentum=0.5, backend=backend, **options)
        for _ in range(4):
            for param in params:
                param.grad = LAYOUTS[layout if grad_layout == "its own" else "contiguous"](exact(param.shape))
            optimizer.step()
        results.append(snapshot(optimizer))
    # Half of a decoded buffer, and a gradient: where the sum is no float32, it is rounded once, here and there.
    assert_same_bits(*results)


@needs_cpp
@pytest.mark.parametrize("rounds", [False, True], ids=["nearest", "stochastic"])
@named(IN_CODES)
def test_every_rule_follows_the_oracle(cls, variant, rounds) -> None:
    """Where float32 is rounded otherwise, a code may be another, by one, and the weights by what that makes; and where
    a block's scale is, some of its codes."""
    results = []
    with one_thread():
        for backend, options in [("cpp", {"state_dtype": "int8"}), ("reference", {"state_dtype": "int8"}), ("cpp", {})]:
            params = [nn.Parameter(numbers(37 * 53, LINEAR).view(37, 53).clamp(-2, 2)), nn.Parameter(torch.ones(1000))]
            options = {**options, "stochastic_rounding": rounds}
            optimizer = cls(params, backend=backend, **regularized(cls, variant), **options)
            run(optimizer, params, 6)
            results.append((params, optimizer))
    (ours, optimizer), (theirs, reference), (wide, plain) = results
    names = [state.name for state in needed(cls, variant)]
    for param, other, its_wide in zip(ours, theirs, wide, strict=True):
        torch.testing.assert_close(param, other, rtol=0, atol=2e-3)
        assert (param - other).abs().mean() < 1e-5
        assert ((param == 0) == (other == 0)).float().mean() > 0.999
        for name in names:
            codes, its_codes = optimizer.state[param][name], reference.state[other][name]
            assert codes.dtype == its_codes.dtype == next(s.codes for s in cls.spec.states if s.name == name)
            assert (codes.int() - its_codes.int()).abs().max() <= 1
            others = [block.sum().item() for block in (codes != its_codes).flatten().split(BLOCK)]
            assert max(others) <= BLOCK / 16
            assert sum(others) - max(others) < 2e-3 * codes.numel()  # one scale may be another
            state = decode(codes, optimizer.state[param][scale_name(name)])
            # as in float32, up to what six roundings may come to
            assert (state - plain.state[its_wide][name]).abs().max() <= 0.06 * state.abs().max()


@needs_cpp
@pytest.mark.parametrize("unit", ["rows", "columns", 5])
def test_penalties_on_units(unit) -> None:
    """Whose rows are no multiple of a block: chunks are cut by blocks then, and not by units."""
    results = []
    for backend in EACH:
        params = [
            nn.Parameter(numbers(30 * 300, LINEAR).view(30, 300).clamp(-1, 1)),
            nn.Parameter(torch.ones(10, 512)),
        ]
        options = {"group_l1": 0.05, "unit": unit, "stochastic_rounding": True, "state_dtype": "int8"}
        optimizer = FusedRegAdam(params, lr=0.02, backend=backend, **options)
        with one_thread():
            run(optimizer, params, 2)
        results.append(snapshot(optimizer))
    for ours, theirs in zip(*results, strict=True):
        if are_codes(ours):
            assert (ours.int() - theirs.int()).abs().max() <= 1
            assert (ours != theirs).float().mean() < 2e-3
        else:
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@each_backend
def test_a_step_is_not_divided_by_a_second_moment_that_was_lost(backend) -> None:
    """Beside a large one: its root is less than half a code. As a zero it would make a step a million times as long."""
    w = nn.Parameter(torch.zeros(256))
    optimizer = FusedRegAdam([w], lr=0.1, backend=backend, state_dtype="int8")
    w.grad = torch.full((256,), 1e-3)
    w.grad[0] = 100.0
    for _ in range(5):
        optimizer.step()
        assert (optimizer.state[w]["exp_avg_sq"] > 0).all()
    assert w.abs().max() < 0.51


# -- memory


def test_bytes_an_element() -> None:
    w = nn.Parameter(torch.zeros(1000, 1000))
    for cls, options, most in [(FusedRegAdam, {}, 2.06), (FusedRegSGD, {"momentum": 0.9}, 1.03)]:
        optimizer = cls([w], state_dtype="int8", **options)
        w.grad = torch.ones_like(w)
        optimizer.step()
        state = optimizer.state[w].values()
        assert sum(each.numel() * each.element_size() for each in state) / w.numel() <= most


# -- checkpoints


def through_a_file(state_dict: dict[str, Any]) -> dict[str, Any]:
    buffer = io.BytesIO()
    torch.save(state_dict, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


def trained(cls: type, variant: str = "plain", **options: Any) -> Any:
    params = [
        nn.Parameter(LAYOUTS["transposed"](numbers(777, LINEAR).view(37, 21).clamp(-2, 2))),
        nn.Parameter(torch.ones(300)),
    ]
    optimizer = cls(params, **known(cls, lr=0.01, l1=1e-3), **cls.spec.variants[variant], **options)
    with one_thread():
        run(optimizer, params, 3)
    return optimizer


def resumed(optimizer: Any, saved: dict[str, Any], **options: Any) -> Any:
    params = [nn.Parameter(param.detach().clone()) for param in optimizer.param_groups[0]["params"]]
    ours = type(optimizer)(params, **options)
    ours.load_state_dict(saved)
    return ours


@named(IN_CODES)
def test_a_checkpoint_goes_on_bit_for_bit(cls, variant) -> None:
    """Native or not: codes of a decoded state are what they were."""
    options = {"state_dtype": "int8", "stochastic_rounding": True}
    optimizer = trained(cls, variant, **options)
    saved = through_a_file(optimizer.state_dict())
    native = through_a_file(optimizer.state_dict(native=True))
    for own in saved["state"].values():
        assert not any(map(are_codes, own.values()))
        assert own.keys() == {state.name for state in (*needed(cls, variant), *cls.spec.scalar_states)} & own.keys()
    assert any(map(are_codes, native["state"][0].values()))
    others = [
        resumed(optimizer, saved, **options),
        resumed(optimizer, native, **options),
        copy.deepcopy(optimizer),
        pickle.loads(pickle.dumps(optimizer)),
    ]
    before = snapshot_by_name(optimizer)
    with one_thread():
        run(optimizer, optimizer.param_groups[0]["params"], 2)
        for other in others:
            assert snapshot_by_name(other).keys() == before.keys()
            assert_same_bits(list(snapshot_by_name(other).values()), list(before.values()))
            run(other, other.param_groups[0]["params"], 2)
            ours, theirs = snapshot_by_name(other), snapshot_by_name(optimizer)
            assert_same_bits(list(ours.values()), list(theirs.values()))


def snapshot_by_name(optimizer: Any) -> dict[str, Tensor]:
    params = optimizer.param_groups[0]["params"]
    found = {f"{i} {name}": value.clone() for i, p in enumerate(params) for name, value in optimizer.state[p].items()}
    return dict(sorted({**found, **{f"{i}": p.detach().clone() for i, p in enumerate(params)}}.items()))


@named(PLAIN)
def test_into_the_twin_and_back(cls, variant) -> None:
    optimizer = trained(cls, variant, state_dtype="int8")
    params = [nn.Parameter(param.detach().clone()) for param in optimizer.param_groups[0]["params"]]
    twin = TWINS[cls](params, **known(cls, lr=0.01), **cls.spec.variants[variant])
    twin.load_state_dict(optimizer.state_dict())
    for param, own in zip(params, optimizer.state.values(), strict=True):
        for state in needed(cls, variant):
            expected = decode(own[state.name], own[scale_name(state.name)])
            torch.testing.assert_close(twin.state[param][state.name], expected, rtol=0, atol=0)
    run(twin, params, 2)
    back = resumed(optimizer, copy.deepcopy(twin.state_dict()), state_dtype="int8")
    for param, (mine, own) in zip(params, back.state.items(), strict=True):
        for state in needed(cls, variant):
            expected = encoded(LAYOUTS["transposed"](twin.state[param][state.name]), state.codes)
            assert mine.stride() == own[state.name].stride()
            assert_same_bits([own[state.name], own[scale_name(state.name)]], list(expected))


def test_a_native_state_dict_is_not_taken_for_numbers() -> None:
    optimizer = trained(FusedRegAdam, state_dtype="int8")
    params = [nn.Parameter(torch.zeros(37, 21)), nn.Parameter(torch.zeros(300))]
    twin = torch.optim.Adam(params)
    twin.load_state_dict(optimizer.state_dict(native=True))
    set_grads(params, 0)
    with pytest.raises(KeyError, match="exp_avg"):
        twin.step()


def test_how_it_is_stored_is_the_loading_optimizer_s_to_say() -> None:
    optimizer = trained(FusedRegAdam, state_dtype="int8")
    numbers_of = [copy.deepcopy(own) for own in optimizer.state_dict()["state"].values()]
    for native in (False, True):
        for state_dtype in (None, torch.bfloat16, torch.float32):
            other = resumed(optimizer, optimizer.state_dict(native=native), state_dtype=state_dtype)
            for own, expected in zip(other.state.values(), numbers_of, strict=True):
                assert own.keys() == expected.keys()
                for name in ("exp_avg", "exp_avg_sq"):
                    assert_same_bits([own[name]], [expected[name].to(state_dtype)])
            run(other, other.param_groups[0]["params"], 1)


def test_another_layout_than_was_saved() -> None:
    """The blocks are others: the codes are made anew, each at most half a code from what it was."""
    optimizer = trained(FusedRegAdam, state_dtype="int8")
    params = [nn.Parameter(param.detach().clone().contiguous()) for param in optimizer.param_groups[0]["params"]]
    other = FusedRegAdam(params, state_dtype="int8")
    other.load_state_dict(optimizer.state_dict(native=True))
    (own, *_), (before, *_) = other.state_dict()["state"].values(), optimizer.state_dict()["state"].values()
    assert other.state[params[0]]["exp_avg"].is_contiguous()
    assert (own["exp_avg"] - before["exp_avg"]).abs().max() <= 0.51 * before["exp_avg"].abs().max() / 127
    run(other, params, 1)


def test_hooks_see_what_is_saved() -> None:
    optimizer = trained(FusedRegAdam, state_dtype="int8")
    seen = []
    optimizer.register_state_dict_post_hook(lambda _, state_dict: seen.append(state_dict))
    for native in (False, True):
        saved = optimizer.state_dict(native=native)
        assert saved is seen[-1]
    assert are_codes(optimizer.state_dict(native=True)["state"][0]["exp_avg_codes"])
    assert are_codes(optimizer.state[optimizer.param_groups[0]["params"][0]]["exp_avg"])


# -- beside other things


@each_backend
def test_a_change_of_mind(backend) -> None:
    (param,) = params = [nn.Parameter(numbers(600, LINEAR).view(20, 30))]
    optimizer = FusedRegAdam(params, lr=0.01, backend=backend)

    def step_with(state_dtype: Any) -> tuple[torch.dtype, set[str]]:
        optimizer.param_groups[0]["state_dtype"] = state_dtype
        run(optimizer, params, 1)
        return optimizer.state[param]["exp_avg_sq"].dtype, optimizer.state[param].keys() - {"step"}

    names = {"exp_avg", "exp_avg_sq"}
    with_scales = names | {"exp_avg_scale", "exp_avg_sq_scale"}
    assert step_with(None) == (torch.float32, names)
    assert step_with("int8") == (ROOTS, with_scales)
    assert step_with(torch.int8) == (ROOTS, with_scales)
    assert step_with(None) == (ROOTS, with_scales)  # what is there stays
    assert step_with(torch.bfloat16) == (torch.bfloat16, names)


@each_backend
def test_a_layout_that_changes(backend) -> None:
    conv = nn.Conv2d(3, 8, 3)
    optimizer = FusedRegAdam(conv.parameters(), lr=0.01, backend=backend, state_dtype="int8")
    run(optimizer, list(conv.parameters()), 1)
    before = decode(*(optimizer.state[conv.weight][name] for name in ("exp_avg", "exp_avg_scale"))).clone()
    conv.to(memory_format=torch.channels_last)
    set_grads(list(conv.parameters()), 1)
    expected = 0.9 * before + 0.1 * conv.weight.grad
    optimizer.step()
    own = optimizer.state[conv.weight]
    assert own["exp_avg"].is_contiguous(memory_format=torch.channels_last)
    assert (decode(own["exp_avg"], own["exp_avg_scale"]) - expected).abs().max() <= 1.01 * expected.abs().max() / 127


def test_compact_takes_them_along() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))
    optimizer = FusedRegAdam(model.parameters(), lr=0.01, state_dtype="int8")
    with torch.no_grad():
        model[0].weight[2:4] = 0
        model[0].bias[2:4] = 0
    model(torch.randn(5, 4)).square().mean().backward()
    optimizer.param_groups[0]["lr"] = 0.0  # makes the states
    optimizer.step()
    own = optimizer.state[model[0].weight]
    kept = decode(own["exp_avg"], own["exp_avg_scale"])[[0, 1, 4, 5]]
    small = fusedreg.compact(model, torch.randn(5, 4), optimizer=optimizer)
    assert_same_bits([optimizer.state_dict()["state"][0]["exp_avg"]], [kept])
    small(torch.randn(5, 4)).square().mean().backward()
    optimizer.step()
    assert optimizer.state[small[0].weight]["exp_avg_sq"].dtype == ROOTS


@each_backend
def test_it_can_be_given_in_both_ways_and_per_group(backend) -> None:
    first, second, third = params = [nn.Parameter(torch.ones(5)) for _ in range(3)]
    groups = [{"params": [first], "state_dtype": "int8"}, {"params": [second], "state_dtype": torch.int8}]
    optimizer = FusedRegAdam([*groups, {"params": [third]}], lr=0.1, backend=backend)
    run(optimizer, params, 2)
    assert [optimizer.state[p]["exp_avg"].dtype for p in params] == [LINEAR, LINEAR, torch.float32]


@each_backend
def test_what_a_sum_begins_with(backend) -> None:
    w = nn.Parameter(torch.ones(300))
    optimizer = fusedreg.FusedRegAdagrad(
        [w], lr=0.0, initial_accumulator_value=0.3, backend=backend, state_dtype="int8"
    )
    w.grad = torch.zeros(300)
    optimizer.step()
    torch.testing.assert_close(optimizer.state_dict()["state"][0]["sum"], torch.full((300,), 0.3), rtol=1e-4, atol=0)


@each_backend
def test_an_average_follows_where_its_block_does_not(backend) -> None:
    """To the nearest it stays where it is, as a thousandth of it is less than half a code."""

    def second_moment(rounds: bool) -> float:
        w = nn.Parameter(torch.zeros(1024))
        optimizer = FusedRegAdam([w], lr=0.0, backend=backend, state_dtype="int8", stochastic_rounding=rounds)
        w.grad = torch.full_like(w, 1.0)
        w.grad[::256] = 2.0
        for beta2 in (0.0, *[0.999] * 300):
            optimizer.param_groups[0]["betas"] = (0.9, beta2)
            optimizer.step()
            w.grad = torch.where(w.grad == 1, 0.5, w.grad)
        own = optimizer.state[w]
        return float(decode(own["exp_avg_sq"], own["exp_avg_sq_scale"]).view(4, 256)[:, 1:].mean())

    with one_thread():
        assert second_moment(True) == pytest.approx(0.25 + 0.75 * 0.999**300, abs=0.01)
        assert second_moment(False) > 0.95


# -- what is refused


@named(REFUSED)
def test_states_that_8_bits_are_too_few_for(cls, variant) -> None:
    params = [nn.Parameter(torch.ones(3))]
    with pytest.raises(
        ValueError, match=rf"Invalid state_dtype value: torch.int8 for the rule '{cls.spec.name}', whose"
    ):
        cls(params, state_dtype="int8", **cls.spec.variants[variant])


def test_every_rule_says_how_or_why_not() -> None:
    for cls in OPTIMIZERS:
        for state in cls.spec.states:
            assert (state.codes in DTYPES) != (state.why_no_codes != type(state)("").why_no_codes)


def test_a_switch_that_needs_another_state_later() -> None:
    params = [nn.Parameter(torch.ones(3))]
    optimizer = FusedRegRMSprop(params, state_dtype="int8")
    run(optimizer, params, 1)
    before = snapshot(optimizer)
    optimizer.param_groups[0]["centered"] = True
    set_grads(params, 1)
    with pytest.raises(ValueError, match="whose 'grad_avg' cannot be in 8 bits"):
        optimizer.step()
    assert_same_bits(snapshot(optimizer), before)


def test_what_does_not_go_with_it() -> None:
    params = [nn.Parameter(torch.ones(3))]
    for option in ("differentiable", "capturable"):
        with pytest.raises(ValueError, match=rf"Invalid {option} value: True with state_dtype=torch.int8"):
            FusedRegAdam(params, state_dtype="int8", **{option: True})
    with pytest.raises(ValueError, match=r"torch.int8 for a group with torch.complex64 parameters \(allowed: None\)"):
        FusedRegAdam([torch.zeros(3, dtype=torch.complex64, requires_grad=True)], state_dtype="int8")
    for value in ("int4", "uint8", torch.uint8, 8):
        with pytest.raises(ValueError, match=r"Invalid state_dtype value: .* or 'int8'\)"):
            FusedRegAdam(params, state_dtype=value)


def test_codes_without_their_scales() -> None:
    for broken in ("gone", "short", "double"):
        optimizer = trained(FusedRegAdam, state_dtype="int8")
        params = optimizer.param_groups[0]["params"]
        saved = optimizer.state_dict(native=True)
        for own in (optimizer.state[params[0]], saved["state"][0]):
            scales = own["exp_avg_scale"]
            own["exp_avg_scale"] = {"gone": None, "short": scales[1:], "double": scales.double()}[broken]
        before = [param.detach().clone() for param in params]
        with pytest.raises(ValueError, match="Invalid state 'exp_avg': its codes do not come with their scales"):
            resumed(optimizer, saved, state_dtype="int8")
        set_grads(params, 0)
        with pytest.raises(ValueError, match="Invalid state 'exp_avg': its codes do not come with their scales"):
            optimizer.step()
        assert_same_bits([param.detach() for param in params], before)


def test_a_native_state_of_another_shape() -> None:
    optimizer = trained(FusedRegAdam, state_dtype="int8")
    params = [nn.Parameter(torch.zeros(21, 37)), nn.Parameter(torch.zeros(300))]
    with pytest.raises(
        ValueError, match=r"'exp_avg_codes' is of shape \(37, 21\), the parameter a Parameter of \(21, 37\)"
    ):
        FusedRegAdam(params, state_dtype="int8").load_state_dict(optimizer.state_dict(native=True))
