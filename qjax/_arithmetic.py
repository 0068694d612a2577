"""What becomes of each primitive operation of a program whose numbers are those of a format."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from qjax import _carrier, _operand, _sites, _sums, _to_odd
from qjax._jaxpr import Key, folded, is_literal
from qjax._modes import Rounding
from qjax._program import Quantized
from qjax._quantizer import Quantizer
from qjax._recipe import Recipe
from qjax.formats import Fixed, Float, Format

# Their results are numbers that their operands have, ...
MOVED = frozenset(
    "all_gather all_gather_invariant all_to_all approx_top_k broadcast_in_dim broadcast_to clamp complex concatenate "
    "copy copy_p cummax cummin device_put dynamic_slice dynamic_update_slice empty expand_dims gather imag "
    "layout_constraint max min name optimization_barrier pad pbroadcast pbroadcast_dynamic pmax pmin ppermute pvary "
    "real reduce_max reduce_min reduce_window_max reduce_window_min reduced_vary_cast reshape reshard rev scatter "
    "scatter-max scatter-min select_and_gather_add select_and_scatter select_n sharding_constraint slice sort split "
    "squeeze stack stop_gradient tie tile top_k transpose unstack vary_unreduced_cast "
    "with_memory_space_constraint".split()
)
# ... but for the sign.
SIGNED = frozenset(("abs", "conj", "neg"))
# One operation, one rounding. Of these, ...
ROUNDED = frozenset(
    "acos acosh add add_any asin asinh atan atan2 atanh bessel_i0e bessel_i1e bitcast_convert_type cbrt ceil "
    "convert_element_type cos cosh digamma div erf erf_inv erfc exp exp2 expm1 floor igamma igamma_grad_a igammac "
    "iota lgamma log log1p log2 logistic mul polygamma pow random_gamma reduce_precision "
    "regularized_incomplete_beta rem rng_uniform round rsqrt sign sin sinh sqrt square sub tan tanh zeta".split()
)
# ... these are exact in any dtype that holds the result, and ...
EXACT = frozenset("bitcast_convert_type ceil convert_element_type floor iota reduce_precision round sign".split())
# ... these can be rounded to odd first, so that what is rounded once is the exact result.
TO_ODD = {
    "add": _to_odd.add,
    "add_any": _to_odd.add,
    "div": _to_odd.divide,
    "mul": _to_odd.multiply,
    "sqrt": _to_odd.square_root,
    "square": lambda x: _to_odd.multiply(x, x),
    "sub": _to_odd.subtract,
}


def _integer_pow(step, x, y: int):
    """Returns an integer power by repeated squaring, as XLA computes it."""
    result, square, power = None, x, abs(y)
    while power:
        if power & 1:
            result = square if result is None else step("mul", result, square)
        power >>= 1
        if power:
            square = step("mul", square, square)
    one = jnp.ones_like(x)
    if result is None:
        return one
    return step("div", one, result) if y < 0 else result


def _one_minus_square(step, x):
    one = jnp.ones_like(x)
    return step("mul", step("add", one, x), step("sub", one, x))


def _polynomial(step, x, *coefficients, **_):
    x, total, *rest = jnp.broadcast_arrays(x, *coefficients[::-1])
    for coefficient in rest:
        total = step("add", step("mul", total, x), coefficient)
    return total


# A few operations under one name, each of them rounded.
COMPOSED = {"integer_pow": _integer_pow, "one_minus_square": _one_minus_square, "polynomial": _polynomial}
# Many operations: rounded after all of them, or ...
SUMMED = frozenset(
    "conv_general_dilated cumlogsumexp cumprod cumsum dot_general psum psum_invariant ragged_dot_general "
    "reduce_prod reduce_scatter reduce_sum reduce_window_sum scatter-add scatter-mul scatter-sub "
    "select_and_scatter_add".split()
)
# ... after each, in the order that is asked for.
ORDERED = frozenset("conv_general_dilated cumprod cumsum dot_general reduce_prod reduce_sum reduce_window_sum".split())
# Whole algorithms, run on rounded numbers and then rounded.
OPAQUE = frozenset(
    "cholesky cholesky_update eig eigh fft geqp3 geqrf hessenberg householder_product lu ormqr qr reduce reduce_window "
    "schur svd symmetric_product triangular_solve tridiagonal tridiagonal_solve".split()
)


def kind(eqn) -> str:
    """Returns what is done with an equation: "moved", "rounded", "summed", "opaque", "untouched" or "unsupported"."""
    name = eqn.primitive.name
    for names, answer in (
        (MOVED | SIGNED, "moved"),
        (ROUNDED | {*COMPOSED}, "rounded"),
        (SUMMED, "summed"),
        (OPAQUE, "opaque"),
    ):
        if name in names:
            return answer if any(map(is_inexact, eqn.outvars)) else "untouched"
    return "unsupported" if any(map(is_inexact, eqn.outvars)) else "untouched"


def is_inexact(variable) -> bool:
    """Returns whether a variable of a jaxpr is an array of floats or complex numbers."""
    return jnp.issubdtype(getattr(variable.aval, "dtype", np.int32), jnp.inexact)


def unfit(fmt: Format, dtype) -> str:
    """Returns why results in a dtype cannot be rounded to a format, once, or "".

    With p significant bits, sums, products, quotients and square roots that were rounded to 2p + 2 bits round to p bits
    as the exact ones do (Figueroa, 1995, When is double rounding innocuous?, https://doi.org/10.1145/221332.221334).
    """
    real = jnp.finfo(dtype).dtype
    info = jnp.finfo(real)
    if contains(fmt, real):
        return ""
    found, most = _operand.extent(fmt), info.nmant + 1
    if isinstance(fmt, Float) and (fmt.max > float(info.max) or fmt.quantum_exponent < info.minexp - info.nmant):
        return f"{real} does not hold the numbers of {fmt!r}"
    if found is None or 2 * found.precision + 2 > most:
        bits = "all its" if found is None else f"2 x {found.precision} + 2"
        return f"a single rounding to {fmt!r} needs {bits} significant bits, {real} has {most}"
    return ""


@functools.lru_cache(maxsize=1024)
def contains(fmt: Format, dtype) -> bool:
    """Returns whether all numbers of a dtype are numbers of a format: rounding to it changes none."""
    info = jnp.finfo(jnp.finfo(dtype).dtype)
    if not isinstance(fmt, Float) or not (fmt.signed and fmt.has_inf and fmt.has_nan and fmt.subnormals is True):
        return False
    wide = fmt.mantissa_bits >= info.nmant and fmt.emax >= info.maxexp - 1
    return wide and fmt.quantum_exponent <= info.minexp - info.nmant


def rounded(x, quantizer: Quantizer | None, key: Key | None = None):
    """Returns an array of floats rounded by a quantizer; as it is if there is none, or if it would change nothing."""
    if quantizer is None or not jnp.issubdtype(x.dtype, jnp.inexact):
        return x
    if quantizer.faults is None and contains(quantizer.fmt, x.dtype):
        return x
    if key is None or not quantizer.is_stochastic:
        return quantizer(x)
    return quantizer(x, key=key.whitened() if quantizer.faults is None else key.key)


def constant(value: float | complex, dtype, fmt: Format):
    """Returns a constant of a program rounded to nearest; an infinity that the format lacks becomes its largest."""
    try:
        return _computed(value, dtype, fmt)
    except jax.errors.TracerArrayConversionError:  # under shard_map (jax 0.12) nothing is computed before the program
        return _constant(value, dtype, fmt)


@functools.lru_cache(maxsize=1024)
def _computed(value, dtype, fmt: Format):
    with jax.ensure_compile_time_eval():
        return np.asarray(_constant(value, dtype, fmt))


def _constant(value, dtype, fmt: Format):
    quantizer = Quantizer(fmt, saturate=not (isinstance(fmt, Float) and fmt.has_inf))
    return rounded(jnp.asarray(value, dtype), quantizer)


def constants(eqn, operands, quantizer: Quantizer):
    """Returns the operands of an equation, the constants among them rounded."""
    return [
        constant(complex(x) if np.iscomplexobj(x) else float(x), v.aval.dtype, quantizer.fmt)
        if is_literal(v) and is_inexact(v)
        else x
        for v, x in zip(eqn.invars, operands, strict=True)
    ]


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Rounded:
    """An equation followed by a rounding, in the place of the equation.

    Attributes:
      quantizer: what its results are rounded by.
      sums: one of ``_sums.ORDERS``.
      recipe: what the operands of a product are rounded by.
      kind: what ``kind`` says of it.
    """

    quantizer: Quantizer
    sums: str = "once"
    recipe: Recipe | None = None
    kind: str = "rounded"
    name: str = ""

    def __call__(self, eqn, operands, key, state):
        operands = constants(eqn, operands, self.quantizer)
        name, dtype = eqn.primitive.name, eqn.outvars[0].aval.dtype
        if self.recipe is not None:
            return rounded(Quantized(self.recipe)(eqn, operands, folded(key, 1), None), self.quantizer, key)
        if self.sums != "once" and name in ORDERED:
            return self._sum(eqn, operands, key)
        if name in COMPOSED:
            return self._composed(eqn, operands, key)
        if name in TO_ODD:
            return self._binary(name, operands, key)
        if name == "convert_element_type" and _is_longer(operands[0].dtype, dtype):
            wide = _to_odd.from_integer(operands[0], np.dtype(np.float64 if dtype == np.float64 else np.float32))
            return rounded(wide, self.quantizer, key).astype(dtype)
        params = eqn.primitive.get_bind_params(eqn.params)
        if name in _sites.OPERATIONS and params["precision"] is None and dtype == np.float32:
            params |= {"precision": (lax.Precision.HIGHEST,) * 2}  # some devices would multiply with fewer bits
        out = eqn.primitive.bind(*operands, **params)
        if self.kind == "moved" and (name not in SIGNED or _is_symmetric(self.quantizer.fmt)):
            return out
        if eqn.primitive.multiple_results:
            return [rounded(x, self.quantizer, folded(key, i)) for i, x in enumerate(out)]
        return rounded(out, self.quantizer, key)

    def _is_direct(self, dtype) -> bool:
        """Returns whether the result to nearest of the dtype rounds as the exact one does."""
        nearest = self.quantizer.rounding in _NEAREST
        return nearest or not jnp.issubdtype(dtype, jnp.floating) or contains(self.quantizer.fmt, dtype)

    def _binary(self, name: str, operands, key=None):
        """Returns the rounded result of an operation that ``TO_ODD`` has."""
        dtype = operands[0].dtype
        if self._is_direct(dtype):
            return rounded(_PLAIN[name](*operands), self.quantizer, key)
        wide = _odd(name, *(_carrier.widen(jnp.asarray(x)) for x in operands))
        return rounded(wide, self.quantizer, key).astype(dtype)

    def _sum(self, eqn, operands, key):
        name, params = eqn.primitive.name, eqn.params
        add = functools.partial(self._combined, "add")
        multiply = functools.partial(self._combined, "mul")
        if name in _sites.OPERATIONS:
            lhs, rhs = operands
            return _sums.product(eqn, lhs, rhs, add, multiply, self.sums, key)
        (x,) = operands
        operation = multiply if name.endswith("prod") else add
        if name.startswith("cum"):
            return _sums.totals(x, operation, self.sums, key, axis=params["axis"], reverse=params["reverse"])
        empty = x.dtype.type(name == "reduce_prod")
        if name == "reduce_window_sum":
            terms = _sums.windows(x, params, empty)
        else:
            axes = params["axes"]
            kept = [n for a, n in enumerate(x.shape) if a not in axes]
            terms = jnp.moveaxis(x, axes, range(len(axes))).reshape(-1, *kept)
        if len(terms) == 0:
            return jnp.full(terms.shape[1:], empty)
        return _sums.total(terms, operation, self.sums, key)

    def _combined(self, name: str, a, b, key):
        return self._binary(name, (a, b), key)

    def _composed(self, eqn, operands, key):
        numbers = itertools.count()
        step = lambda name, *parts: self._binary(name, parts, folded(key, next(numbers)))  # noqa: E731
        return COMPOSED[eqn.primitive.name](step, *operands, **eqn.params)


_NEAREST = frozenset((Rounding.NEAREST_EVEN, Rounding.NEAREST_AWAY, Rounding.NEAREST_ZERO, Rounding.NEAREST_ODD))
_PLAIN = {
    "add": lax.add,
    "add_any": lax.add,
    "div": _carrier.divide,
    "mul": lax.mul,
    "sqrt": _carrier.square_root,
    "square": lax.square,
    "sub": lax.sub,
}


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _odd(name: str, *operands):
    return TO_ODD[name](*operands)


@_odd.defjvp
def _odd_jvp(name: str, primals, tangents):
    return _odd(name, *primals), jax.jvp(_PLAIN[name], primals, tangents)[1]


def _is_symmetric(fmt: Format) -> bool:
    if isinstance(fmt, Float):
        return fmt.signed
    if isinstance(fmt, Fixed):
        return fmt.signed and fmt.min_integer == -fmt.max_integer
    return False


def _is_longer(dtype, other) -> bool:
    """Returns whether integers of a dtype have more bits than a float dtype holds."""
    return jnp.issubdtype(dtype, jnp.integer) and jnp.iinfo(dtype).bits > jnp.finfo(other).nmant + 1
