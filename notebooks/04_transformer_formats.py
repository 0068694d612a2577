# %% [markdown]
# # How few bits train a language model?
#
# **Question.** A transformer trains with the operands of its matrix products in 16, 8 or 4 bits, in the backward pass
# as in the forward pass. What does each format cost, and what do stochastic rounding and rotations buy at 4 bits?
#
# **Method.** A small causal transformer learns to predict the characters of real text, Python's own standard library.
# Only the recipe changes: every one runs the same seeds, that is the same initial weights and the same batches, and its
# held-out loss is compared with that of float32 seed by seed.
#
# **Sources.** Tseng, Yu, Park (2025), *Training LLMs with MXFP4*, <https://arxiv.org/abs/2502.20586>: in the backward
# pass MXFP4 to nearest degrades the training, stochastic rounding helps, and a random Hadamard transform before it
# helps more. The others: Kalamkar et al. (2019), <https://arxiv.org/abs/1905.12322> (BF16 is float32); Micikevicius et
# al. (2022), <https://arxiv.org/abs/2209.05433> (FP8 is BF16); Rouhani et al. (2023),
# <https://arxiv.org/abs/2310.10537> (MXFP8 is float32, MXFP4 is not); NVIDIA (2025),
# <https://arxiv.org/abs/2509.25149> (NVFP4 comes close to FP8, and before MXFP4); Castro et al. (2025), *Quartet*,
# <https://arxiv.org/abs/2505.14669> (MXFP4 with a better grid and rotations in all products).

# %%
import dataclasses
import math
import os
import platform
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import matplotlib
import numpy as np
from char_lm import ALPHABET, CONTEXT, LanguageModel, corpus, losses, train, windows
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
SEEDS = 2 if FAST else 4
STEPS = 300 if FAST else 600
BATCH = 8
RATE = 8e-3

# %% [markdown]
# ## Text and model
#
# The text is every module directly in the standard library's folder; each tenth file is held out whole. Its characters
# are those of ASCII, 96 with the newline. (It differs from one version of Python to the next, and numbers with it.)
#
# The model (`char_lm.py` beside this notebook) has two pre-norm blocks of width 64 with four heads, and reads up to 64
# characters. All axes of its linear layers are multiples of 32, the block of MX, and so is the number of tokens of a
# batch, which the weight gradients are contracted over. AdamW, a warmup and a cosine decay.

# %%
training_text, held_out_text = corpus()
print(f"Python {platform.python_version()}: {len(training_text):,} characters to train on, {len(held_out_text):,} held out")
print("".join(ALPHABET[i] for i in training_text[50_000:50_240]))


def last_start(text):
    return len(text) - CONTEXT - 1


test_windows = windows(held_out_text, np.linspace(0, last_start(held_out_text), 512, dtype=int))
batches = [
    windows(training_text, np.random.default_rng(seed).integers(0, last_start(training_text), (STEPS, BATCH)))
    for seed in range(SEEDS)
]
model = LanguageModel(width=64)
init = jax.jit(model.init)
initial = [init(jax.random.key(seed), test_windows[:1, :-1])["params"] for seed in range(SEEDS)]

# %% [markdown]
# ## What is rounded
#
# The four linear layers of each block, in all three products: the forward one, and those of the gradients with respect
# to the input and to the weights. Each operand is rounded afresh for each product, in blocks along its contraction. As
# in the papers, the first and the last layer, the embedding and the output head, stay in high precision, and so does
# the product of queries and keys and that with the values. Weights are kept in float32 and rounded at each use; norms,
# softmax, the residual stream and the optimiser are float32 too.
#
# The 4-bit recipes differ in the backward pass and in their grids:
#
# | | scale | backward pass |
# |---|---|---|
# | MXFP4 nearest | a power of two for 32 elements | to nearest |
# | MXFP4 stochastic | the same | gradients stochastically |
# | MXFP4 + Hadamard | the same | both operands in a random rotation, stochastically and without saturation |
# | Quartet | that of least squared error, after a rotation | both operands in a random rotation, to nearest |
# | NVFP4 | E4M3 for 16 elements, and one of the tensor | gradients stochastically; rotated for the weight gradient |

# %%
RECIPES = {
    "float32": None,
    "BF16": recipes.BF16_OPERANDS,
    "FP8": recipes.FP8_HYBRID,
    "MXFP8": recipes.MXFP8,
    "NVFP4": recipes.NVFP4_TRAINING,
    "Quartet": recipes.quartet(),
    "MXFP4 + Hadamard": dataclasses.replace(recipes.mxfp4_hadamard(32), forward=recipes.MXFP4_NEAREST.forward),
    "MXFP4 stochastic": recipes.MXFP4_STOCHASTIC,
    "MXFP4 nearest": recipes.MXFP4_NEAREST,
}
if FAST:
    RECIPES = {name: RECIPES[name] for name in ("float32", "FP8", "MXFP4 nearest")}


def in_recipe(recipe):
    if recipe is None:
        return model
    return qjax.linen.quantize(model, {r"block_\d+/(qkv|out|up|down)": recipe, ".*": None})


models = {name: in_recipe(recipe) for name, recipe in RECIPES.items()}
print(qjax.coverage(models["MXFP4 nearest"].apply, {"params": initial[0]}, batches[0][0, :, :-1]))

# %% [markdown]
# ## Training
#
# Each recipe compiles once, and runs the seeds one after the other. The test runs in the recipe too.


# %%
@jax.jit(static_argnums=0)
def held_out(model, params, key):
    return losses(model, params, test_windows, rngs={"quantize": key}).mean()


def train_and_test(model):
    curves, tested = [], []
    for seed in range(SEEDS):
        key, test_key = jax.random.split(jax.random.key(100 + seed))
        params, curve = train(model, RATE, initial[seed], batches[seed], key)
        curves.append(np.asarray(curve))
        tested.append(float(held_out(model, params, test_key)))
    return np.array(curves), np.array(tested)


with ThreadPoolExecutor(2) as pool:  # One compiles while the other runs.
    done = tqdm(pool.map(train_and_test, models.values()), total=len(models), desc="training", unit="recipe")
    results = dict(zip(models, done, strict=True))
curves = {name: curve for name, (curve, _) in results.items()}
tested = {name: loss for name, (_, loss) in results.items()}

# %% [markdown]
# ## Result
#
# Gaps are differences to float32 with the same seed. Intervals are 95 % Student intervals of the mean over the seeds.


# %%
def interval(samples):
    half = stats.t.ppf(0.975, len(samples) - 1) * np.std(samples, ddof=1) / math.sqrt(len(samples))
    return np.mean(samples), half


gaps = {name: loss - tested["float32"] for name, loss in tested.items()}
print(f"{'recipe':18} {'training loss':>13} {'held-out loss':>14} {'gap to float32':>19}")
for name in models:
    gap, half = interval(gaps[name])
    recent = curves[name][:, -STEPS // 10 :].mean()
    print(f"{name:18} {recent:13.4f} {tested[name].mean():14.4f} {gap:+10.4f} ± {half:.4f}")

# %%
BLUE, GREEN, ORANGE = "#0072b2", "#009e73", "#d55e00"
COLORS = {name: ORANGE for name in models} | {"float32": "0.35", "BF16": BLUE, "FP8": BLUE, "MXFP8": BLUE}
COLORS |= {"NVFP4": GREEN, "Quartet": "#cc79a7"}
LINES = {"FP8": "--", "MXFP8": ":", "MXFP4 stochastic": "--", "MXFP4 + Hadamard": ":"}


def smooth(curve, width=STEPS // 8):
    return np.convolve(curve.mean(0), np.ones(width) / width, "valid")


figure, (left, middle, right) = plt.subplots(1, 3, figsize=(13, 4.3), layout="constrained", width_ratios=(3, 4, 4))
for name in models:
    style = {"color": COLORS[name], "ls": LINES.get(name, "-"), "lw": 1.5, "label": name}
    curve = smooth(curves[name])
    step = np.arange(STEPS - len(curve), STEPS) + 1
    left.plot(step, curve, **style)
    middle.plot(step, curve - smooth(curves["float32"]), **style)
left.set(xlabel="step", ylabel="training loss (nats a character)", title="(a) Every recipe learns ...")
middle.set(xlabel="step", ylabel="training loss minus that of float32", title="(b) ... 4 bits a little less")
middle.legend(frameon=False, fontsize=8.5, ncols=2, loc="upper left")
middle.set_ylim(top=1.5 * middle.get_ylim()[1])

for row, name in enumerate(reversed([name for name in models if name != "float32"])):
    gap, half = interval(gaps[name])
    right.errorbar(gap, row, xerr=half, fmt="o", ms=6, capsize=3, color=COLORS[name])
    right.plot(gaps[name], np.full(SEEDS, row - 0.22), "|", ms=6, color=COLORS[name], alpha=0.6)
right.axvline(0, color="0.35", lw=1)
names = [name for name in models if name != "float32"]
right.set_yticks(range(len(names)), reversed(names))
right.set(xlabel="held-out loss minus that of float32", title="(c) The price in held-out loss")
for axes in (left, middle, right):
    axes.spines[["top", "right"]].set_visible(False)
path = FIGURES / "04_transformer_formats.png"
path.parent.mkdir(exist_ok=True)
figure.savefig(path, dpi=150)
