"""Every kind of attention gives the formula's answer in fp64, and takes the memory that it says."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tightfit.kernels import attention, blocks

KINDS = {**attention.VARIANTS, "plain": attention.plain}
TOLERANCES = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.5e-2}
SHAPES = {  # batch, heads, n, m, d
    "one by one": (1, 1, 1, 1, 8),
    "a prompt": (2, 3, 65, 77, 40),
    "more queries than keys": (2, 2, 129, 33, 8),
    "more keys than queries": (1, 2, 31, 131, 160),
    "keys in three blocks": (2, 2, 7, 2051, 8),
}


def made(batch, heads, n, m, d, dtype=torch.float32, joinable=True, scale=1.0):
    """q, k and v, as a network makes them (a view of heads inside each token) or heads first in memory."""
    generator = torch.Generator().manual_seed(n * 10007 + m)
    qkv = [torch.randn(batch, length, heads, d, generator=generator).transpose(1, 2) for length in (n, m, m)]
    qkv[0] = qkv[0] * scale
    return [each.to(dtype) if joinable else each.to(dtype).contiguous() for each in qkv]


def formula(q, k, v) -> np.ndarray:
    q, k, v = (each.double().numpy() for each in (q, k, v))
    scores = q @ k.swapaxes(-1, -2) / np.sqrt(q.shape[-1])
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True) @ v


def error(out: torch.Tensor, right: np.ndarray) -> float:
    """Relative, by the Frobenius norm."""
    return float(np.linalg.norm(out.double().numpy() - right) / np.linalg.norm(right))


def peak(call, *args) -> int:
    """Bytes that torch allocates in the call, at most at a time, beside the answer's."""
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profiler:
        out = call(*args)
    assert profiler.profiler is not None
    events = [
        event.nbytes() for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"
    ]
    return max(np.cumsum(events)) - out.nbytes


@pytest.mark.parametrize("joinable", [True, False], ids=["tokens first", "heads first"])
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", KINDS)
def test_the_formula(kind, shape, dtype, joinable):
    q, k, v = made(*SHAPES[shape], dtype, joinable)
    out = KINDS[kind](q, k, v)
    assert out.shape == q.shape
    assert out.dtype == dtype
    assert error(out, formula(q, k, v)) < TOLERANCES[dtype]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", KINDS)
def test_heads_join_without_a_copy(kind, shape):
    q, k, v = made(*SHAPES[shape])
    assert KINDS[kind](q, k, v).transpose(1, 2).is_contiguous()


@pytest.mark.parametrize("kind", ["plain", "sliced", "chunked"])
def test_heads_join_without_a_copy_however_they_came(kind):
    q, k, v = made(*SHAPES["a prompt"], joinable=False)
    assert KINDS[kind](q, k, v).transpose(1, 2).is_contiguous()


@pytest.mark.parametrize("shape", ["a prompt", "keys in three blocks"])
@pytest.mark.parametrize("kind", KINDS)
def test_scores_too_large_to_exponentiate(kind, shape):
    q, k, v = made(*SHAPES[shape], scale=100)
    largest = (q @ k.transpose(-1, -2)).max() / q.shape[-1] ** 0.5
    assert largest > np.log(torch.finfo(torch.float32).max)
    out = KINDS[kind](q, k, v)
    assert out.isfinite().all()
    assert error(out, formula(q, k, v)) < 1e-4  # half a unit in the last place of a score of 400 is 1.5e-5


@pytest.mark.parametrize("end", [3, -3], ids=["rising", "falling"])
def test_a_maximum_that_moves_from_block_to_block(end):
    q, _, v = made(1, 1, 3, 2051, 8)
    k = torch.linspace(-end, end, 2051).reshape(1, 1, -1, 1).expand(1, 1, -1, 8)
    assert error(attention.chunked(q.abs(), k, v), formula(q.abs(), k, v)) < 1e-5


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("count", [1, 3000, 40000])
@pytest.mark.parametrize("kind", ["sliced", "chunked"])
def test_many_blocks(kind, count, dtype, monkeypatch):
    monkeypatch.setattr(blocks, "BLOCK_BYTES", count)
    q, k, v = made(2, 2, 83, 77, 40, dtype)
    assert error(KINDS[kind](q, k, v), formula(q, k, v)) < TOLERANCES[dtype]


@pytest.mark.parametrize("scale", [0.1, 1, 3, 30])
@pytest.mark.parametrize("shape", SHAPES)
def test_bf16_is_as_near_as_the_formula_in_bf16(shape, scale):
    """Whether scores are near 0, which takes no maxima, or far: or within a unit in bf16's last place."""
    q, k, v = made(*SHAPES[shape], torch.bfloat16, scale=scale)
    right = formula(q, k, v)
    steps = attention.plain(q, k, v)
    assert error(attention.sliced(q, k, v), right) <= max(1.1 * error(steps, right), 2**-8)


@pytest.mark.parametrize("count", [1, 3000, 40000])
def test_many_blocks_in_bf16(count, monkeypatch):
    monkeypatch.setattr(blocks, "BF16_BYTES", count)
    q, k, v = made(2, 5, 83, 77, 40, torch.bfloat16)
    assert error(attention.sliced(q, k, v), formula(q, k, v)) < TOLERANCES[torch.bfloat16]


@settings(deadline=None, max_examples=30)
@given(
    batch=st.integers(1, 2),
    heads=st.integers(1, 3),
    n=st.integers(1, 20),
    m=st.integers(1, 30) | st.integers(1020, 1030) | st.integers(2045, 2055),
    d=st.sampled_from([1, 8, 40]),
    rows=st.integers(1, 20),
)
def test_chunked_in_blocks_of_any_size(batch, heads, n, m, d, rows):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(blocks, "BLOCK_BYTES", rows * 4 * batch * heads * (min(m, 1024) + 3 * d))
        assert blocks.block(batch * heads, m, d)[0] == rows
        q, k, v = made(batch, heads, n, m, d)
        assert error(attention.chunked(q, k, v), formula(q, k, v)) < 1e-5


def test_twice_the_tokens_take_no_more_memory_in_chunks(monkeypatch):
    monkeypatch.setattr(blocks, "BLOCK_BYTES", 2**20)
    chunked, plain = (
        [peak(call, *made(1, 2, n, n, 40)) for n in (1024, 2048)]
        for call in (attention.chunked, attention.plain)
    )
    assert chunked[1] < 1.3 * chunked[0]
    assert chunked[1] < 1.3 * 2**20
    assert 3.5 < plain[1] / plain[0] < 4.5
    assert plain[1] > 4 * 2 * 2048**2  # the fp32 scores of two heads


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    "shape",
    [
        (1, 1, 17, 5, 160),
        (2, 3, 65, 77, 40),
        (1, 2, 191, 513, 8),
        (1, 2, 192, 511, 8),
        (2, 2, 767, 77, 40),
        (1, 2, 768, 600, 40),
        (1, 1, 1024, 1024, 160),
        (1, 3, 64, 65, 41),
    ],
    ids=str,
)
def test_what_the_cpu_kernel_takes_is_foretold(shape, dtype):
    batch, heads, n, m, d = shape
    q, k, v = made(*shape, dtype)
    foretold = attention.sdpa_on_cpu_bytes(batch * heads, n, m, d, dtype, torch.get_num_threads())
    assert peak(attention.sdpa, q, k, v) == foretold
