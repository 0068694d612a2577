"""Controllers of precision against NumPy references written from the papers, and what they compile."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from sklearn.datasets import load_digits
from tables import bits

import qjax
from qjax import _random
from qjax.optim import (
    AdaPT,
    GradientInterval,
    bit_width_schedule,
    chop_by_gradient_interval,
    chop_fixed,
    chop_params,
    scale_by_qas,
)

KEY = jax.random.key(0)
PIXELS, LABELS = load_digits(return_X_y=True)
ORDER = np.random.default_rng(0).permutation(len(PIXELS))
PIXELS, LABELS = jnp.asarray(PIXELS[ORDER] / 16, jnp.float32), jnp.asarray(LABELS[ORDER])
TRAIN, TEST = slice(1400), slice(1400, None)


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def same(a, b) -> bool:
    return np.array_equal(bits(a), bits(b))


# Two layers without and with biases.
WEIGHTS = {"w1": jnp.asarray(normal(1, 64, 64) / 32**0.5), "w2": jnp.asarray(normal(2, 64, 10) / 32**0.5)}
BIASED = WEIGHTS | {"b1": jnp.zeros(64, jnp.float32), "b2": jnp.zeros(10, jnp.float32)}


def mlp(p, x):
    hidden = jax.nn.relu(x @ p["w1"] + jnp.expand_dims(p.get("b1", jnp.zeros(64, jnp.float32)), 0))
    return hidden @ p["w2"] + jnp.expand_dims(p.get("b2", jnp.zeros(10, jnp.float32)), 0)


def cross_entropy(model, p, x, y):
    return optax.softmax_cross_entropy_with_integer_labels(model(p, x), y).mean()


def accuracy(model, p) -> float:
    return float((jnp.argmax(model(p, PIXELS[TEST]), 1) == LABELS[TEST]).mean())


def batch(step):
    rows = np.random.default_rng(step).integers(0, 1400, 32)
    return PIXELS[rows], LABELS[rows]


def trained(model, p, tx, steps):
    state = tx.init(p)

    @jax.jit
    def step(p, state, x, y):
        updates, state = tx.update(jax.grad(cross_entropy, argnums=1)(model, p, x, y), state, p)
        return optax.apply_updates(p, updates), state

    for i in range(steps):
        p, state = step(p, state, *batch(i))
    return p


def gradients(steps):
    """Yields the weights and gradients of a training."""
    p = WEIGHTS
    gradient = jax.jit(jax.grad(lambda p, x, y: cross_entropy(mlp, p, x, y)))
    for i in range(steps):
        g = gradient(p, *batch(i))
        yield p, g
        p = jax.tree.map(lambda w, g: w - np.float32(0.1) * g, p, g)


# Fixed point with traced word lengths.


def inputs():
    rng = np.random.default_rng(3)
    wide = normal(4, 3000) * np.exp(4 * normal(5, 3000))
    quarters = np.arange(-600, 600, dtype=np.float32) / 4
    ends = np.ldexp(np.float32([1, -1, 1 - 2**-24, 2**-24 - 1]), rng.integers(0, 33, (8, 1)), dtype=np.float32).ravel()
    special = np.float32([np.nan, np.inf, -np.inf, 0.0, -0.0, 1e-40, -1e-40, 3e38])
    return jnp.asarray(np.concatenate([wide, quarters, ends, special]))


@pytest.mark.parametrize("rounding", qjax.Rounding)
@pytest.mark.parametrize("word", [(1, 0), (8, 4), (25, 23), (32, 31), (32, -90), (8, 120)])
def test_traced_words_are_those_of_fixed(word, rounding):
    key = KEY if rounding.is_stochastic else None
    x, expected = inputs(), qjax.chop(inputs(), qjax.Fixed(*word), rounding, key=key)
    assert same(chop_fixed(x, *map(jnp.asarray, word), rounding, key=key), expected)


def test_traced_words_compile_once():
    traces = []

    @jax.jit
    def f(x, bits, fraction_bits):
        traces.append(x.shape)
        return chop_fixed(x, bits, fraction_bits)

    for word in ((8, 4), (6, 2), (4, 4)):
        assert same(f(PIXELS, *word), qjax.chop(PIXELS, qjax.Fixed(*word)))
    assert len(traces) == 1
    several = jax.vmap(chop_fixed, (None, 0, 0))(PIXELS, jnp.array([8, 6]), jnp.array([4, 2]))
    assert same(several[1], qjax.chop(PIXELS, qjax.Fixed(6, 2)))


def test_the_gradient_of_traced_words_is_straight_through():
    x = jnp.array([0.3, 100.0], jnp.float32)
    assert same(jax.grad(lambda x: chop_fixed(x, 4, 2).sum())(x), jnp.ones(2, jnp.float32))


def test_traced_scales_compile_nothing():
    f = jax.jit(lambda x, scale: qjax.chop(x, "int8_tensor", scale=scale))
    for scale in (0.1, 0.2, 0.4):
        f(PIXELS, jnp.float32(scale))
    assert f._cache_size() == 1


def test_a_format_that_comes_back_compiles_nothing():
    schedule = bit_width_schedule({0: "int8", 2: "int6", 4: "int4", 6: "int8", 8: qjax.Fixed(4)})
    assert schedule.formats == (qjax.Fixed(8), qjax.Fixed(6), qjax.Fixed(4))
    assert [schedule(i).bits for i in range(0, 10, 2)] == [8, 6, 4, 8, 4] and schedule(10**6).bits == 4
    assert hash(schedule) == hash(bit_width_schedule(dict(schedule.boundaries)))
    f = jax.jit(qjax.chop)
    for i in range(10):
        f(PIXELS, schedule(i))
    assert f._cache_size() == len(schedule.formats)


# AdaPT.


def histogram(x, exact, bins):
    edges = np.linspace(exact.min(), exact.max(), bins + 1)
    place = np.clip(np.searchsorted(edges, x.ravel(), side="right") - 1, 0, bins - 1)
    return np.bincount(place, minlength=bins) / x.size


def rounded(x, bits, fraction, words):
    """Up with the probability of the fraction, of 32 bits, in sign and magnitude; then the range of the word."""
    steps = np.ldexp(np.abs(x), fraction)
    up = np.floor((steps - np.floor(steps)) * 2**32) + words >= 2**32
    integers = np.copysign(np.floor(steps) + up, x)
    return np.ldexp(np.clip(integers, -(2 ** (bits - 1)), 2 ** (bits - 1) - 1), -fraction)


def divergence(exact, other, bins):
    p, q = histogram(exact, exact, bins), histogram(other, exact, bins)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(p > 0, p * (np.log(p) - np.log(q)), 0).sum()


def pushed_down(x, word, bins, tolerance, key):
    words = np.asarray(_random.random_words(key, x.shape, 32, 32), np.float64)
    x = np.asarray(x, np.float64)

    def lossless(bits, fraction):
        return divergence(x, rounded(x, bits, fraction, words), bins) <= tolerance

    def least(low, high, fine):
        if low >= high:
            return high
        middle = math.floor((low + high) / 2)
        return least(low, middle, fine) if fine(middle) else least(middle + 1, high, fine)

    fraction = least(4, word[1], lambda f: lossless(word[0], f))
    return least(max(fraction, 1), word[0], lambda b: lossless(b, fraction)), fraction


def pushed_up(bits, fraction, diversity, strategy, buffer):
    step = 1
    if diversity < math.inf and math.log(diversity) > 1:
        ell = math.log(diversity) - 1
        s1, s2 = max(math.ceil(1 / ell**2), 1), max(min(math.ceil(32 * ell**2), 32) - fraction, 0)
        step = {"min": min, "mean": lambda a, b: math.ceil((a + b) / 2), "max": max}[strategy](s1, s2)
    fraction = min(fraction + step, 32)
    bits = min(max(bits, fraction) + 1, 32)
    fraction = min(fraction, 32 - buffer)
    return max(min(fraction + buffer, 32), bits), fraction


@pytest.mark.parametrize("tolerance, strategy", [(0.0, "min"), (1e-2, "mean"), (1e-2, "max")])
def test_adapt_over_windows(tolerance, strategy):
    controller = AdaPT(lookback=(5, 20), resolution=(20, 40), tolerance=tolerance, buffer_bits=4, strategy=strategy)
    state = controller.init(WEIGHTS)
    words, lookback, resolution = dict.fromkeys(WEIGHTS, (8, 4)), dict.fromkeys(WEIGHTS, 5), dict.fromkeys(WEIGHTS, 20)
    past, losses, switches = {n: [] for n in WEIGHTS}, [], 0
    accumulate = jax.jit(controller.accumulate)
    for i, (p, g) in enumerate(gradients(60)):
        loss, key = 1.0 + 0.1 * math.sin(i), jax.random.fold_in(KEY, i)
        state = state._replace(window=accumulate(state.window, g))
        spans = sorted(lookback.values())
        state = controller.update(state, p, jnp.array([loss], jnp.float32), key=key)
        losses.append(np.float32(loss))
        for n in WEIGHTS:
            past[n].append(np.asarray(g[n], np.float64))
        due = [n for n in WEIGHTS if len(past[n]) >= lookback[n]]
        span = int(np.mean(spans))
        if due and len(losses) > span:
            worse = abs(np.mean(losses[-span - 1 : -1], dtype=np.float64)) <= losses[-1]
            strategy = {"min": "mean", "mean": "max", "max": "max"}[strategy] if worse else "min"
        for n in due:
            unit = [g / np.linalg.norm(g) for g in past[n]]
            diversity = sum(map(np.linalg.norm, unit)) / np.linalg.norm(sum(unit))
            at = jax.random.fold_in(key, list(WEIGHTS).index(n))
            down = pushed_down(p[n], words[n], resolution[n], tolerance, at)
            words[n] = pushed_up(*down, diversity, strategy, buffer=4)
            wanted = math.ceil(np.clip(20 / diversity, 5, 20))
            lookback[n] = math.ceil(0.33 * wanted + 0.67 * lookback[n])
            resolution[n] = int(np.clip(resolution[n] + (lookback[n] == 20) - (lookback[n] == 5), 20, 40))
            past[n], switches = [], switches + 1
        assert state.formats == {n: qjax.Fixed(*w) for n, w in words.items()}
        assert (state.lookback, state.resolution) == (tuple(lookback.values()), tuple(resolution.values()))
        assert state.strategy == strategy
    assert switches >= 8


@pytest.mark.parametrize("strategy", ["min", "mean", "max"])
def test_push_up(strategy):
    for diversity in (1.0, 2.0, math.e, 2.8, 3.0, 3.5, 4.0, 5.0, 7.0, 10.0, 1e3, math.inf):
        for word in ((8, 4), (12, 8), (20, 12), (32, 24)):
            got = AdaPT()._push_up(*word, diversity, strategy)
            assert (got.bits, got.fraction_bits) == pushed_up(*word, diversity, strategy, buffer=8)


def test_push_up_adds_more_where_diversity_falls():
    """Down to e, where the rule ends and one place is added."""
    places = [AdaPT(buffer_bits=0)._push_up(16, 12, d, "max").fraction_bits for d in (4.5, 4.0, 3.5, 3.2, math.e, 1.0)]
    assert places == [16, 19, 28, 32, 13, 13]


def test_adapt_edge_cases():
    controller = AdaPT(lookback=(1, 4))
    params = {"equal": jnp.full(8, 0.3, jnp.float32), "one": jnp.ones((), jnp.float32)}
    state = controller.init(params)
    zeros = jax.tree.map(jnp.zeros_like, params)
    state = state._replace(window=controller.accumulate(state.window, zeros))
    state = controller.update(state, params, jnp.ones(1), key=KEY)
    # One bin each, so <4, 4>; gradients of zeros add one binary place.
    assert set(state.formats.values()) == {qjax.Fixed(13, 5)} and state.lookback == (1, 1)


def test_adapt_trains_as_float32_and_compiles_once_a_format():
    controller = AdaPT(tolerance=1e-2, buffer_bits=4)
    tx = optax.sgd(0.1)

    @jax.jit
    def step(p, window, formats, x, y, key):
        keys = optax.tree.split_key_like(key, p)
        rounded = jax.tree.map(lambda w, fmt, key: qjax.chop(w, fmt, "stochastic", key=key), p, formats, keys)
        loss, g = jax.value_and_grad(cross_entropy, argnums=1)(mlp, rounded, x, y)
        updates, _ = tx.update(g, tx.init(p))
        return optax.apply_updates(p, updates), controller.accumulate(window, g), loss

    p, state, lengths = WEIGHTS, controller.init(WEIGHTS), []
    for epoch in range(12):
        losses = []
        for i in range(44 * epoch, 44 * epoch + 44):
            p, window, loss = step(p, state.window, state.formats, *batch(i), jax.random.fold_in(KEY, i))
            state, losses = state._replace(window=window), [*losses, loss]
        lengths.append(np.mean([fmt.bits for fmt in state.formats.values()]))
        state = controller.update(state, p, jnp.stack(losses), key=jax.random.fold_in(KEY, 1000 + epoch))
    assert step._cache_size() <= len(state.visited) <= 13
    assert lengths[0] == 8 and lengths[1] > 8 and np.mean(lengths) < 16

    rounded = jax.tree.map(qjax.chop, p, state.formats)
    float32 = trained(mlp, WEIGHTS, tx, 12 * 44)
    # Two standard deviations of the difference of two proportions near 0.96 in 397 images.
    assert accuracy(mlp, rounded) > accuracy(mlp, float32) - 2 * (2 * 0.96 * 0.04 / 397) ** 0.5


# The gradient interval.


def test_gamma_over_real_gradients():
    """50 steps, bit for bit: alpha so large that gamma turns around."""
    interval = GradientInterval(bits=4, alpha=0.05, beta=0.05)
    update = jax.jit(lambda gamma, g: jax.tree.map(interval.update, gamma, g))
    gamma = jax.tree.map(lambda _: interval.init(), WEIGHTS)
    expected, turns = {n: np.float32(1) for n in WEIGHTS}, 0
    for _, g in gradients(50):
        gamma = update(gamma, g)
        for n in WEIGHTS:
            magnitude = np.abs(np.asarray(g[n]))
            outside = (magnitude > expected[n] * magnitude.max()).mean() - 0.05 / 15
            turns += outside > 0
            expected[n] = np.clip(
                expected[n] + np.float32(0.05) * np.float32(np.sign(outside)), np.float32(1e-3), np.float32(1)
            )
            assert same(gamma[n], expected[n])
    assert turns > 10 and update._cache_size() == 1


def test_the_levels_of_a_gradient():
    g, gamma = jnp.asarray(normal(6, 4096)), jnp.float32(0.5)
    end = np.float32(0.5) * np.abs(g).max()
    for width in (2, 4, 8):
        levels = np.asarray(GradientInterval(width).chop(g, gamma, key=KEY)) / (end / (2 ** (width - 1) - 1))
        # A quotient of two float32 that are each within one rounding of an integer ratio.
        assert np.abs(levels - np.round(levels)).max() <= 2**-22 * 2 ** (width - 1)
        assert len(np.unique(np.round(levels))) <= 2**width - 1 and np.abs(levels).max() < 2 ** (width - 1)
    draws = jax.vmap(lambda key: GradientInterval(4).chop(g[:64], gamma, key=key))(jax.random.split(KEY, 4096))
    step = np.abs(g[:64]).max() * 0.5 / 7
    # A rounding has a standard deviation of at most step / 2; five of the mean's, for 64 of them.
    error = np.mean(draws, 0) - np.clip(g[:64], -7 * step, 7 * step)
    assert np.abs(error).max() < 5 * step / 2 / 4096**0.5


def test_large_gradients_want_the_interval_of_the_rule():
    """Laplace gradients: where the error of the largest 0.1 % is least.

    With the interval c, in units of the mean magnitude, a share R = e^-c is clipped. The mean error of the large ones
    changes with c as -R + (alpha - R) h, h c being the mean error of the others: h = 1 / 14 for the half step of the
    paper's bound, so that R = alpha / 15, and h = 1 / 21 for stochastic rounding, whose mean error over a step is a
    third of it. Hence c = ln(22 / alpha) = 10.0 against the rule's ln(15 / alpha) = 9.6, 4 % apart. The 48 to 70
    entries beyond these leave the empirical quantile uncertain by some 1 / sqrt(48) = 0.14, 1.5 % of c; and the grid
    has steps of 2 %. The whole tensor's squared error wants d/dc (2 e^-c + c^2 / 294) = 0, c = 4.2: less than half.
    """
    rng = np.random.default_rng(7)
    g = jnp.asarray(rng.laplace(size=2**20).astype(np.float32))
    magnitude = np.sort(np.abs(g))
    interval, large = GradientInterval(4, alpha=1e-3, beta=5e-3), jnp.abs(g) >= magnitude[-(2**20) // 1000]

    @jax.jit
    def errors(gamma):
        error = jnp.abs(interval.chop(g, gamma, key=KEY) - g)
        return jnp.where(large, error, np.float32(0)).mean(), jnp.square(error).mean()

    rule = magnitude[-int(2**20 * 1e-3 / 15)] / magnitude[-1]
    grid = rule * np.arange(0.2, 1.3, 0.02, dtype=np.float32)
    top, whole = (np.array(e) for e in zip(*map(errors, grid[grid <= 1]), strict=True))
    assert abs(grid[top.argmin()] / rule - 1) < 0.1
    assert grid[whole.argmin()] / rule < 0.5
    gamma, _ = jax.lax.scan(lambda gamma, _: (interval.update(gamma, g), None), interval.init(), None, 200)
    assert abs(float(gamma) - rule) <= 5e-3


def test_gradients_that_are_zero_or_not_finite():
    interval, half = GradientInterval(), jnp.float32(0.5)
    zeros = jnp.zeros(8, jnp.float32)
    assert same(interval.chop(zeros, half, key=KEY), zeros)
    for bad in (np.nan, np.inf):
        g = jnp.ones(8, jnp.float32).at[3].set(bad)
        assert np.isnan(interval.chop(g, half, key=KEY)).all()
        assert interval.update(half, g) == half
    assert interval.update(half, zeros) == half


def test_the_cotangent_of_a_product():
    """Both gradients of a product get the rounded gradient of its output, and gamma is handed on."""
    interval, gamma = GradientInterval(4, alpha=0.1), jnp.float32(0.7)
    x, w, target = (jnp.asarray(normal(i, *shape)) for i, shape in ((8, (32, 16)), (9, (16, 8)), (10, (32, 8))))

    def loss(x, w, gamma):
        return ((interval.cotangent(x @ w, gamma, key=KEY) - target) ** 2).sum()

    value, (dx, dw, following) = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2)))(x, w, gamma)
    assert value == ((x @ w - target) ** 2).sum()
    g = interval.chop(2 * (x @ w - target), gamma, key=KEY)
    np.testing.assert_allclose(dx, g @ w.T, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(dw, x.T @ g, rtol=1e-5, atol=1e-5)
    assert same(following, interval.update(gamma, 2 * (x @ w - target)))
    # The int4 operands of a recipe take the elements as they are.
    assert same(qjax.chop(g, qjax.Scaled(qjax.Fixed(4, symmetric=True), qjax.FP32, None)), g)


# As transformations of optax.

MASK = {"w1": True, "w2": False}
SCALES = {"w1": jnp.linspace(0.1, 0.2, 64, dtype=jnp.float32).reshape(1, 64), "w2": 0.5}
TRANSFORMATIONS = {
    "interval": lambda: chop_by_gradient_interval(4, key=KEY),
    "qas": lambda: scale_by_qas(SCALES),
}


@pytest.mark.parametrize("name", TRANSFORMATIONS)
def test_transformations_under_jit_scan_masks_and_partitions(name):
    tx, grads = TRANSFORMATIONS[name](), {"w1": WEIGHTS["w1"] * 3, "w2": WEIGHTS["w2"] / 5}
    state = tx.init(WEIGHTS)
    first, following = tx.update(grads, state)
    second, _ = tx.update(grads, following)
    update = jax.jit(tx.update)
    compiled, once = update(grads, state)
    assert jax.tree.all(jax.tree.map(same, compiled, first))
    assert jax.tree.all(jax.tree.map(same, update(grads, once)[0], second)) and update._cache_size() == 1
    _, stacked = jax.lax.scan(lambda s, _: tx.update(grads, s)[::-1], state, None, 2)
    assert jax.tree.all(jax.tree.map(lambda a, b, c: same(a, jnp.stack([b, c])), stacked, first, second))
    other = optax.partition({True: tx, False: optax.identity()}, MASK)
    for masked in (optax.masked(tx, MASK), other):
        updates, _ = jax.jit(masked.update)(grads, masked.init(WEIGHTS))
        assert same(updates["w2"], grads["w2"])
        assert updates["w1"].shape == grads["w1"].shape and not same(updates["w1"], grads["w1"])


@pytest.mark.parametrize("name", TRANSFORMATIONS)
def test_sharded_arrays(name):
    mesh = jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    split = jax.device_put(WEIGHTS, jax.NamedSharding(mesh, jax.P("x")))
    tx = TRANSFORMATIONS[name]()
    update = jax.jit(tx.update)
    expected, got = update(WEIGHTS, tx.init(WEIGHTS))[0], update(split, tx.init(split))[0]
    assert jax.tree.all(jax.tree.map(same, got, expected))
    assert not got["w1"].sharding.is_fully_replicated


def test_a_sharded_window_is_that_of_the_whole():
    mesh = jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    split = jax.device_put(WEIGHTS, jax.NamedSharding(mesh, jax.P("x")))
    controller = AdaPT()
    window, whole = (jax.jit(controller.accumulate)(controller.init(p).window, p)["w1"][0] for p in (split, WEIGHTS))
    np.testing.assert_allclose(window, whole, rtol=1e-6)  # the norm's sum is in another order


@pytest.mark.parametrize("name", TRANSFORMATIONS)
def test_bfloat16_gradients(name):
    tx, grads = TRANSFORMATIONS[name](), jax.tree.map(lambda w: w.astype(jnp.bfloat16), WEIGHTS)
    updates, _ = tx.update(grads, tx.init(WEIGHTS))
    expected, _ = tx.update(jax.tree.map(lambda g: g.astype(jnp.float32), grads), tx.init(WEIGHTS))
    assert jax.tree.all(jax.tree.map(lambda u, e: same(u, e.astype(jnp.bfloat16)), updates, expected))


# Quantization-aware scaling, on a network of true integers.

X_SCALE, HEADROOM = 1 / 127, 2


def integer_graph():
    """Returns a two-layer int8 network, its integer parameters, and the scale of each."""
    w_scale = {n: HEADROOM * jnp.abs(WEIGHTS[n]).max(0, keepdims=True) / 127 for n in WEIGHTS}
    h_scale = HEADROOM * jax.nn.relu(PIXELS[TRAIN] @ WEIGHTS["w1"]).max() / 127
    scales = w_scale | {"b1": w_scale["w1"][0] * X_SCALE, "b2": w_scale["w2"][0] * h_scale}

    def rounded(x, low, high):
        """To the nearest integer, straight-through but for what is cut off."""
        x = jnp.clip(x, low, high)
        return x + jax.lax.stop_gradient(jnp.round(x) - x)

    def network(q, x):
        # Sums of int8 products in int32, which float32 holds: below 64 x 127 x 127 < 2^24.
        sums = jnp.round(x / X_SCALE) @ q["w1"] + q["b1"][None]
        hidden = rounded(sums * (X_SCALE * w_scale["w1"] / h_scale), 0, 127)
        return (hidden @ q["w2"] + q["b2"][None]) * (h_scale * w_scale["w2"])

    return network, jax.tree.map(lambda p, s: jnp.round(p / s), BIASED, scales), scales


def in_integers(*links):
    """Returns the chain that keeps weights in int8 and biases in int32."""
    land = lambda name: chop_params(qjax.Quantizer(name, "stochastic"), key=KEY)  # noqa: E731
    labels = {n: n[0] for n in BIASED}
    return optax.chain(*links, optax.partition({"w": land("int8"), "b": land("int32")}, labels))


def ratio(p, g):
    return {n: float(jnp.log10(jnp.linalg.norm(p[n]) / jnp.linalg.norm(g[n]))) for n in p}


def test_qas_restores_the_ratio_of_weight_to_gradient():
    """log10(|W| / |G|) of each tensor, as in figure 2 of the paper.

    After QAS a tensor is w / s and its gradient G / s, s one a channel: each norm is off by a factor between 1 / max s
    and 1 / min s, the ratio by at most max s / min s. Rounding to int8 moves the gradient as well, here by under 20 %,
    0.1 in the logarithm. Without QAS the ratio is off by s^-2.
    """
    network, _, scales = integer_graph()
    p = trained(mlp, BIASED, optax.sgd(0.1), 100)
    q = jax.tree.map(lambda p, s: jnp.round(p / s), p, scales)
    images = PIXELS[TRAIN], LABELS[TRAIN]
    float32 = ratio(p, jax.grad(lambda p: cross_entropy(mlp, p, *images))(p))
    g = jax.grad(lambda q: cross_entropy(network, q, *images))(q)
    tx = scale_by_qas(scales)
    scaled, plain = ratio(q, tx.update(g, tx.init(q))[0]), ratio(q, g)
    for n, s in scales.items():
        spread = float(jnp.log10(s.max() / s.min()))
        assert abs(scaled[n] - float32[n]) < spread + 0.1
        assert abs(plain[n] - float32[n] + 2 * np.log10(s).mean()) < spread + 0.1
        assert plain[n] - float32[n] > 4


def test_int8_trains_with_qas_as_float32_does():
    network, q, scales = integer_graph()
    float32 = accuracy(mlp, trained(mlp, BIASED, optax.sgd(0.1), 400))
    p = trained(network, q, in_integers(scale_by_qas(scales), optax.sgd(0.1)), 400)
    assert all(jnp.abs(p[n]).max() <= 128 and same(p[n], jnp.round(p[n])) for n in WEIGHTS)
    with_qas = accuracy(network, p)
    without = accuracy(network, trained(network, q, in_integers(optax.sgd(0.1)), 400))
    assert float32 > 0.95 and with_qas > float32 - 2 * (2 * 0.96 * 0.04 / 397) ** 0.5
    assert without < 0.3


def test_qas_takes_the_scales_of_qtensors():
    for fmt in ("int8_channel", "mxint8", "nvfp4"):
        stored = jax.tree.map(lambda w, fmt=fmt: qjax.encode(w, fmt), WEIGHTS)
        tx = scale_by_qas(stored)
        state = tx.init(WEIGHTS)
        elements = qjax.decode(stored["w1"]) / state.scales["w1"]
        largest = qjax.format(fmt)
        while isinstance(largest, qjax.Scaled):
            largest = largest.element
        # Elements of the format, up to the rounding of a product of scales.
        np.testing.assert_allclose(elements, qjax.chop(elements, largest), rtol=1e-6)
        updates, _ = tx.update(WEIGHTS, state)
        np.testing.assert_allclose(updates["w1"], WEIGHTS["w1"] / state.scales["w1"] ** 2, rtol=1e-6)


def test_qas_with_a_scale_of_zero():
    tx = scale_by_qas(jnp.array([0.0, 2.0], jnp.float32))
    assert same(tx.update(jnp.ones(2), tx.init(jnp.ones(2)))[0], jnp.array([0, 0.25], jnp.float32))


ONES = jnp.ones(2, jnp.float32)
REFUSALS = {
    "bit_width_schedule: formats must begin at step 0, got \\[5\\]; add": lambda: bit_width_schedule({5: "int8"}),
    "bit_width_schedule: step must be a Python int, since a format is static": lambda: jax.jit(
        bit_width_schedule({0: "int8"})
    )(3),
    "bit_width_schedule: step must be at least 0, got -1": lambda: bit_width_schedule({0: "int8"})(-1),
    "chop_fixed: x must be a float32 array, got bfloat16": lambda: chop_fixed(ONES.astype(jnp.bfloat16), 8),
    "chop_fixed: x must be a float32 array, got float": lambda: chop_fixed(1.0, 8),
    "chop_fixed: bits must be an integer, got float": lambda: chop_fixed(ONES, 8.0),
    "chop_fixed: bits must be 1 to 32, got 33": lambda: chop_fixed(ONES, 33),
    "chop_fixed: fraction_bits must be -90 to 120, got 121": lambda: chop_fixed(ONES, 8, 121),
    "chop_fixed: unknown rounding 'up'": lambda: chop_fixed(ONES, 8, rounding="up"),
    "AdaPT: lookback must be \\(least, greatest\\), at least 1, got \\(9, 3\\)": lambda: AdaPT(lookback=(9, 3)),
    "AdaPT: initial must be a signed Fixed of at most 32 bits that saturates, got Fixed\\(33": lambda: AdaPT(
        qjax.Fixed(33)
    ),
    "AdaPT: initial must be a signed Fixed of at most 32 bits that saturates, got Float": lambda: AdaPT("e4m3"),
    "AdaPT: strategy must be one of .*, got 'most'": lambda: AdaPT(strategy="most"),
    "AdaPT.update: params must be finite, got NaN or infinity": lambda: AdaPT(lookback=(1, 1)).update(
        AdaPT(lookback=(1, 1)).init(ONES), ONES * np.nan, ONES, key=KEY
    ),
    "AdaPT.update: losses must have one axis, a loss for each step, got shape \\(\\)": lambda: AdaPT().update(
        AdaPT().init(ONES), ONES, ONES[0], key=KEY
    ),
    "GradientInterval: bits must be 2 to 16, got 1": lambda: GradientInterval(1),
    "GradientInterval: alpha and beta must be between 0 and 1, got 2 and 0.001": lambda: chop_by_gradient_interval(
        alpha=2, key=KEY
    ),
    "scale_by_qas: a scale of shape \\(3,\\) does not broadcast to its parameter of shape \\(2,\\)": lambda: (
        scale_by_qas(jnp.ones(3)).init(ONES)
    ),
    "scale_by_qas: a QTensor of Float.* has no scale; encode it": lambda: scale_by_qas(qjax.encode(ONES, "e4m3")).init(
        ONES
    ),
}


@pytest.mark.parametrize("text", REFUSALS)
def test_refusals(text):
    with pytest.raises((TypeError, ValueError), match=text):
        REFUSALS[text]()
