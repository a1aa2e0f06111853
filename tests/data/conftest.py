"""Tiny data sets on disk."""

from collections.abc import Sequence
from pathlib import Path

import pytest
from image_files import MakeTree, write_image


@pytest.fixture
def make_tree(tmp_path: Path) -> MakeTree:
    """Write ``<root>/<part>/<class>/<n>.png`` with distinct noise images and return the root."""

    def make(
        classes: Sequence[str],
        *,
        train: int = 4,
        test: int = 2,
        size: tuple[int, int] = (32, 32),
        name: str = "set",
        test_name: str = "test",
    ) -> Path:
        root, seed = tmp_path / name, 0
        for part, number in (("train", train), (test_name, test)):
            for label in classes:
                for index in range(number):
                    write_image(root / part / label / f"{index}.png", seed, size)
                    seed += 1
        return root

    return make
