"""Trained networks for other runtimes: ONNX, programs of torch, NIR.

>>> from lightning_msnn.export import export
>>> report = export("msnn_resnet12_tiny.digits", to="onnx", out="digits.onnx")  # doctest: +SKIP
>>> report.differ, report.images  # doctest: +SKIP
(0, 359)

On the command line: ``lightning-msnn export SOURCE --to FORMAT --out PATH``.
"""

from lightning_msnn.export.exporting import FORMATS, Format, Report, export

__all__ = ["FORMATS", "Format", "Report", "export"]
