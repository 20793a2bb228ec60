"""What calibration divides by."""

from __future__ import annotations

import pytest
import torch
from tightfit.runtime.backends.torch import calibration, firsts


def test_seconds_of_an_operator_are_those_of_ten_divided(monkeypatch):
    """Two group norms, SiLUs, convolutions, layer norms and linear layers, as a dry run counts them."""
    monkeypatch.setattr(calibration, "_fastest", lambda *_: 5e-4)
    with torch.inference_mode():
        assert calibration.operator_seconds(torch.device("cpu"), torch.float32) == 5e-5


def test_what_makes_a_product_ready_is_what_its_first_call_takes_more(monkeypatch):
    """Convolutions 3 s more and linear layers 1 s, of as many operations each."""
    seconds = iter([*(4.0, 2.0, 1.0, 3.0) * 2, *(2.0, 1.0, 1.0, 1.0) * 2])
    monkeypatch.setattr(firsts, "_seconds", lambda _: next(seconds))
    monkeypatch.setattr(firsts, "_MAPS", ((8, 2),) * 2)
    monkeypatch.setattr(firsts, "_LINEARS", ((36, 8, 16),) * 2)  # 9216, as 9 taps of 2 maps of 2x2 by 8 by 8
    assert firsts.readying(torch.float32) == pytest.approx((3 + 1) / 2 / 9216**0.25)
