"""Collectives: the sums and gathers that NumPy makes of chopped arrays, the same bits on all devices, bytes counted."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qjax
from qjax import chop, collectives

N = 8
MESH = jax.make_mesh((N,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
RANDOM = np.random.default_rng(0)
X = jnp.asarray(RANDOM.normal(size=(N, 5, 100)), jnp.float32)
FORMATS = ["bf16", "e4m3", "mxfp4", "nvfp4", "int8_tensor", "e3m2finite_g16", "nf4_g64"]


def on_devices(fn):
    """Returns what fn is on each device: the arguments and results have an axis of devices first."""
    one = lambda *xs: jax.tree.map(lambda y: y[None], fn(*jax.tree.map(lambda x: x[0], xs)))  # noqa: E731
    return jax.jit(jax.shard_map(one, mesh=MESH, in_specs=jax.P("d"), out_specs=jax.P("d")))


def mapped(fn, *args):
    return on_devices(fn)(*args)


def pieces(x, n=N):
    """Returns the elements of an array cut into pieces."""
    flat = x.reshape(-1)
    length = -(-flat.size // n)
    return jnp.pad(flat, (0, n * length - flat.size)).reshape(n, length)


def rounded(rows, fmt):
    return jnp.stack([chop(row, fmt) for row in rows])


def direct(xs, fmt):
    total = functools.reduce(jnp.add, [rounded(pieces(x), fmt) for x in xs])
    return rounded(total, fmt).reshape(-1)[: xs[0].size].reshape(xs[0].shape)


def ring(xs, fmt):
    rows = [pieces(x) for x in xs]
    sums = []
    for owner in range(N):
        total = rows[(owner + 1) % N][owner]
        for hop in range(2, N + 1):
            total = chop(total, fmt) + rows[(owner + hop) % N][owner]
        sums.append(total)
    return rounded(jnp.stack(sums), fmt).reshape(-1)[: xs[0].size].reshape(xs[0].shape)


@pytest.mark.parametrize("order", ["direct", "ring"])
@pytest.mark.parametrize("fmt", FORMATS)
def test_psum_is_the_sum_of_rounded_pieces(fmt, order):
    found = mapped(functools.partial(collectives.psum, axis_name="d", fmt=fmt, order=order), X)
    wanted = dict(direct=direct, ring=ring)[order](list(X), fmt)
    for device in range(N):
        np.testing.assert_array_equal(found[device], wanted)


def test_psum_of_trees_and_other_dtypes():
    tree = {"a": X[:, 0, :3].astype(jnp.bfloat16), "b": (X[:, :, 0],)}
    found = mapped(functools.partial(collectives.psum, axis_name="d", fmt="e4m3"), tree)
    assert found["a"].dtype == jnp.bfloat16
    np.testing.assert_array_equal(
        found["a"][0], direct(list(tree["a"].astype(jnp.float32)), "e4m3").astype(jnp.bfloat16)
    )
    np.testing.assert_array_equal(found["b"][0][0], direct(list(tree["b"][0]), "e4m3"))


def test_sums_are_known_to_be_the_same_on_all_devices():
    fn = functools.partial(collectives.psum, axis_name="d", fmt="mxfp4")
    found = jax.jit(jax.shard_map(fn, mesh=MESH, in_specs=jax.P("d"), out_specs=jax.P()))(X)
    np.testing.assert_array_equal(found[0], direct(list(X), "mxfp4"))


@pytest.mark.parametrize("order", ["direct", "ring"])
@pytest.mark.parametrize("tiled", [True, False])
def test_psum_scatter_is_a_piece_of_the_sum(tiled, order):
    x = jnp.asarray(RANDOM.normal(size=(N, 4, 2 * N if tiled else N, 32)), jnp.float32)
    fn = functools.partial(
        collectives.psum_scatter, axis_name="d", fmt="mxfp8_e4m3", scatter_dimension=1, tiled=tiled, order=order
    )
    found = mapped(fn, x)
    plain = mapped(functools.partial(jax.lax.psum_scatter, axis_name="d", scatter_dimension=1, tiled=tiled), x)
    assert found.shape == plain.shape
    parts = x.reshape(N, 4, N, 2, 32) if tiled else x[:, :, :, None]
    for device in range(N):
        terms = parts[:, :, device]
        if order == "direct":
            total = functools.reduce(jnp.add, [chop(t, "mxfp8_e4m3") for t in terms])
        else:
            total = terms[(device + 1) % N]
            for hop in range(2, N + 1):
                total = chop(total, "mxfp8_e4m3") + terms[(device + hop) % N]
        np.testing.assert_array_equal(found[device], total if tiled else total[:, 0])


@pytest.mark.parametrize("tiled", [True, False])
@pytest.mark.parametrize("axis", [0, 1])
def test_all_gather_gives_all_arrays_rounded(axis, tiled):
    found = mapped(functools.partial(collectives.all_gather, axis_name="d", fmt="nvfp4", axis=axis, tiled=tiled), X)
    rounded = jnp.stack([chop(x, "nvfp4") for x in X])
    wanted = mapped(functools.partial(jax.lax.all_gather, axis_name="d", axis=axis, tiled=tiled), rounded)
    np.testing.assert_array_equal(found, wanted)


def test_fp32_on_the_wire_is_exact():
    x = jnp.asarray(RANDOM.integers(-100, 100, (N, 33)), jnp.float32)
    for order in ("direct", "ring"):
        found = mapped(functools.partial(collectives.psum, axis_name="d", fmt="fp32", order=order), x)
        np.testing.assert_array_equal(found[3], x.sum(0))


def test_stochastic_sums_draw_for_every_device_and_are_right_on_average():
    x = jnp.full((N, 4096), 1.0625, jnp.float32)  # half way between two numbers of e4m3
    run = lambda key: mapped(  # noqa: E731
        lambda x: collectives.psum_scatter(x, "d", "e4m3", "stochastic", tiled=True, key=key), x
    )
    found = np.asarray(run(jax.random.key(0)))
    np.testing.assert_array_equal(found, run(jax.random.key(0)))
    assert not np.array_equal(found, run(jax.random.key(1)))
    # The sum of eight draws of 1 or 1.125: were they one draw there would be two values.
    assert set(np.unique(found)) == {8 + k / 8 for k in range(9)}
    # Within five standard deviations of the mean of 8 x 4096 draws.
    assert abs(found.mean() / 8 - 1.0625) < 5 * 0.0625 / np.sqrt(8 * 4096)
    gathered = np.asarray(
        mapped(lambda x: collectives.all_gather(x, "d", "e4m3", "stochastic", key=jax.random.key(0)), x)
    )
    assert (gathered == gathered[:1]).all()
    assert not np.array_equal(gathered[0, 0], gathered[0, 1])


def test_feedback_makes_up_for_what_was_left_out():
    """The sums of T steps differ from the exact ones by the errors still kept, and not by T errors."""
    steps, zeros = 20, collectives.init_feedback(X[0], N)
    state = jax.tree.map(lambda y: jnp.broadcast_to(y, (N, *y.shape)), zeros)
    step = on_devices(lambda x, state: collectives.psum(x, "d", "e2m1", saturate=True, feedback=state))
    total = 0
    for _ in range(steps):
        sums, state = step(X / 4, state)
        total = total + np.asarray(sums[0], np.float64)
    exact = np.asarray(X, np.float64).sum(0) / 4
    left = np.asarray(state.terms, np.float64).sum(0)
    summed = np.asarray(state.sums, np.float64).reshape(-1)[: exact.size].reshape(exact.shape)
    # float32 sums of some 20 x 10 numbers of a few units: 200 roundings of at most 2^-22.
    np.testing.assert_allclose(total + left + summed, steps * exact, atol=200 * 2.0**-22)
    without = np.asarray(
        mapped(functools.partial(collectives.psum, axis_name="d", fmt="e2m1", saturate=True), X / 4)[0]
    )
    assert np.abs(total - steps * exact).mean() < 0.2 * np.abs(steps * (without - exact)).mean()


def test_gradients_are_those_of_lax():
    def loss(collective):
        return lambda x: mapped(
            lambda x: (collective(x) * jnp.arange(x.size, dtype=x.dtype).sum()).sum()[None], x
        ).sum()

    for ours, lax in (
        (lambda x: collectives.all_gather(x, "d", "e4m3"), lambda x: jax.lax.all_gather(x, "d")),
        (lambda x: collectives.psum(x, "d", "e4m3"), lambda x: jax.lax.psum(x, "d")),
    ):
        np.testing.assert_array_equal(jax.grad(loss(ours))(X), jax.grad(loss(lax))(X))


def test_bytes_on_the_wire():
    x = jnp.ones((N, 1 << 15), jnp.float32)

    def sent(fn):
        wrapped = jax.shard_map(fn, mesh=MESH, in_specs=jax.P("d"), out_specs=jax.P("d"), check_vma=False)
        return collectives.wire_bytes(jax.jit(wrapped).lower(x).compile())

    plain = sent(lambda x: jax.lax.psum(x, "d"))
    assert plain == {"all-reduce": 2 * (N - 1) * (1 << 15) * 4 // N}
    full = sum(plain.values())
    for fmt, bits in (("mxfp4", 4.25), ("mxfp8_e4m3", 8.25), ("bf16", 16), ("e3m2finite_g32", 6 + 1)):
        for order in ("direct", "ring"):
            found = sent(lambda x, f=fmt, o=order: collectives.psum(x, "d", f, order=o))
            assert set(found) == {"all-gather", "all-to-all" if order == "direct" else "collective-permute"}
            assert sum(found.values()) == full * bits / 32
    assert sum(sent(lambda x: collectives.psum(x, "d", "mxfp4")).values()) <= 0.15 * full
    scattered = sent(lambda x: jax.lax.psum_scatter(x, "d", scatter_dimension=1, tiled=True))
    assert scattered == {"reduce-scatter": (N - 1) * (1 << 15) * 4 // N}


REFUSED = [
    (lambda x: collectives.psum(x, "d", "e4m3", order="tree"), "psum: order must be 'direct' or 'ring', got 'tree'"),
    (
        lambda x: collectives.psum_scatter(x, "d", "e4m3", order="tree"),
        "psum_scatter: order must be 'direct' or 'ring'",
    ),
    (lambda x: collectives.psum(x, "d", "e4m3", order="ring", feedback=0), "feedback is for order='direct'"),
    (lambda x: collectives.psum(x, "d", qjax.Scaled(qjax.E4M3, qjax.FP32, (4, 4))), r"tiles of \(4, 4\) cannot be cut"),
    (lambda x: collectives.all_gather(x, "d", "e4m3", "stochastic"), r"rounding 'stochastic' needs key=jax.random.key"),
    (
        lambda x: collectives.all_gather(x, "d", "e4m3", key=jax.random.key(0)),
        "'nearest_even' draws nothing; leave key",
    ),
    (
        lambda x: collectives.psum_scatter(x, "d", "e4m3"),
        "dimension 0 has 5 elements for 8 devices; it must have one each",
    ),
    (lambda x: collectives.psum_scatter(x, "d", "e4m3", tiled=True), "it must be a multiple of them"),
]


@pytest.mark.parametrize(("fn", "message"), REFUSED)
def test_what_is_refused(fn, message):
    with pytest.raises(ValueError, match=message):
        mapped(fn, X)


def test_groups_of_devices_are_read_as_every_version_writes_them():
    class Compiled:
        def __init__(self, groups):
            self.groups = groups

        def as_text(self):
            return f"  %a = f32[8,4]{{1,0}} all-gather(%x), replica_groups={self.groups}, dimensions={{0}}"

    for groups in (
        "{{0,1,2,3},{4,5,6,7}}",
        "[2,4]<=[8]",
        "mesh['a'=2,'b'=4] {'b'}",
        "mesh['a'=2,'b'=2,'c'=2] {'a','c'}",
    ):
        assert collectives.wire_bytes(Compiled(groups)) == {"all-gather": 8 * 4 * 4 * 3 // 4}
    with pytest.raises(ValueError, match="wire_bytes: the replica groups of this operation cannot be read: %a = f32"):
        collectives.wire_bytes(Compiled("somehow"))
