"""One product, of a ``dot_general`` or convolution equation, as a ``Gemm`` has it."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from qjax import _carrier, _operand, _rows, _stored
from qjax._accumulated import Source, accumulated, check_register
from qjax._kernels._reference import dot, is_trusted
from qjax._kernels._target import Target
from qjax._operand import Operand
from qjax._quantizer import Quantizer
from qjax._recipe import Gemm
from qjax._split import run, split_of
from qjax._stored import Axes


def rotated(x, rotation, axes: Axes, key, inverse: bool = False, free: bool = False):
    """Returns x rotated (if rotation is not None) along its contraction, or along its free axes."""
    if rotation is None:
        return x
    if free:
        axes = Axes(axes.free, axes.batch, axes.contract)
    elif axes.block is not None:
        axes = Axes((axes.block,), axes.batch, tuple(a for a in axes.order if a != axes.block))
    turn = rotation.inverse if inverse else rotation
    return _stored.from_rows(turn(_stored.to_rows(x, axes), key=key), axes, x.shape)


def product(equation, gemm: Gemm, lhs, rhs, given: dict, kept: list | None = None):
    """Returns the product of an equation as a Gemm has it, in the dtype of the equation.

    Args:
      given: the keys of the stochastic parts of the Gemm by name, scales that replace the computed ones, and what the
        operands are stored in.
      kept: gets the two operands, with the slopes of their estimators, if given.
    """
    if gemm.is_empty:
        if kept is not None:
            kept += [Operand(lhs), Operand(rhs)]
        return equation.primitive.bind(lhs, rhs, **equation.params)
    is_dot = equation.primitive is lax.dot_general_p
    axes = _rows.axes_of(equation)
    groups = 1 if is_dot else equation.params["feature_group_count"]
    if not is_dot and (gemm.rotate_lhs or gemm.rotate_rhs or (gemm.rotate and groups > 1)):
        raise ValueError(
            "conv_general_dilated: a convolution can be rotated along its features alone (rotate), and not in groups."
        )
    promote = gemm.accumulator.promote if gemm.accumulator and is_dot else None
    _check_split(equation, gemm, (lhs, rhs), axes)
    operands, sources = [], []
    for name, array, where in zip(("lhs", "rhs"), (lhs, rhs), axes, strict=True):
        quantizer, turn = getattr(gemm, name), getattr(gemm, f"rotate_{name}")
        x = rotated(array, gemm.rotate, where, given["rotate"])
        x = rotated(x, turn, where, given[f"rotate_{name}"], free=True)
        options: dict[str, Any] = dict(key=given[name], scale=given[f"{name}_scale"], with_slope=kept is not None)
        stored = given[f"{name}_stored"]
        if quantizer is not None and _stored.is_stored(stored, quantizer, where):
            if x is not array or options["scale"] is not None:
                raise ValueError(
                    f"quantize: {name} is stored in {quantizer.fmt!r}, and its recipe rotates it or takes a delayed "
                    "scale before it rounds to that; leave it in floating point (None in the rule of quantize_params)."
                )
            options["stored"] = stored
        if groups > 1 and name == "lhs" and quantizer is not None:
            operand = _grouped(x, quantizer, where, groups, options)
        else:
            operand = _operand.quantized(x, quantizer, where, promote=promote, **options)
        # Neighbouring windows share elements: only one scale for all of them can be taken out of the sum.
        if not is_dot and name == "lhs" and operand.scale is not None and operand.scale.size > 1:
            assert quantizer is not None
            operand = Operand(operand.value, fmt=quantizer.fmt, slope=operand.slope)
        operands.append(operand)
        sources.append(Source(x, quantizer, options.get("stored")))
        if kept is not None:
            kept.append(operand)
    if gemm.accumulator is not None:
        check_register("dot_general" if is_dot else "conv_general_dilated", gemm.accumulator, operands)
        how = dict(key=given["accumulator"], implementation=given.get("implementation"))
        out = accumulated(equation, gemm.accumulator, operands, sources, axes, **how)
    else:
        out = _narrow(equation, axes, operands, given.get("implementation"))
    for operand, scale_shape in zip(operands, _scale_shapes(equation, axes), strict=True):
        if operand.scale is not None:
            out = _carrier.apart(out * scale_shape(operand.scale))
    dtype = equation.outvars[0].aval.dtype
    out = out.astype(dtype)
    start = len(axes[0].batch)
    for turn, where, key in (
        (gemm.rotate_lhs, axes[0], given["rotate_lhs"]),
        (gemm.rotate_rhs, axes[1], given["rotate_rhs"]),
    ):
        mine = tuple(range(start, start + len(where.free)))
        out = rotated(out, turn, Axes(mine, (), tuple(a for a in range(out.ndim) if a not in mine)), key, inverse=True)
        start += len(where.free)
    return out


def swapped(given: dict) -> dict:
    """Returns what ``Gemm.swapped()`` is given."""
    pairs = {"lhs": "rhs", "rotate_lhs": "rotate_rhs", "lhs_scale": "rhs_scale", "lhs_stored": "rhs_stored"}
    pairs |= {b: a for a, b in pairs.items()}
    return {name: given[pairs.get(name, name)] for name in given}


def _check_split(equation, gemm: Gemm, arrays: tuple, axes: tuple[Axes, Axes]) -> None:
    """Raises if a product of arrays that are split over a mesh is not that of their parts."""
    for name, x, where in zip(("lhs", "rhs"), arrays, axes, strict=True):
        quantizer = getattr(gemm, name)
        if quantizer is None or quantizer.spec is None:
            continue
        if equation.params.get("feature_group_count", 1) * equation.params.get("batch_group_count", 1) > 1:
            raise ValueError("conv_general_dilated: a convolution in groups takes no spec; leave it out.")
        split = split_of("Quantizer", quantizer.spec, x.ndim)
        for turn, along in ((gemm.rotate, where.contract), (getattr(gemm, f"rotate_{name}"), where.free)):
            together = run([x.shape[a] for a in along], tuple(split[a] for a in along))
            if turn is not None and any(split[a] for a in along) and together % turn.size:
                raise ValueError(
                    f"dot_general: {name} has {together} elements together on a device, not a multiple of the size of "
                    f"{turn!r}; give each device whole blocks."
                )


def by_groups(x, axes: Axes, groups: int) -> tuple[jax.Array, Axes]:
    """Returns the lhs of a grouped convolution with the groups as an axis, and its axes: blocks lie within a group."""
    (feature,) = axes.contract
    split = x.reshape(*x.shape[:feature], groups, x.shape[feature] // groups, *x.shape[feature + 1 :])
    return split, Axes((feature + 1,), (), tuple(a for a in range(split.ndim) if a != feature + 1))


def _grouped(x, quantizer: Quantizer, axes: Axes, groups: int, options: dict) -> Operand:
    """Returns the lhs of a grouped convolution as an operand."""
    split, within = by_groups(x, axes, groups)
    operand = _operand.quantized(split, quantizer, within, **options)
    slope = None if operand.slope is None else operand.slope.reshape(x.shape)
    if operand.scale is not None and operand.scale.size == 1:
        elements, scale = operand.elements.reshape(x.shape), operand.scale.reshape((1,) * x.ndim)
        return Operand(elements, scale, fmt=operand.fmt, slope=slope)
    return Operand(operand.value.reshape(x.shape), fmt=quantizer.fmt, slope=slope)


def _narrow(equation, axes: tuple[Axes, Axes], operands: list[Operand], implementation: str | None):
    """Returns the product of the elements, in a narrow dtype that holds both exactly."""
    lhs, rhs = operands
    dtype, total = _dtype(equation, axes, operands)
    params = equation.params
    if implementation == "reference":
        dtype = total = np.dtype(np.float32)
        params |= {"precision": lax.Precision.HIGHEST}
    elif params["precision"] is None and dtype == np.float32:
        params |= {"precision": (lax.Precision.HIGHEST,) * 2}  # some devices would multiply with fewer bits
    x, y = _operand.held(lhs.elements, lhs.fmt, dtype), _operand.held(rhs.elements, rhs.fmt, dtype)
    sizes = (math.prod(z.shape[a] for a in w.free) for z, w in zip((x, y), axes, strict=True))
    depth = math.prod(x.shape[a] for a in axes[0].contract)
    if equation.primitive is lax.dot_general_p and not is_trusted(dtype, *sizes, depth):
        x, y, output = _rows.dot_rows(equation, x, y)
        out = output(dot(x, y))
    else:
        out = equation.primitive.bind(x, y, **params | {"preferred_element_type": total})
    if dtype == jnp.bfloat16:
        # XLA's CPU backend folds a later transposition into the product, and then has no code for it.
        out = lax.optimization_barrier(out)
    if dtype == np.int8:
        unit = 2.0 ** (_operand.lowest_bit(lhs.fmt) + _operand.lowest_bit(rhs.fmt))
        return out.astype(np.float32) * np.float32(unit)
    return out


def _dtype(equation, axes: tuple[Axes, Axes], operands: list[Operand]) -> tuple[np.dtype, np.dtype]:
    """Returns the dtype in which to multiply, and that in which to sum.

    The CPU is slow where others are not: in bfloat16 and int8 where the lhs is not contracted over its last axis, and
    in the gradients of int8 convolutions. There float32 or bfloat16 is taken instead. Products of int8 are summed
    exactly in any case, but for convolutions: up to 2^10 of them are below 2^24.
    """
    wide = np.dtype(np.float64 if any(o.elements.dtype == np.float64 for o in operands) else np.float32)
    precision = equation.params["precision"]
    if precision is not None and not isinstance(precision, lax.Precision | tuple):
        return wide, wide
    narrow = {
        np.dtype(jnp.bfloat16) if o.elements.dtype == jnp.bfloat16 else _operand.narrow_dtype(o.fmt, wide)
        for o in operands
    }
    is_dot, on_cpu = equation.primitive is lax.dot_general_p, Target.current().platform == "cpu"
    depth = math.prod(equation.invars[0].aval.shape[a] for a in axes[0].contract)
    if narrow == {np.dtype(np.int8)} and is_dot and ((2**10 if on_cpu else 0) < depth < 2**17):
        return np.dtype(np.int8), np.dtype(np.int32)
    last = axes[0].contract == (equation.invars[0].aval.ndim - 1,)
    if narrow <= {np.dtype(np.int8), np.dtype(jnp.bfloat16)} and not (on_cpu and is_dot and not last):
        return np.dtype(jnp.bfloat16), np.dtype(np.float32)
    return wide, wide


def _scale_shapes(equation, axes: tuple[Axes, Axes]):
    """Returns for each operand the function that brings its scale to the axes of the result."""
    ndim = equation.outvars[0].aval.ndim
    if equation.primitive is lax.dot_general_p:
        batch, mine, other = len(axes[0].batch), len(axes[0].free), len(axes[1].free)

        def of_lhs(scale):
            kept = lax.transpose(scale, axes[0].order).reshape([scale.shape[a] for a in axes[0].order[: batch + mine]])
            return kept.reshape(*kept.shape, *(1,) * other)

        def of_rhs(scale):
            kept = [scale.shape[a] for a in axes[1].order[: batch + other]]
            return lax.transpose(scale, axes[1].order).reshape(*kept[:batch], *(1,) * mine, *kept[batch:])

        return of_lhs, of_rhs
    numbers = equation.params["dimension_numbers"]

    def of_kernel(scale):
        shape = [1] * ndim
        shape[numbers.out_spec[1]] = scale.shape[numbers.rhs_spec[0]]
        return scale.reshape(shape)

    return (lambda scale: scale.reshape((1,) * ndim)), of_kernel
