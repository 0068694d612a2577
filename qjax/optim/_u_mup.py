"""The learning rates of u-muP."""

import math
from collections.abc import Callable
from typing import Any

import jax
import optax

from qjax.unit_scaling import Role


def scale_by_u_mup(
    roles: Any | Callable[[str, Any], Role | str], *, depth: int | None = None
) -> optax.GradientTransformation:
    """Returns the transformation that multiplies each update by the factor that its role has in u-muP.

    | kind | factor |
    |---|---|
    | input | ``1 / sqrt(fan_out)`` |
    | hidden | ``1 / sqrt(fan_in)`` |
    | output, norm, bias | 1 |
    | any, in a residual branch | the above ``/ sqrt(depth)`` |

    The rule is that of Adam, whose updates have a size of their own, so this follows ``optax.scale_by_adam``. The
    learning rate after it can then stay as it is when width and depth change. Between the two,
    ``optax.add_decayed_weights(decay / peak)`` is the independent weight decay of the paper: ``decay`` a step while the
    learning rate is at its peak.

    Args:
      roles: a ``qjax.unit_scaling.Role``, or its kind, for each parameter: a pytree of them, such as
        ``qjax.unit_scaling.linen.roles`` makes, or a function of path ("block_0/mlp/up/kernel") and update.
      depth: the number of layers of a transformer (pairs of residual branches), if any parameter is in one.

    Updates keep their dtype. The transformation has no state, and what ``optax.masked`` leaves out needs no role.

    Raises:
      ValueError: in ``update``: for a parameter without a role, or if depth is missing or does not apply.

    >>> import jax.numpy as jnp, optax, qjax.optim
    >>> adam = optax.chain(
    ...     optax.scale_by_adam(), qjax.optim.scale_by_u_mup({"w": "hidden"}), optax.scale_by_learning_rate(0.5)
    ... )
    >>> params = {"w": jnp.ones((16, 1), jnp.float32)}
    >>> adam.update(params, adam.init(params))[0]["w"][0]  # 0.5 / sqrt(16)
    Array([-0.124999...], dtype=float32)

    Source: Blake et al. (2024), u-muP, https://arxiv.org/abs/2407.17465, table 2 and section 4.
    """
    role_of: Any = roles if callable(roles) else _looked_up(roles)

    def update(updates, params=None):
        named, structure = jax.tree_util.tree_flatten_with_path(updates)
        scaled, branches = [], False
        for path, leaf in named:
            name = _name(path)
            role = _role(role_of(name, leaf))
            branches |= role.residual
            scaled.append(leaf * _factor(role, name, leaf, depth))
        if named and depth is not None and not branches:
            raise ValueError("scale_by_u_mup: depth was given, but no role is residual; leave depth out.")
        return jax.tree.unflatten(structure, scaled)

    return optax.stateless(update)


def _name(path) -> str:
    if path and path[-1] == jax.tree_util.GetAttrKey("value"):  # what a Variable of nnx holds
        path = path[:-1]
    return jax.tree_util.keystr(path, simple=True, separator="/")


def _role(role: Role | str) -> Role:
    return role if isinstance(role, Role) else Role(role)  # type: ignore[arg-type]  # Role checks it.


def _looked_up(roles) -> Callable[[str, Any], Role | str]:
    # By path, not by structure: a masked tree has other nodes in the place of what is left out.
    named = jax.tree_util.tree_flatten_with_path(roles, is_leaf=lambda x: isinstance(x, Role))[0]
    table = {_name(path): role for path, role in named}

    def role_of(name, _):
        if name not in table:
            raise ValueError(f"scale_by_u_mup: roles says nothing of {name!r}; its paths are {', '.join(table)}.")
        return table[name]

    return role_of


def _factor(role: Role, name: str, leaf, depth: int | None) -> float:
    if role.residual and depth is None:
        raise ValueError(f"scale_by_u_mup: {name!r} is in a residual branch; give depth, the number of layers.")
    fans = {"input": leaf.shape[-1:], "hidden": leaf.shape[:-1]}
    fan = role.fan or math.prod(fans[role.kind]) if role.kind in fans else 1
    return (fan * depth if role.residual and depth else fan) ** -0.5
