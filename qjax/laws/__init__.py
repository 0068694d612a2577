"""Scaling laws of precision: the published ones as values, fits of them to runs, and the questions that they answer."""

from qjax.laws._fit import Fit, fit, fit_two_stage
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
