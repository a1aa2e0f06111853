"""The zoo: trained networks by name, verified by hash, and their export from a Lightning checkpoint.

>>> from lightning_msnn import zoo
>>> zoo.load("msnn_resnet12_tiny.digits").num_classes
10

On the command line: ``lightning-msnn zoo list | info | verify | measure | export | card | table``.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from lightning_msnn.zoo.loading import fixed_images, info, list_models, load, transforms

if TYPE_CHECKING:
    from lightning_msnn.zoo.exporting import export, measure
    from lightning_msnn.zoo.verification import TOLERANCES, evaluate, test_data, verify

__all__ = [
    "TOLERANCES",
    "evaluate",
    "export",
    "fixed_images",
    "info",
    "list_models",
    "load",
    "measure",
    "test_data",
    "transforms",
    "verify",
]


def __getattr__(name: str) -> Any:
    # When they are asked for: they take data modules and checkpoints, and so Lightning, which loading does not.
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = "exporting" if name in ("export", "measure") else "verification"
    return getattr(import_module(f"{__name__}.{module}"), name)
