"""chop_state: at every step on real gradients, the state is what NumPy makes of the state before, decoded by NumPy."""

import math

import chex
import digits
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest

import qjax
from qjax import optim
from qjax.optim._power import exp2, log2_beside_line
from qjax.optim._storage import ExpandedTensor, Stored

B1, B2, EPS = 0.9, 0.999, 1e-8
# A number this near to where rounding changes, relatively, may go either way: the moments are float32 sums of two
# products (3 roundings of 2^-24), divided by a rounded scale (2 more). The expansion adds less than 2^-16: two log2 are
# off by 4.5e-7 each (``test_power``), which times k <= 255/16 and log(2) is 1.0e-5; a product and two sums, up to
# 31, round by 2^-20 each, which times log(2) is 2.0e-6, and exp2 is off by 2.7e-6.
NEAR = {False: 8 * 2.0**-24, True: 2.0**-15}


@pytest.fixture(autouse=True)
def promotion():
    with jax.numpy_dtype_promotion("standard"):
        yield


def dynamic(bits: int, signed: bool) -> np.ndarray:
    """Dettmers et al. (2022) as released: linear fractions in each decade, 0 and 1."""
    values = [0.0, 1.0]
    for i in range(bits - 1):
        edges = np.linspace(0.1, 1, 2 ** (i + (not signed)) + 1)
        middles = 10.0 ** (i + 2 - bits) * (edges[1:] + edges[:-1]) / 2
        values += [*middles, *(-middles if signed else [])]
    return np.sort(values)


E4M3 = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float64)
LINEAR = np.arange(1, 17) / 16
# Each row: how it is made, the block, and the values of the codes of the first and the second moment.
STORAGES = {
    "adamw_8bit": (lambda: optim.adamw_8bit(1e-3, min_size=1), 256, dynamic(8, True), dynamic(8, False)),
    "adamw_4bit": (lambda: optim.adamw_4bit(1e-3, min_size=1), 128, dynamic(4, True), LINEAR),
    "fp8": (lambda: optim.coat_adamw(1e-3, expand=False), 128, E4M3, E4M3),
    "coat_adamw": (lambda: optim.coat_adamw(1e-3), 128, E4M3, E4M3),
}


def in_blocks(x, block: int):
    """Returns the blocks of an array as rows, zeros at the end: along the last axis where it is a multiple."""
    x = np.ravel(x)
    return np.pad(x, (0, -len(x) % block)).reshape(-1, block)


def parts(stored: Stored, block: int):
    """Returns codes, scales, and 16 k or None, a row for each block."""
    value = stored.value
    q = value.values if isinstance(value, ExpandedTensor) else value
    scales = value.largest if isinstance(value, ExpandedTensor) else qjax.decode(q.scales[0])
    steps = np.ravel(value.steps)[:, None].astype(int) if isinstance(value, ExpandedTensor) else None
    return in_blocks(q.unpacked(), block), np.ravel(scales).astype(np.float64)[:, None], steps


def decoded(stored: Stored, block: int, table):
    """Returns the array in float64: ``scale value``, or ``sign(q) (|q| S)^(1/k) c`` with the S and c of COAT."""
    codes, scales, steps = parts(stored, block)
    q = table[codes]
    if steps is not None:
        k = steps / 16
        # c is any number, since it cancels; S = (M / c)^k / 448.
        c = 0.3
        q, scales = np.sign(q) * (np.abs(q) * np.where(scales == 0, 1, scales / c) ** k / 448) ** (1 / k) * c, 1
        q = np.where(parts(stored, block)[1] == 0, 0, q)
    return np.ravel(q * scales)[: math.prod(stored.shape)].reshape(stored.shape)


def check_encoded(stored: Stored, terms, block: int, table):
    """Checks codes and scales against x, the sum of two terms, in float64."""
    codes, scales, steps = parts(stored, block)
    x, size = in_blocks(sum(terms), block), in_blocks(sum(map(np.abs, terms)), block)
    there = in_blocks(np.ones(stored.shape), block) == 1
    largest = np.abs(x).max(axis=1, keepdims=True)
    values = np.unique(table[np.isfinite(table)] + 0.0)
    if steps is None:
        # Roundings: of 1 - b, g^2, their product, the sum and the quotient; or of b, the decoded moment, and so on.
        np.testing.assert_allclose(scales, largest / values[-1], rtol=5 * 2.0**-24)
        y = x / np.where(largest == 0, 1, largest / values[-1])
    else:
        np.testing.assert_allclose(scales, largest, rtol=3 * 2.0**-24)
        smallest = np.where(x == 0, np.inf, np.abs(x)).min(axis=1, keepdims=True)
        bound = 16 * np.log2(448**2 / 2) / np.maximum(np.log2(largest / np.where(largest, smallest, 1)), 1)
        near = np.abs(bound - np.round(bound)) < 1e-4 * bound
        assert ((steps == np.clip(np.floor(bound), 1, 255)) | near | (largest == 0)).all()
        k, c = steps / 16, np.sqrt(np.where(largest, largest * smallest, 1))
        y = np.sign(x) * (np.abs(x) / c) ** k / np.where(largest, (largest / c) ** k / 448, 1)
    middles = (values[1:] + values[:-1]) / 2
    place = np.searchsorted(middles, y)
    distance = np.abs(y[..., None] - middles).min(axis=-1)
    tied = distance <= NEAR[steps is not None] * np.abs(y) * np.where(x == 0, 1, size / np.where(x == 0, 1, np.abs(x)))
    assert ((table[codes] == values[place]) | tied | (largest == 0))[there].all()
    assert tied[there].sum() <= 2 + there.sum() / 100


@pytest.mark.parametrize("name", STORAGES)
def test_equals_a_reference_in_numpy(name):
    make, block, *tables = STORAGES[name]
    tx, params = make(), digits.initial()
    state, update = tx.init(params), jax.jit(tx.update)
    for i in range(digits.STEPS):
        gradient = jax.tree.map(lambda g, i=i: g[i], digits.gradients())
        adam = state[0].inner
        updates, state = update(gradient, state, params)
        after = state[0].inner
        for at in ("hidden", "kernel"), ("hidden", "bias"), ("gain",):
            g, u, mu, nu, new_mu, new_nu, p = (
                jax.tree.reduce(lambda _, x: x, tree, is_leaf=lambda x: isinstance(x, Stored))
                for tree in (_at(t, at) for t in (gradient, updates, adam.mu, adam.nu, after.mu, after.nu, params))
            )
            g = np.asarray(g, np.float64)
            m, v = (decoded(s, block, t) for s, t in zip((mu, nu), tables, strict=True))
            of_m, of_v = (B1 * m, (1 - B1) * g), (B2 * v, (1 - B2) * g**2)
            m, v = sum(of_m), sum(of_v)
            step = m / (1 - B1 ** (i + 1)) / (np.sqrt(v / (1 - B2 ** (i + 1))) + EPS) + 1e-4 * np.asarray(p)
            # A cancellation in m shows; 1 - b2^t of float32 is off by 2^-24 / (1 - b2) at worst.
            scale = np.abs(m).max() / np.abs(np.where(m == 0, 1, m)) + 2000
            assert (np.abs(u + 1e-3 * step) <= 1e-3 * (np.abs(step) + 1e-4) * scale * 2.0**-20).all()
            check_encoded(new_mu, of_m, block, tables[0])
            check_encoded(new_nu, of_v, block, tables[1])


def _at(tree, path):
    for name in path:
        tree = tree[name]
    return tree


def test_power():
    """The errors of the fits, 3.7e-7 and 2.63e-6, and two roundings of numbers up to 1."""
    x = np.geomspace(2.0**-126, 2.0**127, 100_001).astype(np.float32)
    beside = np.asarray(jax.jit(log2_beside_line)(x.view(np.uint32)), np.float64)
    line = x.view(np.uint32) * 2.0**-23 - 127
    assert (np.abs(line + beside - np.log2(x.astype(np.float64))) <= 3.7e-7 + 2 * 2.0**-24).all()
    assert not np.any(log2_beside_line((2.0 ** jnp.arange(-126, 128, dtype=jnp.float32)).view(jnp.uint32)))
    t = np.linspace(0, 1, 100_001).astype(np.float32)
    power = np.asarray(jax.jit(exp2)(t), np.float64)
    assert (np.abs(power / 2.0 ** t.astype(np.float64) - 1) <= 2.63e-6 + 2 * 2.0**-24).all()


FORMATS = ("e4m3", "e5m2", "e3m4", "e2m3", "e2m1", "float8_e4m3fnuz", "ue5m3", "ue3m4")


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize(("shape", "block"), [((6, 256), 128), ((3, 70), 32), ((40,), 64), ((2, 9), 1), ((), 4)])
def test_expanded_in_any_format(fmt, shape, block):
    """What is stored is the nearest value to the power of the equation, and the way back its root."""
    generator, fmt = np.random.default_rng(0), qjax.format(fmt)
    x = (generator.normal(size=shape) * 2.0 ** generator.uniform(-30, 0, shape)).astype(np.float32)
    x = np.where(generator.random(shape) < 0.1, 0, x if fmt.signed else np.abs(x)).astype(np.float32)
    stored = optim.Expanded(fmt, block).encode(jnp.asarray(x))
    blocks = x.reshape(-1, x.shape[-1] if shape else 1)
    blocks = np.concatenate([in_blocks(row, min(block, len(row))) for row in blocks]).astype(np.float64)
    largest = np.abs(blocks).max(axis=1, keepdims=True)
    assert np.array_equal(np.ravel(stored.largest), np.ravel(largest))
    k, top = np.ravel(stored.steps)[:, None] / 16, float(fmt.max)
    power = np.sign(blocks) * (np.abs(blocks) / np.where(largest, largest, 1)) ** k * top
    values = np.unique(fmt.values()[np.isfinite(fmt.values())])
    middles = (values[1:] + values[:-1]) / 2
    codes = np.asarray(stored.values.unpacked()).reshape(blocks.shape)
    got = np.array([math.ldexp(*fmt._split(code)) for code in range(fmt.max_code + 1)])
    got = np.copysign(got[codes & (2 ** (fmt.bits - fmt.signed) - 1)], blocks)
    near = np.abs(power[..., None] - middles).min(axis=-1) <= NEAR[True] * np.abs(power)
    assert ((got == values[np.searchsorted(middles, power)]) | near).all()
    back = np.copysign(largest * (np.abs(got) / top) ** (1 / k), blocks)
    for reading in range(3):
        decoded = np.asarray(stored.decode(reading))
        assert decoded.shape == shape
        decoded = decoded.reshape(-1, shape[-1] if shape else 1)
        decoded = np.concatenate([in_blocks(row, min(block, len(row))) for row in decoded])
        # Two roundings: of the root, and of its product.
        np.testing.assert_allclose(decoded, back, rtol=2 * 2.0**-24, atol=0)


def test_expanded_negative_numbers_in_unsigned_formats():
    x = jnp.array([1.0, -1.0, -0.0, 1.0], jnp.float32)
    assert np.array_equal(optim.Expanded("ue5m3", 4)(x), [1, np.nan, 0, 1], equal_nan=True)


@pytest.mark.parametrize("storage", ["e4m3_g128", "dynamic8_g256", optim.Expanded()])
def test_remat_changes_no_bit(storage):
    """The decays are powers of two or near, so that products are exact and no contraction of sums can show."""
    params = digits.initial()
    states = []
    for remat in (False, True):
        tx = optim.chop_state(optax.scale_by_adam(b1=0.5, b2=0.75), storage, remat=remat)
        state, update = tx.init(params), jax.jit(tx.update)
        for i in range(digits.STEPS):
            updates, state = update(jax.tree.map(lambda g, i=i: g[i], digits.gradients()), state, params)
        states.append((updates, state))
    for left, right in zip(*map(jax.tree.leaves, states), strict=True):
        assert np.array_equal(left, right)


def test_emulate_leaves_the_expansion_whole():
    """What it is made of are operations on bit patterns, that mean nothing once rounded."""
    x = qjax.chop(jnp.asarray(np.random.default_rng(0).normal(size=(4, 128)), jnp.float32), "e5m2")
    stored = optim.Expanded().encode(x)
    chex.assert_trees_all_equal(qjax.emulate(optim.Expanded().encode, "e5m2")(x), stored)
    expected = qjax.chop(stored.decode(), "e5m2")
    chex.assert_trees_all_equal(qjax.emulate(lambda stored: stored.decode(), "e5m2")(stored), expected)


def test_remat_keeps_no_decoded_moments():
    """Of 8 bytes a parameter that XLA stores without it there are left copies of the codes, 2, and the scales."""
    params = jax.ShapeDtypeStruct((256, 1024), jnp.float32)
    for remat, within in ((False, lambda size: size >= 8), (True, lambda size: size < 3)):
        tx = optim.chop_state(optax.scale_by_adam(), optim.Expanded(), remat=remat)
        step = jax.jit(tx.update, donate_argnums=1).lower(params, jax.eval_shape(tx.init, params)).compile()
        assert within(step.memory_analysis().temp_size_in_bytes / params.size)


SPECIAL = {
    "zeros": ([0.0, -0.0, 0.0], [0.0, -0.0, 0.0]),
    "equal": ([2.0, -2.0, 2.0], [2.0, -2.0, 2.0]),
    "subnormal": ([1e-40, 0.0, 3.0], [0.0, 0.0, 3.0]),
    "nan": ([np.nan, 1.0, 2.0], [np.nan] * 3),
    "infinity": ([-np.inf, 1.0, 2.0], [np.nan] * 3),
    "far below the largest": ([1e38, 1e-5, 1.0], [1e38, 0.0, 0.0]),
}


@pytest.mark.parametrize("case", SPECIAL)
def test_expanded_special_values(case):
    x, expected = (np.array(v, np.float32) for v in SPECIAL[case])
    assert np.array_equal(optim.Expanded()(jnp.asarray(x)), expected, equal_nan=True)


def test_expansion_does_what_coat_says():
    """The error of Adam's update on moments after 60 steps of normal gradients: halved (PAPERS: 2.91e-2 to 1.47e-2)."""
    g = np.random.default_rng(0).normal(size=(60, 512, 128)).astype(np.float32)
    m, v = np.zeros_like(g[0]), np.zeros_like(g[0])
    for step in g:
        m, v = B1 * m + (1 - B1) * step, B2 * v + (1 - B2) * step**2
    exact = m / np.sqrt(v)

    def error(store):
        update = np.asarray(store(jnp.asarray(m))) / np.sqrt(np.asarray(store(jnp.asarray(v))))
        return np.linalg.norm(update - exact) / np.linalg.norm(exact)

    assert abs(error(qjax.Quantizer("e4m3_g128")) - 2.91e-2) < 1e-3
    assert abs(error(optim.Expanded()) - 1.47e-2) < 1e-3


@pytest.mark.parametrize(("name", "most"), [("coat_adamw", 2.2), ("adamw_8bit", 2.2), ("adamw_4bit", 1.2)])
def test_bytes_of_the_live_state(name, most):
    params = {"w": jnp.zeros((1000, 1024), jnp.float32), "b": jnp.zeros(1000, jnp.float32)}
    state = getattr(optim, name)(1e-3).init(params)
    count = sum(p.size for p in jax.tree.leaves(params))
    assert sum(leaf.nbytes for leaf in jax.tree.leaves(state)) / count <= most


def test_a_first_state_is_not_encoded_while_compiling():
    """In a larger program it is a constant, and XLA takes 9 s for the codes of a million numbers."""
    tx = optim.coat_adamw(1e-3)
    program = jax.jit(tx.init).lower(jnp.ones((8, 1024))).compile()
    # The extremes, and what is computed from them once a block, of both moments, which are the same zeros.
    assert program.as_text().count(" reduce(") == 2


def test_rules_decide_leaf_by_leaf():
    params = {"w": jnp.ones((4, 128), jnp.float32), "b": jnp.ones(4, jnp.float32)}
    tx = optim.chop_state(optax.scale_by_adam(), {"mu/.*": "e4m3_g128", "nu/w": qjax.Quantizer("bf16"), "nu/b": None})
    inner = tx.init(params).inner
    kinds = jax.tree.map(lambda x: x.value.fmt if isinstance(x, Stored) else None, inner, is_leaf=_is_stored)
    assert kinds.mu == {"w": qjax.format("e4m3_g128"), "b": qjax.format("e4m3_g128")}
    assert kinds.nu == {"w": qjax.BF16, "b": None}
    by_function = optim.chop_state(optax.scale_by_adam(), lambda path, x: "int8_g128" if x.ndim == 2 else None)
    found = jax.tree.leaves(by_function.init(params).inner, is_leaf=_is_stored)
    assert sum(map(_is_stored, found)) == 2
    small = optim.chop_state(optax.scale_by_adam(), "bf16", min_size=5).init(params).inner
    assert [_is_stored(small.mu[name]) for name in "wb"] == [True, False]


def _is_stored(x) -> bool:
    return isinstance(x, Stored)


def test_stochastic_states_draw_anew():
    tx = optim.chop_state(optax.trace(1.0), qjax.Quantizer("int8", "stochastic"), key=jax.random.key(0))
    zeros = jnp.zeros(512, jnp.float32)
    state, seen = tx.init(zeros), set()
    for _ in range(3):
        _, state = tx.update(zeros + 0.5, tx.init(zeros)._replace(key=state.key), zeros)
        seen.add(np.asarray(state.inner.trace.value.codes).tobytes())
    assert len(seen) == 3


REFUSALS = {
    r"Expanded: fmt must be a Float of at most 8 bits, such as 'e4m3', got 'int8'": lambda: optim.Expanded("int8"),
    r"Expanded: fmt must be a Float of at most 8 bits, such as 'e4m3', got 'bf16'": lambda: optim.Expanded("bf16"),
    r"Expanded: fmt must have mantissa bits and subnormals, .* got 'e4m3_nosub'": lambda: optim.Expanded("e4m3_nosub"),
    r"Expanded: fmt must have mantissa bits and subnormals, as 'e4m3' has, got 'e8m0'": lambda: optim.Expanded("e8m0"),
    r"Expanded: block must be a positive int, got 0": lambda: optim.Expanded("e4m3", 0),
    r"Expanded: arrays must be float32, got bfloat16; hold it by a Quantizer": lambda: optim.chop_state(
        optax.scale_by_adam(mu_dtype=jnp.bfloat16), optim.Expanded()
    ).init(jnp.zeros(256)),
    r"chop_state: the rounding is stochastic and needs key": lambda: optim.chop_state(
        optax.adam(1.0), qjax.Quantizer("e4m3", "stochastic")
    ),
    r"chop_state: key was given, but no rounding is stochastic": lambda: optim.chop_state(
        optax.adam(1.0), {".*": "e4m3"}, key=jax.random.key(0)
    ),
    r"chop_state: pattern '\(' is not a regular expression": lambda: optim.chop_state(optax.adam(1.0), {"(": "e4m3"}),
    r"chop_state: pattern 'mu' matches no array of the state; the paths are '0/mu', '0/nu'": lambda: optim.chop_state(
        optax.adam(1.0), {"mu": "e4m3"}
    ).init(jnp.zeros(3)),
    r"chop_state: the state of tx has no floating-point array": lambda: optim.chop_state(optax.sgd(1.0), "e4m3").init(
        jnp.zeros(3)
    ),
}


@pytest.mark.parametrize("text", REFUSALS)
def test_refusals(text):
    with pytest.raises((TypeError, ValueError), match=text):
        REFUSALS[text]()
