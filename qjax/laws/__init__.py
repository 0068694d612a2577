"""Scaling laws of precision: the published ones as values, fits of them to runs, and the questions that they answer."""

from qjax.laws._allocation import Allocation, iso_compute, iso_loss, optimal_allocation
from qjax.laws._bootstrap import Bootstrap, bootstrap
from qjax.laws._compare import Score, cross_validate, r_squared
from qjax.laws._fit import Fit, fit
from qjax.laws._forms import (
    CHINCHILLA,
    CHINCHILLA_REPLICATION,
    FLOAT_QUANTIZATION,
    POST_TRAINING,
    POWER,
    PRECISION,
    QAT_W4A4,
    QAT_W4A4_FC2_8BIT,
    QAT_W4A16,
    QAT_W16A4,
    QAT_W16A4_FC2_8BIT,
    QUARTET,
    QUEST,
    SATURATING_POWER,
)
from qjax.laws._law import Column, Law, Model, Parameter
from qjax.laws._plots import plot_fit, plot_iso_loss, plot_pareto, plot_residuals
from qjax.laws._questions import Split, critical_data_size, effective_parameters, optimal_precision, optimal_split
from qjax.laws._two_stage import fit_two_stage

__all__ = [
    "CHINCHILLA",
    "CHINCHILLA_REPLICATION",
    "FLOAT_QUANTIZATION",
    "POST_TRAINING",
    "POWER",
    "PRECISION",
    "QAT_W4A4",
    "QAT_W4A4_FC2_8BIT",
    "QAT_W4A16",
    "QAT_W16A4",
    "QAT_W16A4_FC2_8BIT",
    "QUARTET",
    "QUEST",
    "SATURATING_POWER",
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
