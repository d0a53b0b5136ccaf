"""Calibration: data in, ranges of activations out. Nothing here needs TVM."""

from tvm_hquant.calibration.data import open_data
from tvm_hquant.calibration.observers import OBSERVERS, Observer, make_observer
from tvm_hquant.calibration.samples import DataSource, Sample, Signature, count_samples
from tvm_hquant.calibration.split import (
    DataSplit,
    count_shared_samples,
    first_samples,
    split_calibration,
    two_fold,
)

__all__ = [
    "OBSERVERS",
    "DataSource",
    "DataSplit",
    "Observer",
    "Sample",
    "Signature",
    "count_samples",
    "count_shared_samples",
    "first_samples",
    "make_observer",
    "open_data",
    "split_calibration",
    "two_fold",
]
