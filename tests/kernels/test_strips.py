"""What is made in strips is what is made whole, from less memory."""

from __future__ import annotations

from copy import deepcopy

import numpy as np
import pytest
import tightfit
import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageDraw
from tightfit.kernels import strips
from tightfit.runtime.backends.torch.vae import decode_in_strips, encode_in_strips
from torch import nn
from torch.nn import functional

EMOJI = f"{tightfit.__path__[0]}/runtime/models/emoji/vae"
SIZES = [(8, 8), (9, 13), (24, 16)]


@pytest.fixture(scope="module", params=[1, 2], ids=["one layer", "two layers"])
def vae(request) -> AutoencoderKL:
    """Random, with group norms that scale and shift, in fp64."""
    torch.manual_seed(request.param)
    made = AutoencoderKL(
        block_out_channels=(16, 16, 32, 32),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=request.param,
        norm_num_groups=8,
    )
    for part in made.modules():
        if isinstance(part, nn.GroupNorm):
            nn.init.normal_(part.weight, 1, 0.3)
            nn.init.normal_(part.bias, 0, 0.3)
    return made.eval().requires_grad_(False).double()


@pytest.fixture(scope="module")
def emoji() -> AutoencoderKL:
    made: AutoencoderKL = AutoencoderKL.from_pretrained(EMOJI, torch_dtype=torch.float32)
    return made.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def picture() -> torch.Tensor:
    """Shapes of flat colours and lines across every strip, (1, 3, 384, 384) from -1 to 1."""
    image = Image.new("RGB", (384, 384), (250, 240, 200))
    draw = ImageDraw.Draw(image)
    draw.ellipse((40, 30, 340, 350), fill=(255, 200, 0), outline=(90, 50, 0), width=6)
    draw.rectangle((110, 120, 160, 210), fill=(20, 20, 90))
    draw.polygon([(230, 110), (290, 210), (200, 200)], fill=(200, 0, 60))
    draw.line((0, 383, 383, 0), fill=(0, 120, 80), width=4)
    return torch.from_numpy(np.asarray(image, np.float32) / 127.5 - 1).permute(2, 0, 1)[None]


@pytest.fixture(scope="module")
def decoded(emoji, picture) -> dict[torch.dtype, tuple[torch.Tensor, torch.Tensor]]:
    """The decoder's picture of the encoded one, whole and in strips."""
    latents = emoji.encode(picture).latent_dist.mode()
    found = {}
    for dtype in (torch.float32, torch.bfloat16):
        decoder, x = deepcopy(emoji.decoder).to(dtype), emoji.post_quant_conv(latents).to(dtype)
        found[dtype] = decoder(x).float(), decode_in_strips(decoder, x).float()
    return found


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def layers(cin: int, cout: int, kernel: int = 3, **more: int) -> tuple[nn.GroupNorm, nn.Conv2d]:
    torch.manual_seed(cin * 100 + cout)
    norm = nn.GroupNorm(4, cin, eps=1e-2)  # so large that leaving it out shows
    nn.init.normal_(norm.weight, 1, 0.3)
    nn.init.normal_(norm.bias, 0, 0.3)
    return norm.requires_grad_(False), nn.Conv2d(cin, cout, kernel, **more).requires_grad_(False)


def fp64(layer: nn.Module) -> nn.Module:
    return deepcopy(layer).double()


def error(out: torch.Tensor, right: torch.Tensor) -> float:
    """Relative, by the Frobenius norm."""
    assert out.shape == right.shape
    return float((out.double() - right.double()).norm() / right.double().norm())


def decibels(out: torch.Tensor, right: torch.Tensor) -> float:
    """Peak signal to noise, of pictures from -1 to 1."""
    return float(10 * torch.log10(4 / (out.double() - right.double()).square().mean()))


def peak(call, *args) -> int:
    """Bytes that torch allocates in the call, at most at a time."""
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profiler:
        call(*args)
    assert profiler.profiler is not None
    events = [
        event.nbytes() for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"
    ]
    return max(np.cumsum(events))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_a_decoder(vae, size, dtype):
    latents = random(1, 4, *size, dtype=dtype)
    out = decode_in_strips(deepcopy(vae.decoder).to(dtype), latents)
    assert out.shape == (1, 3, 8 * size[0], 8 * size[1])
    assert error(out, vae.decoder(latents.double())) < 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("size", [*((8 * h, 8 * w) for h, w in SIZES), (75, 101)], ids=str)
def test_an_encoder(vae, size, dtype):
    pixels = random(1, 3, *size, dtype=dtype)
    assert (
        error(encode_in_strips(deepcopy(vae.encoder).to(dtype), pixels), vae.encoder(pixels.double())) < 1e-5
    )


def test_two_pictures_do_not_mix(vae):
    latents = torch.cat(
        [random(1, 4, 9, 5, dtype=torch.float64), 5 * random(1, 4, 9, 5, dtype=torch.float64, seed=1) + 3]
    )
    assert error(decode_in_strips(vae.decoder, latents), vae.decoder(latents)) < 1e-5


def test_the_latents_stay_as_they_were(vae):
    latents = random(1, 4, 9, 5, dtype=torch.float64)
    before = latents.clone()
    decode_in_strips(vae.decoder, latents)
    assert latents.equal(before)


@pytest.mark.parametrize("mean", [0, 1000, -1000])
@pytest.mark.parametrize("height", [1, 8, 9, 65, 200])
def test_statistics(height, mean):
    x = random(2, 8, height, 7) + mean
    variance, average = strips.statistics(strips.Stored(x), 4)
    groups = x.double().numpy().reshape(2, 4, -1)
    assert variance.shape == average.shape == (2, 4, 1)
    assert variance.dtype == average.dtype == torch.float32
    np.testing.assert_allclose(variance[..., 0], groups.var(-1), rtol=1e-4)
    np.testing.assert_allclose(average[..., 0], groups.mean(-1), rtol=1e-6, atol=1e-6)


def test_statistics_of_rows_that_differ():
    x = random(1, 8, 90, 7) + torch.linspace(-50, 50, 90)[:, None]
    variance, average = strips.statistics(strips.Stored(x), 2)
    groups = x.double().numpy().reshape(1, 2, -1)
    np.testing.assert_allclose(variance[..., 0], groups.var(-1), rtol=1e-5)
    np.testing.assert_allclose(average[..., 0], groups.mean(-1), atol=1e-4)


def test_statistics_of_half_precision_do_not_overflow():
    x = (random(1, 4, 70, 40) * 300).half()  # whose squares do
    variance, _ = strips.statistics(strips.Stored(x), 1)
    np.testing.assert_allclose(variance[0, 0, 0], x.double().numpy().var(), rtol=1e-4)


@pytest.mark.parametrize("with_norm", [True, False], ids=["normalised", "as it is"])
@pytest.mark.parametrize("kernel", [1, 3])
@pytest.mark.parametrize("height", [1, 8, 9, 65, 200])
def test_convolved(height, kernel, with_norm):
    norm, conv = layers(8, 12, kernel, padding=kernel // 2)
    x = random(2, 8, height, 11)
    right = fp64(conv)(functional.silu(fp64(norm)(x.double())) if with_norm else x.double())
    assert error(strips.convolved(strips.Stored(x), conv, norm if with_norm else None), right) < 1e-6


def test_convolved_in_bf16_is_normalised_in_fp32():
    """Far from zero, where a bf16 shift would cancel most of what a bf16 factor leaves."""
    norm, conv = layers(8, 12, padding=1)
    x = (random(2, 8, 65, 11) + 30).bfloat16()
    out = strips.convolved(strips.Stored(x), deepcopy(conv).bfloat16(), deepcopy(norm).bfloat16())
    assert error(out, fp64(conv)(functional.silu(fp64(norm)(x.double())))) < 1e-2


@pytest.mark.parametrize("width", [2, 11])
@pytest.mark.parametrize("height", [2, 3, 16, 17, 18, 65, 200])
def test_downsampled(height, width):
    _, conv = layers(8, 12, stride=2)
    x = random(2, 8, height, width)
    assert error(strips.downsampled(x, conv), fp64(conv)(functional.pad(x.double(), (0, 1, 0, 1)))) < 1e-6


def enlarged(x: torch.Tensor, conv: nn.Conv2d) -> torch.Tensor:
    return fp64(conv)(x.double().repeat_interleave(2, 2).repeat_interleave(2, 3))


@settings(deadline=None, max_examples=60)
@given(data=st.data(), height=st.integers(1, 9))
def test_any_rows_of_what_is_upsampled(data, height):
    start = data.draw(st.integers(0, 2 * height - 1))
    end = data.draw(st.integers(start + 1, 2 * height))
    _, conv = layers(4, 6, padding=1)
    x = random(2, 4, height, 5)
    rows = strips.Upsampled(x, conv).rows(start, end)
    assert error(rows, enlarged(x, conv)[:, :, start:end]) < 1e-6


@pytest.mark.parametrize("height", [4, 9, 50])
def test_convolved_from_what_is_upsampled(height):
    (_, first), (norm, second) = layers(4, 8, padding=1), layers(8, 12, padding=1)
    x = random(1, 4, height, 5)
    source = strips.Upsampled(x, first)
    assert source.shape == (1, 8, 2 * height, 10)
    right = fp64(second)(functional.silu(fp64(norm)(enlarged(x, first))))
    assert error(strips.convolved(source, second, norm), right) < 1e-6


def residual_block(cin: int, cout: int):
    """The layers, and the block in fp64 by hand."""
    (norm1, conv1), (norm2, conv2) = layers(cin, cout, padding=1), layers(cout, cout, padding=1)
    shortcut = [layers(cin, cout, 1)[1]] if cin != cout else []

    def right(x: torch.Tensor) -> torch.Tensor:
        hidden = fp64(conv1)(functional.silu(fp64(norm1)(x.double())))
        hidden = fp64(conv2)(functional.silu(fp64(norm2)(hidden)))
        return hidden + (fp64(shortcut[0])(x.double()) if shortcut else x.double())

    return ((norm1, norm2), (conv1, conv2, *shortcut)), right


@pytest.mark.parametrize("height", [1, 9, 65])
def test_residual_without_a_shortcut_takes_its_sources_place(height):
    block, right = residual_block(8, 8)
    x = random(2, 8, height, 11)
    expected = right(x)
    out = strips.residual(strips.Stored(x), *block)
    assert error(out, expected) < 1e-6
    assert out.data_ptr() == x.data_ptr()


@pytest.mark.parametrize("height", [1, 9, 65])
def test_residual_with_a_shortcut_leaves_its_source(height):
    block, right = residual_block(8, 12)
    x = random(2, 8, height, 11)
    before = x.clone()
    assert error(strips.residual(strips.Stored(x), *block), right(x)) < 1e-6
    assert x.equal(before)


@pytest.mark.parametrize("cout", [8, 12], ids=["as it is", "with a shortcut"])
def test_residual_of_what_is_upsampled(cout):
    _, conv = layers(4, 8, padding=1)
    block, right = residual_block(8, cout)
    x = random(1, 4, 33, 5)
    before = x.clone()
    assert error(strips.residual(strips.Upsampled(x, conv), *block), right(enlarged(x, conv))) < 1e-6
    assert x.equal(before)


def test_residual_in_bf16():
    block, right = residual_block(8, 8)
    x = random(1, 8, 65, 40, dtype=torch.bfloat16)
    expected = right(x)
    norms, convs = (tuple(deepcopy(each).bfloat16() for each in part) for part in block)
    assert error(strips.residual(strips.Stored(x), norms, convs), expected) < 1e-2


@pytest.mark.parametrize(("dtype", "least"), [(torch.float32, 60), (torch.bfloat16, 40)], ids=str)
def test_a_picture_in_strips(decoded, dtype, least):
    whole, cut = decoded[dtype]
    assert decibels(cut, whole) > least


def test_half_precision_costs_strips_no_more_than_the_whole(decoded):
    right, _ = decoded[torch.float32]
    whole, cut = decoded[torch.bfloat16]
    assert decibels(cut, right) > decibels(whole, right) - 1


def seam(out: torch.Tensor, right: torch.Tensor) -> bool:
    """Whether they differ more at the borders of the eight strips than elsewhere."""
    rows = (out - right).abs().amax((0, 1, 3))
    border = torch.zeros(384, dtype=torch.bool)
    for first in range(48, 384, 48):
        border[first - 1 : first + 1] = True
    at, elsewhere = float(rows[border].max()), float(rows[~border].max())
    return at > 3 * elsewhere and at > 1e-4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_no_seam(decoded, dtype):
    whole, cut = decoded[dtype]
    assert not seam(cut, whole)


def test_strips_that_do_not_see_their_neighbours_have_seams(decoded):
    whole, cut = decoded[torch.float32]
    conv = nn.Conv2d(3, 3, 3, padding=1).requires_grad_(False)
    apart = torch.cat([conv(strip) for strip in cut.split(48, 2)], 2)
    assert seam(apart, conv(whole))


def test_strips_take_under_six_tenths_of_the_memory(emoji):
    latents = random(1, 4, 48, 48)
    whole = peak(emoji.decoder, latents)
    assert whole > 2 * 4 * 16 * 384**2  # two of its largest maps
    assert peak(decode_in_strips, emoji.decoder, latents) < 0.6 * whole
