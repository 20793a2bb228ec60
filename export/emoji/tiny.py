"""Train a tiny decoder for the emoji model's latents: `python -m tightfit.export.emoji.tiny --help`.

It is the decoder of diffusers' AutoencoderTiny (TAESD). It learns the pictures, in 3D and flat, from the
latents that the built-in model's encoder gives them, with noise, as painted latents are never quite encoded
ones.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderTiny
from safetensors.torch import save_file

from ..folder import appearing
from . import built_in, data, flat, optim
from .run import Run, options

# SD's 64 channels would take three times as long as the emoji model's own decoder, which has 16 at full size.
WIDTH, BLOCKS = 32, (4, 4, 2, 0)
NOISE = 0.05  # of latents whose deviation is 1


def build() -> Any:
    """16x16x4 scaled latents to 128x128x3. The encoder stays untrained, and is not written."""
    kind: Any = AutoencoderTiny
    return kind(
        encoder_block_out_channels=(8,) * 4,
        num_encoder_blocks=(1,) * 4,
        decoder_block_out_channels=(WIDTH,) * 4,
        num_decoder_blocks=BLOCKS,
    )


@torch.no_grad()
def psnr(decoder: Any, latents: torch.Tensor, pictures: torch.Tensor) -> float:
    """Mean over pictures (count, 3, h, w; uint8) of the decibels of decoder(latents), as rounded to 8
    bits."""
    values = []
    for z, batch in zip(latents.split(16), pictures.split(16), strict=True):
        decoded = ((decoder(z).clamp(-1, 1) + 1) * 127.5).round()
        values.append(-10 * ((decoded - batch.float()) / 255).square().mean((1, 2, 3)).log10())
    return torch.cat(values).mean().item()


def write(whole: Any, folder: Path) -> None:
    """The config and the decoder in fp16, as diffusers names them; replaces `folder`."""
    weights = {
        f"decoder.{name}": weight.half().contiguous() for name, weight in whole.decoder.state_dict().items()
    }
    with appearing(folder) as partial:
        whole.save_config(partial)
        save_file(weights, partial / "diffusion_pytorch_model.safetensors", {"format": "pt"})
        shutil.rmtree(folder, ignore_errors=True)


def main() -> None:
    parse = options(__doc__, minutes=12, batch=8)
    parse.add_argument("folder", type=Path, help="replaced by the decoder, as diffusers writes one")
    args = parse.parse_args()
    flat.fetch(args.work)
    chosen = [*data.emoji(args.work), *flat.emoji(args.work)]
    pictures, latents = built_in.pictures_and_latents(chosen, args.size)
    torch.manual_seed(0)
    whole = build()
    model = whole.decoder
    run = Run("tiny", args, model, optim.Optimizer([model], 5e-3, 1e-3), optim.Average(model, decay=0.998))
    while run.unfinished:
        rows = torch.randint(len(pictures), (args.batch,))
        z = latents[rows]
        with torch.autocast("cpu", torch.bfloat16):
            y = model(z + NOISE * torch.randn_like(z))
        run.step((y.float() - (pictures[rows].float() / 127.5 - 1)).square().mean())
        if run.due(60):
            run.report(f"{psnr(run.average.module, latents[::16], pictures[::16]):.2f} dB")
    model.load_state_dict(run.average.module.state_dict())
    print(f"all {len(pictures)} pictures: {psnr(model, latents, pictures):.2f} dB")
    write(whole, args.folder)


if __name__ == "__main__":
    main()
