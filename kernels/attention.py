"""softmax(q kᵀ / √d) v, four ways with one signature. They differ in memory and speed.

q is (batch, heads, n, d), k and v are (batch, heads, m, d), all of one floating dtype, on any device. The
answer is (batch, heads, n, d), laid out in memory as (batch, n, heads, d), so that joining the heads copies
nothing. `sdpa` lays it out so only if q is.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, linalg
from torch.nn import functional

from . import onednn
from .blocks import block, slice_rows, slice_shape


def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The formula as written: the reference. It stores all batch x heads x n x m scores."""
    return _joinable((q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).softmax(-1) @ v)


def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """torch's: a flash, memory-efficient or cuDNN kernel where the device has one, otherwise the formula.

    On a CPU in bf16 a few keys are made a whole number of vectors, by keys that a mask takes out.
    """
    keys = k.shape[2]
    if not q.is_cpu or (more := _whole_vectors(keys, q.dtype) - keys) == 0:
        return functional.scaled_dot_product_attention(q, k, v)
    mask = q.new_zeros(1, 1, 1, keys + more)
    mask[..., keys:] = -math.inf
    k, v = (functional.pad(x, (0, 0, 0, more)) for x in (k, v))
    return functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def sliced(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The formula for one head at a time, and for as many of its queries as have scores of BLOCK_BYTES."""
    if q.is_cpu and q.dtype is torch.bfloat16:
        return sliced_bf16(q, k, v)
    out = _empty(q)
    keys, scale = k.transpose(-1, -2), q.shape[-1] ** -0.5
    rows = slice_rows(k.shape[2], q.element_size())
    for i in range(q.shape[0]):
        for j in range(q.shape[1]):
            for r in range(0, q.shape[2], rows):
                scores = (q[i, j, r : r + rows] * scale) @ keys[i, j]
                out[i, j, r : r + rows] = scores.softmax(-1) @ v[i, j]
                del scores
    return out


def sliced_bf16(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """`sliced` for a CPU in bf16: a softmax without a pass for its maxima and one for its sums.

    Powers of two are taken of the scores, as they are quicker than of e, and in place. No maximum is needed
    where no score can be far from 0. What scores are lowered by comes with the product, and so do the sums:
    by columns of ones beside keys and values.
    """
    out, (batch, heads, n, d), m = _empty(q), q.shape, k.shape[2]
    together, rows = slice_shape(heads, n, m)
    for i in range(batch):
        for j in range(0, heads, together):
            some = slice(j, j + together)
            queries, keys, values, near = _with_ones(q[i, some], k[i, some], v[i, some])
            for r in range(0, n, rows):
                scores = queries[:, r : r + rows] @ keys.transpose(1, 2)
                if near:
                    scores.exp2_()
                else:
                    torch.softmax(scores, -1, out=scores)
                sums = scores @ values
                torch.div(sums[..., :d], sums[..., d : d + 1], out=out[i, some, r : r + rows])
                del scores, sums
                if q.is_meta:
                    break  # the first slice is the largest, and of a large picture there are millions
            del queries, keys, values
    return out


def chunked(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Blocks of queries against blocks of keys, with a running maximum and sum, in fp32: O(n) memory on any
    device.

    Rabe and Staats, "Self-attention does not need O(n²) memory", arXiv 2112.05682.
    """
    out, scale = _empty(q), q.shape[-1] ** -0.5
    rows, columns = block(q.shape[0] * q.shape[1], k.shape[2], q.shape[3])
    for r in range(0, q.shape[2], rows):
        queries = q[:, :, r : r + rows].float() * scale
        top = queries.new_full((*queries.shape[:3], 1), -float("inf"))
        total = top.new_zeros(top.shape)
        sums = queries.new_zeros(queries.shape)
        for c in range(0, k.shape[2], columns):
            scores = queries @ k[:, :, c : c + columns].float().transpose(-1, -2)
            higher = top.maximum(scores.amax(-1, keepdim=True))
            shrink = (top - higher).exp_()
            weights = scores.sub_(higher).exp_()
            total.mul_(shrink).add_(weights.sum(-1, keepdim=True))
            sums.mul_(shrink).add_(weights @ v[:, :, c : c + columns].float())
            top = higher
            del scores, weights
        out[:, :, r : r + rows] = sums.div_(total)
    return out


VARIANTS = {"sdpa": sdpa, "sliced": sliced, "chunked": chunked}


# Values in a vector register of AVX-512, and keys that torch's CPU kernel takes at a time.
_VECTOR, _COLUMNS = 16, 512


def _whole_vectors(m: int, dtype: torch.dtype) -> int:
    """Keys that `sdpa` gives torch's CPU kernel for `m`. It takes exponentials past the last whole vector one
    by one: of 77 keys, 13 took half of the time. In fp32 answers stay diffusers' to the last bit."""
    return -(-m // _VECTOR) * _VECTOR if dtype is torch.bfloat16 and m < _COLUMNS else m


def sdpa_on_cpu_bytes(heads: int, n: int, m: int, d: int, dtype: torch.dtype, threads: int) -> int:
    """Bytes that `sdpa` allocates on a CPU beside its answer: what torch's kernel does, and a mask and copies
    of keys and values where these are made whole vectors. `heads` counts those of the whole batch."""
    whole = _whole_vectors(m, dtype)
    beside = dtype.itemsize * (whole + 2 * heads * whole * d) if whole > m else 0
    return beside + sdpa_cpu_bytes(heads, n, whole, d, dtype, threads)


# Queries, and keys, from which on torch has these in an order for tiles.
_LEAST_PACKED = 64


def sdpa_cpu_bytes(heads: int, n: int, m: int, d: int, dtype: torch.dtype, threads: int) -> int:
    """Bytes that torch's CPU kernel allocates beside its answer; `heads` counts those of the whole batch.

    That is the log-sum of each query, and per thread a block of fp32 scores with its maxima, sums and
    answers. In 16 bits there is a copy of the scores too, and where the CPU multiplies tiles, keys and values
    in their order, with a block of them per thread. From
    aten/src/ATen/native/cpu/FlashAttentionKernel.cpp (torch 2.13); the order was found by measuring.
    """
    rows = min(256 if n >= 768 else 64 if n >= 192 else 32, n)
    columns = min(_COLUMNS, m)
    per_thread = 4 * rows * (columns + 2 + d)
    packed = 0
    if dtype.itemsize == 2:
        per_thread += 2 * rows * columns
    if min(n, m) >= _LEAST_PACKED and onednn.in_tiles(dtype):
        per_thread += 2 * rows * (columns % 2) + 2 * d * columns + 2 * rows * (d + 1) * (d % 2)
        blocks, rest = divmod(m - 1, columns)
        even = blocks * (columns + columns % 2) + rest + 1 + (rest + 1) % 2
        packed = 2 * heads * ((d + d % 2) * m + d * even)
    return 4 * heads * n + threads * per_thread + packed


# Scores this near to 0 are 2^-75 to 2^75 without a maximum: their sums are far from where bf16 ends.
_NEAR = 75.0


def _with_ones(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor, bool]:
    """Queries (heads, n, d + 2), keys (heads, m, d + 2) with ones, values (heads, m, a multiple of 16) with
    ones, and whether all scores are near 0: these are logarithms of base 2 then, and lowered.

    bf16 rounds scores, the large ones most. So twice their usual size is taken off, as if keys pointed
    anywhere.
    """
    (heads, n, d), m = q.shape, k.shape[1]
    queries, keys = q.new_zeros(heads, n, d + 2), k.new_ones(heads, m, d + 2)
    values = v.new_ones(heads, m, -(-(d + 1) // 16) * 16)
    keys[..., :d], values[..., :d] = k, v
    lengths, of_keys = (linalg.vector_norm(x, dim=-1).float() for x in (q, k))
    scale, longest = d**-0.5 * math.log2(math.e), of_keys.amax(-1, keepdim=True)
    near = q.is_meta or bool(((lengths * longest).amax() * scale <= _NEAR).item())
    if not near:
        scale = d**-0.5
    torch.mul(q, scale, out=queries[..., :d])
    if near:
        usual = lengths.mul_(of_keys.square_().mean(-1, keepdim=True).sqrt_()).mul_(-scale * d**-0.5)
        queries[..., d:] = usual[..., None]  # twice, in two columns
    return queries, keys, values, near


def _empty(q: Tensor) -> Tensor:
    batch, heads, n, d = q.shape
    return q.new_empty(batch, n, heads, d).transpose(1, 2)


def _joinable(x: Tensor) -> Tensor:
    return x.transpose(1, 2).contiguous().transpose(1, 2)
