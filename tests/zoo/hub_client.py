"""What a user does with the hub, in a process of its own: its client reads ``HF_ENDPOINT`` when it is imported."""

import json
import sys

import timm
import torch
from huggingface_hub import HfApi, ModelCard
from timm.models import push_to_hf_hub

from lightning_msnn import zoo
from lightning_msnn.entries import entries
from lightning_msnn.errors import ConfigurationError


def same(network: torch.nn.Module, other: torch.nn.Module) -> bool:
    """Whether two networks are the same, on two images, in weights and in arguments."""
    torch.manual_seed(0)
    x = torch.randn(2, *network.pretrained_cfg["input_size"])
    with torch.no_grad():
        equal = torch.equal(network.eval()(x), other.eval()(x))
    plain = [json.loads(json.dumps(n._model_args)) for n in (network, other)]
    return equal and plain[0] == plain[1]


def refusal(name: str) -> str:
    """Return why a network of the hub is refused."""
    try:
        timm.create_model(f"hf-hub:{name}", pretrained=True)
    except ConfigurationError as error:
        return str(error)
    return ""


def main(mine: str, eighth: str) -> None:
    """Fetch every entry; upload one of a zoo of one's own, as a folder and as timm does; print what came of it."""
    found = {}
    for name in (*entries(), "int8"):
        network = timm.create_model(f"hf-hub:zoo/{name}", pretrained=True)
        folder = entries().get(name)
        ours = zoo.load(name) if folder else timm.create_model(f"local-dir:{eighth}", pretrained=True)
        data = ModelCard.load(f"zoo/{name}").data if folder else None
        results = [[r.dataset_type, r.metric_name, r.metric_value] for r in data.eval_results] if data else None
        names = list(network.pretrained_cfg["label_names"])
        found[name] = [same(network, ours), names, results, data and data.license]
    api = HfApi()
    api.create_repo("me/mine")
    api.upload_folder(repo_id="me/mine", folder_path=mine)
    own = timm.create_model(f"local-dir:{mine}", pretrained=True)
    found["uploaded"] = same(own, timm.create_model("hf-hub:me/mine", pretrained=True))
    push_to_hf_hub(own, "me/pushed")
    found["pushed"] = same(own, timm.create_model("hf-hub:me/pushed", pretrained=True))
    found["untrained"] = same(own, timm.create_model("hf-hub:me/mine"))
    other = timm.create_model("hf-hub:me/mine", pretrained=True, num_classes=5, in_chans=2)
    pyramid = timm.create_model("hf-hub:me/mine", pretrained=True, features_only=True)
    x = torch.rand(3, 2, 9, 9)
    found["other"] = [list(other(x).shape), [list(y.shape[:2]) for y in pyramid(x[:, :1])]]
    found["refused"] = {name: refusal(f"zoo/{name}") for name in ("damaged", "empty", "foreign")}
    print(json.dumps(found))  # noqa: T201


if __name__ == "__main__":
    main(*sys.argv[1:])
