"""Any network with rectifiers becomes a spiking one of one time step."""

from lightning_msnn.conversion.converting import baselines, calibrate, convert, converted_layers, make_layers_spiking
from lightning_msnn.conversion.layers import SpikingLayer, revert
from lightning_msnn.conversion.neuron import RectifierSpike, quantiser
from lightning_msnn.conversion.registry import adopt, image_shape
from lightning_msnn.conversion.sources import SmallImageResNet
from lightning_msnn.conversion.tracing import Plan, Row, trace

__all__ = [
    "Plan",
    "RectifierSpike",
    "Row",
    "SmallImageResNet",
    "SpikingLayer",
    "adopt",
    "baselines",
    "calibrate",
    "convert",
    "converted_layers",
    "image_shape",
    "make_layers_spiking",
    "quantiser",
    "revert",
    "trace",
]
