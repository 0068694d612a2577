"""Scaling laws of precision: the published ones as values, fits of them to runs, and the questions that they answer."""

from qjax.laws._allocation import Allocation, iso_compute, iso_loss, optimal_allocation
from qjax.laws._bootstrap import Bootstrap, bootstrap
from qjax.laws._compare import Score, cross_validate, r_squared
from qjax.laws._fit import Fit, fit, fit_two_stage
from qjax.laws._forms import *  # noqa: F403
from qjax.laws._forms import __all__ as _forms
from qjax.laws._law import Column, Law, Model, Parameter
from qjax.laws._plots import plot_fit, plot_iso_loss, plot_pareto, plot_residuals
from qjax.laws._questions import Split, critical_data_size, effective_parameters, optimal_precision, optimal_split

__all__ = [
    "Allocation",
    "Bootstrap",
    "Column",
    "Fit",
    "Law",
    "Model",
    "Parameter",
    "Score",
    "Split",
    "bootstrap",
    "critical_data_size",
    "cross_validate",
    "effective_parameters",
    "fit",
    "fit_two_stage",
    "iso_compute",
    "iso_loss",
    "optimal_allocation",
    "optimal_precision",
    "optimal_split",
    "plot_fit",
    "plot_iso_loss",
    "plot_pareto",
    "plot_residuals",
    "r_squared",
]
__all__ += _forms
