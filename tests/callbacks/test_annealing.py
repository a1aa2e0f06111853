"""Spikes that sharpen over a training."""

import lightning.pytorch as pl
import pytest
import torch

from lightning_msnn.callbacks import SpikeAnnealing
from lightning_msnn.errors import ConfigurationError
from lightning_msnn.nn import Spike
from tests.callbacks.training import RELU, fit


class Watch(pl.Callback):
    """Write down the share of every step, and the rates of the training and of evaluation after it."""

    def __init__(self):
        self.shares, self.evaluated = [], []

    def on_before_zero_grad(self, trainer, pl_module, optimizer):  # after the step's forward pass
        spikes = [m for m in pl_module.modules() if isinstance(m, Spike)]
        (share,) = {1.0 if m.annealing is None else round(m.annealing.item(), 6) for m in spikes}
        self.shares.append(share)

    def on_validation_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        returned = []
        hooks = [
            module.register_forward_hook(lambda m, args, out: returned.append(out))
            for module in pl_module.modules()
            if isinstance(module, Spike)
        ]
        pl_module(batch[0])
        for hook in hooks:
            hook.remove()
        self.evaluated.append(all(bool(((x == 0) | (x == 1)).all()) for x in returned))


@pytest.mark.parametrize("options", [{"accumulate_grad_batches": 2, "limit_train_batches": 8}, {"max_steps": 8}])
def test_the_share_rises_with_the_optimizers_steps(tmp_path, options, monkeypatch):
    said = []
    monkeypatch.setattr("lightning_msnn.callbacks.annealing.rank_zero_info", lambda text, *a: said.append(text % a))
    watch = Watch()
    task, trainer = fit(tmp_path, SpikeAnnealing(0.75), watch, epochs=2, trainer=options)
    assert watch.shares == pytest.approx([min(1.0, i / 6) for i in range(8)], abs=1e-6)
    assert watch.evaluated == [True, True], "evaluation has exact spikes throughout"
    assert [text[:39] for text in said] == ["spikes are still soft (annealing 0.67):"], "as long as they are"
    assert all(m.annealing is None for m in task.modules() if isinstance(m, Spike)), "left with exact spikes"
    assert trainer.callback_metrics["annealing"] == 1.0


def test_the_first_step_is_that_of_the_relu_baseline(tmp_path):
    """The same loss and gradients, from the same weights."""

    class Keep(pl.Callback):
        def on_after_backward(self, trainer, pl_module):
            self.gradients = {n: p.grad.clone() for n, p in pl_module.network.named_parameters() if p.grad is not None}
            raise KeyboardInterrupt

    kept = []
    fit(tmp_path, network_kwargs=RELU)
    for network, callbacks in ((RELU, ()), (RELU | {"spiking": True}, (SpikeAnnealing(),))):
        keep = Keep()
        with pytest.raises(SystemExit):
            fit(tmp_path / "x", *callbacks, keep, network_kwargs=network, pretrained=str(tmp_path / "x.ckpt"))
        kept.append(keep.gradients)
    for name, gradient in kept[0].items():
        torch.testing.assert_close(kept[1][name], gradient, rtol=1e-4, atol=1e-6, msg=name)


def test_what_is_refused(tmp_path):
    with pytest.raises(ConfigurationError, match="must be above 0 and below 1, not 1.0"):
        SpikeAnnealing(1.0)
    with pytest.raises(ConfigurationError, match="must know where training ends: set max_epochs, not -1"):
        fit(tmp_path, SpikeAnnealing(), epochs=-1)
    with pytest.raises(ConfigurationError, match="has no spiking neurons to anneal"):
        fit(tmp_path, SpikeAnnealing(), network_kwargs=RELU)
