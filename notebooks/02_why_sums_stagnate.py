# %% [markdown]
# # Why sums stagnate
#
# **Question.** Numbers are added one after the other in a short format. When does the sum stop growing, and what does
# stochastic rounding change?
#
# **Method.** (a) The harmonic series, whose stall points are known exactly. (b) Long dot products of positive vectors,
# whose error is held against theory.
#
# **Sources.** Higham (2018), *Half precision arithmetic: fp16 versus bfloat16*,
# <https://nhigham.com/2018/12/03/half-precision-arithmetic-fp16-versus-bfloat16/>, and Higham and Pranesh (2019),
# *Simulating low precision floating-point arithmetic*, <https://doi.org/10.1137/19M1251308> (the harmonic series);
# Connolly, Higham and Mary (2021), *Stochastic rounding and its probabilistic backward error analysis*,
# <https://doi.org/10.1137/20M1334796>; Croci et al. (2022), *Stochastic rounding: implementation, error analysis and
# applications*, <https://doi.org/10.1098/rsos.211631>.

# %%
import functools
import math
import os
import tempfile
from fractions import Fraction
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np

import qjax

if "get_ipython" not in globals():
    matplotlib.use("Agg")
import matplotlib.pyplot as plt

FAST = os.environ.get("QJAX_FAST") == "1"
HERE = Path(__file__).parent if "__file__" in globals() else Path()
FIGURES = Path(tempfile.mkdtemp()) if FAST else HERE / "figures"
SEEDS = 8 if FAST else 32
TERMS = 2**11 if FAST else 2**13
LENGTH = 2**15 if FAST else 2**17

# %% [markdown]
# ## A recurrent sum in any format
#
# Every addend is rounded to the format, and so is every partial sum. The operations run in float32 and `chop` rounds
# their results. This rounds twice, yet gives the singly rounded result: for +, -, x, / and the square root it does if
# the carrier has a precision of at least $2p + 2$ (Figueroa 1995, <https://doi.org/10.1145/221332.221334>). Here $p$ is
# at most 11, in fp16, and float32 has exactly $24 = 2 \cdot 11 + 2$.
#
# A stochastic sum needs a key of its own for each step and for each of its two roundings.


# %%
@functools.partial(jax.jit, static_argnums=(0, 1))
def partial_sums(fmt, rounding, addends, key=None):
    """Returns all partial sums of exact float32 addends, every operation rounded to the format."""

    def add(total, of_step):
        addend, step = of_step
        keys = (None, None) if key is None else jax.random.split(jax.random.fold_in(key, step))
        addend = qjax.chop(addend, fmt, rounding, key=keys[0])
        total = qjax.chop(total + addend, fmt, rounding, key=keys[1])
        return total, total

    return jax.lax.scan(add, jnp.float32(0), (addends, jnp.arange(len(addends))))[1]


def nearest_sums(fmt, addends):
    return np.asarray(partial_sums(fmt, "nearest_even", addends), np.float64)


def stochastic_sums(fmt, addends):
    keys = jax.random.split(jax.random.key(0), SEEDS)
    seeds = jax.vmap(lambda key: partial_sums(fmt, "stochastic", addends, key))
    return np.asarray(seeds(keys), np.float64)


# %% [markdown]
# ## (a) The harmonic series
#
# $\sum 1/k$ diverges, but in a format of precision $p$ the sum $s$ stays as it is once $1/k$ is below half the spacing
# at $s$, which is $2^{\lfloor \log_2 s \rfloor - p}$. Both the terms and rounding are monotone, so a sum that one term
# leaves unchanged never changes again. We count that term, as Higham does.
#
# An oracle that shares nothing with qjax: the same loop in exact rationals.


# %%
def to_nearest(x, precision):
    """Returns a positive rational rounded to a precision in bits, ties to even, without limits to the exponent."""
    exponent = math.floor(math.log2(x))
    exponent += (x >= Fraction(2) ** (exponent + 1)) - (x < Fraction(2) ** exponent)
    spacing = Fraction(2) ** (exponent - precision + 1)
    return round(x / spacing) * spacing


def stall(precision):
    total, k = Fraction(0), 1
    while (larger := to_nearest(total + to_nearest(Fraction(1, k), precision), precision)) != total:
        total, k = larger, k + 1
    return float(total), k


HARMONIC = {"fp16": (7.0859375, 513), "bf16": (5.0625, 65), "e4m3": (3.0, 9), "e5m2": (2.0, 5)}
terms = (1 / np.arange(1, TERMS + 1)).astype(np.float32)
harmonic = {name: nearest_sums(qjax.format(name), terms) for name in HARMONIC}

print(f"{'format':6} {'stalls at':>10} {'with term':>10}    exact rationals")
for name, expected in HARMONIC.items():
    stalled = int(np.argmax(np.diff(harmonic[name], prepend=0) == 0))
    found = float(harmonic[name][stalled]), stalled + 1
    exact = stall(qjax.format(name).mantissa_bits + 1)
    print(f"{name:6} {found[0]:10} {found[1]:10}    {exact}")
    assert found == exact == expected
    assert (harmonic[name][stalled:] == expected[0]).all()

# %% [markdown]
# For fp16 and bf16 these are the published values: 7.0859 after 513 terms and 5.0625 after 65.
#
# Rounded stochastically, a term that is a small part of the spacing moves the sum rarely, but then by a whole spacing:
# the expected sum is the exact one.

# %%
wandering = {name: stochastic_sums(qjax.format(name), terms) for name in ("bf16", "e5m2")}
exact_harmonic = np.cumsum(1 / np.arange(1, TERMS + 1))
for name, sums in wandering.items():
    mean, error = sums[:, -1].mean(), sums[:, -1].std(ddof=1) / math.sqrt(SEEDS)
    print(f"{name}: {TERMS} terms, mean {mean:.2f} ± {error:.2f} (standard error), exact {exact_harmonic[-1]:.2f}")
    assert abs(mean - exact_harmonic[-1]) < 5 * error

# %% [markdown]
# ## (b) Dot products
#
# $s_n = \sum_{i \le n} z_i$ with $z_i = x_i y_i$, where $x_i$ and $y_i$ are uniform in $[0, 1)$ and rounded to the
# format beforehand, so that float32 holds the products exactly. Let $u = 2^{-p}$, and hats denote what is computed.
#
# **To nearest** the error is at most $n u\, s_n$ to first order, and stagnation makes it that large: products are below
# 1, which is half the spacing at $s = 2^p$, so there the sum ends.
#
# **Stochastically**, $\hat s_i = v_i + e_i$ with $v_i = \hat s_{i-1} + \hat z_i$. Given all that came before, $e_i$ has
# mean zero and lies in an interval as long as the spacing, $h_i \le 2 u v_i$. The errors are a martingale, whatever the
# data, and two bounds follow.
#
# 1. To first order in $u$ all $h_i \le 2 u s_n$, and the Azuma-Hoeffding inequality gives
#
# $$P\left(|\hat s_n - s_n| \ge \lambda \sqrt{n}\, u\, s_n\right) \le 2 e^{-\lambda^2 / 2}.$$
#
# This is the rule of thumb that has $\sqrt n\, u$ in place of $n u$. Connolly, Higham and Mary (2021) prove it for the
# backward error of stochastic rounding, to all orders in $u$ and without an assumption on the data. The variance of
# $e_i$ is at most $h_i^2 / 4$, so $\sqrt n\, u$ also bounds the root mean square of the relative error.
#
# 2. Positive addends do better. Since $\hat s_{i-1}$ is in the format, $v_i$ exceeds the number below it by at most
#    $\hat z_i$, and goes up with probability at most $\hat z_i / h_i$. So the variance of $e_i$ is at most $\hat z_i
#    h_i \le 2 u\, \hat z_i v_i$. Variances of martingale differences add, expectations are the exact sums, and $2
#    \sum_i z_i s_i = s_n^2 + \sum_i z_i^2$. Up to a factor of $1 + O(1/n)$, for addends of comparable size,
#
# $$\text{root mean square of } (\hat s_n - s_n) / s_n \;\le\; \sqrt u \quad \text{for every } n.$$
#
# The bounds meet at $n = 1/u$. Beyond, where the sum to nearest stalls, the stochastic error stops growing. (Float32
# holds $v_i$ to $2^{-24}$, which is negligible.)

# %%
rng = np.random.default_rng(0)
uniform = [jnp.asarray(rng.random(LENGTH, np.float32)) for _ in range(2)]
lengths = 2 ** np.arange(4, int(math.log2(LENGTH)) + 1)
FORMATS = {"bf16": 2.0**-8, "fp16": 2.0**-11}

errors = {}
for name, u in FORMATS.items():
    fmt = qjax.format(name)
    x, y = (qjax.chop(v, fmt) for v in uniform)
    exact = np.cumsum(np.asarray(x, np.float64) * np.asarray(y, np.float64))
    nearest = nearest_sums(fmt, x * y)
    for rounding, sums in (("nearest", nearest), ("stochastic", stochastic_sums(fmt, x * y))):
        errors[name, rounding] = (np.abs(sums - exact) / exact)[..., lengths - 1]
    print(f"{name}: to nearest the sum stalls at {nearest[-1]:g} = 2^{math.log2(nearest[-1]):g} of {exact[-1]:.0f}")
    assert nearest[-1] == 1 / u


# %%
def rms(errors):
    return np.sqrt(np.mean(errors**2, axis=0))


print(f"{'':>8}" + "".join(f"{name:>33}" for name in FORMATS))
print(f"{'n':>8}" + f"{'nearest':>11}{'stochastic':>12}{'theory':>10}" * 2)
theory = {name: np.minimum(np.sqrt(lengths) * u, math.sqrt(u)) for name, u in FORMATS.items()}
for i, n in enumerate(lengths):
    columns = [(errors[f, "nearest"][i], rms(errors[f, "stochastic"])[i], theory[f][i]) for f in FORMATS]
    print(f"{n:8}" + "".join(f"{a:11.2e}{b:12.2e}{c:10.2e}" for a, b, c in columns))

# %%
COLORS = {"fp16": "#0072b2", "bf16": "#d55e00", "e4m3": "#009e73", "e5m2": "#cc79a7"}
GREY = "0.35"


def label(axes, text, at, color):
    axes.annotate(text, at, (5, 0), textcoords="offset points", color=color, va="center", fontsize=9)


figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4.5), layout="constrained")
k = np.arange(1, TERMS + 1)
left.plot(k, exact_harmonic, color=GREY, lw=1)
label(left, "exact", (k[-1], exact_harmonic[-1]), GREY)
for name, (total, term) in HARMONIC.items():
    left.plot(k, harmonic[name], color=COLORS[name], lw=1.4)
    left.plot(term, total, "o", color=COLORS[name], ms=5)
    label(left, f"{name}: {total:.5g}, term {term}", (k[-1], total), COLORS[name])
for name, sums in wandering.items():
    left.plot(k, sums.mean(0), color=COLORS[name], ls="--", lw=1.2)
    left.fill_between(k, *np.quantile(sums, [0.1, 0.9], axis=0), color=COLORS[name], alpha=0.15, lw=0)
left.plot([], [], "k-", lw=1.4, label="to nearest")
left.plot([], [], "k--", lw=1.2, label=f"stochastic, mean of {SEEDS} seeds")
left.fill_between([], [], color="k", alpha=0.15, lw=0, label="80 % of the seeds")
left.set(xscale="log", xlabel="terms", ylabel="sum", title="(a) Harmonic series", xlim=(1, 60 * TERMS), ylim=(0, 14.5))
left.set_xticks([1, 10, 100, 1000])
left.legend(loc="upper left", frameon=False)

for name in FORMATS:
    style = {"color": COLORS[name], "marker": "o", "ms": 4}
    spread = rms(errors[name, "stochastic"])
    right.plot(lengths, errors[name, "nearest"], "-", lw=1.4, **style)
    right.plot(lengths, spread, "--", lw=1.4, mfc="white", **style)
    right.plot(lengths, theory[name], ":", lw=1.4, color=COLORS[name])
    label(right, name, (lengths[-1], spread[-1]), COLORS[name])
right.plot([], [], "ko-", lw=1.4, ms=4, label="to nearest")
right.plot([], [], "ko--", lw=1.4, ms=4, mfc="white", label=f"stochastic, RMS of {SEEDS} seeds")
right.plot([], [], "k:", lw=1.4, label=r"bound, $\min(\sqrt{n}\,u, \sqrt{u})$")
right.set(xscale="log", yscale="log", xlabel="n", ylabel="relative error", title="(b) Dot product", ylim=(2e-5, 2))
right.set_xlim(10, 4 * LENGTH)
right.legend(loc="lower right", frameon=False)
for axes in (left, right):
    axes.minorticks_off()
    axes.spines[["top", "right"]].set_visible(False)

path = FIGURES / "02_why_sums_stagnate.png"
path.parent.mkdir(exist_ok=True)
figure.savefig(path, dpi=150)

# %% [markdown]
# (a) To nearest, each sum ends at the dot. Stochastic sums follow the exact one: in bf16 closely, in e5m2, with three
# bits of precision, only on average. (b) To nearest the error tends to 1, stochastically to a constant below $\sqrt u$.
# Short sums are more accurate to nearest, for no single error exceeds half a spacing.
#
# ## Conclusion, asserted
#
# The stall points were asserted above. For the dot products:
#
# 1. no stochastic error exceeds $5 \sqrt n\, u$, which by bound 1 happens with the small probability that is printed (a
#    union bound over all seeds and lengths);
# 2. the root mean square is below $\sqrt u$, up to three standard errors of a root mean square over the seeds;
# 3. from $n = 8/u$ on, the error to nearest is above that of every seed.

# %%
LAMBDA = 5.0
for name, u in FORMATS.items():
    stochastic, nearest = errors[name, "stochastic"], errors[name, "nearest"]
    worst = (stochastic / (np.sqrt(lengths) * u)).max()
    chance = 2 * math.exp(-(LAMBDA**2) / 2) * stochastic.size
    plateau = rms(stochastic).max() / math.sqrt(u)
    ratio = (nearest / stochastic.max(0))[lengths >= 8 / u].min()
    print(f"{name}: worst stochastic error {worst:.2f} sqrt(n) u (above {LAMBDA:g} with probability < {chance:.3f});")
    print(f"      largest root mean square {plateau:.2f} sqrt(u); to nearest {ratio:.1f} times the worst seed or more")
    assert worst < LAMBDA
    assert plateau < 1 + 3 / math.sqrt(2 * SEEDS)
    assert ratio > 1
print(path)
