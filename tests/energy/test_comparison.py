"""Twins compared on the same images, and the factors between them."""

import lightning.pytorch as pl
import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from lightning_msnn.data import Digits
from lightning_msnn.energy import (
    FACTORS,
    NETWORK,
    Record,
    comparison_rows,
    count_operations,
    evenly,
    factor_sentence,
    factors,
    spread,
    summarize,
)
from lightning_msnn.energy.profiles import COLUMN, FIELDS
from lightning_msnn.energy.report import compare
from lightning_msnn.errors import ConfigurationError
from lightning_msnn.nn import Neuron, Spike


def record(**amounts):
    counts = torch.zeros(1, len(FIELDS), dtype=torch.int64)
    for name, amount in amounts.items():
        counts[0, COLUMN[name]] = amount
    return Record(("",), counts, 1, torch.zeros(1, dtype=torch.int64))


OURS = record(accumulates=100, spikes_read=80, weights_read=10)
THEIRS = record(multiply_accumulates=100, effective_multiply_accumulates=50, values_read=80, weights_read=10)


def test_factors_by_hand():
    """Never one alone: dense and zeros skipped, arithmetic and with traffic of 12.5 pJ for a byte."""
    found = factors(summarize(OURS), summarize(THEIRS))
    assert found.keys() == FACTORS.keys()
    ours, traffic = 100 * 0.9 + (10 + 40) * 12.5, (40 + 320) * 12.5
    assert found == pytest.approx({
        "arithmetic": 460 / 90,
        "arithmetic_zeros_skipped": 230 / 90,
        "memory": (460 + traffic) / ours,
        "memory_zeros_skipped": (230 + traffic) / ours,
    })  # fmt: skip
    assert factors(summarize(OURS, "loihi"), summarize(THEIRS, "loihi"))["memory"] is None, "it has no figure"


def test_a_factor_is_shown_with_its_companions():
    columns = {NETWORK: summarize(OURS, top1=71.5), "ANN twin": summarize(THEIRS, top1=72.25)}
    rows = {row[0].strip(): row[1:] for row in comparison_rows(columns)}
    found = factors(*columns.values())
    for name, label in FACTORS.items():
        assert rows[f"times the first column, {label}"] == ("1", f"{found[name]:.3g}")
        assert f"{found[name]:.3g} ({label})" in factor_sentence(columns)
    assert rows["test top-1, each trained by itself"] == ("71.50 %", "72.25 %")
    assert "trained by itself: 72.25 %" in factor_sentence(columns)
    columns["ANN twin"]["top1"] = None
    assert comparison_rows(columns)[-1][-1] == "-"
    assert "trained by itself: not known" in factor_sentence(columns)


@pytest.mark.parametrize("samples", [0, 7, 25, 100])
def test_spread(samples):
    """Numbers of classes differ by one at most, but where a class has no more; the choice is the seed's."""
    sizes = [20, 3, 9, 8]
    targets = torch.repeat_interleave(torch.tensor([5, 2, 9, 0]), torch.tensor(sizes))
    state = torch.get_rng_state()
    chosen = spread(targets, samples)
    assert torch.equal(torch.get_rng_state(), state)
    assert chosen.tolist() == sorted(set(chosen.tolist()))
    assert len(chosen) == min(samples, 40)
    found = {c: int((targets[chosen] == c).sum()) for c in (5, 2, 9, 0)}
    most = max(found.values())
    assert all(found[c] in (most, most - 1) or found[c] == size for c, size in zip(found, sizes, strict=True))
    assert torch.equal(spread(targets, samples), chosen)
    assert samples in (0, 100) or not torch.equal(spread(targets, samples, seed=1), chosen)


def test_any_data_module_will_do():
    data = pl.LightningDataModule.from_datasets(test_dataset=TensorDataset(torch.rand(5, 1), torch.arange(5)))
    assert sum(map(len, evenly(data, 4))) == 4


def test_images_of_all_classes_whatever_the_batches(tmp_path):
    """What is counted, and what the twins are calibrated on, depends on no batch size."""
    found = []
    for size in (7, 64):
        datamodule = Digits(batch_size=size)
        datamodule.prepare_data()
        datamodule.setup("test")
        images = torch.cat(list(evenly(datamodule, 40, size)))
        targets = datamodule.test_dataloader().dataset.targets
        assert set(targets[spread(targets, 40)].bincount().tolist()) == {4}
        model = nn.Sequential(
            nn.Conv2d(1, 2, 3), Spike(Neuron(threshold=0.1)), nn.Flatten(), nn.Linear(2 * 14 * 14, 10)
        ).eval()
        torch.manual_seed(0)
        for layer in (model[0], model[3]):
            layer.reset_parameters()
        seen = []

        def twins(images, seen=seen, model=model):
            seen.append(images)
            return {"twin": model}

        records = compare(model, twins, images.split(size), 40)
        assert torch.equal(torch.cat(seen), images)
        assert torch.equal(records[NETWORK].counts, count_operations(model, images).counts)
        assert torch.equal(records["twin"].counts, records[NETWORK].counts)
        found.append(records[NETWORK])
    assert torch.equal(found[0].counts, found[1].counts)
    assert found[0].samples == 40


def test_networks_with_several_inputs_are_compared():
    class Two(nn.Module):
        def forward(self, a, *, b):
            return a @ b.transpose(-1, -2)

    batches = [((torch.rand(3, 2, 5),), {"b": torch.rand(3, 4, 5)})] * 2
    records = compare(Two(), lambda images: {}, batches, 4)
    assert records[NETWORK].samples == 4
    assert records[NETWORK].total("multiply_accumulates") == 4 * 2 * 5 * 4

    for nothing in ([], [torch.zeros(0, 3, 16, 16)]):
        with pytest.raises(ConfigurationError, match="has none"):
            compare(nn.Flatten(), lambda images: {}, nothing)
