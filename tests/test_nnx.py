"""nnx models and layers: Flax's own bit for bit without a recipe, as written by hand with one."""

import functools

import flax.errors
import jax
import jax.numpy as jnp
import optax
import orbax.checkpoint
import pytest
from flax import nnx
from programs import FAST, IDENTITY, RECIPE, STOCHASTIC, close, same, text

import qjax
import qjax.nnx

KEY = jax.random.key(0)
X = jax.random.normal(jax.random.key(1), (2, 3, 4))
IMAGE = jax.random.normal(jax.random.key(2), (2, 6, 6, 4))
CARRY = (X[:, 0], X[:, 1])

# What makes a layer from the module that has it, and what it is called with.
LAYERS = {
    "Linear": (lambda m, **k: m.Linear(4, 5, **k), (X,)),
    "LinearGeneral": (lambda m, **k: m.LinearGeneral((3, 4), (2, 3), axis=(-2, -1), **k), (X,)),
    "Einsum": (lambda m, **k: m.Einsum("abc,cde->adbe", (4, 2, 3), (2, 1, 3), **k), (X,)),
    "Conv": (lambda m, **k: m.Conv(4, 8, (3, 3), feature_group_count=2, strides=2, **k), (IMAGE,)),
    "ConvTranspose": (lambda m, **k: m.ConvTranspose(4, 3, (3, 3), strides=(2, 2), **k), (IMAGE,)),
    "MultiHeadAttention": (lambda m, **k: m.MultiHeadAttention(2, 4, decode=False, **k), (X, X + 1)),
    "LSTMCell": (lambda m, **k: m.LSTMCell(4, 4, **k), (CARRY, X[:, 2])),
    "OptimizedLSTMCell": (lambda m, **k: m.OptimizedLSTMCell(4, 4, **k), (CARRY, X[:, 2])),
    "GRUCell": (lambda m, **k: m.GRUCell(4, 4, **k), (CARRY[0], X[:, 2])),
}


def rngs():
    return nnx.Rngs(0, dropout=1, quantize=2)


def state(model):
    return nnx.to_pure_dict(nnx.state(model))


def step(model, *args):
    """Returns the value, the gradients with respect to parameters and arguments, and the state after."""

    def loss(model, *args):
        return sum(x.sum() for x in jax.tree.leaves(model(*args)))

    argnums = tuple(range(len(args) + 1))
    value, (grads, *rest) = nnx.value_and_grad(loss, argnums=argnums)(model, *args)
    return value, nnx.to_pure_dict(grads), rest, state(model)


def pure(model):
    """Returns a step as a pure function of the state and the arguments, and that state."""
    graphdef, state = nnx.split(model)
    return lambda state, *args: step(nnx.merge(graphdef, state), *args), state


def gradients(model, *args):
    f, state = pure(model)
    return jax.jit(f, compiler_options=FAST)(state, *args)


def program(model, *args):
    f, state = pure(model)
    return text(f, state, *args)


@pytest.mark.parametrize("name", LAYERS)
def test_layers_without_rounding_are_flax(name):
    make, args = LAYERS[name]
    flax = make(nnx, rngs=rngs())
    for model in (make(qjax.nnx, rngs=rngs()), qjax.nnx.quantize(make(nnx, rngs=rngs()), qjax.Recipe())):
        assert same(state(model), state(flax))
        assert program(model, *args) == program(flax, *args)


@pytest.mark.parametrize("name", LAYERS)
def test_layers_with_a_recipe_are_models_with_one(name):
    make, args = LAYERS[name]
    flax = make(nnx, rngs=rngs())
    own, swapped = make(qjax.nnx, recipe=RECIPE, rngs=rngs()), qjax.nnx.quantize(flax, RECIPE)
    assert program(own, *args) == program(swapped, *args) != program(flax, *args)
    assert same(own(*args), swapped(*args))
    assert qjax.nnx.coverage(own, *args) == qjax.nnx.coverage(swapped, *args)
    assert not qjax.nnx.coverage(own, *args).uncovered
    assert not qjax.nnx.coverage(flax, *args, rule=RECIPE).uncovered


def product(x, w):
    axes = (((x.ndim - 1,), (0,)), ((), ()))
    return qjax.dot_general(x, w, axes, preferred_element_type=jnp.float32, recipe=RECIPE)


def test_embed_quantizes_attend_alone():
    flax, own = nnx.Embed(5, 4, rngs=rngs()), qjax.nnx.Embed(5, 4, recipe=RECIPE, rngs=rngs())
    assert same(own(jnp.arange(3)), flax(jnp.arange(3)))
    assert same(own.attend(X), product(X, flax.embedding[...].T))


def test_linear_and_conv_by_hand():
    def check(layer, x, hand):
        value, grads, (dx,), _ = gradients(layer, x)
        expected = jax.value_and_grad(lambda k, x: hand(x, k).sum(), argnums=(0, 1))
        expected = jax.jit(expected, compiler_options=FAST)(layer.kernel[...], x)
        assert same((value, (grads["kernel"], dx)), expected)

    check(qjax.nnx.Linear(4, 5, use_bias=False, recipe=RECIPE, rngs=rngs()), X, product)
    options = dict(dimension_numbers=("NHWC", "HWIO", "NHWC"), recipe=RECIPE)
    conv = qjax.nnx.Conv(4, 8, (3, 3), use_bias=False, recipe=RECIPE, rngs=rngs())
    check(conv, IMAGE, lambda x, k: qjax.conv_general_dilated(x, k, (1, 1), "SAME", **options))


def test_attention_by_hand():
    """Against the points where Flax takes another dot_general: projections, QK and AV."""
    dot = functools.partial(qjax.dot_general, recipe=RECIPE)

    def attention(query, key, value, dot, **_):
        weights = jnp.einsum("...qhd,...khd->...hqk", query, key, _dot_general=dot)
        return jnp.einsum("...hqk,...khd->...qhd", nnx.softmax(weights), value, _dot_general=dot)

    def make(module, dot, **options):
        attend = functools.partial(attention, dot=dot)
        return module.MultiHeadAttention(2, 4, attention_fn=attend, decode=False, rngs=rngs(), **options)

    hand = make(nnx, dot, qkv_dot_general=dot, out_dot_general=dot)
    model = make(qjax.nnx, jax.lax.dot_general, recipe=RECIPE)
    assert same(gradients(model, X), gradients(hand, X))


class Block(nnx.Module):
    """A small one: to compile an attention takes seconds."""

    def __init__(self, rngs):
        self.dense = nnx.Linear(4, 4, rngs=rngs)

    def __call__(self, x):
        x = x + self.dense(nnx.relu(x))
        return nnx.softmax(jnp.einsum("...qd,...kd->...qk", x, x)) @ x


@nnx.split_rngs(splits=2)
@nnx.vmap
def stacked(rngs):
    return Block(rngs)


class Lifted(nnx.Module):
    """Blocks under a transformation, and layers that have state and draw."""

    def __init__(self, kind, rngs):
        self.kind = kind
        if kind in ("scan", "vmap"):
            self.blocks = stacked(rngs)
        elif kind == "RNN":
            self.rnn = nnx.RNN(nnx.OptimizedLSTMCell(4, 4, rngs=rngs))
        else:
            self.block = Block(rngs)
        self.norm = nnx.BatchNorm(4, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x):
        if self.kind == "scan":
            x = nnx.scan(lambda block, x: block(x), in_axes=(0, nnx.Carry), out_axes=nnx.Carry)(self.blocks, x)
        elif self.kind == "vmap":
            x = nnx.vmap(lambda block, x: block(x))(self.blocks, x)
        elif self.kind == "RNN":
            x = self.rnn(x)
        else:
            call = {"plain": lambda f: f, "remat": nnx.remat, "jit": nnx.jit}[self.kind]
            x = call(lambda block, x: block(x))(self.block, x)
        return self.dropout(self.norm(x))


@pytest.mark.parametrize("kind", ["scan", "vmap", "remat", "jit", "RNN"])
def test_models_without_rounding_are_flax(kind):
    """Forward and backward, with what is normalised and dropped, and the state after."""
    flax = Lifted(kind, rngs())
    empty = qjax.nnx.quantize(Lifted(kind, rngs()), qjax.Recipe())
    identity = qjax.nnx.quantize(Lifted(kind, rngs()), IDENTITY)
    covered = qjax.nnx.coverage(identity, X)
    assert covered and not covered.uncovered
    assert program(empty, X) == program(flax, X)
    assert close(gradients(identity, X), gradients(flax, X))


def test_vmap_composes_from_outside():
    model = qjax.nnx.quantize(Block(rngs()), RECIPE)
    batch = jnp.stack([X, 2 * X])
    assert close(nnx.vmap(lambda m, x: m(x), in_axes=(None, 0))(model, batch), jnp.stack([model(x) for x in batch]))


def test_a_function_may_close_over_the_model():
    """As over any nnx model that does not change in it."""
    model = qjax.nnx.quantize(Block(rngs()), RECIPE)
    expected = nnx.jit(lambda model, x: model(x))(model, X)
    assert same(jax.jit(model.__call__)(X), expected)
    assert same(jax.lax.map(model.__call__, X[None])[0], expected)
    assert close(jax.grad(lambda x: model(x).sum())(X), nnx.grad(lambda m, x: m(x).sum(), argnums=1)(model, X))
    assert qjax.nnx.coverage(model, jax.ShapeDtypeStruct((2, 3, 4), jnp.float32))
    with pytest.raises(flax.errors.TraceContextError):  # what changes it is refused, as by Flax
        jax.jit(lambda x: qjax.nnx.quantize(Lifted("plain", rngs()), RECIPE)(x) + changing(x))(X)


changing = qjax.nnx.quantize(nnx.Sequential(nnx.Linear(4, 4, rngs=rngs()), nnx.Dropout(0.5, rngs=rngs())), RECIPE)


class Growing(nnx.Module):
    """Its attributes change when it is called."""

    def __init__(self, rngs):
        self.dense = nnx.Linear(4, 4, rngs=rngs)
        self.calls = 0

    def __call__(self, x):
        self.calls += 1
        self.last = nnx.Variable(self.dense(x))
        return self.last[...], self.dense


def test_attributes_may_change_in_a_call():
    flax = Growing(rngs())
    model = qjax.nnx.quantize(flax, IDENTITY)
    for _ in range(2):
        out, part = model(X)
        assert same(out, flax(X)[0]) and part is model.dense is flax.dense
    assert model.calls == 2 and same(state(model), state(flax))


class Tied(nnx.Module):
    """A part that is used in two places, and methods beside ``__call__``."""

    def __init__(self, rngs):
        self.embed = nnx.Embed(5, 4, rngs=rngs)
        self.blocks = nnx.List([Block(rngs), Block(rngs)])
        self.calls = nnx.Variable(jnp.int32(0))

    def __call__(self, tokens, rngs=None):
        if rngs is not None:
            tokens = tokens + jax.random.randint(rngs.noise(), tokens.shape, 0, 1)
        return self.decode(self.encode(tokens))

    def encode(self, tokens):
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x)
        self.calls[...] += 1
        return x

    def decode(self, x):
        return self.embed.attend(x)

    def width(self):
        return 4


def test_every_method_is_quantized_and_state_is_shared():
    tokens = jnp.arange(4)[None]
    flax = Tied(rngs())
    model = qjax.nnx.quantize(flax, {"embed|blocks/1/dense": RECIPE, "blocks/.*": None})
    covered = qjax.nnx.coverage(model, tokens)
    assert [site.path for site in covered if site.is_quantized] == ["blocks/1/dense", "embed"]
    assert len(covered) == 7
    encoded = model.encode(tokens)
    assert flax.calls[...] == model.calls[...] == 1
    assert not same(encoded, flax.encode(tokens))
    assert same(model.decode(encoded), product(encoded, flax.embed.embedding[...].T))
    assert same(model.decode(encoded), model(tokens))
    assert model.width() == 4 and model.embed is flax.embed and isinstance(model, Tied)
    assert same(state(model), state(flax))
    streams = nnx.Rngs(noise=3)
    assert same(model(tokens, rngs=streams), model(tokens)) and streams.noise.count[...] == 1
    model.extra = 3
    assert model.extra == 3 and not hasattr(flax, "extra")


def test_parts_are_quantized_in_models_that_are_not():
    class Parts(nnx.Module):
        def __init__(self, rngs, **recipe):
            module = qjax.nnx if recipe else nnx
            self.block = qjax.nnx.quantize(Block(rngs), recipe["recipe"]) if recipe else Block(rngs)
            self.head = module.Linear(4, 3, **recipe, rngs=rngs)
            self.rnn = nnx.RNN(module.GRUCell(3, 3, **recipe, rngs=rngs))
            self.last = nnx.Linear(3, 3, rngs=rngs)

        def __call__(self, x):
            return self.last(self.rnn(self.head(self.block(x))))

    flax, model = Parts(rngs()), Parts(rngs(), recipe=RECIPE)
    assert same(state(flax), state(model))
    covered = qjax.nnx.coverage(model, X)
    assert [site.path for site in covered.uncovered] == ["last"]
    assert {"block/dense", "block/...qd,...kd->...qk", "head", "rnn/cell/dense_i"} <= {site.path for site in covered}
    whole = qjax.nnx.quantize(model, RECIPE)
    assert not qjax.nnx.coverage(whole, X).uncovered
    assert not same(whole(X), model(X))
    assert close(gradients(Parts(rngs(), recipe=IDENTITY), X), gradients(flax, X))


class Repeated(nnx.Module):
    """The same product twice, then three times in a scan."""

    def __init__(self, rngs):
        self.dense = nnx.Linear(4, 4, rngs=rngs)

    def __call__(self, x):
        def step(dense, x):
            return dense, dense(x)

        scan = nnx.scan(step, in_axes=(nnx.Carry, 0), out_axes=(nnx.Carry, 0))
        return [self.dense(x), self.dense(x), *scan(self.dense, jnp.stack([x, x, x]))[1]]


def test_each_product_step_and_call_draws_its_own_bits():
    def make(seed):
        return qjax.nnx.quantize(Repeated(nnx.Rngs(0)), STOCHASTIC, rngs=nnx.Rngs(quantize=seed))

    model, call = make(0), nnx.jit(lambda m: m(X))
    draws = [*call(model), *call(model), *call(make(1))]
    assert len({bytes(y) for y in draws}) == 15
    assert same(draws[:5], call(make(0)))
    assert model.quantize_keys.count[...] == 2
    assert same(nnx.to_pure_dict(nnx.state(model, nnx.Param)), state(Repeated(nnx.Rngs(0))))
    layer = qjax.nnx.Linear(4, 4, recipe=STOCHASTIC, rngs=nnx.Rngs(0, quantize=0))
    assert not same(layer(X), layer(X))
    assert same(layer.kernel[...], nnx.Linear(4, 4, rngs=nnx.Rngs(0)).kernel[...])


@pytest.mark.parametrize("reference_first", [True, False])
@pytest.mark.parametrize("kind", ["jit"])
def test_neither_runs_as_the_other(kind, reference_first):
    flax = nnx.view(Lifted(kind, rngs()), deterministic=True, use_running_average=True)
    model = qjax.nnx.quantize(flax, RECIPE)
    jitted = nnx.jit(lambda model, x: model(x))
    calls = [flax, model, functools.partial(jitted, flax), functools.partial(jitted, model)]
    order = range(4) if reference_first else range(3, -1, -1)
    out = {i: calls[i](X) for i in order}
    assert not same(out[0], out[1]) and not same(out[2], out[3])
    assert all(same(calls[i](X), out[i]) for i in order)


def test_equal_rules_compile_once():
    traces = []

    @nnx.jit
    def call(model, x):
        traces.append(model)
        return model(x)

    for name in ("e4m3", "float8_e4m3fn"):
        recipe = qjax.Recipe(qjax.Gemm(qjax.Quantizer(name), None))
        call(qjax.nnx.quantize(Block(rngs()), {".*": recipe}), X)
        call(qjax.nnx.Linear(4, 4, recipe=recipe, rngs=rngs()), X)
    assert len(traces) == 2


def test_training_and_checkpoints_are_those_of_flax(tmp_path):
    """An fp32 checkpoint loads into the quantized model, trains there, and loads back."""
    flax = Lifted("scan", rngs())
    with orbax.checkpoint.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "fp32", state(flax)["blocks"])
        checkpointer.wait_until_finished()
        model = qjax.nnx.quantize(Lifted("scan", nnx.Rngs(5)), RECIPE)
        assert not same(state(model)["blocks"], state(flax)["blocks"])
        nnx.update(model.blocks, checkpointer.restore(tmp_path / "fp32", state(model)["blocks"]))
        assert same(state(model)["blocks"], state(flax)["blocks"])
        optimizer = nnx.Optimizer(model, optax.sgd(0.1), wrt=nnx.Param)

        @nnx.jit
        def step(model, optimizer):
            optimizer.update(model, nnx.grad(lambda model: (model(X) ** 2).sum())(model))

        step(model, optimizer)
        assert not same(state(model)["blocks"], state(flax)["blocks"])
        checkpointer.save(tmp_path / "trained", state(model)["blocks"])
        checkpointer.wait_until_finished()
        nnx.update(flax.blocks, checkpointer.restore(tmp_path / "trained", state(flax)["blocks"]))
    assert same(state(model)["blocks"], state(flax)["blocks"])


def test_attention_decodes_with_its_cache():
    flax, own = (
        module.MultiHeadAttention(2, 4, decode=True, rngs=rngs(), **recipe)
        for module, recipe in ((nnx, {}), (qjax.nnx, {"recipe": IDENTITY}))
    )
    for layer in (flax, own):
        layer.init_cache((2, 3, 4))
    for i in range(2):
        assert close(own(X[:, i : i + 1]), flax(X[:, i : i + 1]))
    assert own.cache_index[...] == 2 and close(state(own), state(flax))


REFUSALS = {
    "nnx.quantize: model must be a flax.nnx.Module, got function": lambda: qjax.nnx.quantize(
        lambda x: x,
        RECIPE,  # type: ignore[arg-type]
    ),
    "nnx.quantize: rule must be a Recipe": lambda: qjax.nnx.quantize(Block(rngs()), "e4m3"),
    "nnx.quantize: a recipe is stochastic; pass rngs with a stream for it, nnx.Rngs\\(..., quantize=0\\)": (
        lambda: qjax.nnx.quantize(Block(rngs()), {".*": STOCHASTIC}, rngs=nnx.Rngs(0))
    ),
    "nnx.Linear: a recipe is stochastic; pass rngs": (
        lambda: qjax.nnx.Linear(4, 4, recipe=STOCHASTIC, rngs=nnx.Rngs(0))
    ),
    "nnx.quantize: rngs was given, but no recipe of the rule draws anything; leave rngs out": (
        lambda: qjax.nnx.quantize(Block(rngs()), RECIPE, rngs=rngs())
    ),
    r"nnx.quantize: the recipe of 'dense' \(.*test_nnx.py:\d+\) is stochastic; pass rngs=nnx.Rngs\(..., quantize=0\)": (
        lambda: qjax.nnx.quantize(Block(rngs()), lambda site: STOCHASTIC)(X)
    ),
    "nnx.quantize: pattern 'dens' matches no site; the nearest paths are 'dense'": (
        lambda: qjax.nnx.quantize(Block(rngs()), {"dens": RECIPE})(X)
    ),
    "nnx.quantize: the rule says nothing of 2 of 3 sites:\n  '...qd,...kd->...qk' ": (
        lambda: qjax.nnx.quantize(Block(rngs()), {"dense": RECIPE})(X)
    ),
    "nnx.Linear: rule must be a Recipe": lambda: qjax.nnx.Linear(4, 4, recipe="e4m3", rngs=rngs()),
}


@pytest.mark.parametrize("text", REFUSALS)
def test_refusals(text):
    with pytest.raises((ValueError, TypeError), match=text):
        REFUSALS[text]()
