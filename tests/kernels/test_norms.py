"""Group norm and SiLU at once are those of fp64: torch's way, and Triton's, interpreted on a CPU and compiled
for GPUs."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest
import torch
from tightfit.kernels import norms, triton_norms
from torch.nn import functional

beside = runpy.run_path(str(Path(__file__).with_name("test_triton_weights.py")))
LAYOUTS = torch.contiguous_format, torch.channels_last
# Rounded once to that dtype; the interpreter cuts bf16 off, where a GPU rounds.
EPS = {torch.float32: 2e-6, torch.float16: 2**-10, torch.bfloat16: 2**-7}
SHAPES = [(1, 4, 3, 5, 2), (2, 30, 7, 9, 3), (2, 6, 1, 1, 6), (1, 10, 8, 8, 1)]  # the last: groups


def case(shape, dtype, layout, mean=0.0):
    """An input, its norm, and what fp64 makes of them."""
    *sides, groups = shape
    draw = torch.Generator().manual_seed(0)
    x, weight, bias = (torch.randn(s, generator=draw) for s in (sides, (sides[1],), (sides[1],)))
    x, weight, bias = (x + mean).to(dtype).contiguous(memory_format=layout), weight.to(dtype), bias.to(dtype)
    exact = functional.group_norm(x.double(), groups, weight.double(), bias.double(), 1e-5)
    return x, (groups, weight, bias, 1e-5), functional.silu(exact)


@pytest.fixture(scope="module")
def kernels():
    x, norm, _ = case(SHAPES[0], torch.float32, LAYOUTS[0])
    yield from beside["interpreted"](
        triton_norms, lambda module: module.group_norm_silu_triton(x, norm, block=16)
    )


@pytest.mark.parametrize("dtype", EPS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_triton_is_as_fp64(kernels, shape, dtype):
    for layout in LAYOUTS:
        x, norm, exact = case(shape, dtype, layout)
        walled = beside["walled"](x.permute(0, 2, 3, 1) if layout is LAYOUTS[1] else x)
        x = walled.permute(0, 3, 1, 2) if layout is LAYOUTS[1] else walled
        made = kernels.group_norm_silu_triton(x, norm, block=16)
        assert (made.dtype, made.stride()) == (dtype, x.stride())
        torch.testing.assert_close(made.double(), exact, rtol=EPS[dtype], atol=EPS[dtype])


def test_a_large_mean_takes_no_digits_from_the_variance(kernels):
    """E[x²] - E[x]² of plain sums would have none left: 3 of 7 digits at 1000 times the spread, squared."""
    x, norm, exact = case((1, 4, 9, 9, 2), torch.float32, LAYOUTS[0], mean=1000.0)
    made = kernels.group_norm_silu_triton(x, norm, block=16)
    torch.testing.assert_close(made.double(), exact, rtol=0, atol=1e-3)


def test_torch_is_as_fp64_and_leaves_its_input():
    for dtype, layout in zip((torch.float32, torch.bfloat16), LAYOUTS, strict=True):
        x, norm, exact = case(SHAPES[1], dtype, layout)
        before = x.clone()
        made = norms.group_norm_silu(x, norm)
        assert x.equal(before)
        torch.testing.assert_close(made.double(), exact, rtol=4 * EPS[dtype], atol=4 * EPS[dtype])


def test_what_does_not_fit_is_refused(kernels):
    x, (groups, weight, bias, eps), _ = case(SHAPES[1], torch.float32, LAYOUTS[0])
    with pytest.raises(ValueError, match="neither contiguous nor channels_last"):
        kernels.group_norm_silu_triton(x[..., 1:], (groups, weight, bias, eps))
    with pytest.raises(ValueError, match="one value for each of 30 channels"):
        kernels.group_norm_silu_triton(x, (groups, weight[:6], bias, eps))


def compile_all() -> None:
    """For GPUs of each kind, in fp16 and in fp32, in both layouts: whether there is one store a value."""
    for capability, kind, last in ((70, "*fp16", True), (80, "*fp32", True), (90, "*fp16", False)):
        types = *[kind] * 4, "i32", "fp32"
        text = beside["ptx"](triton_norms._normalise, capability, *types, 10, 32, last, 1024)
        sys.stdout.write(f"{capability} {kind} {last} {'st.global' in text}\n")


def test_compiles_for_gpus(tmp_path):
    pytest.importorskip("triton", reason="triton is not installed")
    lines = beside["run"](__file__, TRITON_CACHE_DIR=str(tmp_path)).splitlines()
    assert len(lines) == 3
    assert all(line.endswith("True") for line in lines)


if __name__ == "__main__":
    compile_all()
