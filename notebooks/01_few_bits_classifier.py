# %% [markdown]
# # How few bits train a classifier?
#
# **Question.** A network trains with its weights, activations and gradients all held in one number format. How few bits
# of which kind of format suffice, and what does stochastic rounding buy?
#
# **Method.** A 64-32-10 network learns handwritten digits (scikit-learn's `load_digits`: 1797 images of 8 x 8 pixels,
# of which 500 are held out). Only the format and the rounding change: every configuration runs the same eight seeds,
# that is the same initial weights and the same batches, in one `vmap`.
#
# **Sources.** Gupta et al. (2015), *Deep learning with limited numerical precision*, <https://arxiv.org/abs/1502.02551>
# (fixed point with stochastic rounding); Das et al. (2018), *Mixed precision training of convolutional neural networks
# using integer operations*, <https://arxiv.org/abs/1802.00930> (DFP, one exponent for a tensor); Micikevicius et al.
# (2022), *FP8 formats for deep learning*, <https://arxiv.org/abs/2209.05433>; Rouhani et al. (2023), *Microscaling data
# formats for deep learning*, <https://arxiv.org/abs/2310.10537> (MX, one exponent for 32 elements).

# %%
import dataclasses
import functools
import math
import os
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import optax
from scipy import stats
from sklearn.datasets import load_digits
from tqdm import tqdm

import qjax
from qjax import E8M0, Fixed, Scaled

if "get_ipython" not in globals():
    matplotlib.use("Agg")
import matplotlib.pyplot as plt

FAST = os.environ.get("QJAX_FAST") == "1"
HERE = Path(__file__).parent if "__file__" in globals() else Path()
FIGURES = Path(tempfile.mkdtemp()) if FAST else HERE / "figures"
SEEDS = 4 if FAST else 8
STEPS = 200 if FAST else 500
BATCH = 64

# %% [markdown]
# ## Formats
#
# Four families, from 16 bits down to 3. Floats and fixed point have no scale; DFP shares one power of two among the
# elements of a tensor, MX one among 32 elements, which costs a quarter of a bit each. The fixed-point formats span -4
# to 4, because the network below is scaled so that whatever is rounded has entries of order one.


# %%
def dfp(bits):
    return Scaled(Fixed(bits, symmetric=True), E8M0, None)


FAMILIES = {
    "float": {
        "fp16": "fp16",
        "bf16": "bf16",
        "e4m3": "e4m3",
        "e5m2": "e5m2",
        "e3m2": "e3m2",
        "e2m1": "e2m1",
        "e2m0": "e2m0finite",
    },
    "fixed point": {name: name for name in ("q3.13", "q3.9", "q3.5", "q3.3", "q3.1", "q3.0")},
    "DFP": {f"dfp{bits}": dfp(bits) for bits in (12, 8, 6, 4, 3)},
    "MX": {
        "mxfp8_e4m3": "mxfp8_e4m3",
        "mxfp6_e2m3": "mxfp6_e2m3",
        "mxfp4": "mxfp4",
        "mxint3": Scaled(Fixed(3, symmetric=True), E8M0, 32),
    },
}
if FAST:
    FAMILIES = {"float": {"e4m3": "e4m3"}, "MX": {"mxfp4": "mxfp4"}}
FAMILIES = {family: {name: qjax.format(fmt) for name, fmt in members.items()} for family, members in FAMILIES.items()}


# %% [markdown]
# ## What is rounded, and what is not
#
# With one call of `qjax.chop` each, saturating on overflow:
#
# - the **weights** are stored in the format: after every update they are rounded, and there is no other copy;
# - the **activations**, which are the images and the hidden layer, are rounded before their product with the weights
#   (the gradient of `chop` is straight-through);
# - the **gradients** are rounded twice: the one with respect to a layer's output where it enters the backward pass
#   (`chop_cotangent`), and the one with respect to the weights before it enters the optimiser.
#
# So both operands of each of the three products of a layer (forward, and backward for either operand) have been
# rounded. MX blocks run along the inputs of a weight and along the features of everything else; a tensor is rounded
# once and not again along its other axis for the backward products, as MX hardware would.
#
# Not rounded, that is in float32: the accumulation within products, ReLU and softmax, and Adam's moments and the update
# that it computes.
#
# The layers are unit-scaled (Blake et al. 2023, <https://arxiv.org/abs/2303.11257>): weights of variance one, with the
# factor $1/\sqrt{\text{inputs}}$ applied to the product, and a loss summed over the batch. Adam ignores the scale of
# the gradients, so this is a choice of units that suits formats with a narrow range, not a different training.
#
# For comparison, some formats are also run with `master_weights`: a float32 copy takes the updates and is rounded at
# each use (Micikevicius et al. 2018, <https://arxiv.org/abs/1710.03740>).


# %%
@dataclasses.dataclass(frozen=True)
class Precision:
    fmt: qjax.Float | qjax.Fixed | qjax.Codebook | qjax.Scaled
    rounding: str
    master_weights: bool = False

    def chop(self, x, key, axis=-1):
        drawn = {"key": key} if self.rounding == "stochastic" else {}
        return qjax.chop(x, self.fmt, self.rounding, axis=axis, saturate=True, **drawn)

    def chop_tree(self, tree, keys):
        leaves, structure = jax.tree.flatten(tree)
        return structure.unflatten(self.chop(x, key, axis=0) for x, key in zip(leaves, keys, strict=True))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def chop_cotangent(precision, x, key):
    return x


chop_cotangent.defvjp(
    lambda precision, x, key: (x, key),
    lambda precision, key, cotangent: (precision.chop(cotangent, key), None),
)


class Dense(nn.Module):
    features: int
    precision: Precision

    @nn.compact
    def __call__(self, x, keys):
        inputs = x.shape[-1]
        kernel = self.param("kernel", nn.initializers.normal(1.0), (inputs, self.features))
        x = self.precision.chop(x, keys[0])
        return chop_cotangent(self.precision, x @ kernel / math.sqrt(inputs), keys[1])


class Classifier(nn.Module):
    precision: Precision

    @nn.compact
    def __call__(self, x, keys):
        x = Dense(32, self.precision)(x, keys[:2])
        return Dense(10, self.precision)(math.sqrt(2) * nn.relu(x), keys[2:])


# %% [markdown]
# ## Training
#
# A stochastic `chop` needs a key of its own for every seed, step, tensor and role, else draws repeat and errors
# correlate. They are split once into a table of `SEEDS x (STEPS + 1) x 8`: two for each of the two layers in
# `Classifier`, two for the weight gradients, two for the weights.
#
# Formats are static, so each configuration compiles once; the loop is a `scan` inside.

# %%
images, digits = load_digits(return_X_y=True)
images = ((images - images.mean()) / images.std()).astype(np.float32)
shuffled = np.random.default_rng(0).permutation(len(images))
test_x, test_y = images[shuffled[:500]], digits[shuffled[:500]].astype(np.int32)
train_x, train_y = images[shuffled[500:]], digits[shuffled[500:]].astype(np.int32)

every_index = np.tile(np.arange(len(train_y)), (SEEDS, STEPS, 1))
batches = np.random.default_rng(1).permuted(every_index, axis=-1)[..., :BATCH]
init_keys = jax.random.split(jax.random.key(0), SEEDS)
keys = jax.random.split(jax.random.key(1), (SEEDS, STEPS + 1, 8))

fp32 = Precision(qjax.FP32, "nearest_even")
NO_KEYS = (None,) * 4
params = jax.jit(jax.vmap(lambda key: Classifier(fp32).init(key, train_x[:1], NO_KEYS)))(init_keys)
optimizer = optax.adam(optax.linear_schedule(0.02, 0.0, STEPS))


# %%
def cross_entropy(logits, labels):
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels)


@functools.partial(jax.jit, static_argnums=0)
@functools.partial(jax.vmap, in_axes=(None, 0, 0, 0))
def train(precision, params, batches, keys):
    model = Classifier(precision)

    def loss(params, batch, keys):
        logits = model.apply(params, jnp.asarray(train_x)[batch], keys)
        return cross_entropy(logits, jnp.asarray(train_y)[batch]).sum()

    def step(carry, of_step):
        (params, state), (batch, keys) = carry, of_step
        rounded = precision.chop_tree(params, keys[6:])
        gradients = precision.chop_tree(jax.grad(loss)(rounded, batch, keys[:4]), keys[4:6])
        with jax.numpy_dtype_promotion("standard"):  # Adam of optax takes a float to an integer power.
            updates, state = optimizer.update(gradients, state)
        return (optax.apply_updates(params if precision.master_weights else rounded, updates), state), None

    (params, _), _ = jax.lax.scan(step, (params, optimizer.init(params)), (batches, keys[:-1]))
    return precision.chop_tree(params, keys[-1, 6:])


@functools.partial(jax.jit, static_argnums=0)
@functools.partial(jax.vmap, in_axes=(None, 0))
def test(fmt, params):
    logits = Classifier(Precision(fmt, "nearest_even")).apply(params, test_x, NO_KEYS)
    return cross_entropy(logits, test_y), logits.argmax(-1) == test_y


# %% [markdown]
# The test runs in the same format, with the trained weights as they are and activations rounded to nearest, whatever
# the rounding of the training was. Its losses and hits come for each seed and image.

# %%
WITH_MASTER = ("e4m3",) if FAST else ("e4m3", "e2m1", "dfp8", "mxfp4")
UNCLIPPED = {"q5.11": qjax.format("q5.11"), "mxfp8_rceil": Scaled(qjax.E4M3, E8M0, 32, rule="rceil")}

runs = {("fp32", "nearest"): fp32}
for name, fmt in (formats := {name: fmt for family in FAMILIES.values() for name, fmt in family.items()}).items():
    runs[name, "nearest"] = Precision(fmt, "nearest_even")
    runs[name, "stochastic"] = Precision(fmt, "stochastic")
    if name in WITH_MASTER:
        runs[name, "nearest, master"] = Precision(fmt, "nearest_even", master_weights=True)
if not FAST:
    runs |= {(name, "stochastic"): Precision(fmt, "stochastic") for name, fmt in UNCLIPPED.items()}


def train_and_test(precision):
    return jax.device_get(test(precision.fmt, train(precision, params, batches, keys)))


with ThreadPoolExecutor(2) as pool:  # Most of the time is compilation, of two configurations at once.
    tested = tqdm(pool.map(train_and_test, runs.values()), total=len(runs), desc="training", unit="run")
    results = dict(zip(runs, tested, strict=True))
losses = {run: image_losses.mean(-1) for run, (image_losses, _) in results.items()}
accuracies = {run: 100 * hits.mean(-1) for run, (_, hits) in results.items()}

# %% [markdown]
# ## Result
#
# Intervals are 95 % Student intervals of the mean over the seeds.


# %%
def interval(samples):
    half = stats.t.ppf(0.975, len(samples) - 1) * np.std(samples, ddof=1) / math.sqrt(len(samples))
    return np.mean(samples), half


FAMILY_OF = {name: family for family, members in FAMILIES.items() for name in members}
FAMILY_OF |= {"fp32": "float", "q5.11": "fixed point", "mxfp8_rceil": "MX"}
print(f"{'family':12} {'format':12} {'bits':>5}  {'rounding':16} {'test loss':>15}  {'test accuracy, %':>16}")
for (name, rounding), precision in runs.items():
    loss, loss_half = interval(losses[name, rounding])
    accuracy, accuracy_half = interval(accuracies[name, rounding])
    print(
        f"{FAMILY_OF[name]:12} {name:12} {precision.fmt.bits:5g}  {rounding:16} "
        f"{loss:7.3f} ± {loss_half:5.3f}  {accuracy:9.2f} ± {accuracy_half:4.2f}"
    )

# %%
COLORS = {"float": "#0072b2", "fixed point": "#d55e00", "DFP": "#009e73", "MX": "#cc79a7"}
MARKERS = {"float": "o", "fixed point": "s", "DFP": "^", "MX": "D"}
DODGE = {"float": 0.985, "fixed point": 1.0, "DFP": 1.015, "MX": 1.0}
TABLE_ONLY = ("bf16", "e5m2")  # A line has one format for each width.

figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
for family, members in FAMILIES.items():
    for rounding, line, face in (("nearest", "-", COLORS[family]), ("stochastic", "--", "white")):
        names = [name for name in members if name not in TABLE_ONLY]
        bits = [DODGE[family] * formats[name].bits for name in names]
        means, halves = np.transpose([interval(losses[name, rounding]) for name in names])
        style = {"color": COLORS[family], "marker": MARKERS[family], "ms": 4.5, "capsize": 2, "elinewidth": 0.9}
        label = family if rounding == "nearest" else None
        axes.errorbar(bits, means, halves, ls=line, lw=1.4, mfc=face, label=label, **style)

baseline = losses["fp32", "nearest"].mean()
axes.axhline(baseline, color="0.35", lw=1, zorder=0)
axes.annotate("fp32", (3, baseline), (0, -3), textcoords="offset points", color="0.35", va="top")
axes.axhline(math.log(10), color="0.35", lw=1, ls=":", zorder=0)
axes.annotate("guessing, ln 10", (16.8, math.log(10)), (0, 3), textcoords="offset points", color="0.35", ha="right")
axes.plot([], [], "k-", lw=1.4, label="to nearest")
axes.plot([], [], "k--", lw=1.4, label="stochastic")
axes.legend(loc="upper right", bbox_to_anchor=(1, 0.87), frameon=False)
axes.set(xscale="log", yscale="log", xlim=(2.75, 17.5), ylim=(0.1, 3.8))
axes.set(xlabel="bits of an element", ylabel="test loss (cross-entropy, nats)")
axes.set_xticks(ticks := (3, 4, 6, 8, 12, 16), map(str, ticks))
axes.set_yticks(ticks := (0.1, 0.2, 0.5, 1, 2), map(str, ticks))
axes.minorticks_off()
axes.spines[["top", "right"]].set_visible(False)
path = FIGURES / "01_few_bits_classifier.png"
path.parent.mkdir(exist_ok=True)
figure.savefig(path, dpi=150)

# %% [markdown]
# Mean test loss over eight seeds with 95 % intervals. Solid: to nearest; dashed: stochastic rounding. The table also
# has bf16 and e5m2, two formats with a wider range, and runs with master weights.
#
# ## Reading it
#
# **To nearest, 8 bits do not train.** Adam moves a weight by about its learning rate, here 0.02 falling to 0, and an
# update below half a spacing is rounded away. At magnitude one half a spacing is 0.0625 in e4m3 and 0.0156 in q3.5:
# e4m3 can only move weights below 1/2, q3.5 stops moving after about a fifth of the training, and with 6 bits or fewer
# the network stays much as it was initialised. In dfp8 the spacing follows from the largest weight, so whether anything
# moves depends on the seed, hence the wide interval. bf16, with 8 bits of precision, already loses something.
#
# **Stochastic rounding moves the weights by the right amount on average**, and training goes through down to 3 bits. At
# 8 bits the loss of e4m3 and of dfp8 is that of fp32 as far as 500 images can tell, and 6 bits of e3m2, e2m3 or DFP
# cost about 0.01. At 4 bits formats with a shared exponent (DFP, MX: 0.19) come before the one with an exponent in each
# element alone (e2m1: 0.23) and the one with neither (q3.1: 0.28).
#
# **It is the updates that are lost.** With float32 master weights, rounding to nearest matches fp32 in e4m3 and dfp8,
# and mxfp4 does better than stochastic rounding without them. Range is another matter: in e2m1 without a scale all
# gradients below 1/4 become 0, and master weights do not help.
#
# **Clipping is a bias that no rounding mode repairs.** The floor under the fixed-point line is the clipping at 4, for
# q5.11 reaches fp32. Likewise mxfp8_e4m3 is no better than mxfp6_e2m3 here, because the OCP rule for the scale clips a
# block whose maximum has a significand above 1.75 (e2m3: 1.875); the rule "rceil", which never clips, mends it.
#
# A network this small on data this easy is no guide to how many bits a large model needs. The mechanism is the same.

# %% [markdown]
# ## Conclusion, asserted
#
# 1. In every format of at most 8 bits (without the share of the scale) the 95 % intervals of the test loss do not
#    overlap, and stochastic rounding has the lower one.
# 2. Stochastic e4m3 costs, by the upper end of the 95 % interval of the paired difference over the seeds, less than the
#    standard error that the 500 test images leave in the loss of fp32.
# 3. So does rounding e4m3 to nearest with master weights.

# %%
reference = results["fp32", "nearest"][0]
resolution = reference.mean(0).std(ddof=1) / math.sqrt(len(test_y))
print(f"standard error of the test loss of fp32 over the images: {resolution:.4f}")
for run in (("e4m3", "stochastic"), ("e4m3", "nearest, master")):
    cost, half = interval(losses[run] - losses["fp32", "nearest"])
    print(f"{', '.join(run)}: costs {cost:.4f} ± {half:.4f}")
    assert cost + half < resolution, (run, cost, half, resolution)

few_bits = [name for name, fmt in formats.items() if fmt.bits < 9]
for name in few_bits:
    (nearest, nearest_half), (stochastic, stochastic_half) = (
        interval(losses[name, rounding]) for rounding in ("nearest", "stochastic")
    )
    assert stochastic + stochastic_half < nearest - nearest_half, name
print(f"stochastic rounding is better, without overlap, in all {len(few_bits)} formats of at most 8 bits")
print(path)
