"""Tensors that are not read as they are stored: transposed ones, and those that adapters change."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from safetensors.torch import save_file
from tightfit.runtime.backends.torch import loading
from tightfit.runtime.backends.torch.meter import LiveBytes
from tightfit.runtime.models.layouts.safetensors import read_header
from tightfit.runtime.models.tensors import Patch


@dataclass(frozen=True)
class Added(Patch):
    """rows += strength * up @ down, by rows."""

    tensors: tuple
    strength: float

    def apply(self, rows, start, parts):
        up, down = parts
        rows += self.strength * (up[start : start + len(rows)] @ down).view(rows.shape)


@dataclass(frozen=True)
class Whole(Patch):
    """rows += a tensor of their shape."""

    tensors: tuple

    def apply(self, rows, start, parts):
        rows += parts[0][start : start + len(rows)]


def read(tensor, dtype):
    out = torch.empty(tensor.shape, dtype=dtype)
    loading.read_into(out, tensor, torch.empty(tensor.stored_bytes, dtype=torch.uint8))
    return out


@pytest.mark.parametrize("block", [2**18, 100, 1])
@pytest.mark.parametrize("shape", [(24, 40), (24, 5, 3, 3), (24,)])
@pytest.mark.parametrize("stored", [torch.float32, torch.float16, torch.bfloat16])
def test_patches_are_applied_in_fp32_whatever_the_block(tmp_path, monkeypatch, block, shape, stored):
    monkeypatch.setattr(loading, "BLOCK", block)
    torch.manual_seed(0)
    weight, up = torch.randn(shape).to(stored), torch.randn(24, 4).half()
    down = torch.randn(4, weight[0].numel())
    save_file({"weight": weight, "up": up, "down": down}, file := tmp_path / "a.safetensors")
    header = read_header(file)
    patch = Added((header["up"], header["down"]), 0.5)
    tensor = replace(header["weight"], patches=(patch, replace(patch, strength=0.25)))
    exact = weight.double() + 0.75 * (up.double() @ down.double()).view(shape)
    for dtype in (torch.float32, torch.float16):
        assert torch.allclose(
            read(tensor, dtype).double(), exact, rtol=0, atol=2e-5 if dtype.itemsize == 4 else 0.01
        )
    assert torch.equal(read(header["weight"], stored), weight)  # nothing else changes


def test_patching_takes_no_more_than_is_counted(tmp_path):
    whole = torch.ones(1024, 2048, dtype=torch.float16)
    save_file({"weight": whole, "difference": whole.clone()}, file := tmp_path / "a.safetensors")
    header = read_header(file)
    tensor = replace(header["weight"], patches=(Whole((header["difference"],)),))
    out, scratch = torch.empty(tensor.shape), torch.empty(tensor.stored_bytes, dtype=torch.uint8)
    with LiveBytes("cpu") as live:
        loading.read_into(out, tensor, scratch)
    assert out.eq(2).all()
    assert live.peak <= loading.patching_bytes({"weight": tensor})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_transposed_tensor(tmp_path, dtype):
    values = torch.randn(6, 9)
    save_file({"weight": values.T.contiguous()}, file := tmp_path / "a.safetensors")
    tensor = replace(read_header(file)["weight"], transposed=True, shape=(6, 9))
    assert torch.equal(read(tensor, dtype), values.to(dtype))
