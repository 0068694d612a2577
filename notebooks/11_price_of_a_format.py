# %% [markdown]
# # Which law knows the price of a format?
#
# **Question.** The laws of precision come from runs of tens to hundreds of millions of parameters. With a sweep that
# anybody can repeat on a laptop: which of them predicts best the loss of runs that it has not seen? And is the best
# split of 4, 6 and 8 bits into exponent and mantissa the published one?
#
# **Method.** `sweep_lm.py` beside this notebook trains small transformers of four sizes for four lengths on Python's
# own source, the shorter ones with two seeds. The inputs and weights of the linear layers are in one of 18 formats, or
# in float32, in the forward pass. The rows are in `data/sweep_lm.csv`; `data/README.md` says where they are from.
#
# **Sources.** Hoffmann et al. (2022), <https://arxiv.org/abs/2203.15556>, which knows no formats; Kumar et al. (2024),
# *Scaling laws for precision*, <https://arxiv.org/abs/2411.04330>; Sun et al. (2025), *Scaling laws for floating-point
# quantization training*, <https://arxiv.org/abs/2501.02423>; Chen et al. (2025), *Scaling law for quantization-aware
# training*, <https://arxiv.org/abs/2505.14302>; Panferov et al. (2025), *QuEST*, <https://arxiv.org/abs/2502.05003>;
# Castro et al. (2025), *Quartet*, <https://arxiv.org/abs/2505.14669>.

# %%
import csv
import dataclasses
import math
import os
import tempfile
import warnings
from pathlib import Path

import jax
import matplotlib
import numpy as np
import sweep_lm
from scipy import stats
from tqdm import tqdm

from qjax import laws

if "get_ipython" not in globals():
    matplotlib.use("Agg")
import matplotlib.pyplot as plt

FAST = os.environ.get("QJAX_FAST") == "1"
HERE = Path(__file__).parent if "__file__" in globals() else Path()
FIGURES = Path(tempfile.mkdtemp()) if FAST else HERE / "figures"
SAMPLES = 200 if FAST else 4000
warnings.simplefilter("ignore", RuntimeWarning)  # What fits warn of is printed below.

# %% [markdown]
# ## The runs
#
# One point is run here, to show how a row comes about. (Its loss is that of the table to some digits only where Python
# has the version of the table's, since it is Python's source that the model learns.)

# %%
with (HERE / "data" / "sweep_lm.csv").open(newline="") as file:
    table = list(csv.DictReader(file))
first = sweep_lm.DESIGN[0]
live = {**first, **sweep_lm.run(first)}
assert list(live) == list(table[0])
print(f"{len(table)} rows, the first:")
for name, value in live.items():
    print(f"    {name:14}{table[0][name]:>12}   here {value}")

# %% [markdown]
# The laws want numbers. $N$ counts the weights of the rounded layers. Float32 stands for full precision, with
# infinitely many bits. `e2m1` and the like are floats without infinities and NaN, in blocks of 32 elements that share
# a float32 scale; `_g16` has blocks of 16, and `_channel` one for all terms of a product, whose number is averaged over
# the weights in the logarithm. With one exponent bit the values are those of integers.


# %%
def runs_of(rows):
    column = {name: np.array([row[name] for row in rows]) for name in rows[0]}
    full = column["fmt"] == "fp32"
    width = column["width"].astype(float)
    runs = {"N": column["parameters"].astype(float), "D": column["tokens"].astype(float)}
    runs |= {"loss": column["loss"].astype(float), "seed": column["seed"].astype(int)}
    for name, source in {"E": "exponent_bits", "M": "mantissa_bits", "P": "bits"}.items():
        runs[name] = np.where(full, np.inf, column[source].astype(float))
    for name in "wa":
        rounded = np.array([name in operands for operands in column["operands"]])
        runs[f"P_{name}"] = np.where(rounded, runs["P"], np.inf)
    block = {"16": 16.0, "32": 32.0, "": 32.0, "axis": 0.0}
    runs["B"] = np.array([block[b] for b in column["block"]])
    runs["B"] = np.where(runs["B"] == 0, width * 4 ** (1 / 3), runs["B"])  # A third of the weights has 4 widths.
    runs["G"] = np.where(full, 1.0, runs["B"])
    runs["format"] = runs["forward"] = np.array(
        [name.replace("finite", "").replace("_g32", "") for name in column["fmt"]]
    )
    runs["backward"] = np.full(len(rows), "fp32")
    runs["P_kv"] = np.full(len(rows), np.inf)
    runs["flops"] = 6 * runs["N"] * runs["D"]
    return runs


def where(runs, rows):
    return {name: values[rows] for name, values in runs.items()}


runs = runs_of([row for row in table if row["operands"] == "wa" and (row["seed"] == "0" or not FAST)])
formats = list(dict.fromkeys(runs["format"]))
cells = list(dict.fromkeys(zip(runs["seed"], runs["N"], runs["D"], strict=True)))
loss = dict(zip(zip(runs["seed"], runs["N"], runs["D"], runs["format"], strict=True), runs["loss"], strict=True))
gaps = {fmt: np.array([loss.get((*c, fmt), np.nan) - loss[(*c, "fp32")] for c in cells]) for fmt in formats[1:]}

# %% [markdown]
# ## What formats cost
#
# Gaps to float32 with the same seed, that is the same initial weights and batches. The noise of a loss is what is left
# between seeds.


# %%
def interval(samples):
    samples = samples[np.isfinite(samples)]
    half = stats.t.ppf(0.975, len(samples) - 1) * np.std(samples, ddof=1) / math.sqrt(len(samples))
    return samples.mean(), half


tokens = np.array([D for _, _, D in cells])
few, many = tokens == tokens.min(), tokens == tokens.max()
print(f"{'format':14}{'bits':>5}{'mean gap':>18}{'fewest tokens':>16}{'most tokens':>14}")
for fmt, gap in gaps.items():
    bits = runs["P"][runs["format"] == fmt][0]
    mean, half = interval(gap)
    print(f"{fmt:14}{bits:5.0f}{mean:+11.4f} ± {half:.4f}{np.nanmean(gap[few]):+16.4f}{np.nanmean(gap[many]):+14.4f}")

pairs = [(loss[0, N, D, fmt], loss[1, N, D, fmt]) for s, N, D, fmt in loss if s == 0 and (1, N, D, fmt) in loss]
if pairs:
    noise = np.sqrt(np.mean(np.diff(np.log(pairs), axis=1) ** 2) / 2)
    print(f"standard deviation of log loss over seeds, from {len(pairs)} pairs: {1e3 * noise:.1f} thousandths")

# %% [markdown]
# Weights or activations? Some runs round only one of them. In Kumar's law each takes its own share of the parameters
# away, so that what both cost is about the sum.

# %%
apart = runs_of([row for row in table if row["seed"] == "0" and row["operands"] != "wa"])
parts = {}
for fmt in dict.fromkeys(apart["format"]):
    one = where(apart, apart["format"] == fmt)
    full, both = (np.array([loss[0, N, D, f] for N, D in zip(one["N"], one["D"], strict=True)]) for f in ("fp32", fmt))
    rounds = {"weights": np.isinf(one["P_a"]), "activations": np.isinf(one["P_w"])}
    parts[fmt] = {which: (one["loss"] - full)[rows] for which, rows in rounds.items()}
    parts[fmt]["both"] = (both - full)[rounds["weights"]]
    print(fmt, *("{}: {:+.4f} ± {:.4f} ".format(which, *interval(gap)) for which, gap in parts[fmt].items()))

# %% [markdown]
# ## Fits of all laws
#
# Least squares on the logarithms. Kumar's law gets one pair of constants for weights and activations, which are rounded
# alike here, and its exponents are untied: a law is a value, and a variant of it another.

# %%
tied = (("gamma_a", "gamma_w"), ("n_a", "n_w"))
KUMAR = dataclasses.replace(laws.PRECISION, tied=tied)
LAWS = {
    "power of compute": (laws.SATURATING_POWER, {}),
    "Chinchilla": (laws.CHINCHILLA, {}),
    "Kumar": (KUMAR, {"gamma_kv": 1.0, "n_kv": 1.0}),
    "Sun, floats": (laws.FLOAT_QUANTIZATION, {}),
    "QuEST": (laws.QUEST, {"eff[fp32]": 1.0}),
    "Quartet": (laws.QUARTET, {"eff_N[fp32]": 1.0, "eff_D[fp32]": 1.0}),
}
if FAST:
    del LAWS["power of compute"], LAWS["QuEST"]
NAMES = {law.name: name for name, (law, _) in LAWS.items()}
RIVALS = [law for law, _ in LAWS.values()]
FIXED = {name: value for _, fixed in LAWS.values() for name, value in fixed.items()}
COLUMNS = {"x": "flops"}
STARTS = {"A": [1.0, 1e2, 1e4], "B": [1e2, 1e4], "E": [0.5, 1.5], "alpha": [0.25, 0.5], "beta": [0.25, 0.5]}


def fit(law, runs, fixed, delta=math.inf):
    known = {p.name for p in law.parameters}
    starts = {name: values for name, values in STARTS.items() if name in known and name not in dict(law.tied)}
    columns = COLUMNS if law is laws.SATURATING_POWER else {}
    return laws.fit(law, runs, delta=delta, fixed=fixed, starts=starts, columns=columns)


fits = {name: fit(law, runs, fixed) for name, (law, fixed) in tqdm(LAWS.items(), desc="fits")}
for name, found in fits.items():
    rms = 1e3 * np.sqrt(np.mean(found.residuals**2))
    print(f"\n{name}: {len(found.free)} parameters, {rms:.1f} thousandths of root mean square log residual")
    shown = {n: v for n, v in found.parameters.items() if "[" not in n}
    print("   ", ", ".join(f"{n} {v:.3g}" for n, v in shown.items()))
    for text in found.warnings:
        print("    warning:", text)

# %% [markdown]
# ## Runs that a fit has not seen
#
# Each size is predicted from the other sizes, and each length of training from the other lengths. Two numbers tell the
# laws apart: the root mean square of the log residuals, and how much of the gaps to float32 is explained, $1 - \sum
# (g - \hat g)^2 / \sum g^2$ with measured gaps $g$ and predicted ones $\hat g$: 0 for a law that knows no formats.

# %%
index = {point: i for i, point in enumerate(zip(runs["seed"], runs["N"], runs["D"], runs["format"], strict=True))}
partner = np.array([index[s, N, D, "fp32"] for s, N, D, _ in index])


def gaps_explained(predicted, rows):
    gap, guess = (np.log(x) - np.log(x[partner]) for x in (runs["loss"], predicted))
    return 1 - np.sum((gap - guess)[rows] ** 2) / np.sum(gap[rows] ** 2)


def held_out(rivals, runs, by, folds):
    known = {p.name for law in rivals for p in law.parameters}
    fixed = {name: value for name, value in FIXED.items() if name.split("[")[0] in known}
    starts = {name: values for name, values in STARTS.items() if name in known}
    options = {"key": jax.random.key(0), "columns": COLUMNS, "delta": math.inf, "fixed": fixed, "starts": starts}
    return {NAMES[score.law]: score for score in laws.cross_validate(rivals, runs, by=by, folds=folds, **options)}


rounded = runs["format"] != "fp32"
scores = {by: held_out(RIVALS, runs, by, len(set(runs[by]))) for by in ("N", "D")[: 1 if FAST else 2]}
print(f"{'':18}{'parameters':>11}{'unseen size':>24}{'unseen length':>24}")
print(f"{'':29}" + len(scores) * f"{'rms, 1/1000':>14}{'gaps':>10}")
for name in LAWS:
    cells_of = ((1e3 * s.rms, gaps_explained(s.predicted, rounded)) for s in (of[name] for of in scores.values()))
    print(f"{name:18}{scores['N'][name].parameters:11}" + "".join(f"{a:14.1f}{b:10.2f}" for a, b in cells_of))

# %% [markdown]
# The law of Chen et al. is one of block sizes, for one element format. Here: E2M1 with a float32 scale for 16 elements,
# for 32 and for a channel, and float32. Its rivals have a constant for each of the three.

# %%
BLOCKS = [name for name in ("fp32", "e2m1_g16", "e2m1", "e2m1_channel") if name in formats]
four = where(runs, np.isin(runs["format"], BLOCKS))
QAT = dataclasses.replace(laws.QAT_W4A4, name="qat", tied=())
NAMES["qat"] = "Chen, blocks"
if not FAST:
    found = fit(QAT, four, {})
    print(", ".join(f"{n} {v:.3g} ({found.standard_errors[n]:.2g})" for n, v in found.parameters.items()))
    for text in found.warnings:
        print("warning:", text)
    rivals = [laws.CHINCHILLA, QAT, laws.QUEST, laws.QUARTET]
    for name, score in held_out(rivals, four, "N", len(set(four["N"]))).items():
        print(f"{name:18}{score.parameters:4} parameters, unseen size: {1e3 * score.rms:.1f} thousandths")

# %% [markdown]
# ## The best split
#
# Measured: within a run's seed, size and length, every split of 4, 6 and 8 bits (in blocks of 32) is compared with the
# best one on the mean. A split ties with the best if the 95 % interval of the mean difference has 0. Fitted: the
# optimum of the law of Sun et al., with those of resampled runs, and again without the formats of one exponent bit,
# which are integers. Published: that of its published constants.

# %%
floats = fits["Sun, floats"]
samples = laws.bootstrap(floats, SAMPLES, key=jax.random.key(0))
constants = {name: samples.samples[:, samples.names.index(name)] for name in ("delta", "nu")}
share = constants["delta"] / (constants["delta"] + constants["nu"])
no_integers = fit(laws.FLOAT_QUANTIZATION, where(runs, runs["E"] > 1), {})
bits_of = {fmt: int(runs["P"][runs["format"] == fmt][0]) for fmt in gaps}
exponent_of = {fmt: int(runs["E"][runs["format"] == fmt][0]) for fmt in gaps}
SPLITS = {bits: [f for f in gaps if "_" not in f and f[0] == "e" and bits_of[f] == bits] for bits in (3, 4, 6, 8)}


def split_name(model, bits):
    split = laws.optimal_split(model, bits)
    return f"e{split.exponent_bits}m{split.mantissa_bits}"


best, ties, published = {}, {}, {}
print(f"{'bits':>4}  {'measured best':16}{'and those that tie':24}{'fitted':>8}{'E, 95 % interval':>20}", end="")
print(f"{'no integers':>14}{'published':>12}")
for bits in (4, 6, 8):
    best[bits] = min(SPLITS[bits], key=lambda fmt: np.nanmean(gaps[fmt]))
    published[bits] = split_name(laws.FLOAT_QUANTIZATION.published, bits)
    behind = {fmt: interval(gaps[fmt] - gaps[best[bits]]) for fmt in SPLITS[bits] if fmt != best[bits]}
    ties[bits] = [fmt for fmt, (mean, half) in behind.items() if mean < half]
    low, high = np.quantile(share * bits - 0.5, (0.025, 0.975))
    row = f"{bits:4}  {best[bits]:16}{', '.join(ties[bits]) or 'none':24}{split_name(floats.model, bits):>8}"
    print(f"{row}{f'{low:.1f} to {high:.1f}':>20}{split_name(no_integers.model, bits):>14}{published[bits]:>12}")
    mean, half = behind.get(published[bits], (0.0, 0.0))
    print(f"{'':6}the published split costs {mean:.4f} ± {half:.4f} more than the measured best")
harm = laws.critical_data_size(floats.model, N=runs["N"].min(), E=1, M=1, B=32)
print(f"fitted: more than {harm:.1e} characters harm the smallest model in e1m1; the most here are {tokens.max():.1e}")

# %%
COLORS = {3: "#cc79a7", 4: "#d55e00", 6: "#009e73", 8: "#0072b2"}
GREY = "0.35"
figure, (left, middle, right) = plt.subplots(1, 3, figsize=(13.5, 4.8), layout="constrained", width_ratios=(4, 5, 5))
PLACES = {"Chinchilla": (-12, 8), "Kumar": (14, -4), "Sun, floats": (4, -26), "QuEST": (34, -8), "Quartet": (-2, 10)}
for name in LAWS:
    points = [(1e3 * of[name].rms, gaps_explained(of[name].predicted, rounded)) for of in scores.values()]
    left.plot(*zip(*points, strict=True), color="#0072b2", lw=1, alpha=0.5)
    for point, face in zip(points, ("#0072b2", "white"), strict=False):
        left.plot(*point, "o", ms=7, color="#0072b2", mfc=face)
    text = f"{name} ({scores['N'][name].parameters})"
    left.annotate(text, points[0], PLACES.get(name, (-64, -16)), textcoords="offset points", color="#0072b2")
left.plot([], [], "o", color="#0072b2", label="unseen size")
left.plot([], [], "o", color="#0072b2", mfc="white", label="unseen length")
left.axhline(0, color=GREY, lw=1, zorder=0)
if pairs:
    left.axvline(1e3 * noise, color=GREY, lw=1, ls="--", label="noise over seeds")
left.set(xscale="log", xlabel="error of the predicted loss (rms, thousandths)", xlim=(8, 150), ylim=(-0.2, 1.1))
left.set(ylabel="share of the gaps to float32 explained", title="(a) Which law holds out best (constants)")
left.set_xticks(ticks := (10, 20, 50, 100), map(str, ticks))
left.set_xticks([], minor=True)
left.legend(frameon=False, loc="center right", bbox_to_anchor=(1, 0.36))

for bits, splits in SPLITS.items():
    color, places = COLORS[bits], [exponent_of[fmt] for fmt in splits]
    shift = {3: 0.06, 4: 0.0, 6: -0.03, 8: 0.03}[bits]
    middle_of = np.mean([gaps[fmt] for fmt in splits], 0)
    means, halves = [interval(gaps[fmt])[0] for fmt in splits], [interval(gaps[fmt] - middle_of)[1] for fmt in splits]
    middle.errorbar(
        np.add(places, shift), means, halves, color=color, marker="o", ms=5, lw=1.5, capsize=3, elinewidth=1
    )
    end = (places[-1] + shift, means[-1])
    middle.annotate(f"{bits} bits", end, (8, 0), textcoords="offset points", color=color, va="center")
    if bits in published:
        star = splits.index(published[bits])
        middle.plot(places[star] + shift, means[star], "*", ms=17, mec=color, mfc="none", zorder=3)
middle.plot([], [], "*", ms=14, mec=GREY, mfc="none", ls="none", label="published best split")
middle.axhline(0, color=GREY, lw=1, zorder=0)
middle.set(
    xlabel="exponent bits", ylabel="held-out loss minus that of float32 (nats)", xlim=(0.7, 5.8), ylim=(-0.004, 0.25)
)
middle.set(title="(b) Exponent bits beyond two do not pay")
middle.set_yscale("symlog", linthresh=0.01, linscale=0.8)
middle.set_yticks(ticks := (0, 0.005, 0.01, 0.03, 0.1, 0.2), [f"{tick:g}" for tick in ticks])
middle.set_yticks([], minor=True)
middle.legend(frameon=False, loc="upper right")

sizes, lengths = np.unique(runs["N"]), np.unique(runs["D"])
fine = np.geomspace(lengths[0], lengths[-1], 40)
grid = {"N": sizes[:, None], "D": fine}


def gap_of(model, setting, full):
    return (model({**grid, **setting}) - model({**grid, **setting, **full})).mean(0)


for fmt in ("e1m1", "e3m0", "e2m1"):
    color = COLORS[bits_of[fmt]]
    measured = [np.nanmean(gaps[fmt][tokens == D]) for D in lengths]
    right.plot(lengths, measured, "o", color=color, ms=5)
    setting = {"E": exponent_of[fmt], "M": bits_of[fmt] - 1 - exponent_of[fmt], "B": 32}
    of_floats = gap_of(floats.model, setting, {"E": math.inf, "M": math.inf})
    of_quartet = gap_of(fits["Quartet"].model, {"forward": fmt, "backward": "fp32"}, {"forward": "fp32"})
    right.plot(fine, of_quartet, color=color, lw=1.5)
    right.plot(fine, of_floats, color=color, lw=1.5, ls="--")
    right.annotate(fmt, (fine[-1], of_quartet[-1]), (6, 0), textcoords="offset points", color=color, va="center")
right.plot([], [], "o", color=GREY, label="measured, mean of all sizes")
right.plot([], [], color=GREY, label="Quartet's law")
right.plot([], [], color=GREY, ls="--", label="law of Sun et al.")
right.set(xscale="log", yscale="log", xlabel="characters trained on", title="(c) More data makes few bits dearer")
right.set(
    ylabel="held-out loss minus that of float32 (nats)", ylim=(0.007, 0.3), xlim=(lengths[0] / 1.1, lengths[-1] * 1.5)
)
right.set_xticks(lengths, [f"{D / 1e3:.0f}k" for D in lengths])
right.set_xticks([], minor=True)
right.legend(frameon=False, loc="lower right", fontsize=8)
for axes in (left, middle, right):
    axes.spines[["top", "right"]].set_visible(False)
path = FIGURES / "11_price_of_a_format.png"
path.parent.mkdir(exist_ok=True)
figure.savefig(path, dpi=150)

# %% [markdown]
# (a) For held-out runs: the root mean square of the log residuals, and the share of the gaps explained; in brackets how
# many constants are fitted. (b) Means over all runs; bars are 95 % intervals of the difference to the mean of the
# splits of as many bits. The axis is linear up to 0.01 and logarithmic beyond. (c) The laws are fitted to all runs.
#
# ## Reading it
#
# **Quartet's law holds out best, and that of Sun et al. does nearly as well without a constant for any format.** With
# an outer exponent and a constant for each format, Quartet's explains more than nine tenths of the gaps to float32, of
# unseen sizes and of unseen lengths. That of Sun et al. explains nearly nine tenths with a third as many constants, as
# much as QuEST's. Kumar's knows how many bits there are, but not how they are split: less than a half. By the errors
# of the loss itself the three cannot be told apart: they are little larger than the noise over seeds.
#
# **Not all is determined.** The floor runs away to 0 in half of the laws, as sizes and lengths span little more than a
# decade. So does Kumar's $n$, and the size of Chen's block term is barely identified: the law does no better than a
# constant for each block size. Fits of these laws to models of another scale need starts of that scale.
#
# **More data makes few bits dearer**, as these laws say: from 128 thousand to a million characters the gaps of 3 and 4
# bits double. The law of Sun et al. has a data size from which on more data harms. Its fit puts that far beyond these
# runs, which have 42 characters a parameter at most.
#
# **With 4 bits the best split is the published one, e2m1. With 6 bits it is not**: e3m2 costs more than one or two
# exponent bits. With 8 bits e4m3 ties with the best, and only e5m2 is worse, since little is left to lose. In blocks
# of 32 with a scale of their own, nothing needs more than two exponent bits. The fitted law does not say so. It trades
# exponent bits for mantissa bits by powers of $E + 1/2$ and $M + 1/2$, at one rate for all formats. But a second
# exponent bit is worth much to e1m1 and nothing to e1m4. With 8 bits, the split that it likes best is the one measured
# to be worst. Fitted without formats of one exponent bit, it is close to what is measured.
#
# **Activations cost more than weights**, two thirds and more of what 4 bits cost in both, and the two costs add up.
#
# **What this does not show.** Sun et al. round operands of the backward products too, their blocks are others, and
# their models are larger by a factor of a hundred to a thousand. That two exponent bits suffice holds for blocks of 32
# in forward products.

# %% [markdown]
# ## Conclusion, asserted
#
# 1. Of all laws Quartet's explains most of the gaps of unseen sizes and lengths, more than 0.9 of them, that of Sun et
#    al. more than 0.8, and Kumar's less than 0.6. Errors of the loss are smaller with either than with Chinchilla's.
# 2. With 3 and 4 bits the mean gap is larger with the most data than with the least.
# 3. With 4 bits the published split is the measured best or ties with it. With 6 bits it costs more than the best,
#    which has at most two exponent bits; with 8 bits at most 0.01 more. The fitted law wants more exponent bits than
#    the measured best at 6 and 8 bits.
# 4. Activations in 4 bits cost more than weights, and both together the sum, to 0.005.

# %%
for of in scores.values():
    explained = {name: gaps_explained(score.predicted, rounded) for name, score in of.items()}
    assert max(explained, key=explained.get) == "Quartet" and explained["Quartet"] > 0.9
    assert explained["Sun, floats"] > 0.8 and explained["Kumar"] < 0.6
    assert max(of["Quartet"].rms, of["Sun, floats"].rms) < of["Chinchilla"].rms
assert all(gaps[fmt][many].mean() > gaps[fmt][few].mean() for bits in (3, 4) for fmt in SPLITS[bits])
assert published[4] in (best[4], *ties[4])
assert published[6] not in (best[6], *ties[6]) and exponent_of[best[6]] <= 2
assert interval(gaps[published[8]] - gaps[best[8]])[0] < 0.01
assert all(laws.optimal_split(floats.model, bits).exponent_bits > exponent_of[best[bits]] for bits in (6, 8))
for part in parts.values():
    weights, activations, both = (part[which].mean() for which in ("weights", "activations", "both"))
    assert activations > weights and abs(weights + activations - both) < 0.005
print(path)
