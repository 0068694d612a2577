"""Codes of any width as bytes: element i of a row has the bits i * bits to (i + 1) * bits - 1, the lowest first."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

from qjax._grid import once

# Codes of these widths are stored as integers of a machine.
_WHOLE = {8: jnp.uint8, 16: jnp.uint16, 32: jnp.uint32, 64: jnp.uint64}


def _group(bits: int) -> tuple[int, int]:
    """Returns the least (codes, bytes) that fill each other."""
    codes = 8 // math.gcd(bits, 8)
    return codes, codes * bits // 8


@functools.partial(jax.jit, static_argnames="bits", inline=True)
def pack(codes, bits: int):
    """Returns unsigned codes below ``2^bits`` packed along the last axis, each row padded to whole bytes."""
    if bits in _WHOLE:
        return codes.astype(_WHOLE[bits])
    count, size = _group(bits)
    length = codes.shape[-1]
    if bits < 8:
        # Made at a stretch, on vectors, before they are taken apart.
        (codes,) = once(codes.astype(jnp.int16))
        codes = codes.astype(jnp.uint8)
    padding = [(0, 0)] * (codes.ndim - 1) + [(0, -length % count)]
    groups = -(-length // count)  # counted, for -1 stands for no length of an empty array
    grouped = jnp.pad(codes, padding).reshape(*codes.shape[:-1], groups, count)
    columns = []
    for byte in range(size):
        column = jnp.zeros(grouped.shape[:-1], codes.dtype)
        for i in range(count):
            place = i * bits - 8 * byte
            if -bits < place < 8:
                column = column | (grouped[..., i] << place if place >= 0 else grouped[..., i] >> -place)
        columns.append((column & 255).astype(jnp.uint8))
    packed = jnp.stack(columns, axis=-1).reshape(*codes.shape[:-1], groups * size)
    return packed[..., : -(-length * bits // 8)]


@functools.partial(jax.jit, static_argnames=("bits", "length", "uint"), inline=True)
def unpack(packed, bits: int, length: int, uint):
    """Returns the codes of ``pack`` as an array of the unsigned dtype ``uint``."""
    if bits in _WHOLE:
        return packed.astype(uint)
    count, size = _group(bits)
    groups = -(-packed.shape[-1] // size)
    padding = [(0, 0)] * (packed.ndim - 1) + [(0, -packed.shape[-1] % size)]
    grouped = jnp.pad(packed, padding).reshape(*packed.shape[:-1], groups, size).astype(uint)
    columns = []
    for i in range(count):
        code = jnp.zeros(grouped.shape[:-1], uint)
        for byte in range(size):
            place = 8 * byte - i * bits
            if -8 < place < bits:
                code = code | (grouped[..., byte] << place if place >= 0 else grouped[..., byte] >> -place)
        columns.append(code & np.dtype(uint).type(2**bits - 1))
    return jnp.stack(columns, axis=-1).reshape(*packed.shape[:-1], groups * count)[..., :length]
