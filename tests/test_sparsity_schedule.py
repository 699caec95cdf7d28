"""SparsitySchedule against a sort: the weights with the smallest scores go, as many as the schedule says."""

from __future__ import annotations

import copy
import math
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from conftest import needs_cpp
from helpers import (
    IDS,
    OPTIMIZER_VARIANTS,
    FusedRegAdam,
    FusedRegSGD,
    assert_same_bits,
    make_params,
    run,
    set_grads,
    snapshot,
    variant_of,
)
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import fusedreg
from fusedreg import SparsitySchedule, param_groups
from fusedreg.rules.spec import Scalars
from fusedreg.sparsity import scores, selection, units
from fusedreg.sparsity.weights import weights_of

every_variant = pytest.mark.parametrize(("cls", "variant"), OPTIMIZER_VARIANTS, ids=IDS)
ROOT = Path(__file__).parents[1]
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


@pytest.fixture(params=[pytest.param("cpp", marks=needs_cpp), "torch"])
def counting(request, monkeypatch):
    """Who counts the scores."""
    if request.param == "torch":
        monkeypatch.setattr(scores.CppScores, "takes", staticmethod(lambda weights: False))
    return request.param


def exact_scores(optimizer, param, group) -> torch.Tensor:
    """sqrt(d) * |w| in float64, with the oracle's metric; where a weight is zero, 0."""
    spec, state = optimizer.spec, optimizer.state.get(param, {})
    w = param.detach().double()
    score = w.abs()
    if spec.metric is not None and state:
        states = {name: state[name].double() for name in spec.needed_states(group)}
        scalars = {name: float(state[name]) for name in spec.needed_scalar_states(group)}
        score = score * spec.metric(states, scalars, group).sqrt()
    return torch.where(w == 0, 0.0, score)


def assert_the_smallest_went(before: list[torch.Tensor], params, goal: int, slack: float = 1e-6) -> None:
    """``goal`` weights are zero, and none that stayed has a smaller score than one that went, but for rounding."""
    went = torch.cat([(param.detach() == 0).flatten() for param in params])
    all_scores = torch.cat([score.flatten() for score in before])
    assert int(went.sum()) == goal
    if 0 < goal < len(went):
        assert all_scores[went].max() <= all_scores[~went].min() * (1 + slack)


def at_once(optimizer, **options) -> None:
    """One exact renewal, to the targets."""
    SparsitySchedule(optimizer, total_steps=1, begin=0.0, end=1.0, every=1, **options).step()


# -- the metric


# What a rule's metric reads as it was before the step. Nobody keeps that; the score reads what the step has left.
READ_BEFORE_THE_STEP = {"adadelta": ("acc_delta",)}


@every_variant
@pytest.mark.parametrize("t", [1, 50])  # RAdam is not rectified in its first steps
def test_the_metric_is_that_of_the_step(cls, variant, t) -> None:
    spec, group = cls.spec, cls(make_params(), **variant_of(cls, variant)).param_groups[0]
    generator = torch.Generator().manual_seed(t)
    w, g = (torch.randn(50, generator=generator, dtype=torch.float64) for _ in range(2))
    states = {name: torch.rand(50, generator=generator, dtype=torch.float64) for name in spec.needed_states(group)}
    before = {each.name: each.initial(group) for each in spec.scalar_states if each.needed(group)}
    for _ in range(t):
        after = spec.next_scalars(before, group, dict.fromkeys(before, torch.float64))
        scalars, before = Scalars(before, after), after
    step = spec.step(w, g, states, scalars, group)
    assert (spec.metric is None) == (step.metric is None)
    if spec.metric is not None:
        left = {**step.state, **{name: states[name] for name in READ_BEFORE_THE_STEP.get(spec.name, ())}}
        assert spec.metric(left, scalars.after, group).equal(step.metric)


@needs_cpp
@every_variant
@pytest.mark.parametrize(("steps", "dtype"), [(2, torch.float64), (8, torch.float32)], ids=["float64", "float32"])
def test_cpp_scores_are_in_the_metric_of_the_oracle(cls, variant, steps, dtype) -> None:
    """A weight of 1 has the score d, which its key is the bits of."""
    params = make_params(((),) * 40, dtype)
    optimizer = cls(params, **{"lr": 1e-3, **variant_of(cls, variant)}, sparsity=0.5)
    run(optimizer, params, steps)
    for param in params:
        param.data.fill_(1.0)
    weights = list(weights_of(optimizer, optimizer.param_groups))
    assert all(each.in_metric == (cls.spec.metric is not None) for each in weights)
    counted = scores.CppScores(weights, list(range(40)), dtype == torch.float64)
    shift, bins = 48 if dtype == torch.float64 else 16, scores.LEADING_BINS
    counted.count(shift, 0, bins, torch.zeros(bins, dtype=torch.int64))
    keys = torch.tensor([each.key for each in counted.largest()])
    d = keys.view(torch.float64) if dtype == torch.float64 else keys.int().view(torch.float32)
    of_weights = [each.metric(each.states) if each.in_metric else torch.ones((), dtype=dtype) for each in weights]
    torch.testing.assert_close(d, torch.stack(of_weights), rtol=8 * torch.finfo(dtype).eps, atol=0.0)


def test_a_long_training_is_in_its_metric_too() -> None:
    """NAdam's other scalar state is a product that goes to 0."""
    param = make_params(((3, 3),))[0]
    optimizer = fusedreg.FusedRegNAdam([param], sparsity=0.5)
    run(optimizer, [param], 1)
    optimizer.state[param]["mu_product"].zero_()
    assert next(weights_of(optimizer, optimizer.param_groups)).in_metric


def test_adams_metric_by_hand(counting) -> None:
    """The weight whose gradients are large stays, though it is the smaller one."""
    param = nn.Parameter(torch.tensor([1.0, 0.5, 0.1]))
    optimizer = FusedRegAdam([param], lr=0.0, sparsity=0.34)
    param.grad = torch.tensor([1e-4, 1.0, 100.0])  # sqrt(|g|) * |w|: 0.01, 0.5, 1
    optimizer.step()
    at_once(optimizer)
    assert param.tolist() == [0.0, 0.5, pytest.approx(0.1)]


# -- what goes


@every_variant
def test_the_smallest_scores_go(cls, variant, counting) -> None:
    check_the_smallest_go(cls, variant, torch.float32)


@pytest.mark.parametrize("cls", [FusedRegAdam, FusedRegSGD])
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=lambda dtype: str(dtype)[6:])
def test_the_smallest_scores_go_in_every_dtype(cls, dtype, counting) -> None:
    check_the_smallest_go(cls, "plain", dtype)


def check_the_smallest_go(cls, variant, dtype) -> None:
    params = make_params(((40, 25), (7, 3, 3, 3), (130,)), dtype)
    optimizer = cls(params, **{"lr": 1e-3, **variant_of(cls, variant)}, sparsity=0.7)
    run(optimizer, params, 3)
    before = [exact_scores(optimizer, param, optimizer.param_groups[0]) for param in params]
    at_once(optimizer)
    assert_the_smallest_went(before, params, round(0.7 * sum(param.numel() for param in params)))
    assert optimizer.param_groups[0]["freeze_zeros"] is True
    zeros = [param.detach() == 0 for param in params]
    run(optimizer, params, 2)
    assert all((param.detach() == 0).equal(zero) for param, zero in zip(params, zeros, strict=True))


def test_every_layout_in_memory(counting) -> None:
    """Scores, and positions among equals, do not depend on strides; what is not a dense tensor is taken, too."""
    generator = torch.Generator().manual_seed(0)
    values = [torch.randint(1, 4, shape, generator=generator).float() for shape in ((5, 4, 3, 2), (9, 8), (6, 5))]
    laid_out = [
        values[0].clone().to(memory_format=torch.channels_last),
        values[1].t().contiguous().t(),
        torch.full((6, 11), 7.0)[:, ::2][:, :5].copy_(values[2]),
    ]
    results = []
    for tensors in ([each.clone() for each in values], laid_out):
        params = [nn.Parameter(each) for each in tensors]
        optimizer = FusedRegAdam(params, lr=1e-6, sparsity=0.5)
        for param in params:
            param.grad = torch.ones_like(param)
        optimizer.step()
        at_once(optimizer)
        results.append([param.detach().contiguous() for param in params])
        assert sum(int((param == 0).sum()) for param in params) == round(0.5 * (120 + 72 + 30))
    assert_same_bits(*results)


PALETTE = (0.0, -0.0, 1.0, -1.0, 1.0000001, 2.0, 1e-42, -1e-30, 3e38, math.inf, -math.inf, math.nan)


def rank(value: float) -> tuple[bool, float]:
    return math.isnan(value), abs(value)


@given(
    values=st.lists(st.lists(st.sampled_from(PALETTE), min_size=0, max_size=12), min_size=1, max_size=4),
    share=st.sampled_from([0.0, 0.1, 0.25, 0.5, 0.8, 0.99]),
    dtype=st.sampled_from(DTYPES),
    by_torch=st.booleans(),
)
def test_ties_go_by_position_and_nan_goes_last(values, share, dtype, by_torch) -> None:
    params = [nn.Parameter(torch.tensor(each, dtype=torch.float64).to(dtype)) for each in values]
    before = [param.tolist() for param in params]
    flat = [(i, k) for i, each in enumerate(before) for k in range(len(each))]
    best = {
        (i, max(range(len(each)), key=lambda k: (*rank(each[k]), k)))
        for i, each in enumerate(before)
        if any(value != 0 for value in each)
    }
    goal = round(share * len(flat))
    order = sorted((place for place in flat if place not in best), key=lambda p: (*rank(before[p[0]][p[1]]), p))
    expected = set(order[:goal]) | {(i, k) for i, k in flat if before[i][k] == 0}
    optimizer = FusedRegSGD(params, lr=0.1, sparsity=share)
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of those that keep their best
        if by_torch:
            patch.setattr(scores.CppScores, "takes", staticmethod(lambda weights: False))
        at_once(optimizer)
    assert {(i, k) for i, each in enumerate(params) for k, value in enumerate(each.tolist()) if value == 0} == expected


def keys_by_hand(weights) -> torch.Tensor:
    """As numbers of 64 bits, in the order of memory."""
    w = weights.tensor.double()
    arithmetic = torch.float64 if weights.tensor.dtype == torch.float64 else torch.float32
    if weights.spec.metric is None:
        score = w.abs()
    else:
        score = weights.squares(weights.tensor, weights.states).abs().to(arithmetic)
    bits = score.double().view(torch.int64)
    least = torch.finfo(arithmetic).smallest_normal * torch.finfo(arithmetic).eps
    return torch.where(w == 0, 0, bits.clamp(min=int(torch.tensor(least, dtype=torch.float64).view(torch.int64))))


EXTREMES = (
    1 - 2.0**-24,
    0.0,
    -0.0,
    1.0,
    -1.0,
    1e-46,
    1e-42,
    -1e-38,
    1e-23,
    3e-19,
    2e19,
    3e38,
    -math.inf,
    math.inf,
    math.nan,
    -math.nan,
)


@needs_cpp
@pytest.mark.parametrize("cls", [FusedRegAdam, FusedRegSGD])
@pytest.mark.parametrize("dtypes", [*((dtype,) for dtype in DTYPES), (torch.float64, torch.float32, torch.bfloat16)])
def test_the_keys_up_to_any_number_are_found(cls, dtypes, instruction_set) -> None:
    """Squares that over- and underflow, no second moment, no eps; at the ends of blocks and tiles; few and many."""
    generator = torch.Generator().manual_seed(0)
    # All roots are exact, so that scores are the oracle's to the bit.
    options = {"eps": 0.0, "betas": (0.9, 0.75)} if cls is FusedRegAdam else {}
    for numel in (1, 31, 32, 33, 511, 512, 545, 5000):
        params = []
        for dtype in dtypes:
            w = torch.randn(numel, generator=generator, dtype=torch.float64)
            w[torch.rand(numel, generator=generator) < 0.2] = 0.0
            some = torch.randint(len(EXTREMES), (numel,), generator=generator)
            w = torch.where(torch.rand(numel, generator=generator) < 0.2, torch.tensor(EXTREMES).double()[some], w)
            params.append(nn.Parameter(w.to(dtype)))
        optimizer = cls(params, sparsity=0.5, **options)
        for param in params if cls is FusedRegAdam else []:
            v = 4.0 ** torch.randint(-6, 6, (numel,), generator=generator)
            some = torch.randint(12, (numel,), generator=generator)
            v = torch.where(some < 4, torch.tensor([0.0, 4.0**-70, 4.0**63, math.inf])[some % 4], v).to(param.dtype)
            optimizer.state[param] = {"step": torch.tensor(1.0), "exp_avg": torch.zeros_like(v), "exp_avg_sq": v}
        weights = list(weights_of(optimizer, optimizer.param_groups))
        is_wide = torch.float64 in dtypes
        keys = [keys_by_hand(each) for each in weights]
        if not is_wide:
            keys = [each.view(torch.float64).float().view(torch.int32).long() for each in keys]
        shift, infinity = (48, 0x7FF0 << 48) if is_wide else (16, 0x7F80 << 16)
        keys = [each.clamp(max=infinity + (1 << shift)) for each in keys]  # which NaN it is does not matter
        digits = torch.cat(keys) >> shift
        present = digits[digits <= infinity >> shift].unique()
        present = present[torch.randperm(len(present), generator=generator)[:6]].tolist()
        one = 0x3FF0 if is_wide else 0x3F80  # the last key before its digit is that of the largest float32 below 1
        for end in {1, one, *(digit + more for digit in present for more in (0, 1)), scores.LEADING_BINS} - {0}:
            found = scores.CppScores(weights, [numel * i for i in range(len(weights))], is_wide)
            counts = torch.zeros(end, dtype=torch.int64)
            found.count(shift, 0, end, counts)
            nan = (infinity >> shift) + 1
            counts[nan : nan + 1] = counts[nan:].sum()
            assert counts[: nan + 1].equal(torch.bincount(digits[digits < end], minlength=min(end, nan + 1)))
            for largest, its_keys in zip(found.largest(), keys, strict=True):
                key = int(its_keys.max())
                if key > infinity and end == scores.LEADING_BINS:
                    assert infinity < largest.key < scores.BEYOND
                    assert its_keys[largest.place] > infinity
                elif key >> shift >= end:
                    assert largest == (scores.BEYOND, -1, -1)
                elif key == 0:
                    assert largest == (0, -1, -1)
                else:
                    place = int((its_keys == key).nonzero()[-1])
                    assert (largest.key, largest.place, largest.position % numel) == (key, place, place)
            if end < scores.LEADING_BINS:
                with pytest.raises(RuntimeError, match="were not counted"):
                    found.zero(scores.Rank((end << shift) + 1, 0), [-1] * len(weights))


@needs_cpp
@pytest.mark.parametrize("cls", [FusedRegAdam, FusedRegSGD])
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
def test_renewals_of_many_weights_are_those_of_a_sort(cls, dtype) -> None:
    """Few go, so that they are kept, then many; the sample says how far to count."""
    params = make_params(((500, 700), (300, 301), (33,)), dtype)
    params[1].data.mul_(0.7)
    optimizer = cls(params, lr=1e-3, sparsity=0.5)
    run(optimizer, params, 2)
    weights = list(weights_of(optimizer, optimizer.param_groups))
    keys = torch.cat([keys_by_hand(each).flatten() for each in weights])
    slack = 1 << (52 - 21) if cls is FusedRegAdam and dtype != torch.float64 else 8  # but for rounding
    for share in (0.004, 0.011, 0.05, 0.1, 0.5, 0.503, 0.9):
        assert selection.zero_smallest(weights, share, is_exact=True) == []
        went = torch.cat([param.detach().flatten() == 0 for param in params])
        goal = round(share * len(keys))
        assert int(went.sum()) == goal
        assert keys[went].max() <= keys[~went].min() + slack


def test_how_far_was_counted_changes_nothing(counting, monkeypatch) -> None:
    """Where the keys that are wanted are beyond it, more are counted."""

    def result(ends, share, is_exact):
        monkeypatch.setattr(
            selection._Elements, "_likely_ends", lambda elements, goal: iter([*ends, scores.LEADING_BINS])
        )
        params = make_params(((40, 50), (8, 8), (5, 4)))
        params[0].data.mul_(4).round_().div_(4)
        params[1].data.mul_(1e-3)  # would be emptied
        params[2].data.fill_(1e-6)  # emptied even of a few
        optimizer = FusedRegSGD(params, lr=0.1, sparsity=share)
        weights = list(weights_of(optimizer, optimizer.param_groups))
        emptied = selection.zero_smallest(weights, share, is_exact=is_exact)
        return [[weights.index(each) for each in emptied], *(param.detach().clone() for param in params)]

    for share in (0.0, 0.005, 0.02, 0.041, 0.2, 0.8, 0.999):
        for is_exact in (True, False):
            expected = result([], share, is_exact)
            for ends in ([1], [13700], [13700, 15000, 15800], [16100], [16255, 16256], [16300, 16400]):
                emptied, *tensors = result(ends, share, is_exact)
                assert emptied == expected[0]
                assert_same_bits(tensors, expected[1:])


@needs_cpp
def test_a_sample_tells_how_far_to_count(monkeypatch) -> None:
    """A renewal of a large model counts few more than go, in the first attempt."""
    counted = []
    count = scores.CppScores.count

    def watch(self, shift, prefix, end, counts):
        count(self, shift, prefix, end, counts)
        counted.append((shift, end, int(counts.sum())))

    monkeypatch.setattr(scores.CppScores, "count", watch)
    params = make_params(((3000, 700), (300, 301)))
    optimizer = FusedRegAdam(params, sparsity=0.9)
    run(optimizer, params, 1)
    size = sum(param.numel() for param in params)
    for share in (0.01, 0.1, 0.5, 0.9):
        counted.clear()
        selection.zero_smallest(list(weights_of(optimizer, optimizer.param_groups)), share, is_exact=False)
        assert len(counted) == 1
        shift, end, many = counted[0]
        assert (shift, share * size <= many <= (share + 0.06) * size) == (16, True)
        assert end < scores.LEADING_BINS


def test_equal_weights_end_at_the_target_and_follow_the_schedule_from_below(counting) -> None:
    param = nn.Parameter(torch.full((1000,), 0.5))
    optimizer = FusedRegSGD([param], lr=0.0, sparsity=0.777)
    schedule = SparsitySchedule(optimizer, 100)
    for _ in range(100):
        param.grad = torch.zeros_like(param)
        optimizer.step()
        schedule.step()
    assert (param == 0).nonzero().flatten().tolist() == list(range(777))


@needs_cpp
def test_mixed_dtypes_are_ranked_together(counting) -> None:
    params = [nn.Parameter(torch.linspace(1, 2, 100, dtype=dtype)) for dtype in (torch.float64, torch.bfloat16)]
    optimizer = FusedRegSGD(params, lr=0.1, sparsity=0.6)
    before = [param.detach().double() for param in params]
    at_once(optimizer)
    assert_the_smallest_went(before, params, 120, slack=0.0)


@needs_cpp
@pytest.mark.parametrize("unit", [None, "rows"])
def test_threads_change_nothing(unit) -> None:
    results = []
    count = torch.get_num_threads()
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            params = make_params(((300, 401), (64, 64), (1000,)))
            params[0].data.mul_(8).round_().div_(8)  # ties
            optimizer = FusedRegAdam(params, sparsity=0.6, sparsity_unit=unit)
            run(optimizer, params, 2)
            schedule = SparsitySchedule(optimizer, 20, begin=0.0, end=0.5, every=5)
            for _ in range(10):
                schedule.step()
            results.append(snapshot(optimizer))
    finally:
        torch.set_num_threads(count)
    assert_same_bits(results[0], results[1])
    assert_same_bits(results[0], results[2])


# -- when


@pytest.mark.parametrize("cls", [FusedRegAdam, FusedRegSGD])
def test_the_share_follows_the_cubic_schedule(cls, counting) -> None:
    params = make_params(((60, 50), (40, 50)))
    optimizer = cls(params, lr=1e-4, sparsity=0.9)
    schedule = SparsitySchedule(optimizer, 203, begin=0.1, end=0.75, every=10)
    shares = []
    zeros = torch.zeros(0, dtype=torch.long)
    for t in range(1, 204):
        set_grads(params, t)
        optimizer.step()
        schedule.step()
        now = torch.cat([param.detach().flatten() == 0 for param in params]).nonzero().flatten()
        assert torch.isin(zeros, now).all()  # what is zero stays zero
        shares.append(len(now) / 5000)
        zeros = now
    last = int(0.75 * 203)
    for t, share in enumerate(shares, start=1):
        renewed = t // 10 * 10 if t < last else last
        if renewed < 20.3:
            assert share == 0
        elif renewed < last:
            scheduled = 0.9 * (1 - (1 - (renewed - 20.3) / (0.65 * 203)) ** 3)
            assert scheduled - 0.015 < share <= scheduled + 0.5 / 5000
        else:
            assert share == 0.9


def test_a_schedule_of_one_step_is_met() -> None:
    param = make_params(((10, 10),))[0]
    optimizer = FusedRegSGD([param], lr=0.1, sparsity=0.5)
    SparsitySchedule(optimizer, 1).step()
    assert int((param == 0).sum()) == 50


def test_weights_that_start_at_zero_are_free_until_the_first_renewal() -> None:
    """As LoRA's B: they move away; what is still zero then stays."""
    param = nn.Parameter(torch.zeros(4, 5))
    optimizer = FusedRegAdam([param], lr=0.1, sparsity=0.5)
    schedule = SparsitySchedule(optimizer, 100, begin=0.3)
    for t in range(1, 101):
        param.grad = torch.arange(1.0, 21.0).reshape(4, 5)
        param.grad[0, 0] = 0.0  # never moves
        optimizer.step()
        schedule.step()
        if t < 30:
            assert int((param == 0).sum()) == 1
            assert not optimizer.param_groups[0]["freeze_zeros"]
    assert int((param == 0).sum()) == 10
    assert param[0, 0] == 0
    param.grad = torch.ones(4, 5)
    optimizer.step()
    assert param[0, 0] == 0


def test_resuming_in_mid_schedule_is_the_same_to_the_bit() -> None:
    def make():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(20, 30), nn.Linear(30, 10))
        optimizer = FusedRegAdam(param_groups(model, sparsity=0.8), lr=1e-2)
        return model, optimizer, SparsitySchedule(optimizer, 60, every=5)

    def train(model, optimizer, schedule, steps):
        for t in steps:
            set_grads(list(model.parameters()), t)
            optimizer.step()
            schedule.step()

    whole = make()
    train(*whole, range(60))
    first = make()
    train(*first, range(33))
    second = make()
    for mine, its in zip(second, first, strict=True):
        mine.load_state_dict(its.state_dict())
    assert second[2].state_dict() == first[2].state_dict()
    train(*second, range(33, 60))
    assert_same_bits(snapshot(whole[1]), snapshot(second[1]))
    assert int((second[0][0].weight == 0).sum() + (second[0][1].weight == 0).sum()) == round(0.8 * 900)


CONTINUE = """
import sys
sys.path.insert(0, sys.argv[2])
import torch
from test_sparsity_schedule import continue_training
torch.set_default_device("cpu")
saved = torch.load(sys.argv[1])
torch.save(continue_training(saved), sys.argv[1])
"""


def training(model):
    optimizer = fusedreg.FusedRegNAdam(param_groups(model, sparsity=0.8), lr=1e-2)
    return optimizer, SparsitySchedule(optimizer, 60, every=5)


def continue_training(saved) -> list[torch.Tensor]:
    """From the call of the schedule before which they were saved to the end of the training."""
    model = nn.Linear(20, 30)
    model.load_state_dict(saved["model"])
    optimizer, schedule = training(model)
    optimizer.load_state_dict(saved["optimizer"])
    schedule.load_state_dict(saved["schedule"])
    schedule.step()
    for t in range(35, 60):
        set_grads(list(model.parameters()), t)
        optimizer.step()
        schedule.step()
    return snapshot(optimizer)


def test_a_checkpoint_from_just_before_a_renewal_goes_on_in_a_new_process(tmp_path) -> None:
    """What the schedule keeps of its last renewal only makes it fast."""
    torch.manual_seed(0)
    model = nn.Linear(20, 30)
    optimizer, schedule = training(model)
    saved = {}
    for t in range(60):
        set_grads(list(model.parameters()), t)
        optimizer.step()
        if t == 34:  # the 35th call of the schedule is a renewal
            states = {"model": model, "optimizer": optimizer, "schedule": schedule}
            saved = copy.deepcopy({name: each.state_dict() for name, each in states.items()})
            zeros = int((model.weight == 0).sum())
        schedule.step()
        assert t != 34 or int((model.weight == 0).sum()) > zeros > 0
    torch.save(saved, tmp_path / "saved.pt")
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests" / "backends"), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-c", CONTINUE, str(tmp_path / "saved.pt"), str(ROOT / "tests")],
        env={**os.environ, "PYTHONPATH": paths},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert_same_bits(snapshot(optimizer), torch.load(tmp_path / "saved.pt"))


def test_a_state_dict_that_is_refused_changes_nothing() -> None:
    schedule = SparsitySchedule(FusedRegAdam(make_params(), sparsity=0.5), 100)
    before = schedule.state_dict()
    for wrong in {"begin": 2.0}, {"last_step": "soon"}, {"every": 0}:
        with pytest.raises(ValueError, match=r"Invalid|invalid"):
            schedule.load_state_dict({**before, "total_steps": 50, **wrong})
        assert schedule.state_dict() == before


def test_each_target_has_its_own_rank() -> None:
    first, second, third, free = make_params(((30, 30), (20, 20), (10, 10), (10, 10)))
    optimizer = FusedRegAdam(
        [
            {"params": [first], "sparsity": 0.9},
            {"params": [second], "sparsity": 0.5},
            {"params": [third], "sparsity": 0.9, "lr": 1e-5},
            {"params": [free]},
        ],
        lr=1e-3,
    )
    first.data.mul_(0.01)
    run(optimizer, [first, second, third, free], 2)
    at_once(optimizer)
    assert int((first == 0).sum() + (third == 0).sum()) == 900
    assert int((first == 0).sum()) > 880  # one rank for both
    assert int((second == 0).sum()) == 200
    assert int((free == 0).sum()) == 0
    assert [group["freeze_zeros"] for group in optimizer.param_groups] == [True, True, True, False]


def test_a_target_of_zero_changes_nothing() -> None:
    param = make_params(((10, 10),))[0]
    before = param.detach().clone()
    optimizer = FusedRegAdam([param], sparsity=0.0)
    at_once(optimizer)
    assert param.detach().equal(before)
    assert not optimizer.param_groups[0]["freeze_zeros"]


def test_weights_that_need_no_gradient_are_left_alone() -> None:
    params = make_params(((10, 10), (10, 10)))
    params[0].requires_grad_(False)
    optimizer = FusedRegAdam(params, sparsity=0.5)
    at_once(optimizer)
    assert [int((param == 0).sum()) for param in params] == [0, 50]


def test_a_layer_that_would_be_emptied_keeps_its_best_weight_and_says_so_once(counting) -> None:
    small, large = nn.Parameter(torch.full((4, 4), 1e-3)), nn.Parameter(torch.randn(40, 40).abs() + 1)
    small.data[2, 1] = 2e-3
    optimizer = FusedRegSGD([small, large], lr=0.1, sparsity=0.5)
    schedule = SparsitySchedule(optimizer, 4, begin=0.0, end=1.0, every=1)
    with pytest.warns(UserWarning, match=r"a parameter of shape \(4, 4\) would become all zeros, and keeps its best"):
        schedule.step()
    assert small.detach().nonzero().tolist() == [[2, 1]]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(3):
            schedule.step()
    assert small.detach().nonzero().tolist() == [[2, 1]]
    assert int((small == 0).sum() + (large == 0).sum()) == 808


@needs_cpp
def test_a_renewal_allocates_nothing_of_parameter_size(two_threads) -> None:
    params = make_params(((4000, 1500), (64, 64)))
    optimizer = FusedRegAdam(params, sparsity=0.9)
    run(optimizer, params, 2)
    schedule = SparsitySchedule(optimizer, 1)
    cpu = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=cpu, profile_memory=True, acc_events=True) as profile:  # else 2.10 warns
        schedule.step()
    assert int((params[0] == 0).sum()) > 5_000_000
    allocated = max(abs(event.cpu_memory_usage) for event in profile.key_averages())
    assert allocated < 4_000_000  # a parameter has 24,000,000 bytes: the counts of 2^16 bins, a few times


def test_autograd_notices_that_weights_were_zeroed(counting) -> None:
    weight = make_params(((4, 4),))[0]
    optimizer = FusedRegSGD([weight], lr=0.1, sparsity=0.5)
    loss = (weight**3).sum()
    at_once(optimizer)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


# -- units


def sums_of_units(score: torch.Tensor, unit) -> torch.Tensor:
    squares = score.square()
    if unit == "columns":
        return squares.transpose(0, 1).flatten(1).sum(1)
    rows = squares.flatten(1).sum(1)
    return rows if unit == "rows" else rows.view(-1, unit).sum(1)


def empty_units(param: torch.Tensor, unit) -> torch.Tensor:
    return sums_of_units((param.detach() != 0).double(), unit) == 0


@every_variant
def test_the_smallest_units_go_whole(cls, variant) -> None:
    check_the_smallest_units_go(cls, variant, "rows")


@pytest.mark.parametrize("unit", ["columns", 3])
@pytest.mark.parametrize("cls", [FusedRegAdam, FusedRegSGD])
def test_the_smallest_units_of_other_kinds_go_whole(cls, unit) -> None:
    check_the_smallest_units_go(cls, "plain", unit)


def check_the_smallest_units_go(cls, variant, unit) -> None:
    params = make_params(((24, 20), (12, 6, 3, 3), (9, 5)))
    params[1].data = params[1].data.to(memory_format=torch.channels_last)
    params[2].data.mul_(2)  # or it would be emptied
    optimizer = cls(params, **{"lr": 1e-3, **variant_of(cls, variant)}, sparsity=0.5, sparsity_unit=unit)
    run(optimizer, params, 3)
    before = [sums_of_units(exact_scores(optimizer, p, optimizer.param_groups[0]), unit) for p in params]
    at_once(optimizer)
    empty = torch.cat([empty_units(param, unit) for param in params])
    all_scores = torch.cat(before)
    assert int(empty.sum()) == round(0.5 * len(all_scores))
    assert all_scores[empty].max() <= all_scores[~empty].min() * (1 + 1e-6)
    for param in params:  # nothing but whole units
        assert int((param == 0).sum()) == int(empty_units(param, unit).sum()) * param.numel() // len(
            empty_units(param, unit)
        )
    run(optimizer, params, 2)
    assert torch.cat([empty_units(param, unit) for param in params]).equal(empty)


@needs_cpp
@pytest.mark.parametrize("cls", [FusedRegAdam, FusedRegSGD])
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
def test_cpp_adds_up_units_as_torch_does(cls, dtype, instruction_set) -> None:
    """Whatever their layout: units of many chunks, units side by side, many small ones."""
    shapes = ((64, 70), (3, 70_000), (70_000, 3), (2, 40_001), (40_001, 2), (1, 5), (5, 1), (0, 3), (700, 600))
    params = make_params((*shapes, (20, 6, 5, 3)), dtype)
    params += [nn.Parameter(each.detach().clone().t().contiguous().t()) for each in params[: len(shapes)]]
    params += [nn.Parameter(make_params(((12, 40, 3, 3),), dtype)[0].detach().to(memory_format=torch.channels_last))]
    params[0].data[3] = 0.0
    params[0].data[:, 5] = -0.0
    optimizer = cls(params, sparsity=0.5, lr=1e-3)
    run(optimizer, params, 2)
    weights = [each for each in weights_of(optimizer, optimizer.param_groups) if each.tensor.numel()]
    for unit in ("rows", "columns"):
        found = scores.CppScores(weights, [0] * len(weights), True).add_up(unit)
        for each, sums in zip(weights, found, strict=True):
            torch.testing.assert_close(sums, units._add_up_with_torch(each, unit), rtol=1e-6, atol=0.0)
            assert ((sums == 0) == empty_units(each.tensor, unit)).all()


@needs_cpp
@pytest.mark.parametrize(("dtype", "small"), [(torch.float32, 1e-30), (torch.float64, 1e-200)])
def test_units_that_are_not_finite_or_underflow(dtype, small) -> None:
    w = torch.randn(6, 40, dtype=dtype)
    w[1, 3], w[2, 4], w[3], w[4], w[5, 5] = math.nan, math.inf, small, 0.0, 3e38
    optimizer = FusedRegSGD([nn.Parameter(w)], lr=0.1, sparsity=0.5, sparsity_unit="rows")
    weights = list(weights_of(optimizer, optimizer.param_groups))
    by_cpp = scores.CppScores(weights, [0], True).add_up("rows")[0]
    by_torch = units._add_up_with_torch(weights[0], "rows")
    assert by_cpp.isnan().tolist() == by_torch.isnan().tolist() == [False, True, False, False, False, False]
    assert by_cpp.isinf().tolist() == by_torch.isinf().tolist() == [False, False, True, False, False, False]
    assert (by_cpp[3] > 0, by_torch[3] > 0, by_cpp[4] == 0, by_torch[4] == 0) == (True, True, True, True)
    keys = units.add_up_scores(weights, "rows")[0]
    assert (keys[3] > 0, keys[4]) == (True, 0)


@needs_cpp
def test_sums_of_units_do_not_depend_on_threads() -> None:
    params = make_params(((300, 901), (5, 70_000), (70_000, 5), (64, 32, 3, 3)))
    optimizer = FusedRegAdam(params, sparsity=0.5)
    run(optimizer, params, 2)
    weights = list(weights_of(optimizer, optimizer.param_groups))
    threads = torch.get_num_threads()
    try:
        for unit in ("rows", "columns"):
            results = []
            for count in (1, 2, 5):
                torch.set_num_threads(count)
                results.append(scores.CppScores(weights, [0] * 4, True).add_up(unit))
            assert_same_bits(*results[:2])
            assert_same_bits(*results[1:])
    finally:
        torch.set_num_threads(threads)


def test_a_layer_keeps_its_best_unit_and_says_so() -> None:
    small, large = make_params(((4, 5), (30, 5)))
    small.data.mul_(1e-3)
    best = int(small.detach().square().sum(1).argmax())
    optimizer = FusedRegSGD([("small", small), ("large", large)], lr=0.1, sparsity=0.5, sparsity_unit="rows")
    with pytest.warns(UserWarning, match=r"at a sparsity of 0\.5, small of shape \(4, 5\) would become all zeros"):
        at_once(optimizer)
    assert empty_units(small, "rows").tolist() == [i != best for i in range(4)]
    assert int(empty_units(small, "rows").sum() + empty_units(large, "rows").sum()) == 17


def test_equal_units_end_at_the_target() -> None:
    param = nn.Parameter(torch.ones(10, 3))
    optimizer = FusedRegSGD([param], lr=0.1, sparsity=0.4, sparsity_unit="rows")
    at_once(optimizer)
    assert empty_units(param, "rows").tolist() == [True] * 4 + [False] * 6


# -- which weights


def test_exempt_weights_have_no_target() -> None:
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten(), nn.Linear(4, 5), nn.Linear(5, 3), nn.Embedding(7, 2))
    names = {id(param): name for name, param in model.named_parameters()}

    def spared(exempt) -> list[str]:
        weights, others = param_groups(model, sparsity=0.9, l1=0.1, exempt=exempt)
        assert (others["sparsity"], others["l1"], others["weight_decay"]) == (None, 0.0, 0.0)
        assert len(weights["params"]) + len(others["params"]) == len(names)
        return [names[id(param)] for param in others["params"] if param.ndim > 1]

    assert spared([]) == []
    assert spared(["3.*"]) == ["3.weight"]
    assert spared(["[02].weight"]) == ["0.weight", "2.weight"]
    assert spared([nn.Embedding]) == ["4.weight"]
    assert spared([nn.Linear, "0.weight"]) == ["0.weight", "2.weight", "3.weight"]
    assert spared([model[2]]) == ["2.weight"]
    assert spared((model[3].weight, model[0])) == ["0.weight", "3.weight"]


@pytest.mark.parametrize(
    ("exempt", "error", "message"),
    [
        (["head.*"], ValueError, "the model has no parameter that 'head.*' means"),
        ([nn.Conv2d], ValueError, "the model has no parameter that <class .*Conv2d'> means"),
        ([nn.Linear(2, 2)], ValueError, "the model has no parameter that Linear"),
        ([torch.zeros(2)], ValueError, r"the model has no parameter that a tensor of shape \(2,\) means"),
        ([3], TypeError, "Invalid exempt: a int in it"),
        ("0.weight", TypeError, "Invalid exempt: a str"),
    ],
)
def test_what_is_not_there_cannot_be_exempt(exempt, error, message) -> None:
    with pytest.raises(error, match=message):
        param_groups(nn.Sequential(nn.Linear(4, 3)), sparsity=0.9, exempt=exempt)


# -- what is refused


@pytest.mark.parametrize("value", [-0.1, 1.0, 1.5, math.nan, "half"])
def test_a_sparsity_that_is_none(value) -> None:
    with pytest.raises(ValueError, match=r"Invalid sparsity value: .* \(allowed: None or a number in \[0, 1\)\)"):
        FusedRegAdam(make_params(), sparsity=value)


@pytest.mark.parametrize("value", ["row", 0, -1, 1.5, True])
def test_a_unit_that_is_none(value) -> None:
    with pytest.raises(ValueError, match="Invalid sparsity_unit value"):
        FusedRegAdam(make_params(), sparsity=0.5, sparsity_unit=value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"total_steps": 0}, "Invalid total_steps value: 0"),
        ({"total_steps": "10"}, "Invalid total_steps value: '10'"),
        ({"total_steps": math.nan}, "Invalid total_steps value: nan"),
        ({"total_steps": math.inf}, "Invalid total_steps value: inf"),
        ({"every": None}, "Invalid every value: None"),
        ({"begin": "0.1"}, "Invalid begin value: '0.1'"),
        ({"end": None}, "Invalid end value: None"),
        ({"total_steps": -5}, "Invalid total_steps value: -5"),
        ({"total_steps": 10.5}, "Invalid total_steps value: 10.5"),
        ({"begin": -0.1}, "Invalid begin value: -0.1"),
        ({"begin": 1.0}, "Invalid begin value: 1.0"),
        ({"begin": 0.5, "end": 0.5}, "Invalid end value: 0.5 with begin=0.5"),
        ({"begin": 0.5, "end": 0.2}, "Invalid end value: 0.2 with begin=0.5"),
        ({"end": 1.1}, "Invalid end value: 1.1"),
        ({"end": math.nan}, "Invalid end value: nan"),
        ({"every": 0}, "Invalid every value: 0"),
    ],
)
def test_schedules_that_are_none(options, message) -> None:
    optimizer = FusedRegAdam(make_params(), sparsity=0.5)
    with pytest.raises(ValueError, match=message):
        SparsitySchedule(optimizer, **{"total_steps": 100, **options})


def test_what_else_is_refused() -> None:
    with pytest.raises(ValueError, match=r"Invalid lower value: 0\.1 with sparsity=0\.5 \(allowed: lower <= 0 <= up"):
        FusedRegAdam(make_params(), sparsity=0.5, lower=0.1)
    with pytest.raises(ValueError, match="no group has a sparsity"):
        SparsitySchedule(FusedRegAdam(make_params()), 100)
    with pytest.raises(TypeError, match="Invalid optimizer: a Adam "):
        SparsitySchedule(torch.optim.Adam(make_params()), 100)
    with pytest.raises(ValueError, match=r"Invalid sparsity_unit value: 'columns' for a parameter of shape \(33,\)"):
        SparsitySchedule(FusedRegAdam(make_params(), sparsity=0.5, sparsity_unit="columns"), 100)
    with pytest.raises(ValueError, match=r"Invalid sparsity_unit value: 4 .* \(allowed: a number that divides 10\)"):
        SparsitySchedule(FusedRegAdam(make_params(((10, 3),)), sparsity=0.5, sparsity_unit=4), 100)
    with pytest.raises(ValueError, match=r"Invalid sparsity value: 0\.5 for complex weights"):
        SparsitySchedule(FusedRegAdam(make_params(((3, 3),), torch.complex64), sparsity=0.5), 100)


def test_groups_carry_their_targets_and_plain_torch_checkpoints_load() -> None:
    model = nn.Linear(4, 3)
    weights, exempt = param_groups(model, sparsity=0.9, sparsity_unit="rows")
    assert (weights["sparsity"], weights["sparsity_unit"]) == (0.9, "rows")
    assert (exempt["sparsity"], exempt["sparsity_unit"]) == (None, None)
    optimizer = FusedRegAdam([weights, exempt])
    saved = optimizer.state_dict()
    assert saved["param_groups"][0]["sparsity"] == 0.9
    plain = torch.optim.Adam([{"params": [model.weight]}, {"params": [model.bias]}]).state_dict()
    optimizer.load_state_dict(plain)
    assert [group["sparsity"] for group in optimizer.param_groups] == [0.9, None]
    other = FusedRegAdam([{"params": [model.weight]}, {"params": [model.bias]}])
    other.load_state_dict(saved)
    assert [group["sparsity_unit"] for group in other.param_groups] == ["rows", None]
    assert fusedreg.SparsitySchedule(other, 10).last_step == 0
