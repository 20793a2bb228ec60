"""Muon beside AdamW, and the average of the weights: what both training scripts share.

Muon (Keller Jordan, 2024; the scale is that of "Muon is Scalable for LLM Training", arXiv 2502.16982)
replaces each matrix gradient by the nearest orthogonal matrix. torch.optim.Muon takes only 2-D parameters and
most of ours are 3x3 convolutions, hence these lines. In a 75 s race on two cores it brought the autoencoder
to 28.0 dB where AdamW reached 20.5 dB (docs/decisions.md).
"""

from __future__ import annotations

import copy

import torch


def orthogonal(matrix: torch.Tensor, steps: int = 5) -> torch.Tensor:
    """The Newton-Schulz iteration of Muon: singular values of `matrix` (rows, columns) driven towards one."""
    a, b, c = 3.4445, -4.7750, 2.0315
    x = matrix.bfloat16()
    x = x / (x.norm() + 1e-7)
    tall = x.shape[0] > x.shape[1]
    x = x.T if tall else x
    for _ in range(steps):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.T if tall else x


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalised; a convolution weight counts as the matrix (out, in * height * width)."""

    def __init__(self, parameters, lr: float, momentum: float = 0.95):
        super().__init__(parameters, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure=None):  # noqa: ARG002  # pyright: ignore[reportIncompatibleMethodOverride]
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is None:
                    continue
                average = self.state[weight].setdefault("momentum", torch.zeros_like(weight))
                average.lerp_(weight.grad, 1 - group["momentum"])
                update = orthogonal(weight.grad.lerp(average, group["momentum"]).flatten(1))
                scale = 0.2 * max(update.shape) ** 0.5
                weight.add_(update.view_as(weight).to(weight.dtype), alpha=-group["lr"] * scale)


class Optimizer:
    """Muon for every hidden matrix, AdamW for embeddings, norms, biases and the thin first and last
    layers."""

    def __init__(self, modules, muon_lr: float, adam_lr: float):
        named = [pair for module in modules for pair in module.named_parameters()]
        matrices = [
            p for n, p in named if p.ndim >= 2 and min(p.shape[:2]) > 8 and "embedding.weight" not in n
        ]
        chosen = {id(p) for p in matrices}
        rest = [p for _, p in named if id(p) not in chosen]
        muon = [Muon(matrices, muon_lr)] if matrices else []  # low ranks are all thin
        adam = torch.optim.AdamW(rest, lr=adam_lr, betas=(0.9, 0.99), weight_decay=0.0, fused=True)
        self.parts = [*muon, adam]
        self.rates = [muon_lr, adam_lr][-len(self.parts) :]

    def step(self, factor: float) -> None:
        """One update at `factor` times the full learning rates; gradients are dropped afterwards."""
        for part, rate in zip(self.parts, self.rates, strict=True):
            for group in part.param_groups:
                group["lr"] = rate * factor
            part.step()
            part.zero_grad()

    def state_dict(self) -> list:
        return [part.state_dict() for part in self.parts]

    def load_state_dict(self, states: list) -> None:
        for part, state in zip(self.parts, states, strict=True):
            part.load_state_dict(state)


class Average:
    """Exponential moving average of a module's parameters, warming up so that early steps are forgotten."""

    def __init__(self, module: torch.nn.Module, decay: float):
        self.module = copy.deepcopy(module).eval().requires_grad_(False)
        self.decay, self.steps = decay, 0

    @torch.no_grad()
    def update(self, module: torch.nn.Module) -> None:
        self.steps += 1
        weight = 1 - min(self.decay, self.steps / (self.steps + 10))
        torch._foreach_lerp_(list(self.module.parameters()), list(module.parameters()), weight)


def schedule(done: float, warm: float = 0.01, decay: float = 0.5) -> float:
    """Learning-rate factor when the fraction `done` of the budget is spent: up, flat, then linearly down to
    zero."""
    return min(1.0, (done + 1e-4) / warm, max(0.0, 1 - done) / decay)
