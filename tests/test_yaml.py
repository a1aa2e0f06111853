"""YAML that stands for more than it says."""

from pathlib import Path

import pytest
import yaml

from lightning_msnn.energy.profiles import load_profiles
from lightning_msnn.errors import ConfigurationError, check_yaml
from lightning_msnn.tasks import SpikingClassifier

LAUGHS = "a0: &a0 [x, x]\n" + "".join(f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]\n" for i in range(1, 40))
NESTED = {"sequences": "[" * 2000 + "]" * 2000, "mappings": "{a: " * 2000 + "}" * 2000, "open": "[" * 100_000}


@pytest.mark.parametrize("text", [LAUGHS, *NESTED.values()], ids=["laughs", *NESTED])
def test_bombs_are_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(ConfigurationError, match="must not unfold to more than 100000 values"):
        check_yaml(text)
    (tmp_path / "x.yaml").write_text(text)
    with pytest.raises(ConfigurationError):
        load_profiles(tmp_path / "x.yaml")


def size(value: object) -> int:
    """Values that a tree has, walked through."""
    if isinstance(value, dict):
        return 1 + sum(size(k) + size(v) for k, v in value.items())
    return 1 + sum(map(size, value)) if isinstance(value, list) else 1


@pytest.mark.parametrize("levels", [1, 4, 8])
def test_counts_what_loading_gives(levels: int) -> None:
    text = "".join(LAUGHS.splitlines(keepends=True)[:levels])
    values = size(yaml.safe_load(text))
    check_yaml(text, largest=values)
    with pytest.raises(ConfigurationError, match=f"more than {values - 1} values"):
        check_yaml(text, largest=values - 1)


def test_every_configuration_passes() -> None:
    for file in (Path(__file__).parents[1] / "configs").rglob("*.yaml"):
        check_yaml(file.read_text())
    check_yaml("")
    check_yaml("a: &b 1\nc: *b\n")


def test_one_class_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="num_classes must be an integer of at least 2, not 1"):
        SpikingClassifier(num_classes=1)
