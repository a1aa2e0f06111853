"""Image files, and data modules that are ready, for the tests beside it."""

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import numpy as np
from PIL import Image

from lightning_msnn.data import ArrayDataModule

MakeTree = Callable[..., Path]
Module = TypeVar("Module", bound=ArrayDataModule)


def write_image(path: Path, seed: int, size: tuple[int, int] = (32, 32), mode: str = "RGB") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    shape = (size[1], size[0], 3) if mode == "RGB" else (size[1], size[0])
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8), mode).save(path)


def ready(module: Module) -> Module:
    module.prepare_data()
    module.setup()
    return module
