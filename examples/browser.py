"""Put an entry on a web page: write docs/try.md's network, test images and runtime, then build the site.

python examples/browser.py && mkdocs build

The network is an ONNX file with three kinds of outputs: logits, the energy of the image, and each layer's spikes. Any
network can be written so. It needs the extra `export`, and npm for the runtime (ONNX Runtime Web).
"""

import argparse
import json
import subprocess
import tarfile
import tempfile
import warnings
from pathlib import Path

import torch
from torch import Tensor, nn

from lightning_msnn import zoo
from lightning_msnn.data import Digits
from lightning_msnn.energy import PROFILES, count_operations, energy
from lightning_msnn.nn import Synapse

ENTRY = "msnn_resnet12_tiny.digits"
RUNTIME = "onnxruntime-web@1.30.0"
FILES = ("ort.wasm.min.mjs", "ort-wasm-simd-threaded.mjs", "ort-wasm-simd-threaded.wasm")
FOLDER = Path(__file__).resolve().parents[1] / "docs" / "try"


class Watched(nn.Module):
    """A network that returns its logits, the energy of an image in µJ, and the spikes that enter each synapse.

    The energy is exact: each spike costs as many accumulates as there are weights that it meets, and all else in the
    network costs the same for every image.

    Args:
        network: Network in evaluation mode.
        image: Any image ``(1, C, H, W)``.
    """

    def __init__(self, network: nn.Module, image: Tensor) -> None:
        super().__init__()
        self.network = network
        self.spikes: dict[str, Tensor] = {}
        for name, conv in self.synapses():
            conv.register_forward_pre_hook(lambda _, inputs, name=name: self.spikes.update({name: inputs[0]}))
        with torch.no_grad():
            network(image)
        picojoules = PROFILES["cmos_45nm"].prices["accumulates"]
        self.costs = {name: 1e-6 * picojoules * fan_out(conv, self.spikes[name]) for name, conv in self.synapses()}
        self.rest = 1e6 * float(energy(count_operations(network, image))) - float(self.spent())

    def synapses(self) -> list[tuple[str, nn.Conv2d]]:
        return [(name, module.conv) for name, module in self.network.named_modules() if isinstance(module, Synapse)]

    def spent(self) -> Tensor:
        return torch.stack([(self.costs[name] * fired).sum() for name, fired in self.spikes.items()]).sum()

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        logits = self.network(image)
        return logits, self.spent() + self.rest, *(fired.to(torch.uint8) for fired in self.spikes.values())


def fan_out(conv: nn.Conv2d, spikes: Tensor) -> Tensor:
    """How many weights a spike of each place meets: the gradient of the convolution if all its weights are 1."""
    zeros = torch.zeros_like(spikes, requires_grad=True)
    currents = conv._conv_forward(zeros, torch.ones_like(conv.weight), None)
    return torch.autograd.grad(currents.sum(), zeros)[0]


def write_network(folder: Path) -> None:
    """Write model.onnx, and model.json with what the page says about it and ten test images, one of each class."""
    facts = zoo.info(ENTRY)
    mean, std = facts["mean"][0], facts["std"][0]
    images, labels = Digits().read("test")
    first = [int((labels == digit).nonzero()[0]) for digit in range(10)]
    images = torch.as_tensor(images[first]).float().reshape(10, 1, 16, 16) / 255
    inputs = (images - mean) / std
    watched = Watched(zoo.load(ENTRY), inputs[:1]).eval()
    names = list(watched.spikes)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        outputs = ["logits", "energy", *names]
        torch.onnx.export(
            watched, (inputs[:1],), folder / "model.onnx", dynamo=True, verbose=False, external_data=False,
            input_names=["image"], output_names=outputs,
        )  # fmt: skip
        expected = [watched(image[None]) for image in inputs]
    about = {
        "entry": ENTRY, "mean": mean, "std": std, "layers": names, "classes": facts["class_names"],
        "baseline": [1e6 * facts["energy_joules_ann_twin"], 1e6 * facts["energy_joules_zeros_skipped_ann_twin"]],
        "tests": [
            {"pixels": image.flatten().tolist(), "class": int(logits.argmax()), "energy": float(cost)}
            for image, (logits, cost, *_) in zip(images, expected, strict=True)
        ],
    }  # fmt: skip
    (folder / "model.json").write_text(json.dumps(about), encoding="utf-8")


def fetch_runtime(folder: Path) -> None:
    """Unpack the three files of the npm package that a page needs."""
    with tempfile.TemporaryDirectory() as temporary:
        subprocess.run(["npm", "pack", "--silent", RUNTIME], cwd=temporary, check=True)
        (package,) = Path(temporary).glob("*.tgz")
        with tarfile.open(package) as archive:
            for name in FILES:
                (folder / name).write_bytes(archive.extractfile(f"package/dist/{name}").read())


def main(folder: Path = FOLDER) -> None:
    """Write all that the page loads into its folder."""
    folder.mkdir(parents=True, exist_ok=True)
    write_network(folder)
    fetch_runtime(folder)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, default=FOLDER)
    main(parser.parse_args().folder)
