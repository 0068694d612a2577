"""What u-muP adds to unit scaling: the ratios of residual branches, and the roles of parameters."""

import dataclasses
import math
import re
from collections.abc import Callable
from typing import Any, Literal, get_args

import jax

Kind = Literal["input", "hidden", "output", "norm", "bias"]


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Role:
    """What a parameter is to u-muP; its learning rate follows from it (``qjax.optim.scale_by_u_mup``).

    Args:
      kind: "input" (an embedding), "hidden" (the weight of a linear layer or a convolution), "output" (that of
        ``linear_readout``), "norm" or "bias".
      fan: the outputs of an input weight or the inputs of a hidden one. By default taken from the shape as Flax has it:
        the last axis is the outputs, all others are the inputs.
      residual: whether it is in a residual branch.

    Raises:
      ValueError: for an unknown kind.

    >>> import qjax.unit_scaling as us
    >>> us.Role("hidden", residual=True)
    Role(kind='hidden', fan=None, residual=True)

    Source: Blake et al. (2024), u-muP, https://arxiv.org/abs/2407.17465, table 2.
    """

    kind: Kind
    fan: int | None = None
    residual: bool = False

    def __post_init__(self):
        if self.kind not in get_args(Kind):
            raise ValueError(f"Role: kind must be one of {', '.join(get_args(Kind))}, got {self.kind!r}.")


def roles_of(
    caller: str, shapes: dict[tuple, tuple[int, ...]], layer_of: Callable[[tuple], Any], residual: str | None
) -> list[Role]:
    """Returns the role of each parameter of a Flax model, from the ``role`` of its layer and its own name."""
    found = []
    for path, shape in shapes.items():
        name, layer = "/".join(map(str, path)), layer_of(path)
        if not hasattr(layer, "role"):
            raise ValueError(
                f"{caller}: {name!r} is of no layer with a role; use those of qjax.unit_scaling, or say the roles of "
                "scale_by_u_mup in a function of the path."
            )
        kind: Kind = "bias" if path[-1] == "bias" else layer.role
        fans = {"input": shape[-1:], "hidden": shape[: getattr(layer, "axes", -1)]}
        inside = residual is not None and re.fullmatch(residual, name) is not None
        found.append(Role(kind, math.prod(fans[kind]) if kind in fans else None, inside))
    if residual is not None and not any(role.residual for role in found):
        paths = ", ".join("/".join(map(str, path)) for path in shapes)
        raise ValueError(f"{caller}: residual {residual!r} matches none of the paths {paths}.")
    return found


def residual_taus(
    layers: int, *, residual_mult: float = 1.0, residual_attn_ratio: float = 1.0
) -> tuple[tuple[float, float], ...]:
    """Returns the ratio tau of the attention and of the MLP branch, for each layer of a transformer.

    With ``a_mlp = residual_mult sqrt(2 / (1 + residual_attn_ratio^2))`` and ``a_attn = residual_attn_ratio a_mlp``,
    layer l (from 0) has ``tau_attn = a_attn / sqrt(layers + l (a_attn^2 + a_mlp^2))`` and
    ``tau_mlp = a_mlp / sqrt(layers + (l + 1) a_attn^2 + l a_mlp^2)``. So all attention branches contribute the same to
    the last layer's output, and all MLP branches; by default, embedding, attention and MLP have a third each.

    Args:
      layers: how many pairs of an attention and an MLP branch there are.
      residual_mult: the contribution of the branches, relative to that of the embedding.
      residual_attn_ratio: the contribution of attention, relative to that of the MLPs.

    Raises:
      ValueError: if there is no layer.

    >>> import qjax.unit_scaling as us
    >>> us.residual_taus(1)
    ((1.0, 0.7071067811865475),)

    Source: Blake et al. (2024), u-muP, https://arxiv.org/abs/2407.17465, appendix G.
    """
    if layers < 1:
        raise ValueError(f"residual_taus: layers must be at least 1, got {layers}.")
    mlp = residual_mult * (2 / (1 + residual_attn_ratio**2)) ** 0.5
    attn = residual_attn_ratio * mlp
    before = [layers + i * (attn**2 + mlp**2) for i in range(layers)]
    return tuple((attn / b**0.5, mlp / (b + attn**2) ** 0.5) for b in before)
