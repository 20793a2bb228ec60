"""Every change to diffusers' modules: attention, feed-forward, and norms with what follows them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from ....kernels import attention
from ....kernels.norms import fused_runs, group_norm_silu
from ...errors import TightfitError
from .autotune import fastest


class Processor:
    """diffusers' attention block around one of our attention variants. Tensors and their order are those of
    AttnProcessor2_0."""

    def __init__(self, attend: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]) -> None:
        self.attend = attend

    def __call__(
        self,
        attn: Any,
        hidden_states: torch.Tensor,
        encoder_hidden_states=None,
        attention_mask=None,
        temb=None,  # noqa: ARG002
    ):
        """(batch, n, width), or (batch, width, h, w) in a VAE, attends to (batch, m, …), or to itself if
        there is none."""
        if (
            attention_mask is not None
            or attn.spatial_norm is not None
            or attn.norm_cross
            or attn.norm_q
            or attn.norm_k
        ):
            raise TightfitError(
                "this model's attention has masks or norms that tightfit does not run: use a plain SD model"
            )
        shape, x = hidden_states.shape, hidden_states
        if len(shape) == 4:
            x = x.view(shape[0], shape[1], shape[2] * shape[3]).transpose(1, 2)
        if attn.group_norm is not None:
            x = attn.group_norm(x.transpose(1, 2)).transpose(1, 2)
        text = image = x if encoder_hidden_states is None else encoder_hidden_states
        tokens, scale = getattr(attn, "images", (0, 1.0))
        if tokens:
            text, image = text[:, :-tokens], text[:, -tokens:]
        q, k, v = _heads(attn.heads, (attn.to_q, x), (attn.to_k, text), (attn.to_v, text))
        x = self.attend(q, k, v).transpose(1, 2).flatten(2)
        if tokens:
            del k, v
            k, v = _heads(attn.heads, (attn.to_k_ip, image), (attn.to_v_ip, image))
            x.add_(self.attend(q, k, v).transpose(1, 2).flatten(2), alpha=scale)
        del q, k, v
        x = attn.to_out[1](attn.to_out[0](x))
        if len(shape) == 4:
            x = x.transpose(-1, -2).reshape(shape)
        if attn.residual_connection:
            x = x + hidden_states
        return x if attn.rescale_output_factor == 1 else x / attn.rescale_output_factor


@functools.cache
def dispatched(kind: str) -> Any:
    """One of our attention variants as diffusers' newer processors take it: by its table of backends, whose
    keys are members of an enumeration, of which this is one that it does not list."""
    from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry

    attend, name = attention.VARIANTS[kind], f"tightfit_{kind}"

    def run(
        query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attn_mask: Any = None
    ) -> torch.Tensor:
        """(batch, n, heads, d), as the answer is in memory."""
        if attn_mask is not None:
            raise TightfitError("this model's attention has masks, which tightfit does not run")
        q, k, v = (tensor.transpose(1, 2) for tensor in (query, key, value))
        return attend(q, k, v).transpose(1, 2)

    member = str.__new__(AttentionBackendName, name)
    member._name_ = member._value_ = name
    _AttentionBackendRegistry.register(member)(run)
    return member


def never_narrow(forward: Callable[[torch.Tensor], torch.Tensor], stride: int) -> Callable[..., torch.Tensor]:
    """A convolution of every `stride`-th column, never asked for one column alone: with AMX oneDNN 3.12
    answers that wrongly, in bf16 up to NaN. It is asked for a second one, beyond zeros."""

    def run(input: torch.Tensor) -> torch.Tensor:  # noqa: A002  torch's name
        """(batch, in, h, w) → (batch, out, h', w')."""
        answer = forward(input)
        if answer.shape[-1] > 1:
            return answer
        return forward(functional.pad(input, (0, stride)))[..., :1]

    return run


def _heads(count: int, *of: tuple[Any, torch.Tensor]) -> Iterator[torch.Tensor]:
    """What linears make of their sources, each (batch, heads, n, d)."""
    for linear, source in of:
        made = linear(source)
        yield made.view(len(made), -1, count, made.shape[-1] // count).transpose(1, 2)


# Bytes of a feed-forward layer's hidden values at a time. A GPU waits for the host, which takes 40 us to
# start an operator: SDXL's U-Net at 1024x1024 has 1,708 operators whole, 3,848 in parts of 8 MiB and 1,778 in
# parts of 64.
FEED_BYTES = 2**23
GPU_FEED_BYTES = 2**26
# Of packed layers: 1024, 512 and 256 tokens of 320, 640 and 1280 channels in bf16. Tiles (AMX) multiply these
# in 0.99, 0.83 and 0.80 of the time that they take for the 1638, 819 and 409 of before.
PACKED_FEED_BYTES = 5 * 2**20


def feed_forward(part: Any, most_bytes: int) -> Callable[..., torch.Tensor]:
    """A transformer's feed-forward layer in groups of tokens, so that its hidden values (eight times the
    width) stay small. At 512² they are 42 MB of SD 1.5's U-Net, more than anything else."""

    def forward(hidden_states: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        tokens = hidden_states.flatten(0, 1)
        rows = max(1, most_bytes // (8 * tokens.shape[1] * tokens.element_size()))
        if len(tokens) <= rows:
            return _through(part.net, hidden_states)
        out = torch.empty_like(tokens)
        for start in range(0, len(tokens), rows):
            out[start : start + rows] = _through(part.net, tokens[start : start + rows])
        return out.view(hidden_states.shape)

    return forward


class OfTime(nn.Module):
    """SiLU of a time's embedding, (batch, width). Maps come from a norm that has done it (`activate`)."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x if x.ndim == 4 else functional.silu(x)


def activate(part: Any) -> None:
    """Let the group norms of a ResNet block, or before a last convolution, do the SiLU that follows them, so
    that no map is held twice."""
    norms: tuple[Any, ...]
    if type(part).__name__ == "ResnetBlock2D":
        norms, follows = (part.norm1, part.norm2), "nonlinearity"
        plain = part.time_embedding_norm == "default"  # else norm2 is scaled by the time first
    else:
        norms, follows, plain = (getattr(part, "conv_norm_out", None),), "conv_act", True
    are_norms = all(type(norm) is nn.GroupNorm and norm.affine for norm in norms)
    if plain and are_norms and type(getattr(part, follows, None)) is nn.SiLU:
        for norm in norms:
            norm.forward = normed(norm)
        setattr(part, follows, OfTime())


def normed(norm: Any) -> Callable[[torch.Tensor], torch.Tensor]:
    """A group norm and SiLU. On a GPU the fastest of torch's way and Triton's, for each shape; no way holds
    more than the answer beside the input."""

    def forward(x: torch.Tensor) -> torch.Tensor:
        how = norm.num_groups, norm.weight, norm.bias, norm.eps
        compiling = torch.compiler.is_compiling()  # which joins them with what is around them
        if compiling or not (x.is_cuda and _is_dense(x) and fused_runs(x.device)):
            return group_norm_silu(x, how)
        from ....kernels.triton_norms import group_norm_silu_triton  # importing triton costs memory

        ways: dict[str, Callable[[], torch.Tensor]] = {
            f"at once, {block} in {warps} warps": functools.partial(
                group_norm_silu_triton, x, how, block, num_warps=warps
            )
            for block, warps in BLOCKS
        }
        ways["norm, then SiLU"] = lambda: group_norm_silu(x, how)
        layout = "channels first" if x.is_contiguous() else "channels last"
        return fastest(
            f"group norm, SiLU {list(x.shape)} {norm.num_groups} {layout} {x.dtype}", x.device, ways
        )

    return forward


# Values that a program of Triton's normalises at a time, and its warps. No GPU has chosen them yet.
BLOCKS = (1024, 4), (4096, 16)


def _is_dense(x: torch.Tensor) -> bool:
    return x.is_contiguous() or x.is_contiguous(memory_format=torch.channels_last)


def to_maps(part: Any) -> Callable[..., torch.Tensor]:
    """A transformer's way from tokens back to maps, with channels last. diffusers would put channels first,
    and the convolution that follows would put them last again."""

    def out(
        hidden_states: torch.Tensor,
        residual: torch.Tensor,
        batch_size: int,
        height: int,
        width: int,
        inner_dim: int,
    ) -> torch.Tensor:
        x = part.proj_out(hidden_states) if part.use_linear_projection else hidden_states
        x = x.view(batch_size, height, width, inner_dim).permute(0, 3, 1, 2)
        return (x if part.use_linear_projection else part.proj_out(x)) + residual

    return out


def _through(layers: Any, x: torch.Tensor) -> torch.Tensor:
    for layer in layers:
        x = layer(x)
    return x


def with_words(
    layer: Any, known: Callable[[torch.Tensor], torch.Tensor], size: int
) -> Callable[[torch.Tensor], torch.Tensor]:
    """The look-up of tokens, whose vocabulary has `size`, with the vectors of `layer.words` behind it."""

    def forward(ids: torch.Tensor) -> torch.Tensor:
        out = known(ids.clamp(max=size - 1))
        vectors = torch.nn.functional.embedding((ids - size).clamp(min=0), torch.cat([*layer.words]))
        return torch.where((ids < size)[..., None], out, vectors.to(out.dtype))

    return forward
