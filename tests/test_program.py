"""quantize on plain functions: what has no recipe is untouched bit for bit, what has one is as if written by hand."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from programs import E4M3, FAST, IDENTITY, RECIPE, STOCHASTIC, same, text

import qjax

KEY = jax.random.key(0)
X, W = jax.random.normal(KEY, (4, 4)), jax.random.normal(jax.random.key(1), (4, 4))


def by_hand(x, w):
    return qjax.dot_general(x, w, (((1,), (0,)), ((), ())), preferred_element_type=jnp.float32, recipe=RECIPE)


def scanned(dot, x, w, **options):
    def step(carry, w):
        y = jnp.tanh(dot(carry, w))
        return y, y.sum()

    carry, sums = lax.scan(step, x, jnp.stack([w, x, w]), **options)
    return carry.sum() + sums.sum()


def looped(dot, x, w):
    state = lax.while_loop(lambda s: s[0] + dot(s[1], w)[0, 0] * 0 < 3, lambda s: (s[0] + 1, dot(s[1], w)), (0.0, x))
    return state[1].sum()


def sharded(dot, x, w, **options):
    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    specs = dict(mesh=mesh, in_specs=(jax.P("data"), jax.P()), out_specs=jax.P())
    return jax.shard_map(lambda x, w: lax.psum(dot(x, w).sum(), "data"), **specs, **options)(x, w)


@functools.partial(jax.jit, static_argnums=0)
def helper(dot, x, w):
    return jax.nn.gelu(dot(x, w))


@jax.custom_vjp
def doubled_gradient(x):
    return x


doubled_gradient.defvjp(lambda x: (x, None), lambda _, g: (2 * g,))

FUNCTIONS = {
    "straight": lambda dot, x, w: dot(x, w).sum(),
    "jit": lambda dot, x, w: helper(dot, x, w).sum() + helper(dot, w, x).sum(),
    "jit, sharded": lambda dot, x, w: jax.jit(
        dot, in_shardings=jax.sharding.SingleDeviceSharding(jax.devices()[0]), keep_unused=True
    )(x, w).sum(),
    "scan": scanned,
    "scan, backward": functools.partial(scanned, reverse=True, unroll=2),
    "scan in scan": lambda dot, x, w: lax.scan(lambda c, _: (scanned(dot, x + c, w), None), 0.0, length=2)[0],
    "fori": lambda dot, x, w: lax.fori_loop(0, 2, lambda i, y: dot(y, w), x).sum(),
    "cond": lambda dot, x, w: lax.cond(x[0, 0] > 0, dot, lambda x, w: x, x, w).sum(),
    "switch": lambda dot, x, w: lax.switch(2, [lambda x, w: x, dot, lambda x, w: dot(w, x)], x, w).sum(),
    "remat": lambda dot, x, w: jax.checkpoint(lambda x: jnp.sin(dot(jnp.sin(dot(x, w)), w)))(x).sum(),
    "remat, policy": lambda dot, x, w: jax.checkpoint(
        lambda x: jnp.sin(dot(x, w)), policy=jax.checkpoint_policies.dots_saveable, prevent_cse=False
    )(x).sum(),
    "derivatives of their own": lambda dot, x, w: (
        jax.nn.relu(doubled_gradient(dot(x, w))).sum() + jax.nn.logsumexp(dot(jax.nn.gelu(x), w))
    ),
    "vmap inside": lambda dot, x, w: jax.vmap(lambda v: dot(v[None], w))(x).sum(),
    "shard_map": sharded,
    "shard_map, unchecked": functools.partial(sharded, check_vma=False),
}


def lax_dot(x, w):
    return x @ w


def with_gradients(f):
    return jax.value_and_grad(f, argnums=(0, 1))


def run(f):
    return jax.jit(with_gradients(f), compiler_options=FAST)(X, W)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_nothing_changes(name):
    f = functools.partial(FUNCTIONS[name], lax_dot)
    empty = qjax.quantize(f, qjax.Recipe())
    assert text(with_gradients(empty), X, W) == text(with_gradients(f), X, W)
    assert same(run(qjax.quantize(f, IDENTITY)), run(f))


@pytest.mark.parametrize("name", ["jit", "remat"])
def test_nothing_changes_eagerly(name):
    f = functools.partial(FUNCTIONS[name], lax_dot)
    assert same(with_gradients(qjax.quantize(f, IDENTITY))(X, W), with_gradients(f)(X, W))


@pytest.mark.parametrize("name", FUNCTIONS)
def test_it_is_as_written_by_hand(name):
    f = FUNCTIONS[name]
    got = run(qjax.quantize(functools.partial(f, lax_dot), RECIPE))
    assert same(got, run(functools.partial(f, by_hand)))
    assert not same(got[0], f(lax_dot, X, W))


def test_while_loops_are_as_written_by_hand():
    f = qjax.quantize(functools.partial(looped, lax_dot), RECIPE)
    assert same(f(X, W), looped(by_hand, X, W))
    assert same(qjax.quantize(functools.partial(looped, lax_dot), IDENTITY)(X, W), looped(lax_dot, X, W))
    assert len(qjax.coverage(f, X, W)) == 2


def test_convolutions_are_replaced():
    x, w = jax.random.normal(KEY, (2, 6, 6, 4)), jax.random.normal(KEY, (3, 3, 2, 8))
    options = dict(window_strides=(2, 1), padding="SAME", rhs_dilation=(1, 2), feature_group_count=2)
    options |= dict(dimension_numbers=("NHWC", "HWIO", "NHWC"))
    lax_loss = lambda x, w: lax.conv_general_dilated(x, w, **options).sum()  # noqa: E731
    hand = lambda x, w: qjax.conv_general_dilated(x, w, **options, recipe=RECIPE).sum()  # noqa: E731
    got = jax.jit(with_gradients(qjax.quantize(lax_loss, RECIPE)))(x, w)
    assert same(got, jax.jit(with_gradients(hand))(x, w))
    assert same(
        jax.jit(with_gradients(qjax.quantize(lax_loss, IDENTITY)))(x, w), jax.jit(with_gradients(lax_loss))(x, w)
    )
    (site,) = qjax.coverage(lax_loss, x, w)
    assert site.operation == "conv_general_dilated" and site.multiply_adds == 2 * 3 * 6 * 8 * 3 * 3 * 2


def test_a_square_batch_confuses_no_operand():
    """lhs alone is quantized, and it is the left one."""
    recipe = qjax.Recipe(qjax.Gemm(E4M3, None), qjax.Gemm(None, E4M3))
    assert same(qjax.quantize(lax_dot, recipe)(X, W), E4M3(X) @ W)
    gradients = jax.vjp(qjax.quantize(lax_dot, recipe), X, W)[1](X)
    assert same(gradients, jax.vjp(lax_dot, X, E4M3(W))[1](X)[:1] + jax.vjp(lax_dot, X, W)[1](X)[1:])


def test_what_is_no_array_stays_what_it_is():
    def f(x, n, *, flag, name, nothing):
        assert type(n) is int and flag is True and name == "a" and nothing is None
        return {"y": x @ x, "n": n, "name": name, "flag": flag, "nothing": nothing, "numpy": np.float32(1)}

    out = qjax.quantize(f, RECIPE)(np.asarray(X), 3, flag=True, name="a", nothing=None)
    assert same(out.pop("y"), by_hand(X, X))
    assert out == {"n": 3, "name": "a", "flag": True, "nothing": None, "numpy": 1} and type(out["n"]) is int


def test_closures_are_differentiated_and_seen_as_they_are_now():
    w = [W]
    f = qjax.quantize(lambda x: (x @ w[0]).sum(), IDENTITY)
    before = f(X)
    w[0] = 2 * W
    assert same(f(X), 2 * before)
    closed = jax.grad(lambda w: qjax.quantize(lambda x: (x @ w).sum(), IDENTITY)(X))(W)
    assert same(closed, jax.grad(lambda w: (X @ w).sum())(W))


def test_vmap_composes_from_outside():
    batch = jnp.stack([X, W, X + W])
    f = qjax.quantize(lambda x: jax.nn.relu(x @ W), RECIPE)
    assert same(jax.vmap(f)(batch), jnp.stack([f(x) for x in batch]))


@pytest.mark.parametrize("reference_first", [True, False])
@pytest.mark.parametrize("name", ["jit", "jit inside", "remat", "jnp.dot", "x @ w"])
def test_neither_runs_as_the_other(name, reference_first):
    """What JAX or a user jitted before, of the same functions, changes nothing."""
    jitted = jax.jit(lambda x, w: x @ w)
    again = jax.checkpoint(lambda x, w: x @ w)
    functions = {
        "jit": jitted,
        "jit inside": lambda x, w: jitted(x, w) + 0,
        "remat": again,
        "jnp.dot": jnp.dot,
        "x @ w": lambda x, w: x @ w,
    }
    f = functions[name]
    quantized = qjax.quantize(f, RECIPE)
    calls = [f, quantized, jax.jit(f), jax.jit(quantized)]
    for call in (calls if reference_first else calls[::-1]) * 2:
        expected = by_hand(X, W) if call in (quantized, calls[3]) else X @ W
        assert same(call(X, W), expected)


def test_equal_recipes_compile_once():
    traces = []

    @functools.partial(jax.jit, static_argnums=0)
    def step(recipe, x):
        traces.append(recipe)
        return qjax.quantize(lambda x: x @ x, recipe)(x)

    for name in ("e4m3", "float8_e4m3fn", "E4M3"):
        q = qjax.Quantizer(name)
        step(qjax.Recipe(qjax.Gemm(q, q)), X)
    assert len(traces) == 1
    step(IDENTITY, X)
    assert len(traces) == 2


def test_a_jitted_helper_compiles_once_in_eager_calls():
    from qjax import _jaxpr

    f = qjax.quantize(functools.partial(FUNCTIONS["jit"], lax_dot), qjax.Recipe(qjax.Gemm(E4M3, None)))
    f(X, W)
    before = _jaxpr._jitted.cache_info()
    f(X, W)
    after = _jaxpr._jitted.cache_info()
    assert after.misses == before.misses and after.hits == before.hits + 2


def stochastic(f, key=KEY):
    return qjax.quantize(f, STOCHASTIC, key=key)


def test_same_key_same_result_and_other_key_other_result():
    one = stochastic(lax_dot)(X, W)
    assert same(one, stochastic(lax_dot)(X, W))
    assert not same(one, stochastic(lax_dot, jax.random.key(1))(X, W))


CALLS = {
    "two sites": lambda x, w: [x @ w, x @ w],
    "two calls of a jitted helper": lambda x, w: [helper(lax_dot, x, w), helper(lax_dot, x, w)],
    "scan": lambda x, w: list(lax.scan(lambda c, _: (c, x @ w), None, length=2)[1]),
    "scan in scan": lambda x, w: list(
        lax.scan(lambda c, _: (c, lax.scan(lambda c, _: (c, x @ w), None, length=2)[1]), None, length=2)[1].reshape(
            4, 4, 4
        )
    ),
    "while": lambda x, w: list(
        lax.while_loop(lambda s: s[0] < 2, lambda s: (s[0] + 1, s[1].at[s[0]].set(x @ w)), (0, jnp.zeros((2, 4, 4))))[1]
    ),
    "remat": lambda x, w: [jax.checkpoint(lax_dot)(x, w), jax.checkpoint(lax_dot)(x, w)],
    "cond": lambda x, w: [lax.cond(True, lax_dot, lambda x, w: x, x, w), x @ w],
}


@pytest.mark.parametrize("name", CALLS)
def test_each_product_draws_its_own_bits(name):
    results = stochastic(CALLS[name])(X, W)
    assert len({np.asarray(y).tobytes() for y in results}) == len(results)


@pytest.mark.parametrize("check_vma", [True, False])
def test_each_shard_draws_its_own_bits(check_vma):
    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    specs = dict(mesh=mesh, in_specs=(jax.P("data"), jax.P()), out_specs=jax.P("data"), check_vma=check_vma)
    f = jax.jit(stochastic(jax.shard_map(lax_dot, **specs)))
    top, bottom = np.split(f(jnp.concatenate([X, X]), W), 2)
    assert not np.array_equal(top, bottom)


@jax.custom_vjp
def own_gradient(x):
    return x @ x


own_gradient.defvjp(lambda x: (x @ x, x), lambda x, g: (g @ x,))


@jax.custom_jvp
def own_tangent(x):
    return x @ x


own_tangent.defjvp(lambda primals, tangents: (primals[0] @ primals[0], tangents[0] @ primals[0]))


def named(x):
    with jax.named_scope("attn"):
        y = jnp.einsum("ab,bc->ac", x, x)
    with jax.named_scope("mlp"):
        return y @ x


SOLVE = lambda x: jnp.linalg.solve(x, x)  # noqa: E731
REFUSALS = {
    "quantize: rule must be a Recipe, a dict of path patterns to Recipe or None, or a function of a Site, got str": (
        lambda: qjax.quantize(lax_dot, "e4m3")
    ),
    r"quantize: pattern '\(' is not a regular expression: ": lambda: qjax.quantize(lax_dot, {"(": RECIPE}),
    r"quantize: rule\['.\*'\] must be a Recipe, or None for full precision, got 'e4m3'": (
        lambda: qjax.quantize(lax_dot, {".*": "e4m3"})
    ),
    "quantize: what the rule returns for '' must be a Recipe, or None for full precision, got 3": (
        lambda: qjax.quantize(lax_dot, lambda site: 3)(X, W)
    ),
    "quantize: there is no dot product or convolution to quantize; remove the rule": (
        lambda: qjax.quantize(lambda x: x + 1, RECIPE)(X)
    ),
    "there is no dot product or convolution left to quantize": (
        lambda: qjax.quantize(qjax.quantize(lax_dot, RECIPE), RECIPE)(X, W)
    ),
    r"quantize: pattern 'mpl' matches no site; the nearest paths are 'mlp', 'attn/ab,bc->ac'\. A pattern must match": (
        lambda: qjax.quantize(named, {"mpl": RECIPE, ".*": None})(X)
    ),
    "quantize: pattern 'mlp' matches no site": lambda: qjax.quantize(named, {".*": RECIPE, "mlp": None})(X),
    "quantize: pattern 'mpl' matches no site; .*": lambda: qjax.quantize(named, {"mpl": RECIPE}, strict=False)(X),
    r"quantize: the rule says nothing of 1 of 2 sites:\n  'mlp' \(dot_general \[4, 4\] x \[4, 4\], .*program.py:\d+\)\n"
    r'Add a pattern with None to leave them in full precision \(".\*": None at the end\), or pass strict=False': (
        lambda: qjax.quantize(named, {"attn/.*": RECIPE})(X)
    ),
    r"quantize: the recipe of 'attn/ab,bc->ac' \(.*\) is stochastic; pass key=jax.random.key": (
        lambda: qjax.quantize(named, STOCHASTIC)(X)
    ),
    "quantize: key was given, but no recipe that is used draws anything; leave key out": (
        lambda: qjax.quantize(named, RECIPE, key=KEY)(X)
    ),
    r"cannot be quantized: it is in a gradient; quantize first, then differentiate: grad\(quantize\(f\)\)": (
        lambda: qjax.quantize(jax.grad(lambda x: (x @ W).sum()), RECIPE)(X)
    ),
    "cannot be quantized: it is inside a custom_vjp_call, whose own rules say what happens. To leave it in full": (
        lambda: qjax.quantize(own_gradient, RECIPE)(X)
    ),
    "cannot be quantized: it is inside a custom_jvp_call": lambda: qjax.quantize(own_tangent, RECIPE)(X),
    "cannot be quantized: it is inside a custom_linear_solve": lambda: qjax.quantize(SOLVE, RECIPE)(X),
    "cannot be quantized: its operands are int32, not float": (
        lambda: qjax.quantize(lambda x: x @ x, RECIPE)(jnp.ones((2, 2), jnp.int32))
    ),
    "coverage: rule must be a Recipe": lambda: qjax.coverage(lax_dot, X, W, rule=3),
}


@pytest.mark.parametrize("text", REFUSALS)
def test_refusals(text):
    with pytest.raises((ValueError, TypeError), match=text):
        REFUSALS[text]()


def named_by_hand(x):
    return by_hand(jnp.einsum("ab,bc->ac", x, x), x)


def test_none_leaves_in_full_precision_what_cannot_be_quantized():
    def f(mlp, x):
        return own_gradient(x) + own_tangent(x) + SOLVE(x) + jax.grad(lambda x: (x @ W).sum())(x) + mlp(x)

    rule = {"mlp": RECIPE, ".*": None}
    got = jax.jit(qjax.quantize(functools.partial(f, named), rule))(X)
    assert same(got, jax.jit(functools.partial(f, named_by_hand))(X))
    sites = qjax.coverage(functools.partial(f, named), X, rule=rule)
    assert [site.path for site in sites if site.is_quantized] == ["mlp"]
    assert {site.fixed[:12] for site in sites} == {"", "it is inside", "it is in a g"}


def test_the_first_pattern_wins_and_a_function_chooses_by_what_it_sees():
    both = {"attn/.*": None, ".*": RECIPE}
    assert same(qjax.quantize(named, both)(X), named_by_hand(X))
    chosen = qjax.quantize(named, lambda site: RECIPE if site.path == "mlp" and site.lhs.shape == (4, 4) else None)
    assert same(chosen(X), named_by_hand(X))
    assert same(qjax.quantize(named, {"mlp": RECIPE}, strict=False)(X), named_by_hand(X))
    assert same(qjax.quantize(named, {".*": None})(X), named(X))
