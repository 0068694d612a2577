"""Times the training of the transformer of study 04 with the statistics of every tenth step, against it without.

    python benchmarks/watch.py                 # writes benchmarks/results/watch.md
    python benchmarks/watch.py --rounds 5

A round trains 130 steps of each in random order: without, and with statistics of every tenth in each format.
"""

import argparse
import datetime
import functools
import importlib.metadata
import os
import pathlib
import random
import sys
import time
from statistics import median, quantiles

import jax
import numpy as np
import optax

from qjax import stats

HERE = pathlib.Path(__file__).parent
RESULT = HERE / "results" / "watch.md"
sys.path.insert(0, str(HERE.parent / "notebooks"))
EVERY, PARTS, BATCH, LIMIT = 10, 13, 8, 1.10
FORMATS = ("e4m3", "mxfp4")


def main():
    from char_lm import LanguageModel, corpus, losses, windows

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=31)
    parser.add_argument("--output", type=pathlib.Path, default=RESULT)
    options = parser.parse_args()
    text, _ = corpus()
    starts = np.random.default_rng(0).integers(0, len(text) - 100, (EVERY * PARTS, BATCH))
    batches, model, adam = windows(text, starts), LanguageModel(width=64), optax.adamw(1e-3)
    params = model.init(jax.random.key(0), batches[0][:, :-1])["params"]
    written = []

    def run(watch):
        @functools.partial(jax.jit, static_argnums=0)
        def step(i, carry, batch):
            params, state = carry
            value, gradient = watch.value_and_grad(lambda p: losses(model, p, batch).mean())(i, params)
            updates, state = adam.update(gradient, state, params)
            return (optax.apply_updates(params, updates), state), value

        def train():
            carry = params, adam.init(params)
            for i, batch in enumerate(batches):
                carry, value = step(i if i % EVERY == 0 else 1, carry, batch)
            jax.block_until_ready(value)
            jax.effects_barrier()

        return train

    runs = {"off": run(stats.Watch("e4m3", None, written.append))}
    for name in FORMATS:
        runs[name] = run(stats.Watch(name, EVERY, lambda step, found: written.append(found.rows()), PARTS))
    times, first = {name: [] for name in runs}, {}
    for name, train in runs.items():
        start = time.perf_counter()
        train()
        first[name] = time.perf_counter() - start
    used = {name: [] for name in runs}
    for _ in range(options.rounds):
        for name in random.sample(list(runs), len(runs)):
            start, before = time.perf_counter(), time.process_time()
            runs[name]()
            times[name].append(time.perf_counter() - start)
            used[name].append(time.process_time() - before)
    base, work = median(times["off"]), median(used["off"])
    packages = [f"{name} {importlib.metadata.version(name)}" for name in ("qjax", "jax", "jaxlib", "flax", "optax")]
    lines = [
        "# What the statistics of a training run cost",
        "",
        f"- {datetime.datetime.now():%Y-%m-%d %H:%M}, `python benchmarks/watch.py --rounds {options.rounds}`",
        f"- {', '.join(packages)}, Python {sys.version.split()[0]}",
        f"- device {jax.devices()[0].platform}; {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}",
        "",
        f"{len(batches)} steps of the transformer of study 04, batches of {BATCH}. Every tenth has the statistics",
        f"of one of its {PARTS} products in turn, {sum(map(len, written[:PARTS]))} operands in all, and their rows.",
        f"Ratios of medians to the steps without, {1e3 * base:.0f} ms; of processor time, which depends less on what",
        f"else runs and which the limit is for, {1e3 * work:.0f} ms.",
        "",
        "| format | ratio | quartiles | processor time | limit | | first round in s |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, seconds in times.items():
        ratio, low, high = (t / base for t in (median(seconds), *quantiles(seconds, n=4)[::2]))
        share = median(used[name]) / work
        verdict = "|" if name == "off" else f"{LIMIT} | {'pass' if share <= LIMIT else '**FAIL**'}"
        spread = f"{low:.2f}, {high:.2f} | {share:.2f}"
        lines.append(f"| {name} | {ratio:.2f} | {spread} | {verdict} | {first[name]:.1f} |")
    options.output.write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
