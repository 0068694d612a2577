"""The statistical battery of the counter-based generator, and what it promises about shapes and keys.

Each statistic is compared with the quantile of its exact distribution that one run in 10^9 exceeds; the keys are fixed,
so that a failure is a defect of the generator and never bad luck of a run.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from qjax import _random

N = 1 << 18
ALPHA = 1e-9
KEYS = range(4)


def draw(seed: int, shape=(N,)) -> np.ndarray:
    return np.asarray(_random.random_words(jax.random.key(seed), shape, 32, 32))


def assert_uniform(counts: np.ndarray) -> None:
    """A chi-square test that the cells are equally likely, two-sided: too even is as wrong as too uneven."""
    expected = counts.sum() / counts.size
    statistic = float(((counts - expected) ** 2 / expected).sum())
    low, high = stats.chi2.ppf([ALPHA, 1 - ALPHA], counts.size - 1)
    assert low < statistic < high


@pytest.mark.parametrize("seed", KEYS)
@pytest.mark.parametrize("shift", [0, 8, 16, 24])
def test_bytes_are_uniform(seed, shift):
    assert_uniform(np.bincount(draw(seed) >> shift & 255, minlength=256))


@pytest.mark.parametrize("seed", KEYS)
def test_every_bit_is_fair_and_no_two_bits_are_correlated(seed):
    bits = (draw(seed)[:, None] >> np.arange(32, dtype=np.uint32) & 1).astype(np.float64) * 2 - 1
    bound = stats.norm.isf(ALPHA) / np.sqrt(N)
    assert np.abs(bits.mean(0)).max() < bound
    correlation = bits.T @ bits / N
    np.fill_diagonal(correlation, 0)
    assert np.abs(correlation).max() < bound


@pytest.mark.parametrize("seed", KEYS)
@pytest.mark.parametrize("lag", [1, 2, 3, 7, 8, 31, 32, 64, 128, 768, 1024, 4096])
def test_elements_at_a_lag_are_independent(seed, lag):
    words = draw(seed)
    high, low = words >> 28, words & 15
    for a in (high, low):
        for b in (high, low):
            assert_uniform(np.bincount(a[:-lag] * 16 + b[lag:], minlength=256))


@pytest.mark.parametrize("seed", KEYS)
def test_tuples_of_four_are_uniform(seed):
    words = (draw(seed) >> 28).reshape(-1, 4).astype(np.int64)
    assert_uniform(np.bincount(words @ [4096, 256, 16, 1], minlength=65536))


def test_neighbouring_keys_are_independent():
    words = np.stack([draw(seed, (4096,)) for seed in range(512)])
    high = words >> 28
    assert_uniform(np.bincount((high[:-1] * 16 + high[1:]).ravel(), minlength=256))
    # At one place over the keys: the whole column is uniform, for every one of 4096 places.
    statistic = ((np.stack([(high == v).sum(0) for v in range(16)]) - 32.0) ** 2 / 32.0).sum(0)
    assert stats.kstest(statistic, stats.chi2(15).cdf).pvalue > 1e-6
    differences = np.bitwise_count(words[:-1] ^ words[1:])
    z = (differences.mean() - 16) / np.sqrt(8 / differences.size)
    assert abs(z) < stats.norm.isf(ALPHA)


def test_a_key_and_those_split_from_it_are_independent():
    key = jax.random.key(3)
    keys = [key, *jax.random.split(key, 8), *jax.random.split(jax.random.fold_in(key, 9), 4)]
    drawn = [np.asarray(_random.random_words(k, (N // 4,), 32, 32)) >> 28 for k in keys]
    for i, a in enumerate(drawn):
        for b in drawn[i + 1 :]:
            assert_uniform(np.bincount(a * 16 + b, minlength=256))


@pytest.mark.parametrize("bits", [1, 3, 8, 13, 24])
def test_the_mean_of_stochastic_rounding_has_the_right_variance_in_blocks(bits):
    """Sums over blocks of 64 elements have mean 0 and the variance of independent draws."""
    words = np.asarray(_random.random_words(jax.random.key(9), (N,), bits, 32)) >> (32 - bits)
    centred = (words.astype(np.float64) - (2**bits - 1) / 2).reshape(-1, 64).sum(1)
    variance = 64 * (4.0**bits - 1) / 12
    assert abs(centred.mean()) < stats.norm.isf(ALPHA) * np.sqrt(variance / centred.size)
    # For a sum of 64 uniforms the kurtosis is below 3, so the normal bound on the sample variance holds.
    assert abs(centred.var() / variance - 1) < stats.norm.isf(ALPHA) * np.sqrt(2 / centred.size)


def test_runs_up_and_down_have_the_expected_number():
    """Knuth's turning-point test: 2 (n - 2) / 3 turning points with variance (16 n - 29) / 90."""
    words = draw(11).astype(np.int64)
    turning = ((np.diff(words)[:-1] > 0) != (np.diff(words)[1:] > 0)).sum()
    z = (turning - 2 * (N - 2) / 3) / np.sqrt((16 * N - 29) / 90)
    assert abs(z) < stats.norm.isf(ALPHA)


def test_the_bits_are_those_of_the_element_and_not_of_the_shape():
    key = jax.random.key(5)
    flat = _random.random_words(key, (4096,), 32, 32)
    for shape in ((64, 64), (2, 2048), (4, 4, 256), (4096, 1)):
        assert (_random.random_words(key, shape, 32, 32).ravel() == flat).all()


def test_the_bits_of_a_sharded_array_are_those_of_the_whole():
    mesh = jax.make_mesh((8,), ("d",))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("d"))
    key = jax.random.key(5)
    sharded = jax.jit(lambda k: _random.random_words(k, (4096,), 32, 32), out_shardings=sharding)(key)
    assert (np.asarray(sharded) == np.asarray(_random.random_words(key, (4096,), 32, 32))).all()


def test_words_of_64_bits_have_independent_halves_that_no_split_key_repeats():
    with jax.enable_x64(True):
        keys = [jax.random.key(7), *jax.random.split(jax.random.key(7), 2)]
        words = [np.asarray(_random.random_words(k, (N // 4,), 64, 64)) for k in keys]
    halves = [h for w in words for h in (w >> 60, w >> 28 & 15)]
    for i, a in enumerate(halves):
        for b in halves[i + 1 :]:
            assert_uniform(np.bincount((a * 16 + b).astype(np.int64), minlength=256))


def test_fewer_bits_are_the_upper_ones():
    key = jax.random.key(6)
    whole = _random.random_words(key, (256,), 32, 32)
    assert (_random.random_words(key, (256,), 5, 32) == whole >> 27 << 27).all()


def test_counters_beyond_two_to_the_32():
    shape = jax.eval_shape(lambda: _random.counters((3, 2**20, 2**13)))
    assert [c.shape for c in shape] == [(3, 2**20, 2**13)] * 2
    assert _random.counters((2, 3))[1] is None
    words = _random.key_words(jax.random.key(0))
    low = jnp.arange(4096, dtype=jnp.uint32)
    rows = [np.asarray(_random.counter_bits(words, low, jnp.full_like(low, i))) >> 28 for i in range(16)]
    for i, a in enumerate(rows):
        for b in rows[i + 1 :]:
            assert_uniform(np.bincount(a * 16 + b, minlength=256))


@pytest.mark.parametrize("impl", ["threefry2x32", "rbg"])
def test_key_words_are_those_of_the_generator(impl):
    for seed in (0, 1, 2**31):
        key = jax.random.key(seed, impl=impl)
        assert np.array_equal(_random.key_words(key, 8), jax.random.bits(key, (8,)))
    assert np.array_equal(_random.key_words(jax.random.PRNGKey(3)), jax.random.bits(jax.random.key(3), (4,)))
