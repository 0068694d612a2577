"""Times training steps with every operand of every product quantized, against the same steps in float32.

    python benchmarks/train_step.py                      # everything; writes benchmarks/results/train_step.md
    python benchmarks/train_step.py --only mlp --rounds 15

A round runs all steps of a model in random order; a new one is a row of ``MLP`` or ``TRANSFORMER``. Other libraries
quantize the same MLP by their own rules; they are left out where they cannot run.
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
import warnings
from statistics import median, quantiles

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn

import qjax
import qjax.linen
from qjax import recipes

RESULT = pathlib.Path(__file__).parent / "results" / "train_step.md"
KEY = jax.random.key(0)


class Mlp(nn.Module):
    """784-512-512-10."""

    dot_general_cls: object = None

    @nn.compact
    def __call__(self, x):
        for width in (512, 512):
            x = nn.relu(nn.Dense(width, dot_general_cls=self.dot_general_cls)(x))
        return nn.Dense(10, dot_general_cls=self.dot_general_cls)(x)


class Transformer(nn.Module):
    """A causal language model of four layers."""

    vocabulary: int = 96
    width: int = 128
    layers: int = 4

    @nn.compact
    def __call__(self, tokens):
        x = nn.Embed(self.vocabulary, self.width)(tokens)
        x = x + self.param("positions", nn.initializers.normal(0.02), (tokens.shape[1], self.width))[None]
        mask = nn.make_causal_mask(tokens)
        for _ in range(self.layers):
            y = nn.LayerNorm()(x)
            x = x + nn.MultiHeadDotProductAttention(num_heads=4)(y, mask=mask)
            y = nn.gelu(nn.Dense(4 * self.width)(nn.LayerNorm()(x)))
            x = x + nn.Dense(self.width)(y)
        return nn.Dense(self.vocabulary, use_bias=False)(nn.LayerNorm()(x))


def quantized(recipe):
    return lambda model: qjax.linen.quantize(model, recipe)


def stochastic(*formats):
    return recipes.uniform(*formats, gradient_rounding="stochastic")


def all_stochastic(x, g):
    x, g = (qjax.Quantizer(fmt, "stochastic") for fmt in (x, g))
    return qjax.Recipe(qjax.Gemm(x, x), qjax.Gemm(g, x), qjax.Gemm(x, g))


def qwix_fp8(model):
    import qwix

    rule = qwix.QtRule(
        module_path=".*", weight_qtype="float8_e4m3fn", act_qtype="float8_e4m3fn", bwd_qtype="float8_e5m2"
    )
    return qwix.quantize_model(model, qwix.QtProvider([rule]))


def aqt_int8(model):
    from aqt.jax.v2 import config
    from aqt.jax.v2.flax import aqt_flax

    return model.clone(
        dot_general_cls=functools.partial(aqt_flax.AqtDotGeneral, config.fully_quantized(fwd_bits=8, bwd_bits=8))
    )


# name: (what makes the quantized model of the plain one, the largest accepted ratio to float32 or None)
MLP = {
    "float32": (lambda model: model, None),
    "FP8, no scales": (quantized(recipes.FP8), 1.15),
    "FP8, no scales, all stochastic": (quantized(all_stochastic("e4m3", "e5m2")), 1.2),
    "FP8 hybrid, a scale a tensor": (quantized(recipes.FP8_HYBRID), 1.35),
    "MXFP8": (quantized(recipes.MXFP8), None),
    "MXFP4, stochastic gradients": (quantized(recipes.MXFP4_STOCHASTIC), None),
    "INT8, forward": (quantized(recipes.INT8), None),
    "Qwix FP8": (qwix_fp8, None),
    "AQT INT8": (aqt_int8, None),
}
TRANSFORMER = {
    "float32": (lambda model: model, None),
    "bfloat16 operands": (quantized(recipes.BF16_OPERANDS), None),
    "FP8 hybrid, a scale a tensor": (quantized(recipes.FP8_HYBRID), None),
    "MXFP8": (quantized(recipes.MXFP8), None),
    "MXFP4, stochastic gradients": (quantized(recipes.MXFP4_STOCHASTIC), 2.0),
}


def mlp_data(generator):
    x = generator.standard_normal((256, 784)).astype(np.float32)
    return jnp.asarray(x), jnp.asarray(generator.integers(0, 10, 256))


def transformer_data(generator):
    tokens = jnp.asarray(generator.integers(0, 96, (16, 129)))
    return tokens[:, :-1], tokens[:, 1:]


MODELS = {
    "mlp": ("MLP 784-512-512-10, batch 256, SGD", Mlp(), mlp_data, MLP),
    "transformer": (
        "Transformer, 4 layers of width 128, 16 x 128 tokens, SGD",
        Transformer(),
        transformer_data,
        TRANSFORMER,
    ),
}


def step_of(model, x, y):
    """Returns (the compiled step, its first state)."""
    variables = model.init(KEY, x)
    parameters = variables.pop("params")
    optimizer = optax.sgd(0.01)

    def loss(parameters, others, x, y, key):
        logits = model.apply({"params": parameters, **others}, x, rngs={"quantize": key, "params": key})
        return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

    @functools.partial(jax.jit, donate_argnums=0)
    def step(state, x, y, key):
        parameters, momentum = state
        gradients = jax.grad(loss)(parameters, variables, x, y, key)
        updates, momentum = optimizer.update(gradients, momentum, parameters)
        return optax.apply_updates(parameters, updates), momentum

    return step, (parameters, optimizer.init(parameters))


def measure(name: str, rounds: int) -> list[str]:
    title, model, data, rows = MODELS[name]
    x, y = data(np.random.default_rng(0))
    steps, seconds, remarks = {}, {}, {}
    for row, (quantize, _) in rows.items():
        try:
            step, state = step_of(quantize(model), x, y)
            started = time.perf_counter()
            compiled = step.lower(state, x, y, KEY).compile()
            remarks[row] = f"{time.perf_counter() - started:.1f}"
            steps[row], seconds[row] = [compiled, jax.block_until_ready(compiled(state, x, y, KEY))], []
        except Exception as error:
            if not row.startswith(("Qwix", "AQT")):
                raise
            remarks[row] = "not installed" if isinstance(error, ImportError) else f"{type(error).__name__}"
    order, shuffled = list(steps), random.Random(0)
    for _ in range(rounds):
        shuffled.shuffle(order)
        for row in order:
            compiled, state = steps[row]
            started = time.perf_counter()
            steps[row][1] = jax.block_until_ready(compiled(state, x, y, KEY))
            seconds[row].append(time.perf_counter() - started)
    base = median(seconds["float32"])
    lines = [f"\n## {title}\n", f"float32: {1e3 * base:.2f} ms a step, the ratio 1.\n"]
    lines += ["| step | ratio | quartiles | limit | | compiled in s |", "|---|---|---|---|---|---|"]
    for row, (_, limit) in rows.items():
        if row not in seconds:
            lines.append(f"| {row} | {remarks[row]} | | | | |")
            continue
        low, ratio, high = (q / base for q in quantiles(seconds[row]))
        judged = "" if limit is None else "pass" if ratio <= limit else "**FAIL**"
        lines.append(f"| {row} | {ratio:.2f} | {low:.2f}, {high:.2f} | {limit or ''} | {judged} | {remarks[row]} |")
    return lines


def header() -> str:
    names = ("qjax", "jax", "jaxlib", "flax", "optax", "qwix", "aqtp")
    found = {d.name.lower(): d.version for d in importlib.metadata.distributions()} | {"qjax": qjax.__version__}
    return f"""# The speed of quantized training

- {datetime.datetime.now():%Y-%m-%d %H:%M}, `python {" ".join(sys.argv)}`
- {", ".join(f"{name} {found.get(name, 'not installed')}" for name in names)}, Python {sys.version.split()[0]}
- device {jax.devices()[0].device_kind}; {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}

Times of one training step (forward, backward, update), as ratios of medians to float32 in the same rounds. Every
operand of all three products of every dot is quantized, attention included."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=MODELS)
    parser.add_argument("--rounds", type=int, default=41)
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    head = header()
    body = [line for name in MODELS if options.only in (None, name) for line in measure(name, options.rounds)]
    report = "\n".join([head, *body]) + "\n"
    print(report)
    if options.only is None:
        RESULT.write_text(report)


if __name__ == "__main__":
    main()
