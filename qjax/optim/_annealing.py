"""Bit-width annealing: a format by step, and fixed point whose word length is a traced array."""

import dataclasses
import functools
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float32, Int

from qjax._chop import RoundingLike, _rounding_named, chop
from qjax._modes import Rounding
from qjax.formats import E8M0, Fixed, Format, Scaled, format


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class BitWidthSchedule:
    """What ``bit_width_schedule`` returns: the formats by the first step of each, ascending."""

    boundaries: tuple[tuple[int, Format], ...]

    @property
    def formats(self) -> tuple[Format, ...]:
        """The distinct formats in order of appearance: as many as a step that takes one compiles programs."""
        return tuple(dict.fromkeys(fmt for _, fmt in self.boundaries))

    def __call__(self, step: int) -> Format:
        """Returns the format of a step.

        Raises:
          TypeError: if the step is no Python int.
          ValueError: if it is negative.
        """
        if not isinstance(step, int | np.integer):
            raise TypeError(
                f"bit_width_schedule: step must be a Python int, since a format is static, got {step!r}; "
                "for a traced word length use qjax.optim.chop_fixed."
            )
        if step < 0:
            raise ValueError(f"bit_width_schedule: step must be at least 0, got {step}.")
        return [fmt for first, fmt in self.boundaries if first <= step][-1]


def bit_width_schedule(formats: Mapping[int, Format | str]) -> BitWidthSchedule:
    """Returns the schedule ``step -> format`` that changes to ``formats[first]`` at step ``first``.

    It is hashable, and called with Python ints outside of jit; ``schedule.formats`` are the distinct formats. A
    function that is jitted and takes the format as an argument compiles once for each of them, and never again for one
    that comes back.

    Args:
      formats: formats, or their names, by the first step of each. Step 0 must be there.

    Raises:
      ValueError: if there is no step 0, or a negative one. The schedule itself raises for a step that is no Python int.

    >>> import qjax
    >>> schedule = qjax.optim.bit_width_schedule({0: "int8_tensor", 1000: "int6_tensor", 2000: "int4_tensor"})
    >>> schedule(999) == qjax.format("int8_tensor"), schedule(1000) == qjax.format("int6_tensor")
    (True, True)

    The counterpart of ``optax.piecewise_constant_schedule`` for formats.
    """
    steps = sorted(formats)
    if not steps or steps[0] != 0:
        raise ValueError(f"bit_width_schedule: formats must begin at step 0, got {steps}; add a format for 0.")
    return BitWidthSchedule(tuple((step, format(formats[step])) for step in steps))


def chop_fixed(
    x: Float32[Array, "*shape"] | np.ndarray,
    bits: int | Int[Array, ""],
    fraction_bits: int | Int[Array, ""] = 0,
    rounding: RoundingLike = Rounding.NEAREST_EVEN,
    *,
    key: Array | None = None,
) -> Float32[Array, "*shape"]:
    """Returns ``chop(x, Fixed(bits, fraction_bits), rounding, key=key)``, bit for bit, for traced word lengths.

    x is rounded to 32 bits with the scale ``2^-fraction_bits``, and the result clipped to the range of the word,
    ``[-2^(bits-1), 2^(bits-1) - 1] 2^-fraction_bits``. Rounding is monotone and leaves the ends of the range where they
    are, so this is saturation in every mode. Since both numbers are arrays, changing them compiles nothing; ``vmap``
    over them gives one array in several formats.

    Args:
      x: float32, of any shape.
      bits: the word length, 1 to 32.
      fraction_bits: binary places, -90 to 120. Traced numbers beyond these ranges give unspecified results.
      rounding, key: as in ``chop``.

    NaN becomes 0 and infinities saturate, as in ``Fixed``. The gradient is straight-through, as that of ``chop``.

    Raises:
      TypeError: if x is not float32, or a word length is no integer.
      ValueError: for Python ints out of range, and as ``chop`` does.

    >>> import jax.numpy as jnp, qjax
    >>> x = jnp.array([0.3, 5.7, -9.0], jnp.float32)
    >>> qjax.optim.chop_fixed(x, jnp.array(4), jnp.array(1))
    Array([ 0.5,  3.5, -4. ], dtype=float32)
    """
    x = jnp.asarray(x) if isinstance(x, np.ndarray) and x.dtype == np.float32 else x
    if not isinstance(x, jax.Array) or x.dtype != np.float32:
        raise TypeError(
            f"chop_fixed: x must be a float32 array, got {getattr(x, 'dtype', type(x).__name__)}; convert it."
        )
    for name, value, low, high in (("bits", bits, 1, 32), ("fraction_bits", fraction_bits, -90, 120)):
        if not jnp.issubdtype(jnp.result_type(value), jnp.integer):
            raise TypeError(f"chop_fixed: {name} must be an integer, got {jnp.result_type(value)}; round it.")
        if isinstance(value, int) and not low <= value <= high:
            raise ValueError(f"chop_fixed: {name} must be {low} to {high}, got {value}.")
    numbers = (jnp.asarray(number).astype(np.int32) for number in (bits, fraction_bits))
    return _jitted(x, *numbers, key, _rounding_named("chop_fixed", rounding))


@functools.partial(jax.jit, static_argnums=4)
def _jitted(x, bits, fraction_bits, key, rounding: Rounding):
    return _fixed(x, bits, fraction_bits, key, rounding)


@functools.partial(jax.custom_jvp, nondiff_argnums=(4,))
def _fixed(x, bits, fraction_bits, key, rounding: Rounding):
    step = jnp.ldexp(np.float32(1), -fraction_bits)
    end = jnp.ldexp(step, bits - 1)
    # The largest float32 of the word: beyond 24 bits they are further apart than a step.
    last = end - jnp.maximum(step, end * np.float32(2**-24))
    # Clipped last, since XLA's maximum flushes the subnormals of x, which directed modes must see.
    return jnp.clip(chop(x, Scaled(Fixed(32), E8M0, None), rounding, key=key, scale=step), -end, last)


@_fixed.defjvp
def _fixed_jvp(rounding: Rounding, primals, tangents):
    return _fixed(*primals, rounding), tangents[0]
