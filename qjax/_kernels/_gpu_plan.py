"""How a Hopper kernel walks along the contraction: steps of the pipeline, and the chunks and segments that they end."""

from typing import NamedTuple

from qjax._accumulator import Accumulator
from qjax._kernels import _reference
from qjax._kernels._tiles import whole
from qjax.formats import Format


class Tiles(NamedTuple):
    """The tile of the result that a block of the grid computes, and its pipeline.

    Attributes:
      groups: warpgroups that compute, each 64 rows of the tile.
      columns: the columns of the tile, a multiple of 8.
      bytes: how much of each row a step of the pipeline reads at most.
      stages: of how many steps the operands are in shared memory at a time.
      splits: how many blocks share the contraction of a tile, each of which sums whole segments.
    """

    groups: int
    columns: int
    bytes: int
    stages: int
    splits: int = 1

    @property
    def rows(self) -> int:
        return 64 * self.groups


class Plan(NamedTuple):
    """The steps of a contraction, or of the part of it that a block sums.

    Attributes:
      depth: products that a step sums.
      steps: how many steps there are; zeros pad the last ones.
      pieces: steps of a chunk.
      length: chunks of a segment.
      splits: how many such parts there are.
    """

    depth: int
    steps: int
    pieces: int
    length: int
    splits: int = 1

    @property
    def chunks(self) -> int:
        return -(-self.steps // self.pieces)

    @property
    def segments(self) -> int:
        return -(-self.chunks // self.length)

    @property
    def holds_parts(self) -> bool:
        """Whether the sum of a chunk goes from step to step."""
        return self.pieces > 1

    @property
    def holds_total(self) -> bool:
        """Whether the total of what is promoted goes from step to step."""
        return self.segments > 1

    @property
    def whole(self) -> int:
        """The length of the contraction, padded."""
        return self.depth * self.steps * self.splits

    def split(self, splits: int) -> "Plan":
        """Returns the plan of each of so many parts, or of fewer, of two segments at least."""
        per = self.pieces * self.length
        splits = max(min(splits, self.segments // 2), 1)
        steps = self.steps if splits == 1 else -(-self.steps // (splits * per)) * per
        return self._replace(steps=steps, splits=splits)

    def segment(self, step):
        return step // (self.pieces * self.length)

    def ends_chunk(self, step):
        """Returns whether a step ends a chunk: known, or of a traced step."""
        return self.pieces == 1 or ((step + 1) % self.pieces == 0) | (step == self.steps - 1)

    def ends_segment(self, step):
        """Returns whether a step that ends a chunk ends a segment."""
        return self.length == 1 or ((step + 1) % (self.pieces * self.length) == 0) | (step == self.steps - 1)


def unit(bits: int) -> int:
    """Returns how many products of elements of so many bits the tensor cores sum at a time."""
    return 256 // bits


def plan(accumulator: Accumulator, depth: int, bits: int, most: int) -> Plan:
    """Returns the steps of a contraction.

    Args:
      bits: those of the elements that the tensor cores multiply.
      most: bytes of a row that a step may read of them.
    """
    chunk, segment, segments = _reference.divided(accumulator, depth)
    most = most * 8 // bits
    if chunk == segment and segments == 1:
        # The only chunk, which zeros make longer.
        chunk = segment = whole(chunk, most if chunk > most else unit(bits))
    of_step = next(n for n in range(min(most, chunk), 0, -unit(bits)) if chunk % n == 0)
    return Plan(of_step, max(-(-depth // of_step), 1), chunk // of_step, segment // chunk)


def fitting(
    plan: Plan, accumulator: Accumulator, result: tuple[int, int, int], *, more: int = 0, weights: Format | None = None
) -> Tiles:
    """Returns the tiles that fit a multiprocessor's registers and shared memory.

    A warpgroup has about 220 registers a thread, and an array of 64 columns takes 32 of them.

    Args:
      result: b, rows and columns of the result.
      more: how many arrays more than one it takes to sum the products of a step.
      weights: the format of the codes of weights, if those are the rows, that few columns are multiplied by.
    """
    b, rows, columns = result
    state = plan.length > 1 if plan.holds_total else plan.chunks > 1
    arrays = 1 + more + plan.holds_parts + state + plan.holds_total
    width = 64 if arrays > 3 or accumulator.is_stochastic else 128
    if weights is None:
        return Tiles(2, width, DENSE, 3 if more > 1 else 4)
    width = next((n for n in (8, 16, 32, 64) if columns <= n), width)
    stages = int(min(190_000 * 8 // (plan.depth * (128 * weights.bits + 16 * width)), 12))
    blocks = b * -(-rows // 128) * -(-columns // width)
    return Tiles(2, width, 2 * plan.depth, stages, max(MULTIPROCESSORS // blocks, 1))


# Bytes of a row of the tensor cores' operands in a step: in general, and where they are made of codes.
DENSE, WEIGHTS = 128, 256
# Those of an H100, each of which has one block at a time.
MULTIPROCESSORS = 132
