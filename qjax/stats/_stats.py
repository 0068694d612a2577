"""``Stats``: what rounding does to a tensor, as counts and sums that add up, and the statistics made of them."""

import dataclasses
import functools
import math
from collections.abc import Iterable
from typing import Any

import jax
import numpy as np

from qjax import _carrier
from qjax.formats import Format

PER_OCTAVE = 8
"""Bins of the histograms between a power of two and the next one: at 1, 9/8, 10/8 ... 15/8 of it."""
SLOT = 32
"""The exponents that share an entry of the sums."""
COUNTS = ("size", "zeros", "nans", "infinities", "underflows", "saturations", "to_nan", "to_infinity")


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["counts", "magnitudes", "errors", "squares", "fourths", "noise"],
    meta_fields=["fmt"],
)
@dataclasses.dataclass(frozen=True)
class Stats:
    """Counts and sums over a tensor x and its rounding q; every field adds up over parts of a tensor.

    The fields are arrays and cross jit, scan and ``jax.tree.map``. The properties are computed from them on the host,
    in float64, and may be asked of concrete arrays only. ``total`` adds many of them exactly.

    Attributes:
      counts: of the elements, int32, in the order of ``COUNTS``: all; x zero; NaN; infinite; x finite and not zero but
        q zero ("underflows"); "saturations" as ``measure`` says; x not NaN but q NaN; x finite but q infinite.
      magnitudes: a histogram of finite nonzero |x|, int32: eight bins of equal width from each power of two to the
        next, from the smallest subnormal of the carrier (float32, or float64 for float64 arrays) to its largest number.
      errors: a histogram of |q - x| / |x| over finite nonzero x, int32: errors of 0, then eight bins to the octave,
        then errors of 128 and more.
      squares, fourths, noise: the sums of x^2, x^4 and (q - x)^2 over finite x. An entry has the sums of the tensors
        whose largest exponent falls to it, with a power of two taken out.
      fmt: the format.
    """

    counts: Any
    magnitudes: Any
    errors: Any
    squares: Any
    fourths: Any
    noise: Any
    fmt: Format

    def count(self, name: str) -> int:
        """Returns one of the counts, by its name in ``COUNTS``."""
        return int(np.asarray(self.counts)[COUNTS.index(name)])

    def share(self, name: str) -> float:
        """Returns a count over the number of elements, NaN if there are none."""
        return self.count(name) / self.count("size") if self.count("size") else math.nan

    @property
    def _carrier(self) -> _carrier.Carrier:
        # Not by the dtype: total makes all sums float64.
        return next(
            c for c in map(_carrier.carrier, (np.float32, np.float64)) if sizes(c)["squares"] == len(self.squares)
        )

    @property
    def sqnr(self) -> float:
        """The signal to noise ratio ``10 log10(sum x^2 / sum (q - x)^2)`` in dB, over finite x.

        Infinity if there is no noise, also where there is no signal; -infinity for noise without signal.
        """
        (signal, up), (noise, down) = self._sum(self.squares, 2), self._sum(self.noise, 2)
        if noise == 0 or signal == 0:
            return math.inf if noise == 0 else -math.inf
        return 10 * (math.log10(signal) - math.log10(noise) + (up - down) * math.log10(2))

    @property
    def rms(self) -> float:
        """The root mean square of the finite x; NaN if there are none."""
        return math.ldexp(*self._rms) if self._finite else math.nan

    @property
    def _finite(self) -> int:
        return self.count("size") - self.count("nans") - self.count("infinities")

    @property
    def _rms(self) -> tuple[float, int]:
        """The root mean square as (value, exponent): it may be a subnormal of the carrier, its square not even that."""
        square, exponent = self._sum(self.squares, 2)
        return math.sqrt(square / self._finite), exponent // 2

    @property
    def kurtosis(self) -> float:
        """The kurtosis about zero of the finite x, ``n sum x^4 / (sum x^2)^2``; NaN if they are all zero.

        1 if all have the same magnitude, 3 for a normal distribution around zero, n for one outlier among zeros. It is
        taken about zero, as the range of a format is: an offset costs range too.
        """
        (square, up), (fourth, upper) = self._sum(self.squares, 2), self._sum(self.fourths, 4)
        return math.ldexp(self._finite * fourth / square**2, upper - 2 * up) if square else math.nan

    def outliers(self, factor: float = 6.0) -> float:
        """Returns the share of the elements that are finite and at least ``factor`` times the root mean square.

        The threshold is the first edge of a bin of ``magnitudes`` at or above that, so at most 1/8 higher.
        """
        if not self._finite or not np.any(np.asarray(self.squares)):
            return 0.0 if self.count("size") else math.nan
        value, exponent = self._rms
        fraction, more = math.frexp(factor * value)
        lowest = self._lowest
        edge = PER_OCTAVE * (more - 1 + exponent - lowest) + math.ceil((2 * fraction - 1) * PER_OCTAVE)
        return int(np.asarray(self.magnitudes)[max(edge, 0) :].sum()) / self.count("size")

    def error_quantile(self, q: float) -> float:
        """Returns what the relative error ``|q - x| / |x|`` stays below in a share q of the finite nonzero elements.

        It is the end of a bin: above the quantile of nearest rank by at most 1/8 of it. 0 if so many have no error,
        infinity for errors of 128 and more, NaN if there are no such elements.
        """
        errors = np.cumsum(np.asarray(self.errors, np.int64))
        if errors[-1] == 0:
            return math.nan
        place = int(np.searchsorted(errors, max(q * errors[-1], 1)))
        if place in (0, len(errors) - 1):
            return 0.0 if place == 0 else math.inf
        octave, eighth = divmod(place, PER_OCTAVE)
        return math.ldexp(1 + eighth / PER_OCTAVE, octave + lowest_error(self._carrier))

    @property
    def exponents(self) -> tuple[np.ndarray, np.ndarray]:
        """The exponents ``floor(log2 |x|)`` from the lowest to the highest there is, and how many x have each."""
        counts = np.asarray(self.magnitudes, np.int64).reshape(-1, PER_OCTAVE).sum(1)
        there = np.flatnonzero(counts)
        first, last = (there[0], there[-1] + 1) if len(there) else (0, 0)
        return np.arange(first, last) + self._lowest, counts[first:last]

    @property
    def _lowest(self) -> int:
        return lowest_exponent(self._carrier)

    def _sum(self, slots, power: int) -> tuple[float, int]:
        """Returns a sum as (value, exponent)."""
        values = np.asarray(slots, np.float64)
        there = np.flatnonzero(values)
        if not len(there):
            return 0.0, 0
        top = int(there[-1])
        total = sum(math.ldexp(values[k], power * SLOT * (int(k) - top)) for k in there)
        return total, power * (slot_exponent(self._carrier) + SLOT * top)

    def summary(self) -> dict[str, float]:
        """Returns the statistics by name: the row of a table.

        >>> import jax.numpy as jnp
        >>> from qjax import stats
        >>> x = jnp.array([0.0, 1e-9, 0.3, 5.0, 1e6], jnp.float32)
        >>> row = stats.measure(x, "e4m3", saturate=True).summary()
        >>> row["size"], row["zeros"], row["underflows"], row["saturations"]
        (5, 0.2, 0.2, 0.2)
        """
        exponents, _ = self.exponents
        return {
            "size": self.count("size"),
            "sqnr": self.sqnr,
            **{name: self.share(name) for name in COUNTS[1:]},
            "error_median": self.error_quantile(0.5),
            "error_99": self.error_quantile(0.99),
            "rms": self.rms,
            "kurtosis": self.kurtosis,
            "outliers": self.outliers(),
            "min_exponent": int(exponents[0]) if len(exponents) else math.nan,
            "max_exponent": int(exponents[-1]) if len(exponents) else math.nan,
        }


def lowest_exponent(c: _carrier.Carrier) -> int:
    """Returns the exponent of the smallest subnormal: that of the first bins of ``magnitudes``."""
    return 1 - c.bias - c.mantissa_bits


def lowest_error(c: _carrier.Carrier) -> int:
    """Returns the exponent of the first bins of ``errors``: no error but 0 is below half a unit in the last place."""
    return -c.mantissa_bits - 2


HIGHEST_ERROR = 7


def slot_exponent(c: _carrier.Carrier) -> int:
    """Returns the exponent of what the first slot counts in."""
    return lowest_exponent(c) + 3 * SLOT // 4


def sizes(c: _carrier.Carrier) -> dict[str, int]:
    """Returns the length of each field."""
    exponents = c.bias + 1 - lowest_exponent(c)
    slots = -(-exponents // SLOT)
    errors = PER_OCTAVE * (HIGHEST_ERROR - lowest_error(c)) + 2
    return {
        "counts": len(COUNTS),
        "magnitudes": PER_OCTAVE * exponents,
        "errors": errors,
        "squares": slots,
        "fourths": slots,
        "noise": slots,
    }


def total(parts: Iterable[Stats]) -> Stats:
    """Returns the statistics of many tensors, or parts of one, together; on the host, in int64 and float64.

    Raises:
      ValueError: if there are none, or they are of several formats or carriers.

    >>> import jax.numpy as jnp
    >>> from qjax import stats
    >>> x = jnp.arange(1, 9, dtype=jnp.float32)
    >>> together = stats.total([stats.measure(x[:3], "e2m1"), stats.measure(x[3:], "e2m1")])
    >>> together.sqnr == stats.measure(x, "e2m1").sqnr
    True
    """
    parts = list(parts)
    if not parts or any(p.fmt != parts[0].fmt or len(p.squares) != len(parts[0].squares) for p in parts):
        kinds = sorted({f"{p.fmt!r} of {len(p.squares)} slots" for p in parts})
        raise ValueError(f"total: expected statistics of one format and carrier, got {', '.join(kinds) or 'none'}.")

    def add(*leaves):
        exact = np.int64 if np.issubdtype(leaves[0].dtype, np.integer) else np.float64
        return np.sum([np.asarray(leaf, exact) for leaf in leaves], axis=0)

    return jax.tree.map(add, *parts)
