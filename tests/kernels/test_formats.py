"""Stored weights mean what the formats say, whatever the shape; the fast version means the same; errors are
small."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tightfit.kernels.dequantise import dequantise as fast
from tightfit.kernels.formats import FORMATS, NF4, Format, dequantise, pack, unpack
from tightfit.kernels.quantise import quantise

SHAPES = [
    (7, 5),
    (320, 64),
    (6, 130),
    (5, 1),
    (16, 3, 3, 3),
    (9, 70, 3, 3),
    (8, 64, 1, 1),
    (4, 32, 2, 5),
    (1, 33, 3, 3),
]


def by_hand(parts: dict[str, torch.Tensor], form: Format, shape) -> np.ndarray:
    """The weight, value by value, from the words of kernels/formats.py alone."""
    out, channels, taps = shape[0], shape[1], math.prod(shape[2:])
    packed, scale = parts["packed"].numpy(), parts["scale"].numpy().astype(np.float64)
    row, groups = channels * taps, -(-channels // form.group) if form.group else 0
    weight = np.empty((out, channels, taps))
    for o in range(out):
        for t in range(taps):
            for c in range(channels):
                i = c * taps + t if form.flat else t * channels + c
                if form.bits == 8:
                    code = int(packed[o, i])
                else:
                    half = (row + 1) // 2
                    code = int(packed[o, i]) & 15 if i < half else int(packed[o, i - half]) >> 4
                group = t * groups + c // form.group if form.group else 0
                group = i // form.group if form.flat else group
                if form.kind == "int4":
                    code = code - int(parts["zero"][o, group]) / 16
                elif form.kind == "nf4":
                    code = float(np.float32(NF4[code]))
                least = float(parts["least"][o, group]) if form.kind == "int4-min" else 0
                weight[o, c, t] = code * scale[o, group] + least
    return weight.reshape(shape)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", FORMATS)
def test_what_is_stored_is_what_the_words_say(name, shape):
    form = FORMATS[name]
    parts = quantise(torch.randn(shape, generator=torch.Generator().manual_seed(1)), form)
    assert {part: (value.dtype, tuple(value.shape)) for part, value in parts.items()} == form.parts(shape)
    assert sum(value.nbytes for value in parts.values()) == form.bytes(shape)
    np.testing.assert_allclose(dequantise(parts, form, shape).numpy(), by_hand(parts, form, shape), rtol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", FORMATS)
def test_fast_is_the_reference(name, shape, dtype):
    form, row = FORMATS[name], math.prod(shape[1:])
    parts = quantise(torch.randn(shape), form)
    out, codes = (
        torch.full((shape[0], row), torch.nan, dtype=dtype),
        torch.empty(parts["packed"].numel(), dtype=torch.uint8),
    )
    fast(out, parts["packed"], parts["scale"], parts.get(form.offset), codes, form, form.taps(shape))
    exact = dequantise(parts, form, shape).flatten(1) if len(shape) == 2 else dequantise(parts, form, shape)
    exact = exact.flatten(1) if len(shape) == 2 or form.flat else exact.permute(0, 2, 3, 1).flatten(1)
    allowed = {torch.float32: 1e-6, torch.float16: 2**-9, torch.bfloat16: 2**-6}[dtype]  # three roundings
    # where values cancel, they have the error of what they are the difference of
    most = exact.abs().max().item() / (2 if form.kind == "int4-min" else 16)
    torch.testing.assert_close(out.float(), exact, rtol=allowed, atol=allowed * most)


@given(st.integers(1, 9), st.integers(1, 40), st.integers(0, 2**32 - 1))
def test_packing_loses_nothing(rows, row, seed):
    codes = torch.randint(0, 16, (rows, row), generator=torch.Generator().manual_seed(seed))
    packed = pack(codes)
    assert packed.shape == (rows, -(-row // 2))
    assert torch.equal(unpack(packed, row).long(), codes)


@settings(deadline=None, max_examples=60)
@given(
    st.sampled_from(list(FORMATS)),
    st.tuples(st.integers(1, 6), st.integers(1, 100), st.sampled_from([(), (1, 1), (3, 3), (1, 3)])),
    st.floats(1e-4, 100),
    st.integers(0, 2**32 - 1),
)
def test_values_that_are_there_come_back(name, sides, size, seed):
    """A weight that a format can say exactly is stored without loss, but for int4 and int4-min, whose scales
    are fitted: within their rounding."""
    form, shape = FORMATS[name], (*sides[:2], *sides[2])
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * size
    once = dequantise(quantise(weight, form), form, shape)
    if not form.offset:
        # Of fp16's scales.
        torch.testing.assert_close(
            dequantise(quantise(once, form), form, shape), once, rtol=2e-3, atol=127 * 2**-24
        )
    groups = form.rows(weight)
    for channels, _, length in form.spans(groups.shape[-1]):
        part = groups[..., channels].unflatten(-1, (-1, length))
        wrong = (form.rows(once)[..., channels].unflatten(-1, (-1, length)) - part).abs().amax(-1)
        most = torch.maximum(part.amax(-1), torch.zeros(())) - torch.minimum(part.amin(-1), torch.zeros(()))
        # The widest gap of NF4's is 0.30 of its largest value; fp16's smallest scales are 2**-24 apart.
        steps = {"int8": 127, "int4": 15, "int4-min": 15, "nf4": 6}[form.kind]
        assert (wrong <= 1.6 * most / steps + 127 * 2**-25 + 1e-6).all()


@pytest.mark.parametrize(
    ("name", "least"), [("int8", 39), ("int8-g64", 43), ("int4-g64", 21), ("int4-g32", 22), ("nf4-g64", 20)]
)
def test_error_on_a_normal_distribution(name, least):
    """Decibels; a uniform quantiser of 4 bits, fitted to 64 normal values, cannot pass 22.5, and min-max
    rounding has 20.9."""
    weight = torch.randn(512, 640, generator=torch.Generator().manual_seed(0))
    wrong = dequantise(quantise(weight, FORMATS[name]), FORMATS[name], weight.shape) - weight
    assert 10 * math.log10(weight.square().sum() / wrong.square().sum()) > least


@pytest.mark.parametrize("name", FORMATS)
def test_extremes(name):
    form = FORMATS[name]
    for weight in (
        torch.zeros(4, 70),
        torch.full((4, 70), 3.0),
        torch.full((4, 70), -2e-5),
        torch.rand(4, 70) + 5,
    ):
        made = dequantise(quantise(weight, form), form, weight.shape)
        assert made.isfinite().all()
        assert (made - weight).abs().max() <= weight.abs().max() * (
            0.15 if form.kind == "nf4" else 0.06
        ) + 1e-7
    with pytest.raises(ValueError, match="finite"):
        quantise(torch.tensor([[1.0, torch.nan]]), form)
    for empty in ((0, 4), (4, 0), (0, 3, 3, 3)):
        with pytest.raises(ValueError, match="nothing"):
            quantise(torch.empty(empty), form)


def test_blocks_change_nothing(monkeypatch):
    weight = torch.randn(33, 40, 3, 3)
    for form in FORMATS.values():
        whole = quantise(weight, form)
        monkeypatch.setattr("tightfit.kernels.quantise.BLOCK", 1000)
        for part, value in quantise(weight.half(), form).items():
            assert value.shape == whole[part].shape
        for part, value in quantise(weight, form).items():
            assert torch.equal(value, whole[part])
        monkeypatch.undo()


@pytest.mark.parametrize("shape", [(48, 96), (16, 70, 3, 3), (16, 40, 1, 1)], ids=str)
@pytest.mark.parametrize("name", [name for name, form in FORMATS.items() if not form.flat])
def test_errors_cancel_in_answers(name, shape):
    """With correlated inputs, E|ΔW x|² on inputs that were not looked at is clearly less than nearest codes
    have."""
    form, draw = FORMATS[name], torch.Generator().manual_seed(3)
    mix = torch.randn(shape[1], shape[1] // 4, generator=draw)
    seen, unseen = (torch.randn(4000, shape[1] // 4, generator=draw) @ mix.T for _ in range(2))
    weight = torch.randn(shape, generator=draw)

    def error(parts) -> float:
        wrong = dequantise(parts, form, shape) - weight
        wrong = wrong if wrong.ndim == 2 else wrong.permute(0, 2, 3, 1).flatten(0, 2)
        return (unseen @ wrong.T).square().mean().item()

    assert error(quantise(weight, form, seen.T @ seen / len(seen))) < 0.6 * error(quantise(weight, form))


@pytest.mark.parametrize("name", FORMATS)
def test_uncorrelated_inputs_want_the_nearest_codes(name):
    weight = torch.randn(24, 70)
    with_moment = quantise(weight, FORMATS[name], torch.eye(70))
    for part, value in quantise(weight, FORMATS[name]).items():
        assert torch.equal(value, with_moment[part])
