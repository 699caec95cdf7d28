"""The Triton kernels compiled for real, without a GPU: to cubins for NVIDIA, to code objects for AMD.

What is checked is the machine code: 128-bit loads and stores where memory is aligned, none where it is not, no shared
memory, no spilled registers, IEEE division and square root.
"""

from __future__ import annotations

import collections
import itertools
import re
import subprocess
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from conftest import INTERPRETING
from helpers import OPTIMIZERS, FusedRegAdam, FusedRegSGD, make_params, regularized, run
from unlaunched import Driver, UnlaunchedTritonBackend

from fusedreg import backends
from fusedreg.backends.triton import why_not_triton

if INTERPRETING:
    pytest.skip("there is nothing to compile in the interpreter", allow_module_level=True)
if (REASON := why_not_triton()) is not None:
    pytest.skip(REASON, allow_module_level=True)

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, LazyDict

from fusedreg.backends import device_plan
from fusedreg.backends.device_units import UnitLayout
from fusedreg.backends.triton import compilation, kernels, tuning, units
from fusedreg.backends.triton.rules import RULES

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
DTYPES = ("float32", "float64", "bfloat16", "float16")
VARIANTS = [(name, states) for name, rule in RULES.items() for states in rule.variants]
POINTERS = {"constants": "*fp64", "partial_sums": "*fp64", "norm_at": "*fp64", "scratch": "*fp64"}

UPDATES = [(*variant, *rest, False) for variant, *rest in itertools.product(VARIANTS, DTYPES, (True, False))]
WITH_STAGES = [(*variant, dtype, True, True) for variant, dtype in itertools.product(VARIANTS, DTYPES)]

slow = pytest.mark.slow
every_target = pytest.mark.parametrize("target", TARGETS)


def name_of(value) -> str:
    return "-".join(map(str, value))


def is_number(parameter: str) -> bool:
    return parameter.endswith("_count") or parameter == "number"


def compiled(kernel, constants: dict, target: str, warps: int, registers: int | None = None):
    names = kernel.arg_names
    types = {name: "constexpr" for name in constants}
    types.update({n: POINTERS.get(n, "i32" if is_number(n) else "*i64") for n in names if n not in constants})
    values = {(names.index(name),): value for name, value in constants.items()}
    source = ASTSource(kernel, {name: types[name] for name in names}, values)
    limit = registers if TARGETS[target].backend == "cuda" else None
    return triton.compile(source, target=TARGETS[target], options=compilation.options(warps, limit))


def assembly(kernel) -> str:
    return kernel.asm["ptx"] if "ptx" in kernel.asm else kernel.asm["amdgcn"]


def wide_accesses(kernel) -> tuple[int, int]:
    """128-bit loads and stores."""
    text = assembly(kernel)
    if "ptx" in kernel.asm:
        loads, stores = (len(re.findall(rf"{op}\.global[\w:.]*\.(?:v4\.b32|v2\.b64)", text)) for op in ("ld", "st"))
        return loads, stores
    loads, stores = (len(re.findall(rf"(?:global|buffer)_{op}_dwordx4", text)) for op in ("load", "store"))
    return loads, stores


def registers_and_spills(kernel, folder) -> tuple[int, int]:
    """Registers of a thread, and bytes of them that did not fit. AMD's scalar registers go into vectors."""
    if "cubin" not in kernel.asm:
        count, spilled = (
            int(re.search(rf"\.vgpr_{what}:\s+(\d+)", assembly(kernel))[1]) for what in ("count", "spill_count")
        )
        return count, 4 * spilled
    file = folder / "kernel.cubin"
    file.write_bytes(kernel.asm["cubin"])
    tool = triton.knobs.nvidia.cuobjdump.path
    usage = subprocess.run([tool, "-res-usage", file], capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+) .*LOCAL:(\d+)", usage)
    return int(found[1]), int(found[2]) + int(found[3])


def innermost_loops(text: str) -> list[str]:
    """Of assembly: from a label to the branch back to it, where no other such loop is within."""
    labels = {found[1]: found.end() for found in re.finditer(r"^(\$L__BB\d+_\d+|\.LBB\d+_\d+):", text, re.MULTILINE)}
    branches = re.finditer(r"\b(?:bra|s_c?branch)\S*\s+(\S+?);?$", text, re.MULTILINE)
    spans = {(labels[b[1]], b.start()) for b in branches if labels.get(b[1], len(text)) < b.start()}
    innermost = [(a, z) for a, z in spans if not any((a, z) != other and a <= other[0] < z for other in spans)]
    return [text[begin:end] for begin, end in sorted(innermost)]


def rounds_as_ieee(kernel) -> bool:
    approximate = ("div.full", "div.approx", "sqrt.approx", ".ftz.f32")
    return not any(word in kernel.asm.get("ptx", "") for word in approximate)


def _updates() -> Iterator[Any]:
    """Each rule with the default on one device, and a few on each; all of all is an hour."""
    for target, config, what in itertools.product(TARGETS, tuning.CANDIDATES, [*UPDATES, *WITH_STAGES]):
        if config not in tuning.candidates(getattr(torch, what[2])):
            continue
        is_one_of_few = config == tuning.DEFAULT and (target == "sm_90" or what[0] in ("adam", "sgd"))
        names = "-".join(map(name_of, (what, config)))
        yield pytest.param(target, config, what, id=f"{target}-{names}", marks=() if is_one_of_few else slow)


@pytest.mark.parametrize(("target", "config", "what"), list(_updates()))
def test_update(target, config, what, tmp_path) -> None:
    rule, states, dtype, is_aligned, has_stages = what
    dtype = getattr(torch, dtype)
    constants = compilation.update_constants(RULES[rule], dtype, states, is_aligned, has_stages, config.block)
    kernel = compiled(kernels.update_kernel, constants, target, config.warps)
    registers, spills = registers_and_spills(kernel, tmp_path)
    print(f"{registers} registers, {spills} bytes spilled")  # pytest -rA shows it
    # To have room for more blocks, ptxas puts a few loop invariants aside, before the loop. Of the kernels with the
    # default, Triton 3.9 has three that put 8 bytes aside, and RAdam's for unaligned 16-bit numbers on sm_90, 16.
    allowed = 16 if config == tuning.DEFAULT else 32
    if has_stages:  # twelve invariants more, of which a few are put aside; float64 with three states has the most
        allowed = 192 if dtype == torch.float64 else 32
    assert spills <= allowed
    assert rounds_as_ieee(kernel)
    assert kernel.metadata.shared == 0  # no element changes hands between threads
    loads, stores = wide_accesses(kernel)
    threads = config.warps * TARGETS[target].warp_size
    bytes_of_thread = config.block // threads * dtype.itemsize
    packs = bytes_of_thread // 16 if is_aligned else 0
    assert (loads, stores) == ((2 + states.bit_count()) * packs, (1 + states.bit_count()) * packs)


@every_target
@pytest.mark.parametrize("what", list(itertools.product(DTYPES, (True, False))), ids=name_of)
def test_squares(what, target, tmp_path) -> None:
    dtype, is_aligned = getattr(torch, what[0]), what[1]
    constants = compilation.squares_constants(RULES["adam"], dtype, is_aligned)
    kernel = compiled(
        kernels.squares_kernel, constants, target, compilation.NORM_WARPS, registers=compilation.NORM_REGISTERS
    )
    registers, spills = registers_and_spills(kernel, tmp_path)
    assert spills <= (16 if target == "sm_100" else 0)  # of what the loops share, put aside before them
    threads = compilation.NORM_WARPS * TARGETS[target].warp_size
    if target.startswith("sm"):  # all programs of a multiprocessor at once
        assert registers * threads * device_plan.SUMS_PER_MULTIPROCESSOR <= 64 * 1024
    assert rounds_as_ieee(kernel)
    bytes_of_thread = constants["BLOCK"] // threads * dtype.itemsize
    passes = 1 if dtype == torch.float64 else 2  # the second for what float32 has no room for
    assert wide_accesses(kernel)[0] == (passes * bytes_of_thread // 16 if is_aligned else 0)
    loops = innermost_loops(assembly(kernel))
    assert len(loops) == passes
    for loop in loops:
        assert len(re.findall(r"\b(?:ld\.global|global_load|buffer_load)", loop)) >= 1
        assert ("f64" in loop) == (dtype == torch.float64)
        # A thread adds up its own packs; nothing changes hands.
        assert not re.search(r"\b(?:bar|barrier|shfl|s_barrier|ds_\w+|ld\.shared|st\.shared|v_\w+_dpp)\b", loop)


@every_target
@pytest.mark.parametrize("clips", [True, False])
@pytest.mark.parametrize("rule", RULES)
def test_prepare(rule, clips, target, tmp_path) -> None:
    constants = compilation.prepare_constants(RULES[rule], clips)
    kernel = compiled(kernels.prepare_kernel, constants, target, compilation.PREPARE_WARPS)
    # It works on a few numbers, once a step: a value put aside costs nothing that a clock could show.
    assert registers_and_spills(kernel, tmp_path)[1] <= 16


TILES = {units.tile_of(UnitLayout(9, *layout)) for layout in itertools.product((1, 7), (1, 16, 100, 5000))}


def _units() -> Iterator[Any]:
    """A tile for each rule on one device, all for one rule there, and a few on each."""
    largest = max(TILES, key=lambda tile: tile.along)
    for target, rule, dtype, tile in itertools.product(TARGETS, RULES, DTYPES, sorted(TILES)):
        on_one = target == "sm_90" and ((rule == "adam" and dtype in ("float32", "float64")) or dtype == "float32")
        is_one_of_few = rule == "adam" if on_one else (rule == "adam" and dtype == "float32")
        is_one_of_few &= target == "sm_90" or tile.along < 32
        is_one_of_few |= on_one and tile == largest
        name = name_of((target, rule, dtype, *tile))
        yield pytest.param(target, rule, dtype, tile, id=name, marks=() if is_one_of_few else slow)


@pytest.mark.parametrize(("target", "rule", "dtype", "tile"), list(_units()))
def test_units(target, rule, dtype, tile, tmp_path) -> None:
    constants = compilation.units_constants(RULES[rule], getattr(torch, dtype), RULES[rule].variants[-1], tile)
    kernel = compiled(units.units_kernel, constants, target, compilation.UNITS_WARPS)
    registers, spills = registers_and_spills(kernel, tmp_path)
    print(f"{registers} registers, {spills} bytes spilled")
    assert spills <= 128  # what a panel's loops share, put aside before them
    assert rounds_as_ieee(kernel)
    assert kernel.metadata.shared <= 4096  # the sums of warps


# What a rule brings to a kernel.
FUNCTIONS = ("step", "prox", "finish", "next_scalars", "fill", "metric")
KERNELS = [kernels.update_kernel, kernels.squares_kernel, kernels.prepare_kernel, units.units_kernel]


@pytest.mark.parametrize("kernel", KERNELS, ids=str)
def test_what_a_kernel_is_compiled_for(kernel) -> None:
    """Numbers that grow with the model compile nothing new, 1 and multiples of 16 included; the rest are tables,
    wherever they lie."""
    for parameter in kernel.params:
        if is_number(parameter.name):
            assert parameter.do_not_specialize
        else:
            assert parameter.is_constexpr == (parameter.name.isupper() or parameter.name in FUNCTIONS)
            assert parameter.is_constexpr or parameter.do_not_specialize_on_alignment


# -- when Triton compiles


@pytest.fixture
def driver(monkeypatch) -> Driver:
    """Steps on CPU parameters get as far as the launch."""
    for kernel in KERNELS:
        monkeypatch.setattr(kernel, "device_caches", collections.defaultdict(kernel.create_binder))
    driver = Driver()
    monkeypatch.setattr(triton.runtime.driver, "_active", driver)
    monkeypatch.setitem(backends.BACKENDS, "triton", UnlaunchedTritonBackend())
    return driver


@pytest.fixture
def compilations(driver, monkeypatch):
    """What Triton's JIT has compiled. It is asked in every launch, and not once for each kind of launch."""

    def launch(launcher, programs, arguments, stream) -> None:
        launcher.kernel.warmup(
            *arguments, grid=(programs,), **launcher.constants, **compilation.options(launcher.warps)
        )

    monkeypatch.setattr(compilation.Launcher, "__call__", launch)
    return lambda: [(kernel.__name__, key) for kernel in KERNELS for key in kernel.device_caches[0][0]]


def test_launches_are_those_of_tritons_jit(driver, monkeypatch) -> None:
    """The same kernel, as it was compiled, with the same arguments in the same places."""
    launch = compilation.Launcher.__call__
    pairs = []

    def launch_twice(launcher, programs, arguments, stream) -> None:
        driver.launched.clear()
        launch(launcher, programs, arguments, stream)
        launcher.kernel[(programs,)](*arguments, **launcher.constants, **launcher._options)
        pairs.append(tuple(driver.launched))

    monkeypatch.setattr(compilation.Launcher, "__call__", launch_twice)
    params = make_params([(64, 33), (40_000,), (5,)]) + make_params([(7,)], torch.float16)
    optimizer = FusedRegSGD(
        params, backend="triton", momentum=0.9, lr=0.1, l1=0.1, max_grad_norm=1.0, group_l1=0.1, unit="tensor"
    )
    run(optimizer, params, 3)
    assert len(pairs) >= 3 * 6  # the norm and the update of two dtypes, prepare, the units
    for ours, tritons in pairs:
        assert len(ours) == len(tritons)
        for one, other in zip(ours, tritons, strict=True):
            assert one is other or one == other or type(one) is type(other) is LazyDict  # what a profiler reads


def test_tritons_jit_is_asked_once_for_each_kind_of_launch(driver, monkeypatch) -> None:
    """In 25 us of Python a launch it would say the same."""
    asked = []
    for kernel in KERNELS:
        its_run = kernel.run
        monkeypatch.setattr(
            kernel, "run", lambda *args, its_run=its_run, **named: asked.append(1) or its_run(*args, **named)
        )
    params = make_params([(64, 33), (5,)])
    optimizer = FusedRegSGD(params, backend="triton", lr=0.1, l1=0.1, max_grad_norm=1.0, group_l1=0.1)
    run(optimizer, params, 1)
    assert len(asked) == 3 + 2  # there are two kinds of units here
    driver.launched.clear()
    run(optimizer, params, 4)
    assert len(asked) == 3 + 2
    assert len(driver.launched) == 4 * (3 + 2)


def test_a_kept_launch_has_the_programs_of_its_step(driver) -> None:
    """One for each scalar set: as many as there are step counts."""
    params = make_params([(5,), (3,)])
    optimizer = FusedRegAdam(params, backend="triton")
    programs = []
    for count in (1, 2, 7, 4, 4):
        driver.launched.clear()
        run(optimizer, params, 1)
        programs.append([launched[0] for launched in driver.launched])
        optimizer.state[params[0]]["step"].fill_(count)
    assert programs == [[1, 2], [1, 2], [1, 2], [2, 2], [1, 2]]


@pytest.mark.parametrize("cls", OPTIMIZERS)
def test_the_jit_compiles_for_no_hyperparameter_step_or_number_of_tensors(cls, compilations) -> None:
    """1, multiples of 16, and what is neither: numbers that Triton would compile anew for, if it was let to."""
    params = make_params([(64, 64)] * 34)
    optimizer = cls(params[:1], backend="triton", **regularized(cls, list(cls.spec.variants)[1]))
    run(optimizer, params[:1], 1)
    first = compilations()
    assert sorted(name for name, _ in first) == ["prepare_kernel", "squares_kernel", "update_kernel"]
    own = {"momentum": 0.5, "betas": (0.5, 1 / 16), "alpha": 0.5, "eps": 1.0, "lr_decay": 16.0}
    for i, mode in enumerate(cls.spec.modes):
        optimizer.param_groups[0].update(lr=float(i), l1=0.01 * i, l2=0.0, penalty_mode=mode, clip_value=None)
        needed = cls.spec.needed_states(optimizer.param_groups[0])
        optimizer.param_groups[0].update({key: value for key, value in own.items() if key in optimizer.defaults})
        assert cls.spec.needed_states(optimizer.param_groups[0]) == needed
        run(optimizer, params[:1], 2)
    for some in (params[1:16], params[16:17], params[17:]):
        optimizer.add_param_group({"params": some, "maximize": True})
        run(optimizer, params, 1)
    assert compilations() == first


def test_the_jit_compiles_for_no_place_in_a_table(compilations) -> None:
    """Two dtypes share the partial sums, and those of the second begin where those of the first end: at any place."""
    counts = [(1, 1), (2, 2), (16, 1), (3, 5)]
    seen = []
    for singles, halves in counts:
        params = make_params([(8, 8)] * singles) + make_params([(8, 8)] * halves, torch.float16)
        optimizer = FusedRegSGD(params, backend="triton", max_grad_norm=1.0, l1=0.1)
        run(optimizer, params, 1)
        seen.append(len(compilations()))
    assert seen == [5] * len(counts)


def test_the_jit_compiles_for_no_number_of_units(compilations) -> None:
    """A kernel for each kind of layout and dtype, whatever the strengths, and however many launches a panel takes."""
    params = make_params([(64, 33)] * 5 + [(7, 40_000)])
    optimizer = FusedRegSGD(params[:1], backend="triton", lr=0.1, group_l1=0.1, unit="rows")

    def unit_kernels() -> int:
        return sum(name == "units_kernel" for name, _ in compilations())

    run(optimizer, params[:1], 1)
    assert unit_kernels() == 1
    for i, some in enumerate((params[1:2], params[2:5])):
        optimizer.param_groups[0].update(group_l1=1.0 + i, max_unit_norm=16.0)
        optimizer.add_param_group({"params": some, "group_l1": 0.5, "max_unit_norm": 2.0 + i})
        run(optimizer, params, 2)
    assert unit_kernels() == 1
    optimizer.add_param_group({"params": params[5:], "group_l1": 1.0, "unit": "tensor"})  # in parts
    run(optimizer, params, 2)
    assert unit_kernels() == 2
    optimizer.param_groups[0]["unit"] = "columns"
    run(optimizer, params, 1)
    assert unit_kernels() == 3
