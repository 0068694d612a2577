"""Works out the memory of training Llama 2 7B and 70B, which fit no machine here, from shapes alone.

    python benchmarks/memory.py                  # writes benchmarks/results/memory.md

Parameters, gradients and optimizer state are divided over the devices; each device has a sequence of 4096 tokens.
Sizes of the models: Touvron et al. (2023), https://arxiv.org/abs/2307.09288, table 1, and the released configurations.
"""

import dataclasses
import datetime
import functools
import importlib.metadata
import pathlib
import sys

import jax
import jax.numpy as jnp
import optax

import qjax
from qjax import memory, recipes
from qjax.optim import adamw_4bit, coat_adamw

RESULT = pathlib.Path(__file__).parent / "results" / "memory.md"
CONTEXT, VOCABULARY = 4096, 32000


@dataclasses.dataclass(frozen=True)
class Llama:
    layers: int
    width: int
    hidden: int
    heads: int
    groups: int
    devices: int

    @property
    def head(self) -> int:
        return self.width // self.heads

    def params(self, dtype):
        """Returns the shapes of the parameters, those of the layers stacked."""
        projections = {
            "q": (self.width, self.width),
            "k": (self.width, self.groups * self.head),
            "v": (self.width, self.groups * self.head),
            "o": (self.width, self.width),
            "gate": (self.width, self.hidden),
            "up": (self.width, self.hidden),
            "down": (self.hidden, self.width),
            "norm_attention": (self.width,),
            "norm_mlp": (self.width,),
        }
        shapes = {"embed": (VOCABULARY, self.width), "norm": (self.width,), "head": (self.width, VOCABULARY)}
        shapes |= {"layers": {name: (self.layers, *shape) for name, shape in projections.items()}}
        return jax.tree.map(
            lambda shape: jax.ShapeDtypeStruct(shape, dtype), shapes, is_leaf=lambda x: isinstance(x, tuple)
        )

    def loss(self, params, tokens, *, checkpoint: bool):
        """Returns the loss of one sequence, layer by layer in bfloat16."""

        def norm(x, scale):
            return x * jax.lax.rsqrt(jnp.mean(jnp.square(x), -1, keepdims=True) + 1e-5) * scale

        def rotary(x):
            half = jnp.arange(self.head // 2, dtype=jnp.float32)
            angle = jnp.arange(CONTEXT, dtype=jnp.float32)[:, None] * 1e4 ** (-2 * half / self.head)
            cos, sin = (f(angle)[:, None].astype(x.dtype) for f in (jnp.cos, jnp.sin))
            a, b = jnp.split(x, 2, -1)
            return jnp.concatenate([a * cos - b * sin, a * sin + b * cos], -1)

        # Scores of attention are computed again in any case, as by FlashAttention.
        @jax.checkpoint
        def attention(q, k, v):
            q, k, v = (y.reshape(CONTEXT, -1, self.head) for y in (q, k, v))
            return jax.nn.dot_product_attention(rotary(q), rotary(k), v, is_causal=True).reshape(CONTEXT, -1)

        def layer(x, p):
            y = norm(x, p["norm_attention"])
            x = x + attention(y @ p["q"], y @ p["k"], y @ p["v"]) @ p["o"]
            y = norm(x, p["norm_mlp"])
            return x + (jax.nn.silu(y @ p["gate"]) * (y @ p["up"])) @ p["down"], None

        x = params["embed"][tokens]
        x, _ = jax.lax.scan(jax.checkpoint(layer) if checkpoint else layer, x, params["layers"])
        logits = norm(x, params["norm"]) @ params["head"]
        return optax.softmax_cross_entropy_with_integer_labels(logits.astype(jnp.float32), tokens).mean()


MODELS = {
    "7B": Llama(32, 4096, 11008, heads=32, groups=32, devices=8),
    "70B": Llama(80, 8192, 28672, heads=64, groups=8, devices=64),
}
OPTIMIZERS = {"AdamW": optax.adamw, "COAT AdamW": coat_adamw, "4-bit AdamW": adamw_4bit}
RULES = {
    "bf16": None,
    "MXFP8": recipes.MXFP8,
    "MXFP8, inputs of products as its codes": dataclasses.replace(recipes.MXFP8, save_lhs=qjax.Quantizer("mxfp8_e4m3")),
}
WIRES = ("fp32", "bf16", "mxfp8_e4m3", "mxfp4")
GIB = 2**30


def held(params) -> int:
    return memory.nbytes(params).total


def main():
    lines = [
        "# Memory of training Llama 2, on paper",
        "",
        f"- {datetime.datetime.now():%Y-%m-%d}, `python benchmarks/memory.py`, from shapes: nothing of this was run",
        f"- qjax {importlib.metadata.version('qjax')}, jax {jax.__version__}, Python {sys.version.split()[0]}",
        "",
        "GiB on a device: weights and gradients in bfloat16 and master weights in float32, divided over the devices.",
    ]
    for name, model in MODELS.items():
        params, weights, n = model.params(jnp.float32), model.params(jnp.bfloat16), model.devices
        size = sum(x.size for x in jax.tree.leaves(params))
        lines += ["", f"## {name}: {size / 1e9:.2f} billion parameters on {n} devices", ""]
        lines += ["| | GiB |", "|---|---|", f"| master weights | {held(params) / n / GIB:.2f} |"]
        lines += [f"| {of} | {held(weights) / n / GIB:.2f} |" for of in ("weights", "gradients")]
        for of, optimizer in OPTIMIZERS.items():
            state = jax.eval_shape(optimizer(1e-4).init, params)
            lines += [f"| state of {of} | {held(state) / n / GIB:.2f} |"]
        tokens = jax.ShapeDtypeStruct((CONTEXT,), jnp.int32)
        for checkpoint in (False, True):
            for rule, recipe in RULES.items():
                loss = functools.partial(model.loss, checkpoint=checkpoint)
                loss = loss if recipe is None else qjax.quantize(loss, recipe)
                kept = memory.saved(loss, weights, tokens) / GIB
                lines += [
                    f"| saved activations, {rule}{', each layer computed again' if checkpoint else ''} | {kept:.2f} |"
                ]
        for fmt in WIRES:
            codes = jax.eval_shape(lambda p, fmt=fmt: jax.tree.map(lambda w: qjax.encode(w, fmt), p), params)
            sent = 3 * held(codes) * (n - 1) / n / GIB
            lines += [f"| sent in a step in {fmt}: weights gathered twice, gradients scattered | {sent:.2f} |"]
    RESULT.write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
