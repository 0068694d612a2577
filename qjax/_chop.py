"""``chop``: the values of an array rounded to a format, in the array's own dtype."""

import functools
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec
from jaxtyping import Array, Inexact, UInt

from qjax import _carrier, _modes, _random
from qjax._blocks import blocks_of
from qjax._mesh import in_auto_axes
from qjax._modes import Random, Rounding
from qjax._scaled import Mode, quantize
from qjax._split import Split, check_blocks, split_of
from qjax.formats import Fixed, Format, Scaled, format

RoundingLike = (
    Rounding
    | Literal[
        "nearest_even",
        "nearest_away",
        "nearest_zero",
        "nearest_odd",
        "toward_zero",
        "toward_positive",
        "toward_negative",
        "to_odd",
        "stochastic",
        "stochastic_b",
        "stochastic_c",
        "stochastic_equal",
    ]
)


def chop(
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
) -> Inexact[Array, "*shape"]:
    """Returns x rounded to the values of a format, with the shape and dtype of x.

    The result is the correctly rounded one: among the values of the format that the dtype of x holds, the one that the
    mode chooses, once, from the exact x. For a ``Scaled`` format see below.

    Args:
      x: float32, float64 (with jax_enable_x64), bfloat16 or float16; complex64 or complex128, by parts.
      fmt: a format or its name.
      rounding: a ``Rounding`` or its lower-case name.
      axis: the axis of the blocks of a ``Scaled`` format with an int or "axis" block.
      scale: for a ``Scaled`` format, scales to use instead of computed ones, one for each block (any shape that
        broadcasts to the number of blocks along every axis); their magnitude counts, rounded to nearest in the
        scale's format. May be traced.
        For nested formats these are the outermost scales.
      key: the PRNG key, for stochastic modes.
      random_bits: for stochastic modes, how many random bits an element gets (N of the modes' rules), by default all
        that fit: 32, or 64 in float64 (30 and 62 in "stochastic_b" and "stochastic_c"). Or the random words
        themselves, an unsigned array of the shape of x, of which every bit counts; then there is no key.
      saturate: whether overflow, infinities included, gives the largest value. Elements of ``Scaled`` formats and
        ``Fixed`` formats saturate in any case, as do formats without infinity and NaN.
      spec: under ``jax.shard_map``, or a vmap with a name, how x is split over mesh axes, as ``in_specs`` says it.
        The result is then that part of the result for the whole: scales that a tensor or an axis shares come from
        the maximum over the devices, and the random bits of an element from its place in the whole.

    Special values: a NaN stays one where the format has it (as the canonical positive quiet NaN); else it becomes the
    largest value, or 0 in ``Fixed``. Overflow of finite numbers gives infinity, or NaN in a format that has no
    infinity, except that "toward_zero", "to_odd" and the directed mode that points to zero give the largest value. A
    zero keeps its sign where the format has a negative zero. A negative number in an unsigned ``Float`` that does not
    round to 0 gives NaN (the lowest value when saturated, or without NaN). E8M0 has no zero: 0 and what lies below
    ``2^-127`` become ``2^-127``. Subnormals of the dtype count in full, also where XLA's arithmetic flushes them.

    Blocks: with scales that are powers of two and ``Float`` or ``Fixed`` elements, every element is rounded exactly on
    the scaled grid. Otherwise with scale s it is ``chop(x / s, element) * s``, one division and one product in
    float32 (or float64), in which subnormals count as zero and s is a normal number, or 0, which gives 0. A block of
    zeros gets the smallest scale. A block with a NaN or an infinity becomes NaN, if the scale's format has NaN.

    Gradient: straight-through, d chop / d x = 1, in forward and reverse mode. With respect to ``scale`` it is that of
    learned step sizes: ``element - x / s`` within the range of the element, and ``element`` beyond.

    Raises:
      TypeError: if x is no float array, or a float64 NumPy array while jax_enable_x64 is off.
      ValueError: for an unknown name, an axis that does not exist, a scale for an unscaled format, a missing key, a
        key that nothing would use, or blocks across devices.

    >>> import jax, jax.numpy as jnp, qjax
    >>> x = jnp.array([0.3, 300.0, 1e6, -1e-9], jnp.float32)
    >>> qjax.chop(x, "e4m3")
    Array([  0.3125, 288.    ,      nan,  -0.    ], dtype=float32)
    >>> qjax.chop(x, "e4m3", "toward_negative", saturate=True)
    Array([ 2.812500e-01,  2.880000e+02,  4.480000e+02, -1.953125e-03],      dtype=float32)
    >>> qjax.chop(x, "mxfp4", key=jax.random.key(0), rounding="stochastic").dtype
    dtype('float32')

    Sources: IEEE 754-2019, sections 4.3 and 7.4; OCP Microscaling Formats 1.0 (2023), section 6.3; Esser et al. (2020),
    Learned step size quantization, https://arxiv.org/abs/1902.08153, equation 3.
    """
    options = (axis, scale, key, random_bits, saturate, spec)
    x, mode, scale, key, words, bits = _checked("chop", x, fmt, rounding, *options)
    return _chop(x, scale, key, words, mode=mode, bits=bits)


def _checked(caller: str, x, fmt, rounding, axis: int, scale, key, random_bits, saturate: bool, spec=None):
    """Returns the operands of a call as arrays and its static part, or raises what is wrong with them."""
    fmt = format(fmt)
    rounding = _rounding_named(caller, rounding)
    x = _array(caller, x)
    width = 64 if x.dtype in (np.dtype(np.float64), np.dtype(np.complex128)) else 32
    if isinstance(fmt, Scaled):
        _check_axis(caller, fmt, x.shape, axis)
    if scale is not None:
        if not isinstance(fmt, Scaled):
            raise ValueError(f"{caller}: scale was given, but {fmt!r} has no scale; use a Scaled format, or divide x.")
        scale = jnp.asarray(scale)
        if not jnp.issubdtype(scale.dtype, jnp.floating):
            raise TypeError(f"{caller}: scale must be a float array, got {scale.dtype}.")
        counts = blocks_of(fmt, x.shape, axis).counts
        if len(scale.shape) > len(counts) or any(
            n not in (1, count) for n, count in zip(scale.shape[::-1], counts[::-1], strict=False)
        ):
            raise ValueError(
                f"{caller}: scale of shape {scale.shape} does not broadcast to {counts}, one for each block of {fmt!r}."
            )
        scale = _carrier.widen(scale).astype(np.float64 if width == 64 else np.float32)
    split = split_of(caller, spec, x.ndim)
    check_blocks(caller, fmt, x.shape, axis, split)
    if isinstance(fmt, Fixed) and fmt.overflow == "wrap" and fmt.bits > width:
        raise ValueError(
            f"{caller}: {fmt!r} wraps {fmt.bits} bits, more than the {width} that {x.dtype} is worked on with; "
            "use float64 (jax_enable_x64)."
        )
    words, bits = None, width
    if not rounding.is_stochastic:
        for name, value in (("key", key), ("random_bits", random_bits)):
            if value is not None:
                raise ValueError(
                    f"{caller}: {name} was given, but rounding {rounding.value!r} draws nothing; "
                    f"leave {name} out, or use rounding='stochastic'."
                )
    else:
        most = _modes.max_random_bits(rounding, width)
        if random_bits is None:
            bits = most
        elif isinstance(random_bits, int):
            bits = random_bits
        else:
            words = random_bits
            if words.shape != x.shape or not jnp.issubdtype(words.dtype, jnp.unsignedinteger):
                raise ValueError(
                    f"{caller}: random_bits must be an int or an unsigned array of shape {x.shape}, "
                    f"got {words.dtype}{list(words.shape)}."
                )
            bits = jnp.iinfo(words.dtype).bits
        if not 1 <= bits <= most:
            raise ValueError(
                f"{caller}: rounding {rounding.value!r} on {x.dtype} takes 1 to {most} random bits, got {bits}."
            )
        if (key is None) == (words is None):
            raise ValueError(
                f"{caller}: rounding {rounding.value!r} needs key=jax.random.key(...), or the random words themselves "
                f"as random_bits, got {'neither' if key is None else 'both'}."
            )
    return x, Mode(fmt, rounding, axis, saturate, x.dtype, split), scale, key, words, bits


def _rounding_named(caller: str, rounding) -> Rounding:
    try:
        return Rounding(rounding)
    except ValueError:
        raise ValueError(
            f"{caller}: unknown rounding {rounding!r}; expected one of {', '.join(r.value for r in Rounding)}."
        ) from None


_CARRIERS = frozenset(
    map(np.dtype, (jnp.float32, jnp.float64, jnp.bfloat16, jnp.float16, jnp.complex64, jnp.complex128))
)


def _array(caller: str, x) -> Array:
    if isinstance(x, jax.Array) and x.dtype in _CARRIERS:
        return x
    if isinstance(x, list | tuple):
        raise TypeError(f"{caller}: x must be an array, got a {type(x).__name__}; use jax.numpy.array.")
    dtype = x.dtype if isinstance(x, jax.Array) else np.result_type(x)
    if dtype not in _CARRIERS:
        raise TypeError(
            f"{caller}: x has dtype {dtype}; expected float32, float64, bfloat16, float16 or complex. "
            "Convert it, for example x.astype(jax.numpy.float32)."
        )
    if isinstance(x, np.ndarray | np.generic) and jax.dtypes.canonicalize_dtype(dtype) != dtype:
        raise TypeError(
            f"{caller}: x is a {dtype} NumPy array, which JAX would first round to 32 bits; convert it yourself, "
            "x.astype(numpy.float32), or set jax_enable_x64."
        )
    return jnp.asarray(x)


def _check_axis(caller: str, fmt: Scaled, shape: tuple[int, ...], axis: int) -> None:
    """Raises if the blocks of a format do not fit an array."""
    if isinstance(fmt.block, tuple):
        if len(fmt.block) > len(shape):
            raise ValueError(f"{caller}: tiles of {fmt.block} need {len(fmt.block)} axes, x has shape {shape}.")
        if axis != -1:
            raise ValueError(f"{caller}: axis={axis} was given, but tiles lie over the last axes; transpose x instead.")
    elif fmt.block is not None and not -len(shape) <= axis < max(len(shape), 1) and shape:
        raise ValueError(f"{caller}: axis {axis} does not exist in x of shape {shape}.")
    if isinstance(fmt.element, Scaled):
        _check_axis(caller, fmt.element, shape, axis)


@functools.partial(jax.jit, static_argnames=("mode", "bits"))
def _chop(x, scale, key, words, *, mode: Mode, bits: int):
    if jnp.issubdtype(x.dtype, jnp.complexfloating):
        part, parts, rows = mode._replace(dtype=x.real.dtype), (x.real, x.imag), (words, words)
        if key is not None:
            # The parts draw as two rows of one array, so that a key gives them different draws.
            both = random(jnp.stack(parts), key, None, bits, mode.split and ((), *mode.split))
            assert both is not None
            rows = both.words >> (both.words.itemsize * 8 - bits)
        return jax.lax.complex(*(_chop(p, scale, None, rows[i], mode=part, bits=bits) for i, p in enumerate(parts)))

    def value(x, scale, key, words):
        return _value(x, scale, random(x, key, words, bits, mode.split), mode)

    # Elements are rounded as they lie; blocks are reshaped.
    if isinstance(mode.fmt, Scaled):
        return in_auto_axes(value, jax.typeof(x).sharding, x, scale, key, words)
    return value(x, scale, key, words)


def random(x, key, words, bits: int, split: Split = ()) -> Random | None:
    """Returns the random words of a call, the bits at the top, or None if it is not stochastic."""
    c = _carrier.carrier(x.dtype)
    if words is not None:
        return Random(words.astype(c.uint) << (c.width - bits), bits)
    return None if key is None else Random(_random.random_words(key, x.shape, bits, c.width, split), bits)


@functools.partial(jax.custom_jvp, nondiff_argnums=(3,))
def _value(x, scale, random: Random | None, mode: Mode):
    value, _ = quantize(_carrier.widen(x), mode, scale=scale, random=random)
    return _carrier.narrow(value, x.dtype)


@_value.defjvp
def _value_jvp(mode: Mode, primals, tangents):
    x, scale, random = primals
    x_dot, scale_dot, _ = tangents
    value = _value(x, scale, random, mode)
    if scale is None:
        return value, x_dot
    return value, x_dot + _scale_tangent(x, value, scale, scale_dot, mode).astype(x_dot.dtype)


def _scale_tangent(x, value, scale, scale_dot, mode: Mode):
    """Returns ``(element - x / s) ds`` within the range of the element, ``element ds`` beyond."""
    fmt = mode.fmt
    assert isinstance(fmt, Scaled)
    blocks = blocks_of(fmt, x.shape, mode.axis)
    dtype = _carrier.widen(x).dtype
    s = blocks.spread(jnp.broadcast_to(scale.astype(dtype), blocks.counts))
    ds = blocks.spread(jnp.broadcast_to(scale_dot.astype(dtype), blocks.counts))
    inside = jnp.abs(x).astype(dtype) <= s * fmt.element.max
    return (value - jnp.where(inside, x, 0)).astype(dtype) / jnp.where(s == 0, np.inf, s) * ds
