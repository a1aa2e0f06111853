"""Torch modules on top of :mod:`lightning_msnn.functional`: neurons, projections, blocks, what token mixers share."""

from lightning_msnn.nn.blocks import MLP, AnalogueMLP, BernoulliEncoder, Block, Encoder, PatchMerging, Stem
from lightning_msnn.nn.layer import fire
from lightning_msnn.nn.mixer import CONTEXTS, Mixer
from lightning_msnn.nn.neuron import FixedDecay, LearntDecay, Membrane, Neuron, Rectifier, Spike, set_annealing
from lightning_msnn.nn.projection import LearntProjection, Projection
from lightning_msnn.nn.synapse import Synapse

__all__ = [
    "CONTEXTS",
    "MLP",
    "AnalogueMLP",
    "BernoulliEncoder",
    "Block",
    "Encoder",
    "FixedDecay",
    "LearntDecay",
    "LearntProjection",
    "Membrane",
    "Mixer",
    "Neuron",
    "PatchMerging",
    "Projection",
    "Rectifier",
    "Spike",
    "Stem",
    "Synapse",
    "fire",
    "set_annealing",
]
