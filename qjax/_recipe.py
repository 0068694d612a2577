"""``Gemm`` and ``Recipe``: what is quantized in the three products of a linear operation, and how each accumulates."""

import dataclasses
from typing import Literal, TypeGuard

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array

from qjax._accumulator import Accumulator
from qjax._hadamard import Hadamard
from qjax._quantizer import Quantizer
from qjax.formats import Scaled

TENSORS = {"forward": ("lhs", "rhs"), "dlhs": ("gradient", "rhs"), "drhs": ("lhs", "gradient")}
"""Of which tensor the operands of each product are."""


def _check(caller: str, fields: dict, kind: type, what: str) -> None:
    for name, value in fields.items():
        if value is not None and not isinstance(value, kind):
            raise TypeError(f"{caller}: {name} must be {what} or None, got {value!r}.")


def _rounds(part) -> TypeGuard[Quantizer]:
    return isinstance(part, Quantizer)


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Gemm:
    """One product of two operands: what each is rounded to, and how the products are summed.

    Args:
      lhs, rhs: the ``Quantizer`` of each operand, None to leave it as it is. Blocks lie along the contraction.
      accumulator: the ``Accumulator``, None for the sum of the hardware in float32 (float64 for such operands).
      rotate: a ``Hadamard`` of both operands along the contraction, before they are rounded.
      rotate_lhs, rotate_rhs: a ``Hadamard`` of one operand along its other axes, undone on the result.

    >>> import qjax
    >>> e4m3 = qjax.Quantizer("e4m3_tensor")
    >>> qjax.Gemm(e4m3, e4m3).is_empty
    False
    """

    lhs: Quantizer | None = None
    rhs: Quantizer | None = None
    accumulator: Accumulator | None = None
    rotate: Hadamard | None = None
    rotate_lhs: Hadamard | None = None
    rotate_rhs: Hadamard | None = None

    def __post_init__(self):
        _check("Gemm", {"lhs": self.lhs, "rhs": self.rhs}, Quantizer, "a Quantizer")
        _check("Gemm", {"accumulator": self.accumulator}, Accumulator, "an Accumulator")
        rotations = {name: getattr(self, name) for name in ("rotate", "rotate_lhs", "rotate_rhs")}
        _check("Gemm", rotations, Hadamard, "a Hadamard")

    @property
    def is_empty(self) -> bool:
        """Whether it is a product as the hardware does it."""
        return self == Gemm()

    @property
    def is_stochastic(self) -> bool:
        """Whether it needs a key."""
        return any(part is not None and part.is_stochastic for part in vars(self).values())

    def swapped(self) -> "Gemm":
        """Returns it for the operands in the other order."""
        return dataclasses.replace(
            self, lhs=self.rhs, rhs=self.lhs, rotate_lhs=self.rotate_rhs, rotate_rhs=self.rotate_lhs
        )


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Recipe:
    """What is quantized in the three products of a linear operation ``out = lhs rhs``.

    Args:
      forward: ``out = lhs rhs``.
      dlhs: the gradient of lhs: its lhs is the gradient of out, its rhs is rhs.
      drhs: the gradient of rhs: its lhs is lhs, its rhs is the gradient of out.
      save_lhs, save_rhs: what is kept of an operand for the backward pass. None: the operand itself, so that each
        gradient product rounds it afresh, in blocks along its own contraction. A ``Quantizer``: real storage, the
        ``QTensor`` of ``encode``. "quantized": what the forward product got, rounded and rotated; the gradient
        then passes through the estimator and is rotated back.
      history: for delayed scaling, over how many steps the largest magnitude of a tensor is taken. The scales of all
        operands, which must be ``Scaled`` with one a tensor, then follow from the ``state`` that the product is given
        (``init`` makes the first), and the new state is what the gradient with respect to the state is.

    An empty recipe is lax, bit for bit.

    Raises:
      TypeError, ValueError: if the parts are none of these, or do not go together.

    >>> import qjax
    >>> e4m3, e5m2 = qjax.Quantizer("e4m3_tensor"), qjax.Quantizer("e5m2_tensor")
    >>> hybrid = qjax.Recipe(qjax.Gemm(e4m3, e4m3), qjax.Gemm(e5m2, e4m3), qjax.Gemm(e4m3, e5m2))
    >>> hybrid.is_empty, hybrid.is_stochastic
    (False, False)
    """

    forward: Gemm = Gemm()
    dlhs: Gemm = Gemm()
    drhs: Gemm = Gemm()
    save_lhs: Quantizer | Literal["quantized"] | None = None
    save_rhs: Quantizer | Literal["quantized"] | None = None
    history: int | None = None

    def __post_init__(self):
        gemms = {name: getattr(self, name) for name in ("forward", "dlhs", "drhs")}
        for name, gemm in gemms.items():
            if not isinstance(gemm, Gemm):
                raise TypeError(f"Recipe: {name} must be a Gemm, got {gemm!r}.")
        for name in ("save_lhs", "save_rhs"):
            value = getattr(self, name)
            if value != "quantized":
                _check("Recipe", {name: value}, Quantizer, "a Quantizer, 'quantized'")
        kept = "quantized" in (self.save_lhs, self.save_rhs)
        if (self.forward.rotate_lhs or self.forward.rotate_rhs) and kept:
            raise ValueError(
                "Recipe: rotate_lhs and rotate_rhs of forward cannot go with save='quantized'; use rotate."
            )
        if self.history is not None:
            if self.history < 1:
                raise ValueError(f"Recipe: history must be at least 1, got {self.history}.")
            for quantizer in (q for gemm in gemms.values() for q in (gemm.lhs, gemm.rhs) if q is not None):
                fmt = quantizer.fmt
                if not isinstance(fmt, Scaled) or fmt.block is not None or isinstance(fmt.element, Scaled):
                    raise ValueError(f"Recipe: delayed scaling (history) needs one scale a tensor, got {fmt!r}.")

    @property
    def is_empty(self) -> bool:
        """Whether it is lax, bit for bit."""
        return self == Recipe()

    @property
    def is_stochastic(self) -> bool:
        """Whether it needs a key."""
        saved = (self.save_lhs, self.save_rhs)
        return any(part.is_stochastic for part in (self.forward, self.dlhs, self.drhs)) or any(
            isinstance(part, Quantizer) and part.is_stochastic for part in saved
        )

    @property
    def draws_by_place(self) -> bool:
        """Whether what it draws follows from the places of elements in whole arrays, also under ``shard_map``."""
        return any(q.spec is not None for q in self._quantizers) and not any(
            part.is_stochastic and (isinstance(part, Accumulator) or part.spec is None)
            for part in (*self._quantizers, *self._accumulators)
        )

    @property
    def _quantizers(self) -> list[Quantizer]:
        parts = [part for gemm in (self.forward, self.dlhs, self.drhs) for part in (gemm.lhs, gemm.rhs)]
        return list(filter(_rounds, (*parts, self.save_lhs, self.save_rhs)))

    @property
    def _accumulators(self) -> list[Accumulator]:
        found = [gemm.accumulator for gemm in (self.forward, self.dlhs, self.drhs)]
        return [part for part in found if part is not None]

    def sharded(self, lhs: PartitionSpec, rhs: PartitionSpec, out: PartitionSpec) -> "Recipe":
        """Returns it for a product under ``jax.shard_map`` whose arrays are split over mesh axes as the specs say.

        Every operand then is rounded to its part of what one device would round it to, in all three products: shared
        scales are those of the whole, and stochastic bits follow from the places of elements in it. The gradient of an
        array is split as the array is. Sums over a contraction that is split stay with the program (``jax.lax.psum``).

        Args:
          lhs, rhs, out: how the operands and the result of lax's product lie; axes without an entry are whole.

        Raises:
          TypeError: if a spec is none.
          ValueError: for a stochastic accumulator, whose register sums what a device has.

        >>> from jax import P
        >>> from qjax import recipes
        >>> recipe = recipes.MXFP4_STOCHASTIC.sharded(lhs=P("data"), rhs=P(), out=P("data"))
        >>> recipe.drhs.rhs.spec
        P('data',)
        """
        specs = {"lhs": lhs, "rhs": rhs, "gradient": out}
        for spec in specs.values():
            if not isinstance(spec, PartitionSpec):
                raise TypeError(f"Recipe.sharded: lhs, rhs and out must be a jax.P, got {spec!r}.")
        if any(part.is_stochastic for part in self._accumulators):
            raise ValueError(
                "Recipe.sharded: the recipe has a stochastic accumulator, whose bits depend on the mesh; take one "
                "that rounds deterministically, or give the specs to its quantizers (Quantizer(spec=...))."
            )

        def placed(whole, **tensors: str):
            parts = {name: getattr(whole, name) for name in tensors}
            found = {n: dataclasses.replace(q, spec=specs[tensors[n]]) for n, q in parts.items() if _rounds(q)}
            return dataclasses.replace(whole, **found)

        gemms = {n: placed(getattr(self, n), lhs=first, rhs=second) for n, (first, second) in TENSORS.items()}
        return placed(dataclasses.replace(self, **gemms), save_lhs="lhs", save_rhs="rhs")

    def swapped(self) -> "Recipe":
        """Returns it for the operands in the other order."""
        return dataclasses.replace(
            self,
            forward=self.forward.swapped(),
            dlhs=self.drhs.swapped(),
            drhs=self.dlhs.swapped(),
            save_lhs=self.save_rhs,
            save_rhs=self.save_lhs,
        )

    def init(self) -> dict[str, Array]:
        """Returns the state of delayed scaling before the first step: the largest magnitudes of lhs, rhs and gradient.

        Zeros stand for steps that are yet to come; while there are only such, the scale is 1.

        Raises:
          ValueError: if the recipe has no history.

        >>> from qjax import recipes
        >>> recipes.FP8_DELAYED.init()["lhs"].shape
        (1024,)
        """
        if self.history is None:
            raise ValueError("Recipe.init: the recipe has no state; give it a history for delayed scaling.")
        return {name: jnp.zeros(self.history, jnp.float32) for name in ("lhs", "rhs", "gradient")}
