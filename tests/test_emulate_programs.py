"""``emulate`` through everything that holds programs, its rules, its sums, its draws, and what it refuses."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from programs import same

import qjax
from qjax import _elementwise, chop, emulate

RANDOM = np.random.default_rng(0)
X, W = (jnp.asarray(RANDOM.normal(size=(8, 8)), jnp.float32) for _ in range(2))
KEY = jax.random.key(0)


def c(x):
    return chop(x, "fp16")


def body(x):
    return x * 0.3 + x


def body_by_hand(x):
    return c(c(x * c(jnp.float32(0.3))) + x)


@jax.custom_jvp
def own_jvp(x):
    return body(x)


own_jvp.defjvp(lambda x, t: (own_jvp(*x), 7 * t[0]))


@jax.custom_vjp
def own_vjp(x):
    return body(x)


own_vjp.defvjp(lambda x: (own_vjp(x), None), lambda _, g: (7 * g,))

MESH = jax.make_mesh((8,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
NESTED = {
    "jit": jax.jit(body),
    "jit in jit": jax.jit(jax.vmap(jax.jit(body))),
    "remat": jax.checkpoint(body),
    "custom_jvp": own_jvp,
    "custom_vjp": own_vjp,
    "cond": lambda x: lax.cond(x[0, 0] < 1e9, body, jnp.negative, x),
    "scan": lambda x: lax.scan(lambda carry, _: (body(carry), None), x, length=1)[0],
    "while": lambda x: lax.while_loop(lambda s: s[0] < 1, lambda s: (s[0] + 1, body(s[1])), (0, x))[1],
    "vmap": jax.vmap(body),
    "shard_map": jax.shard_map(body, mesh=MESH, in_specs=jax.P("d"), out_specs=jax.P("d")),
}


@pytest.mark.parametrize("name", NESTED)
def test_operations_are_found_in(name):
    wanted = body_by_hand(c(X))
    assert same(emulate(NESTED[name], "fp16")(X), wanted)
    assert same(jax.jit(emulate(NESTED[name], "fp16"))(X), wanted)
    assert same(jax.jit(jax.vmap(emulate(NESTED[name], "fp16")))(X[None])[0], wanted) or name == "shard_map"


@pytest.mark.parametrize("name", ["jit", "remat", "custom_jvp", "custom_vjp", "cond", "scan", "shard_map"])
def test_gradients_are_straight_through(name):
    gradient = jax.grad(lambda x: emulate(NESTED[name], "fp16")(x).sum())(X)
    wanted = jax.grad(lambda x: NESTED[name](x).sum())(c(X))
    own = name.startswith("custom")
    # Of a body without a rule of its own the constant is rounded.
    assert same(gradient, wanted if own else jnp.full_like(X, 1 + c(jnp.float32(0.3))))


def test_gradients_of_rounded_operations_are_those_of_the_operations():
    def f(x, y):
        return (x + y, x - y, x * y, x / y, jnp.sqrt(jnp.abs(x)), x**3)

    x, y = c(X), c(W)
    cotangent = tuple(jnp.ones_like(X) for _ in range(6))
    for mode, key in (("nearest_even", None), ("toward_zero", None), ("stochastic", KEY)):
        g = emulate(f, "fp16", rounding=mode, key=key)
        found, wanted = jax.vjp(g, x, y)[1](cotangent), jax.vjp(f, x, y)[1](cotangent)
        # The derivative of x^3 is that of its products, of which x^2 is rounded: by a unit of fp16 at most.
        for a, b in zip(found, wanted, strict=True):
            np.testing.assert_allclose(a, b, rtol=2.0**-9)


def test_the_backward_pass_is_rounded_by_emulating_the_gradient():
    gradient = emulate(jax.grad(lambda x: (jnp.tanh(x) * 0.3).sum()), "fp16")(X)
    y, one, factor = c(jnp.tanh(c(X))), jnp.float32(1), c(jnp.float32(0.3))
    if "one_minus_square" in str(jax.make_jaxpr(jax.grad(jnp.tanh))(one)):  # jax 0.12
        assert same(gradient, c(factor * c(c(one + y) * c(one - y))))
    else:
        inner = c(factor * c(one - y))
        assert same(gradient, c(inner + c(inner * y)))


def test_polynomials_are_horners_scheme():
    found = emulate(jnp.polyval, "fp16")(jnp.asarray([1.1, 0.3, -2.0], jnp.float32), X[0])
    first, second, third = (c(jnp.float32(v)) for v in (1.1, 0.3, -2.0))
    assert same(found, c(c(c(c(first * c(X[0])) + second) * c(X[0])) + third))


def test_linear_solves_are_entered():
    a, b = X @ X.T + 8 * jnp.eye(8), X[0]
    rules = {"lu": None, "triangular_solve": None}
    assert same(emulate(jnp.linalg.solve, "fp16", rules=rules)(a, b), jnp.linalg.solve(c(a), c(b)))
    rounded = emulate(jnp.linalg.solve, "fp16")(a, b)
    assert same(rounded, c(rounded))
    gradient = jax.grad(lambda b: emulate(jnp.linalg.solve, "fp16")(a, b).sum())(b)
    # The transposed system, solved with the rounded factors.
    factors, pivots = jax.scipy.linalg.lu_factor(c(a))
    np.testing.assert_array_equal(gradient, jax.scipy.linalg.lu_solve((c(factors), pivots), jnp.ones_like(b), trans=1))


def sequential(terms):
    total = terms[0]
    for term in terms[1:]:
        total = np.float16(total + term)
    return total


def pairwise(terms):
    terms = list(terms)
    while len(terms) > 1:
        pairs = [np.float16(a + b) for a, b in zip(terms[::2], terms[1::2], strict=False)]
        terms = pairs + terms[len(pairs) * 2 :]
    return terms[0]


ORDERS = {"sequential": sequential, "pairwise": pairwise}


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("n", [1, 2, 7, 64])
def test_sums_are_those_of_numpy_float16_in_their_order(order, n):
    x = RANDOM.normal(size=(n, 5)).astype(np.float16)
    y = RANDOM.normal(size=(3, n)).astype(np.float16)
    wide = [jnp.asarray(v, jnp.float32) for v in (x, y)]
    add = ORDERS[order]

    def f(x, y):
        whole = x.sum(), x.sum(0), jnp.cumsum(x, 0), lax.cumsum(x, 0, reverse=True), x.prod(0)
        return *whole, y @ x, lax.reduce_window(x, np.float32(0), lax.add, (2, 1), (1, 1), "SAME")

    found = [np.asarray(v).astype(np.float16) for v in jax.jit(emulate(f, "fp16", sums=order))(*wide)]
    np.testing.assert_array_equal(found[0], add(x.ravel()))
    np.testing.assert_array_equal(found[1], [add(x[:, j]) for j in range(5)])
    if order == "sequential":
        np.testing.assert_array_equal(found[2], [[add(x[: i + 1, j]) for j in range(5)] for i in range(n)])
        np.testing.assert_array_equal(found[3], [[add(x[: i - n - 1 : -1, j] if i else x[::-1, j]) for j in range(5)]
                                                 for i in range(n)]) if n == 1 else None  # fmt: skip
        np.testing.assert_array_equal(found[4], np.multiply.reduce(x, 0, dtype=np.float16))
    products = [[(y[i] * x[:, j]).astype(np.float16) for j in range(5)] for i in range(3)]
    np.testing.assert_array_equal(found[5], [[add(terms) for terms in row] for row in products])
    shifted = np.concatenate([x[1:], np.zeros((1, 5), np.float16)])
    np.testing.assert_array_equal(found[6], x + shifted)


def test_long_pairwise_sums_compile_under_jit():
    """Of 13 terms or more they took XLA minutes while it could fuse their levels; the bits are those of the levels."""
    x = jnp.asarray(RANDOM.normal(size=(29, 100)), jnp.float32)
    run = emulate(lambda x: x.sum(1), "bf16", sums="pairwise", rounding="stochastic", key=jax.random.key(0))
    assert same(jax.jit(run)(x), run(x))


def test_convolutions_are_the_sums_of_their_patches():
    x, k = RANDOM.normal(size=(2, 6, 3)).astype(np.float16), RANDOM.normal(size=(2, 3, 4)).astype(np.float16)
    conv = lambda x, k: lax.conv_general_dilated(x, k, (1,), "VALID", dimension_numbers=("NWC", "WIO", "NWC"))  # noqa: E731
    found = emulate(conv, "fp16", sums="sequential")(x.astype(np.float32), k.astype(np.float32))
    # The terms of a patch: its features, and for each its places.
    patches = np.stack([x[:, i : i + 2].transpose(0, 2, 1).reshape(2, 6) for i in range(5)], 1)
    kernels = k.transpose(1, 0, 2).reshape(6, 4)
    wanted = [[[sequential(p * kernels[:, o]) for o in range(4)] for p in row] for row in patches]
    np.testing.assert_array_equal(np.asarray(found).astype(np.float16), wanted)


def test_sums_by_pattern():
    ones = jnp.ones(4096, jnp.float32)
    f = lambda x: (x.sum(), jnp.cumsum(x)[-1])  # noqa: E731
    assert emulate(f, "fp16", sums={"cumsum": "sequential"})(ones) == (4096, 2048)
    assert emulate(f, "fp16", sums={".*": "sequential"})(ones) == (2048, 2048)


def scoped(x):
    with jax.named_scope("head"):
        x = jnp.exp(x)
    with jax.named_scope("tail"):
        return jnp.exp(x * 0.3)


def test_rules_choose_by_primitive_and_by_scope():
    e4m3 = lambda x: chop(x, "e4m3")  # noqa: E731
    start, factor = c(X), c(jnp.float32(0.3))
    assert same(emulate(scoped, "fp16", rules={"head/exp": None})(X), c(jnp.exp(c(jnp.exp(start) * factor))))
    assert same(emulate(scoped, "fp16", rules={"tail/.*": "e4m3", "exp": None})(X),
                e4m3(jnp.exp(e4m3(jnp.exp(start) * e4m3(jnp.float32(0.3))))))  # fmt: skip
    down = qjax.Quantizer("e4m3", "toward_zero")
    assert same(emulate(scoped, "fp16", rules={".*/exp": down, "argument": None, "result": "e3m2finite"})(X),
                chop(down(jnp.exp(c(down(jnp.exp(X)) * factor))), "e3m2finite"))  # fmt: skip


def test_faults_strike_results():
    faulty = qjax.Quantizer("fp16", faults=qjax.Faults(0.5, bits=(15,)))
    found = emulate(jnp.exp, "fp16", rules={"exp": faulty}, key=KEY)(X)
    np.testing.assert_array_equal(jnp.abs(found), c(jnp.exp(c(X))))
    assert 0 < (found < 0).mean() < 1


def test_products_follow_a_recipe():
    e4m3 = qjax.Quantizer("e4m3_tensor")
    recipe = qjax.Recipe(qjax.Gemm(e4m3, e4m3, accumulator=qjax.Accumulator("fp16", chunk=4)))
    found = emulate(jnp.matmul, "bf16", rules={"dot_general": recipe})(X, W)
    x, w = chop(X, "bf16"), chop(W, "bf16")
    wanted = chop(qjax.dot_general(x, w, (((1,), (0,)), ((), ())), recipe=recipe), "bf16")
    assert same(found, wanted)


def test_functions_take_the_place_of_operations():
    def tanh(x, **_):
        return x - x**3 * 0.3

    found = emulate(lambda x: jnp.tanh(x) * 2, "fp16", rules={"tanh": tanh})(X)
    x = c(X)
    cube = c(x * c(x * x))
    assert same(found, c(c(x - c(cube * c(jnp.float32(0.3)))) * jnp.float32(2)))


def test_roundings_of_this_library_stay_what_they_are():
    def f(x):
        q = qjax.encode(chop(x, "mxfp4") * 0.3, "mxint8")
        return qjax.decode(q) + qjax.dot_general(x, x, (((1,), (1,)), ((), ())), recipe=qjax.recipes.MXFP8)

    x = c(X)
    product = c(qjax.dot_general(x, x, (((1,), (1,)), ((), ())), recipe=qjax.recipes.MXFP8))
    scaled = c(c(chop(x, "mxfp4")) * c(jnp.float32(0.3)))
    assert same(emulate(f, "fp16")(X), c(c(chop(scaled, "mxint8")) + product))


def test_constants_are_rounded_to_nearest_and_infinities_stay_in_range():
    table = np.array([0.1, -np.inf, 1e9], np.float32)
    f = lambda x: (x + table, jnp.where(x > 5, x, -np.inf), jnp.maximum(x, 0.1))  # noqa: E731
    added, masked, largest = emulate(f, "e4m3", saturate=True, rounding="toward_positive")(jnp.zeros(3, jnp.float32))
    np.testing.assert_array_equal(added, [0.1015625, -448, 448])
    np.testing.assert_array_equal(masked, [-448] * 3)
    np.testing.assert_array_equal(largest, [0.1015625] * 3)
    assert (emulate(f, "fp16")(jnp.zeros(3, jnp.float32))[1] == -np.inf).all()


def test_integers_and_booleans_are_untouched():
    f = lambda x, n: (n * 1000 + 1, x > 0.1, jnp.argmax(x), n.astype(jnp.float32))  # noqa: E731
    n = jnp.arange(5000, 5003)
    found = emulate(f, "e4m3", rounding="toward_zero")(jnp.asarray([0.1, 0.11, 0.2], jnp.float32), n)
    np.testing.assert_array_equal(found[0], n * 1000 + 1)
    np.testing.assert_array_equal(found[1], [False, True, True])
    np.testing.assert_array_equal(found[3], [448] * 3)


def test_long_integers_are_rounded_once():
    # Half way between two numbers of bf16, and one more: float32 has only the half.
    n = jnp.asarray([2**24 + 2**16, 2**24 + 2**16 + 1, -(2**30) - 2**22 - 1, 2**31 - 1], jnp.int32)
    found = emulate(lambda n: n.astype(jnp.float32), "bf16")(n)
    np.testing.assert_array_equal(found, [2.0**24, 2.0**24 + 2.0**17, -(2.0**30) - 2.0**23, 2.0**31])


def test_asymmetric_formats_round_signs():
    low = jnp.asarray([-128.0], jnp.float32)
    fixed = qjax.Fixed(8)
    assert emulate(jnp.negative, fixed)(low) == 127
    assert emulate(jnp.abs, fixed)(low) == 127


def test_draws_are_reproducible_and_independent():
    x = jnp.full((1000,), 1.125, jnp.float32)
    f = lambda x: lax.scan(lambda s, _: (s, s * 1.125), x, length=2)[1]  # noqa: E731
    run = lambda key: emulate(f, "e4m3", rounding="stochastic", key=key)(x)  # noqa: E731
    first = run(KEY)
    assert same(first, run(KEY))
    assert same(first, jax.jit(run)(KEY))
    assert not same(first, run(jax.random.key(1)))
    assert not same(first[0], first[1])
    # 1.265625 lies an eighth of the way from 1.25 to 1.375: within five standard deviations of 2000 draws.
    assert set(np.unique(first)) == {1.25, 1.375}
    assert abs((np.asarray(first) == 1.375).mean() - 0.125) < 5 * np.sqrt(0.125 * 0.875 / 2000)


def test_exact_results_never_move():
    x = jnp.asarray([1.0, 1.5, 48.0], jnp.float32)
    f = lambda x: (x + 0.0, x * 0.5, x / 2.0, jnp.sqrt(x * x), x - x)  # noqa: E731
    for mode in ("stochastic", "stochastic_equal"):
        run = emulate(f, "fp16", rounding=mode, key=KEY)
        assert same(run(x), tuple(map(jnp.asarray, (x, x / 2, x / 2, x, x - x))))


@pytest.mark.parametrize("width", [jnp.bfloat16, jnp.float16])
def test_short_dtypes_hold_shorter_formats(width):
    x, y = X.astype(width), W.astype(width)
    e5m2 = lambda v: chop(v, "e5m2")  # noqa: E731
    x, y = e5m2(x), e5m2(y)
    for mode in ("nearest_even", "toward_positive"):
        found = emulate(lambda x, y: x + y, "e5m2", rounding=mode)(x, y)
        exact = np.asarray(x, np.float64) + np.asarray(y, np.float64)
        with jax.enable_x64(True):
            wanted = chop(jnp.asarray(exact), "e5m2", mode)
        assert found.dtype == width
        np.testing.assert_array_equal(np.asarray(found, np.float64), wanted)


def test_what_is_done_is_listed():
    def f(x):
        x = lax.scan(lambda s, _: (jnp.tanh(s), None), x, length=5)[0]
        return jnp.fft.rfft(x).real.sum() + jnp.exp(x).T[0, 0]

    found = qjax.operations(f, X, fmt="fp16", rules={"exp": None})
    rows = {o.path: (o.kind, o.rounding, o.times) for o in found}
    assert rows["tanh"] == ("rounded", "fp16", 5)
    assert rows["exp"] == ("kept", "", 1)
    assert rows["transpose"] == ("moved", "", 1)
    assert rows["reduce_sum"] == ("summed", "fp16", 1)
    assert [o.path for o in found.opaque] == ["fft"]
    assert "test_emulate_programs.py" in found[0].source
    assert "tanh       | rounded | fp16" in str(found)
    recipe = qjax.operations(jnp.matmul, X, X, fmt="fp16", rules={"dot_general": qjax.Recipe()}, rounding="to_odd")
    assert [(o.kind, o.rounding) for o in recipe] == [("summed", "fp16 to_odd")]
    replaced = qjax.operations(jnp.exp, X, fmt="fp16", rules={"exp": jnp.tanh})
    assert [(o.kind, o.rounding) for o in replaced] == [("replaced", "tanh")]


def opaque(x):
    return jax.pure_callback(np.sin, x, x)


REFUSED = [
    (lambda: emulate(jnp.exp, "e5m11")(X), ValueError, r"single rounding to .* needs 2 x 12 \+ 2 significant bits"),
    (
        lambda: emulate(lambda x: -jnp.tanh(x), "e5m11")(X),
        ValueError,
        r"float32 has 24, at 'tanh' \(.*test_emulate_programs.py:\d+\)",
    ),
    (lambda: emulate(jnp.exp, "bf16")(X.astype(jnp.float16)), ValueError, "float16 does not hold the numbers of"),
    (lambda: emulate(jnp.exp, "e4m3_g4")(X), ValueError, "needs 2 x 28 [+] 2 significant bits"),
    (lambda: emulate(jnp.exp, "fp16", rounding="stochastic")(X), ValueError, r"is stochastic; pass key=jax.random.key"),
    (lambda: emulate(jnp.exp, "fp16", key=KEY)(X), ValueError, "nothing is rounded stochastically; leave key out"),
    (
        lambda: emulate(opaque, "fp16")(X),
        ValueError,
        r"no rule says what becomes of the primitive 'pure_callback' \(.*:",
    ),
    (lambda: emulate(jnp.exp, "fp16", sums="backwards"), ValueError, "sums must be one of 'once', 'sequential'"),
    (
        lambda: emulate(jnp.exp, "fp16", rules={"expp": None})(X),
        ValueError,
        "rule 'expp' matches no op.* nearest are 'exp'",
    ),
    (lambda: emulate(jnp.exp, "fp16", rules={"(": None}), ValueError, "pattern '[(]' is not a regular expression"),
    (lambda: emulate(jnp.exp, "fp16", rules={"exp": 3}), TypeError, r"rules\['exp'\] must be a format, a Quantizer"),
    (
        lambda: emulate(jnp.exp, "fp16", rules={"argument": jnp.exp}),
        TypeError,
        r"rules\['argument'\] must be a format, a",
    ),
    (lambda: emulate(jnp.exp, "fp16", rules={"exp": qjax.Recipe()})(X), TypeError, "is a Recipe, for products alone"),
    (
        lambda: emulate(lambda x: x.at[jnp.array([0, 0])].add(1.0), "fp16", sums="pairwise")(X),
        ValueError,
        r"the sums of 'scatter-add' \(.*\) cannot be 'pairwise'; pass sums=\{'scatter-add': 'once', '.*': 'pairwise'\}",
    ),
]


@pytest.mark.parametrize(("call", "error", "message"), REFUSED)
def test_what_is_refused(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_primitives_without_a_rule_can_get_one():
    assert same(emulate(opaque, "fp16", rules={"pure_callback": "fp16"})(X), c(jnp.asarray(np.sin(np.asarray(c(X))))))
    assert same(emulate(opaque, "fp16", rules={"pure_callback": None})(X), jnp.asarray(np.sin(np.asarray(c(X)))))


def test_arguments_that_are_no_arrays_stay():
    found = emulate(lambda x, flag, *, n: {"y": x * n, "flag": flag}, "fp16")(X, "a", n=2)
    assert found["flag"] == "a"
    assert same(found["y"], c(c(X) * 2))


def test_a_constant_may_be_the_first_number_that_is_rounded():
    """What JAX works out at once, in ``ensure_compile_time_eval``, is no equation of the core's program."""
    _elementwise._program.cache_clear()
    with jax.ensure_compile_time_eval():
        assert qjax.chop(jnp.float32(0.3), "e4m5") == 0.296875
