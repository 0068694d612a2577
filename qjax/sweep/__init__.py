"""Many training runs: designs as plain data, and sweeps through any executor that can be killed and resumed."""

from qjax.sweep._design import grid, random
from qjax.sweep._sweep import rows, sweep

__all__ = ["grid", "random", "rows", "sweep"]
