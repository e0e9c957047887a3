"""Results of evaluations on the card: the merged model's beside its parents', from the files of their programs."""

from __future__ import annotations

from hubmerge.evaluation.comparison import Comparison, Mean, Omission, Regression, Row, compare
from hubmerge.evaluation.publishing import RESULTS_FOLDER, model_index, result_files
from hubmerge.evaluation.table import Table, table

__all__ = [
    "RESULTS_FOLDER",
    "Comparison",
    "Mean",
    "Omission",
    "Regression",
    "Row",
    "Table",
    "compare",
    "model_index",
    "result_files",
    "table",
]
