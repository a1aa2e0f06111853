"""Torch modules on top of :mod:`lightning_msnn.functional`: neurons, projections, token mixers, blocks."""

from lightning_msnn.nn.blocks import (
    MLP,
    AnalogueMLP,
    BernoulliEncoder,
    Block,
    Encoder,
    PatchMerging,
    Position,
    RecurrentBlock,
    Stem,
)
from lightning_msnn.nn.mixers import CELLS, CONTEXTS, AttentionMixer, ConvMixer, Recurrence, RecurrentMixer
from lightning_msnn.nn.neuron import (
    CoupledMembrane,
    FixedDecay,
    LearntDecay,
    Membrane,
    Neurons,
    Rectifier,
    RecurrentMembrane,
    Spike,
    make_decay,
    set_annealing,
)
from lightning_msnn.nn.projection import LearntProjection, Projection, make_projection
from lightning_msnn.nn.synapse import Synapse

__all__ = [
    "CELLS",
    "CONTEXTS",
    "MLP",
    "AnalogueMLP",
    "AttentionMixer",
    "BernoulliEncoder",
    "Block",
    "ConvMixer",
    "CoupledMembrane",
    "Encoder",
    "FixedDecay",
    "LearntDecay",
    "LearntProjection",
    "Membrane",
    "Neurons",
    "PatchMerging",
    "Position",
    "Projection",
    "Rectifier",
    "Recurrence",
    "RecurrentBlock",
    "RecurrentMembrane",
    "RecurrentMixer",
    "Spike",
    "Stem",
    "Synapse",
    "make_decay",
    "make_projection",
    "set_annealing",
]
