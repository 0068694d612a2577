"""Times steps of optimizers whose state is in low precision against optax.adamw, and weighs the state.

    python benchmarks/optimizer_step.py                 # 10^7 parameters; writes to benchmarks/results
    python benchmarks/optimizer_step.py --rounds 5

A round steps all optimizers in random order; a new one is a row of ``OPTIMIZERS``.
"""

import argparse
import datetime
import importlib.metadata
import os
import pathlib
import random
import re
import sys
import time
from statistics import median, quantiles

import jax
import optax

from qjax import optim

# As benchmarks/chop.py says.
jax.config.update("jax_cpu_enable_async_dispatch", False)

ON_CPU, DEVICE = jax.default_backend() == "cpu", re.sub(r"\W+", "-", jax.devices()[0].device_kind.lower())
RESULT = pathlib.Path(__file__).parent / "results" / f"optimizer_step{'' if ON_CPU else '-' + DEVICE}.md"
SHAPE = (9765, 1024)
STEPS = 1 if ON_CPU else 20  # at a time, so that an accelerator does not wait for the next
# Each row: the optimizer, and the most that its step and its state may be: times AdamW's, and bytes a parameter.
OPTIMIZERS = {
    "optax.adamw": (optax.adamw(1e-3), None, None),
    "coat_adamw": (optim.coat_adamw(1e-3), 2.5, 2.2),
    "coat_adamw, not expanded": (optim.coat_adamw(1e-3, expand=False), None, 2.2),
    "adamw_8bit": (optim.adamw_8bit(1e-3), None, 2.2),
    "adamw_4bit": (optim.adamw_4bit(1e-3), None, 1.2),
    "adamw, weights in bf16": (optax.chain(optax.adamw(1e-3), optim.chop_params("bf16")), None, None),
}


def live_bytes() -> int:
    return sum(x.nbytes for x in jax.live_arrays())


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--output", type=pathlib.Path, default=RESULT)
    options = parser.parse_args()
    gradients = 1e-3 * jax.random.normal(jax.random.key(1), SHAPE)
    runs = {}
    for name, (tx, *limits) in OPTIMIZERS.items():

        def step(params, state, gradients, tx=tx):
            updates, state = tx.update(gradients, state, params)
            return optax.apply_updates(params, updates), state

        compiled = jax.jit(step, donate_argnums=(0, 1))
        params = 0.02 * jax.random.normal(jax.random.key(0), SHAPE)
        before = live_bytes()
        start = time.perf_counter()
        carry = jax.block_until_ready(compiled(params, tx.init(params), gradients))
        runs[name] = [
            compiled,
            carry,
            [],
            limits,
            (live_bytes() - before) / gradients.size,
            time.perf_counter() - start,
        ]
        print(f"{name}: {runs[name][4]:.3f} bytes a parameter, first step {runs[name][5]:.1f} s", file=sys.stderr)
    for _ in range(options.rounds):
        for run in random.sample(list(runs.values()), len(runs)):
            start = time.perf_counter()
            for _ in range(STEPS):
                run[1] = run[0](*run[1], gradients)
            jax.block_until_ready(run[1])
            run[2].append((time.perf_counter() - start) / STEPS)
    base = median(runs["optax.adamw"][2])
    packages = [f"{name} {importlib.metadata.version(name)}" for name in ("qjax", "jax", "jaxlib", "optax")]
    lines = [
        "# The speed of low-precision optimizer states" + ("" if ON_CPU else f" on {DEVICE}"),
        "",
        f"- {datetime.datetime.now():%Y-%m-%d %H:%M}, `python benchmarks/optimizer_step.py --rounds {options.rounds}`",
        f"- {', '.join(packages)}, Python {sys.version.split()[0]}",
        f"- device {jax.devices()[0].device_kind}; {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}; "
        + " ".join(f"{name}={os.environ.get(name, '')!r}" for name in ("XLA_FLAGS", "GLIBC_TUNABLES")),
        "",
        f"Times of one step on {SHAPE[0] * SHAPE[1]:,} float32 parameters, weights and state donated, as ratios of",
        f"medians to `optax.adamw` in the same rounds, {1e3 * base:.3g} ms. `bytes`: those of the live arrays of the",
        "state, a parameter.",
        "",
        "| optimizer | ratio | quartiles | limit | | bytes | limit | | first step in s |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, (_, _, times, (slowest, largest), size, first) in runs.items():
        ratio, low, high = (t / base for t in (median(times), *quantiles(times, n=4)[::2]))
        verdicts = [
            f"{limit or ''} | {'' if limit is None else 'pass' if value <= limit else '**FAIL**'}"
            for value, limit in ((ratio, slowest), (size, largest))
        ]
        spread = f"{ratio:.2f} | {low:.2f}, {high:.2f}"
        lines.append(f"| {name} | {spread} | {verdicts[0]} | {size:.3f} | {verdicts[1]} | {first:.1f} |")
    options.output.write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
