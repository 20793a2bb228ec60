"""While a session runs on CUDA no product is rounded to TF32, and what the user had set is set again."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from tightfit.runtime.backends.torch import backend as engine
from tightfit.runtime.backends.torch.tf32 import tf32_off

WAYS = {
    "not at all": lambda: None,
    "products, older": lambda: setattr(torch.backends.cuda.matmul, "allow_tf32", True),
    "high": lambda: torch.set_float32_matmul_precision("high"),
    "medium": lambda: torch.set_float32_matmul_precision("medium"),
    "convolutions off, older": lambda: setattr(torch.backends.cudnn, "allow_tf32", False),
    "products": lambda: setattr(torch.backends.cuda.matmul, "fp32_precision", "tf32"),
    "convolutions off": lambda: setattr(torch.backends.cudnn.conv, "fp32_precision", "ieee"),
}


def state() -> list[Any]:
    """All that torch says of it, some of which cannot be read where both interfaces were used."""

    def read(get: Callable[[], Any]) -> Any:
        try:
            return get()
        except RuntimeError:
            return "mixed"

    cuda, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    older = [lambda: cudnn.allow_tf32, lambda: cuda.allow_tf32, torch.get_float32_matmul_precision]
    newer = [
        cudnn.conv.fp32_precision,
        cudnn.rnn.fp32_precision,
        cuda.fp32_precision,
        torch.backends.mkldnn.matmul.fp32_precision,
    ]
    return [read(get) for get in older] + newer


@pytest.fixture
def flags():
    """As they were when torch was imported, after the test too."""

    def reset() -> None:
        torch.set_float32_matmul_precision("highest")
        torch.backends.cuda.matmul.fp32_precision = torch.backends.mkldnn.matmul.fp32_precision = "none"
        torch.backends.cudnn.allow_tf32 = True

    yield reset()
    reset()


@pytest.mark.skipif(
    not hasattr(torch.backends.cudnn, "conv"), reason="this torch has the older interface alone"
)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.usefixtures("flags")
def test_however_it_was_switched_on(way):
    WAYS[way]()
    before = state()
    with pytest.raises(KeyboardInterrupt), tf32_off(torch.device("cuda")):
        # Kernels of torch's ask so too, and would raise.
        assert torch.backends.cuda.matmul.allow_tf32 is False
        assert "tf32" not in (
            torch.backends.cuda.matmul.fp32_precision,
            torch.backends.cudnn.conv.fp32_precision,
        )
        raise KeyboardInterrupt
    assert state() == before
    with tf32_off(torch.device("cpu")):
        assert state() == before


def test_where_torch_has_the_older_interface_alone(monkeypatch):
    cudnn, matmul = SimpleNamespace(allow_tf32=True), SimpleNamespace(allow_tf32=False)
    monkeypatch.setattr(torch.backends, "cudnn", cudnn)
    monkeypatch.setattr(torch.backends, "cuda", SimpleNamespace(matmul=matmul))
    with tf32_off(torch.device("cuda")):
        assert (cudnn.allow_tf32, matmul.allow_tf32) == (False, False)
    assert (cudnn.allow_tf32, matmul.allow_tf32) == (True, False)


@pytest.mark.parametrize("fails", [False, True])
def test_sessions_switch_it_off(monkeypatch, fails):
    seen = []
    conv = SimpleNamespace(fp32_precision="tf32")
    monkeypatch.setattr(torch.backends.cudnn, "conv", conv, raising=False)

    def run(*_: Any) -> list[torch.Tensor]:
        seen.append(conv.fp32_precision)
        if fails:
            raise ValueError("no")
        return [torch.zeros(1)]

    monkeypatch.setattr(engine.dryrun, "run", run)
    meter: Any = SimpleNamespace(during=lambda _known, _key, call: call())
    session = engine.TorchSession(
        torch.nn.Identity(), lambda *_: (), torch.float32, torch.device("cuda"), meter
    )
    session._sent = None  # nothing can be sent to a device that is not here
    if fails:
        with pytest.raises(ValueError, match="no"):
            session(sample=np.zeros(1))
    else:
        session(sample=np.zeros(1))
    assert seen == ["ieee"]
    assert conv.fp32_precision == "tf32"
