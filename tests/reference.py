"""The slow, obvious reference of products: loops over the equations, in float64 where that is exact.

It shares no code with qjax: the oracle of chop rounds operands and registers. What is here is which numbers are
multiplied, along which axis blocks lie, and when sums are rounded. Products of two float32 numbers are exact in
float64, and ``math.fsum`` is exact but for its last step.
"""

import math
from fractions import Fraction

import numpy as np
import oracle

import qjax

F32 = oracle.finfo_of("float32")


# Rows: (batch, m, k) x (batch, n, k) -> (batch, m, n).


def rows(x: np.ndarray, batch, free, contract) -> np.ndarray:
    """Returns an array as (batch, free, contraction), each of them one axis."""
    sizes = [math.prod(x.shape[a] for a in axes) for axes in (batch, free, contract)]
    return np.transpose(x, (*batch, *free, *contract)).reshape(sizes)


def free_axes(x: np.ndarray, batch, contract) -> list[int]:
    return [a for a in range(x.ndim) if a not in (*batch, *contract)]


def canonical(lhs: np.ndarray, rhs: np.ndarray, numbers) -> tuple[np.ndarray, np.ndarray]:
    """Returns the two operands of ``lax.dot_general`` as rows."""
    contract, batch = numbers
    x, y = (rows(x, b, free_axes(x, b, c), c) for x, b, c in zip((lhs, rhs), batch, contract, strict=True))
    return x, y


def dot(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Returns the products of rows, each the float64 next to the exact sum."""
    out = np.zeros((x.shape[0], x.shape[1], y.shape[1]))
    for b, m, n in np.ndindex(*out.shape):
        out[b, m, n] = math.fsum(x[b, m].astype(np.float64) * y[b, n].astype(np.float64))
    return out


def as_float32(total: np.ndarray, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Returns sums as float32, having checked that float32 sums of the products are exact in any order.

    They are if all products are multiples of one unit and the sum of their magnitudes is at most 2^24 units.
    """
    for b, m, n in np.ndindex(*total.shape):
        products = np.abs(x[b, m].astype(np.float64) * y[b, n].astype(np.float64))
        unit = lowest_bit(products)
        assert math.fsum(products) <= 2.0**24 * unit, "the data of this test have no exact float32 sums"
        assert unit >= 2.0**-126
    return total.astype(np.float32)


def lowest_bit(x: np.ndarray) -> float:
    """Returns the largest power of two of which all numbers are multiples, infinity if they are zero."""
    mantissas, exponents = np.frexp(x[x != 0].astype(np.float64))
    whole = np.ldexp(np.abs(mantissas), 53).astype(np.int64)
    return float(np.ldexp((whole & -whole).astype(np.float64), exponents - 53).min(initial=np.inf))


def rounded(x: np.ndarray, quantizer: qjax.Quantizer | None, axis: int = -1) -> np.ndarray:
    """Returns an operand rounded in float32, blocks along an axis, by the oracle of chop."""
    x = x.astype(np.float32)
    if quantizer is None:
        return x
    assert quantizer.saturate
    return oracle.round_scaled(x, quantizer.fmt, quantizer.rounding, F32, axis=axis)


def product(x: np.ndarray, y: np.ndarray, gemm: qjax.Gemm) -> np.ndarray:
    """Returns the product of rows with both operands rounded along the contraction."""
    x, y = rounded(x, gemm.lhs), rounded(y, gemm.rhs)
    return as_float32(dot(x, y), x, y)


def linear(lhs: np.ndarray, rhs: np.ndarray, gradient: np.ndarray, numbers, recipe: qjax.Recipe):
    """Returns (out, d lhs, d rhs) of ``out = lhs rhs``, the gradients in the layout of rows.

    out[m, n] = sum_k lhs[m, k] rhs[n, k];  d lhs[m, k] = sum_n gradient[m, n] rhs[n, k];
    d rhs[k, n] = sum_m lhs[m, k] gradient[m, n], here as [n, k].
    """
    x, y = canonical(lhs, rhs, numbers)
    out = product(x, y, recipe.forward)
    g = gradient.reshape(out.shape)
    turned = np.swapaxes
    dlhs = product(g, turned(y, 1, 2), recipe.dlhs)
    drhs = product(turned(x, 1, 2), turned(g, 1, 2), recipe.drhs)
    return out, dlhs, turned(drhs, 1, 2)


# Accumulators.


def exact_sum(*terms: np.ndarray) -> np.ndarray:
    """Returns a float64 sum, having checked that it is exact."""
    total = np.zeros(np.broadcast_shapes(*(t.shape for t in terms)))
    for term in terms:
        before, total = total, total + term
        part = total - before
        lost = (before - (total - part)) + (term - part)
        assert (lost[np.isfinite(total)] == 0).all(), "float64 does not hold this sum"
    return total


def float_register(x, y, accumulator: qjax.Accumulator, words=None) -> np.ndarray:
    """Returns the products of rows in a ``Float`` register: it rounds once after each chunk.

    Args:
      words: for stochastic modes, the random words of each chunk, of all 32 bits.
    """
    register = np.zeros((x.shape[0], x.shape[1], y.shape[1]))
    for place, start in enumerate(range(0, x.shape[-1], accumulator.chunk)):
        chunk = slice(start, start + accumulator.chunk)
        part = as_float32(dot(x[..., chunk], y[..., chunk]), x[..., chunk], y[..., chunk])
        total = exact_sum(register, part.astype(np.float64))
        drawn = {} if words is None else {"draw": words[place].ravel().astype(np.float64), "bits": 32}
        rounding = accumulator.rounding
        register = oracle.round_float(total, accumulator.fmt, rounding, F32, saturate=accumulator.saturate, **drawn)
    return register.astype(np.float32)


def wrapped(integer: int, fmt: qjax.Fixed) -> int:
    return (integer - fmt.min_integer) % 2**fmt.bits + fmt.min_integer


def integer_register(x, y, accumulator: qjax.Accumulator, fractions: tuple[int, int]) -> np.ndarray:
    """Returns the products of rows of ``Fixed`` elements in a ``Fixed`` register, by Python's integers."""
    fmt = accumulator.fmt
    out = np.zeros((x.shape[0], x.shape[1], y.shape[1]), np.float32)
    for b, m, n in np.ndindex(*out.shape):
        pairs = [
            (int(Fraction(float(p)) * 2 ** fractions[0]), int(Fraction(float(q)) * 2 ** fractions[1]))
            for p, q in zip(x[b, m], y[b, n], strict=True)
        ]
        register, overflowed = 0, False
        for start in range(0, len(pairs), accumulator.chunk):
            register += sum(p * q for p, q in pairs[start : start + accumulator.chunk])
            beyond = not fmt.min_integer <= register <= fmt.max_integer
            overflowed |= beyond
            if beyond:
                clipped = fmt.min_integer if register < 0 else fmt.max_integer
                register = wrapped(register, fmt) if fmt.overflow == "wrap" and not accumulator.detect else clipped
        value = np.float32(register) * np.float32(2.0**-fmt.fraction_bits)
        out[b, m, n] = np.nan if accumulator.detect and overflowed else value
    return out


def promoted(x, y, accumulator: qjax.Accumulator, register, scales=None) -> np.ndarray:
    """Returns ``sum_g sx[g] sy[g] register(segment g)``, summed in float32, for segments of ``promote`` products.

    Args:
      register: a function of rows, one of those above.
      scales: those of the segments, (batch, m, segments) and (batch, n, segments).
    """
    total = np.zeros((x.shape[0], x.shape[1], y.shape[1]), np.float32)
    for g, start in enumerate(range(0, x.shape[-1], accumulator.promote)):
        segment = slice(start, start + accumulator.promote)
        value = register(x[..., segment], y[..., segment])
        if scales is not None:
            value = value * scales[0][:, :, None, g] * scales[1][:, None, :, g]
        total = total + value
    return total


# Convolutions, in the layouts (batch, feature, spatial ...) and (out feature, in feature, spatial ...).


def places(lhs_shape, rhs_shape, strides, padding, lhs_dilation, rhs_dilation, groups: int, batch_groups: int):
    """Yields the indices (out, lhs, rhs) of every product of a convolution, padding left out.

    For each output the products come in the order of (in feature, window).
    """
    (n, _, *size), (features, per_group, *window) = lhs_shape, rhs_shape
    dilated = [(s - 1) * d + 1 if s else 0 for s, d in zip(size, lhs_dilation, strict=True)]
    positions = [
        max((s + sum(p) - d * (w - 1) - 1) // t + 1, 0)
        for s, p, d, w, t in zip(dilated, padding, rhs_dilation, window, strides, strict=True)
    ]
    for image, o, *at in np.ndindex(n // batch_groups, features, *positions):
        group, batch_group = o // (features // groups), o // (features // batch_groups)
        for i, *tap in np.ndindex(per_group, *window):
            where = [
                a * t + w * d - low
                for a, t, w, d, (low, _) in zip(at, strides, tap, rhs_dilation, padding, strict=True)
            ]
            held = [0 <= w < s and w % d == 0 for w, s, d in zip(where, dilated, lhs_dilation, strict=True)]
            if all(held):
                taken = [w // d for w, d in zip(where, lhs_dilation, strict=True)]
                source = (batch_group * (n // batch_groups) + image, group * per_group + i, *taken)
                yield (image, o, *at), source, (o, i, *tap)


def out_shape(lhs_shape, rhs_shape, strides, padding, lhs_dilation, rhs_dilation, groups: int, batch_groups: int):
    (n, _, *size), (features, _, *window) = lhs_shape, rhs_shape
    spatial = []
    for s, w, t, (low, high), ld, rd in zip(size, window, strides, padding, lhs_dilation, rhs_dilation, strict=True):
        whole = (s - 1) * ld + 1 if s else 0
        spatial.append(max((whole + low + high - rd * (w - 1) - 1) // t + 1, 0))
    return (n // batch_groups, features, *spatial)


def gathered(triples, which: int, shape, first, second, one: int, other: int) -> np.ndarray:
    """Returns the sum of ``first[i] second[j]`` over all products that belong to each entry of a result."""
    terms: dict[tuple, list[float]] = {}
    for triple in triples:
        terms.setdefault(triple[which], []).append(float(first[triple[one]]) * float(second[triple[other]]))
    out = np.zeros(shape)
    for index, products in terms.items():
        out[index] = math.fsum(products)
    return out


def segments(length: int, size: int) -> list[slice]:
    return [slice(i, i + size) for i in range(0, length, size)]


def rounded_in_groups(x: np.ndarray, quantizer, axis: int, groups: int) -> np.ndarray:
    """Returns an operand rounded in blocks along an axis, none of which spans two groups."""
    parts = np.split(x, groups, axis) if groups > 1 else [x]
    return np.concatenate([rounded(part, quantizer, axis) for part in parts], axis)
