"""LoRAs that an export is written with."""

from __future__ import annotations

import json

import pytest
import tightfit
import torch
from safetensors.torch import load_file, save_file
from tightfit.export.export import export_model
from tightfit.kernels.formats import FORMATS, dequantise
from tightfit.runtime.adapters import vae
from tightfit.runtime.errors import TightfitError

LAYERS = {
    "unet": "mid_block.attentions.0.transformer_blocks.0.attn2.to_k",
    "text_encoder": "text_model.encoder.layers.1.self_attn.v_proj",
}
PLAIN = "conv_in"  # stays in 16 bits


def test_weights_are_rounded_with_their_lora(sd1, tmp_path):
    draw, tensors, wanted = torch.Generator().manual_seed(3), {}, {}
    for part, layer in (*LAYERS.items(), ("unet", PLAIN)):
        (file,) = (sd1 / part).glob("*.safetensors")
        weight = load_file(file)[f"{layer}.weight"].double()
        up = 0.3 * torch.randn((len(weight), 2, *[1] * (weight.dim() - 2)), generator=draw)
        down = 0.1 * torch.randn((2, *weight.shape[1:]), generator=draw)
        prefix = "lora_unet_" if part == "unet" else "lora_te_"
        key = prefix + layer.replace(".", "_")
        tensors |= {f"{key}.lora_up.weight": up, f"{key}.lora_down.weight": down}
        tensors[f"{key}.alpha"] = torch.tensor(1.0)
        product = up.double().flatten(1) @ down.double().flatten(1)
        wanted[part, layer] = weight + 0.8 * 0.5 * product.view(weight.shape)
    save_file(tensors, tmp_path / "ink.safetensors")
    lora = tightfit.read_adapter(tmp_path / "ink.safetensors", 0.8)
    out = export_model(sd1, tmp_path / "baked", "int8", adapters=(lora,))
    manifest = json.loads((out / "tightfit.json").read_text())
    assert manifest["adapters"] == {"lora": [lora.name]}
    for (part, layer), values in wanted.items():
        (file,) = (out / part).glob("*.safetensors")
        stored = load_file(file)
        form = manifest["components"][part]["formats"].get(layer)
        if form is None:
            assert torch.allclose(stored[f"{layer}.weight"].double(), values, rtol=2**-10, atol=1e-7)
            continue
        parts = {name: stored[f"{layer}.{name}"] for name in FORMATS[form].parts(values.shape)}
        rounded = dequantise(parts, FORMATS[form], values.shape).double()
        assert (rounded - values).abs().max() <= values.abs().max() / 127  # a step, at the widest
    with pytest.raises(TightfitError, match="no weight is rounded twice"):
        export_model(out, tmp_path / "again", "int8", to="onnx", adapters=(lora,))
    with pytest.raises(
        TightfitError, match=r"vae .* is not of the weights .* by --vae when the export paints"
    ):
        export_model(sd1, tmp_path / "vae", "int8", adapters=(vae.written(str(sd1 / "vae")),))
