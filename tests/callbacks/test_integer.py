"""Integer inference within a Trainer."""

import pytest
import torch

from lightning_msnn.callbacks import IntegerInference
from lightning_msnn.errors import ConfigurationError
from lightning_msnn.nn.integer import to_integers
from lightning_msnn.tasks import SpikingClassifier
from tests.callbacks.training import quiet
from tests.models.test_registry import lively


def test_predicts_in_integers_and_puts_the_network_back(tmp_path):
    task, x = SpikingClassifier(), torch.randn(4, 3, 16, 16)
    network = lively(task.network)
    with torch.no_grad():
        expected, own = to_integers(network)(x), network(x)
    found = quiet(tmp_path, IntegerInference()).predict(task, torch.utils.data.DataLoader(x, batch_size=4))
    torch.testing.assert_close(found[0]["logits"], expected, rtol=0, atol=1e-6)
    assert not torch.equal(expected, own)
    assert task.network is network


def test_refuses_a_training(tmp_path):
    data = torch.utils.data.TensorDataset(torch.randn(4, 3, 16, 16), torch.arange(4))
    with pytest.raises(ConfigurationError, match="not for fit"):
        quiet(tmp_path, IntegerInference()).fit(SpikingClassifier(), torch.utils.data.DataLoader(data, batch_size=4))
