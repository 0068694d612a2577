"""The language model of studies 04 to 07: characters of Python's own source, a small transformer, its training."""

import functools
import sysconfig
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

ALPHABET = "\n" + "".join(map(chr, range(32, 127)))
CONTEXT = 64


def corpus():
    """Returns the modules of the standard library as indices into ``ALPHABET``: for training, and every tenth file."""
    index = np.full(256, 255, np.uint8)
    index[list(ALPHABET.encode())] = np.arange(len(ALPHABET))
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    texts = [index[np.frombuffer(file.read_bytes(), np.uint8)] for file in files]
    texts = [text[text < len(ALPHABET)] for text in texts]
    held_out = texts[5::10]
    del texts[5::10]
    return np.concatenate(texts), np.concatenate(held_out)


def windows(text, starts):
    """Returns the pieces of ``CONTEXT + 1`` characters of a text that begin at ``starts``."""
    return text[np.asarray(starts)[..., None] + np.arange(CONTEXT + 1)].astype(np.int32)


class Block(nn.Module):
    heads: int

    @nn.compact
    def __call__(self, x):
        width = x.shape[-1]

        def dense(name, features, x):
            self.sow("inputs", f"{name}_inputs", x)
            return nn.Dense(features, use_bias=False, name=name)(x)

        y = dense("qkv", 3 * width, nn.LayerNorm(name="norm_attention")(x))
        q, k, v = jnp.split(y.reshape(*y.shape[:-1], self.heads, -1), 3, axis=-1)
        place = jnp.arange(x.shape[-2], dtype=x.dtype)
        slopes = 2.0 ** (-8 / self.heads * jnp.arange(self.heads, dtype=x.dtype))
        bias = slopes[:, None, None] * jnp.minimum(place[None, :] - place[:, None], 0)
        y = nn.dot_product_attention(q, k, v, bias=bias, mask=nn.make_causal_mask(x[..., 0]))
        x = x + dense("out", width, y.reshape(x.shape))
        y = nn.gelu(dense("up", 4 * width, nn.LayerNorm(name="norm_mlp")(x)))
        return x + dense("down", width, y)


class LanguageModel(nn.Module):
    """A causal transformer with linear biases for the distance (ALiBi, Press et al. 2021, arXiv:2108.12409)."""

    width: int
    layers: int = 2
    heads: int = 4

    @nn.compact
    def __call__(self, tokens):
        x = nn.Embed(len(ALPHABET), self.width, embedding_init=nn.initializers.normal(0.5), name="embed")(tokens)
        for i in range(self.layers):
            x = Block(self.heads, name=f"block_{i}")(x)
        head = nn.Dense(len(ALPHABET), kernel_init=nn.initializers.normal(0.02), name="head")
        return head(nn.LayerNorm(name="norm")(x))


def losses(model, params, text, **kwargs):
    """Returns the cross-entropy of each character after the first in windows of a text, in nats."""
    logits = model.apply({"params": params}, text[..., :-1], **kwargs)
    return optax.softmax_cross_entropy_with_integer_labels(logits, text[..., 1:])


def schedule(rate, steps):
    """Returns a warmup over a tenth of the steps and a cosine decay to zero."""
    return optax.warmup_cosine_decay_schedule(0.0, rate, steps // 10, steps)


@functools.partial(jax.jit, static_argnums=(0, 1))
def train(model, rate, params, batches, key):
    """Trains by AdamW with a warmup and a cosine decay; returns the parameters and the loss at each step."""
    adam = optax.adamw(schedule(rate, len(batches)), b2=0.95, weight_decay=0.1)
    params, _, (curve, _) = fit(model, adam, params, batches, key)
    return params, curve


def fit(model, optimizer, params, batches, key):
    """Trains by an optimizer, after clipping.

    Returns the parameters, the state of the optimizer, and for each step the loss and the share of the weights that it
    leaves as they are.
    """
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optimizer)

    def step(carry, of_step):
        (params, state), (batch, key) = carry, of_step

        def loss(params):
            return losses(model, params, batch, rngs={"quantize": key}).mean()

        value, gradients = jax.value_and_grad(loss)(params)
        updates, state = optimizer.update(gradients, state, params)
        moved = optax.apply_updates(params, updates)
        still = sum(jax.tree.leaves(jax.tree.map(lambda new, old: jnp.sum(new == old), moved, params)))
        return (moved, state), (value, still / optax.tree.size(params))

    keys = jax.random.split(key, len(batches))
    (params, state), history = jax.lax.scan(step, (params, optimizer.init(params)), (batches, keys))
    return params, state, history
