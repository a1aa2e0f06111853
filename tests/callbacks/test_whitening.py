"""The filters of a whitened stem, from the images of a training."""

import pytest
import torch
from torch.nn import functional as F

from lightning_msnn.callbacks import EMA, Whitening
from lightning_msnn.callbacks.whitening import whitening_filters
from lightning_msnn.errors import ConfigurationError
from tests.callbacks.training import NETWORK, fit

WHITENED = {**NETWORK, "stem": "whitened"}


def test_patches_are_white():
    """Their answers have the identity as second moment, whatever the batches; filters are eigenvectors, scaled."""
    images = torch.randn(64, 3, 12, 12).cumsum(2).cumsum(3)
    filters = whitening_filters(images.split(10))
    assert filters.shape == (24, 3, 2, 2)
    assert torch.equal(filters[12:], -filters[:12])
    answers = F.conv2d(images, filters[:12]).transpose(0, 1).flatten(1)
    torch.testing.assert_close(answers @ answers.mT / answers.shape[1], torch.eye(12), rtol=0, atol=0.01)
    patches = F.unfold(images, 2).transpose(0, 1).flatten(1)
    moment, rows = patches @ patches.mT / patches.shape[1], filters[:12].flatten(1)
    values = 1 / rows.square().sum(1) - 5e-4
    torch.testing.assert_close(rows @ moment, values.unsqueeze(1) * rows, rtol=1e-3, atol=1e-2)
    few = whitening_filters((batch for batch in images.split(10)), images=15)
    torch.testing.assert_close(few.abs(), whitening_filters([images[:20]]).abs(), rtol=1e-3, atol=1e-3)


def test_filters_are_set_once_and_biases_learn_for_a_share(tmp_path, monkeypatch):
    """Of four steps of four; a training that is resumed, or starts from it, has its filters."""
    biases = []

    class Keep(Whitening):
        def on_train_batch_end(self, trainer, pl_module, *_):
            biases.append(pl_module.network.stem.whitening.bias.detach().clone())

    task, _ = fit(tmp_path, EMA(0.5), Keep(0.5), network_kwargs=WHITENED)
    stem = task.network.stem
    assert stem.is_whitened
    filters = stem.whitening.weight
    assert torch.equal(filters[4:], -filters[:4])
    moved = [not torch.equal(a, b) for a, b in zip([torch.zeros(8), *biases], biases, strict=False)]
    assert moved == [True, True, False, False]

    def never(_):
        raise AssertionError("the filters are there")

    monkeypatch.setattr("lightning_msnn.callbacks.whitening.whitening_filters", never)
    (tmp_path / "b").mkdir()
    start = {"network_kwargs": WHITENED, "epochs": 2}
    resumed, _ = fit(tmp_path / "b", EMA(0.5), Whitening(), ckpt_path=tmp_path / "x.ckpt", **start)
    student, _ = fit(tmp_path / "b", Whitening(), pretrained=str(tmp_path / "x.ckpt"), **start)
    for other in (resumed, student):
        assert torch.equal(other.network.stem.whitening.weight, filters)


def test_what_it_needs(tmp_path):
    with pytest.raises(ConfigurationError, match=r"until of Whitening must be a number in \[0, 1\], not 1.5"):
        Whitening(1.5)
    with pytest.raises(ConfigurationError, match="Whitening must be left out: the network has no whitened stem"):
        fit(tmp_path, Whitening())
