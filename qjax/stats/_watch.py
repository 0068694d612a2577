"""``Watch``: the statistics of a training run every so many steps, and where they go."""

import collections
import dataclasses
import functools
import json
import math
import pathlib
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from qjax.stats._observe import What, observe, probes
from qjax.stats._report import Report, report

Writer = Callable[[int, Report], None]


@dataclasses.dataclass(frozen=True)
class Watch:
    """Statistics of every ``every``-th step of a training run, from the forward and backward pass of that step.

    Args:
      what: as in ``observe``.
      every: the steps from one report to the next; None or 0 is off.
      write: gets (step, ``Report``) on the host, for example ``JsonLines("run.jsonl")``.
      parts: among how many reports the products are divided: each has every ``parts``-th, the next report the ones
        after, so that a report costs less and ``period`` steps have them all.
      strict: as in ``observe``.

    ``watch.value_and_grad(loss)`` takes the place of ``jax.value_and_grad(loss)`` and is called with the step before
    the arguments. Values and gradients are those without it. Off, it is ``jax.value_and_grad(loss)``: the program is
    the same, text for text. With a step that is a Python int (``i % watch.period`` as a static argument of a jitted
    step), a step without a report is that program, too. With a traced one, as in a scan, all programs are in one, under
    ``lax.switch``; ``vmap`` would run all of them always.

    >>> import jax, jax.numpy as jnp
    >>> from qjax import stats
    >>> loss = lambda w, x: jnp.mean((x @ w) ** 2)
    >>> seen = []
    >>> watch = stats.Watch("e4m3", every=2, write=lambda step, found: seen.append((step, len(found))))
    >>> @jax.jit
    ... def train(w, x):
    ...     def step(w, i):
    ...         value, gradient = watch.value_and_grad(loss)(i, w, x)
    ...         return w - 0.1 * gradient, value
    ...     return jax.lax.scan(step, w, jnp.arange(5))
    >>> w, values = train(jnp.ones((4, 2), jnp.float32), jnp.ones((3, 4), jnp.float32))
    >>> jax.effects_barrier()  # Reports come as they are ready: wait for the last.
    >>> sorted(seen)
    [(0, 6), (2, 6), (4, 6)]
    """

    what: What
    every: int | None
    write: Writer
    parts: int = 1
    strict: bool = True

    def __post_init__(self):
        if self.parts < 1 or (self.every or 0) < 0:
            raise ValueError(
                f"Watch: expected every >= 0 (0 or None is off) and parts >= 1, got {self.every} and {self.parts}."
            )

    @property
    def period(self) -> int:
        """The steps after which the reports have had all products."""
        return (self.every or 1) * self.parts

    def value_and_grad(self, loss: Callable, *, has_aux: bool = False) -> Callable:
        """Returns a function ``(step, *args)`` to the value and the gradient with respect to the first argument.

        If there is an nnx module among the arguments, it is that of ``nnx.value_and_grad``.
        """

        def watched(step, *args):
            flax = _nnx(args)
            transform = jax.value_and_grad if flax is None else flax.value_and_grad

            def plain(*args):
                return transform(loss, has_aux=has_aux)(*args)

            def seen(part, *args):
                def observed(first, zeros, *rest):
                    return observe(loss, self.what, zeros, strict=self.strict)(first, *rest)

                every = probes(loss, self.what, *args, strict=self.strict)
                zeros = collections.OrderedDict((name, every[name]) for name in list(every)[part :: self.parts])
                both = transform(observed, argnums=(0, 1), has_aux=has_aux)
                value, (gradient, found) = both(args[0], zeros, *args[1:])
                jax.debug.callback(self._written, step, found)
                return value, gradient

            if not self.every:
                return plain(*args)
            part = step // self.every % self.parts
            if isinstance(step, int):
                return plain(*args) if step % self.every else seen(part, *args)
            branches = [plain, *(functools.partial(seen, part) for part in range(self.parts))]
            index = jnp.where(step % self.every == 0, part + 1, 0)
            return (lax if flax is None else flax).switch(index, branches, *args)

        return watched

    def _written(self, step, found) -> None:
        self.write(int(step), report(found))


def _nnx(args: tuple) -> Any:
    """Returns flax.nnx if there is a module of it among the arguments."""
    if "flax.nnx" in sys.modules:
        from qjax import nnx

        if nnx.modules(args):
            return sys.modules["flax.nnx"]
    return None


@dataclasses.dataclass(frozen=True)
class JsonLines:
    """A writer that adds a line of JSON to a file for each operand: step, path, operand, format and the statistics.

    What is not finite is written as the string "inf", "-inf" or "nan", for JSON has no such numbers. Read it with
    ``pandas.read_json(path, lines=True)``. Lines come in the order in which the reports are ready.
    """

    path: str | pathlib.Path

    def __call__(self, step: int, found: Report) -> None:
        with open(self.path, "a") as file:
            for row in found.rows():
                cells = {name: x if isinstance(x, str) or math.isfinite(x) else str(x) for name, x in row.items()}
                file.write(json.dumps({"step": step, **cells}) + "\n")


def scalars(found: Report) -> dict[str, float]:
    """Returns the statistics of a report by "path/operand/statistic": what trackers of experiments take.

    >>> import jax.numpy as jnp
    >>> from qjax import stats
    >>> row = stats.scalars(stats.inspect(lambda x: jnp.sum(x @ x), "e4m3", jnp.ones((2, 2), jnp.float32)))
    >>> row["forward.lhs/underflows"]
    0.0
    """
    return {
        "/".join(filter(None, (path, operand, name))): value
        for (path, operand), s in found.items()
        for name, value in s.summary().items()
    }


@dataclasses.dataclass(frozen=True)
class Wandb:
    """A writer to the current run of Weights and Biases, with the names of ``scalars``; needs the package ``wandb``."""

    def __call__(self, step: int, found: Report) -> None:
        import wandb  # type: ignore[import-not-found]

        wandb.log(scalars(found), step=step)


@dataclasses.dataclass(frozen=True)
class TensorBoard:
    """A writer of event files for TensorBoard, with the names of ``scalars``; needs the package ``tensorboard``."""

    folder: str | pathlib.Path

    def __call__(self, step: int, found: Report) -> None:
        from tensorboard.compat.proto.event_pb2 import Event  # type: ignore[import-not-found]
        from tensorboard.compat.proto.summary_pb2 import Summary  # type: ignore[import-not-found]
        from tensorboard.summary.writer.event_file_writer import EventFileWriter  # type: ignore[import-not-found]

        writer = EventFileWriter(str(self.folder), filename_suffix=f".{step}")
        values = [Summary.Value(tag=name, simple_value=value) for name, value in scalars(found).items()]
        writer.add_event(Event(step=step, summary=Summary(value=values)))
        writer.close()
