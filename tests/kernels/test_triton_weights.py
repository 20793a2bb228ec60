"""What Triton makes of stored weights is what they mean (kernels/formats.py): interpreted on a CPU, and
compiled for GPUs."""

from __future__ import annotations

import importlib.util
import math
import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tightfit.kernels import formats, triton_weights
from tightfit.kernels.formats import Format
from tightfit.kernels.quantise import quantise

FORMATS = [
    Format("int8", 0),
    Format("int8", 4),
    Format("int4", 4),
    Format("int4", 5),
    Format("nf4", 4),
    Format("nf4", 0),
]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SHAPES = [(5, 7), (3, 16), (1, 1), (9, 33), (4, 6, 1, 1), (3, 7, 3, 3), (2, 1, 3, 3)]


def interpreted(original, tries):
    """A copy of a module of kernels, as it is where TRITON_INTERPRET=1; the one that others import stays as
    it is."""
    pytest.importorskip("triton", reason="triton is not installed")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        spec = importlib.util.spec_from_file_location(original.__name__ + "_interpreted", original.__file__)
        assert spec
        assert spec.loader
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        try:
            tries(module)
        except Exception as error:
            if "only 0-dimensional arrays" in str(error):
                pytest.skip("this triton interprets no loops with numpy >= 2.4")
            raise
        yield module


def run(*arguments, **environment) -> str:
    """What Python prints, in a process of its own: an interpreter may leave triton changed, so that it cannot
    compile."""
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(sys.path),
        "TRITON_INTERPRET": "0",
        **environment,
    }
    return subprocess.run(
        [sys.executable, *arguments], stdout=subprocess.PIPE, text=True, env=environment, check=True
    ).stdout


def ptx(kernel, capability: int, *values) -> str:
    """`kernel` compiled for GPUs of `capability`; `values` are types as triton writes them, or constants."""
    from triton import compiler
    from triton.backends.compiler import GPUTarget

    types = [value if str(value).startswith(("*", "i32", "fp32")) else "constexpr" for value in values]
    known = {(i,): value for i, value in enumerate(values) if types[i] == "constexpr"}
    source = compiler.ASTSource(kernel, dict(zip(kernel.arg_names, types, strict=True)), known)
    return compiler.compile(source, target=GPUTarget("cuda", capability, 32)).asm["ptx"]


@pytest.fixture(scope="module")
def kernels():
    one, form = torch.ones(1, 1), Format("int8", 0)
    yield from interpreted(
        triton_weights, lambda module: module.linear_triton(one, *stored((1, 1), form)[0], None, form)
    )


def walled(x: torch.Tensor, brick: float | None = None) -> torch.Tensor:
    """`x` in memory between values that show: NaN, or 85."""
    brick = brick or (math.nan if x.is_floating_point() else 85)
    wall = torch.full((4096,), brick, dtype=x.dtype)
    return torch.cat([wall, x.flatten(), wall])[4096:-4096].view(x.shape)


def stored(
    shape, form: Format, seed: int = 0
) -> tuple[tuple[torch.Tensor, torch.Tensor, torch.Tensor | None], torch.Tensor]:
    """packed, scale and zero of a random weight, and what they mean."""
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    parts = quantise(weight, form)
    zero = walled(parts[form.offset]) if form.offset else None
    return (walled(parts["packed"]), walled(parts["scale"]), zero), formats.dequantise(parts, form, shape)


def check_dense(kernels, shape, form: Format, dtype=torch.float32, nchw=False, block=(2, 16), seed=0):
    parts, meant = stored(shape, form, seed)
    out = walled(torch.full(shape, math.nan, dtype=dtype), 7)
    kernels.dequantise_triton(out, *parts, form, math.prod(shape[2:]), shape[1], nchw, block)
    right = (meant if nchw or len(shape) == 2 else meant.permute(0, 2, 3, 1)).contiguous().flatten()
    if dtype == torch.bfloat16:  # which the interpreter cuts off, where a GPU rounds
        torch.testing.assert_close(out.flatten().float(), right, rtol=2**-7, atol=0)
    else:
        assert out.flatten().equal(right.to(dtype))
    around = out.as_strided((out.numel() + 64,), (1,), out.storage_offset() - 32)
    assert (around[:32] == 7).all()
    assert (around[-32:] == 7).all()


def check_linear(
    kernels, m: int, n: int, k: int, form: Format, dtype=torch.float32, bias=True, tile=None, seed=0
):
    parts, meant = stored((n, k), form, seed)
    x, b = (
        torch.randn(shape, generator=torch.Generator().manual_seed(seed + 1)).to(dtype)
        for shape in ((m, k), (n,))
    )
    out = kernels.linear_triton(walled(x), *parts, walled(b) if bias else None, form, tile)
    right = x.double() @ meant.double().T + b.double() * bias
    assert out.shape == right.shape
    assert out.dtype == dtype
    size = x.double().abs() @ meant.double().abs().T  # of the terms, which may cancel out
    assert (out.double() - right).norm() <= (1e-6 if dtype == torch.float32 else 1e-3) * size.norm()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("form", FORMATS, ids=str)
def test_dense(kernels, form, shape):
    """Any two of format, shape, type and order meet."""
    number = FORMATS.index(form) + SHAPES.index(shape)
    for nchw in (False, True):
        check_dense(kernels, shape, form, DTYPES[(number + nchw) % len(DTYPES)], nchw)


@settings(deadline=None, max_examples=15)
@given(
    shape=st.tuples(st.integers(1, 9), st.integers(1, 70), st.sampled_from([1, 3]), st.sampled_from([1, 3])),
    kind=st.sampled_from(["int8", "int4", "nf4"]),
    group=st.sampled_from([0, 1, 5, 8, 32, 64]),
    nchw=st.booleans(),
    seed=st.integers(0, 99),
)
def test_dense_of_any_shape(kernels, shape, kind, group, nchw, seed):
    check_dense(kernels, shape, Format(kind, group), nchw=nchw, block=(4, 64), seed=seed)


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float16], ids=str
)  # the interpreter cannot multiply bf16
@pytest.mark.parametrize("size", [(1, 5, 7), (3, 17, 33), (17, 3, 64), (70, 33, 40), (2, 1, 1)], ids=str)
@pytest.mark.parametrize("form", FORMATS, ids=str)
def test_linear(kernels, form, size, dtype):
    check_linear(kernels, *size, form, dtype)


@pytest.mark.parametrize("kind", ["int8", "int4", "nf4"])
@pytest.mark.parametrize("tile", [(16, 16, 16), (32, 16, 32), (16, 32, 64), (16, 16, 128)], ids=str)
def test_linear_in_tiles_within_a_group_and_across(kernels, tile, kind):
    """Of rows that end with a tile, that are shorter than one, and that end within a group."""
    for k in (64, 193):
        check_linear(kernels, 2, 17, k, Format(kind, 32), tile=tile)


@settings(deadline=None, max_examples=15)
@given(
    size=st.tuples(st.integers(1, 40), st.integers(1, 40), st.integers(1, 140)),
    kind=st.sampled_from(["int8", "int4", "nf4"]),
    group=st.sampled_from([0, 1, 5, 16, 64]),
    bias=st.booleans(),
    seed=st.integers(0, 99),
)
def test_linear_of_any_size(kernels, size, kind, group, bias, seed):
    check_linear(kernels, *size, Format(kind, group), bias=bias, seed=seed)


def test_any_leading_shape_none_at_all_and_views(kernels):
    form = Format("int4", 4)
    parts, meant = stored((5, 6), form)
    x = torch.randn(6, 3, 2).permute(1, 2, 0)
    torch.testing.assert_close(kernels.linear_triton(x, *parts, None, form), x @ meant.T)
    assert kernels.linear_triton(x[:0], *parts, None, form).shape == (0, 2, 5)


def test_what_does_not_fit_is_refused(kernels):
    form = Format("int4", 4)
    parts, _ = stored((5, 6), form)
    packed, scale, zero = parts
    with pytest.raises(ValueError, match="packed of a int4 weight"):
        kernels.linear_triton(torch.zeros(1, 9), *parts, None, form)
    with pytest.raises(ValueError, match=r"zero of a int4 weight .* this is none"):
        kernels.linear_triton(torch.zeros(1, 6), packed, scale, None, None, form)
    with pytest.raises(ValueError, match="scale of a int4 weight"):
        kernels.dequantise_triton(torch.zeros(5, 6), packed, scale[:, :1], zero, form, 1, 6)
    with pytest.raises(ValueError, match=r"packed of a int4 weight .* with strides \(1, 5\)"):
        kernels.dequantise_triton(torch.zeros(5, 6), packed.T.contiguous().T, scale, zero, form, 1, 6)
    for out in (torch.zeros(5, 7), torch.zeros(6, 5).T):
        with pytest.raises(ValueError, match="5 x 6 weights do not go"):
            kernels.dequantise_triton(out, *parts, form, 1, 6)


# What differs between GPUs is what triton makes of a product, whatever the format.
COMPILED = ((75, "int4"), (80, "int8"), (80, "nf4"))


def compile_all() -> None:
    for capability, kind in COMPILED:
        packed, zero = "*i8" if kind == "int8" else "*u8", "*u8" if kind == "int4" else None
        parts = packed, "*fp16", zero, "*fp32" if kind == "nf4" else None
        dense = ptx(
            triton_weights._dense, capability, "*fp16", *parts, *["i32"] * 6, kind, 64, 9, True, 4, 256
        )
        how = *["i32"] * 5, kind, 64, True, 16, 32, 64
        half, whole = (
            ptx(triton_weights._multiply, capability, t, t, *parts, t, *how) for t in ("*fp16", "*fp32")
        )
        print(kind, capability, *("mma." in code for code in (dense, half, whole)))  # noqa: T201


def test_compiles_for_gpus(tmp_path):
    """As an interpreter allows what a compiler does not. Tensor cores, of which triton knows none of 7.5,
    multiply fp16 only."""
    pytest.importorskip("triton", reason="triton is not installed")
    lines = run(__file__, TRITON_CACHE_DIR=str(tmp_path)).splitlines()
    assert lines == [f"{kind} {c} False {c >= 80} False" for c, kind in COMPILED]


def test_can_be_imported_without_triton(monkeypatch):
    """By a copy of the module, which is the only one that imports triton."""
    monkeypatch.setitem(sys.modules, "triton", None)
    spec = importlib.util.spec_from_file_location(f"{triton_weights.__name__}_alone", triton_weights.__file__)
    assert spec
    assert spec.loader
    spec.loader.exec_module(alone := importlib.util.module_from_spec(spec))
    assert alone.triton is None


if __name__ == "__main__":
    compile_all()
