"""Pure functions of tensors: spikes, projections, windows, membranes. No module, no state.

Each equation of the method stands here once. Four tables hold what has a name in configurations, and take others::

    def larger(a, b, theta):  # no lambda, which a network could not be pickled with
        return torch.maximum(a, b)

    PROJECTIONS["larger"] = larger

========================  ======================================================================================
:data:`PROJECTIONS`       a function ``omega(a, b, theta)``: see :mod:`lightning_msnn.functional.projection`
:data:`SURROGATES`        a function ``h(u - V)``: see :mod:`lightning_msnn.functional.spike`
:data:`WINDOWS`           an object with the methods of :class:`~lightning_msnn.functional.windows.WindowKind`
:data:`NEURONS`           a :class:`~lightning_msnn.functional.neuron.NeuronModel`
========================  ======================================================================================

What is added is found by its name from then on. It runs on these functions, in training too, since the kernels know
their own alone; so does another definition under a name that is there already.
"""

from lightning_msnn.functional.membrane import (
    coupled_scan,
    hard_reset,
    isolated,
    over_time,
    recurrent_scan,
    scan,
    shared,
    soft_reset,
)
from lightning_msnn.functional.neuron import NEURONS, NeuronModel
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
    "NEURONS",
    "PROJECTIONS",
    "SOFT",
    "SURROGATES",
    "WINDOWS",
    "WITHOUT_THETA",
    "NeuronModel",
    "anneal",
    "arctan",
    "count",
    "coupled_scan",
    "exponential",
    "graded",
    "hard_reset",
    "heaviside",
    "isolated",
    "mean",
    "merge",
    "none",
    "over_time",
    "piecewise_linear",
    "polynomial",
    "ramp",
    "rectangular",
    "rectifier",
    "recurrent_scan",
    "scan",
    "shared",
    "side",
    "sigmoid",
    "sine",
    "soft_reset",
    "split",
    "tanh",
    "triangular",
]
