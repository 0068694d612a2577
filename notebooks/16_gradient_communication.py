# %% [markdown]
# # What low-precision gradient communication costs
#
# **Question.** Data-parallel training sends every gradient over the wire at every step. What does it cost in loss to
# send it in few bits, how is it rounded best, and does it help to keep what rounding leaves out for the next step?
#
# **Method.** A small causal transformer learns the characters of Python's own standard library on 8 simulated devices,
# each with its own part of the batch. All is float32 but the all-reduce of the gradients, `qjax.collectives.psum`,
# which sends codes and scales: a reduce-scatter of the terms and an all-gather of their sum. Every format runs the same
# seeds, that is the same initial weights and batches, and its held-out loss is compared with that of float32 seed by
# seed.
#
# **Sources.** Seide et al. (2014), *1-bit stochastic gradient descent*, <https://doi.org/10.21437/Interspeech.2014-274>:
# the error of what was sent is added to what is sent next, and one bit is enough. Tang et al. (2021), *1-bit Adam*,
# <https://arxiv.org/abs/2102.02888>, section 4: with errors kept of the terms and of the sums. Alistarh et al. (2017),
# *QSGD*, <https://arxiv.org/abs/1610.02132>: rounding stochastically instead, so that the sum is right in the mean.

# %%
import math
import os
import platform
import tempfile
from pathlib import Path

import jax
import matplotlib
import numpy as np
import optax
from char_lm import CONTEXT, LanguageModel, corpus, losses, schedule, windows
from jax.flatten_util import ravel_pytree
from scipy import stats
from tqdm import tqdm

from qjax import collectives

if "get_ipython" not in globals():
    matplotlib.use("Agg")
import matplotlib.pyplot as plt

DEVICES = 8
jax.config.update("jax_num_cpu_devices", DEVICES)
FAST = os.environ.get("QJAX_FAST") == "1"
HERE = Path(__file__).parent if "__file__" in globals() else Path()
FIGURES = Path(tempfile.mkdtemp()) if FAST else HERE / "figures"
SEEDS = 2 if FAST else 5
STEPS = 60 if FAST else 400
TESTS = 128 if FAST else 512
RATE = 4e-3

# %% [markdown]
# ## Text, model and devices
#
# Those of study 07: every module directly in the standard library's folder, each tenth file held out whole; two
# pre-norm blocks of width 64 (`char_lm.py` beside this notebook), AdamW with a warmup and a cosine decay. At each step
# every device has one window of 64 characters.

# %%
training_text, held_out_text = corpus()
sizes = f"{len(training_text):,} characters to train on, {len(held_out_text):,} held out"
print(f"Python {platform.python_version()}: {sizes}")


def last_start(text):
    return len(text) - CONTEXT - 1


test_windows = windows(held_out_text, np.linspace(0, last_start(held_out_text), TESTS, dtype=int))
starts = [np.random.default_rng(seed).integers(0, last_start(training_text), (STEPS, DEVICES)) for seed in range(SEEDS)]
batches = windows(training_text, np.stack(starts))
model = LanguageModel(width=64, layers=1 if FAST else 2)
keys = jax.vmap(jax.random.key)(np.arange(SEEDS))
initial = jax.jit(jax.vmap(lambda key: model.init(key, test_windows[:1, :-1])["params"]))(keys)
mesh = jax.make_mesh((DEVICES,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))

# %% [markdown]
# ## Formats on the wire
#
# Gradients of all parameters are one long row. The 8-bit integers and E4M3 have a float32 scale for 128 elements, MXFP4
# a power of two for 32, the ternary numbers -1, 0 and 1 a float32 scale for 128. E5M2 has none: it is what casting the
# gradients does. *Ring* adds one term after the other and rounds at every hop; else each term is rounded once, and the
# sum once more.


# %%
RUNS = {
    "fp32": None,
    "bf16": {"fmt": "bf16"},
    "bf16, ring": {"fmt": "bf16", "order": "ring"},
    "E5M2, no scale": {"fmt": "e5m2"},
    "E4M3": {"fmt": "e4m3_g128"},
    "INT8": {"fmt": "int8_g128"},
    "MXFP4": {"fmt": "mxfp4"},
    "MXFP4, ring": {"fmt": "mxfp4", "order": "ring"},
    "MXFP4, stochastic": {"fmt": "mxfp4", "rounding": "stochastic"},
    "MXFP4, feedback": {"fmt": "mxfp4", "feedback": True},
    "ternary": {"fmt": "int2_g128"},
    "ternary, stochastic": {"fmt": "int2_g128", "rounding": "stochastic"},
    "ternary, feedback": {"fmt": "int2_g128", "feedback": True},
}
if FAST:
    RUNS = {name: RUNS[name] for name in ("fp32", "INT8", "ternary", "ternary, feedback")}


def mean_gradient(gradient, key, feedback, run):
    """Returns the mean over the devices, and the errors to keep."""
    if run is None:
        return jax.lax.pmean(gradient, "data"), feedback
    options = {name: value for name, value in run.items() if name != "feedback"}
    if "rounding" in run:
        options["key"] = key
    if "feedback" in run:
        total, feedback = collectives.psum(gradient, "data", **options, feedback=feedback)
    else:
        total = collectives.psum(gradient, "data", **options)
    return total / DEVICES, feedback


# %% [markdown]
# ## Training
#
# All seeds of a run are one program, and its bytes on the wire are read from it.


# %%
def train(run):
    """Returns the compiled training of all seeds: parameters and the loss of each step."""
    adam = optax.adamw(schedule(RATE, STEPS), b2=0.95, weight_decay=0.1)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), adam)

    def one(params, batches, key):
        def step(carry, of_step):
            (params, state, feedback), (batch, number) = carry, of_step
            # What varies over the devices has gradients that do.
            mine = jax.tree.map(lambda p: jax.lax.pcast(p, "data", to="varying"), params)
            value, gradients = jax.value_and_grad(lambda p: losses(model, p, batch).mean())(mine)
            row, tree = ravel_pytree(gradients)
            mean, feedback = mean_gradient(row, jax.random.fold_in(key, number), feedback, run)
            updates, state = optimizer.update(tree(mean), state, params)
            return (optax.apply_updates(params, updates), state, feedback), jax.lax.pmean(value, "data")

        feedback = None
        if run is not None and "feedback" in run:
            row, _ = ravel_pytree(params)
            feedback = jax.lax.pcast(collectives.init_feedback(row, DEVICES), "data", to="varying")
        carry = params, optimizer.init(params), feedback
        (params, _, _), curve = jax.lax.scan(step, carry, (batches, np.arange(STEPS)))
        return params, curve

    specs = {"in_specs": (jax.P(), jax.P(None, None, "data"), jax.P()), "out_specs": jax.P()}
    training = jax.shard_map(jax.vmap(one), mesh=mesh, **specs)
    return jax.jit(training).lower(initial, batches, keys).compile()


@jax.jit
def test(params):
    return jax.vmap(lambda params: losses(model, params, test_windows).mean())(params)


curves, tested, sent = {}, {}, {}
for name, run in tqdm(RUNS.items(), desc="training", unit="run"):
    program = train(run)
    sent[name] = sum(collectives.wire_bytes(program).values())
    params, curves[name] = jax.device_get(program(initial, batches, keys))
    tested[name] = np.asarray(test(params))

# %% [markdown]
# ## Result
#
# Gaps are differences to float32 with the same seed. Intervals are 95 % Student intervals of the mean over the seeds.


# %%
def interval(samples):
    half = stats.t.ppf(0.975, len(samples) - 1) * np.std(samples, ddof=1) / math.sqrt(len(samples))
    return np.mean(samples), half


gaps = {name: loss - tested["fp32"] for name, loss in tested.items()}
share = {name: count / sent["fp32"] for name, count in sent.items()}
print(f"{'gradients on the wire':22}{'bytes':>8}{'held-out loss':>15}{'gap to fp32':>20}")
for name in RUNS:
    gap, half = interval(gaps[name])
    print(f"{name:22}{share[name]:8.3f}{tested[name].mean():15.4f}{gap:+12.4f} ± {half:.4f}")

# %%
FAMILIES = {"E5M2": "#999999", "bf16": "#56b4e9", "E4M3": "#0072b2", "INT8": "#cc79a7", "MXFP4": "#d55e00"}
FAMILIES |= {"ternary": "#009e73"}
MARKERS = {"": "o", "no scale": "o", "ring": "s", "stochastic": "^", "feedback": "D"}
LABELS = {"": "to nearest", "ring": "in a ring", "stochastic": "stochastically", "feedback": "with error feedback"}
GREY = "0.35"


def parts(name):
    family, _, how = name.partition(", ")
    return FAMILIES[family], MARKERS[how]


def smooth(curve, width):
    mean = np.convolve(curve, np.ones(width) / width, "valid")
    return np.arange(len(curve) - len(mean), len(curve)) + 1, mean


figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4.6), layout="constrained", width_ratios=(4, 5))
drawn = [name for name in RUNS if name.startswith(("MXFP4", "ternary"))]
for name in drawn:
    color, marker = parts(name)
    steps, gap = smooth((curves[name] - curves["fp32"]).mean(0), STEPS // 8)
    left.plot(steps, gap, color=color, lw=1.5, marker=marker, markevery=STEPS // 6, ms=5)
left.axhline(0, color=GREY, lw=1, zorder=0)
left.set(xlabel="step", ylabel="training loss minus that of float32", title="(a) What rounding the gradients costs")
rows = [name for name in RUNS if name != "fp32"]
for row, name in enumerate(rows):
    (gap, half), (color, marker) = interval(gaps[name]), parts(name)
    right.errorbar(gap, -row, xerr=half, fmt=marker, ms=6, capsize=3, color=color)
    right.plot(gaps[name], np.full(SEEDS, -row - 0.3), "|", ms=5, color=color, alpha=0.6)
right.axvline(0, color=GREY, lw=1, zorder=0)
right.set_yticks(-np.arange(len(rows)), [f"{name}  ({share[name]:.2f})" for name in rows])
right.set(xlabel="held-out loss minus that of float32", title="(b) Its price, and the share of float32's bytes")
ticks = (-0.003, 0, 0.003, 0.01, 0.03, 0.1, 0.3)
for axis, scale in ((left.yaxis, left.set_yscale), (right.xaxis, right.set_xscale)):
    scale("symlog", linthresh=0.003, linscale=0.7)
    axis.set_ticks(ticks, [f"{tick:g}" for tick in ticks])
    axis.set_ticks([], minor=True)
for how, label in LABELS.items():
    left.plot([], [], color=GREY, ls="", marker=MARKERS[how], label=label)
for family in ("MXFP4", "ternary"):
    left.plot([], [], color=FAMILIES[family], label=family)
figure.legend(frameon=False, loc="outside lower center", ncols=6)
for axes in (left, right):
    axes.spines[["top", "right"]].set_visible(False)
path = FIGURES / "16_gradient_communication.png"
path.parent.mkdir(exist_ok=True)
figure.savefig(path, dpi=150)

# %% [markdown]
# (a) Means over the seeds, smoothed. (b) Means with 95 % intervals; each bar below is a seed, the number the share of
# float32's bytes. The axes of the gaps are linear up to 0.003 and logarithmic beyond.
#
# ## Reading it
#
# **Eight bits cost next to nothing, at a quarter of the bytes.** BF16, E4M3 and E5M2 are not told apart from float32,
# the last even without a scale. INT8 costs a thousandth, in every seed: blocks of 128 hold gradients of very different
# size, and the small ones are zero on a grid of equal steps.
#
# **Four bits cost a hundredth or two, and most of that is the rounding, not the bits.** MXFP4 to nearest makes small
# elements of a block zero, always the same ones. Rounded stochastically they are right in the mean, and what is kept
# for the next step is sent in the end: either takes two thirds of the price or more away, at the same bytes.
#
# **Likewise with ternary gradients**, a fifteenth of the bytes: stochastic rounding takes half of the price away,
# feedback a third, and a tenth is left. Feedback is no cure with Adam, whose second moment squares what was sent,
# errors and all: the authors of 1-bit Adam say that it works only where updates are linear in the gradients, and so
# freeze the second moment before they send one bit.
#
# **A ring costs hardly more.** It rounds seven partial sums, growing ones, where else each term is rounded once. If the
# terms are independent and of one size, the squared errors are 1 + 2 + ... + 7 of those of a term and 8 for the sum,
# against 8 and 8: the error is half as large again.
#
# **What this does not show.** 0.1 million parameters, 400 steps, 8 devices with one window each, so the gradients are
# noisy, and noise hides rounding. Larger batches and more devices have less of it.

# %% [markdown]
# ## Conclusion, asserted
#
# 1. BF16 and both 8-bit floats are within 0.001 of float32, INT8 within 0.003, at half and a quarter of the bytes.
# 2. MXFP4 to nearest costs more than twice its interval and more than 0.01, at most 0.15 of the bytes; stochastic
#    rounding and error feedback less than half of that.
# 3. Ternary gradients cost more than 0.1 to nearest; stochastic rounding and feedback less, in each seed.
# 4. A ring is within the intervals of the direct sum.
#
# (In fast mode: ternary gradients with feedback cost less than without, in each seed.)

# %%
assert (gaps["ternary, feedback"] < gaps["ternary"]).all()
if not FAST:
    cost = {name: gap.mean() for name, gap in gaps.items()}
    assert max(abs(cost[name]) for name in ("bf16", "bf16, ring", "E4M3", "E5M2, no scale")) < 0.001
    assert abs(cost["INT8"]) < 0.003 and share["INT8"] < 0.26
    gap, half = interval(gaps["MXFP4"])
    assert gap > max(2 * half, 0.01) and share["MXFP4"] < 0.15
    assert max(cost["MXFP4, stochastic"], cost["MXFP4, feedback"]) < gap / 2
    assert cost["ternary"] > 0.1 and (gaps["ternary, stochastic"] < gaps["ternary"]).all()
    assert abs(cost["MXFP4, ring"] - gap) < half
print(path)
