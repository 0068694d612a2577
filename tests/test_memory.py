"""The memory of a training step: counts by hand, of live arrays, of shapes, and of compiled programs."""

import dataclasses

import jax
import jax.numpy as jnp
import optax
import pytest
from jax.sharding import AxisType, NamedSharding

import qjax
from qjax import collectives, memory, recipes
from qjax.memory import Bytes

W = jax.ShapeDtypeStruct((4, 64, 64), jnp.float32)
X = jax.ShapeDtypeStruct((32, 64), jnp.float32)


def deep(w, x):
    """Four layers, one after the other."""
    return jnp.sum(jax.lax.scan(lambda x, w: (jnp.sin(x @ w), None), x, w)[0])


def test_bytes_of_arrays():
    mesh = jax.make_mesh((8,), ("d",), axis_types=(AxisType.Auto,))
    rows = NamedSharding(mesh, jax.P("d"))
    x = jnp.ones((64, 32), jnp.float32)
    assert memory.nbytes(x) == Bytes(8192, 8192)
    assert memory.nbytes([jax.device_put(x, rows), jax.device_put(x, NamedSharding(mesh, jax.P()))]) == Bytes(
        16384, 8192 + 1024
    )
    assert memory.nbytes(jax.ShapeDtypeStruct((64, 32), jnp.bfloat16, sharding=rows)) == Bytes(4096, 512)
    assert memory.nbytes(qjax.encode(x, "mxfp4")) == Bytes(1024 + 64, 1024 + 64)
    assert memory.nbytes(jax.random.split(jax.random.key(0), 3)) == Bytes(24, 24)
    assert memory.nbytes({}) == Bytes(0, 0)
    of_shapes = jax.eval_shape(optax.adam(1e-3).init, x)
    assert memory.nbytes(optax.adam(1e-3).init(x)) == memory.nbytes(of_shapes) == Bytes(2 * 8192 + 4, 2 * 8192 + 4)


# What each layer keeps of its 32 x 64 numbers: the input of the product, and that of the sine.
@pytest.mark.parametrize(
    ("fn", "kept"),
    [
        (deep, 2 * 4 * 32 * 64 * 4),
        (jax.checkpoint(deep), 0),
        (qjax.quantize(deep, recipes.MXFP8), 2 * 4 * 32 * 64 * 4),
        (
            qjax.quantize(deep, dataclasses.replace(recipes.MXFP8, save_lhs=qjax.Quantizer("mxfp8_e4m3"))),
            4 * (32 * 64 * 4 + qjax.encode(jnp.zeros(X.shape, X.dtype), "mxfp8_e4m3").nbytes),
        ),
    ],
)
def test_what_is_saved(fn, kept):
    """Of the weights, which are arguments, quantized products in a scan keep no copy either."""
    assert memory.saved(fn, W, X) == kept


def test_training_step():
    mesh = jax.make_mesh((8,), ("d",), axis_types=(AxisType.Auto,))
    rows = NamedSharding(mesh, jax.P("d"))
    optimizer, loss = optax.sgd(1e-3, momentum=0.9), qjax.quantize(deep, recipes.MXFP8)
    w = jax.device_put(jnp.zeros(W.shape, W.dtype), NamedSharding(mesh, jax.P(None, "d")))
    x = jax.device_put(jnp.ones(X.shape, X.dtype), rows)
    state = jax.jit(optimizer.init, out_shardings=jax.tree.map(lambda _: None, jax.eval_shape(optimizer.init, w)))(w)

    @jax.jit
    def step(w, state, x):
        updates, state = optimizer.update(jax.grad(loss)(w, x), state, w)
        return optax.apply_updates(w, updates), state

    compiled = step.lower(w, state, x).compile()
    found = memory.training(loss, w, x, state=state, step=compiled)
    assert found["parameters"] == found["gradients"] == Bytes(4 * 64 * 64 * 4, 4 * 64 * 64 * 4 // 8)
    assert found["optimizer state"].total == found["parameters"].total
    assert found["saved activations"] == Bytes(2 * 4 * 32 * 64 * 4, None)
    assert found["temporaries"].device > 0
    sent = {name.removeprefix("sent by "): row.device for name, row in found.items() if name.startswith("sent by ")}
    assert sent == collectives.wire_bytes(compiled) != {}
    rows = [[cell.strip() for cell in line.split("|")] for line in str(found).splitlines()]
    assert rows[0] == ["", "MiB", "on a device"]
    assert rows[2] == ["parameters", "0.06", "0.01"]
    assert [row[0] for row in rows[2:]] == list(found)
