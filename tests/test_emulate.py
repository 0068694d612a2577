"""``emulate``: the bits of programs chopped by hand, and of other arithmetics that run them one operation at a time."""

import functools

import gmpy2
import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from programs import FAST, same, text

import qjax
from qjax import chop, emulate

RANDOM = np.random.default_rng(0)
X, W = (jnp.asarray(RANDOM.normal(size=(8, 8)), jnp.float32) for _ in range(2))


def by_hand(f, *, fmt="fp16"):
    """Returns f with what rounds for its first argument, and rounded arguments."""
    c = functools.partial(chop, fmt=fmt)
    return lambda *args: f(c, *jax.tree.map(c, args))


# Each program, and the same one chopped by hand.
def polynomial(x):
    return ((2.5 * x + 0.1) * x - 1.3) * x + 0.7


def polynomial_by_hand(c, x):
    a, b, d, e = (c(jnp.float32(v)) for v in (2.5, 0.1, 1.3, 0.7))
    return c(c(c(c(c(c(a * x) + b) * x) - d) * x) + e)


def softmax(x):
    shifted = jnp.exp(x - x.max(-1, keepdims=True))
    return shifted / shifted.sum(-1, keepdims=True)


def softmax_by_hand(c, x):
    shifted = c(jnp.exp(c(x - x.max(-1, keepdims=True))))
    return c(shifted / c(shifted.sum(-1, keepdims=True)))


def layer_norm(x):
    n = jnp.float32(x.shape[-1])
    centred = x - x.sum(-1, keepdims=True) / n
    variance = (centred * centred).sum(-1, keepdims=True) / n
    return centred / jnp.sqrt(variance + 1e-3)


def layer_norm_by_hand(c, x):
    n = c(jnp.float32(x.shape[-1]))
    centred = c(x - c(c(x.sum(-1, keepdims=True)) / n))
    variance = c(c(c(centred * centred).sum(-1, keepdims=True)) / n)
    return c(centred / c(jnp.sqrt(c(variance + c(jnp.float32(1e-3))))))


def attention(q, k, v):
    return softmax(q @ k.T * 0.35) @ v


def attention_by_hand(c, q, k, v):
    return c(softmax_by_hand(c, c(c(q @ k.T) * c(jnp.float32(0.35)))) @ v)


def rnn(x, w):
    def step(h, x):
        h = jnp.tanh(h @ w + x)
        return h, h * 0.3

    return jax.lax.scan(step, jnp.zeros(8, jnp.float32), x)


def rnn_by_hand(c, x, w):
    h, out = jnp.zeros(8, jnp.float32), []
    for row in x:
        h = c(jnp.tanh(c(c(h @ w) + row)))
        out.append(c(h * c(jnp.float32(0.3))))
    return h, jnp.stack(out)


PROGRAMS = {
    "polynomial": (polynomial, polynomial_by_hand, (X,)),
    "softmax": (softmax, softmax_by_hand, (X,)),
    "layer_norm": (layer_norm, layer_norm_by_hand, (X,)),
    "attention": (attention, attention_by_hand, (X, W, X)),
    "rnn": (rnn, rnn_by_hand, (X, W)),
}


@pytest.mark.parametrize("fmt", ["fp16", "bf16", "e4m3", "e3m2finite", "q4.6"])
@pytest.mark.parametrize("name", PROGRAMS)
def test_programs_are_those_chopped_by_hand(name, fmt):
    program, reference, args = PROGRAMS[name]
    saturate = fmt == "q4.6"
    wanted = by_hand(reference, fmt=fmt)(*args)
    found = emulate(program, fmt, saturate=saturate)(*args)
    assert same(found, wanted)
    assert same(jax.jit(emulate(program, fmt))(*args), found)
    assert same(emulate(jax.jit(program), fmt)(*args), found)


def test_an_optax_step_is_the_one_chopped_by_hand():
    optimizer = optax.sgd(0.1, momentum=0.9)

    def step(params, velocity, x):
        loss = lambda w: ((x @ w) ** 2).sum()  # noqa: E731
        state = (optax.TraceState(velocity), optax.EmptyState())
        updates, state = optimizer.update(jax.grad(loss)(params), state, params)
        return optax.apply_updates(params, updates), state[0].trace

    def reference(c, params, velocity, x):
        two, decay, rate = (c(jnp.float32(v)) for v in (2.0, 0.9, -0.1))
        product = c(x @ params)
        gradient = c(jnp.einsum("ij,ik->jk", x, c(two * product)))
        velocity = c(gradient + c(decay * velocity))
        return c(params + c(rate * velocity)), velocity

    args = (W, jnp.full_like(W, 0.25), X)
    assert same(jax.jit(emulate(step, "fp16"))(*args), by_hand(reference)(*args))


def test_a_format_that_holds_the_dtype_leaves_the_program():
    for program, _, args in PROGRAMS.values():
        assert text(emulate(program, "fp32"), *args) == text(program, *args)
        gradient = jax.grad(lambda *a, f=program: jax.tree.leaves(f(*a))[0].sum())
        assert text(emulate(gradient, "fp32"), *args) == text(gradient, *args)


UNARY = {"neg": (jnp.negative, np.negative), "abs": (jnp.abs, np.abs), "sqrt": (jnp.sqrt, np.sqrt)}
BINARY = {
    "add": (jnp.add, np.add),
    "sub": (jnp.subtract, np.subtract),
    "mul": (jnp.multiply, np.multiply),
    "div": (jnp.divide, np.divide),
    "max": (jnp.maximum, np.maximum),
}
PROGRAM = st.lists(
    st.tuples(st.sampled_from([*UNARY, *BINARY]), st.integers(0, 10**6), st.integers(0, 10**6)), min_size=1, max_size=12
)
HALVES = np.concatenate([RANDOM.integers(0, 2**16, 200), np.arange(0, 2**16, 331)]).astype(np.uint16).view(np.float16)


def run(steps, values, choose):
    values = list(values)
    for name, i, j in steps:
        x, y = values[i % len(values)], values[j % len(values)]
        values.append(choose(name)(x) if name in UNARY else choose(name)(x, y))
    return values


def ours(steps):
    return lambda *inputs: run(steps, inputs, lambda name: (UNARY | BINARY)[name][0])


@hypothesis.settings(max_examples=25)
@hypothesis.given(PROGRAM)
def test_fp16_programs_are_those_of_numpy_float16(steps):
    inputs = [np.roll(HALVES, 17 * i) for i in range(3)]
    with np.errstate(all="ignore"):
        wanted = run(steps, inputs, lambda name: (UNARY | BINARY)[name][1])
    found = jax.jit(emulate(ours(steps), "fp16"), compiler_options=FAST)(*(x.astype(np.float32) for x in inputs))
    for got, exact in zip(found, wanted, strict=True):
        assert exact.dtype == np.float16
        np.testing.assert_array_equal(np.asarray(got).astype(np.float16).view(np.uint16)[~np.isnan(exact)],
                                      exact.view(np.uint16)[~np.isnan(exact)])  # fmt: skip
        assert np.isnan(np.asarray(got)[np.isnan(exact)]).all()


# What MPFR calls the elementary functions; a lambda has enough bits that its own roundings do not count.
ELEMENTARY = {
    "exp": (jnp.exp, gmpy2.exp),
    "exp2": (jnp.exp2, gmpy2.exp2),
    "expm1": (jnp.expm1, gmpy2.expm1),
    "log": (jnp.log, gmpy2.log),
    "log1p": (jnp.log1p, gmpy2.log1p),
    "sin": (jnp.sin, gmpy2.sin),
    "cos": (jnp.cos, gmpy2.cos),
    "tanh": (jnp.tanh, gmpy2.tanh),
    "atan": (jnp.arctan, gmpy2.atan),
    "erf": (jax.scipy.special.erf, gmpy2.erf),
    "logistic": (jax.nn.sigmoid, lambda x: 1 / (1 + gmpy2.exp(-x))),
    "sqrt": (jnp.sqrt, gmpy2.sqrt),
    "cbrt": (jnp.cbrt, gmpy2.cbrt),
}


@pytest.mark.parametrize("name", ELEMENTARY)
def test_elementary_functions_are_those_of_mpfr_but_next_to_a_tie(name):
    """Of all fp16 numbers, what is not correctly rounded lies by a tie, where errors of float32 decide.

    XLA's functions are good to 4 units in the last place of float32, 2^-11 of half a unit of fp16. A number goes the
    wrong way only if its distance from a tie is below: by chance that is one of 2^11, of the 63 488 numbers 31.
    """
    ours, exact = ELEMENTARY[name]
    every = np.arange(2**16, dtype=np.uint16).view(np.float16)
    x = every[np.isfinite(every)]
    found = np.asarray(jax.jit(emulate(ours, "fp16"))(x.astype(np.float32))).astype(np.float16)
    with gmpy2.context(precision=200):
        values = [exact(gmpy2.mpfr(float(v))) for v in x]
    with gmpy2.context(gmpy2.ieee(16), subnormalize=True):
        wanted = np.array([float(+v) for v in values], np.float16)
    np.testing.assert_array_equal(np.isnan(found), np.isnan(wanted))
    wrong = np.flatnonzero((found != wanted) & ~np.isnan(wanted))
    assert len(wrong) <= 31, len(wrong)
    for i in wrong:
        assert np.nextafter(wanted[i], found[i]) == found[i]
        tie = (float(wanted[i]) + float(found[i])) / 2
        assert abs(values[i] / tie - 1) < 4 * 2.0**-23


ROUNDINGS = {
    "nearest_even": gmpy2.RoundToNearest,
    "toward_zero": gmpy2.RoundToZero,
    "toward_positive": gmpy2.RoundUp,
    "toward_negative": gmpy2.RoundDown,
}


@pytest.mark.parametrize("carrier", ["float32", "float64"])
@pytest.mark.parametrize("fmt", ["bf16", "fp16", "e5m2"])
@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_programs_are_those_of_mpfr(rounding, fmt, carrier):
    """Each program runs in an arithmetic of the precision and exponents of the format, operation by operation.

    bf16 has the exponents of float32, in which results below 2^-126 count as zero: there numbers are taken that stay
    above. In float64 all of them are.
    """
    f = qjax.format(fmt)
    apart = fmt == "bf16" and carrier == "float32"
    exponents = (-40, 40) if apart else (f.emin - f.mantissa_bits, f.emax + 1)
    draw = np.random.default_rng(0)
    inputs = [np.ldexp(draw.normal(size=60), draw.integers(*exponents, 60)).astype(carrier) for _ in range(3)]
    steps = [("mul", 0, 1), ("add", 3, 2), ("div", 4, 0), ("sub", 5, 3), ("abs", 6, 0), ("sqrt", 7, 0), ("add", 8, 1)]
    context = gmpy2.context(
        precision=f.mantissa_bits + 1,
        emax=f.emax + 1,
        emin=f.emin - f.mantissa_bits + 1,
        subnormalize=True,
        round=ROUNDINGS[rounding],
    )
    operations = {
        "abs": abs,
        "sqrt": gmpy2.sqrt,
        "add": gmpy2.add,
        "sub": gmpy2.sub,
        "mul": gmpy2.mul,
        "div": gmpy2.div,
    }
    exact = [[gmpy2.mpfr(float(x)) for x in point] for point in zip(*inputs, strict=True)]
    with context as c:
        wanted = [run(steps, map(c.plus, point), operations.get) for point in exact]
    with jax.enable_x64(True):
        found = jax.jit(emulate(ours(steps), f, rounding=rounding), compiler_options=FAST)(*inputs)
    for got, column in zip(found, zip(*wanted, strict=True), strict=True):
        np.testing.assert_array_equal(np.asarray(got, np.float64), np.array([float(v) for v in column]))
