"""Train the U-Net and the text encoder of the emoji model: `python -m tightfit.export.emoji.diffusion
--help`."""

from __future__ import annotations

import random
from typing import Any

import torch
from diffusers import DDIMScheduler, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from transformers import CLIPTextConfig, CLIPTextModel

from . import autoencoder, caption, optim
from .run import Run, emoji_and_pixels, load_checkpoint, options

CHANNELS, HEADS, WIDTH = (64, 128, 160), (2, 4, 5), 160
GUIDANCE = 3.0  # SD's 7.5 oversaturates a model this small


def build_unet(side: int = 16) -> Any:
    """SD 1.5's block pattern; 64 % of the weights in 3x3 convolutions, 5 % in 1x1, 31 % in linears (63, 6, 31
    there)."""
    kind: Any = UNet2DConditionModel
    return kind(
        sample_size=side,
        block_out_channels=CHANNELS,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=1,
        cross_attention_dim=WIDTH,
        attention_head_dim=HEADS,
    )


def build_text_encoder(tokenizer: Any) -> CLIPTextModel:
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=WIDTH,
            intermediate_size=4 * WIDTH,
            num_hidden_layers=3,
            num_attention_heads=5,
            max_position_embeddings=caption.LENGTH,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def noise_schedule() -> Any:
    """SD 1.5's: scaled-linear, 0.00085 to 0.012 in 1000 steps, epsilon prediction."""
    return DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear",
        clip_sample=False, set_alpha_to_one=False, steps_offset=1,
    )  # fmt: skip


class Conditional(torch.nn.Module):
    """The two trained parts as one module, so that they are averaged and saved together."""

    def __init__(self, unet: Any, text_encoder: CLIPTextModel):
        super().__init__()
        self.unet, self.text_encoder = unet, text_encoder

    def forward(self, noisy, step, tokens):
        return self.unet(noisy, step, self.text_encoder(tokens).last_hidden_state).sample


@torch.no_grad()
def encode_all(vae: Any, pictures: torch.Tensor) -> torch.Tensor:
    """The latents' means, (count, 4, h/8, w/8), unscaled."""
    return torch.cat([vae.encode(b.float() / 127.5 - 1).latent_dist.mode() for b in pictures.split(16)])


@torch.no_grad()
def sample(
    model: torch.nn.Module, tokens: torch.Tensor, empty: torch.Tensor, shape: torch.Size
) -> torch.Tensor:
    """Scaled latents for `tokens` (count, length) in 20 steps of DDIM, each from the same noise of `shape`
    (c, h, w).

    `empty` (1, length) is no prompt; the guidance scale is GUIDANCE.
    """
    scheduler = noise_schedule()
    scheduler.set_timesteps(20)
    x = (
        torch.randn((1, *shape), generator=torch.Generator().manual_seed(0))
        .to(tokens.device)
        .repeat(len(tokens), 1, 1, 1)
    )
    both = torch.cat([empty.expand(len(tokens), -1), tokens])
    for t in scheduler.timesteps:
        with torch.autocast(tokens.device.type, torch.bfloat16):
            without, given = model(torch.cat([x, x]), t, both).float().chunk(2)
        x = scheduler.step(without + GUIDANCE * (given - without), t, x).prev_sample
    return x


def match(generated: torch.Tensor, pictures: torch.Tensor, right: list[int]) -> tuple[float, float]:
    """How often the training picture nearest to a generated one is the right one, and is among the five
    nearest.

    Both are (count, 3, h, w) with values in 0..255; distance is the mean square over 32x32 area-averaged
    pixels.
    """

    def small(x):
        return torch.nn.functional.interpolate(x.float(), (32, 32), mode="area").flatten(1)

    nearest = torch.cdist(small(generated), small(pictures)).topk(5, largest=False).indices.cpu()
    hits = nearest == torch.tensor(right)[:, None]
    return hits[:, 0].float().mean().item(), hits.any(1).float().mean().item()


def min_snr_loss(
    model: torch.nn.Module, x: torch.Tensor, tokens: torch.Tensor, alphas: torch.Tensor
) -> torch.Tensor:
    """The error of the predicted noise at one noise level a latent, weighted by min-SNR-5 (arXiv
    2303.09556)."""
    noise = torch.randn_like(x)
    strata = (torch.arange(len(x)) + torch.rand(len(x))) / len(x)  # every noise level in every batch
    step = (strata * len(alphas)).long().to(x.device)
    alpha = alphas[step].view(-1, 1, 1, 1)
    with torch.autocast(x.device.type, torch.bfloat16):
        predicted = model(alpha.sqrt() * x + (1 - alpha).sqrt() * noise, step, tokens)
    snr = alphas[step] / (1 - alphas[step])
    return ((predicted.float() - noise).square().mean((1, 2, 3)) * (snr.clamp(max=5) / snr)).mean()


def main() -> None:
    args = options(__doc__, minutes=60, batch=64).parse_args()
    chosen, pictures = emoji_and_pixels(args)
    vae = autoencoder.build().to(args.device).eval()
    vae.load_state_dict(load_checkpoint(args.work / "autoencoder.pt", args.device)["average"])
    latents = encode_all(vae, pictures)
    scaling = 1 / latents.std().item()
    tokenizer = caption.tokenizer(chosen, args.work / "tokenizer")

    def tokens(texts: list[str]) -> torch.Tensor:
        return caption.ids(tokenizer, texts).to(args.device)

    def prompt_match(model: torch.nn.Module) -> tuple[float, float]:
        right = list(range(0, len(chosen), 5))
        drawn = sample(model, tokens([chosen[i].label for i in right]), tokens([""]), latents.shape[1:])
        with torch.no_grad():
            drawn = torch.cat([vae.decode(z / scaling).sample for z in drawn.split(16)])
        return match(((drawn.clamp(-1, 1) + 1) * 127.5).round(), pictures, right)

    torch.manual_seed(0)
    model = Conditional(build_unet(latents.shape[-1]), build_text_encoder(tokenizer)).to(args.device)
    # The fused CPU attention took 62 % of a step, backwards mostly.
    model.unet.set_attn_processor(AttnProcessor())
    optimizer = optim.Optimizer([model], muon_lr=4e-3, adam_lr=2e-3)
    run = Run("diffusion", args, model, optimizer, optim.Average(model, decay=0.999))
    alphas, rng = noise_schedule().alphas_cumprod.to(args.device), random.Random(run.steps)
    order: list[int] = []
    losses: list[float] = []
    while run.unfinished:
        while len(order) < args.batch:
            order += torch.randperm(len(chosen)).tolist()
        rows, order = order[: args.batch], order[args.batch :]
        texts = [caption.caption(chosen[i], rng) for i in rows]
        loss = min_snr_loss(model, latents[rows] * scaling, tokens(texts), alphas)
        run.step(loss)
        losses.append(loss.item())
        if run.due(300):
            top1, top5 = prompt_match(run.average.module)
            mean = sum(losses) / len(losses)
            losses.clear()
            run.report(
                f"loss {mean:.4f}, prompt match {top1:.0%} top-1, {top5:.0%} top-5",
                scaling=scaling,
                side=latents.shape[-1],
            )


if __name__ == "__main__":
    main()
