"""``Quantizer``: a format with the way to round to it, and the gradient that stands for rounding."""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Inexact

from qjax import _carrier
from qjax._blocks import blocks_of
from qjax._chop import RoundingLike, _array, _rounding_named, chop
from qjax._encode import QTensor, decode, encode
from qjax._faults import Faults
from qjax._modes import Rounding
from qjax._scaled import Mode, quantize
from qjax._split import Split, split_of
from qjax.formats import Codebook, Fixed, Float, Format, Scaled, format

Estimator = Callable[[Array, Array, Array, Array, Array], Array]


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class StraightThrough:
    """The estimator that takes rounding for the identity: its derivative is 1 everywhere.

    An estimator is any hashable callable ``derivative(x, value, low, high, step)``: the numbers, what they were rounded
    to, the range that their block can hold and the spacing below ``high``, all arrays that broadcast to the shape of x.
    What it returns, numbers or truth values, multiplies the gradient.

    Source: Bengio, Leonard, Courville (2013), https://arxiv.org/abs/1308.3432.
    """

    def __call__(self, x, value, low, high, step):
        return jnp.ones_like(x)


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Clipped:
    """The straight-through estimator up to ``margin`` steps beyond the range, and 0 where x was clipped by more.

    Source: Hubara et al. (2016), Binarized neural networks, https://arxiv.org/abs/1602.02830, equation 4.
    """

    margin: float = 0.0

    def __call__(self, x, value, low, high, step):
        return (x >= low - self.margin * step) & (x <= high + self.margin * step)


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class TrustMasked:
    """The estimator that passes the gradient only where rounding moved x by at most ``steps`` of the last spacing.

    With rounding to nearest and ``steps`` = 1/2 these are all x but those that lie over half a step outside the range.

    Source: Panferov et al. (2025), QuEST, https://arxiv.org/abs/2502.05003, section 3.2.
    """

    steps: float = 0.5

    def __call__(self, x, value, low, high, step):
        return jnp.abs(value - x) <= self.steps * step


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Quantizer:
    """A format, how to round to it, and the gradient of doing so; callable on an array.

    Args:
      fmt: a format or its name.
      rounding: a ``Rounding`` or its name.
      saturate: whether overflow gives the largest value, as ``chop`` says.
      estimator: the derivative that stands for that of rounding: ``StraightThrough()``, ``Clipped()``,
        ``TrustMasked()`` or a callable of your own (see ``StraightThrough``).
      faults: ``Faults`` that strike the codes, None for none. The value is that of the codes with faults, the gradient
        that of the estimator; with respect to a given scale there is none then.
      spec: as in ``chop``; in a product the operand is that of lax, ``Recipe.sharded`` gives each its own.

    Raises:
      TypeError, ValueError: if an argument is none of these; for faults with a ``spec``, which are those of a device.

    >>> import jax, jax.numpy as jnp, qjax
    >>> q = qjax.Quantizer("int4", estimator=qjax.Clipped())
    >>> x = jnp.array([2.4, 9.0], jnp.float32)
    >>> q(x), jax.grad(lambda x: q(x).sum())(x)
    (Array([2., 7.], dtype=float32), Array([1., 0.], dtype=float32))
    """

    fmt: Format
    rounding: Rounding
    saturate: bool
    estimator: Estimator
    faults: Faults | None
    spec: PartitionSpec | None

    def __init__(
        self,
        fmt: Format | str,
        rounding: RoundingLike = Rounding.NEAREST_EVEN,
        *,
        saturate: bool = True,
        estimator: Estimator = StraightThrough(),
        faults: Faults | None = None,
        spec: PartitionSpec | None = None,
    ):
        if not callable(estimator):
            raise TypeError(f"Quantizer: estimator must be callable, got {estimator!r}; use qjax.StraightThrough().")
        if not isinstance(faults, Faults | None):
            raise TypeError(f"Quantizer: faults must be a qjax.Faults or None, got {faults!r}.")
        split_of("Quantizer", spec, 0 if spec is None else len(spec))
        if faults is not None and spec is not None:
            raise ValueError("Quantizer: faults strike the memory of a device, whatever the mesh; leave spec out.")
        for name, value in (
            ("fmt", format(fmt)),
            ("rounding", _rounding_named("Quantizer", rounding)),
            ("saturate", saturate),
            ("estimator", estimator),
            ("faults", faults),
            ("spec", spec),
        ):
            object.__setattr__(self, name, value)

    @property
    def is_stochastic(self) -> bool:
        """Whether it needs a key."""
        return self.rounding.is_stochastic or (self.faults is not None and self.faults.is_stochastic)

    def __call__(
        self, x: Inexact[Array, "*shape"], *, axis: int = -1, key: Array | None = None, scale: Array | None = None
    ) -> Inexact[Array, "*shape"]:
        """Returns ``chop(x, fmt, ...)``, with the gradient of the estimator.

        Raises:
          TypeError, ValueError: as ``chop`` does.
        """
        if isinstance(self.estimator, StraightThrough) and self.faults is None:
            return chop(x, self.fmt, self.rounding, **self._options(axis, key, scale))
        x = _array("Quantizer", x)
        return _estimated(x, key, scale, self, axis)

    def encode(
        self, x: Inexact[Array, "*shape"], *, axis: int = -1, key: Array | None = None, scale: Array | None = None
    ) -> tuple[QTensor, Array]:
        """Returns x in real storage, and how many of its bits the faults changed (int32).

        ``decode`` of it is what the Quantizer called on x gives, with the same key.

        Raises:
          TypeError, ValueError: as ``qjax.encode`` and ``Faults.strike`` do.

        >>> import jax, jax.numpy as jnp, qjax
        >>> stored, changed = qjax.Quantizer("e2m1", faults=qjax.Faults(1.0, bits=(3,))).encode(
        ...     jnp.ones(5, jnp.float32), key=jax.random.key(0))
        >>> qjax.decode(stored), int(changed)
        (Array([-1., -1., -1., -1., -1.], dtype=float32), 5)
        """
        draws, struck = self.keys(key)
        q = encode(x, self.fmt, self.rounding, **self._options(axis, draws, scale))
        return (q, jnp.zeros((), jnp.int32)) if self.faults is None else self.faults.strike(q, key=struck)

    def _options(self, axis: int, key, scale) -> dict[str, Any]:
        return {"axis": axis, "key": key, "scale": scale, "saturate": self.saturate, "spec": self.spec}

    def keys(self, key: Array | None) -> tuple[Array | None, Array | None]:
        """Returns the key that rounding draws from, that of no faults, and the key of the faults; None where unused.

        Raises:
          ValueError: for a key that nothing would use.
        """
        if self.faults is None:
            return key, None
        if key is not None and not self.is_stochastic:
            raise ValueError("Quantizer: key was given, but the rounding draws nothing and the faults have a seed.")
        struck = jax.random.fold_in(key, 1) if key is not None and self.faults.is_stochastic else None
        return key if self.rounding.is_stochastic else None, struck


@functools.partial(jax.custom_jvp, nondiff_argnums=(3, 4))
def _estimated(x, key, scale, quantizer: Quantizer, axis: int):
    q = quantizer
    if q.faults is not None:
        return decode(q.encode(x, axis=axis, key=key, scale=scale)[0])
    return chop(x, q.fmt, q.rounding, **q._options(axis, key, scale))


@_estimated.defjvp
def _estimated_jvp(quantizer: Quantizer, axis: int, primals, tangents):
    x, key, scale = primals
    value, split = _estimated(x, key, scale, quantizer, axis), split_of("Quantizer", quantizer.spec, x.ndim)
    return value, derivative(quantizer, x, value, axis, scale, split).astype(x.dtype) * tangents[0]


def derivative(quantizer: Quantizer, x, value, axis: int, scale=None, split: Split = ()):
    """Returns the derivative that the estimator of a quantizer gives, in the shape of x."""
    low, high, step = _range(x, quantizer.fmt, axis, scale, split)
    wide = _carrier.widen(x)
    return quantizer.estimator(wide, _carrier.widen(value), low, high, step)


def _range(x, fmt: Format, axis: int, scale, split: Split = ()):
    """Returns the lowest and the largest value that the block of each element can hold, and the spacing below it."""
    dtype = _carrier.widen(x).dtype
    if not isinstance(fmt, Scaled):
        low = fmt.min if isinstance(fmt, Fixed | Codebook) else -fmt.max if fmt.signed else 0.0
        if isinstance(fmt, Float):
            step = math.ldexp(1.0, fmt.emax - fmt.mantissa_bits)
        else:
            step = fmt.eps if isinstance(fmt, Fixed) else fmt.table[-1] - fmt.table[-2]
        return tuple(jnp.full_like(x, end, dtype=dtype) for end in (low, fmt.max, step))
    mode = Mode(fmt, Rounding.NEAREST_EVEN, axis, True, x.dtype, split)
    _, parts = quantize(_carrier.widen(x), mode, scale=scale)
    shared = jnp.ones_like(x, dtype=dtype)
    level: Format = fmt
    for level_scale in parts.scales:
        assert isinstance(level, Scaled)
        shared = shared * blocks_of(level, x.shape, axis).spread(level_scale)
        level = level.element
    ends = _range(x, level, axis, None)
    if parts.zero_points:
        zero = blocks_of(fmt, x.shape, axis).spread(parts.zero_points[0])
        ends = (ends[0] - zero, ends[1] - zero, ends[2])
    return tuple(end * shared for end in ends)
