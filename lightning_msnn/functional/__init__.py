"""Pure functions of tensors: spikes, projections, windows, membranes. No module, no state.

Each equation of the method stands here once. Three tables hold the definitions that have a name, and take yours::

    def larger(a, b, theta):  # no lambda, which a network could not be pickled with
        return torch.maximum(a, b)

    PROJECTIONS["larger"] = larger

- :data:`PROJECTIONS`: a function ``omega(a, b, theta)``, see :mod:`lightning_msnn.functional.projection`
- :data:`SURROGATES`: a function ``h(u - V)``, see :mod:`lightning_msnn.functional.spike`
- :data:`WINDOWS`: an object with the methods of :class:`~lightning_msnn.functional.windows.WindowKind`

A definition is found by its name from then on. It runs on these functions, in training too. Kernels cover the
projections ``sine`` and ``none`` and the surrogate ``triangular``.
"""

from lightning_msnn.functional.membrane import coupled_scan, recurrent_scan, scan
from lightning_msnn.functional.projection import (
    PROJECTIONS,
    WITHOUT_THETA,
    exponential,
    mean,
    none,
    piecewise_linear,
    polynomial,
    sine,
    tanh,
)
from lightning_msnn.functional.spike import SURROGATES, anneal, arctan, heaviside, rectangular, sigmoid, triangular
from lightning_msnn.functional.windows import WINDOWS, count, merge, split

__all__ = [
    "PROJECTIONS",
    "SURROGATES",
    "WINDOWS",
    "WITHOUT_THETA",
    "anneal",
    "arctan",
    "count",
    "coupled_scan",
    "exponential",
    "heaviside",
    "mean",
    "merge",
    "none",
    "piecewise_linear",
    "polynomial",
    "rectangular",
    "recurrent_scan",
    "scan",
    "sigmoid",
    "sine",
    "split",
    "tanh",
    "triangular",
]
