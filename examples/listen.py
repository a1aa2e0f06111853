"""Hear a spoken word as it comes.

A network of several time steps takes a recording part by part, and carries the membranes of its neurons from one part
to the next; each part is made of what was heard up to its end. What it says after the last is what it says of the
whole recording at once. It is trained by, for example::

    lightning-msnn fit --config data/spoken_digits --config recipe/tiny --data.time_steps 4 \
        --model.network_kwargs "{time_steps: 4}"

and listens by::

    python examples/listen.py runs/msnn_resnet12_tiny_spokendigits/version_0/checkpoints/best.ckpt seven.wav

The level of the sound is set before, as a microphone's is: the file is scaled to full level, and where it is longer
than the recordings of the training, its loudest stretch is heard.
"""

import argparse
import sys
import time
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from lightning_msnn import data
from lightning_msnn.data.audio import read_waves
from lightning_msnn.data.base import arguments_of_checkpoint
from lightning_msnn.energy import OperationCounter
from lightning_msnn.errors import ConfigurationError
from lightning_msnn.export.source import read_source


class Listener(nn.Module):
    """A network that takes one part of a sound after the other.

    Args:
        network: A network in eval mode.
        module: The data module of its recordings.
    """

    def __init__(self, network: Any, module: data.AudioDataModule) -> None:
        super().__init__()
        self.network = network
        self.module = module

    def forward(self, frame: Tensor, state: Any = None) -> tuple[Tensor, Any]:
        """Take a part ``(1, 1, mels, frames)`` with the state in and out; return logits and state."""
        frame = frame.to(next(self.network.parameters()).dtype)
        if self.network.time_steps == 1:
            return self.network(frame), None
        returned: tuple[Tensor, Any] = self.network.step(frame, state)
        return returned

    @torch.no_grad()
    def hear(self, wave: Tensor) -> Iterator[tuple[float, float, Tensor]]:
        """Hear a recording.

        Args:
            wave: int16, ``(samples,)``.

        Yields:
            How many seconds have been heard, how many it took to compute the part, and the logits, the mean of those of
            the parts so far, ``(num_classes,)``.
        """
        steps, log_mel = self.network.time_steps, self.module.log_mel
        width = self.module.frames // steps
        heard, state, total = torch.zeros_like(wave)[None], None, torch.zeros(())
        for step in range(steps):
            # The last frame of a part looks half a window ahead.
            now = min(len(wave), (step + 1) * width * log_mel.hop + log_mel.n_fft // 2)
            now = len(wave) if step + 1 == steps else now
            heard[0, :now] = wave[:now]
            begin = time.perf_counter()
            parts = self.module.transform(heard, False)
            logits, state = self(parts[:, step] if steps > 1 else parts, state)
            total = total + logits[0]
            yield now / self.module.rate, time.perf_counter() - begin, total / (step + 1)


def main(args: list[str] | None = None) -> None:
    """Run the command line.

    Args:
        args: Arguments, those of the process if None.
    """
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("source", help="checkpoint of lightning-msnn fit, or name of a zoo entry, of recordings")
    parser.add_argument("wav", help="a recording")
    given = parser.parse_args(args)
    try:
        source = read_source(given.source)
        kind = getattr(data, source.data, None) if source.data in data.__all__ else None
        if not (isinstance(kind, type) and issubclass(kind, data.AudioDataModule)):
            raise ConfigurationError(f"{source.name} was not trained on recordings: it takes no wav file")
        module = kind(**arguments_of_checkpoint(source.settings))
        module.mean, module.std = source.mean, source.std
        wave = read_waves([given.wav], module.rate, module.samples)[0]
    except ConfigurationError as error:
        sys.stderr.write(f"listen: error: {error}\n")
        sys.exit(2)
    listener = Listener(source.network, module).eval()
    for _ in listener.hear(wave):  # the first pass compiles kernels
        pass
    slowest = 0.0
    for seconds, took, logits in listener.hear(wave):
        probability, index = logits.softmax(0).max(0)
        slowest = max(slowest, took)
        said = source.class_names[int(index)]
        sys.stdout.write(f"{seconds:5.2f} s heard: {said} ({100 * probability:.0f} %), {1e3 * took:.1f} ms\n")
    with OperationCounter(listener) as counter:
        for _ in listener.hear(wave):
            pass
    record, length = counter.record(), len(wave) / module.rate
    accumulates, products = (record.total(name) / length / 1e6 for name in ("accumulates", "multiply_accumulates"))
    sys.stdout.write(
        f"{said}: {1e3 * slowest:.1f} ms after a part at most; {accumulates:.2f} million accumulates and "
        f"{products:.2f} million multiply-accumulates for a second of sound\n"
    )


if __name__ == "__main__":
    main()
