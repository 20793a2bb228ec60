"""One training: its clock, its checkpoints, its log and its options, the same for both networks."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from . import data
from .optim import Average, Optimizer, schedule


def options(description: str | None, minutes: float, batch: int) -> argparse.ArgumentParser:
    """What both training commands take."""
    parse = argparse.ArgumentParser(description=description)
    parse.add_argument("work", type=Path, help="folder for the data, checkpoints and log")
    parse.add_argument(
        "--minutes", type=float, default=minutes, help="training time, this run and those it resumes"
    )
    parse.add_argument("--size", type=int, default=128, help="side of the pictures in pixels")
    parse.add_argument("--batch", type=int, default=batch)
    parse.add_argument("--device", default="cpu")
    return parse


def emoji_and_pixels(args: argparse.Namespace) -> tuple[list[data.Emoji], torch.Tensor]:
    """The chosen emoji and their pictures, uint8 (count, 3, size, size), fetched if they are not there
    yet."""
    data.fetch(args.work)
    chosen = data.emoji(args.work)
    return chosen, torch.from_numpy(data.pixels(chosen, args.size)).permute(0, 3, 1, 2).contiguous().to(
        args.device
    )


class Run:
    """Trains `module` for a budget of minutes, resuming from `name`.pt in the work folder if it is there."""

    def __init__(
        self,
        name: str,
        args: argparse.Namespace,
        module: torch.nn.Module,
        optimizer: Optimizer,
        average: Average,
    ) -> None:
        self.module, self.optimizer, self.average = module, optimizer, average
        self.checkpoint, self.log = args.work / f"{name}.pt", args.work / f"{name}.log"
        self.budget, self.spent, self.steps = args.minutes * 60, 0.0, 0
        if self.checkpoint.exists():
            state = load_checkpoint(self.checkpoint, args.device)
            module.load_state_dict(state["model"])
            average.module.load_state_dict(state["average"])
            optimizer.load_state_dict(state["optimizer"])
            self.spent, self.steps, average.steps = state["spent"], state["steps"], state["steps"]
        torch.manual_seed(self.steps)
        self.last, self.reported = time.monotonic(), self.spent

    @property
    def unfinished(self) -> bool:
        return self.spent < self.budget

    def step(self, loss: torch.Tensor) -> None:
        """Backward, one update, and the clock."""
        loss.backward()
        self.optimizer.step(schedule(self.spent / self.budget))
        self.average.update(self.module)
        self.steps += 1
        self.spent, self.last = self.spent + time.monotonic() - self.last, time.monotonic()

    def train(self, loss: Callable[[], torch.Tensor]) -> None:
        """Step by step until the time is over, with the mean loss each minute."""
        losses: list[float] = []
        while self.unfinished:
            value = loss()
            self.step(value)
            losses.append(value.item())
            if self.due(60):
                self.report(f"loss {sum(losses) / len(losses):.4f}")
                losses.clear()

    def due(self, seconds: float) -> bool:
        """Whether it is time for a report: every so many seconds, and at the end."""
        return self.spent - self.reported > seconds or not self.unfinished

    def report(self, line: str, **more: Any) -> None:
        """Print and log `line`, and replace the checkpoint; the time this and its figures took does not
        count."""
        line = f"{self.spent / 60:.1f} min, {self.steps} steps, {line}"
        print(line, flush=True)
        with self.log.open("a") as log:
            print(line, file=log)
        state = {
            "model": self.module.state_dict(),
            "average": self.average.module.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }
        partial = self.checkpoint.with_suffix(".partial")
        torch.save(state | {"spent": self.spent, "steps": self.steps} | more, partial)
        partial.replace(self.checkpoint)
        self.last, self.reported = time.monotonic(), self.spent


def load_checkpoint(file: Path, device: str = "cpu") -> dict[str, Any]:
    """A checkpoint of ours; tensors and plain values only, whatever the file holds."""
    return torch.load(file, map_location=device, weights_only=True)
