"""Products of whole numbers are those of fp64 of the same codes: plain ones, and Triton's, interpreted on a
CPU and compiled."""

from __future__ import annotations

import math
import runpy
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tightfit.kernels import formats, int8, triton_int8
from tightfit.kernels.quantise import quantise
from tightfit.runtime.machine.hardware import Hardware
from torch.nn import functional

beside = runpy.run_path(str(Path(__file__).with_name("test_triton_weights.py")))
FORM = formats.FORMATS["int8"]
ONEDNN = "int8" in Hardware.detect("cpu").rates  # elsewhere tightfit does not call it
ROUNDING = {torch.float32: 1e-6, torch.float16: 1e-3}
CONVOLUTIONS = {  # batch, in, height, width, out, kernel, stride, padding
    "one tap": (2, 5, 4, 3, 7, (1, 1), (1, 1), (0, 0)),
    "one tap of every second": (1, 33, 5, 4, 17, (1, 1), (2, 2), (0, 0)),
    "nine taps": (2, 7, 5, 6, 18, (3, 3), (1, 1), (1, 1)),
    "nine taps of every second": (2, 40, 7, 6, 5, (3, 3), (2, 2), (1, 1)),
    "no padding": (1, 3, 5, 4, 2, (3, 3), (1, 1), (0, 0)),
    "all sides differ": (2, 2, 6, 9, 3, (3, 1), (1, 2), (2, 0)),
    "one of everything": (1, 1, 1, 1, 1, (3, 3), (1, 1), (1, 1)),
}


@pytest.fixture(scope="module")
def kernels():
    one = torch.ones(1, 1)
    yield from beside["interpreted"](
        triton_int8, lambda module: module.linear_int8_triton(one, one.to(torch.int8), one.half(), None)
    )


def made(shape, weight, dtype=torch.float32, last=False, seed=0):
    """An input whose rows or samples differ in size, a stored weight with bias, and what the weight means."""
    generator = torch.Generator().manual_seed(seed)
    x, w, bias = (torch.randn(sides, generator=generator) for sides in (shape, weight, weight[:1]))
    x = (x * 4.0 ** torch.arange(len(x)).view(-1, *[1] * (x.ndim - 1)).remainder(4)).to(dtype)
    x = x.contiguous(memory_format=torch.channels_last) if last else x
    parts = quantise(w, FORM)
    walls = [beside["walled"](parts[name]) for name in ("packed", "scale")]
    return x, walls, bias.to(dtype), formats.dequantise(parts, FORM, weight)


def rounded(x: torch.Tensor, lopsided: bool) -> torch.Tensor:
    """What the codes of `x` mean, in fp64; the codes by way of fp32, as of halves they depend on it."""
    rows = x.float().numpy().reshape(len(x), -1)
    low, high = np.minimum(rows.min(1, keepdims=True), 0), np.maximum(rows.max(1, keepdims=True), 0)
    scale = (high - low) / np.float32(255) if lopsided else np.maximum(-low, high) / np.float32(127)
    zero = np.rint(-low / scale) - 128 if lopsided else 0
    codes = np.clip(np.rint(rows / scale) + zero, -128, 127).astype(np.float64)
    return torch.from_numpy((codes - zero) * scale).view(x.shape)


def check(out: torch.Tensor, right: torch.Tensor, dtype: torch.dtype):
    assert out.shape == right.shape
    assert out.dtype == dtype
    assert (out.double() - right).norm() <= ROUNDING[dtype] * right.norm()


def check_linear(kernels, m, n, k, dtype=torch.float32, with_bias=True, seed=0):
    x, parts, bias, weight = made((m, k), (n, k), dtype, seed=seed)
    given_bias = bias if with_bias else None
    right = rounded(x, lopsided=False) @ weight.double().T + bias.double() * with_bias
    check(int8.linear_int8(x, *parts, given_bias), right, dtype)
    check(kernels.linear_int8_triton(x, *parts, given_bias, (16, 16, 32)), right, dtype)
    if ONEDNN and dtype == torch.float32:  # of halves its inputs are quantised otherwise
        check(int8.linear_int8_onednn(x, int8.pack_linear(parts[0]), parts[1], given_bias), right, dtype)


def check_convolution(
    kernels, shape, out, kernel, how, dtype=torch.float32, last=False, with_bias=True, seed=0
):
    x, parts, bias, weight = made(shape, (out, shape[1], *kernel), dtype, last, seed)
    given_bias = bias if with_bias else None
    right = functional.conv2d(
        rounded(x, lopsided=True), weight.double(), None if given_bias is None else bias.double(), *how
    )
    check(int8.conv2d_int8(x, *parts, given_bias, kernel, *how), right, dtype)
    answer = kernels.conv2d_int8_triton(x, *parts, given_bias, kernel, *how, tile=(32, 16, 32))
    check(answer, right, dtype)
    assert answer.is_contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)
    known = kernels.conv2d_int8_triton(
        x, *parts, given_bias, kernel, *how, sums=int8.weight_sums(parts[0]), tile=(32, 16, 32)
    )
    assert known.equal(answer)
    square = len({*kernel}) == len({*how[0]}) == 1 and (answer.shape[3] > 1 or how[0] == (1, 1))
    if not (ONEDNN and square):  # oneDNN's own faults: docs/decisions.md
        return
    ready = int8.pack_conv2d(parts[0], shape[1], kernel, *how)
    answer = int8.conv2d_int8_onednn(
        x.contiguous(memory_format=torch.channels_last), ready, parts[1], given_bias, *how
    )
    check(answer, right, dtype)
    assert answer.is_contiguous(memory_format=torch.channels_last)


def both_codes(kernels, x, lopsided, block=1024):
    """The codes with their scales and zeros, plain and Triton's."""
    codes, scale, *zero = int8.quantise_samples(x) if lopsided else int8.quantise_rows(x)
    return (
        codes,
        kernels.encode_triton(x, scale, *(zero or [None]), block),
        scale,
        zero[0] if zero else torch.zeros(1),
    )


@pytest.mark.parametrize("lopsided", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("last", [False, True], ids=["nchw", "channels last"])
@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (5, 33), (1, 1, 1, 1), (2, 3, 5, 4)], ids=str)
def test_codes(kernels, shape, last, dtype, lopsided):
    x = torch.randn(shape).to(dtype)
    x = x.contiguous(memory_format=torch.channels_last) if last and x.ndim == 4 else x
    plain, other, scale, zero = both_codes(kernels, x, lopsided, 16)
    assert (plain.stride(), plain.dtype, scale.dtype) == (x.stride(), torch.int8, torch.float32)
    assert (other.stride(), other.dtype) == (x.stride(), torch.int8)
    assert plain.equal(other)
    # Zero is rounded too.
    assert (
        ((plain.float() - zero) * scale - x.float()).abs() <= scale * (1.001 if lopsided else 0.5001)
    ).all()
    dims = tuple(range(1, x.ndim))
    assert (
        ((plain == -128) | (plain == 127)).any(dims).all()
        if lopsided
        else (plain.abs().amax(dims) == 127).all()
    )


def test_codes_of_halves_and_of_zeros(kernels):
    x = torch.tensor([[127, 0.5, 1.5, -2.5, -126.5], [0, 0, 0, 0, 0]])
    plain, other, scale, _ = both_codes(kernels, x, lopsided=False)
    assert (scale > 0).all()
    assert plain.tolist() == other.tolist() == [[127, 0, 2, -2, -126], [0] * 5]
    x = torch.tensor([[255, 0.5, 1.5, 2.5, 254.5], [0, 0, 0, 0, 0]])
    plain, other, scale, zero = both_codes(kernels, x, lopsided=True)
    assert (scale > 0).all()
    assert zero.flatten().tolist() == [-128, -128]
    assert plain.tolist() == other.tolist() == [[127, -128, -126, -126, 126], [-128] * 5]


def test_samples_of_one_sign_keep_their_precision():
    """SiLU's answers are from -0.28 up: half of symmetric codes would mean nothing that is there."""
    x = functional.silu(torch.randn(1, 8, 16, 16) * 4)
    codes, scale, zero = int8.quantise_samples(x)
    lopsided = ((codes.float() - zero) * scale - x).norm()
    codes, scale = int8.quantise_rows(x)
    assert lopsided < 0.6 * (codes * scale - x).norm()


@pytest.mark.skipif(not ONEDNN, reason="this processor has no VNNI")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_linear_of_onednn_in_halves(dtype):
    x, parts, _, weight = made((40, 64), (33, 64), dtype)
    right = x.double() @ weight.double().T
    out = int8.linear_int8_onednn(x, int8.pack_linear(parts[0]), parts[1], None)
    best = int8.linear_int8(x.float(), *parts, None)
    assert (out.double() - right).norm() <= 1.5 * (best.double() - right).norm() + 2**-8 * right.norm()
    zeros = int8.linear_int8_onednn(x * 0, int8.pack_linear(parts[0]), parts[1], None)
    assert not zeros.any()


@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
@pytest.mark.parametrize("size", [(1, 1, 1), (1, 5, 7), (3, 17, 33), (17, 16, 64), (33, 3, 70)], ids=str)
def test_linear(kernels, size, dtype):
    check_linear(kernels, *size, dtype)


@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
@pytest.mark.parametrize("last", [False, True], ids=["nchw", "channels last"])
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_convolution(kernels, name, last, dtype):
    *shape, out, kernel, stride, padding = CONVOLUTIONS[name]
    check_convolution(kernels, shape, out, kernel, (stride, padding), dtype, last)


@settings(deadline=None, max_examples=15)
@given(size=st.tuples(*[st.integers(1, 40)] * 3), with_bias=st.booleans(), seed=st.integers(0, 99))
def test_linear_of_any_size(kernels, size, with_bias, seed):
    check_linear(kernels, *size, with_bias=with_bias, seed=seed)


@settings(deadline=None, max_examples=15)
@given(
    shape=st.tuples(st.integers(1, 3), st.integers(1, 40), st.integers(3, 7), st.integers(3, 7)),
    out=st.integers(1, 20),
    kernel=st.tuples(*[st.sampled_from([1, 3])] * 2),
    stride=st.tuples(*[st.integers(1, 2)] * 2),
    padding=st.tuples(*[st.integers(0, 2)] * 2),
    last=st.booleans(),
    with_bias=st.booleans(),
)
def test_convolution_of_any_shape(kernels, shape, out, kernel, stride, padding, last, with_bias):
    last &= shape[1] > 1 and out > 1  # else both orders in memory are one, and torch names either
    check_convolution(kernels, shape, out, kernel, (stride, padding), last=last, with_bias=with_bias)


def test_sums_that_fp32_could_not_hold(kernels):
    x = torch.full((17, 1104), 127.0)
    x[:, 0] = 126
    parts = torch.full((8, 1104), 127, dtype=torch.int8), torch.ones(8, 1).half()
    right = 1103 * 127**2 + 126 * 127
    assert right > 2**24
    for out in (int8.linear_int8(x, *parts, None), kernels.linear_int8_triton(x, *parts, None)):
        assert (out == torch.tensor(right).float()).all()


def test_any_leading_shape(kernels):
    x, parts, bias, _ = made((6, 4), (5, 4))
    view = x.view(2, 3, 4).transpose(0, 1)
    for linear in (int8.linear_int8, kernels.linear_int8_triton):
        assert linear(view, *parts, bias).equal(linear(x, *parts, bias).view(2, 3, 5).transpose(0, 1))


def test_what_is_not_finite_spoils_its_own_sample_only(kernels):
    x, parts, bias, _ = made((3, 4, 3, 3), (5, 4, 3, 3))
    right = int8.conv2d_int8(x, *parts, bias, (3, 3), (1, 1), (1, 1))
    for value in (math.nan, math.inf):
        x[1, 2, 1, 1] = value
        ready = int8.pack_conv2d(parts[0], 4, (3, 3), (1, 1), (1, 1))
        last = x.contiguous(memory_format=torch.channels_last)
        answers = [
            convolve(x, *parts, bias, (3, 3), (1, 1), (1, 1))
            for convolve in (int8.conv2d_int8, kernels.conv2d_int8_triton)
        ]
        for out in [
            *answers,
            *([int8.conv2d_int8_onednn(last, ready, parts[1], bias, (1, 1), (1, 1))] if ONEDNN else []),
        ]:
            assert not out[1].isfinite().any()
            torch.testing.assert_close(out[::2], right[::2])


def test_what_does_not_fit_is_refused(kernels):
    _, parts, _, _ = made((1, 4), (6, 4))
    assert int8.MOST * 255 * 127 < 2**31 <= (int8.MOST + 1) * 255 * 127
    for linear in (int8.linear_int8, kernels.linear_int8_triton):
        with pytest.raises(ValueError, match="has no answer"):
            linear(torch.zeros(0, 4), *parts, None)
        with pytest.raises(ValueError, match="need rows of 5"):
            linear(torch.zeros(2, 5), *parts, None)
        long = torch.zeros(1, int8.MOST + 1)
        with pytest.raises(ValueError, match="do not fit into 32 bits"):
            linear(long, long.to(torch.int8), torch.ones(1, 1).half(), None)
    for convolve in (int8.conv2d_int8, kernels.conv2d_int8_triton):
        with pytest.raises(ValueError, match="grouped convolutions are not supported"):
            convolve(torch.zeros(1, 8, 3, 3), *parts, None, (1, 1))
        for shape in ((0, 4, 3, 3), (1, 4, 0, 3)):
            with pytest.raises(ValueError, match="has no answer"):
                convolve(torch.zeros(shape), *parts, None, (1, 1))
    for codes_of in (int8.quantise_rows, int8.quantise_samples):
        with pytest.raises(ValueError, match="nothing to quantise"):
            codes_of(torch.zeros(0, 4))
    with pytest.raises(ValueError, match="neither contiguous nor channels_last"):
        kernels.encode_triton(torch.zeros(4, 9)[:, ::2], torch.ones(4, 1), None)


def compile_all() -> None:
    for capability in (80,):
        encode = beside["ptx"](triton_int8._encode, capability, "*i8", "*fp16", "*fp32", "*i32", "i32", 1024)
        print(capability, "div.rn.f32" in encode)  # noqa: T201  others round otherwise than torch
        for taps in ((1, 1), (3, 3)):
            types = "*fp16", "*i8", "*i8", "*fp32", "*i32", "*fp16", "*i32", "*fp16", *["i32"] * 10
            found = beside["ptx"](triton_int8._convolve, capability, *types, *taps, 2, 2, 1, 1, 128, 64, 64)
            print(capability, ".s32.s8.s8" in found)  # noqa: T201


def test_compiles_for_gpus(tmp_path):
    """To products of whole numbers in tensor cores, and a division that rounds as torch's does."""
    pytest.importorskip("triton", reason="triton is not installed")
    assert beside["run"](__file__, TRITON_CACHE_DIR=str(tmp_path)) == "80 True\n" * 3


if __name__ == "__main__":
    compile_all()
