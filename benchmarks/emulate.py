"""Times programs emulated in a format, against the same programs in float32, and against pychop's wrapped operations.

    python benchmarks/emulate.py                 # writes benchmarks/results/emulate.md
    python benchmarks/emulate.py --rounds 15

A round runs all versions of a program in random order. Compilation is timed apart, in processes' own order.
"""

import argparse
import datetime
import functools
import importlib.metadata
import itertools
import os
import pathlib
import random
import sys
import time
from statistics import median, quantiles

import jax
import jax.numpy as jnp
import numpy as np
import optax

import qjax

RESULT = pathlib.Path(__file__).parent / "results" / "emulate.md"
GENERATOR = np.random.default_rng(0)
SIZES = (784, 512, 512, 10)
OPTIMIZER = optax.adam(1e-3)


def loss(params, x, y):
    for weight, bias in params[:-1]:
        x = jax.nn.relu(x @ weight + bias)
    weight, bias = params[-1]
    return optax.softmax_cross_entropy_with_integer_labels(x @ weight + bias, y).mean()


def train_step(params, state, x, y):
    updates, state = OPTIMIZER.update(jax.grad(loss)(params, x, y), state, params)
    return optax.apply_updates(params, updates), state


def chain(x):
    """Fourteen operations on each number, the sums and products of which pychop wraps too."""
    y = jnp.exp(-(x * x)) + x
    y = jnp.sqrt(y * y + 1.0) * 0.5
    return jnp.tanh(y - x) / (y + 2.0) + jnp.sin(x) * y


def normal(*shape):
    return jnp.asarray(GENERATOR.normal(0, 0.05, shape), jnp.float32)


PARAMS = [(normal(m, n), jnp.zeros((1, n), jnp.float32)) for m, n in itertools.pairwise(SIZES)]
STEP = (PARAMS, OPTIMIZER.init(PARAMS), normal(256, SIZES[0]), jnp.asarray(GENERATOR.integers(0, 10, 256)))
CHAIN = (normal(1 << 20),)
STOCHASTIC = functools.partial(qjax.emulate, fmt="fp16", rounding="stochastic", key=jax.random.key(0))


def pychop(fn, *, checks: bool):
    """Returns the chain of pychop's operations; its own functions check domains, which jit cannot trace."""
    from pychop import math_func
    from pychop.jx import lightchop

    chop = lightchop.LightChop_(5, 10, rmode=1)

    def unary(name):
        if checks:
            return lambda x: getattr(math_func, name)(x, chop)
        return lambda x: chop(getattr(jnp, name)(chop(x)))

    exp, sqrt, tanh, sin = map(unary, ("exp", "sqrt", "tanh", "sin"))

    def wrapped(x):
        add, mul = (lambda a, b: chop(chop(a) + chop(b))), (lambda a, b: chop(chop(a) * chop(b)))
        y = add(exp(-mul(x, x)), x)
        y = mul(sqrt(add(mul(y, y), jnp.float32(1.0))), jnp.float32(0.5))
        return add(chop(tanh(add(y, -x)) / add(y, jnp.float32(2.0))), mul(sin(x), y))

    return wrapped


EAGER = "pychop, fp16, eager"
# name: (the program, its arguments, {version: (what makes it, the largest accepted ratio, that of compile times)})
PROGRAMS = {
    "Training step of an MLP 784-512-512-10, batch 256, Adam": (
        train_step,
        STEP,
        {
            "float32": (lambda fn: fn, None, None),
            "fp16": (functools.partial(qjax.emulate, fmt="fp16"), 3.0, 4.0),
            "bf16": (functools.partial(qjax.emulate, fmt="bf16"), 3.0, 4.0),
            "e4m3, saturating": (functools.partial(qjax.emulate, fmt="e4m3", saturate=True), 3.0, 4.0),
            "fp16, stochastic": (STOCHASTIC, None, None),
        },
    ),
    "Fourteen operations on 2^20 numbers": (
        chain,
        CHAIN,
        {
            "float32": (lambda fn: fn, None, None),
            "fp16": (functools.partial(qjax.emulate, fmt="fp16"), None, None),
            "bf16": (functools.partial(qjax.emulate, fmt="bf16"), None, None),
            "fp16, stochastic": (STOCHASTIC, None, None),
            "pychop, fp16, jitted": (functools.partial(pychop, checks=False), None, None),
            EAGER: (functools.partial(pychop, checks=True), None, None),
        },
    ),
}


def compiled(fn, args):
    """Returns (fn compiled, the seconds from tracing to the end of compilation)."""
    jax.clear_caches()
    started = time.perf_counter()
    return jax.jit(fn).lower(*args).compile(), time.perf_counter() - started


def measure(name: str, rounds: int):
    program, args, versions = PROGRAMS[name]
    functions, compilation, seconds, remarks = {}, {}, {}, {}
    for version, (make, _, _) in versions.items():
        try:
            fn = make(program)
        except ImportError:
            remarks[version] = "not installed"
            continue
        runs = [(fn, 0.0)] if version == EAGER else [compiled(fn, args) for _ in range(3)]
        functions[version], compilation[version] = runs[-1][0], median(took for _, took in runs)
        jax.block_until_ready(functions[version](*args))
        seconds[version] = []
    order, shuffled = list(seconds), random.Random(0)
    for _ in range(rounds):
        shuffled.shuffle(order)
        for version in order:
            started = time.perf_counter()
            jax.block_until_ready(functions[version](*args))
            seconds[version].append(time.perf_counter() - started)
    base, first = median(seconds["float32"]), compilation["float32"]
    yield f"\n## {name}\n\nfloat32: {1e3 * base:.2f} ms, compiled in {first:.2f} s; both are the ratio 1.\n"
    yield "| version | time | quartiles | limit | compilation | limit | |"
    yield "|---|---|---|---|---|---|---|"
    for version, (_, limit, compile_limit) in versions.items():
        if version not in seconds:
            yield f"| {version} | {remarks[version]} | | | | | |"
            continue
        low, ratio, high = (q / base for q in quantiles(seconds[version]))
        slower = compilation[version] / first
        failed = (limit and ratio > limit) or (compile_limit and slower > compile_limit)
        judged = "" if limit is None else "**FAIL**" if failed else "pass"
        yield (
            f"| {version} | {ratio:.2f} | {low:.2f}, {high:.2f} | {limit or ''} "
            f"| {slower:.2f} | {compile_limit or ''} | {judged} |"
        )


def header() -> str:
    found = {d.name.lower(): d.version for d in importlib.metadata.distributions()} | {"qjax": qjax.__version__}
    names = ("qjax", "jax", "jaxlib", "optax", "pychop")
    return f"""# The speed of emulate

- {datetime.datetime.now():%Y-%m-%d %H:%M}, `python {" ".join(sys.argv)}`
- {", ".join(f"{name} {found.get(name, 'not installed')}" for name in names)}, Python {sys.version.split()[0]}
- device {jax.devices()[0].device_kind}; {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}

Times of whole programs with every operation rounded, forward, backward and the update of the optimizer, as ratios of
medians to the program in float32 in the same rounds; and of the time to trace, lower and compile them (median of 3)."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=41)
    options = parser.parse_args()
    report = "\n".join([header(), *(line for name in PROGRAMS for line in measure(name, options.rounds))]) + "\n"
    print(report)
    RESULT.write_text(report)


if __name__ == "__main__":
    main()
