"""Trained networks for other runtimes: ONNX, programs of torch, NIR, weights in 8 bits.

>>> from lightning_msnn.export import export
>>> report = export("msnn_resnet12_tiny_digits", to="onnx", out="digits.onnx")  # doctest: +SKIP
>>> report.differ, report.images  # doctest: +SKIP
(0, 359)

On the command line: ``lightning-msnn export SOURCE --to FORMAT --out PATH``.
"""

from lightning_msnn.export.exporting import FORMATS, Format, Report, export
from lightning_msnn.export.source import Source, read_source
from lightning_msnn.export.weights import load_weights

__all__ = ["FORMATS", "Format", "Report", "Source", "export", "load_weights", "read_source"]
