"""The packed form of a quantized model: as few bytes as possible that still give exactly the same outputs.

Weights are stored as integers with their own number of bits, steps in one byte each, and every other array in the shortest of a few float
formats that represents it exactly. A fake-quantized weight is an integer times a step, so `unpack` restores a forward that is identical to
the last bit. Values that are not exact in 16 bits stay float32; `round_floats_to_half` rounds the biases and norms of a trained student
beforehand, so that they are exact in float16.

Layout, for a reader that knows the structure of the model from its config: version; one byte of flags for each quantizer; the steps of all
inputs; for each weight its steps and its values; the other parameters and buffers. A float array begins with a byte for its format. The
whole is compressed by zlib, which gains because the 4-bit values are not equally frequent.

C channels of a weight; G steps of a quantizer, which is C or 1.
"""

import io
import struct
import zlib
from collections import Counter
from collections.abc import Iterator
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from qdbev.quant.layers import QuantEmbedding, WeightLayer, activation_quantizers, quant_layers, quantizers, weight_of
from qdbev.quant.quantizer import STEP_BITS, Quantizer

Part = Literal["flags", "steps", "weights", "embeddings", "floats"]
"""Kind of content of a piece of the packed form."""

_VERSION = 1
"""Version of the layout; the first byte."""
_NUM_FLAGS = 3
"""Flags of a quantizer (`Quantizer.get_extra_state`)."""
_BYTE_STEPS = 0
"""First byte of a float array whose values are stored like steps, in one byte each."""
_FLOATS = {1: torch.float16, 2: torch.bfloat16, 3: torch.float32}
"""First byte and type of the other float arrays, in the order in which they are tried."""
_OCTAVES = 2 ** (8 - STEP_BITS + 1)
"""Number of exponents that the byte of a step can express, counted from the smallest in the array. The byte has three bits of mantissa (the
leading one is not stored) and five bits of exponent."""
_LEADING = 2 ** (STEP_BITS - 1)
"""Value of the leading bit of a mantissa of `STEP_BITS` bits."""


class PackError(ValueError):
    """The bytes are not a packed form of this model."""


def pack(model: nn.Module) -> bytes:
    """The packed form of a prepared model, which is everything that its detections depend on except its config.

    Raises:
        ValueError: The model has no quantizers.
    """
    return zlib.compress(b"".join(data for _, data in parts(model)), zlib.Z_BEST_COMPRESSION)


@torch.no_grad()
def unpack(data: bytes, model: nn.Module) -> None:
    """Set the parameters, buffers and ranges of `model`, prepared from the same config as the packed model, in place.

    Weights become multiples of their steps, and learned steps those that were in use, so that the forward is identical and training can
    continue.

    Raises:
        PackError: `data` is damaged or belongs to another model or another version.
    """
    try:
        reader = _Reader(zlib.decompress(data))
    except zlib.error as error:
        raise PackError(f"the packed form is damaged ({error}); pack the student again") from error
    if (version := reader.take(1)[0]) != _VERSION:
        raise PackError(f"the packed form has version {version}, this code reads {_VERSION}; pack the student again")
    layers = [layer for _, layer in quant_layers(model)]
    for layer in layers:
        for quantizer in quantizers(layer):
            flags = reader.take(1)[0]
            quantizer.set_extra_state(torch.tensor([flags >> bit & 1 for bit in range(_NUM_FLAGS)]))
    inputs = [quantizer for layer in layers for quantizer in activation_quantizers(layer)]
    for quantizer, step in zip(inputs, reader.floats(len(inputs)), strict=True):
        quantizer.set_step(step.view(1))
    for layer in layers:
        if isinstance(layer, WeightLayer):
            _unpack_weight(reader, layer)
    for value in _floats(model):
        value.copy_(reader.floats(value.numel()).view_as(value))
    if left := reader.read():
        raise PackError(f"{len(left)} bytes are left over; the packed form belongs to another model")


@torch.no_grad()
def round_floats_to_half(model: nn.Module) -> None:
    """Round all values that are not quantized (biases, norms, float layers) to float16, in place; values beyond its range stay."""
    for value in _floats(model):
        half = value.half().to(value.dtype)
        value.copy_(torch.where(half.isfinite(), half, value))


@torch.no_grad()
def parts(model: nn.Module) -> list[tuple[Part, bytes]]:
    """Pieces of the packed form in their order, before compression, each with its kind of content."""
    layers = [layer for _, layer in quant_layers(model)]
    if not layers:
        raise ValueError("the model has no quantizers; pack a student, which is a quantized model")
    flags = [quantizer.get_extra_state().tolist() for layer in layers for quantizer in quantizers(layer)]
    inputs = [quantizer for layer in layers for quantizer in activation_quantizers(layer)]
    pieces: list[tuple[Part, bytes]] = [
        ("flags", bytes([_VERSION, *(sum(flag << bit for bit, flag in enumerate(one)) for one in flags)])),
        ("steps", _float_bytes(torch.stack([quantizer.step() for quantizer in inputs]))),
    ]
    for layer in layers:
        if isinstance(layer, WeightLayer):
            steps, values = _pack_weight(layer)
            pieces += [("steps", steps), ("embeddings" if isinstance(layer, QuantEmbedding) else "weights", values)]
    return pieces + [("floats", _float_bytes(value)) for value in _floats(model)]


def packed_parts(model: nn.Module) -> dict[Part, int]:
    """Bytes of the packed form by kind of content, before compression; two 4-bit values take one byte."""
    counts: Counter[Part] = Counter()
    for part, data in parts(model):
        counts[part] += len(data)
    return dict(counts)


def paper_bytes(model: nn.Module, weight_bits: int) -> float:
    """Bytes of all parameters at `weight_bits` each, as the table of QD-BEV (arXiv:2308.10515) counts: with norms, biases and embeddings,
    without quantization steps."""
    steps = {id(p) for module in model.modules() if isinstance(module, Quantizer) for p in module.parameters()}
    return sum(p.numel() for p in model.parameters() if id(p) not in steps) * weight_bits / 8


def _pack_weight(layer: WeightLayer) -> tuple[bytes, bytes]:
    """Bytes of the steps and of the values; a layer that is switched off keeps float weights.

    The values are integers, counted from the smallest one of the quantizer, of `num_bits` bits without gaps.
    """
    quantizer, weight = layer.weight_quantizer, weight_of(layer)
    steps = _float_bytes(quantizer.step(weight))
    if not quantizer.enabled:
        return steps, _float_bytes(weight)
    codes = (quantizer.integers(weight).flatten() - quantizer.qrange[0]).to(torch.uint8).cpu().numpy()
    return steps, np.packbits(np.unpackbits(codes[:, None], axis=1)[:, -quantizer.num_bits :]).tobytes()


def _unpack_weight(reader: "_Reader", layer: WeightLayer) -> None:
    quantizer, weight = layer.weight_quantizer, weight_of(layer)
    count, bits = weight.numel(), quantizer.num_bits
    step = reader.floats(quantizer.log_step.numel())  # (G,)
    if quantizer.enabled:
        stored = np.frombuffer(reader.take(-(-count * bits // 8)), np.uint8)
        codes = np.unpackbits(stored, count=count * bits).reshape(count, bits) @ (1 << np.arange(bits)[::-1])  # (count,)
        integers = torch.from_numpy(codes).float() + quantizer.qrange[0]
        weight.copy_((integers.view(len(step), -1) * step[:, None]).view_as(weight))
    else:
        weight.copy_(reader.floats(count).view_as(weight))
    quantizer.set_step(step, weight)


def _float_bytes(values: Tensor) -> bytes:
    """One byte for the format, then the values in the first format that represents all of them exactly."""
    values = values.detach().float().flatten().cpu()
    mantissa, exponent = torch.frexp(values)
    lowest = int(exponent.min())
    leading = mantissa * 2 * _LEADING
    if (values > 0).all() and (leading == leading.round()).all() and exponent.max() - lowest < _OCTAVES:
        codes = (leading - _LEADING + (exponent - lowest) * _LEADING).to(torch.uint8)
        return struct.pack("<Bh", _BYTE_STEPS, lowest) + codes.numpy().tobytes()
    exact = (code for code, dtype in _FLOATS.items() if torch.equal(values.to(dtype).float(), values))
    code = next(exact, max(_FLOATS))  # NaN equals nothing and takes float32
    return bytes([code]) + values.to(_FLOATS[code]).view(torch.uint8).numpy().tobytes()


class _Reader(io.BytesIO):
    """Reads bytes one piece after the other."""

    def take(self, count: int) -> bytes:
        """The next `count` bytes."""
        data = self.read(count)
        if len(data) < count:
            raise PackError(f"the packed form ends after {self.tell()} bytes; it is cut off or belongs to another model")
        return data

    def floats(self, count: int) -> Tensor:
        """(count,) float32, inverse of `_float_bytes`."""
        encoding = self.take(1)[0]
        if encoding == _BYTE_STEPS:
            (lowest,) = struct.unpack("<h", self.take(2))
            codes = np.frombuffer(self.take(count), np.uint8).astype(np.int32)
            return torch.from_numpy(np.ldexp(np.float32(_LEADING + codes % _LEADING) / (2 * _LEADING), codes // _LEADING + lowest))
        if encoding not in _FLOATS:
            raise PackError(f"a float array has the unknown format {encoding}; the packed form belongs to another model")
        dtype = _FLOATS[encoding]
        return torch.frombuffer(bytearray(self.take(count * dtype.itemsize)), dtype=dtype).float()


def _floats(model: nn.Module) -> Iterator[Tensor]:
    """Parameters and persistent buffers, except the weights of quantized layers and everything in quantizers."""
    weights = {id(weight_of(layer)) for _, layer in quant_layers(model) if isinstance(layer, WeightLayer)}
    for module in model.modules():
        if not isinstance(module, Quantizer):
            kept = [buffer for name, buffer in module._buffers.items() if name not in module._non_persistent_buffers_set]
            yield from (value for value in (*module._parameters.values(), *kept) if value is not None and id(value) not in weights)
