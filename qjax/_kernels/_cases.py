"""Every kind of operands that the kernels take, for tests, benchmarks and tuning: a new one joins with a row."""

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from qjax._accumulator import Accumulator
from qjax._encode import encode
from qjax._kernels._operands import Coded, Unrounded, carried
from qjax._kernels._reference import accumulate, dot
from qjax._quantizer import Quantizer
from qjax.formats import Fixed, format


class Case(NamedTuple):
    """A kind of operands, and the accumulator.

    Attributes:
      letter: of which kernel of the table in docs/kernels.md.
      dtype: of lhs, and of rhs if it is no codes.
      accumulator: if it promotes, with scales of what is promoted.
      weights: the format of the codes of rhs.
      chop: the format that lhs is rounded to.
    """

    letter: str
    dtype: str
    accumulator: Accumulator
    weights: str | None = None
    chop: str | None = None

    @property
    def name(self) -> str:
        """What tests and tables call it."""
        a = self.accumulator
        fmt = f"{a.fmt.overflow}{a.fmt.bits}" if isinstance(a.fmt, Fixed) else repr(a.fmt).replace(" ", "")
        parts = [self.letter, self.dtype, self.weights or "", self.chop and f"to-{self.chop}", fmt, a.rounding.value]
        parts += [f"chunk{a.chunk}", f"promote{a.promote}" if a.promote else "", "detect" if a.detect else ""]
        return "-".join(part for part in parts if part)

    @property
    def shapes(self) -> tuple[tuple[int, int, int], ...]:
        """Shapes (m, n, k) that it is compiled for: of a layer in training, and in decoding where rhs is weights."""
        if self.weights is None:
            return (128, 128, 1024), (70, 200, 1000)
        return (1, 1024, 2048), (16, 1024, 2048), (64, 1000, 2048)

    def operands(self, m: int, n: int, k: int, *, batch: int = 1, exact: bool = False, seed: int = 0):
        """Returns (lhs, rhs, {key and scales if there are such}): normal numbers, or such that all sums are exact."""
        random = np.random.default_rng(seed)
        dtype, lowest, size = jnp.dtype(self.dtype), 0, 0
        if jnp.issubdtype(dtype, np.integer):
            bits = 8 * dtype.itemsize - (3 if self.accumulator.watches and dtype.itemsize == 2 else 0)
            lowest, size = -(2 ** (bits - 1)), 2 ** (bits - 1)
        elif exact:
            lowest, size = -7, 8

        def rows(*shape):
            x = random.integers(lowest, size, shape) if size else random.standard_normal(shape, np.float32)
            return jnp.asarray(x).astype(dtype)

        lhs, rhs, options = rows(batch, m, k), rows(batch, n, k), {}
        if self.chop is not None:
            lhs = Unrounded(lhs, Quantizer(self.chop))
        if self.weights is not None:
            values = 3 * random.standard_normal((batch, n, k), np.float32)
            stored = encode(jnp.asarray(np.rint(values) if exact else values), self.weights)
            rhs = Coded(stored.codes, stored.element)
        if self.accumulator.promote:
            count = -(-k // self.accumulator.promote)
            scales = (random.integers(-2, 3, (batch, rows, count)) for rows in (m, n))
            options["scales"] = tuple(jnp.asarray(2.0**s, jnp.float32) for s in scales)
        if self.accumulator.is_stochastic:
            options["key"] = jax.random.key(seed)
        return lhs, rhs, options

    def apart(self, lhs, rhs, scales=None, **_):
        """Returns how far sums of exact operands may lie apart in two orders: 0 where float32 holds them.

        Values of NF4 have 24 bits. Of the c products of a chunk each order gives the sum within ``c 2^-24`` of the sum
        of their magnitudes, and the s sums of chunks within another ``s 2^-24``.
        """
        if self.weights != "nf4":
            return 0
        x, y = (jnp.abs(z) for z in carried(lhs, rhs))
        sizes = accumulate(x, y, self.accumulator, scales=scales)
        return 2 * (self.accumulator.chunk - -x.shape[-1] // self.accumulator.chunk) * 2.0**-24 * sizes

    def bound(self, lhs, rhs) -> np.ndarray:
        """Returns how far the sums of a ``Float`` register may lie apart with chunks summed in two orders.

        A chunk of c products in two orders differs by ``2 c 2^-24 sum |x y|``. Rounding is monotonous: the register's
        sums differ by what they did before, plus that, plus one spacing of the register at the sum of all magnitudes.
        """
        x, y = (jnp.abs(z).astype(np.float32) for z in carried(lhs, rhs))
        sizes, chunk = np.asarray(dot(x, y), np.float64), self.accumulator.chunk
        spacing = 2.0 ** (np.floor(np.log2(sizes)) - self.accumulator.fmt.mantissa_bits)
        return 2 * chunk * 2.0**-24 * sizes + -(-x.shape[-1] // chunk) * spacing


def _fixed(bits: int, overflow: Literal["wrap", "saturate"], **options) -> Accumulator:
    return Accumulator(Fixed(bits, 0, overflow=overflow), **options)


_TWO_LEVELS = Accumulator("fp32", chunk=128, promote=128)
_WEIGHTS = ("int4", "uint4", "e2m1", "nf4", "int8", "e4m3")
assert all(format(name).bits in (4, 8) for name in _WEIGHTS)

CASES = (
    *(Case("a", "bfloat16", Accumulator("bf16", chunk=chunk)) for chunk in (16, 32, 64, 128, 256)),
    Case("a", "bfloat16", Accumulator("fp16", chunk=64)),
    Case("a", "bfloat16", Accumulator("e5m6", "toward_zero", chunk=64)),
    Case("a", "bfloat16", Accumulator("e5m6", "stochastic", chunk=64)),
    Case("a", "float16", Accumulator("fp16", chunk=64)),
    Case("a", "float32", Accumulator("fp16", chunk=64)),
    Case("a", "float8_e4m3fn", Accumulator("e6m9", chunk=64)),
    Case("a", "float8_e5m2", Accumulator("e6m9", chunk=64)),
    Case("a", "int8", _fixed(16, "wrap", chunk=64)),
    Case("a", "int8", _fixed(18, "saturate", chunk=64)),
    Case("a", "int8", _fixed(18, "saturate", chunk=64, detect=True)),
    *(Case("b", "bfloat16", _TWO_LEVELS, weights=name) for name in _WEIGHTS),
    Case("c", "int16", _fixed(32, "wrap", chunk=64)),
    Case("c", "int16", _fixed(28, "saturate", chunk=64)),
    Case("c", "int16", _fixed(32, "wrap", chunk=64, promote=256)),
    Case("d", "bfloat16", _TWO_LEVELS),
    Case("d", "float8_e4m3fn", _TWO_LEVELS),
    Case("d", "float8_e5m2", _TWO_LEVELS),
    Case("d", "int8", _fixed(32, "wrap", chunk=128, promote=128)),
    Case("e", "float32", Accumulator("fp32", chunk=128), chop="e4m3"),
    Case("e", "bfloat16", Accumulator("fp32", chunk=128), chop="e4m3"),
    Case("e", "bfloat16", Accumulator("bf16", chunk=64), chop="e5m2"),
)
