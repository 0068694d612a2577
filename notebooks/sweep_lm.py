"""The runs of a sweep of language models over size, tokens and number format: those of studies 04 and 05, smaller.

    python notebooks/sweep_lm.py runs.jsonl [WORKERS]

runs the design, or what a killed call has left of it, and writes a table beside the file, runs.csv. A run is a function
of its point alone, so the rows are the same in whatever process; from one version of Python to another the text
differs, and the losses with it. It takes some 6 to 60 seconds of one core, compilation included.
"""

import csv
import functools
import sys
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import jax
import numpy as np
from char_lm import CONTEXT, LanguageModel, corpus, losses, train, windows

import qjax
import qjax.linen
from qjax.sweep import grid, sweep

BATCH = 8
TESTED = 1024
RATE = 0.5  # Over the width: of the powers of 2 the best for widths 32, 64 and 128, in float32 and 500 steps.

# Floats without special values, in blocks of 32 with a float32 scale. Those of one exponent bit are the integers.
SPLITS = "e1m1 e2m0 e1m2 e2m1 e3m0 e1m4 e2m3 e3m2 e4m1 e1m6 e2m5 e3m4 e4m3 e5m2".split()
FORMATS = [
    "fp32",
    *(f"{split}finite_g32" for split in SPLITS),
    "e2m1finite_g16",
    "e2m1finite_channel",
    "mxfp4",
    "nvfp4",
]
# A second seed where a run is short says how much of a difference is chance.
DESIGN = grid(seed=[0], operands=["wa"], width=[32, 64, 96, 128], steps=[250, 500, 1000, 2000], fmt=FORMATS)
DESIGN += grid(seed=[0], operands=["w", "a"], width=[32, 64, 128], steps=[500, 1000], fmt=FORMATS[3:5])
DESIGN += grid(seed=[1], operands=["wa"], width=[32, 64, 96, 128], steps=[250, 500], fmt=FORMATS)


@functools.cache
def texts():
    training, held_out = corpus()
    starts = np.linspace(0, len(held_out) - CONTEXT - 1, TESTED, dtype=int)
    return training, windows(held_out, starts)


@jax.jit(static_argnums=0)
def tested(model, params, text):
    return losses(model, params, text).mean()


def run(point):
    """Trains a model with the inputs ("a") and weights ("w") of the linear layers of its blocks in a format.

    Both are rounded in the forward product, to nearest; gradients are straight-through and in float32. Rows that differ
    in the format alone have the same initial weights and the same batches.
    """
    training, test = texts()
    random = np.random.default_rng(point["seed"])
    starts = random.integers(0, len(training) - CONTEXT - 1, (point["steps"], BATCH))
    model = LanguageModel(point["width"])
    params = jax.jit(model.init)(jax.random.key(point["seed"]), test[:1, :-1])["params"]
    if point["fmt"] != "fp32":
        rounded = qjax.Quantizer(point["fmt"])
        forward = qjax.Gemm(*(rounded if operand in point["operands"] else None for operand in "aw"))
        model = qjax.linen.quantize(model, {r"block_\d+/(qkv|out|up|down)": qjax.Recipe(forward), ".*": None})
    rate = RATE / point["width"]
    params, curve = train(model, rate, params, windows(training, starts), jax.random.key(point["seed"]))
    kernels = sum(x.size for block in ("block_0", "block_1") for x in jax.tree.leaves(params[block]) if x.ndim == 2)
    return {
        "parameters": kernels,
        "tokens": point["steps"] * BATCH * CONTEXT,
        **described(point["fmt"]),
        "loss": tested(model, params, test),
        "training_loss": curve[-point["steps"] // 10 :].mean(),
    }


def described(name):
    """Returns the columns that the laws ask a format for."""
    fmt, block = qjax.format(name), None
    while isinstance(fmt, qjax.Scaled):  # NVFP4 is two of them, and the inner one has the blocks.
        fmt, block = fmt.element, fmt.block
    return {
        "bits": fmt.bits,
        "exponent_bits": fmt.exponent_bits,
        "mantissa_bits": fmt.mantissa_bits,
        "block": block,
    }


def write(rows, path):
    """Writes rows as a CSV file, numbers to 6 digits: the noise of a loss is in the third."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(rows[0])
        for row in rows:
            writer.writerow([f"{value:.6g}" if isinstance(value, float) else value for value in row.values()])


if __name__ == "__main__":
    path, workers = Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 2
    # A new process gives back the memory of compiled programs.
    options = {"mp_context": get_context("spawn"), "max_tasks_per_child": 25}
    rows = sweep(run, DESIGN, path, executor=functools.partial(ProcessPoolExecutor, workers, **options))
    write(rows, path.with_suffix(".csv"))
    print(f"{len(rows)} rows")
