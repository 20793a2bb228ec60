"""Packed layers answer as plain ones do, take the bytes that are said, and are packed once."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.models.activations import GEGLU
from safetensors.torch import save_file
from tightfit.kernels import onednn
from tightfit.runtime.adapters.lora import Lora
from tightfit.runtime.backends.torch import networks, packed
from tightfit.runtime.backends.torch.backend import TorchBackend
from tightfit.runtime.backends.torch.cpu_kernels import own_bytes
from tightfit.runtime.machine.hardware import Hardware
from tightfit.runtime.models.hub import inspect
from tightfit.runtime.pipeline import Pipeline
from tightfit.runtime.placement import Placement
from tightfit.runtime.planner.choose import plan
from tightfit.runtime.planner.wishes import Wishes
from tightfit.runtime.request import Request
from torch import nn

DTYPES = [dtype for dtype in (torch.float32, torch.bfloat16) if onednn.multiplies(dtype)]
TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 1e-2}
LAYERS = {
    "3x3": (lambda: nn.Conv2d(32, 64, 3, padding=1), (2, 32, 10, 6)),
    "3x3, every other": (lambda: nn.Conv2d(64, 128, 3, stride=2, padding=1), (1, 64, 16, 16)),
    "1x1": (lambda: nn.Conv2d(96, 64, 1), (2, 96, 8, 8)),
    "1x1 of few pixels": (lambda: nn.Conv2d(96, 64, 1), (2, 96, 4, 4)),
    "linear": (lambda: nn.Linear(64, 192), (2, 33, 64)),
    "linear without a bias": (lambda: nn.Linear(32, 64, bias=False), (77, 32)),
    "gate": (lambda: GEGLU(64, 128), (2, 33, 64)),
}
# What oneDNN takes at most for AMX's tiles.
_TILES = 5 * 2**19 if torch.cpu._is_amx_tile_supported() else 0

pytestmark = pytest.mark.skipif(not DTYPES, reason="torch has no oneDNN for this processor")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", LAYERS)
@torch.inference_mode()
def test_answers(kind, dtype):
    """Against the same layer in fp64."""
    torch.manual_seed(1)
    make, shape = LAYERS[kind]
    network, x = nn.Sequential(make()).to(dtype), torch.randn(shape).to(dtype)
    right = network.double()(x.double())
    packed.pack(network.to(dtype))
    assert len(packed.packed_layers(network)) == 1
    out = network(x)
    assert out.dtype == dtype
    assert (out - right).norm() < TOLERANCES[dtype] * right.norm()
    assert out.ndim == 3 or out.ndim == 2 or out.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("shape", "stride"), [((320, 320, 3, 3), 1), ((640, 320, 3, 3), 2), ((320, 640, 1, 1), 1)]
)
def test_a_convolution_packs_nothing_again(allocated, shape, stride, dtype):
    """It takes what its formula says; for a small map oneDNN may want the weight in another order."""
    out_channels, channels, side, _ = shape
    network = nn.Sequential(nn.Conv2d(channels, out_channels, side, stride, side // 2)).to(dtype)
    network.requires_grad_(False)
    plain = network[0].weight.nbytes
    packed.pack(network)
    layer = network[0]
    assert torch.ops.mkldnn._nbytes(layer.weight) == pytest.approx(plain, rel=0.06)
    for size in (8, 24, 64):
        x = torch.randn(2, channels, size, size).to(dtype).contiguous(memory_format=torch.channels_last)
        how = layer.padding, layer.stride, layer.dilation, layer.groups
        out = layer(x)
        formula = own_bytes(onednn.CONVOLUTION, (x, layer.weight, layer.bias, *how), out)
        beside = allocated(lambda x=x: layer(x)) - out.nbytes - formula
        assert abs(beside) <= 0.02 * out.nbytes + (plain if size < 64 else 0) + _TILES


@pytest.mark.skipif(torch.bfloat16 not in DTYPES, reason="torch has no oneDNN for bf16 here")
def test_another_adapter(sd1, tmp_path):
    """A session that stays gives the answers of one that is loaded afresh, and holds as much."""
    way = Placement("torch", "bf16", "bf16", "resident", "sdpa", "whole")
    layers = (
        "down_blocks.1.resnets.0.conv1",
        "down_blocks.0.attentions.0.transformer_blocks.0.ff.net.0.proj",
    )
    spec = inspect(str(sd1))
    like = networks.build(spec.denoiser, way, "cpu")
    assert all(isinstance(like.get_submodule(path), packed.Packed) for path in layers)

    def adapted(value: float):
        shapes = {path: spec.denoiser.tensors[f"{path}.weight"].shape for path in layers}
        file = tmp_path / f"{value}.safetensors"
        save_file({f"unet.{path}.diff": torch.full(shape, value) for path, shape in shapes.items()}, file)
        return Lora.read(file).apply(spec).denoiser

    arrays = {
        name: torch.ones(shape).numpy() for name, shape in spec.inputs(spec.denoiser, 1, 64, 64).items()
    }
    stays, fresh = TorchBackend("cpu"), TorchBackend("cpu")
    session = stays.load(adapted(0.1), way)
    first = session(**arrays)[0]
    assert stays.adapt(session, adapted(-0.2), way)
    assert stays.meter.held() == fresh.load(spec.denoiser, way)._held
    second = fresh.load(adapted(-0.2), way)(**arrays)[0]
    assert (session(**arrays)[0] == second).all()
    assert (first != second).any()


@pytest.mark.skipif(torch.bfloat16 not in DTYPES, reason="torch has no oneDNN for bf16 here")
def test_what_is_read_again_and_again_stays_plain(sd1):
    """Streamed weights, quantised ones, and those of networks that are called once; and fp32."""
    spec, streamed = inspect(str(sd1)), Placement("torch", "bf16", "bf16", "streamed", "sdpa", "whole")
    quantised = Placement("torch", "int8", "bf16", "resident", "sdpa", "whole")
    staged = Placement("torch", "bf16", "bf16", "staged", "sdpa", "whole")
    exact = Placement("torch", "fp32", "fp32", "staged", "sdpa", "whole")
    plain = [("vae_decoder", staged), ("text_encoder", staged)]
    for name, way in [("unet", one) for one in (streamed, quantised, exact)] + plain:
        assert not packed.packed_layers(networks.build(spec.components[name], way, "cpu"))
    assert packed.packed_layers(networks.build(spec.denoiser, staged, "cpu"))


@pytest.mark.skipif(torch.float32 not in DTYPES, reason="torch has no oneDNN for this processor")
def test_fp32_is_packed_where_pictures_may_differ(sd1):
    """As `prefer` allows and where it is faster: diffusers' U-Net in fp64, in the bytes that were
    predicted."""
    spec, request = inspect(str(sd1)), Request("a", width=64, height=64, num_inference_steps=1, seed=0)
    cpu = Hardware.detect("cpu")
    # packing takes longer than one step of so small a model gains
    rates, starts = {**cpu.rates, "fp32/packed": 9 * cpu.rates["fp32"]}, {**cpu.starts, "pack": 0.0}
    cpu = replace(cpu, rates=rates, starts=starts)
    wishes = Wishes(precision="fp32", residency="staged", attention="sdpa", tiling="whole", cfg="batched")
    exact, best = (plan(cpu, spec, request, replace(wishes, prefer=kind))[0] for kind in ("quality", "speed"))
    assert [name for name, placement in best.placements.items() if placement.packed] == ["unet"]
    assert best.predicted.seconds < exact.predicted.seconds
    assert 90 <= best.predicted.psnr < exact.predicted.psnr
    assert not exact.denoiser.packed
    slow = replace(cpu, rates=cpu.rates | {"fp32/packed": cpu.rates["fp32"] / 9})
    assert not plan(slow, spec, request, replace(wishes, prefer="speed"))[0].denoiser.packed

    with Pipeline(spec, cpu, plan=best) as pipe:
        stage = pipe.generate(request).stages["denoise"]
    assert stage.peak_bytes == pytest.approx(best.predicted.stages["denoise"], rel=0.05)
    session = TorchBackend("cpu").load(spec.denoiser, best.denoiser)
    assert session.module is not None
    assert packed.packed_layers(session.module)
    shapes = spec.inputs(spec.denoiser, 2, 64, 64)
    arrays = {name: torch.randn(shape) for name, shape in shapes.items()} | {"timestep": torch.tensor(500.0)}
    (out,) = session(**{name: array.numpy() for name, array in arrays.items()})
    unet = UNet2DConditionModel.from_pretrained(sd1 / "unet").double()
    with torch.no_grad():
        right = unet(*(arrays[name].double() for name in ("sample", "timestep", "hidden"))).sample
    assert (torch.from_numpy(out) - right).norm() < 1e-5 * right.norm()
