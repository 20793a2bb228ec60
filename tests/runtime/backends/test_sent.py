import numpy as np
import torch
from tightfit.runtime.backends.sent import Sent
from tightfit.runtime.backends.torch import backend as torch_backend
from tightfit.runtime.models.hub import inspect
from tightfit.runtime.placement import Placement

WHOLE = Placement("torch", "fp32", "fp32", "resident", "sdpa", "whole")


def test_the_same_array_is_sent_once_and_another_each_time():
    sent, count = Sent(), []
    array, other = np.zeros(3), np.zeros(3)

    def send():
        count.append(1)
        return len(count)

    assert [sent.get("a", array, send), sent.get("a", array, send)] == [1, 1]
    assert sent.get("a", other, send) == 2  # equal, but another
    assert sent.get("b", other, send) == 3
    sent.clear()
    assert sent.get("a", other, send) == 4


def test_a_torch_session_sends_what_stays_the_same_once(sd1, monkeypatch):
    """As on a GPU; its answers are those of a session that sends all each time."""
    spec = inspect(str(sd1))
    backend = torch_backend.TorchBackend("cpu")
    plain, keeping = backend.load(spec.denoiser, WHOLE), backend.load(spec.denoiser, WHOLE)
    keeping._sent = Sent()
    shapes, moves = spec.inputs(spec.denoiser, 2, *spec.native_size), []
    draw = np.random.default_rng(0)
    arrays = {name: draw.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    move = torch_backend.dryrun.on_device
    monkeypatch.setattr(
        torch_backend.dryrun,
        "on_device",
        lambda tensor, *how: moves.append(tensor.shape) or move(tensor, *how),
    )
    for step in range(3):
        arrays["sample"] = arrays["sample"] + step
        arrays["timestep"] = np.array(step, np.float32)
        moves.clear()
        (kept,) = keeping(**arrays)
        hidden = moves.count(torch.Size(shapes["hidden"]))
        assert np.array_equal(kept, plain(**arrays)[0])
        assert hidden == (2 if step == 0 else 1)  # `run` asks for each once more, which costs nothing there
