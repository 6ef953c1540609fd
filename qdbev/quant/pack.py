"""A student as few bytes: integers at their own bits, steps in a byte, and every other number in the shortest form that holds it.

`unpack` gives back the same forward to the bit, since fake-quantized weights are integers times steps, and nothing else is changed:
what float16 cannot hold stays float32. `round_floats_to_half` rounds a trained student's biases and norms, so that float16 can.

Layout, of a model whose structure the reader knows from its config: version; a byte of flags for each quantizer; all input steps; the
steps and then the values of each weight; the other parameters and buffers. A float array begins with its form. All of it is deflated:
the values of 4 bits are not equally frequent.

C channels of a weight, G steps.
"""

import struct
import zlib
from collections.abc import Iterator
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from qdbev.quant.layers import QuantEmbedding, WeightLayer, activation_quantizers, quant_layers, quantizers, weight_of
from qdbev.quant.quantizer import STEP_BITS, Quantizer

Part = Literal["flags", "steps", "weights", "embeddings", "floats"]

_VERSION = 1
_NUM_FLAGS = 3
_BYTE_STEPS, _FLOAT16, _BFLOAT16, _FLOAT32 = range(4)
_OCTAVES = 2 ** (8 - STEP_BITS + 1)
"""A step has its leading one, which is not stored, three more bits, and five bits of exponent above the array's smallest."""
_LEADING = 2 ** (STEP_BITS - 1)


class PackError(ValueError):
    """Bytes that are not a packed form of this model."""


def pack(model: nn.Module) -> bytes:
    """The packed form of a prepared model.

    Raises:
        ValueError: The model has no quantizers.
    """
    return zlib.compress(b"".join(data for _, data in parts(model)), zlib.Z_BEST_COMPRESSION)


@torch.no_grad()
def unpack(data: bytes, model: nn.Module) -> None:
    """Fill a prepared model, of the config that `data` was packed under, in place.

    The weights come back on their grid, and learned steps as the ones in use, so that the forward is the same and training may go on.

    Raises:
        PackError: `data` is damaged or belongs to another model or another version.
    """
    try:
        reader = _Reader(zlib.decompress(data))
    except zlib.error as error:
        raise PackError(f"the packed form is damaged ({error}); pack the student again") from error
    if (version := reader.take(1)[0]) != _VERSION:
        raise PackError(f"packed form of version {version}, this code reads {_VERSION}; pack the student again")
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
    if reader.left:
        raise PackError(f"{reader.left} bytes are left over; the packed form belongs to another model")


@torch.no_grad()
def round_floats_to_half(model: nn.Module) -> None:
    """Round what is not quantized to float16, in place: biases, norms, float layers. Values beyond its range stay."""
    for value in _floats(model):
        half = value.half().to(value.dtype)
        value.copy_(torch.where(half.isfinite(), half, value))


@torch.no_grad()
def parts(model: nn.Module) -> list[tuple[Part, bytes]]:
    """The packed form in order before it is deflated, each piece with what it holds."""
    layers = [layer for _, layer in quant_layers(model)]
    if not layers:
        raise ValueError("the model has no quantizers; pack a student")
    flags = [quantizer.get_extra_state().tolist() for layer in layers for quantizer in quantizers(layer)]
    inputs = [quantizer for layer in layers for quantizer in activation_quantizers(layer)]
    pieces: list[tuple[Part, bytes]] = [
        ("flags", bytes([_VERSION, *(sum(flag << bit for bit, flag in enumerate(one)) for one in flags)])),
        ("steps", _float_bytes(torch.stack([quantizer.step(quantizer.log_step) for quantizer in inputs]))),
    ]
    for layer in layers:
        if isinstance(layer, WeightLayer):
            steps, values = _pack_weight(layer)
            pieces += [("steps", steps), ("embeddings" if isinstance(layer, QuantEmbedding) else "weights", values)]
    return pieces + [("floats", _float_bytes(value)) for value in _floats(model)]


def _pack_weight(layer: WeightLayer) -> tuple[bytes, bytes]:
    """Steps and values; a layer that is switched off keeps its float weights."""
    quantizer, weight = layer.weight_quantizer, weight_of(layer)
    step = quantizer.step(weight).flatten()  # (G,)
    if not quantizer.enabled:
        return _float_bytes(step), _float_bytes(weight)
    return _float_bytes(step), _integer_bytes(quantizer.integers(weight), quantizer)


def _unpack_weight(reader: "_Reader", layer: WeightLayer) -> None:
    quantizer, weight = layer.weight_quantizer, weight_of(layer)
    step = reader.floats(quantizer.log_step.numel())  # (G,)
    if quantizer.enabled:
        integers = _integers(reader, weight.numel(), quantizer)
        weight.copy_((integers.view(len(step), -1) * step[:, None]).view_as(weight))
    else:
        weight.copy_(reader.floats(weight.numel()).view_as(weight))
    quantizer.set_step(step, weight)


def _integer_bytes(integers: Tensor, quantizer: Quantizer) -> bytes:
    """Each value above the smallest as `num_bits` bits, without gaps."""
    codes = (integers.flatten() - quantizer.qrange[0]).to(torch.uint8).cpu().numpy()
    return np.packbits(np.unpackbits(codes[:, None], axis=1)[:, -quantizer.num_bits :]).tobytes()


def _integers(reader: "_Reader", count: int, quantizer: Quantizer) -> Tensor:
    bits = quantizer.num_bits
    stored = np.frombuffer(reader.take(-(-count * bits // 8)), np.uint8)
    codes = np.unpackbits(stored, count=count * bits).reshape(count, bits) @ (1 << np.arange(bits)[::-1])
    return torch.from_numpy(codes).float() + quantizer.qrange[0]


def _float_bytes(values: Tensor) -> bytes:
    """The form, then the values in the first of the forms that holds them exactly."""
    values = values.detach().float().flatten().cpu()
    mantissa, exponent = torch.frexp(values)
    lowest = int(exponent.min())
    leading = mantissa * 2 * _LEADING
    if (values > 0).all() and (leading == leading.round()).all() and exponent.max() - lowest < _OCTAVES:
        codes = (leading - _LEADING + (exponent - lowest) * _LEADING).to(torch.uint8)
        return struct.pack("<Bh", _BYTE_STEPS, lowest) + codes.numpy().tobytes()
    if torch.equal(values.half().float(), values):
        return bytes([_FLOAT16]) + values.half().numpy().astype("<f2").tobytes()
    if torch.equal(values.bfloat16().float(), values):
        return bytes([_BFLOAT16]) + (values.numpy().astype("<f4").view("<u4") >> 16).astype("<u2").tobytes()
    return bytes([_FLOAT32]) + values.numpy().astype("<f4").tobytes()


class _Reader:
    """Bytes, read from the front."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._position = 0

    @property
    def left(self) -> int:
        """Bytes not yet read."""
        return len(self._data) - self._position

    def take(self, count: int) -> bytes:
        """The next `count` bytes."""
        if self.left < count:
            raise PackError(f"the packed form ends after {len(self._data)} bytes; it is cut off or belongs to another model")
        self._position += count
        return self._data[self._position - count : self._position]

    def floats(self, count: int) -> Tensor:
        """(count,) float32, inverse of `_float_bytes`."""
        form = self.take(1)[0]
        if form == _BYTE_STEPS:
            (lowest,) = struct.unpack("<h", self.take(2))
            codes = np.frombuffer(self.take(count), np.uint8).astype(np.int32)
            return torch.from_numpy(np.ldexp(np.float32(_LEADING + codes % _LEADING) / (2 * _LEADING), codes // _LEADING + lowest))
        if form == _FLOAT16:
            return torch.from_numpy(np.frombuffer(self.take(2 * count), "<f2").astype(np.float32))
        if form == _BFLOAT16:
            return torch.from_numpy((np.frombuffer(self.take(2 * count), "<u2").astype("<u4") << 16).view("<f4").astype(np.float32))
        if form == _FLOAT32:
            return torch.from_numpy(np.frombuffer(self.take(4 * count), "<f4").astype(np.float32))
        raise PackError(f"a float array of unknown form {form}; the packed form belongs to another model")


def _floats(model: nn.Module) -> Iterator[Tensor]:
    """Parameters and persistent buffers that are no quantized layer's weight and no quantizer's."""
    weights = {id(weight_of(layer)) for _, layer in quant_layers(model) if isinstance(layer, WeightLayer)}
    for module in model.modules():
        if not isinstance(module, Quantizer):
            kept = [buffer for name, buffer in module._buffers.items() if name not in module._non_persistent_buffers_set]
            yield from (value for value in (*module._parameters.values(), *kept) if value is not None and id(value) not in weights)
