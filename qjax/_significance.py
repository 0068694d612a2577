"""``significant_digits``: how many digits of the results of a program rounding errors leave."""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from qjax._chop import RoundingLike, _rounding_named
from qjax._emulate import emulate
from qjax._modes import Rounding
from qjax._operand import extent
from qjax.formats import Format, format


class Significant(NamedTuple):
    """Results, and how far they can be trusted.

    Attributes:
      value: the mean of the samples, for each result of the program.
      digits: how many decimal digits of it are significant, float32 of the same shape.
    """

    value: Any
    digits: Any


def significant_digits(
    fn: Callable,
    fmt: Format | str,
    *,
    rounding: RoundingLike | Sequence[RoundingLike] = Rounding.STOCHASTIC_EQUAL,
    samples: int = 3,
    confidence: float = 0.95,
    key: Array | None = None,
    **options,
) -> Callable[..., Significant]:
    """Returns fn, run several times by ``emulate`` with different roundings, with the digits that the runs share.

    With a stochastic rounding the runs are one ``vmap`` over as many keys, and the digits those of CESTAC,
    ``log10(sqrt(N) |mean| / (t s))``: s is the standard deviation of the N samples and t the quantile of Student's
    distribution with N - 1 degrees of freedom, so that the mean has a relative error of 10^-digits at that confidence,
    as far as rounding errors add up like independent ones. With several directions, one run for each, they are
    ``log10(|mean| / (largest - smallest))``: a hint, and no bound.

    Results whose samples are all the same have all digits of the format, ``p log10(2)`` for p significant bits, which
    is also the most that is reported. Digits are 0 where the samples share none, and where one of them is NaN or
    infinite. Results that are no floats are those of the first run; they have all digits or none.

    Args:
      fn, fmt, options: as in ``emulate``.
      rounding: a stochastic rounding; or a sequence of at least two, such as ("toward_negative", "toward_positive").
      samples: how many runs, at least 2, of a stochastic rounding.
      confidence: of the digits of a stochastic rounding, above 0 and below 1.
      key: the PRNG key, if a rounding is stochastic.

    Raises:
      TypeError, ValueError: as ``emulate`` does; for fewer than two runs, one rounding that is not stochastic, and a
        confidence that is none.

    >>> import jax, jax.numpy as jnp, qjax
    >>> def f(x):
    ...     return x * 3, (x + 100) - 100
    >>> digits = qjax.significant_digits(f, "fp16", key=jax.random.key(0))(jnp.float32(0.3)).digits
    >>> [round(float(d), 1) for d in digits]
    [2.9, 0.5]

    Sources: Vignes (1993), A stochastic arithmetic for reliable scientific computation,
    https://doi.org/10.1016/0378-4754(93)90003-D (CESTAC, with "stochastic_equal" and N = 3); Denis, de Oliveira Castro
    and Petit (2016), Verificarlo, https://arxiv.org/abs/1509.01347 (with "stochastic", and more samples).
    """
    name = "significant_digits"
    several = not isinstance(rounding, str | Rounding)
    modes = [_rounding_named(name, mode) for mode in ([rounding] if isinstance(rounding, str | Rounding) else rounding)]
    if several and len(modes) < 2:
        raise ValueError(f"{name}: a sequence of roundings has at least two, got {rounding!r}.")
    if not several and not modes[0].is_stochastic:
        raise ValueError(
            f"{name}: rounding {modes[0].value!r} gives the same result in every run; take 'stochastic_equal' or "
            "'stochastic', or a sequence of roundings."
        )
    if samples < 2:
        raise ValueError(f"{name}: samples must be at least 2, got {samples}.")
    if not 0 < confidence < 1:
        raise ValueError(f"{name}: confidence must be above 0 and below 1, got {confidence}.")
    if not several and key is None:
        raise ValueError(f"{name}: rounding {modes[0].value!r} is stochastic; pass key=jax.random.key(...).")

    @functools.wraps(fn)
    def significant(*args, **kwargs) -> Significant:
        def run(mode: Rounding, key):
            return emulate(fn, fmt, rounding=mode, key=key, **options)(*args, **kwargs)

        if several:
            folded = (None if key is None else jax.random.fold_in(key, i) for i in range(len(modes)))
            runs = [run(mode, k if mode.is_stochastic else None) for mode, k in zip(modes, folded, strict=True)]
            found = jax.tree.map(lambda *xs: jnp.stack(list(map(jnp.asarray, xs))), *runs)
            spread = _range
        else:
            assert key is not None
            found = jax.vmap(functools.partial(run, modes[0]))(jax.random.split(key, samples))
            spread = functools.partial(_error, quantile=_student(confidence, samples - 1))
        values = jax.tree.map(_mean, found)
        return Significant(values, jax.tree.map(functools.partial(_digits, format(fmt), spread), found))

    return significant


def _student(confidence: float, freedom: int) -> float:
    from scipy.special import stdtrit  # a dependency of JAX; slow to import

    return float(stdtrit(freedom, (1 + confidence) / 2))


def _range(x):
    return jnp.max(x, 0) - jnp.min(x, 0)


def _error(x, *, quantile: float):
    n = x.shape[0]
    variance = jnp.sum((x - jnp.mean(x, 0, keepdims=True)) ** 2, 0) / x.dtype.type(n - 1)
    return x.dtype.type(quantile / math.sqrt(n)) * jnp.sqrt(variance)


def _mean(x):
    if not jnp.issubdtype(x.dtype, jnp.inexact):
        return x[0]
    same = jnp.all(x == x[:1], 0)
    return jnp.where(same, x[0], jnp.mean(x, 0))


def _digits(fmt: Format, spread: Callable, x):
    if not jnp.issubdtype(x.dtype, jnp.inexact):
        return jnp.where(jnp.all(x == x[:1], 0), _most(fmt, np.dtype(np.float32)), np.float32(0))
    if jnp.issubdtype(x.dtype, jnp.complexfloating):
        return jnp.minimum(_digits(fmt, spread, x.real), _digits(fmt, spread, x.imag))
    most = _most(fmt, x.dtype)
    width, mean = spread(x), jnp.abs(jnp.mean(x, 0))
    same = jnp.all(x == x[:1], 0)
    shared = jnp.log10(jnp.where(same, 1, mean) / jnp.where(same, 1, width)).astype(np.float32)
    digits = jnp.where(same, most, jnp.clip(shared, 0, most))
    return jnp.where(jnp.all(jnp.isfinite(x), 0), digits, np.float32(0))


def _most(fmt: Format, dtype) -> np.float32:
    found, bits = extent(fmt), jnp.finfo(dtype).nmant + 1
    return np.float32(math.log10(2) * (bits if found is None else min(found.precision, bits)))
