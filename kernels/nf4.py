"""Products by NF4 weights in bitsandbytes' kernels. Without it this module can be imported; `linear_nf4`
fails."""

from __future__ import annotations

import functools
import logging
import textwrap

from torch import Tensor, empty_like

_GROUP = 64


@functools.cache
def problem() -> str | None:
    """Why bitsandbytes cannot be used here, with the cure; None if it can."""
    # On a CPU it warns that a kernel which it would like to download is not here.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    try:
        import bitsandbytes  # noqa: F401  # pyright: ignore[reportMissingImports]
    except ImportError:
        return "it is not installed: pip install bitsandbytes"
    except Exception as error:  # its libraries'
        why = textwrap.shorten(f"{type(error).__name__}: {error}", 160, placeholder=" …")
        return f"{why}: install another version of it"
    return None


def reorder(packed: Tensor) -> Tensor:
    """Codes in the order of kernels/formats.py, as bitsandbytes has them: neighbours share a byte, the first
    of them in its high bits. Rows are whole groups."""
    out, (first, second) = empty_like(packed), (packed[:, ::2], packed[:, 1::2])
    low, high = out.chunk(2, 1)
    low.copy_((first << 4).bitwise_or_(second & 15))
    high.copy_((second >> 4).bitwise_or_(first & 0xF0))
    return out


def linear_nf4(x: Tensor, packed: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """(…, in) → (…, out), in the dtype of `x`. `packed` (out, in / 2) is reordered, `scale` (out, groups) is
    fp32."""
    import bitsandbytes  # pyright: ignore[reportMissingImports]

    state = bitsandbytes.functional.QuantState(
        absmax=scale.view(-1),
        shape=(len(packed), x.shape[-1]),
        code=_code(x.device.type),
        blocksize=_GROUP,
        quant_type="nf4",
        dtype=x.dtype,
    )
    return bitsandbytes.matmul_4bit(x, packed.view(-1, 1).t(), state, bias=bias)


@functools.cache
def _code(device: str) -> Tensor:
    from bitsandbytes import functional  # pyright: ignore[reportMissingImports]

    return functional.get_4bit_type("nf4", device=device)
