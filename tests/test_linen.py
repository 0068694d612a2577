"""linen models and layers: Flax's own bit for bit without a recipe, as written by hand with one."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
import orbax.checkpoint
import pytest
from programs import FAST, IDENTITY, RECIPE, STOCHASTIC, close, same, text

import qjax
import qjax.linen

KEY = jax.random.key(0)
X = jax.random.normal(jax.random.key(1), (2, 3, 4))
IMAGE = jax.random.normal(jax.random.key(2), (2, 6, 6, 4))
CARRY = (X[:, 0], X[:, 1])


def layer(module, name, /, *args, **kwargs):
    return functools.partial(getattr(module, name), *args, **kwargs)


# What makes a layer from the module that has it, and what it is called with.
LAYERS = {
    "Dense": (lambda m: layer(m, "Dense", 5), (X,)),
    "DenseGeneral": (lambda m: layer(m, "DenseGeneral", (2, 3), axis=(-2, -1)), (X,)),
    "Einsum": (lambda m: layer(m, "Einsum", (4, 2, 3), "abc,cde->adbe"), (X,)),
    "Conv": (lambda m: layer(m, "Conv", 8, (3, 3), feature_group_count=2, strides=2), (IMAGE,)),
    "ConvLocal": (lambda m: layer(m, "ConvLocal", 3, (3,)), (X,)),
    "ConvTranspose": (lambda m: layer(m, "ConvTranspose", 3, (3, 3), strides=(2, 2)), (IMAGE,)),
    "MultiHeadDotProductAttention": (lambda m: layer(m, "MultiHeadDotProductAttention", 2), (X,)),
    "MultiHeadAttention": (lambda m: layer(m, "MultiHeadAttention", 2), (X, X + 1)),
    "LSTMCell": (lambda m: layer(m, "LSTMCell", 4), (CARRY, X[:, 2])),
    "OptimizedLSTMCell": (lambda m: layer(m, "OptimizedLSTMCell", 4), (CARRY, X[:, 2])),
    "GRUCell": (lambda m: layer(m, "GRUCell", 4), (CARRY[0], X[:, 2])),
}


def total(tree):
    return sum(x.sum() for x in jax.tree.leaves(tree))


def step(model, variables, *args, **kwargs):
    """Returns a function of parameters and arguments: the loss, what ``apply`` returns and all gradients."""
    rest = {name: value for name, value in variables.items() if name != "params"}

    def loss(params, *args):
        out = model.apply({**rest, "params": params}, *args, **kwargs)
        return total(out[0] if "mutable" in kwargs else out), out

    return jax.value_and_grad(loss, argnums=tuple(range(len(args) + 1)), has_aux=True)


def gradients(model, variables, *args, **kwargs):
    f = jax.jit(step(model, variables, *args, **kwargs), compiler_options=FAST)
    return f(variables["params"], *args)


def program(model, variables, *args, **kwargs):
    return text(step(model, variables, *args, **kwargs), variables["params"], *args)


@pytest.mark.parametrize("name", LAYERS)
def test_layers_without_rounding_are_flax(name):
    make, args = LAYERS[name]
    flax = make(nn)()
    variables = flax.init(KEY, *args)
    for model in (make(qjax.linen)(), make(qjax.linen)(recipe=qjax.Recipe()), qjax.linen.quantize(flax, {".*": None})):
        assert same(model.init(KEY, *args), variables)
        assert program(model, variables, *args) == program(flax, variables, *args)


@pytest.mark.parametrize("name", LAYERS)
def test_layers_with_a_recipe_are_models_with_one(name):
    make, args = LAYERS[name]
    flax = make(nn)()
    variables = flax.init(KEY, *args)
    own, swapped = make(qjax.linen)(recipe=RECIPE), qjax.linen.quantize(flax, RECIPE)
    assert program(own, variables, *args) == program(swapped, variables, *args) != program(flax, variables, *args)
    assert same(own.apply(variables, *args), swapped.apply(variables, *args))
    assert qjax.coverage(own.apply, variables, *args) == qjax.coverage(swapped.apply, variables, *args)
    assert not qjax.coverage(own.apply, variables, *args).uncovered


def test_embed_quantizes_attend_alone():
    flax, own = nn.Embed(5, 4), qjax.linen.Embed(5, 4, recipe=RECIPE)
    variables = flax.init(KEY, jnp.arange(3))
    assert same(own.apply(variables, jnp.arange(3)), flax.apply(variables, jnp.arange(3)))
    hand = product(X, variables["params"]["embedding"].T)
    assert same(own.apply(variables, X, method="attend"), hand)
    assert same(own.bind(variables).attend(X), hand)


def product(x, w):
    axes = (((x.ndim - 1,), (0,)), ((), ()))
    return qjax.dot_general(x, w, axes, preferred_element_type=jnp.float32, recipe=RECIPE)


def test_dense_by_hand():
    model = qjax.linen.Dense(5, recipe=RECIPE)
    variables = model.init(KEY, X)

    def by_hand(params, x):
        y = qjax.dot_general(x, params["kernel"], (((2,), (0,)), ((), ())), recipe=RECIPE)
        return (y + params["bias"].reshape(1, 1, 5)).sum()

    expected = jax.jit(jax.value_and_grad(by_hand, argnums=(0, 1)), compiler_options=FAST)(variables["params"], X)
    (value, _), grads = gradients(model, variables, X)
    assert same((value, grads), expected)


def test_conv_by_hand():
    model = qjax.linen.Conv(8, (3, 3), feature_group_count=2, strides=2, use_bias=False, recipe=RECIPE)
    variables = model.init(KEY, IMAGE)

    def by_hand(params, x):
        options = dict(dimension_numbers=("NHWC", "HWIO", "NHWC"), feature_group_count=2)
        return qjax.conv_general_dilated(x, params["kernel"], (2, 2), "SAME", **options, recipe=RECIPE).sum()

    expected = jax.jit(jax.value_and_grad(by_hand, argnums=(0, 1)), compiler_options=FAST)(variables["params"], IMAGE)
    (value, _), grads = gradients(model, variables, IMAGE)
    assert same((value, grads), expected)


def test_attention_by_hand():
    """Against the points where Flax takes another dot_general: projections, QK and AV."""
    dot = functools.partial(qjax.dot_general, recipe=RECIPE)
    einsum = functools.partial(jnp.einsum, _dot_general=dot)
    hand = nn.MultiHeadDotProductAttention(
        2,
        qkv_dot_general=dot,
        out_dot_general=dot,
        qk_attn_weights_einsum_cls=lambda: einsum,
        attn_weights_value_einsum_cls=lambda: einsum,
    )
    model = qjax.linen.MultiHeadDotProductAttention(2, recipe=RECIPE)
    variables = model.init(KEY, X)
    assert same(gradients(model, variables, X), gradients(hand, variables, X))


def test_lstm_by_hand():
    model = qjax.linen.LSTMCell(4, recipe=RECIPE)
    variables = model.init(KEY, CARRY, X[:, 2])

    def by_hand(params, carry, x):
        def gate(name):
            recurrent = product(h, params[f"h{name}"]["kernel"]) + params[f"h{name}"]["bias"].reshape(1, -1)
            return product(x, params[f"i{name}"]["kernel"]) + recurrent

        c, h = carry
        i, f, g, o = nn.sigmoid(gate("i")), nn.sigmoid(gate("f")), nn.tanh(gate("g")), nn.sigmoid(gate("o"))
        c = f * c + i * g
        h = o * nn.tanh(c)
        return total(((c, h), h))

    expected = jax.jit(jax.value_and_grad(by_hand, argnums=(0, 1, 2)), compiler_options=FAST)(
        variables["params"], CARRY, X[:, 2]
    )
    (value, _), grads = gradients(model, variables, CARRY, X[:, 2])
    assert same((value, grads), expected)


class Block(nn.Module):
    """A small one: to compile an attention takes seconds."""

    @nn.compact
    def __call__(self, x, _=None):
        x = x + nn.Dense(4, name="dense")(nn.relu(x))
        return nn.softmax(jnp.einsum("...qd,...kd->...qk", x, x)) @ x, None


class Lifted(nn.Module):
    """Blocks under a lifted transformation, and layers that have state and draw."""

    kind: str

    @nn.compact
    def __call__(self, x, train: bool = False):
        if self.kind == "scan":
            block = nn.scan(Block, variable_axes={"params": 0}, split_rngs={"params": True}, length=2)()
            x = block(x, None)[0]
        elif self.kind == "remat_scan":
            x = nn.remat_scan(nn.Dense, lengths=(2, 2))(4)(x)
        elif self.kind == "vmap":
            block = nn.vmap(Block, variable_axes={"params": 0}, split_rngs={"params": True}, in_axes=0)()
            x = block(x)[0]
        elif self.kind == "while":
            nn.Dense(4, name="dense")(x)
            body = lambda self, s: (s[0] + 1, nn.Dense(4, name="dense")(s[1]))  # noqa: E731
            x = nn.while_loop(lambda _, s: s[0] < 2, body, self, (0, x))[1]
        elif self.kind == "RNN":
            x = nn.RNN(nn.OptimizedLSTMCell(4))(x)
        else:
            x = {"remat": nn.remat, "jit": nn.jit, "plain": lambda block: block}[self.kind](Block)()(x)[0]
        x = nn.BatchNorm(use_running_average=not train)(x)
        self.sow("intermediates", "normed", x)
        return nn.Dropout(0.5, deterministic=not train)(x)


TRAIN = dict(train=True, mutable=["batch_stats", "intermediates"], rngs={"dropout": jax.random.key(3)})


@pytest.mark.parametrize("kind", ["scan", "remat_scan", "vmap", "remat", "jit", "RNN"])
def test_lifted_blocks_without_rounding_are_flax(kind):
    """Forward and backward, with what is sown, normalised and dropped."""
    flax = Lifted(kind)
    empty, identity = qjax.linen.quantize(flax, qjax.Recipe()), qjax.linen.quantize(flax, IDENTITY)
    variables = flax.init(KEY, X)
    assert same(identity.init(KEY, X), variables)
    assert program(empty, variables, X, **TRAIN) == program(flax, variables, X, **TRAIN)
    assert close(gradients(identity, variables, X, **TRAIN), gradients(flax, variables, X, **TRAIN))
    covered = qjax.linen.coverage(identity, variables, X)
    assert covered and not covered.uncovered


def test_while_loops_without_rounding_are_flax():
    flax = Lifted("while")
    variables = flax.init(KEY, X)
    assert same(qjax.linen.quantize(flax, IDENTITY).apply(variables, X), flax.apply(variables, X))


def test_vmap_composes_from_outside():
    model = qjax.linen.quantize(Lifted("plain"), RECIPE)
    variables = model.init(KEY, X)
    batch = jnp.stack([X, 2 * X])
    one_by_one = jnp.stack([model.apply(variables, x) for x in batch])
    assert same(jax.vmap(lambda x: model.apply(variables, x))(batch), one_by_one)


class Tied(nn.Module):
    """Parts made in setup, of which one is used in two places, and methods beside ``__call__``."""

    def setup(self):
        self.embed = nn.Embed(5, 4)
        self.block = Block()

    def __call__(self, tokens):
        return self.decode(self.encode(tokens))

    def encode(self, tokens):
        return self.block(self.embed(tokens))[0]

    def decode(self, x):
        return self.embed.attend(x)

    def width(self):
        return 4


def test_every_method_is_quantized():
    tokens = jnp.arange(4)[None]
    flax = Tied()
    variables = flax.init(KEY, tokens)
    rule = {"embed|block/dense": RECIPE, "block.*": None}
    model = qjax.linen.quantize(flax, rule)
    covered = qjax.linen.coverage(model, variables, tokens)
    assert [site.path for site in covered if site.is_quantized] == ["block/dense", "embed"]
    encoded = model.apply(variables, tokens, method="encode")
    assert not same(encoded, flax.apply(variables, tokens, method="encode"))
    assert same(model.apply(variables, encoded, method=Tied.decode), flax.apply(variables, encoded, method=Tied.decode))
    assert same(model.apply(variables, encoded, method="decode"), model.apply(variables, tokens))
    assert same(model.bind(variables).encode(tokens), encoded)
    assert model.apply(variables, method="width") == model.width() == 4
    assert isinstance(model, Tied) and repr(model) == repr(flax) and model != flax
    assert model == qjax.linen.quantize(flax, dict(rule)) and hash(model) == hash(qjax.linen.quantize(flax, rule))


class Parts(nn.Module):
    """Quantized parts of a model that is not."""

    recipe: qjax.Recipe | None = None

    @nn.compact
    def __call__(self, x):
        block = Block() if self.recipe is None else qjax.linen.quantize(Block(), {"dense": self.recipe}, strict=False)
        dense = nn.Dense if self.recipe is None else functools.partial(qjax.linen.Dense, recipe=self.recipe)
        return dense(3)(block(x)[0])


def test_parts_are_quantized_under_the_names_of_flax():
    flax, model = Parts(), Parts(RECIPE)
    variables = flax.init(KEY, X)
    assert same(model.init(KEY, X), variables)
    covered = qjax.linen.coverage(model, variables, X)
    paths = {"Block_0/dense": True, "Block_0/...qd,...kd->...qk": False, "Block_0": False, "Dense_0": True}
    assert {site.path: site.is_quantized for site in covered} == paths
    assert [site.path for site in qjax.linen.coverage(flax, variables, X)] == list(paths)
    both = qjax.linen.quantize(model, RECIPE)  # what is quantized already stays what it is
    assert not qjax.coverage(both.apply, variables, X).uncovered
    assert close(gradients(Parts(IDENTITY), variables, X), gradients(flax, variables, X))


class Repeated(nn.Module):
    """The same product twice, then three times in a scan."""

    @nn.compact
    def __call__(self, x):
        dense = nn.Dense(4, name="dense")
        scan = nn.scan(lambda dense, c, _: (c, dense(x)), variable_broadcast="params", split_rngs={"params": False})
        return [dense(x), dense(x), *scan(dense, None, jnp.zeros(3))[1]]


def test_each_product_and_step_and_key_draws_its_own_bits():
    model = qjax.linen.quantize(Repeated(), STOCHASTIC)
    variables = model.init(KEY, X)
    apply = jax.jit(lambda seed: model.apply(variables, X, rngs={"quantize": jax.random.key(seed)}))
    first, again, other = apply(0), apply(0), apply(1)
    assert len({bytes(y) for y in [*first, *other]}) == 10
    assert same(first, again)
    layer = qjax.linen.Dense(4, recipe=STOCHASTIC)
    draws = [
        layer.apply({"params": variables["params"]["dense"]}, X, rngs={"quantize": k}) for k in jax.random.split(KEY)
    ]
    assert not same(*draws)


@pytest.mark.parametrize("reference_first", [True, False])
@pytest.mark.parametrize("kind", ["jit"])
def test_neither_runs_as_the_other(kind, reference_first):
    flax = Lifted(kind)
    model = qjax.linen.quantize(flax, RECIPE)
    variables = flax.init(KEY, X)
    apply = jax.jit(lambda model, variables, x: model.apply(variables, x), static_argnums=0)
    calls = [flax.apply, model.apply, functools.partial(apply, flax), functools.partial(apply, model)]
    order = calls if reference_first else calls[::-1]
    out = {call: call(variables, X) for call in order}
    for eager, quantized in ((out[calls[0]], out[calls[1]]), (out[calls[2]], out[calls[3]])):
        assert not same(eager, quantized)
    assert same(out[calls[0]], Lifted(kind).apply(variables, X))
    assert all(same(call(variables, X), out[call]) for call in order)


def test_equal_rules_compile_once():
    traces = []
    model = Tied()
    variables = model.init(KEY, jnp.arange(4)[None])

    @functools.partial(jax.jit, static_argnums=0)
    def apply(model, variables, tokens):
        traces.append(model)
        return model.apply(variables, tokens)

    for name in ("e4m3", "float8_e4m3fn"):
        gemm = qjax.Gemm(qjax.Quantizer(name), None)
        apply(qjax.linen.quantize(Tied(), {".*": qjax.Recipe(gemm)}), variables, jnp.arange(4)[None])
    assert len(traces) == 1


def test_checkpoints_are_those_of_flax(tmp_path):
    """An fp32 checkpoint loads into the quantized model, trains there, and loads back."""
    flax = Lifted("scan")
    model = qjax.linen.quantize(flax, RECIPE)
    variables = flax.init(KEY, X)
    with orbax.checkpoint.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "fp32", variables)
        checkpointer.wait_until_finished()
        loaded = checkpointer.restore(tmp_path / "fp32", jax.eval_shape(model.init, KEY, X))
        assert same(loaded, variables)
        optimizer = optax.sgd(0.01)
        grads = gradients(model, loaded, X, **TRAIN)[1][0]
        updates, _ = optimizer.update(grads, optimizer.init(loaded["params"]))
        trained = {**loaded, "params": optax.apply_updates(loaded["params"], updates)}
        checkpointer.save(tmp_path / "trained", trained)
        checkpointer.wait_until_finished()
        back = checkpointer.restore(tmp_path / "trained", jax.eval_shape(flax.init, KEY, X))
    assert same(back, trained)
    assert flax.apply(back, X).shape == X.shape


VARIABLES = Block().init(KEY, X)
REFUSALS = {
    "linen.quantize: model must be a flax.linen.Module, got type": lambda: qjax.linen.quantize(nn.Dense, RECIPE),
    "linen.quantize: rule must be a Recipe": lambda: qjax.linen.quantize(Block(), "e4m3"),
    r"linen.quantize: the recipe of 'dense' \(.*test_linen.py:\d+\) is stochastic; "
    r'pass rngs={"quantize": jax.random.key\(...\)} to apply\.': (
        lambda: qjax.linen.quantize(Block(), STOCHASTIC).apply(VARIABLES, X, rngs={"params": KEY})
    ),
    "linen.quantize: pattern 'dens' matches no site; the nearest paths are 'dense'": (
        lambda: qjax.linen.quantize(Block(), {"dens": RECIPE}).apply(VARIABLES, X)
    ),
    "linen.quantize: the rule says nothing of 2 of 3 sites:\n  '...qd,...kd->...qk' ": (
        lambda: qjax.linen.quantize(Block(), {"dense": RECIPE}).apply(VARIABLES, X)
    ),
    "linen.quantize: there is no dot product or convolution to quantize": (
        lambda: qjax.linen.quantize(nn.LayerNorm(), RECIPE).apply(nn.LayerNorm().init(KEY, X), X)
    ),
    "linen.Dense: rule must be a Recipe": (
        lambda: qjax.linen.Dense(4, recipe="e4m3").apply({"params": VARIABLES["params"]["dense"]}, X)
    ),
}


@pytest.mark.parametrize("text", REFUSALS)
def test_refusals(text):
    with pytest.raises((ValueError, TypeError), match=text):
        REFUSALS[text]()
