"""softmax(q kᵀ / √d) v, four ways with one signature. They differ in memory and speed.

q is (batch, heads, n, d), k and v are (batch, heads, m, d), all of one floating dtype, on any device. The
answer is (batch, heads, n, d), laid out in memory as (batch, n, heads, d), so that joining the heads copies
nothing. `sdpa` lays it out so only if q is.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional

BLOCK_BYTES = 2**23  # of fp32 values in `chunked`, of scores in `sliced`, at a time (docs/decisions.md)


def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The formula as written: the reference. It stores all batch x heads x n x m scores."""
    return _joinable((q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).softmax(-1) @ v)


def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """torch's: a flash, memory-efficient or cuDNN kernel where the device has one, otherwise the formula."""
    return functional.scaled_dot_product_attention(q, k, v)


def sliced(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The formula for one head at a time, and for as many of its queries as have scores of BLOCK_BYTES."""
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


def slice_rows(m: int, element_size: int) -> int:
    """Queries that `sliced` takes at a time."""
    return max(1, BLOCK_BYTES // (m * element_size))


def block(heads: int, m: int, d: int) -> tuple[int, int]:
    """Rows and columns of one block of `chunked`: its fp32 scores, queries and sums take BLOCK_BYTES over all
    `heads`."""
    columns = min(m, 1024)
    return max(1, BLOCK_BYTES // (4 * heads * (columns + 3 * d))), columns


def sdpa_cpu_bytes(heads: int, n: int, m: int, d: int, element_size: int, threads: int) -> int:
    """Bytes that torch's CPU kernel allocates beside its answer; `heads` counts those of the whole batch.

    That is the log-sum of each query, and per thread a block of fp32 scores with its maxima, sums and
    answers. In 16 bits there is a copy of the scores too. From
    aten/src/ATen/native/cpu/FlashAttentionKernel.cpp (torch 2.13).
    """
    rows = min(256 if n >= 768 else 64 if n >= 192 else 32, n)
    columns = min(512, m)
    per_thread = 4 * rows * (columns + 2 + d)
    if element_size == 2:
        per_thread += 2 * rows * columns
    return 4 * heads * n + threads * per_thread


def _empty(q: Tensor) -> Tensor:
    batch, heads, n, d = q.shape
    return q.new_empty(batch, n, heads, d).transpose(1, 2)


def _joinable(x: Tensor) -> Tensor:
    return x.transpose(1, 2).contiguous().transpose(1, 2)
