"""Real storage: codes and scales of an array in a format."""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec
from jaxtyping import Array, Inexact, UInt

from qjax import _carrier, _packing
from qjax._blocks import Rows, blocks_of
from qjax._carrier import Carrier
from qjax._chop import RoundingLike, _checked, random
from qjax._elementwise import elementwise
from qjax._modes import Rounding
from qjax._scaled import Mode, Parts, _hold, multiply, once_per_block, quantize
from qjax.formats import FP32, FP64, Codebook, Fixed, Float, Format, Scaled


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["codes", "scales", "zero_points"],
    meta_fields=["fmt", "length", "dtype", "axis", "rows"],
)
@dataclasses.dataclass(frozen=True)
class QTensor:
    """An array stored in a format: packed codes, and the scales in their own encoding.

    Attributes:
      codes: the codes of the elements, laid out as their specification says (sign, exponent, fraction from the top;
        two's complement for ``Fixed``). Widths of 8, 16, 32 and 64 bits are unsigned integers, one an element;
        others are packed along the last axis, the first element in the lowest bits, each row padded to whole bytes.
      scales: for ``Scaled`` formats the scales of each level, outermost first, themselves QTensors in the scale's
        format, of the shape (blocks along every axis).
      zero_points: likewise, the zero points, if the format has them.
      fmt: the format.
      length: the length of the last axis, None for a scalar.
      dtype: the dtype that ``decode`` returns.
      axis: the axis of the blocks, counted from the end.
      rows: None, or how the array was laid out before it was encoded, as ``quantize_params`` does where blocks span
        several axes of a weight: codes and scales are of the rows, ``shape`` is of the array.

    It is a pytree: it crosses jit, vmap, scan and device_put.

    >>> import jax.numpy as jnp, qjax
    >>> q = qjax.encode(jnp.array([0.5, -6.0, 1.0, 3.0], jnp.float32), "e2m1")
    >>> q.codes, q.nbytes
    (Array([241,  82], dtype=uint8), 2)
    >>> q.to_ml_dtypes().dtype.name
    'float4_e2m1fn'
    """

    codes: UInt[Array, "..."]
    scales: "tuple[QTensor, ...]"
    zero_points: "tuple[QTensor, ...]"
    fmt: Format
    length: int | None
    dtype: Any
    axis: int
    rows: Rows | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the decoded array."""
        return self.shape_of_codes if self.rows is None else self.rows.shape

    @property
    def shape_of_codes(self) -> tuple[int, ...]:
        """The shape of ``unpacked()``: that of the rows, if there are such."""
        return () if self.length is None else (*self.codes.shape[:-1], self.length)

    @property
    def nbytes(self) -> int:
        """The bytes of codes, scales and zero points."""
        return self.codes.nbytes + sum(q.nbytes for q in (*self.scales, *self.zero_points))

    @property
    def element(self) -> Float | Fixed | Codebook:
        """The format of the codes: that of the elements within all scales."""
        return _element(self.fmt)

    def unpacked(self) -> UInt[Array, "..."]:
        """Returns one code an element, as uint8, uint16, uint32 or uint64."""
        bits = self.element.bits
        uint = next(u for u in (jnp.uint8, jnp.uint16, jnp.uint32, jnp.uint64) if jnp.iinfo(u).bits >= bits)
        return _packing.unpack(self.codes, bits, 1 if self.length is None else self.length, uint).reshape(
            self.shape_of_codes
        )

    def to_ml_dtypes(self) -> np.ndarray:
        """Returns the codes as a NumPy array of the ml_dtypes or numpy dtype of the element, scales not applied.

        Raises:
          TypeError: if no dtype has this encoding.
        """
        dtype = self.element.dtype
        if dtype is None:
            raise TypeError(f"QTensor.to_ml_dtypes: no dtype has the encoding of {self.element!r}; use unpacked().")
        return np.asarray(self.unpacked()).view(dtype)


def _element(fmt: Format) -> Float | Fixed | Codebook:
    while isinstance(fmt, Scaled):
        fmt = fmt.element
    return fmt


def encode(
    x: Inexact[Array, "*shape"] | np.ndarray | float,
    fmt: Format | str,
    rounding: RoundingLike = Rounding.NEAREST_EVEN,
    *,
    axis: int = -1,
    scale: Array | np.ndarray | float | None = None,
    key: Array | None = None,
    random_bits: int | UInt[Array, "*shape"] | None = None,
    saturate: bool = False,
    spec: PartitionSpec | None = None,
) -> QTensor:
    """Returns x in real storage: the ``QTensor`` of ``chop(x, fmt, ...)``.

    ``decode(encode(x, ...))`` equals ``chop(x, ...)`` bit for bit; the arguments are those of ``chop``. There is no
    gradient.

    Raises:
      TypeError: if x is complex, or as ``chop`` does.
      ValueError: if the codes are wider than the carrier (a 64-bit format needs a float64 x), or as ``chop`` does.

    >>> import jax.numpy as jnp, qjax
    >>> q = qjax.encode(jnp.linspace(-1, 1, 64, dtype=jnp.float32), "mxfp4")
    >>> q.nbytes, q.scales[0].codes
    (34, Array([125, 125], dtype=uint8))
    >>> bool((qjax.decode(q) == qjax.chop(jnp.linspace(-1, 1, 64, dtype=jnp.float32), "mxfp4")).all())
    True

    Source of the layouts: OCP Microscaling Formats 1.0 (2023), section 5; IEEE P3109; ml_dtypes.
    """
    options = (axis, scale, key, random_bits, saturate, spec)
    x, mode, scale, key, words, bits = _checked("encode", x, fmt, rounding, *options)
    if jnp.issubdtype(x.dtype, jnp.complexfloating):
        raise TypeError("encode: x is complex; encode x.real and x.imag.")
    width = _carrier.carrier(x.dtype).width
    if _element(mode.fmt).bits > width:
        raise ValueError(
            f"encode: codes of {_element(mode.fmt)!r} have {_element(mode.fmt).bits} bits, {x.dtype} is worked on with "
            f"{width}; encode a float64 array (jax_enable_x64)."
        )
    return _encode(x, scale, key, words, mode=mode, bits=bits)


@functools.partial(jax.jit, static_argnames=("mode", "bits"))
def _encode(x, scale, key, words, *, mode: Mode, bits: int) -> QTensor:
    _, parts = quantize(_carrier.widen(x), mode, scale=scale, random=random(x, key, words, bits, mode.split))
    return _stored(parts, mode.fmt, x, mode)


def _stored(parts: Parts, fmt: Format, x, mode: Mode) -> QTensor:
    element, c = _element(fmt), _carrier.carrier(x.dtype)
    codes = elementwise(_codes, parts.elements, element, parts.shift, c)
    scales, zero_points, level = [], [], fmt
    for scale in parts.scales:
        assert isinstance(level, Scaled)
        scales.append(_stored(Parts(scale), level.scale, scale, mode))
        level = level.element
    for zero_point in parts.zero_points:
        assert isinstance(fmt, Scaled) and fmt.zero_point is not None
        zero_points.append(_stored(Parts(zero_point), fmt.zero_point, zero_point, mode))
    axis = mode.axis - x.ndim if mode.axis >= 0 and x.ndim else mode.axis
    length = x.shape[-1] if x.ndim else None
    packed = _packing.pack(jnp.atleast_1d(codes), element.bits)
    return QTensor(packed, tuple(scales), tuple(zero_points), fmt, length, x.dtype, axis)


def _codes(elements, fmt: Float | Fixed | Codebook, shift, c: Carrier):
    """Returns the codes of numbers that are ``2^shift`` times values of the format."""
    if isinstance(fmt, Codebook):
        return (elements.astype(jnp.uint32) + np.uint32(fmt.first_code)) & np.uint32(2**fmt.bits - 1)
    bits = _carrier.to_bits(elements, c)
    magnitude, negative = bits & c.uint(c.sign - 1), bits >= c.uint(c.sign)
    if _is_carrier(fmt, c) and isinstance(shift, int):
        return jnp.where(magnitude > c.uint(c.inf), c.uint(c.nan), bits)
    significand, unit = _carrier.decompose(magnitude, c)
    static, shift = isinstance(shift, int), jnp.asarray(shift, c.int)
    if isinstance(fmt, Fixed):
        integer = _shifted_left(significand, unit - shift - fmt.quantum_exponent, c)
        return jnp.where(negative, -integer, integer) & c.uint(2**fmt.bits - 1)

    if static and _is_coarse(fmt, c):
        # The sum of a subnormal number and 2^m of its spacings has it for its fraction, m the carrier's mantissa bits.
        ones = c.uint(fmt.quantum_exponent + c.mantissa_bits + c.bias << c.mantissa_bits)
        subnormal = _carrier.to_bits(_carrier.from_bits(magnitude, c) + _carrier.from_bits(ones, c), c) - ones
        finer = c.mantissa_bits - fmt.mantissa_bits
        normal = (magnitude >> finer) - c.uint((c.bias - fmt.bias) << fmt.mantissa_bits)
        code = jnp.where(magnitude < c.uint(fmt.emin + c.bias << c.mantissa_bits), subnormal, normal)
    else:
        exponent = jnp.maximum(_carrier.exponent(magnitude, c) - shift, fmt.emin)
        integer = _shifted_left(significand, unit - shift - (exponent - fmt.mantissa_bits), c)
        # A normal number has its hidden bit in the integer: it is the 1 of the exponent field.
        place = (exponent - fmt.emin).astype(c.uint) << fmt.mantissa_bits
        code = place + integer
    if fmt.subnormals == "normal":
        code = jnp.where(magnitude == 0, c.uint(0), code - c.uint(2**fmt.mantissa_bits))
    if fmt.has_inf:
        code = jnp.where(magnitude == c.uint(c.inf), c.uint(fmt.max_code + 1), code)
    if fmt.signed:
        code = jnp.where(negative, code | c.uint(1 << (fmt.bits - 1)), code)
    if fmt.has_nan:
        code = jnp.where(magnitude > c.uint(c.inf), c.uint(_nan_code(fmt)), code)
    return code


def _shifted_left(x, places, c: Carrier):
    """Returns ``x 2^places`` for exact shifts either way; one of the two shifts is out of range and gives 0."""
    return x << places.astype(c.uint) | x >> (-places).astype(c.uint)


def _nan_code(fmt: Float) -> int:
    if fmt.specials == "ieee":
        return fmt.max_code + 1 + 2 ** (fmt.mantissa_bits - 1)
    if fmt.specials == "fn":
        return fmt.max_code + 1
    return 1 << (fmt.bits - 1) if fmt.signed else fmt.max_code + 2


def decode(q: Any) -> Any:
    """Returns the array that a ``QTensor`` stores, in the dtype that was encoded; of a tree, that with all decoded.

    Under ``vmap`` a QTensor decodes as it was encoded. Codes that stand for no value (a NaN, an unused code of a
    codebook) decode to NaN; the unused subnormal codes of a format without subnormals to zero. What is no QTensor in a
    tree stays as it is.

    >>> import jax.numpy as jnp, qjax
    >>> qjax.decode(qjax.encode(jnp.array([0.1, 20.0], jnp.float32), "q4.4"))
    Array([0.125 , 7.9375], dtype=float32)
    """
    return jax.tree.map(lambda x: _decode(x) if is_qtensor(x) else x, q, is_leaf=is_qtensor)


def is_qtensor(x: Any) -> bool:
    """Returns whether x is a ``QTensor``: what is a leaf where trees are mapped over."""
    return isinstance(x, QTensor)


@jax.jit
def _decode(q: QTensor):
    c = _carrier.carrier(q.dtype)
    x = _carrier.narrow(_hold(_assembled(*_parts(q), q.fmt, q, c), q.dtype), q.dtype)
    return x if q.rows is None else q.rows.undone(x)


def decode_apart(q: QTensor) -> tuple[Any, Any]:
    """Returns what ``quantize_apart`` gave of an array that is stored in a ``Scaled`` format, as it was laid out."""
    fmt, c = q.fmt, _carrier.carrier(q.dtype)
    assert isinstance(fmt, Scaled)
    codes, (scale, *scales), zero_points = _parts(q)
    elements = _assembled(codes, scales, [], fmt.element, q, c)
    if zero_points:
        elements = elements - blocks_of(fmt, q.shape_of_codes, q.axis).spread(zero_points[0])
    return elements, scale


def _parts(q: QTensor) -> tuple[Any, list, list]:
    """Returns the codes, one an element, and the scales and zero points as numbers."""
    c = _carrier.carrier(q.dtype)
    length = 1 if q.length is None else q.length
    codes = _packing.unpack(q.codes, q.element.bits, length, c.uint).reshape(q.shape_of_codes)
    scales, zero_points = ([_carrier.widen(_decode(x)) for x in parts] for parts in (q.scales, q.zero_points))
    return codes, scales, zero_points


def _assembled(codes, scales: list, zero_points: list, fmt: Format, q: QTensor, c: Carrier):
    if not isinstance(fmt, Scaled):
        return _values(codes, fmt, 0, c)
    blocks = blocks_of(fmt, q.shape_of_codes, q.axis)
    scale = blocks.spread(scales[0] if _is_carrier(fmt.scale, c) else once_per_block(scales[0]))
    if fmt.shifts:
        assert isinstance(fmt.element, Float | Fixed)
        shift = _carrier.exponent(_carrier.to_bits(scale, c), c)
        return jnp.where(jnp.isnan(scale), c.float(np.nan), _values(codes, fmt.element, shift, c))
    value = _assembled(codes, scales[1:], zero_points, fmt.element, q, c)
    if zero_points:
        value = value - blocks.spread(zero_points[0])
    return multiply(value, scale)


def _values(codes, fmt: Float | Fixed | Codebook, shift, c: Carrier):
    """Returns ``2^shift`` times the values of codes."""
    if isinstance(fmt, Codebook):
        position = (codes - c.uint(fmt.first_code)) & c.uint(2**fmt.bits - 1)
        with np.errstate(over="ignore", under="ignore"):
            table = fmt.values().astype(c.float)
        table = np.concatenate([table, np.full(2**fmt.bits - len(table), np.nan, c.float)])
        # Looked up as bits: XLA would keep both the number and its bits, 4 bytes an element each.
        return _carrier.from_bits(jnp.asarray(table.view(c.uint))[position], c)
    return elementwise(_value, codes, fmt, shift, c)


def _value(codes, fmt: Float | Fixed, shift, c: Carrier):
    if isinstance(fmt, Fixed):
        up = c.width - fmt.bits
        integer = (codes << up).astype(c.int) >> up if fmt.signed else codes
        size = jnp.where(integer < 0, -integer, integer).astype(c.uint)
        bits = _carrier.compose(size, shift - fmt.fraction_bits, c)
        return _carrier.from_bits(jnp.where(integer < 0, bits | c.uint(c.sign), bits), c)

    if _is_carrier(fmt, c) and isinstance(shift, int):
        return _carrier.from_bits(codes, c)
    negative = (codes >> (fmt.bits - 1) == 1) if fmt.signed else jnp.zeros_like(codes, dtype=bool)
    code = codes & c.uint(2 ** (fmt.exponent_bits + fmt.mantissa_bits) - 1)
    if isinstance(shift, int) and _is_coarse(fmt, c):
        normal = (code << (c.mantissa_bits - fmt.mantissa_bits)) + c.uint((c.bias - fmt.bias) << c.mantissa_bits)
        subnormal = code.astype(c.int).astype(c.float) * c.float(2.0**fmt.quantum_exponent)
        bits = jnp.where(code < c.uint(2**fmt.mantissa_bits), _carrier.to_bits(subnormal, c), normal)
        return _signed(bits, code, codes, negative, fmt, c)
    field = (code >> fmt.mantissa_bits).astype(c.int)
    fraction = code & c.uint(2**fmt.mantissa_bits - 1)
    hidden = c.uint(2**fmt.mantissa_bits)
    if fmt.subnormals == "normal":
        integer = fraction | hidden
        if fmt.has_zero:
            integer = jnp.where(code == 0, c.uint(0), integer)
    else:
        beneath = fraction if fmt.subnormals else jnp.zeros_like(fraction)
        integer = jnp.where(field > 0, fraction | hidden, beneath)
        field = jnp.maximum(field, 1)
    bits = _carrier.compose(integer, field - (fmt.bias + fmt.mantissa_bits) + shift, c)
    return _signed(bits, code, codes, negative, fmt, c)


def _is_carrier(fmt: Float | Fixed, c: Carrier) -> bool:
    """Returns whether the codes of a format are the bit patterns of the carrier."""
    return fmt == (FP64 if c.width == 64 else FP32)


def _is_coarse(fmt: Float, c: Carrier) -> bool:
    """Returns whether all values of a format with subnormals are normal numbers of the carrier, which is finer."""
    in_range = fmt.quantum_exponent > -c.bias and math.frexp(fmt.max)[1] <= c.bias
    return fmt.subnormals is True and in_range and 0 < fmt.mantissa_bits < c.mantissa_bits


def _signed(bits, code, codes, negative, fmt: Float, c: Carrier):
    """Returns magnitudes with the sign, the infinities and NaNs of their codes."""
    if fmt.has_inf:
        bits = jnp.where(code == c.uint(fmt.max_code + 1), c.uint(c.inf), bits)
    bits = jnp.where(negative, bits | c.uint(c.sign), bits)
    first_nan = fmt.max_code + 1 + fmt.has_inf
    nan = code >= c.uint(first_nan) if fmt.has_nan else jnp.zeros_like(negative)
    if fmt.specials in ("fnuz", "extended") and fmt.signed:
        nan = codes == c.uint(_nan_code(fmt))
    return _carrier.from_bits(jnp.where(nan, c.uint(c.nan), bits), c)
