"""Trains a quantized network over the processes of a run; started by test_processes."""

import sys

import jax
import jax.numpy as jnp
import numpy as np


def main(coordinator: str, processes: int, process: int, path: str, steps: int) -> None:
    jax.config.update("jax_num_cpu_devices", 8 // processes)
    if processes > 1:
        jax.distributed.initialize(coordinator, processes, process, heartbeat_timeout_seconds=10)
    import qjax
    from qjax import recipes

    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    rows = jax.NamedSharding(mesh, jax.P("data"))
    draw = np.random.default_rng(0)

    def placed(*shape):
        values = draw.normal(size=shape).astype(np.float32)
        return jax.make_array_from_callback(shape, rows, lambda at: values[at])

    w, x, y = placed(256, 64) / 16, placed(256, 256), placed(256, 64)

    def loss(w, x, y):
        return jnp.mean((x @ w - y) ** 2)

    @jax.jit
    def step(w, x, y, key):
        value, gradient = jax.value_and_grad(qjax.quantize(loss, recipes.MXFP4_STOCHASTIC, key=key))(w, x, y)
        return value, jax.lax.with_sharding_constraint(w - gradient, rows)

    key = jax.random.key(0)
    for number in range(steps):
        value, w = step(w, x, y, jax.random.fold_in(key, number))
        print("loss", float(value), flush=True)
    whole = jax.jit(lambda w: w, out_shardings=jax.NamedSharding(mesh, jax.P()))(w)
    if process == 0:
        np.save(path, np.asarray(whole))


if __name__ == "__main__":
    coordinator, processes, process, path, steps = sys.argv[1:]
    main(coordinator, int(processes), int(process), path, int(steps))
