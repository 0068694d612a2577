"""Delayed scaling in functions and Flax models: the state by path, and what hands it on."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn, nnx
from flax.training.train_state import TrainState
from tables import bits

import qjax
import qjax.linen
import qjax.nnx
from qjax import recipes

RECIPE = dataclasses.replace(recipes.FP8_DELAYED, history=4)
X = jnp.asarray(np.random.default_rng(0).normal(size=(8, 16)).astype(np.float32))
W = jnp.asarray(np.random.default_rng(1).normal(size=(3, 16, 16)).astype(np.float32))
NUMBERS = (((1,), (0,)), ((), ()))


def same(a, b) -> bool:
    equal = jax.tree.map(lambda x, y: np.array_equal(bits(x), bits(y)), a, b)
    return all(jax.tree.leaves(equal))


def scanned(x, w):
    return jax.lax.scan(lambda x, w: (jax.nn.relu(x @ w), None), x, w)[0].sum()


def by_hand(x, w, state):
    """The same with products called one by one."""
    for i in range(len(w)):
        mine = jax.tree.map(lambda h, i=i: h[i], state[""])
        x = jax.nn.relu(qjax.dot_general(x, w[i], NUMBERS, recipe=RECIPE, state=mine))
    return x.sum()


@pytest.mark.parametrize("wrap", [lambda f: f, jax.checkpoint, jax.jit], ids=["plain", "checkpoint", "jit"])
def test_each_step_of_a_scan_has_its_history(wrap):
    state = qjax.quantize_state(scanned, RECIPE, X, W)
    assert {k: h.shape for k, h in state[""].items()} == dict.fromkeys(("lhs", "rhs", "gradient"), (3, 4))
    expected = state
    for growth in (1.0, 3.0, 0.1):
        quantized = lambda w, s, g=growth: qjax.quantize(wrap(scanned), RECIPE, state=s)(X * g, w)  # noqa: E731
        (loss, (dw, state)) = jax.value_and_grad(quantized, argnums=(0, 1))(W, state)
        (loss_, (dw_, expected)) = jax.value_and_grad(lambda w, s, g=growth: by_hand(X * g, w, s), argnums=(0, 1))(
            W, expected
        )
        assert same(state, expected)
        assert same((loss, dw), (loss_, dw_))


def test_sites_of_one_path_are_numbered():
    f = lambda x, w: (x @ w[0]) @ w[1]  # noqa: E731
    assert list(qjax.quantize_state(f, RECIPE, X, W)) == ["", "#2"]


class Model(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Dense(16)(x))
        return nn.Dense(4, name="head")(x)


def test_linen_with_the_train_state_of_flax():
    model = qjax.linen.quantize(Model(), {"head": None, ".*": RECIPE})
    variables = model.init(jax.random.key(0), X)
    assert same(variables["params"], Model().init(jax.random.key(0), X)["params"])
    histories = variables["_overwrite_with_gradient"]["histories"]
    assert list(histories) == ["Dense_0"] and histories["Dense_0"]["gradient"].shape == (4,)

    state = TrainState.create(apply_fn=model.apply, params=variables, tx=optax.sgd(0.01))

    @jax.jit
    def step(state, x):
        gradients = jax.grad(lambda v: (state.apply_fn(v, x) ** 2).sum())(state.params)
        return state.apply_gradients(grads=gradients)

    for growth in (1.0, 2.0):
        state = step(state, X * growth)
    seen = state.params["_overwrite_with_gradient"]["histories"]["Dense_0"]["lhs"]
    largest = jnp.abs(X).max()
    assert np.array_equal(seen, jnp.stack([2 * largest, largest, jnp.float32(0), jnp.float32(0)]))

    with pytest.raises(ValueError, match="recipe of 'Dense_0' has delayed scaling; pass the variables that init"):
        model.apply({"params": variables["params"]}, X)


def test_nnx():
    inner = nnx.Sequential(nnx.Linear(16, 16, rngs=nnx.Rngs(0)), nnx.relu, nnx.Linear(16, 4, rngs=nnx.Rngs(1)))
    model = qjax.nnx.quantize(inner, RECIPE)
    model(X)
    loss = lambda model, x: (model(x) ** 2).sum()  # noqa: E731
    wrt = nnx.DiffState(0, (nnx.Param, qjax.nnx.Histories))

    @nnx.jit
    def step(model, x):
        gradients = nnx.grad(loss, argnums=wrt)(model, x)
        histories, gradients = nnx.split_state(gradients, qjax.nnx.Histories, ...)
        parameters = nnx.state(model, nnx.Param)
        nnx.update(model, histories, jax.tree.map(lambda p, g: p - 0.01 * g, parameters, gradients))

    for growth in (1.0, 2.0):
        step(model, X * growth)
    histories = model.quantize_histories.get_value()
    assert sorted(histories) == ["layers/0", "layers/2"]
    assert histories["layers/0"]["lhs"][0] == 2 * jnp.abs(X).max()
    assert histories["layers/2"]["gradient"][0] > 0


def looped(x, w):
    return jax.lax.fori_loop(0, x.shape[0], lambda i, x: x @ w, x)


REFUSALS = {
    r"quantize: the recipe of '' has delayed scaling; pass state=qjax\.quantize_state": lambda: qjax.quantize(
        scanned, RECIPE
    )(X, W),
    "quantize: state was given, but no recipe that is used has delayed scaling": lambda: qjax.quantize(
        scanned, recipes.FP8, state={}
    )(X, W),
    "has delayed scaling, and it is inside a while, which may run it otherwise than once a step": lambda: (
        qjax.quantize_state(lambda x, w: jax.lax.while_loop(lambda x: x.sum() < 0, lambda x: x @ w, x), RECIPE, X, W[0])
    ),
}


@pytest.mark.parametrize("text", REFUSALS)
def test_refusals(text):
    with pytest.raises(ValueError, match=text):
        REFUSALS[text]()
