"""Training on meshes: the bits of one device, whatever the mesh, and no collective that a table does not state."""

import collections
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import P
from jax.sharding import AxisType, NamedSharding
from programs import same

import qjax
from qjax import linen as qlinen, nnx as qnnx, recipes
from qjax.collectives import _ARRAY, _COLLECTIVE

WIDTH, HIDDEN, BATCH = 256, 1024, 256
KEYS = jax.random.split(jax.random.key(0), 4)
PARAMS = {
    "in": jax.random.normal(KEYS[0], (WIDTH, HIDDEN)) / 16,
    "out": jax.random.normal(KEYS[1], (HIDDEN, WIDTH)) / 32,
}
DATA = tuple(jax.random.normal(key, (BATCH, WIDTH)) for key in KEYS[2:])
# Recipes whose sums are exact in float32: products of integers of 8 bits and of E2M1, at most 1024 of them. So the
# order of a sum, which a mesh decides, does not matter.
EXACT = {
    "int8, a scale a channel": recipes.uniform("int8_channel"),
    "int8, a scale a tensor": recipes.uniform("int8_tensor"),
    "mxfp4": recipes.uniform("mxfp4"),
    "mxfp4, stochastic": recipes.uniform("mxfp4", gradient_rounding="stochastic"),
}
# mesh (data, model), and how the parameters and the batch lie on it.
STRATEGIES = {
    "one device": ((1, 1), {"in": P(), "out": P()}, P()),
    "data parallel": ((8, 1), {"in": P(), "out": P()}, P("data")),
    "fully sharded": ((8, 1), {"in": P("data"), "out": P("data")}, P("data")),
    "tensor parallel": ((1, 8), {"in": P(None, "model"), "out": P("model")}, P()),
    "data and tensor parallel": ((2, 4), {"in": P(None, "model"), "out": P("model")}, P("data")),
}


def loss(params, x, y):
    return jnp.mean((jax.nn.relu(x @ params["in"]) @ params["out"] - y) ** 2)


def train(recipe, steps: int = 2, loss=loss):
    """Returns a function from parameters and a batch to the parameters after some steps."""

    def run(params, x, y):
        def step(params, number):
            key = jax.random.key(number) if recipe is not None and recipe.is_stochastic else None
            quantized = loss if recipe is None else qjax.quantize(loss, recipe, key=key)
            gradients = jax.grad(quantized)(params, x, y)
            return jax.tree.map(lambda p, g: p - 8 * g, params, gradients), None

        return jax.lax.scan(step, params, jnp.arange(steps))[0]

    return run


def placed(strategy: str, axis_type=AxisType.Auto):
    """Returns parameters and data on the mesh of a strategy."""
    sizes, specs, batch = STRATEGIES[strategy]
    devices = np.array(jax.devices()[: sizes[0] * sizes[1]]).reshape(sizes)
    mesh = jax.sharding.Mesh(devices, ("data", "model"), axis_types=(axis_type,) * 2)
    params = {name: jax.device_put(p, NamedSharding(mesh, specs[name])) for name, p in PARAMS.items()}
    return params, tuple(jax.device_put(x, NamedSharding(mesh, batch)) for x in DATA)


@functools.cache
def compiled(recipe, strategy: str):
    params, data = placed(strategy)
    shardings = jax.tree.map(lambda p: p.sharding, params)
    return jax.jit(train(recipe), out_shardings=shardings).lower(params, *data).compile()


@functools.cache
def of_one_device(name: str):
    return jax.jit(train(EXACT[name]))(PARAMS, *DATA)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("name", EXACT)
def test_training_has_the_bits_of_one_device(name, strategy):
    params, data = placed(strategy)
    trained = compiled(EXACT[name], strategy)(params, *data)
    for key, value in of_one_device(name).items():
        assert trained[key].sharding.is_equivalent_to(params[key].sharding, 2)
        assert same(trained[key], value)
        assert not same(value, PARAMS[key])


def moved(program) -> tuple[collections.Counter, list[str]]:
    """Returns the arrays that collectives of a program move, those of tensors counted, and those of scales."""
    large, small = collections.Counter(), []
    for line in program.as_text().splitlines():
        if found := _COLLECTIVE.search(line):
            for dtype, shape in _ARRAY.findall(found["shapes"]):
                size = np.prod([int(n) for n in shape.split(",") if n])
                if size > HIDDEN:
                    large[found["name"], dtype, shape] += 1
                else:
                    small.append(f"{found['name']} {dtype}")
    return large, small


# What a step moves beside what it moves in float32: nothing for blocks on one device; the largest magnitudes, as
# integers, of scales that several devices share; and these scales where a weight is gathered.
BESIDE = {
    ("int8, a scale a channel", "data parallel"): {"all-reduce u32"},
    ("int8, a scale a channel", "fully sharded"): {"all-reduce u32", "all-gather f32"},
    ("int8, a scale a channel", "tensor parallel"): {"all-reduce u32"},
    ("int8, a scale a channel", "data and tensor parallel"): {"all-reduce u32"},
    ("int8, a scale a tensor", "data parallel"): {"all-reduce u32"},
    ("int8, a scale a tensor", "fully sharded"): {"all-reduce u32"},
    ("int8, a scale a tensor", "tensor parallel"): {"all-reduce u32"},
    ("int8, a scale a tensor", "data and tensor parallel"): {"all-reduce u32"},
}


@pytest.mark.parametrize("strategy", list(STRATEGIES)[1:])
@pytest.mark.parametrize("name", EXACT)
def test_no_collective_but_those_stated(name, strategy):
    plain, beside = moved(compiled(None, strategy))
    large, small = moved(compiled(EXACT[name], strategy))
    assert large == plain
    assert set(small) - set(beside) == BESIDE.get((name, strategy), set())


@pytest.mark.parametrize("spec", [P("data"), P(None, "data"), P("data", "model"), P(("data", "model"))], ids=str)
@pytest.mark.parametrize("sizes", [(8, 1), (2, 4)], ids=str)
def test_blocks_of_large_arrays_stay_on_their_devices(sizes, spec):
    mesh = jax.make_mesh(sizes, ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    x = jnp.tile(DATA[0], (8, 3))  # 2048 x 768: an odd number of blocks of 32 on each of 8 devices
    split = jax.device_put(x, NamedSharding(mesh, spec))
    for fmt in ("mxfp4", "int4_g16"):
        program = jax.jit(lambda x, fmt=fmt: qjax.chop(x, fmt)).lower(split).compile()
        assert moved(program) == (collections.Counter(), [])
        assert same(program(split), qjax.chop(x, fmt))


@pytest.mark.parametrize("strategy", ["data parallel", "fully sharded"])
@pytest.mark.parametrize("name", EXACT)
def test_explicit_axes(name, strategy):
    params, data = placed(strategy, AxisType.Explicit)
    with jax.set_mesh(params["in"].sharding.mesh):
        trained = jax.jit(train(EXACT[name]))(params, *data)
    for key, value in of_one_device(name).items():
        assert jax.typeof(trained[key]).sharding == jax.typeof(params[key]).sharding
        assert same(trained[key], value)


def test_explicit_axes_of_a_contraction():
    """As in jax, the sharding of the result is to be said."""
    params, _ = placed("tensor parallel", AxisType.Explicit)
    recipe = EXACT["int8, a scale a channel"]

    def product(x, w, **options):
        return qjax.dot_general(x, w, (((1,), (0,)), ((), ())), recipe=recipe, **options)

    mesh = params["out"].sharding.mesh
    hidden = jax.device_put(jnp.tile(DATA[0], (1, 4)), NamedSharding(mesh, P(None, "model")))
    with jax.set_mesh(mesh):
        found = jax.jit(functools.partial(product, out_sharding=P("data")))(hidden, params["out"])
    assert jax.typeof(found).sharding.spec == P("data", None)
    assert same(found, jax.jit(product)(jnp.tile(DATA[0], (1, 4)), PARAMS["out"]))
    for fmt in ("mxfp4", "int8_channel", "nvfp4", "e4m3_2x16"):
        y = qjax.chop(hidden, fmt)
        assert jax.typeof(y).sharding == jax.typeof(hidden).sharding
        assert same(y, qjax.chop(jnp.tile(DATA[0], (1, 4)), fmt))
        assert same(qjax.chop(jax.lax.complex(hidden, hidden), fmt), jax.lax.complex(y, y))


# With scales that are powers of two, for under shard_map each device multiplies its part of a sum by them.
POWERS = {
    "a scale a tensor": qjax.format("dfp8"),
    "a scale a channel": qjax.Scaled(qjax.Fixed(8, symmetric=True), qjax.format("e8m0"), "axis", rule="ceil"),
    "mxfp4": qjax.format("mxfp4"),
}


@pytest.mark.parametrize("name", POWERS)
def test_shard_map(name):
    """Each device has a part of the batch: the scales of the whole, in the last product those of channels too."""
    fmt = POWERS[name]
    recipe = recipes.uniform(fmt, gradient_rounding="stochastic")
    split = recipe.sharded(lhs=P("data"), rhs=P(), out=P("data"))
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))

    def mean_loss(params, x, y):
        return jax.lax.pmean(qjax.quantize(loss, split, key=jax.random.key(0))(params, x, y), "data")

    specs = {"mesh": mesh, "in_specs": (P(), P("data"), P("data")), "out_specs": P()}
    found = jax.jit(jax.shard_map(train(None, 1, mean_loss), **specs))(PARAMS, *DATA)
    wanted = jax.jit(train(recipe, 1))(PARAMS, *DATA)
    for key, value in wanted.items():
        assert same(found[key], value)


def test_named_axis_is_that_of_the_whole():
    """A scale over devices is that of the whole tensor or axis, in chop and in encode, also under vmap."""
    x = DATA[0]
    rows = functools.partial(qjax.chop, fmt="e4m3_tensor", spec=P("data"))
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    sharded = jax.jit(jax.shard_map(rows, mesh=mesh, in_specs=P("data"), out_specs=P("data")))
    assert same(sharded(x), qjax.chop(x, "e4m3_tensor"))
    assert same(jax.vmap(rows, axis_name="data")(x), qjax.chop(x, "e4m3_tensor"))
    assert not same(jax.vmap(functools.partial(qjax.chop, fmt="e4m3_tensor"))(x), qjax.chop(x, "e4m3_tensor"))
    columns = functools.partial(qjax.encode, fmt="int8_channel", axis=0, spec=P("data"))
    stored = jax.vmap(columns, axis_name="data")(x.reshape(8, -1, WIDTH))
    assert same(jax.vmap(qjax.decode)(stored).reshape(x.shape), qjax.chop(x, "int8_channel", axis=0))


@pytest.mark.parametrize("fmt", ["e2m1", "mxfp4"])
def test_words_from_outside_do_not_depend_on_the_mesh(fmt):
    words = jax.random.bits(KEYS[0], DATA[0].shape, jnp.uint32)
    wanted = qjax.chop(DATA[0], fmt, "stochastic", random_bits=words)

    def local(x, words):
        return qjax.chop(x, fmt, "stochastic", random_bits=words)

    for sizes in ((8, 1), (2, 4), (1, 8)):
        mesh = jax.make_mesh(sizes, ("data", "model"), axis_types=(AxisType.Auto,) * 2)
        both = P("data", "model")
        split = jax.jit(jax.shard_map(local, mesh=mesh, in_specs=(both, both), out_specs=both))
        assert same(split(DATA[0], words), wanted)


@pytest.mark.parametrize("fmt", ["e2m1", "mxfp4", "e4m3_tensor", "int8_channel", "nvfp4", "e4m3_2x16"])
def test_random_bits_follow_from_the_place_in_the_whole(fmt):
    options = {"key": KEYS[0]} | ({"axis": 0} if fmt == "int8_channel" else {})
    x = DATA[0] if fmt != "e2m1" else jax.lax.complex(*DATA)
    wanted = qjax.chop(x, fmt, "stochastic", **options)
    for sizes in ((8, 1), (2, 4), (1, 8)):
        mesh = jax.make_mesh(sizes, ("data", "model"), axis_types=(AxisType.Auto,) * 2)
        spec = P("data", "model") if sizes != (1, 8) else P(None, ("data", "model"))

        def local(x, spec=spec):
            y = qjax.chop(x, fmt, "stochastic", spec=spec, **options)
            if fmt == "e2m1":
                return y, y
            return y, qjax.decode(qjax.encode(x, fmt, "stochastic", spec=spec, **options))

        for found in jax.jit(jax.shard_map(local, mesh=mesh, in_specs=spec, out_specs=spec))(x):
            assert same(found, wanted)


def products(recipe, key, axis=None):
    """Returns a function from operands and a gradient to the product, summed over an axis, and its gradients."""

    def run(x, w, g):
        def product(x, w):
            out = qjax.quantize(jnp.matmul, recipe, key=key)(x, w)
            return out if axis is None else jax.lax.psum(out, axis)

        out, pull = jax.vjp(product, x, w)
        return out, *pull(g)

    return run


# An operand times the unit matrix is what it was rounded to, in whatever order it is summed.
SQUARES = [jax.random.normal(key, (256, 256)) for key in KEYS[1:]]
REVEALED = [(SQUARES[0], jnp.eye(256), SQUARES[2]), (jnp.eye(256), *SQUARES[1:]), (*SQUARES[:2], jnp.eye(256))]
# mesh, how the operands and the result lie on it, and whether the contraction is split.
PRODUCTS = {
    "data": ((8, 1), (P("data"), P(), P("data")), False),
    "columns": ((2, 4), (P("data"), P(None, "model"), P("data", "model")), False),
    "rows": ((2, 4), (P("data", "model"), P("model"), P("data")), True),
    "tensor": ((1, 8), (P(None, "model"), P("model"), P()), True),
}


@functools.cache
def rounded_on_one_device(fmt: str):
    q = qjax.Quantizer(fmt, "stochastic")
    return recipe_of(q), jax.jit(products(recipe_of(q), KEYS[0]))


def recipe_of(q):
    return qjax.Recipe(qjax.Gemm(q, q), qjax.Gemm(q, q), qjax.Gemm(q, q))


@pytest.mark.parametrize("name", PRODUCTS)
@pytest.mark.parametrize("fmt", ["e4m3_tensor", "mxfp4", "nvfp4"])
def test_stochastic_operands_do_not_depend_on_the_mesh(fmt, name):
    sizes, specs, sums = PRODUCTS[name]
    mesh = jax.make_mesh(sizes, ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    recipe, whole = rounded_on_one_device(fmt)
    local = products(recipe.sharded(*specs), KEYS[0], "model" if sums else None)
    split = jax.jit(jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=(specs[2], *specs[:2])))
    for arrays, exact in zip(REVEALED, ((0, 1), (0, 2), (1, 2)), strict=True):
        found, wanted = split(*arrays), whole(*arrays)
        for place in exact:
            assert same(found[place], wanted[place])
            assert not any(same(wanted[place], x) or same(wanted[place], x.T) for x in SQUARES)


def test_a_contraction_over_axes_that_are_split():
    """The gradient of a weight is contracted over batch and sequence: rows of places that do not lie together."""
    mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    recipe, whole = rounded_on_one_device("int8_tensor")
    cases = [tuple(m if i == 1 else m.reshape(4, 64, 256) for i, m in enumerate(case)) for case in REVEALED[1:]]
    spec = P("data", "model")
    specs = {"in_specs": (spec, P(), spec), "out_specs": (spec, spec, P())}
    local = products(recipe.sharded(spec, P(), spec), KEYS[0])
    split = jax.jit(jax.shard_map(local, mesh=mesh, **specs))
    for case, exact in zip(cases, ((0, 2), (1,)), strict=True):
        assert all(same(split(*case)[place], whole(*case)[place]) for place in exact)


@pytest.mark.parametrize("check_vma", [True, False])
def test_keys_of_shards(check_vma):
    """A site in a shard_map draws by shard, unless its recipe says how the operands are split."""
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    recipe, _ = rounded_on_one_device("e4m3_tensor")
    specs = {"mesh": mesh, "in_specs": (P("data"), P()), "out_specs": P("data"), "check_vma": check_vma}

    def drawn(fn, recipe):
        return jax.jit(qjax.quantize(fn, recipe, key=KEYS[0]))(jnp.tile(SQUARES[0][:32], (8, 1)), jnp.eye(256))

    def product(x, w):
        return x @ w

    local = jax.shard_map(product, **specs)
    by_place, by_shard = drawn(local, recipe.sharded(P("data"), P(), P("data"))), drawn(local, recipe)
    assert same(by_place, drawn(jax.jit(product), recipe))
    assert not same(by_shard[:32], by_shard[32:64]) and not same(by_shard, by_place)


def test_delayed_scales_are_those_of_all_devices():
    e4m3 = qjax.Quantizer("e4m3_tensor", spec=P("data"))
    gemm = qjax.Gemm(e4m3, e4m3)
    recipe = qjax.Recipe(gemm, gemm, gemm, history=4)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))

    def product(x, w, state):
        return jnp.sum(qjax.dot_general(x, w, (((1,), (0,)), ((), ())), recipe=recipe, state=state))

    def following(x, w, state):
        return jax.grad(product, argnums=2)(x, w, state)

    local = jax.shard_map(following, mesh=mesh, in_specs=(P("data"), P(), P()), out_specs=P(), check_vma=False)
    state = jax.jit(local)(DATA[0], PARAMS["in"], recipe.init())
    assert same(state["lhs"][0], jnp.max(jnp.abs(DATA[0])))


class Linen(nn.Module):
    @nn.compact
    def __call__(self, x):
        hidden = nn.Dense(HIDDEN, use_bias=False)(x)
        return nn.Dense(WIDTH, use_bias=False)(jax.nn.relu(hidden))


class Nnx(nnx.Module):
    def __init__(self, rngs):
        self.first = nnx.Linear(WIDTH, HIDDEN, use_bias=False, rngs=rngs)
        self.second = nnx.Linear(HIDDEN, WIDTH, use_bias=False, rngs=rngs)

    def __call__(self, x):
        return self.second(jax.nn.relu(self.first(x)))


def flax_losses(recipe):
    """Returns ``loss`` by the quantized models of linen and nnx."""
    model = qlinen.quantize(Linen(), recipe)
    graph, state = nnx.split(qnnx.quantize(Nnx(nnx.Rngs(0)), recipe))

    def linen_loss(params, x, y):
        tree = {"Dense_0": {"kernel": params["in"]}, "Dense_1": {"kernel": params["out"]}}
        return jnp.mean((model.apply({"params": tree}, x) - y) ** 2)

    def nnx_loss(params, x, y):
        leaves = {"first": {"kernel": params["in"]}, "second": {"kernel": params["out"]}}
        filled = nnx.State({k: {"kernel": state[k]["kernel"].replace(v["kernel"])} for k, v in leaves.items()})
        return jnp.mean((nnx.merge(graph, filled)(x) - y) ** 2)

    return linen_loss, nnx_loss


@pytest.mark.parametrize("strategy", ["fully sharded", "data and tensor parallel"])
def test_flax_models(strategy):
    """Parameters are placed as any array is; the quantized model neither knows nor cares."""
    name = "int8, a scale a channel"
    wanted = jax.jit(train(EXACT[name], 1))(PARAMS, *DATA)
    params, data = placed(strategy)
    for flax_loss in flax_losses(EXACT[name]):
        found = jax.jit(train(None, 1, flax_loss))(params, *data)
        assert all(same(found[key], wanted[key]) for key in wanted)


def test_flax_models_under_shard_map():
    recipe = recipes.uniform(POWERS["a scale a tensor"])
    wanted = jax.jit(train(recipe, 1))(PARAMS, *DATA)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    specs = {"mesh": mesh, "in_specs": (P(), P("data"), P("data")), "out_specs": P()}
    for flax_loss in flax_losses(recipe.sharded(lhs=P("data"), rhs=P(), out=P("data"))):

        def mean_loss(*arrays, flax_loss=flax_loss):
            return jax.lax.pmean(flax_loss(*arrays), "data")

        found = jax.jit(jax.shard_map(train(None, 1, mean_loss), **specs))(PARAMS, *DATA)
        assert all(same(found[key], wanted[key]) for key in wanted)
