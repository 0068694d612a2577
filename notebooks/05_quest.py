# %% [markdown]
# # QuEST against a plain straight-through estimator
#
# **Question.** Weights and activations are rounded to 4, 3, 2 or 1 bits in the forward pass, and the gradient passes
# through the rounding as if it were not there. How much of the loss is the number format's, and how much is the way of
# using it?
#
# **Method.** A small causal transformer learns to predict the characters of Python's own standard library. All recipes
# have the same grids, of $2^b$ evenly spaced levels around 0 with one scale a row, and run the same seeds, that is the
# same initial weights and batches. They differ in what QuEST adds to a plain straight-through estimator:
#
# 1. *plain STE* (straight-through estimator): the scale comes from the largest magnitude of the row, and gradients pass
#    everywhere;
# 2. *plain STE, best scale*: the scale is that of least squared error for normal numbers, $\alpha_b$ times their root
#    mean square; gradients pass everywhere;
# 3. *QuEST*: before that, a Hadamard transform makes the numbers more normal; and gradients pass only where rounding
#    moved an element by at most half a step, where they can be trusted.
#
# **Source.** Panferov et al. (2025), *QuEST: stable training of LLMs with 1-bit weights and activations*,
# <https://arxiv.org/abs/2502.05003>. With Llamas of 30 to 800 million parameters QuEST is better at each width, and the
# gap widens as bits fall.

# %%
import functools
import math
import os
import platform
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import matplotlib
import numpy as np
from char_lm import CONTEXT, LanguageModel, corpus, losses, train, windows
from scipy import stats
from tqdm import tqdm

import qjax
import qjax.linen
from qjax import FP32, Gemm, Quantizer, Recipe, Scaled, midrise, recipes

if "get_ipython" not in globals():
    matplotlib.use("Agg")
import matplotlib.pyplot as plt

FAST = os.environ.get("QJAX_FAST") == "1"
HERE = Path(__file__).parent if "__file__" in globals() else Path()
FIGURES = Path(tempfile.mkdtemp()) if FAST else HERE / "figures"
SEEDS = 2 if FAST else 3
STEPS = 50 if FAST else 400
TESTS = 128 if FAST else 512
BATCH = 8
RATE = 5e-3
WIDTHS = (4, 1) if FAST else (4, 3, 2, 1)

# %% [markdown]
# ## Text and model
#
# Every module directly in the standard library's folder; each tenth file is held out whole. The model (`char_lm.py`
# beside this notebook) has two pre-norm blocks of width 128 with four heads, and reads up to 64 characters. AdamW, a
# warmup and a cosine decay, the same for all: the paper tunes neither for the width.

# %%
training_text, held_out_text = corpus()
sizes = f"{len(training_text):,} characters to train on, {len(held_out_text):,} held out"
print(f"Python {platform.python_version()}: {sizes}")


def last_start(text):
    return len(text) - CONTEXT - 1


test_windows = windows(held_out_text, np.linspace(0, last_start(held_out_text), TESTS, dtype=int))
batches = [
    windows(training_text, np.random.default_rng(seed).integers(0, last_start(training_text), (STEPS, BATCH)))
    for seed in range(SEEDS)
]
model = LanguageModel(width=128)
init = jax.jit(model.init)
initial = [init(jax.random.key(seed), test_windows[:1, :-1])["params"] for seed in range(SEEDS)]

# %% [markdown]
# ## Recipes
#
# They apply to the four linear layers of each block. Embedding, output head, attention scores, norms and the optimiser
# stay in float32, and weights are kept in float32 and rounded at each use. A row is a token's activations, or the
# weights of one output. The backward products are not rounded, but have the rounded operands of the forward product, as
# in the paper.


# %%
def plain(bits, rule):
    q = Quantizer(Scaled(midrise(bits), FP32, "axis", rule=rule))
    return Recipe(Gemm(q, q), save_lhs="quantized", save_rhs="quantized")


def best_scale(bits):
    return recipes.quest(bits).forward.lhs.fmt.rule


FAMILIES = {
    "plain STE": lambda bits: plain(bits, "absmax"),
    "plain STE, best scale": lambda bits: plain(bits, best_scale(bits)),
    "QuEST": recipes.quest,
}
if FAST:
    del FAMILIES["plain STE, best scale"]
LINEAR = r"block_\d+/(qkv|out|up|down)"

models = {("float32", 32): model}
for family, recipe in FAMILIES.items():
    for bits in WIDTHS:
        models[family, bits] = qjax.linen.quantize(model, {LINEAR: recipe(bits), ".*": None})
print(qjax.coverage(models["QuEST", 4].apply, {"params": initial[0]}, batches[0][0, :, :-1]))

# %%
test = jax.jit(lambda model, params: losses(model, params, test_windows).mean(), static_argnums=0)


def train_and_test(model):
    trained, tested = [], []
    for seed in range(SEEDS):
        params, _ = train(model, RATE, initial[seed], batches[seed], jax.random.key(100 + seed))
        trained.append(params)
        tested.append(float(test(model, params)))
    return trained, np.array(tested)


with ThreadPoolExecutor(2) as pool:  # One compiles while the other runs.
    done = tqdm(pool.map(train_and_test, models.values()), total=len(models), desc="training", unit="recipe")
    results = dict(zip(models, done, strict=True))
reference = results["float32", 32][1]
gaps = {run: tested - reference for run, (_, tested) in results.items()}

# %% [markdown]
# ## Which gradients are not trusted
#
# QuEST's mask stops the gradient of an element that rounding moved by more than half a step $T$, which to nearest are
# those beyond $\alpha_b + T$ root mean squares. Of normal numbers these are $2 \Phi(-(\alpha_b + T))$, with
# $T = \alpha_b / (2^b - 1)$. (At one bit the authors' code stops it beyond 1.3 scales instead: $2 \Phi(-1.3\,
# \alpha_1)$.) If the Hadamard transform does its work, weights and activations come close to that.
#
# The mask is what the gradient of the quantizer is. The activations are those of the trained network.


# %%
def threshold(bits):
    clip = best_scale(bits).clip
    return 1.3 * clip if bits == 1 else clip + clip / (2**bits - 1)


@functools.partial(jax.jit, static_argnums=(0, 2))
def untrusted_share(gemm, x, axis):
    """Returns the share of the elements of an operand whose gradient the mask stops."""
    rotated = gemm.rotate(x, axis=axis)
    mask = jax.grad(lambda x: gemm.lhs(x, axis=axis).sum())(rotated)
    return (mask == 0).mean()


expected = {bits: 2 * stats.norm.sf(threshold(bits)) for bits in WIDTHS}
untrusted = {}
for bits in WIDTHS:
    gemm, params = recipes.quest(bits).forward, results["QuEST", bits][0][0]
    apply = jax.jit(functools.partial(models["QuEST", bits].apply, mutable=["inputs"]))
    _, sown = apply({"params": params}, test_windows[:: TESTS // 64, :-1])
    for block in ("block_0", "block_1"):
        for layer in ("qkv", "out", "up", "down"):
            inputs = sown["inputs"][block][f"{layer}_inputs"][0]
            kernel = params[block][layer]["kernel"]
            shares = untrusted_share(gemm, kernel, 0), untrusted_share(gemm, inputs, -1)
            untrusted[bits, block, layer] = tuple(map(float, shares))

# %% [markdown]
# ## Result
#
# Gaps are differences to float32 with the same seed. Intervals are 95 % Student intervals of the mean over the seeds.


# %%
def interval(samples):
    half = stats.t.ppf(0.975, len(samples) - 1) * np.std(samples, ddof=1) / math.sqrt(len(samples))
    return np.mean(samples), half


print(f"held-out loss of float32: {reference.mean():.4f}")
print(f"{'bits':>4}" + "".join(f"{family:>24}" for family in FAMILIES) + "   (gap to float32)")
for bits in WIDTHS:
    cells = ("{:+.4f} ± {:.4f}".format(*interval(gaps[family, bits])) for family in FAMILIES)
    print(f"{bits:4}" + "".join(f"{cell:>24}" for cell in cells))

print("\nuntrusted share in QuEST, %, weights / activations")
print(f"{'layer':14}" + "".join(f"{f'{bits} bits':>15}" for bits in WIDTHS))
for block, layer in dict.fromkeys((block, layer) for _, block, layer in untrusted):
    shares = ("{:.2f} / {:.2f}".format(*(100 * x for x in untrusted[bits, block, layer])) for bits in WIDTHS)
    print(f"{block + '/' + layer:14}" + "".join(f"{share:>15}" for share in shares))
print(f"{'normal numbers':14}" + "".join(f"{100 * expected[bits]:15.2f}" for bits in WIDTHS))

# %%
STYLES = {
    "plain STE": ("#d55e00", "s", 0.05),
    "plain STE, best scale": ("#cc79a7", "^", 0),
    "QuEST": ("#0072b2", "o", -0.05),
}
GREY = "0.35"

figure, (left, right) = plt.subplots(1, 2, figsize=(10.5, 4.4), layout="constrained")
for family in FAMILIES:
    color, marker, shift = STYLES[family]
    means, halves = np.transpose([interval(gaps[family, bits]) for bits in WIDTHS])
    style = {"color": color, "marker": marker, "ms": 6, "lw": 1.6, "capsize": 3, "elinewidth": 1}
    left.errorbar(np.add(WIDTHS, shift), means, halves, **style)
    text, at = family.replace(", ", ",\n"), (WIDTHS[-1] + shift, means[-1])
    left.annotate(text, at, (9, 0), textcoords="offset points", color=color, va="center")
left.axhline(0, color=GREY, lw=1, zorder=0)
left.annotate("float32", (0, 0), (0, 3), textcoords="offset points", color=GREY, ha="right")
left.set(xlabel="bits of weights and activations", ylabel="held-out loss minus that of float32 (nats)")
left.set(title="(a) The price of few bits", xlim=(4.4, 0))

for which, (operand, face) in enumerate((("weights", "#0072b2"), ("activations", "white"))):
    for bits in WIDTHS:
        shares = [100 * share[which] for (b, _, _), share in untrusted.items() if b == bits]
        places = np.full(len(shares), bits) + (0.09 if which == 0 else -0.09)
        label = f"{operand}, each layer" if bits == WIDTHS[0] else None
        right.plot(places, shares, "o", mec="#0072b2", mfc=face, ms=5, ls="none", label=label)
for bits in WIDTHS:
    label = "theory, normal numbers" if bits == WIDTHS[0] else None
    right.plot([bits + 0.3, bits - 0.3], [100 * expected[bits]] * 2, color=GREY, lw=1.6, zorder=0, label=label)
right.set(xlabel="bits of weights and activations", ylabel="elements whose gradient QuEST stops (%)", yscale="log")
right.set(title="(b) How many lie outside the grid", xlim=(4.5, 0.5))
right.set_yticks(ticks := (0.5, 1, 2, 5, 10, 20, 50), map(str, ticks))
right.legend(frameon=False, loc="upper left")
for axes in (left, right):
    axes.set_xticks(WIDTHS)
    axes.minorticks_off()
    axes.spines[["top", "right"]].set_visible(False)
path = FIGURES / "05_quest.png"
path.parent.mkdir(exist_ok=True)
figure.savefig(path, dpi=150)

# %% [markdown]
# (a) Mean over the seeds with 95 % intervals. (b) Each dot is a layer of the trained network.
#
# ## Reading it
#
# **The published order comes out.** QuEST is better than the plain estimator at each width, and the gap widens with
# each bit that is taken away: in the paper, for 30 million parameters, from 0.52 at 4 bits to 1.31 at 1 bit.
#
# **The scale explains a part of it.** A grid that reaches to the largest magnitude wastes its few levels on outliers,
# and with one bit all numbers become as large as the largest. Yet with the best scale, too, the plain estimator costs
# more than QuEST, most of all at 1 bit; what is left is due to the rotation and the mask.
#
# **The mask stops what theory says**, with 2 to 4 bits, as far as weights and activations are normal after the
# rotation, and activations even with 1 bit. The weights with 1 bit are the exception: more of them lie outside than of
# normal numbers. The likely reason is that a weight that has got there receives no gradient any more, and only weight
# decay and the scale of its row can bring it back; with one bit the mask is so narrow that many end there.
#
# **What this does not show.** The network has 0.4 million parameters and sees 0.2 million characters; 400 steps are
# few. The differences to float32 are smaller than the published ones, and the intervals of QuEST's own reach down to
# about zero at each width: three seeds show that it is better than the others, hardly what it costs.

# %% [markdown]
# ## Conclusion, asserted
#
# 1. QuEST's mean held-out loss is below that of either plain estimator at each width; at 3 bits and below it is in each
#    seed.
# 2. Its lead on the plain estimator grows with each bit taken away.
# 3. The untrusted share of the activations, averaged over the layers, is that of normal numbers to a quarter of it;
#    that of the weights, with 2 bits or more, to a half of it.
#
# (In fast mode there are too few steps for the order at 4 bits.)

# %%
leads = {run: tested - gaps["QuEST", run[1]] for run, tested in gaps.items() if run[0] in FAMILIES}
for bits in WIDTHS:
    for family in FAMILIES:
        lead = leads[family, bits]
        if family != "QuEST":
            print(f"{bits} bits: QuEST before {family:23}{lead.mean():.4f}, in each seed {np.round(lead, 4)}")
            assert lead.mean() > 0 or (FAST and bits == 4)
            assert lead.min() > 0 or bits == 4
means = [leads["plain STE", bits].mean() for bits in WIDTHS]
assert all(np.diff(means) > 0)

for bits in WIDTHS:
    weights, activations = np.mean([share for run, share in untrusted.items() if run[0] == bits], axis=0)
    print(f"{bits} bits: untrusted {weights:.4f} weights, {activations:.4f} activations; theory {expected[bits]:.4f}")
    assert abs(activations / expected[bits] - 1) < 0.25
    assert abs(weights / expected[bits] - 1) < 0.5 or bits == 1
print(path)
