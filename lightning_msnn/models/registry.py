"""How the families are registered with timm: configurations, zoo entries and the builder."""

import math
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from inspect import Parameter, signature
from pathlib import Path
from typing import Any, TypeVar

import timm
import torch
from timm.models import PretrainedCfg, build_model_with_cfg
from timm.models._builder import resolve_pretrained_cfg
from timm.models._hub import download_from_hf
from torch import Tensor, nn

from lightning_msnn.entries import CONFIG_FILE, WEIGHTS_FILE, entries, find, is_entry, read_config, read_weights
from lightning_msnn.errors import ConfigurationError, brief, choose, parameters_of, suggestion
from lightning_msnn.models.msnn import MSNN

__all__ = [
    "BUILDER",
    "PRESETS",
    "EntryCfg",
    "build",
    "check_arguments",
    "create",
    "default_cfg",
    "entry_cfg",
    "imported",
    "is_ours",
    "make_network",
    "own_arguments",
    "own_class",
    "zoo_cfgs",
]

T = TypeVar("T")

PRESETS: dict[str, dict[str, Any]] = {
    "default": {},
    "paper": {
        "context": "isolated", "windows": "alternate", "norm": False, "mlp": "gelu", "coding": "bernoulli",
        "surrogate": "rectangular", "tau": 0.4, "learn_tau": False, "projection": "sine", "theta": 0.25,
    },
}  # fmt: skip
"""Arguments of a network under one name; any can be given beside it. ``paper`` is the network as published (arXiv
2401.10843): isolated windows, no normalisation, GELU MLP, linear patch merging, Bernoulli coding of each mixer's input,
rectangular surrogate, fixed decay."""

RETIRED: dict[str, Any] = {"time_steps": 1, "tau_time": None, "neuron": "lif"}
"""Arguments that networks no longer take, each with the value that files of before give."""

_NUMBERS = {"theta": (".projection.theta", ".projection.theta_logit"), "tau": (".decay.tau", ".decay.logit")}
"""Names in a state dict of what the arguments theta and tau set."""

BUILDER = {*signature(build_model_with_cfg).parameters, *signature(timm.create_model).parameters} - {"kwargs"}
BUILDER |= {"device", "dtype", "features_only", "feature_cls", "out_indices"}
"""Arguments of timm's builder: where weights are fetched from, and the like, nothing that a network is made of."""


class _UnknownArgumentError(ConfigurationError, TypeError):
    """An argument of no such name; a TypeError too, as timm expects."""


def _without_retired(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Drop arguments that networks no longer take, but not those with another value, which are unknown."""
    return {name: v for name, v in arguments.items() if name not in RETIRED or v != RETIRED[name]}


def default_cfg(
    input_size: Sequence[int] = (3, 32, 32), num_classes: int = 1000, arguments: Any = None, **fields: Any
) -> dict[str, Any]:
    """Return timm's pretrained configuration of a network.

    Args:
        input_size: Channels, height and width in pixels of the images that it was made for.
        num_classes: Classes of the read-out.
        arguments: Arguments of the network; its stem's stride and number of stages say how small its last map is.
        **fields: Further fields, or others in place of these.
    """
    channels, *sides = input_size
    made = {"stem_stride": 2, "depths": (2, 2, 6, 2), **(arguments or {})}
    reduction = made["stem_stride"] * 2 ** (len(made["depths"]) - 1)
    return {
        "num_classes": num_classes,
        "input_size": tuple(input_size),
        "min_input_size": (channels, 8, 8),
        "fixed_input_size": False,
        "pool_size": tuple(math.ceil(side / reduction) for side in sides),
        "crop_pct": 1.0,
        "interpolation": "bilinear",
        "mean": (0.5, 0.5, 0.5)[:channels],
        "std": (0.5, 0.5, 0.5)[:channels],
        "first_conv": "stem.whitening" if made.get("stem") == "whitened" else "stem.conv",
        "classifier": "head.fc",
        "license": "apache-2.0",
        "paper_ids": "arXiv:2401.10843",
        **fields,
    }


def entry_cfg(folder: Path) -> PretrainedCfg:
    """Return timm's pretrained configuration of a zoo entry.

    Args:
        folder: Folder of the entry.

    Raises:
        ConfigurationError: If its ``config.json`` is broken.
    """
    config = read_config(folder)
    made_of = timm.get_pretrained_cfg(str(config["model_args"].get("source", config["architecture"])))
    ours = made_of is None or "stem" in config["model_args"]
    ends = {} if ours else {"first_conv": made_of.first_conv, "classifier": made_of.classifier}
    cfg = default_cfg(
        config["input_size"], config["num_classes"], config["model_args"], file=str(folder / WEIGHTS_FILE),
        mean=tuple(config["mean"]), std=tuple(config["std"]), label_names=tuple(config["class_names"]),
        architecture=config["architecture"], tag=config["tag"], **ends,
    )  # fmt: skip
    return PretrainedCfg(**cfg)


class EntryCfg(PretrainedCfg):  # type: ignore[misc]
    """A zoo entry in timm's registry: where its weights lie.

    ``config.json`` is read when timm copies it, which timm does before each use.
    """

    def __deepcopy__(self, memo: Any) -> PretrainedCfg:
        return entry_cfg(Path(self.file).parent)


def zoo_cfgs(*architectures: str, **fields: Any) -> dict[str, PretrainedCfg]:
    """Return timm's pretrained configurations of architectures and of their zoo entries, by ``<architecture>.<tag>``.

    Args:
        *architectures: Registered names; without a tag they are untrained, with 1,000 classes and 3 channels.
        **fields: Arguments of :func:`default_cfg` for the untrained ones.
    """
    untrained = PretrainedCfg(**default_cfg(**fields))
    cfgs = {
        name: EntryCfg(file=str(folder / WEIGHTS_FILE))
        for name, folder in entries().items()
        if name.partition(".")[0] in architectures
    }
    # timm makes the first tag with weights the default of its architecture, unless a starred tag comes after it.
    return cfgs | {f"{architecture}.untrained*": untrained for architecture in architectures}


def is_ours(architecture: str) -> bool:
    """Whether a registered network is of this package or of a user's module, not one of timm's own."""
    module: str = timm.model_entrypoint(architecture).__module__
    return module.partition(".")[0] != "timm"


def imported(path: object, base: type[T]) -> type[T] | None:
    """Return the class at a path such as ``my_package.MyNet`` if it is imported and derives from another, else None.

    A checkpoint may name it, and a file does not say what is imported.
    """
    module, _, name = str(path).rpartition(".")
    kind = getattr(sys.modules.get(module), name, None)
    return kind if isinstance(kind, type) and issubclass(kind, base) else None


def own_class(path: object) -> type[nn.Module] | None:
    """Return the user's own class of networks at a path, see :func:`imported`; None if there is none.

    Raises:
        ConfigurationError: If the path is what a checkpoint says of a network that was given as a module.
    """
    module, _, name = str(path).rpartition(".")
    if name.endswith("()"):
        raise ConfigurationError(
            f"the network was given as a module, {name}: give one again, as load_from_checkpoint(path, network=...)"
        )
    theirs = module.partition(".")[0] in ("lightning", "lightning_msnn", "timm", "torch", "torchmetrics", "torchvision")
    return None if theirs else imported(path, nn.Module)


def make_network(name: str, **arguments: Any) -> nn.Module:
    """Make a registered network, or one of the user's own by the path of its class, see :func:`own_class`.

    Args:
        name: Registered name, or path.
        **arguments: Its arguments. A class takes ``num_classes`` and ``in_chans`` only if its signature has them.
    """
    kind = None if timm.is_model(name) else own_class(name)
    if kind is None:
        return timm.create_model(name, **arguments)  # type: ignore[no-any-return]
    taken = parameters_of(kind)
    return kind(**{k: v for k, v in arguments.items() if k in taken or k not in ("num_classes", "in_chans")})


def own_arguments(architecture: str) -> set[str]:
    """Return the names of the arguments that a file may give a registered network: its own, and ``preset``.

    timm's builder has others, which say what is fetched from where. The network's own are the arguments of the classes
    in the module that registers it, or what the module lists as ``own_arguments``.

    Args:
        architecture: Registered name.
    """
    module = sys.modules[timm.model_entrypoint(architecture).__module__]
    if hasattr(module, "own_arguments"):
        return {*module.own_arguments, "num_classes", "in_chans"}
    classes = [each for each in vars(module).values() if isinstance(each, type) and issubclass(each, nn.Module)]
    spiking = [each for each in classes if issubclass(each, MSNN) and each is not MSNN]
    own = {name for each in spiking or classes for name in parameters_of(each)}
    return (own | {"num_classes", "in_chans", "preset"}) - BUILDER - {"mixer_kwargs"}


def check_arguments(arguments: Mapping[str, Any], allowed: Collection[str], source: object) -> dict[str, Any]:
    """Return the arguments that a file gives a network, if all are allowed.

    Args:
        arguments: Arguments by name.
        allowed: Names of the allowed ones, see :func:`own_arguments`.
        source: The file, for the message.

    Raises:
        ConfigurationError: If another argument is among them.
    """
    arguments = _without_retired(arguments)
    if refused := ", ".join(sorted(str(name) for name in arguments.keys() - set(allowed))):
        raise ConfigurationError(
            f"{source} is refused: it gives the network {refused}, and a file may give only its own arguments"
        )
    return dict(arguments)


def create(
    network: type[nn.Module], variant: str, pretrained: bool, defaults: Mapping[str, Any] | None = None, **kwargs: Any
) -> nn.Module:
    """Build a registered network as timm builds its own: weights, feature extraction, overrides.

    Args:
        network: Class of the network.
        variant: Its registered name.
        pretrained: Whether to load the weights of its zoo entry; if no tag names it, of that with the most classes.
        defaults: The variant's arguments of the class; those of a zoo entry or a caller override them.
        **kwargs: Arguments of the class, or of timm's builder; ``preset`` stands for those of :data:`PRESETS`, which
            other arguments override.

    Raises:
        ConfigurationError: If an argument is not known to either, or there are no weights.
    """
    parameters, kwargs = parameters_of(network), _without_retired(kwargs)
    parameters.pop("mixer_kwargs", None)  # which a family sets itself
    for name in kwargs.keys() - parameters.keys() - BUILDER - {"preset"}:
        raise _UnknownArgumentError(
            f"unknown argument {name!r} of {variant}: allowed are {', '.join(sorted({*parameters, 'preset'}))}"
            f"{suggestion(name, parameters)}"
        )
    preset = kwargs.pop("preset", "default")
    if choose(PRESETS, preset, "preset").keys() - parameters.keys():
        raise ConfigurationError(f"preset must be 'default' with {variant}, which is not in the paper, not {preset!r}")
    kwargs = {**PRESETS[preset], **kwargs}
    stated = kwargs.get("pretrained_model_args") or {}
    given = {name for name in _NUMBERS if name in kwargs and kwargs[name] != stated.get(name)}
    model, kwargs = build(
        network, variant, pretrained, {*parameters, "preset"}, kwargs, defaults or {},
        feature_cfg={"out_indices": (0, 1, 2, 3), "feature_cls": "getter"},
        pretrained_filter_fn=partial(_keep_given, given=given),
    )  # fmt: skip
    if isinstance(model, MSNN):
        model.architecture = variant
        # All that decides what the network computes, so that later defaults leave it as it is.
        own = {name: value for name, value in parameters.items() if name not in ("drop_rate", "drop_path_rate")}
        own |= {name: value for name, value in kwargs.items() if name in parameters}
        own |= {"num_classes": model.num_classes, "in_chans": model.in_chans}
        model.arguments = {name: value for name, value in own.items() if value is not Parameter.empty}
        model._model_args = dict(model.arguments)  # type: ignore[assignment]  # which timm writes into a config.json
    return model


def _keep_given(state: dict[str, Tensor], model: nn.Module, given: Collection[str]) -> dict[str, Tensor]:
    """Let the network keep theta and tau that are given beside ``pretrained``; others are the entry's.

    A whitened stem for other channels is its own too: timm adapts a first convolution, not what follows it.
    """
    own, kept = model.state_dict(), tuple(ending for name in given for ending in _NUMBERS[name])
    filters = "stem.whitening.weight"
    if filters in own and filters in state and own[filters].shape != state[filters].shape:
        kept += (filters, "stem.whitening.bias", "stem.conv.weight")
    learnt = {name: name.removesuffix("_logit") for name in own if name.endswith(".theta_logit")}
    state |= {name: torch.logit(state.pop(fixed)) for name, fixed in learnt.items() if fixed in state}
    return state | {name: value.clone() for name, value in own.items() if name.endswith(kept)}


def build(
    network: Callable[..., nn.Module],
    variant: str,
    pretrained: bool,
    own: Collection[str],
    kwargs: Mapping[str, Any],
    defaults: Mapping[str, Any],
    **builder: Any,
) -> tuple[nn.Module, dict[str, Any]]:
    """Build a network by timm's builder, with arguments and weights of its zoo entry.

    Args:
        network: Class of the network, or a function that makes it.
        variant: Its registered name.
        pretrained: Whether to load an entry's weights, whose sha256 is checked.
        own: Names of the arguments that an entry may give.
        kwargs: The caller's arguments; they override the entry's, which override the defaults.
        defaults: The variant's own arguments.
        **builder: Further arguments of timm's builder.

    Returns:
        The network, and the arguments that it was built with.

    Raises:
        ConfigurationError: If there are no weights, or the entry's files are not what they should be.
    """
    given = dict(kwargs)
    device, dtype = given.pop("device", torch.get_default_device()), given.pop("dtype", None)
    cfg = _cfg(variant, pretrained, given.pop("pretrained_cfg", None), given.pop("pretrained_cfg_overlay", None))
    # timm has read these in the config.json of a local-dir or hf-hub.
    check_arguments(given.get("pretrained_model_args") or {}, own, f"the config.json of {cfg.file or cfg.hf_hub_id}")
    folder = _folder(cfg, pretrained, given.get("cache_dir"))
    if folder is not None:
        cfg = cfg if cfg.source is None else entry_cfg(folder)
        config = read_config(folder)
        if config["architecture"] != variant:
            raise ConfigurationError(f"{folder} is of {config['architecture']}, not of {variant}")
        given = check_arguments(config["model_args"], own, folder / CONFIG_FILE) | given
        weights = cfg.state_dict or (read_weights(folder) if pretrained else None)
        cfg = replace(cfg, state_dict=weights, url=None, hf_hub_id=None, custom_load=False)
    given = {**defaults, **given}
    if isinstance(given.get("depths"), Sequence) and "feature_cfg" in builder:
        builder["feature_cfg"] |= {"out_indices": tuple(range(len(given["depths"])))}
    try:
        with torch.device(device):
            model: nn.Module = build_model_with_cfg(
                network, variant, pretrained, pretrained_cfg=asdict(cfg), **{**builder, **given}
            )
    except ConfigurationError:
        raise
    except Exception as error:  # values in a file can make torch raise anything
        if folder is None:
            raise
        raise ConfigurationError(f"{folder} does not fit {variant}: {brief(error)}") from error
    # Else every copy of the network would carry its weights twice.
    for module in model.modules():  # features_only wraps the network
        (getattr(module, "pretrained_cfg", None) or {}).pop("state_dict", None)
    return model.to(dtype=dtype), given


def _cfg(variant: str, pretrained: bool, given: Any, overlay: Any) -> PretrainedCfg:
    """Find a network's pretrained configuration: that of its tag, or of the entry with most classes."""
    try:
        cfg = resolve_pretrained_cfg(variant, given, overlay)
    except RuntimeError:  # timm does not know the tag: the entry is newer than the import, or there is none
        cfg = resolve_pretrained_cfg(variant, entry_cfg(find(f"{variant}.{given}")), overlay)
    if pretrained and not (cfg.has_weights or cfg.state_dict):
        tagged = [timm.get_pretrained_cfg(name) for name in timm.list_pretrained(variant)]
        # No other tag takes the place of the one asked for; timm's scripts give that of no tag as a dictionary.
        if isinstance(given, str) or (given and cfg.tag != "untrained") or not tagged:
            tag = f".{cfg.tag}" if cfg.tag else ""
            names = ", ".join(timm.list_pretrained(["msnn*", "spiking*"])) or "none"
            raise ConfigurationError(f"no weights for {variant}{tag}: pretrained are {names}")
        cfg = resolve_pretrained_cfg(variant, max(tagged, key=lambda each: each.num_classes), overlay)
    return cfg


def _folder(cfg: PretrainedCfg, pretrained: bool, cache_dir: str | Path | None) -> Path | None:
    """Return the folder of a pretrained configuration's entry, None without one."""
    if cfg.source == "hf-hub":
        folder = Path(download_from_hf(cfg.hf_hub_id, CONFIG_FILE, cache_dir)).parent
        try:
            if pretrained and is_entry(folder):
                download_from_hf(cfg.hf_hub_id, WEIGHTS_FILE, cache_dir)  # into the same folder
        except OSError as error:  # which errors of huggingface_hub are
            raise ConfigurationError(f"weights of {cfg.hf_hub_id} cannot be fetched: {brief(error)}") from error
        return folder if is_entry(folder) else None
    if cfg.source == "local-dir":
        return Path(cfg.file) if is_entry(Path(cfg.file)) else None
    file = Path(cfg.file or "")
    entry = file.name == WEIGHTS_FILE and file.with_name(CONFIG_FILE).is_file() and is_entry(file.parent)
    return file.parent if entry else None
