"""What is planned from what earlier requests have left known is what is planned anew."""

from __future__ import annotations

import pytest
from tightfit.runtime.machine.hardware import GIB, Hardware
from tightfit.runtime.models.hub import inspect
from tightfit.runtime.planner.choose import plan
from tightfit.runtime.planner.wishes import Wishes
from tightfit.runtime.request import Request

CPU = Hardware("cpu", "a processor", 8 * GIB, 6 * GIB, ("bf16", "fp32"), providers=(), context_bytes=GIB // 2)
GPU = Hardware("cuda", "a card", 8 * GIB, 6 * GIB, ("fp16", "fp32"), providers=(), capability=(7, 5))
REQUESTS = (
    Request("a", width=64, height=64),
    Request("b", width=64, height=64, num_inference_steps=9, scheduler="Heun"),
    Request("a", width=96, height=64, num_images=3),
)


@pytest.mark.parametrize("hardware", [CPU, GPU], ids=lambda hardware: hardware.device)
def test_plans_are_those_of_a_model_of_which_nothing_is_known(shallow_models, hardware):
    folder, wishes = shallow_models["sd1"], Wishes(requests=100, precision="int8", residency="staged")
    known = inspect(folder)
    for request in (*REQUESTS, REQUESTS[0]):
        assert plan(hardware, known, request, wishes) == plan(hardware, inspect(folder), request, wishes)
