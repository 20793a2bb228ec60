"""Calls as CUDA graphs, with torch.cuda's part played by a class that runs again what was recorded: what is
recorded when, what is freed, and the bytes that plans count."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tightfit.runtime.backends.torch.backend import TorchSession
from tightfit.runtime.backends.torch.captured import Captured
from tightfit.runtime.backends.torch.meter import CountingMeter
from tightfit.runtime.conditions.condition import Condition
from tightfit.runtime.conditions.controlnet import Control, ControlNets
from tightfit.runtime.conditions.input_pictures import open_picture
from tightfit.runtime.costs.footprint import peak
from tightfit.runtime.machine.hardware import Hardware
from tightfit.runtime.machine.profiles import profile
from tightfit.runtime.models.hub import inspect
from tightfit.runtime.planner.choose import plan
from tightfit.runtime.planner.wishes import Wishes
from tightfit.runtime.request import Request

REQUEST = Request("a red heart", num_inference_steps=4, width=512, height=512)
ONE_WAY: dict[str, Any] = {"precision": "fp16", "attention": "sdpa", "tiling": "whole", "cfg": "batched"}


class Cuda:
    """Its graphs write what is twice their inputs into the answer that was recorded."""

    def __init__(self, full: bool = False) -> None:
        self.full, self.recording = full, False
        self.recorded, self.calls = 0, 0
        self.last: tuple = ()

    def empty_cache(self) -> None: ...

    def CUDAGraph(self) -> Cuda.Graph:  # noqa: N802  torch's name
        return Cuda.Graph(self)

    class Graph:
        def __init__(self, cuda: Cuda) -> None:
            self.cuda, self.last = cuda, ()

        def replay(self) -> None:
            given, answers = self.last
            for answer in answers:
                answer.copy_(2 * given)

    @contextmanager
    def graph(self, graph: Cuda.Graph, capture_error_mode: str):
        self.recording = True
        try:
            yield
        finally:
            self.recording = False
        graph.last, self.recorded = self.last, self.recorded + 1

    def run(self, tensors):
        """Two answers, as a call that caches steps has."""
        self.calls += 1
        if self.recording and self.full:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 MiB.")
        answers = [2 * tensors["sample"] for _ in range(2)]
        self.last = tensors["sample"], answers
        return answers


def given(value: float, rows: int = 2, side: int = 4) -> dict[str, torch.Tensor]:
    return {"sample": torch.full((rows, 4, side, side), value), "timestep": torch.tensor(value)}


def test_the_second_call_is_recorded_and_the_others_replayed():
    cuda = Cuda()
    graphs = Captured(cuda)
    answers = [graphs.call(given(value), cuda.run, 1) for value in (1.0, 2.0, 3.0)]
    assert (cuda.calls, cuda.recorded) == (2, 1)
    assert [float(kept.mean()) for _, kept in answers] == [2.0, 4.0, 6.0]  # as answers that stay do
    assert float(answers[1][0].mean()) == 6.0  # what does not stay is written over
    graphs.call(given(4.0, rows=1), cuda.run, 1)
    graphs.call(given(5.0, rows=1), cuda.run, 1)
    graphs.call(given(6.0), cuda.run, 1)
    assert (cuda.calls, cuda.recorded) == (4, 2)  # one for each count of rows
    graphs.call(given(7.0, side=8), cuda.run, 1)
    graphs.call(given(8.0), cuda.run, 1)
    assert (cuda.calls, cuda.recorded) == (6, 2)  # those of another size are freed
    graphs.call(given(9.0), cuda.run, 1, "another run")
    assert (cuda.calls, cuda.recorded) == (7, 2)
    graphs.clear()
    graphs.call(given(9.0), cuda.run, 1)
    assert (cuda.calls, cuda.recorded) == (8, 2)


def test_without_room_for_a_graph_calls_go_on_as_they_are():
    cuda = Cuda(full=True)
    session = TorchSession(
        torch.nn.Identity(), lambda _, **tensors: cuda.run(tensors), torch.float32, torch.device("cpu"),
        CountingMeter("cpu"),
    )  # fmt: skip
    session.captured = Captured(cuda)
    arrays = {name: tensor.numpy() for name, tensor in given(3.0).items()}
    for _ in range(4):
        assert np.all(session(**arrays)[0] == 6.0)
    assert cuda.recorded == 0
    assert cuda.calls == 5  # one was tried
    (notice,) = session.notices
    assert notice.startswith("calls run without CUDA graphs (CUDA out of memory")


def test_a_plan_counts_what_graphs_keep(sd1):
    """In their own stage, and in others where the denoiser stays loaded; for each kind of call."""
    card, spec = profile("rtx-3060-12gb"), inspect(sd1)

    def stages(residency: str, **wishes):
        of = Request(**{**vars(REQUEST), "guidance_end": wishes.pop("guidance_end", 1.0)})
        best = plan(card, spec, of, Wishes(residency=residency, **wishes, **ONE_WAY))[0]
        return best, best.predicted.stages

    plain, before = stages("resident")
    graphed, after = stages("resident", cuda_graphs=True)
    assert "CUDA graphs" in graphed.summary()
    assert "CUDA graphs" not in plain.summary()
    call_bytes = before["denoise"] - held(card, spec, plain)
    for stage in ("denoise", "decode"):
        more = after[stage] - before[stage]
        expected = 0 if stage == "denoise" else call_bytes
        assert more == pytest.approx(expected, abs=32 * 2**20)
    assert stages("staged", cuda_graphs=True)[1]["decode"] == stages("staged")[1]["decode"]
    window, with_single_rows = stages("resident", cuda_graphs=True, guidance_end=0.5)
    assert window.predicted.stages["decode"] > after["decode"]
    assert with_single_rows["denoise"] > after["denoise"]


def held(card: Hardware, spec, best) -> int:
    """Of all that is loaded while the denoiser runs."""
    from tightfit.runtime.backends.torch.dryrun import footprint
    from tightfit.runtime.costs.footprint import NO_CALL
    from tightfit.runtime.models.families.family import Extent

    parts = [
        footprint(spec, spec.components[n], p, card, Extent(2, 512, 512)) for n, p in best.placements.items()
    ]
    nothing = replace(parts[0], held=(), trace=NO_CALL, scratch=())
    return peak("cuda", [*card.workspaces, *(count for part in parts for count in part.held)], nothing)


@pytest.mark.parametrize(
    ("machine", "asked", "why"),
    [
        ("rtx-3060-12gb", {"residency": "streamed"}, "copied by the host"),
        ("cpu", {"precision": "fp32"}, "CUDA has graphs, cpu has none"),
    ],
)
def test_what_has_no_graphs_is_refused(sd1, machine, asked, why):
    card = Hardware("cpu", "a machine", 2**34, 2**34, ("fp32",)) if machine == "cpu" else profile(machine)
    plans = plan(card, inspect(sd1), REQUEST, Wishes(cuda_graphs=True, **asked))
    assert not any(each.fits for each in plans)
    assert why in plans[0].cause


class Flickering(Condition):
    def varies(self, job) -> bool:
        return job.num_inference_steps == REQUEST.num_inference_steps


def test_inputs_that_some_calls_have_are_refused(sd1):
    """Each of both kinds would have a graph, and a plan counts one."""
    card, of = profile("rtx-3060-12gb"), replace(REQUEST, conditions=(Flickering(),))
    plans = plan(card, inspect(sd1), of, Wishes(cuda_graphs=True, residency="resident", **ONE_WAY))
    assert not any(each.fits for each in plans)
    assert "for both kinds of calls: leave out --cuda-graphs" in plans[0].cause


@pytest.mark.parametrize(
    ("how", "varies"),
    [({}, False), ({"start": 0.1}, True), ({"end": 0.9}, True), ({"mode": "prompt"}, False),
     ({"mode": "control"}, True)],
)  # fmt: skip
def test_controls_that_act_in_some_calls(sd1, how, varies):
    job: Any = SimpleNamespace(scheduled_calls=10, spec=inspect(sd1))
    picture = open_picture(Image.new("RGB", (64, 64)))
    controls = Control(picture), Control(picture, **how)
    assert ControlNets(controls).varies(job) == varies
