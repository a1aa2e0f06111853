"""Torch modules on top of :mod:`lightning_msnn.functional`: neurons, projections, token mixers, blocks."""

from lightning_msnn.nn.blocks import MLP, Block, Encoder, PatchMerging, Stem
from lightning_msnn.nn.mixers import CONTEXTS, ConvMixer, Synapse
from lightning_msnn.nn.neuron import CoupledMembrane, FixedDecay, LearntDecay, Membrane, Spike, make_decay
from lightning_msnn.nn.projection import LearntProjection, Projection, make_projection

__all__ = [
    "CONTEXTS",
    "MLP",
    "Block",
    "ConvMixer",
    "CoupledMembrane",
    "Encoder",
    "FixedDecay",
    "LearntDecay",
    "LearntProjection",
    "Membrane",
    "PatchMerging",
    "Projection",
    "Spike",
    "Stem",
    "Synapse",
    "make_decay",
    "make_projection",
]
