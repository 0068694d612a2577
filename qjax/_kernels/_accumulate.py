"""Sums of products by an ``Accumulator``: which implementation computes them."""

import importlib
from collections.abc import Callable
from types import ModuleType
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from qjax._accumulator import Accumulator, register_of
from qjax._kernels import _int16, _reference
from qjax._kernels._target import Target, is_alone

Implementation = Literal["reference", "xla", "pallas"]
IMPLEMENTATIONS = ("reference", "xla", "pallas")


def accumulate(
    lhs,
    rhs,
    accumulator: Accumulator,
    *,
    key=None,
    scales=None,
    made: Callable[[], tuple[Any, Any]] | None = None,
    implementation: Implementation | None = None,
):
    """Returns the products of rows, ``(b, m, k) x (b, n, k) -> (b, m, n)``, summed by an accumulator, as float32.

    Args:
      lhs, rhs: elements of one dtype, the narrowest that holds them: the carrier. Integers for a ``Fixed`` register,
        floats for a ``Float``.
      key, scales: as in the reference.
      made: returns what a kernel can make lhs and rhs of itself, ``Unrounded`` and ``Coded``; or the arrays.
      implementation: None for the fastest that can run here.
    """
    if implementation == "pallas" or (implementation is None and is_alone()):
        kernels = kernels_here()
        reasons = [kernels] if isinstance(kernels, str) else []
        if not isinstance(kernels, str):
            for x, y in ((lhs, rhs),) if made is None else (made(), (lhs, rhs)):
                reason = kernels.refusal(x, y, accumulator, scales=scales)
                if reason is None:
                    return kernels.accumulate(x, y, accumulator, key=key, scales=scales)
                reasons.append(reason)
        if implementation == "pallas":
            raise NotImplementedError(f"matmul: implementation='pallas' cannot run: {reasons[0]}.")
    products = None if implementation == "reference" else _products(lhs, rhs, accumulator)
    return _reference.accumulate(lhs, rhs, accumulator, key=key, scales=scales, products=products)


def kernels_for(lhs, rhs, accumulator: Accumulator, scales) -> ModuleType | str:
    """Returns the module of the kernel that takes these operands on the current target, or why there is none."""
    kernels = kernels_here()
    return kernels if isinstance(kernels, str) else kernels.refusal(lhs, rhs, accumulator, scales=scales) or kernels


def kernels_here() -> ModuleType | str:
    """Returns the module of the kernel of the current target, or why there is none."""
    target = Target.current()
    if target.platform not in ("tpu", "gpu"):
        return f"the kernels are for TPUs and Hopper GPUs, and this is a {target.platform}; take 'xla' or None"
    if jax.__version_info__ < (0, 11, 2):
        return f"the kernels need jax >= 0.11.2, and this is {jax.__version__}"
    return importlib.import_module(f"qjax._kernels._{target.platform}")


def _products(lhs, rhs, accumulator: Accumulator):
    """Returns XLA's product of two chunks in the narrowest dtypes that it is fast in."""
    if register_of(accumulator).sums == np.int32:
        return _int16.product if lhs.dtype == rhs.dtype == np.int16 else _reference.dot
    if lhs.dtype == rhs.dtype == jnp.bfloat16:
        return _reference.dot
    return None
