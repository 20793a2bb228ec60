"""Detection says what is true of this machine, and refuses what is not here."""

from __future__ import annotations

import os

import pytest
from tightfit.runtime.errors import TightfitError
from tightfit.runtime.hardware import Hardware


def test_cpu():
    cpu = Hardware.detect("cpu")
    assert cpu.device == "cpu"
    assert 0 < cpu.free_bytes <= cpu.total_bytes
    assert "fp32" in cpu.precisions
    assert cpu.name
    if hasattr(os, "sysconf"):
        assert cpu.total_bytes == pytest.approx(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), rel=0.01)


def test_what_is_not_here():
    import torch

    with pytest.raises(TightfitError, match="choose auto, cuda, mps, cpu"):
        Hardware.detect("tpu")
    if not torch.cuda.is_available():
        with pytest.raises(TightfitError, match="--device cpu"):
            Hardware.detect("cuda")


@pytest.mark.gpu
def test_cuda():
    import torch

    card = Hardware.detect("auto")
    assert card.device == "cuda"
    assert card.total_bytes == torch.cuda.get_device_properties(0).total_memory
