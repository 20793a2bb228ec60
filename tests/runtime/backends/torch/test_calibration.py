"""What calibration divides by."""

from __future__ import annotations

import torch
from tightfit.runtime.backends.torch import calibration


def test_seconds_of_an_operator_are_those_of_ten_divided(monkeypatch):
    """Two group norms, SiLUs, convolutions, layer norms and linear layers, as a dry run counts them."""
    monkeypatch.setattr(calibration, "_fastest", lambda *_: 5e-4)
    with torch.inference_mode():
        assert calibration.operator_seconds(torch.device("cpu"), torch.float32) == 5e-5
