"""``stochastic_rounding``: bfloat16 is rounded up or down by bits that depend on seed and position, and on no more.

Where a test counts, chance could make it fail, once: the seeds are fixed, so that it then always would. Its bounds are
five standard deviations of the binomial distribution that is meant.
"""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from helpers import OPTIMIZERS, assert_same_bits, make_params, one_thread, run, snapshot, through_a_file
from torch import Tensor, nn

import fusedreg
from fusedreg import FusedRegAdam, FusedRegSGD, rounding
from fusedreg.backends import BACKENDS, choose
from fusedreg.parity import regularized
from fusedreg.step.checks import check_rounding

BF16 = torch.bfloat16
ULP = 2.0**-7  # of bfloat16 between 1 and 2
EACH = [name for name in ("cpp", "reference") if BACKENDS[name].unavailable_reason() is None]
each_backend = pytest.mark.parametrize("backend", EACH)


def sgd(w: Tensor, backend: str, **options: Any) -> FusedRegSGD:
    return FusedRegSGD([w.requires_grad_()], lr=1.0, stochastic_rounding=True, backend=backend, **options)


def rounded_up(n: int, share: float, backend: str, steps: int = 1, seed: int = 0) -> Tensor:
    """Whether each of ``n`` ones, less a gradient of ``-share`` ulp, has been rounded up, in each of some steps."""
    w = torch.ones(n, dtype=BF16)
    optimizer = sgd(w, backend, rounding_seed=seed)
    w.grad = torch.full((n,), -share * ULP, dtype=BF16)
    found = []
    for _ in range(steps):
        with torch.no_grad():
            w.fill_(1.0)
        optimizer.step()
        assert ((w == 1) | (w == 1 + ULP)).all()
        found.append(w.detach() != 1)
    return torch.stack(found)


def assert_binomial(count: float, n: int, p: float) -> None:
    assert abs(count - n * p) <= 5 * math.sqrt(n * p * (1 - p)) + 1e-9


# -- the bits


def test_the_hash_is_the_published_permutation() -> None:
    """Undone by the inverse that its author gives."""

    def inverse(x: int) -> int:
        x ^= x >> 16
        x = x * 0x43021123 & 0xFFFFFFFF
        x ^= x >> 15 ^ x >> 30
        x = x * 0x1D69E2A5 & 0xFFFFFFFF
        return x ^ x >> 16

    numbers = [0, 1, 2**31, 2**32 - 1, *torch.randint(2**32, (1000,)).tolist()]
    for x in numbers:
        assert inverse(rounding.hash32(x)) == x
    key = 0x12345678
    ours = rounding.random_bits(torch.tensor(numbers), key).tolist()
    assert ours == [rounding.hash32(x ^ key) >> 16 for x in numbers]


@each_backend
@pytest.mark.parametrize("share", [2**-9, 0.1, 0.5, 0.9, 1 - 2**-8])
def test_unbiased(share, backend) -> None:
    n = 200_000
    p = float(torch.tensor(share, dtype=BF16))
    assert_binomial(int(rounded_up(n, share, backend).sum()), n, p)


@each_backend
def test_unbiased_for_each_element_over_steps(backend) -> None:
    """As many bounds as elements: six deviations. A position's bits differ from step to step."""
    steps, n, p = (2000, 256, 0.25)
    ups = rounded_up(n, p, backend, steps).sum(0).double()
    assert float((ups - steps * p).abs().max()) <= 6 * math.sqrt(steps * p * (1 - p))
    # and all together they are as far from the mean as chance has it: chi-squared, of n degrees of freedom
    spread = float((ups - steps * p).square().sum()) / (steps * p * (1 - p))
    assert abs(spread - n) <= 5 * math.sqrt(2 * n)


@each_backend
def test_neighbours_steps_parameters_streams_and_seeds_are_independent(backend) -> None:
    n, p = 50_000, 0.5
    one, two = rounded_up(n, p, backend, steps=2)
    other_seed = rounded_up(n, p, backend, seed=1)[0]
    params = [torch.ones(n, dtype=BF16, requires_grad=True) for _ in range(2)]
    optimizer = FusedRegSGD(params, lr=1.0, momentum=0.5, stochastic_rounding=True, backend=backend)
    for param in params:
        param.grad = torch.zeros(n, dtype=BF16)
    optimizer.step()
    for param in params:
        optimizer.state[param]["momentum_buffer"].fill_(2.0)
        param.grad.fill_(-p * ULP / 2)
    optimizer.step()  # the buffers round 1 less half of what is between 1 and the number below it
    buffers = [optimizer.state[param]["momentum_buffer"] < 1 for param in params]
    for a, b in [
        (one[1:], one[:-1]),
        (one[1024:], one[:-1024]),
        (one[n // 2 :], one[: n // 2]),
        (one, two),
        (one, other_seed),
        (buffers[0], buffers[1]),
    ]:
        assert_binomial(int(a.sum()), a.numel(), p)
        assert_binomial(int((a & b).sum()), a.numel(), p * p)
        assert_binomial(int((~a & b).sum()), a.numel(), p * p)


def test_weights_and_states_have_their_own_bits() -> None:
    n = 50_000
    positions = torch.arange(n)
    key = rounding.key_of(rounding.key_of_step(0), 0)
    streams = [rounding.random_bits(positions, rounding.key_of(key, stream)) < 2**15 for stream in range(5)]
    for i, one in enumerate(streams):
        for other in streams[:i]:
            assert_binomial(int((one & other).sum()), n, 0.25)


# -- what is kept


def patterns() -> Tensor:
    """float32: every exponent, the lowest, the highest and some random mantissas, both signs; NaN and infinity."""
    generator = torch.Generator().manual_seed(0)
    exponents = torch.arange(256).repeat_interleave(16) << 23
    mantissas = torch.randint(1 << 23, (256 * 16,), generator=generator)
    mantissas[::16], mantissas[1::16], mantissas[2::16], mantissas[3::16] = 0, (1 << 23) - 1, 1, 1 << 16
    bits = (exponents | mantissas).to(torch.int32)
    return torch.cat([bits, bits | torch.iinfo(torch.int32).min]).view(torch.float32)


@pytest.mark.parametrize("random", [0, 1, 1 << 15, (1 << 16) - 1])
def test_every_kind_of_number(random) -> None:
    """Down to the number below or up to the one above in magnitude, and never from one kind to another."""
    x = patterns()
    got = rounding.round_stochastically(x, torch.full(x.shape, random))
    assert torch.equal(got.isnan(), x.isnan())
    assert torch.equal(got.isinf(), x.isinf())
    assert torch.equal(torch.signbit(got)[~x.isnan()], torch.signbit(x)[~x.isnan()])
    exact = x.to(BF16) == x
    assert torch.equal(got[exact].float(), x[exact])
    magnitude = x.view(torch.int32) & 0x7FFFFFFF
    down, lost = magnitude & 0x7FFF0000, magnitude & 0xFFFF
    wants_up = (lost + random > 0xFFFF) & (down < 0x7F7F0000)  # but where up is infinity
    expected = (down + wants_up.to(torch.int32) * 0x10000).view(torch.float32).copysign(x)
    assert torch.equal(got.float()[~x.isnan()], expected[~x.isnan()])


def test_the_kernel_keeps_them_as_the_reference_does(instruction_set) -> None:
    """Exactly: the buffer is what is given, less a zero."""
    x = patterns().double()  # of float64 parameters: nothing is lost before it is rounded
    results = []
    for backend in ("cpp", "reference"):
        w = torch.zeros_like(x).requires_grad_()
        optimizer = FusedRegSGD([w], lr=0.0, momentum=0.5, stochastic_rounding=True, state_dtype=BF16, backend=backend)
        w.grad = x.clone()
        optimizer.step()
        results.append(optimizer.state[w]["momentum_buffer"])
    ours, theirs = results
    assert torch.equal(ours.isnan(), theirs.isnan())
    assert torch.equal(ours[~ours.isnan()], theirs[~ours.isnan()])
    assert torch.equal(ours.isnan(), x.isnan())
    assert not torch.equal(ours[~ours.isnan()], x[~x.isnan()].to(BF16))  # some are not to the nearest


# -- the same bits, whoever computes them


def grid(shape: tuple[int, ...], seed: int) -> Tensor:
    """Numbers whose steps are exact in float32, so that rounding is all that can differ."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.randint(-128, 129, shape, generator=generator) / 64).to(BF16)


LAYOUTS = {
    "contiguous": lambda w: w.clone(),
    "channels_last": lambda w: w.clone(memory_format=torch.channels_last) if w.ndim == 4 else w.clone(),
    "transposed": lambda w: w.mT.contiguous().mT if w.ndim >= 2 else w.clone(),
    "strided": lambda w: torch.zeros(*w.shape, 2, dtype=w.dtype)[..., 0].copy_(w),
}
SHAPES = ((271, 259), (3, 5, 7, 4), (1, 6, 1, 5), (11,), (), (0, 3))


def exact_run(backend: str, layout: str = "contiguous", dtype: torch.dtype = BF16, **options: Any) -> list[Tensor]:
    params = [LAYOUTS[layout](grid(shape, i).to(dtype)).requires_grad_() for i, shape in enumerate(SHAPES)]
    options = {"momentum": 0.5, "state_dtype": BF16, "stochastic_rounding": True, **options}
    optimizer = FusedRegSGD(params, lr=0.25, backend=backend, **options)
    for step in range(4):
        for i, param in enumerate(params):
            param.grad = LAYOUTS[layout](grid(param.shape, 100 * step + i).to(dtype))  # so that nothing is staged
        optimizer.step()
    found = [*params, *(optimizer.state[param]["momentum_buffer"] for param in params)]
    return [each.detach().contiguous().clone() for each in found]


@pytest.mark.parametrize("dtype", [BF16, torch.float32, torch.float64], ids=str)
def test_the_kernels_have_the_reference_s_bits(instruction_set, two_threads, dtype) -> None:
    expected = exact_run("reference", dtype=dtype)
    assert_same_bits(exact_run("cpp", dtype=dtype), expected)
    nearest = exact_run("cpp", dtype=dtype, stochastic_rounding=False)
    assert not all(map(torch.equal, nearest, expected))
    torch.set_num_threads(1)
    assert_same_bits(exact_run("cpp", dtype=dtype), expected)


@each_backend
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_in_memory_has_the_same_bits(layout, backend) -> None:
    assert_same_bits(exact_run(backend, layout), exact_run("reference"))


@pytest.mark.parametrize("unit", ["rows", "columns", "tensor"])
def test_stage_7_rounds_by_bits_of_its_own(unit, two_threads) -> None:
    """A unit that keeps its norm is stored once; one that is cut down to it is stored twice. All are a power of two."""

    def shrink(backend: str) -> Tensor:
        w = torch.full((64, 64), 1.0, dtype=BF16)
        sizes = {"rows": 8.0, "columns": 8.0, "tensor": 64.0}
        optimizer = sgd(w, backend, max_unit_norm=sizes[unit], unit=unit)
        w.grad = torch.full((64, 64), -0.5 * ULP, dtype=BF16)
        optimizer.step()
        return w.detach()

    ours, theirs = shrink("cpp"), shrink("reference")
    assert (ours == theirs).float().mean() > 0.999
    # Half of the weights were 1 + ulp. By the norm all are divided by about 1 + ulp / 2, and are rounded again.
    mean = float(ours.double().mean())
    assert mean == pytest.approx(1.0, abs=5 * ULP / 2 / 64)
    assert float(ours.max()) > 1 > float(ours.min())


@pytest.mark.parametrize("group_l1", [False, True], ids=["elements", "units"])
@pytest.mark.parametrize("cls", OPTIMIZERS, ids=lambda cls: cls.__name__)
def test_every_rule_follows_the_reference(cls, group_l1) -> None:
    """Up to what is rounded otherwise in float32, which seldom changes what becomes of it in bfloat16."""
    if "cpp" not in EACH:
        pytest.skip("the extension is not built")
    options = regularized(cls)
    if group_l1:
        if cls.spec.why_no_units:
            pytest.skip(cls.spec.why_no_units)
        options |= dict(group_l1=0.05, unit="rows")
    for dtype in (BF16, torch.float32):
        runs, nearest = [], []
        for backend, found, rounds in [("cpp", runs, True), ("reference", runs, True), ("cpp", nearest, False)]:
            with one_thread():
                params = make_params(((37, 53), (1029,)), dtype)
                optimizer = cls(params, backend=backend, state_dtype=BF16, stochastic_rounding=rounds, **options)
                run(optimizer, params, 1)
            names = cls.spec.needed_states(optimizer.param_groups[0])
            states = [optimizer.state[param][name] for param in params for name in names]
            found.append([each.detach() for each in (*params, *states) if each.dtype == BF16])
        for ours, theirs in zip(*runs, strict=True):
            differs = ours != theirs
            assert differs.float().mean() < 0.01
            torch.testing.assert_close(ours, theirs, rtol=2 * ULP, atol=1e-30)
        if runs[0]:
            assert any(not torch.equal(a, b) for a, b in zip(runs[0], nearest[0], strict=True))


# -- what it is for


@each_backend
def test_an_average_of_squares_stalls_without_it(backend) -> None:
    n, steps, g = 4096, 1000 if backend == "cpp" else 100, 0.5
    means = {}
    for rounds in (False, True):
        w = torch.zeros(n, requires_grad=True)
        optimizer = FusedRegAdam([w], lr=0.0, state_dtype=BF16, stochastic_rounding=rounds, backend=backend)
        w.grad = torch.full((n,), g)
        optimizer.step()
        optimizer.state[w]["exp_avg_sq"].fill_(1.0)
        for _ in range(steps):
            optimizer.step()
        means[rounds] = float(optimizer.state[w]["exp_avg_sq"].double().mean())
    assert means[False] == 1.0  # 0.999 + 0.001 g^2 is nearer to 1 than to the number below it
    exact = g * g + (1 - g * g) * 0.999**steps
    # Each step's error has at most the variance of a coin toss between neighbours 2^-8 apart, and decays.
    deviation = math.sqrt(2**-16 / 4 / (1 - 0.999**2) / n)
    assert abs(means[True] - exact) <= 5 * deviation


@each_backend
def test_small_steps_move_bfloat16_weights_in_the_mean(backend) -> None:
    n, steps = 4096, 100
    moved = {}
    for rounds in (False, True):
        w = torch.ones(n, dtype=BF16, requires_grad=True)
        optimizer = FusedRegSGD([w], lr=2.0**-10, stochastic_rounding=rounds, backend=backend)
        w.grad = torch.full((n,), -0.5, dtype=BF16)
        for _ in range(steps):
            optimizer.step()
        moved[rounds] = float(w.detach().double().mean()) - 1
    assert moved[False] == 0.0
    p = 0.5 * 2**-10 / ULP
    assert abs(moved[True] - steps * p * ULP) <= 5 * ULP * math.sqrt(steps * p * (1 - p) / n)


@each_backend
def test_zeros_stay_zeros(backend) -> None:
    """Those that the prox makes, those that are frozen, and states that no gradient has touched."""
    torch.manual_seed(0)
    w = torch.randn(1000, dtype=BF16)
    w[::2] = 0
    w[1] = -0.0
    options = {"lr": 0.01, "stochastic_rounding": True, "backend": backend}
    optimizer = FusedRegAdam([w.requires_grad_()], freeze_zeros=True, **options)
    for step in range(20):
        generator = torch.Generator().manual_seed(step)
        w.grad = torch.randn(1000, generator=generator).to(BF16)
        w.grad[:10] = 0
        optimizer.step()
        assert (w.detach()[::2] == 0).all()
    assert w.detach()[1] == 0
    assert (optimizer.state[w]["exp_avg_sq"][:10] == 0).all()
    assert (optimizer.state[w]["exp_avg_sq"][10:] != 0).all()
    lasso = FusedRegAdam([w], l1=1e4, **{**options, "lr": 0.05})
    for _ in range(300):
        lasso.step()
    assert (w.detach() == 0).all()


def test_target_sparsity_keeps_its_share() -> None:
    params = [param.detach().clone().requires_grad_() for param in make_params(((40, 50),), BF16)]
    optimizer = FusedRegAdam(params, lr=0.01, stochastic_rounding=True, sparsity=0.75)
    schedule = fusedreg.SparsitySchedule(optimizer, 20, every=5)
    run_steps = 30
    for step in range(run_steps):
        params[0].grad = grid((40, 50), step)
        optimizer.step()
        if step < 20:
            schedule.step()
    assert int((params[0] == 0).sum()) == 1500


# -- the seed


@pytest.mark.parametrize("cls", [FusedRegAdam, FusedRegSGD])
def test_a_checkpoint_goes_on_bit_for_bit(cls) -> None:
    params = make_params(((7, 13), (33,)), BF16)
    optimizer = cls(params, lr=0.1, stochastic_rounding=True, rounding_seed=7)
    run(optimizer, params, 3)
    copies = [param.detach().clone().requires_grad_() for param in params]
    other = cls(copies, lr=0.1, stochastic_rounding=True)
    other.load_state_dict(through_a_file(optimizer.state_dict()))
    assert other.param_groups[0]["rounding_seed"] == optimizer.param_groups[0]["rounding_seed"] != 7
    again = copy.deepcopy(optimizer)
    for one in (optimizer, other, again):
        run(one, one.param_groups[0]["params"], 3, first_seed=200)
    assert_same_bits(snapshot(other), snapshot(optimizer))
    assert_same_bits(snapshot(again), snapshot(optimizer))


def test_the_seed_decides_and_torch_s_does_not() -> None:
    def after(seed: int, torch_seed: int) -> Tensor:
        torch.manual_seed(torch_seed)
        return rounded_up(1000, 0.5, EACH[0], seed=seed)

    assert torch.equal(after(3, 0), after(3, 1))
    assert not torch.equal(after(3, 0), after(4, 0))
    assert not torch.equal(after(0, 0), after(2**32, 0))


def test_seeds_do_not_run_into_each_other() -> None:
    seed, seen = 0, set()
    for _ in range(1000):
        seen.add(seed)
        seed = rounding.next_seed(seed)
        assert 0 <= seed < 2**63
    assert len(seen) == 1000
    assert not seen & set(range(1, 1000))


def test_the_seed_moves_with_the_steps_that_are_taken() -> None:
    w = torch.ones(3, dtype=BF16)
    optimizer = sgd(w, EACH[0])
    w.grad = torch.ones(3, dtype=BF16)
    optimizer.found_inf = torch.ones(())
    optimizer.step()
    assert optimizer.param_groups[0]["rounding_seed"] == 0
    del optimizer.found_inf
    optimizer.step()
    assert optimizer.param_groups[0]["rounding_seed"] == rounding.next_seed(0)
    plain = FusedRegSGD([w], lr=0.1)
    plain.step()
    assert plain.param_groups[0]["rounding_seed"] == 0


def test_how_it_is_stored_is_the_loading_optimizer_s_to_say() -> None:
    params = make_params(((3,),), BF16)
    plain, ours = FusedRegAdam(params), FusedRegAdam(params, stochastic_rounding=True)
    run(plain, params, 1)
    ours.load_state_dict(copy.deepcopy(plain.state_dict()))
    assert ours.param_groups[0]["stochastic_rounding"] is True
    plain.load_state_dict(copy.deepcopy(ours.state_dict()))
    assert plain.param_groups[0]["stochastic_rounding"] is False


def test_switched_between_two_steps() -> None:
    w = torch.ones(1000, dtype=BF16)
    optimizer = sgd(w, EACH[0])
    w.grad = torch.full((1000,), -ULP / 4, dtype=BF16)
    ups = []
    for rounds in (False, True, False):
        optimizer.param_groups[0]["stochastic_rounding"] = rounds
        with torch.no_grad():
            w.fill_(1.0)
        optimizer.step()
        ups.append(int((w.detach() > 1).sum()))
    assert ups[0] == ups[2] == 0 < ups[1]


def test_distributed_checkpoints() -> None:
    checkpointing = pytest.importorskip("torch.distributed.checkpoint.state_dict")
    options = checkpointing.StateDictOptions(flatten_optimizer_state_dict=True)
    model = nn.Linear(4, 3).bfloat16()
    optimizer = FusedRegAdam(model.parameters(), stochastic_rounding=True)
    model(torch.ones(2, 4, dtype=BF16)).sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    saved = checkpointing.get_optimizer_state_dict(model, optimizer, options=options)
    other = FusedRegAdam(model.parameters(), stochastic_rounding=True)
    checkpointing.set_optimizer_state_dict(model, other, saved, options=options)
    assert other.param_groups[0]["rounding_seed"] == optimizer.param_groups[0]["rounding_seed"] > 0


# -- what is refused


@pytest.mark.parametrize("value", [1, "yes", None, 0.5])
def test_it_is_a_switch(value) -> None:
    with pytest.raises(ValueError, match=r"Invalid stochastic_rounding value: .* \(allowed: True or False\)"):
        FusedRegAdam(make_params(), stochastic_rounding=value)


@pytest.mark.parametrize("seed", [-1, 2**63, 1.0, True, "0"])
def test_seeds_that_are_none(seed) -> None:
    with pytest.raises(ValueError, match=r"Invalid rounding_seed value: .* \(allowed: a whole number"):
        FusedRegAdam(make_params(), rounding_seed=seed)
    params = make_params(((3,),), BF16)
    optimizer = FusedRegAdam(params, stochastic_rounding=True)
    optimizer.param_groups[0]["rounding_seed"] = seed
    before = params[0].detach().clone()
    params[0].grad = torch.ones(3, dtype=BF16)
    with pytest.raises(ValueError, match="Invalid rounding_seed value"):
        optimizer.step()
    assert torch.equal(params[0], before)
    assert not optimizer.state


def test_float16_is_refused() -> None:
    with pytest.raises(ValueError, match=r"True for a group with torch.float16 parameters \(allowed: False"):
        FusedRegAdam(make_params(((3,),), torch.float16), stochastic_rounding=True)
    with pytest.raises(ValueError, match=r"True with state_dtype=torch.float16"):
        FusedRegAdam(make_params(((3,),)), stochastic_rounding=True, state_dtype=torch.float16)
    params = make_params(((3,),))
    optimizer = FusedRegAdam(params, stochastic_rounding=True)
    run(optimizer, params, 1)
    optimizer.state[params[0]]["exp_avg"] = optimizer.state[params[0]]["exp_avg"].half()
    with pytest.raises(ValueError, match=r"beside a state in torch.float16"):
        run(optimizer, params, 1)


def test_what_cannot_be_done_with_it(monkeypatch) -> None:
    w = torch.ones(3, requires_grad=True)
    param = w.clone()
    optimizer = FusedRegAdam([param], differentiable=True, stochastic_rounding=True)
    param.grad = torch.ones(3)
    with pytest.raises(RuntimeError, match="differentiable=True does not work with stochastic_rounding"):
        optimizer.step()
    flat = torch.ones(3, dtype=BF16)
    flat._fsdp_flattened = True
    with pytest.raises(ValueError, match="parameters of FullyShardedDataParallel, which are flat"):
        check_rounding(flat, {BF16}, differentiable=False)
    check_rounding(flat, {torch.float32}, differentiable=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    optimizer = sgd(torch.ones(3, dtype=BF16), "reference")
    with pytest.raises(RuntimeError, match="cannot be captured into a CUDA graph with stochastic_rounding"):
        optimizer.step()


def test_a_backend_that_rounds_to_the_nearest_is_not_used(monkeypatch) -> None:
    for name in ("cpp", "cuda", "triton"):
        monkeypatch.setattr(BACKENDS[name], "rounds_stochastically", False, raising=False)
    param = torch.ones(3, dtype=BF16)
    choice = choose("auto", FusedRegAdam.spec, param, [], differentiable=False, with_rounding=True)
    assert choice.name == "reference"
    if "cpp" in EACH:
        with pytest.raises(RuntimeError, match="it rounds to the nearest, and stochastic_rounding is on"):
            run(sgd(param, "cpp"), [param], 1)


@each_backend
def test_wide_parameters_are_stored_as_they_are(backend) -> None:
    results = []
    for rounds in (False, True):
        params = make_params(((7, 13),))
        optimizer = FusedRegAdam(params, stochastic_rounding=rounds, backend=backend)
        run(optimizer, params, 2)
        results.append(snapshot(optimizer))
    assert_same_bits(*results)
