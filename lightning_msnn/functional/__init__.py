"""Pure functions of tensors: spikes, projections, windows and membrane scans. No module, no state."""

from lightning_msnn.functional.membrane import coupled_scan, leak, recurrent_scan, scan
from lightning_msnn.functional.projection import (
    PROJECTIONS,
    exponential,
    mean,
    none,
    piecewise_linear,
    polynomial,
    sine,
    tanh,
)
from lightning_msnn.functional.spike import (
    SOFT,
    SURROGATES,
    anneal,
    arctan,
    graded,
    heaviside,
    ramp,
    rectangular,
    rectifier,
    sigmoid,
    triangular,
)
from lightning_msnn.functional.windows import WINDOWS, count, merge, side, split

__all__ = [
    "PROJECTIONS",
    "SOFT",
    "SURROGATES",
    "WINDOWS",
    "anneal",
    "arctan",
    "count",
    "coupled_scan",
    "exponential",
    "graded",
    "heaviside",
    "leak",
    "mean",
    "merge",
    "none",
    "piecewise_linear",
    "polynomial",
    "ramp",
    "rectangular",
    "rectifier",
    "recurrent_scan",
    "scan",
    "side",
    "sigmoid",
    "sine",
    "split",
    "tanh",
    "triangular",
]
