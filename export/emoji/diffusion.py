"""Train the U-Net and the text encoder of the emoji model: `python -m tightfit.export.emoji.diffusion --help`."""

from __future__ import annotations

import argparse
import random
import time
from pathlib import Path
from typing import Any

import torch
from diffusers import DDIMScheduler, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from transformers import CLIPTextConfig, CLIPTextModel

from . import autoencoder, caption, data, optim

CHANNELS, HEADS, WIDTH = (64, 128, 160), (2, 4, 5), 160


def build_unet() -> Any:
    """SD 1.5's block pattern; 66 % of the weights in 3x3 convolutions, 5 % in 1x1, 29 % in linears (63, 6, 31 there)."""
    kind: Any = UNet2DConditionModel
    return kind(
        sample_size=16,
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


def noise_schedule() -> DDIMScheduler:
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
def sample(model: torch.nn.Module, scheduler, tokens, empty, shape, steps: int = 20, guidance: float = 4.0) -> torch.Tensor:
    """Scaled latents for `tokens` (count, length), each from the same noise; `empty` (1, length) is no prompt."""
    scheduler.set_timesteps(steps)
    x = torch.randn((1, *shape), generator=torch.Generator().manual_seed(0)).to(tokens.device).repeat(len(tokens), 1, 1, 1)
    both = torch.cat([empty.expand(len(tokens), -1), tokens])
    for t in scheduler.timesteps:
        with torch.autocast(tokens.device.type, torch.bfloat16):
            without, given = model(torch.cat([x, x]), t, both).float().chunk(2)
        x = scheduler.step(without + guidance * (given - without), t, x).prev_sample
    return x


def match(generated: torch.Tensor, pictures: torch.Tensor, right: list[int]) -> tuple[float, float]:
    """How often the training picture nearest to a generated one is the right one, and is among the five nearest.

    Both are (count, 3, h, w) with values in 0..255; distance is the mean square over 32x32 area-averaged pixels.
    """

    def small(x):
        return torch.nn.functional.interpolate(x.float(), (32, 32), mode="area").flatten(1)

    nearest = torch.cdist(small(generated), small(pictures)).topk(5, largest=False).indices.cpu()
    hits = nearest == torch.tensor(right)[:, None]
    return hits[:, 0].float().mean().item(), hits.any(1).float().mean().item()


def main() -> None:
    parse = argparse.ArgumentParser(description=__doc__)
    parse.add_argument("work", type=Path, help="folder with autoencoder.pt; checkpoints and log go there too")
    parse.add_argument("--minutes", type=float, default=80, help="training time, this run and those it resumes")
    parse.add_argument("--size", type=int, default=128, help="side of the pictures in pixels")
    parse.add_argument("--batch", type=int, default=64)
    parse.add_argument("--device", default="cpu")
    args = parse.parse_args()

    data.fetch(args.work)
    chosen = data.emoji(args.work)
    pictures = torch.from_numpy(data.pixels(chosen, args.size)).permute(0, 3, 1, 2).contiguous().to(args.device)
    vae = autoencoder.build().to(args.device).eval()
    vae.load_state_dict(torch.load(args.work / "autoencoder.pt", weights_only=True)["average"])
    latents = encode_all(vae, pictures)
    scaling = 1 / latents.std().item()
    latents = latents * scaling

    torch.manual_seed(0)
    rng = random.Random(0)
    tokenizer = caption.tokenizer(chosen, args.work / "tokenizer")
    model = Conditional(build_unet(), build_text_encoder(tokenizer)).to(args.device)
    model.unet.set_attn_processor(AttnProcessor())  # the fused CPU attention took 62 % of a step, backwards mostly
    scheduler = noise_schedule()
    alphas = scheduler.alphas_cumprod.to(args.device)
    snr = alphas / (1 - alphas)
    optimizer = optim.Optimizer([model], muon_lr=4e-3, adam_lr=2e-3)
    average = optim.Average(model, decay=0.999)
    checkpoint, spent, steps = args.work / "diffusion.pt", 0.0, 0
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(state["model"])
        average.module.load_state_dict(state["average"])
        optimizer.load_state_dict(state["optimizer"])
        spent, steps, average.steps = state["spent"], state["steps"], state["steps"]

    def tokens(texts: list[str]) -> torch.Tensor:
        padded = tokenizer(texts, padding="max_length", max_length=caption.LENGTH, truncation=True, return_tensors="pt")
        return padded.input_ids.to(args.device)

    budget, last, report, order, losses = args.minutes * 60, time.monotonic(), spent, [], []
    while spent < budget:
        while len(order) < args.batch:
            order += torch.randperm(len(chosen)).tolist()
        rows, order = order[: args.batch], order[args.batch :]
        x, noise = latents[rows], torch.randn((args.batch, *latents.shape[1:]), device=args.device)
        strata = (torch.arange(args.batch) + torch.rand(args.batch)) / args.batch  # every noise level in every batch
        step = (strata * 1000).long().to(args.device)
        alpha = alphas[step].view(-1, 1, 1, 1)
        noisy = alpha.sqrt() * x + (1 - alpha).sqrt() * noise
        with torch.autocast(args.device, torch.bfloat16):
            predicted = model(noisy, step, tokens([caption.caption(chosen[i], rng) for i in rows]))
        error = (predicted.float() - noise).square().mean((1, 2, 3))
        loss = (error * (snr[step].clamp(max=5) / snr[step])).mean()  # min-SNR-5, arXiv 2303.09556
        loss.backward()
        optimizer.step(optim.schedule(spent / budget))
        average.update(model)
        steps += 1
        losses.append(loss.item())
        spent, last = spent + time.monotonic() - last, time.monotonic()
        if spent - report > 300 or spent >= budget:
            report = spent
            right = list(range(0, len(chosen), 5))
            out = sample(average.module, scheduler, tokens([chosen[i].label for i in right]), tokens([""]), latents.shape[1:])
            with torch.no_grad():
                out = torch.cat([vae.decode(z / scaling).sample for z in out.split(16)])
            drawn = ((out.clamp(-1, 1) + 1) * 127.5).round()
            top1, top5 = match(drawn, pictures, right)
            mean = sum(losses) / len(losses)
            losses.clear()
            line = f"{spent / 60:.1f} min, {steps} steps, loss {mean:.4f}, prompt match {top1:.0%} top-1, {top5:.0%} top-5"
            with (args.work / "diffusion.log").open("a") as log:
                print(line, file=log)
            print(line, flush=True)
            state = {"model": model.state_dict(), "average": average.module.state_dict(), "spent": spent, "steps": steps}
            torch.save(state | {"optimizer": optimizer.state_dict(), "scaling": scaling}, checkpoint)
            last = time.monotonic()


if __name__ == "__main__":
    main()
