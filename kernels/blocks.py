"""How much of an attention is computed at a time. Imports no torch: the planner counts by it."""

from __future__ import annotations

BF16_BYTES = 2**22  # of scores in `sliced_bf16` at a time
BLOCK_BYTES = 2**23  # of fp32 values in `chunked`, of scores in `sliced`, at a time (docs/decisions.md)


def slice_rows(m: int, element_size: int) -> int:
    """Queries that `sliced` takes at a time."""
    return max(1, BLOCK_BYTES // (m * element_size))


def slice_shape(heads: int, n: int, m: int) -> tuple[int, int]:
    """Heads and queries that `sliced_bf16` takes at a time: two heads at least, as each of two threads keeps
    what it makes of one in its cache."""
    together = min(heads, max(2, BF16_BYTES // (2 * n * m)))
    return together, max(1, min(n, BF16_BYTES // (2 * together * m)))


def block(heads: int, m: int, d: int) -> tuple[int, int]:
    """Rows and columns of one block of `chunked`: its fp32 scores, queries and sums take BLOCK_BYTES over all
    `heads`."""
    columns = min(m, 1024)
    return max(1, BLOCK_BYTES // (4 * heads * (columns + 3 * d))), columns
