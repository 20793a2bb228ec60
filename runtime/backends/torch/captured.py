"""Calls of a network as CUDA graphs: what a call launches is recorded once, and launched at once from then
on. Only for plans that ask for it."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from typing import Any, NamedTuple

import torch

from ...errors import first_line

Tensors = Mapping[str, torch.Tensor]
Run = Callable[[Tensors], list[torch.Tensor]]


class _Graph(NamedTuple):
    """What was recorded, the inputs that it reads, and the answers that it writes anew each time."""

    graph: Any
    inputs: Tensors
    answers: list[torch.Tensor]

    def replay(self, tensors: Tensors, stays: int | None) -> list[torch.Tensor]:
        for name, tensor in tensors.items():
            self.inputs[name].copy_(tensor)
        self.graph.replay()
        # What stays on the device is read after the next call, which writes over it.
        count = len(self.answers) if stays is None else stays
        return [*self.answers[:count], *(answer.clone() for answer in self.answers[count:])]


class Captured:
    """The graphs of one session: one for each set of names and shapes of tensors, of one size of picture.

    A graph keeps the memory of a call for itself. The first call of a kind runs as it is: it chooses kernels,
    and takes what libraries work with, which must not be recorded. The second is recorded.
    """

    def __init__(self, cuda: Any = torch.cuda) -> None:
        """`cuda` is torch.cuda, or what a test has in its place."""
        self.notice = ""  # why none is recorded any more
        self._cuda = cuda
        self._graphs: dict[Any, _Graph | None] = {}

    def call(
        self, tensors: Tensors, run: Run, stays: int | None = None, kind: Hashable = None
    ) -> list[torch.Tensor]:
        """What `run` answers of tensors that are on the device, until the next call; answers from number
        `stays` on for longer. `kind`: of what `run` does."""
        key = kind, tuple((name, tensor.shape, tensor.dtype) for name, tensor in tensors.items())
        self._make_way(tensors)
        if self.notice or key not in self._graphs:
            self._graphs.setdefault(key, None)
            return run(tensors)
        graph = self._graphs[key] = self._graphs[key] or self._captured(tensors, run)
        return graph.replay(tensors, stays) if graph else run(tensors)

    def clear(self) -> None:
        """Free the graphs, as the weights that they read are about to go, or to be others."""
        self._graphs.clear()

    def _make_way(self, tensors: Tensors) -> None:
        """Free the graphs if they are of another size of picture, or length of text: in rows alone they may
        differ, as calls of a batch and of one branch do."""
        sizes = {name: tensor.shape[1:] for name, tensor in tensors.items()}
        for _, shapes in self._graphs:
            if any(sizes.get(name, shape[1:]) != shape[1:] for name, shape, _ in shapes):
                self.clear()
                self._cuda.empty_cache()  # a graph's memory is its own: another's is beside it
                return

    def _captured(self, tensors: Tensors, run: Run) -> _Graph | None:
        """A graph of the call; None, with none kept, where it cannot be recorded."""
        self._cuda.empty_cache()  # a graph has memory of its own, beside what the call before has left
        try:
            inputs = {name: tensor.clone() for name, tensor in tensors.items()}
            # What other threads do on the device meanwhile is theirs.
            with self._cuda.graph(graph := self._cuda.CUDAGraph(), capture_error_mode="thread_local"):
                answers = run(inputs)
            return _Graph(graph, inputs, answers)
        except (RuntimeError, MemoryError) as error:  # torch.OutOfMemoryError is one
            # Ending the capture may have failed after, and hide what was first.
            cause = error.__context__ if isinstance(error.__context__, RuntimeError) else error
            self.notice = f"calls run without CUDA graphs ({first_line(cause)})"
        self.clear()
        self._cuda.empty_cache()
        return None
