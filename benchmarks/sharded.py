"""Trains a transformer of 25 million parameters, fully sharded and in MXFP8, on simulated devices, and on one.

    python benchmarks/sharded.py                 # on 8 devices, then on one; writes benchmarks/results/sharded.md
    python benchmarks/sharded.py --processes 2   # the same over two processes of 4 devices each

Every parameter, and all that the optimizer keeps of it, lies in parts on the devices, and so does the batch.
"""

import argparse
import datetime
import functools
import importlib.metadata
import os
import pathlib
import socket
import subprocess
import sys

import jax
import numpy as np

HERE = pathlib.Path(__file__).parent
RESULT = HERE / "results" / "sharded.md"
sys.path.insert(0, str(HERE.parent / "notebooks"))
DEVICES, BLOCK = 8, 32


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--batch", type=int, default=8, help="windows of 64 characters a step")
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--output", type=pathlib.Path, default=RESULT)
    parser.add_argument("--process", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--coordinator", help=argparse.SUPPRESS)
    return parser.parse_args()


def train(options, devices):
    """Returns the loss of every step, and the bytes of parameters and optimizer state on the first device."""
    import optax
    from char_lm import LanguageModel, corpus, losses, windows

    import qjax.linen
    from qjax import recipes

    mesh = jax.make_mesh((len(devices),), ("data",), devices=devices, axis_types=(jax.sharding.AxisType.Auto,))

    def sharding(x):
        """Returns where an array lies: in whole blocks along its first axis that has them for all devices."""
        axis = next((i for i, n in enumerate(x.shape) if n % (DEVICES * BLOCK) == 0), None)
        return jax.NamedSharding(mesh, jax.P() if axis is None else jax.P(*[None] * axis, "data"))

    def make(fn, *args):
        """Returns ``fn(*args)``, made in parts."""
        shardings = jax.tree.map(sharding, jax.eval_shape(fn, *args))
        return jax.jit(fn, out_shardings=shardings)(*args), shardings

    text, _ = corpus()
    starts = np.random.default_rng(0).integers(0, len(text) - 100, (options.steps, options.batch))
    batches = windows(text, starts)
    plain = LanguageModel(options.width, options.layers, heads=8)
    model = qjax.linen.quantize(plain, {".*": recipes.MXFP8})
    optimizer = optax.adamw(1e-3, b2=0.95, weight_decay=0.1)
    params, of_params = make(lambda key: plain.init(key, batches[0, :, :-1])["params"], jax.random.key(0))
    state, of_state = make(optimizer.init, params)

    @functools.partial(jax.jit, out_shardings=(of_params, of_state, None), donate_argnums=(0, 1))
    def step(params, state, batch):
        value, gradients = jax.value_and_grad(lambda p: losses(model, p, batch).mean())(params)
        updates, state = optimizer.update(gradients, state, params)
        return optax.apply_updates(params, updates), state, value

    by_rows, curve = jax.NamedSharding(mesh, jax.P("data")), []
    for number, rows in enumerate(batches):
        batch = jax.make_array_from_callback(rows.shape, by_rows, functools.partial(np.ndarray.__getitem__, rows))
        params, state, value = step(params, state, batch)
        curve.append(np.float32(value))
        if jax.process_index() == 0:
            print(f"step {number:3} on {len(devices)} devices: {curve[-1]:.6f}", flush=True)
    mine = [x.addressable_shards[0].data.nbytes for x in jax.tree.leaves((params, state))]
    return np.array(curve), optax.tree.size(params), sum(mine)


def launch(options):
    """Starts the processes and waits for them; if one dies, the others end with an error of jax.distributed."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        coordinator = f"127.0.0.1:{free.getsockname()[1]}"
    command = [sys.executable, __file__, *sys.argv[1:], "--coordinator", coordinator, "--process"]
    processes = [subprocess.Popen([*command, str(i)]) for i in range(options.processes)]
    sys.exit(max(abs(process.wait()) for process in processes))


def main():
    options = arguments()
    if options.processes > 1 and options.process is None:
        launch(options)
    jax.config.update("jax_num_cpu_devices", DEVICES // options.processes)
    if options.process is not None:
        jax.distributed.initialize(options.coordinator, options.processes, options.process)
    sharded, size, held = train(options, jax.devices())
    if jax.process_index() > 0:
        return
    whole, _, of_one = train(options, jax.local_devices()[:1])
    apart = np.abs(sharded - whole) / whole
    equal = int(np.argmax(apart > 0)) if apart.any() else len(apart)
    packages = [f"{name} {importlib.metadata.version(name)}" for name in ("qjax", "jax", "jaxlib", "flax", "optax")]
    lines = [
        "# A transformer, fully sharded and in MXFP8",
        "",
        f"- {datetime.datetime.now():%Y-%m-%d %H:%M}, `python benchmarks/sharded.py`, {options.processes} process(es)",
        f"- {', '.join(packages)}, Python {sys.version.split()[0]}, {os.cpu_count()} cores",
        "",
        f"{size / 1e6:.1f} million parameters, {options.layers} layers of width {options.width}, batches of "
        f"{options.batch} windows of 64 characters, AdamW, {DEVICES} devices.",
        "",
        f"- parameters and optimizer state on a device: {held / 2**20:.1f} MiB of {of_one / 2**20:.1f}",
        f"- the loss is that of one device, bit for bit, for the first {equal} of {len(sharded)} steps",
        f"- the largest difference after: {apart.max():.1e} of the loss",
        "",
        "| step | 8 devices | 1 device |",
        "|---|---|---|",
        *(f"| {i} | {a:.7f} | {b:.7f} |" for i, (a, b) in enumerate(zip(sharded, whole, strict=True))),
    ]
    options.output.write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
