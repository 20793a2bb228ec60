"""From safetensors files into modules: all at once, or block by block while the module runs."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch

from ....kernels.formats import FORMATS
from ....kernels.quantise import BLOCK, quantise
from ...errors import TightfitError
from ...models.spec import Component
from ...models.tensors import Encoding, Tensor
from .networks import DTYPES as DTYPES
from .networks import current_name
from .packed import is_packed
from .quantised import Quantised, quantised_layers, workspace

FLOATS = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
STORED = FLOATS | {"I8": torch.int8, "U8": torch.uint8}
# Bytes that quantising takes for each weight of a block, and to make it fp32; torch's profiler saw 8.0 to
# 10.4 and 12.0 to 14.4.
_QUANTISING, _CONVERTING = 9, 4
_DECODING = 16  # bytes that decoding takes for each value of a block; of GGUF 5 to 7


def match(component: Component, module: torch.nn.Module) -> dict[str, Tensor]:
    """For each tensor of `module` the one in the component's files; they are all there and of the right
    shape.

    A quantised layer has its stored parts, or the plain weight that they will be made of. Tensors of other
    names than the families' networks have are left alone, as diffusers and transformers leave them: averages,
    positions, a safety checker.
    """
    expected = {name: (tensor.shape, tensor.dtype) for name, tensor in module.state_dict().items()}
    layers = quantised_layers(module)
    parts = {f"{path}.{part}" for path, layer in layers.items() for part in layer.form.parts(layer.shape)}
    if component.formats is None:  # parts are yet to be made
        plain = {f"{path}.weight": (torch.Size(layer.shape), torch.float32) for path, layer in layers.items()}
        expected, parts = (
            {name: each for name, each in (expected | plain).items() if name not in parts},
            set(),
        )
    stored = {current_name(name, expected): tensor for name, tensor in component.tensors.items()}
    for path, layer in layers.items():
        if layer.adapted is not None:  # which has the weight's patches
            stored |= {f"{path}.adapted.{name}": tensor for name, tensor in layer.adapted.stored.items()}
            whole = next(name for name in (f"{path}.packed", f"{path}.weight") if name in stored)
            kept = tuple(patch for patch in stored[whole].patches if patch.decodes)
            stored[whole] = replace(stored[whole], patches=kept)
    words = [name for name in expected if ".words." in name]
    stored |= dict(zip(words, component.words.values(), strict=True))
    where = f"the weights of {component.folder.name} in {component.folder.parent}"
    cure = "files of different models were mixed, or one was renamed; copy or download the model again"
    if missing := [name for name in expected if name not in stored]:
        unknown = [name for name in stored if name not in expected]
        instead = f", but have {unknown[0]}" if unknown else ""
        raise TightfitError(f"{where} lack {len(missing)}, such as {missing[0]}{instead}: {cure}")
    if left := next((name for name in stored if name not in expected and _decided_by(component, name)), None):
        field = _decided_by(component, left)
        raise TightfitError(
            f"{where} have {left}, which their config.json leaves out (its {field}): "
            "copy or download both again from one place"
        )
    for name, (shape, dtype) in expected.items():
        tensor = stored[name]
        # (C, C, 1, 1) is (C, C).
        if [side for side in tensor.shape if side != 1] != [side for side in shape if side != 1]:
            raise TightfitError(
                f"{where} have {name} of shape {list(tensor.shape)}, its config says {list(shape)}: {cure}"
            )
        plain = tensor.dtype in FLOATS or tensor.encoding
        if STORED.get(tensor.dtype) != dtype if name in parts else not plain:
            raise TightfitError(
                f"{where} have {name} as {tensor.dtype}, which plain models have not: use the original model"
            )
    return {name: stored[name] for name in expected}


def _decided_by(component: Component, name: str) -> str | None:
    """The config field that decides whether the network has the tensor `name`, None if the family has no such
    tensor."""
    patterns = component.network.decided_by
    return next((field for pattern, field in patterns.items() if re.match(pattern, name)), None)


def fill(
    module: torch.nn.Module,
    stored: Mapping[str, Tensor],
    dtype: torch.dtype,
    device: torch.device,
    scratch: torch.Tensor | None = None,
) -> None:
    """Replace the meta tensors of `module` that are in `stored` by the files', converted or quantised one at
    a time by way of one buffer: `scratch`, uint8, of `scratch_bytes`, or one of its own."""
    if scratch is None:
        scratch = torch.empty(scratch_bytes(module, stored, dtype, device), dtype=torch.uint8)
    filled, owners = {}, _by_path(module)
    for name, tensor in stored.items():
        path, _, leaf = name.rpartition(".")
        owner = owners[path]
        if leaf not in owner._parameters:
            assert isinstance(owner, Quantised)
            filled |= {
                f"{path}.{part}": made.to(device) for part, made in _quantised(owner, tensor, scratch).items()
            }
            continue
        # empty, then filled: on a device the conversion then happens before the copy, and nothing else is
        # allocated there
        meta = owner._parameters[leaf]
        assert meta is not None
        values = torch.empty(meta.shape, dtype=own_dtype(owner, leaf, dtype), device=device)
        read_into(values, tensor, scratch)
        if is_packed(owner, leaf):  # at once: packed after all the others they left 0.1 GiB of holes
            owner.take(values)
        else:
            filled[name] = values
        del values
    module.load_state_dict(filled, assign=True, strict=False)  # `match` has seen that all are there
    del scratch, filled
    prepare(module, dtype, device)


def _by_path(module: torch.nn.Module) -> dict[str, torch.nn.Module]:
    """All its parts at once: `get_submodule` takes 0.1 ms, and three for each tensor were a third of a small
    network's loading."""
    return dict(module.named_modules(remove_duplicate=False))


def prepare(module: torch.nn.Module, dtype: torch.dtype, device: torch.device) -> None:
    """What a module needs beside its weights: what quantised layers make of theirs, their workspace, and the
    one kind of buffer that is in no file, 0, 1, 2 … for the positions of a text."""
    for layer in quantised_layers(module).values():
        layer.prepare()
    workspace(module).allocate(dtype, device)
    for name, buffer in list(module.named_buffers()):
        if buffer.is_meta:
            owner, _, leaf = name.rpartition(".")
            if leaf != "position_ids":
                raise TightfitError(f"the model needs the buffer {name}, which this version cannot fill")
            module.get_submodule(owner).register_buffer(
                leaf, torch.arange(buffer.shape[-1], device=device)[None], persistent=False
            )


def own_dtype(owner: torch.nn.Module, leaf: str, dtype: torch.dtype) -> torch.dtype:
    """What a parameter is held in when its network computes in `dtype`: parts of quantised weights are as
    stored."""
    parameter = owner._parameters.get(leaf)
    return (
        parameter.dtype
        if parameter is not None and isinstance(owner, Quantised) and leaf != "bias"
        else dtype
    )


def held(module: torch.nn.Module, dtype: torch.dtype) -> list[int]:
    """Bytes of each parameter when the network computes in `dtype`."""
    return [
        owner.packed_bytes()
        if leaf == "packed" and isinstance(owner, Quantised)
        else parameter.numel() * own_dtype(owner, leaf, dtype).itemsize
        for owner in module.modules()
        for leaf, parameter in owner._parameters.items()
        if parameter is not None
    ]


def beside(module: torch.nn.Module, dtype: torch.dtype) -> list[int]:
    """Bytes of what is allocated beside the weights when the network computes in `dtype`."""
    shared = workspace(module).bytes(dtype)
    return [*([shared] if shared else []), *(buffer.nbytes for buffer in module.buffers())]


def _quantised(layer: Quantised, tensor: Tensor, scratch: torch.Tensor) -> dict[str, torch.Tensor]:
    if keeps_codes(layer, tensor):
        encoding, raw = tensor.encoding, _raw(tensor, scratch)
        assert encoding
        return dict(encoding.packed(raw, layer.shape, _stored_beside(encoding)))
    if tensor.patches or tensor.encoding:
        values = torch.empty(tensor.shape)
        read_into(values, tensor, scratch)
    else:
        values = _values(tensor, scratch)
    try:
        return quantise(values.reshape(layer.shape), layer.form)
    except ValueError as error:
        raise TightfitError(f"{tensor.file}: {error}; copy or download the model again") from None


def keeps_codes(layer: Quantised, tensor: Tensor) -> bool:
    """Whether the layer has the tensor's values in the codes that the file has."""
    return bool(tensor.form) and FORMATS[tensor.form] == layer.form


def scratch_bytes(
    module: torch.nn.Module, stored: Mapping[str, Tensor], dtype: torch.dtype, device: torch.device
) -> int:
    """Bytes of host memory that reading needs beside the weights: the largest tensor that cannot be read into
    its place."""
    most, owners = 0, _by_path(module)
    for name, tensor in stored.items():
        path, _, leaf = name.rpartition(".")
        owner = owners[path]
        in_place = leaf in owner._parameters and _reads_in_place(
            tensor, own_dtype(owner, leaf, dtype), device
        )
        most = max(most, 0 if in_place else tensor.stored_bytes)
    return most


def as_stored(module: torch.nn.Module, stored: Mapping[str, Tensor]) -> bool:
    """Whether every parameter has a stored tensor, so that none is made while the module is loaded."""
    return all(name in stored for name, _ in module.named_parameters())


def loading_bytes(
    module: torch.nn.Module, stored: Mapping[str, Tensor], dtype: torch.dtype, device: torch.device
) -> int:
    """Most bytes of host memory that are taken at once while a module is loaded, beyond what it holds in the
    end on a CPU."""
    scratch, layers = scratch_bytes(module, stored, dtype, device), quantised_layers(module)
    owners, now, most = _by_path(module), 0, 0
    for name, tensor in stored.items():
        path, _, leaf = name.rpartition(".")
        if path in layers and leaf == "weight" and keeps_codes(layers[path], tensor):
            assert tensor.encoding
            merged, shape = 0, layers[path].shape
            now += layers[path].form.bytes(shape)
            most = max(most, now + tensor.encoding.packing_bytes(shape))
        elif path in layers and leaf == "weight":
            now += layers[path].form.bytes(tensor.shape)
            row = tensor.count // tensor.shape[0]
            merged = 4 * tensor.count if tensor.patches or tensor.encoding else 0
            each = _QUANTISING + (0 if tensor.dtype == "F32" or merged else _CONVERTING)
            most = max(most, now + merged + each * min(tensor.count, max(row, BLOCK // row * row)))
        else:
            owner = owners[path]
            count = tensor.count * own_dtype(owner, leaf, dtype).itemsize
            now += count
            merged = count if is_packed(owner, leaf) else 0  # it is there plain too
            most = max(most, now + merged)
        if tensor.patches or tensor.encoding:
            most = max(most, now + merged + _patching_bytes(tensor))
    # In another order, and packed.
    packing = 2 * max((layer.packing_bytes() for layer in layers.values()), default=0)
    return max(scratch, packing, scratch + most - sum(held(module, dtype)) - sum(beside(module, dtype)))


def read_into(out: torch.Tensor, tensor: Tensor, scratch: torch.Tensor) -> None:
    """Fill `out` with one stored tensor, converted by way of `scratch` (uint8, at least its stored bytes).

    Read, not mapped: a mapped file stays in memory beside the converted weights, 1002 MB for 500 MB of fp16
    as bf16. And by way of one buffer, as freeing one for each tensor left holes in the heap that came to the
    same in every other run.
    """
    if _reads_in_place(tensor, out.dtype, out.device):
        tensor.read_into(out.view(-1).view(torch.uint8).numpy().data)
        return
    out = out.view(tensor.shape)
    if not (tensor.patches or tensor.encoding):
        out.copy_(_values(tensor, scratch))
        return
    for start, rows in _patched(tensor, scratch):
        out[start : start + len(rows)].copy_(rows)


def _reads_in_place(tensor: Tensor, dtype: torch.dtype, device: torch.device) -> bool:
    return tensor.as_stored and device.type == "cpu" and dtype == STORED[tensor.dtype]


def _values(tensor: Tensor, scratch: torch.Tensor) -> torch.Tensor:
    """The tensor's values as the file has them, in `scratch`."""
    values = _raw(tensor, scratch).view(STORED[tensor.dtype])
    return values.view(tensor.shape[::-1]).T if tensor.transposed else values.view(tensor.shape)


def _raw(tensor: Tensor, scratch: torch.Tensor) -> torch.Tensor:
    """The tensor's bytes, in `scratch`."""
    raw = scratch[: tensor.stored_bytes]
    tensor.read_into(raw.numpy().data)
    return raw


def _decoded(tensor: Tensor, encoding: Encoding, scratch: torch.Tensor) -> Iterator[torch.Tensor]:
    """An encoded tensor's values in fp32, some rows at a time."""
    parts, sides = _stored_beside(encoding), tensor.shape[::-1] if tensor.transposed else tensor.shape
    row, step = tensor.count // sides[0], sides[0] if tensor.transposed else _block_rows(tensor)
    raw = _raw(tensor, scratch).view(-(-tensor.count // encoding.values), -1)
    for start in range(0, sides[0], step):  # blocks may begin in one row and end in the next
        begin, end = start * row, min(start + step, sides[0]) * row
        first = begin // encoding.values
        values = encoding.decode(raw[first : -(-end // encoding.values)], first, parts).view(-1)
        rows = values[begin - first * encoding.values :][: end - begin].view(-1, *sides[1:])
        yield rows.T if tensor.transposed else rows
        del values, rows  # before the next ones are made


def _stored_beside(encoding: Encoding) -> Any:
    """What is stored beside encoded values, as it is needed to decode them."""
    plain = (_values(part, torch.empty(part.stored_bytes, dtype=torch.uint8)) for part in encoding.tensors)
    return encoding.prepared(tuple(plain))


def _patched(tensor: Tensor, scratch: torch.Tensor) -> Iterator[tuple[int, torch.Tensor]]:
    """A tensor's values in fp32 as its patches change them, some rows at a time, and which row is their
    first."""
    parts = {patch: patch.prepared(tuple(map(_in_fp32, patch.tensors))) for patch in tensor.patches}
    if tensor.encoding:
        blocks = _decoded(tensor, tensor.encoding, scratch)
    else:
        blocks = _values(tensor, scratch).split(_block_rows(tensor))
    start = 0
    for block in blocks:
        rows = block if tensor.encoding else block.to(torch.float32, copy=True)
        del block
        for patch in tensor.patches:
            patch.apply(rows, start, parts[patch])
        yield start, rows
        start += len(rows)
        del rows  # before the next ones are made


def changed(
    module: torch.nn.Module, like: torch.nn.Module, before: Mapping[str, Tensor], after: Mapping[str, Tensor]
) -> dict[str, Tensor] | None:
    """The tensors that a loaded module lacks to be as `like` with `after` in place of `before`. None if there
    is more to it than reading these."""
    layers, others = quantised_layers(module), quantised_layers(like)
    if not before or {path: type(layer) for path, layer in layers.items()} != {
        path: type(layer) for path, layer in others.items()
    }:
        return None
    lacking = {
        name: tensor for name, tensor in after.items() if before.get(name) != tensor or ".adapted." in name
    }
    parts = {f"{path}.weight" for path in layers}
    return None if lacking.keys() & parts else lacking  # those would have to be quantised


def exchange_adapted(module: torch.nn.Module, like: torch.nn.Module) -> None:
    """Give the quantised layers of `module` what those of `like` have of adapters, still to be read."""
    layers = quantised_layers(module)
    for path, layer in quantised_layers(like).items():
        layers[path].adapted = layer.adapted


def refill(
    module: torch.nn.Module,
    stored: Mapping[str, Tensor],
    dtype: torch.dtype,
    device: torch.device,
    scratch_bytes: int,
) -> None:
    """Read tensors into the parameters that a loaded module has for them."""
    scratch = torch.empty(scratch_bytes, dtype=torch.uint8)
    for name, tensor in stored.items():
        path, _, leaf = name.rpartition(".")
        owner = module.get_submodule(path)
        if is_packed(owner, leaf):
            values = torch.empty(owner.plain_shape, dtype=dtype, device=device)
            read_into(values, tensor, scratch)
            owner.take(values)
            del values
            continue
        parameter = module.get_parameter(name)
        if parameter.is_meta:
            values = torch.empty(parameter.shape, dtype=own_dtype(owner, leaf, dtype), device=device)
            parameter = owner._parameters[leaf] = torch.nn.Parameter(values, requires_grad=False)
        read_into(parameter.data, tensor, scratch)


def check_adapted(module: torch.nn.Module) -> None:
    """Raise TightfitError for values that are not finite in what quantised layers have of adapters."""
    for tensor in _of_adapters(module):
        _in_fp32(tensor)


def checking_bytes(module: torch.nn.Module) -> int:
    """Most bytes of host memory that `check_adapted` takes at once."""
    return max((4 * tensor.count + tensor.stored_bytes for tensor in _of_adapters(module)), default=0)


def _of_adapters(module: torch.nn.Module) -> Iterator[Tensor]:
    for layer in quantised_layers(module).values():
        yield from layer.adapted.stored.values() if layer.adapted is not None else ()


def _in_fp32(tensor: Tensor) -> torch.Tensor:
    """A tensor of an adapter's. Raises TightfitError for one with values that are not finite."""
    values = torch.empty(tensor.shape)
    read_into(values, tensor, torch.empty(tensor.stored_bytes, dtype=torch.uint8))
    # `isfinite` of all of them would take as much as they do
    if values.numel() and not all(extreme.isfinite() for extreme in values.aminmax()):
        raise TightfitError(f"{tensor.file} holds values that are not finite: take another copy of it")
    return values


def _block_rows(tensor: Tensor) -> int:
    """Rows of a tensor that are patched at a time."""
    return max(1, BLOCK * tensor.shape[0] // tensor.count)


def patching_bytes(stored: Mapping[str, Tensor]) -> int:
    """Most bytes of host memory that applying the patches of one tensor takes at once."""
    some = (tensor for tensor in stored.values() if tensor.patches or tensor.encoding)
    return max(map(_patching_bytes, some), default=0)


def _patching_bytes(tensor: Tensor) -> int:
    """What the patches are computed from, in fp32, one of them also as stored; a block, and its change, or
    what decoding it takes."""
    parts = [part for patch in tensor.patches for part in patch.tensors]
    block = min(tensor.count, _block_rows(tensor) * (tensor.count // tensor.shape[0]))
    decoding = _DECODING * (tensor.count if tensor.transposed else block) if tensor.encoding else 0
    beside = sum(part.stored_bytes for part in tensor.encoding.tensors) if tensor.encoding else 0
    return (
        4 * sum(part.count for part in parts)
        + max((part.stored_bytes for part in parts), default=0)
        + max(8 * block, decoding)
        + beside
    )
