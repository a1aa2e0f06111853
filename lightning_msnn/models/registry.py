"""How the families are registered with timm: configurations, zoo entries and the builder."""

import math
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from inspect import signature
from pathlib import Path
from typing import Any

import timm
import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import PretrainedCfg, build_model_with_cfg
from timm.models._builder import resolve_pretrained_cfg
from timm.models._features import feature_take_indices
from timm.models._hub import download_from_hf
from torch import Tensor, nn

from lightning_msnn.entries import CONFIG_FILE, WEIGHTS_FILE, entries, is_entry, read_config, read_weights
from lightning_msnn.errors import ConfigurationError, brief, choose, suggestion
from lightning_msnn.models.msnn import MSNN

__all__ = [
    "DEPTHS",
    "MIN_SIZE",
    "PRESETS",
    "TWICE",
    "EntryCfg",
    "check_arguments",
    "create",
    "create_with",
    "default_cfg",
    "entry_cfg",
    "imagenet_cfg",
    "is_ours",
    "of_entry",
    "own_arguments",
    "zoo_cfgs",
]

MIN_SIZE = 8
"""Smallest side of an input image in pixels."""

DEPTHS: dict[int, tuple[int, ...]] = {20: (2, 4, 12, 2), 32: (4, 4, 20, 4)}
"""Blocks of each stage of deeper networks, by the number of all; twelve are the backbone's own."""

TWICE = (96, 192, 384, 768)
"""Widths of networks twice as wide."""

PRESETS: dict[str, dict[str, Any]] = {
    "default": {},
    "paper": {
        "context": "isolated",
        "windows": "alternate",
        "norm": False,
        "mlp": "gelu",
        "coding": "bernoulli",
        "surrogate": "rectangular",
        "tau": 0.4,
        "learn_tau": False,
        "projection": "sine",
        "theta": 0.25,
    },
}
"""Arguments of a network under one name; any of them can be given beside it. ``paper`` is the network as published
(arXiv 2401.10843): isolated windows, no normalisation, GELU MLP, linear patch merging, Bernoulli coding of each mixer's
input, rectangular surrogate, fixed decay."""


RETIRED: dict[str, Any] = {"time_steps": 1, "tau_time": None, "neuron": "lif"}
"""Arguments that networks no longer take, and the value that each must have where a file or a caller still gives it."""


def _without_retired(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Drop arguments that networks no longer take."""
    for name, value in RETIRED.items():
        if name in arguments and arguments[name] != value:
            raise ConfigurationError(
                f"{name} must be left out, or {value!r}, not {arguments[name]!r}: networks have one time step"
            )
    return {name: value for name, value in arguments.items() if name not in RETIRED}


def default_cfg(size: int = 32, num_classes: int = 1000, in_chans: int = 3, **kwargs: Any) -> dict[str, Any]:
    """Return timm's pretrained configuration of a network.

    Args:
        size: Side of the images that it was made for, in pixels.
        num_classes: Classes of the read-out.
        in_chans: Channels of the images.
        **kwargs: Further fields, or others in place of these.
    """
    return {
        "num_classes": num_classes,
        "input_size": (in_chans, size, size),
        "min_input_size": (in_chans, MIN_SIZE, MIN_SIZE),
        "fixed_input_size": False,
        "pool_size": (math.ceil(size / 16), math.ceil(size / 16)),
        "crop_pct": 1.0,
        "interpolation": "bilinear",
        "mean": (0.5, 0.5, 0.5)[:in_chans],
        "std": (0.5, 0.5, 0.5)[:in_chans],
        "first_conv": "stem.conv",
        "classifier": "head.fc",
        "license": "apache-2.0",
        "paper_ids": "arXiv:2401.10843",
        **kwargs,
    }


def imagenet_cfg() -> dict[str, Any]:
    """Return the fields of :func:`default_cfg` of networks for ImageNet: 224 pixels, a stem of stride 4."""
    return {
        "size": 224,
        "pool_size": (7, 7),
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "crop_pct": 0.875,
        "interpolation": "bilinear",
    }


def entry_cfg(folder: Path) -> PretrainedCfg:
    """Return timm's pretrained configuration of a zoo entry.

    Args:
        folder: Folder of the entry.

    Raises:
        ConfigurationError: If its ``config.json`` is broken.
    """
    config = read_config(folder)
    channels, height, width = config["input_size"]
    cfg = default_cfg(
        height,
        config["num_classes"],
        channels,
        input_size=(channels, height, width),
        file=str(folder / WEIGHTS_FILE),
        mean=tuple(config["mean"]),
        std=tuple(config["std"]),
        label_names=tuple(config["class_names"]),
        architecture=config["architecture"],
        tag=config["tag"],
    )
    return PretrainedCfg(**cfg)


class EntryCfg(PretrainedCfg):  # type: ignore[misc]
    """What timm's registry keeps of a zoo entry: where its weights lie.

    timm hands out copies of what it keeps, and a copy is read from the entry's ``config.json``: not before it is asked
    for.
    """

    def __deepcopy__(self, memo: Any) -> PretrainedCfg:
        return entry_cfg(Path(self.file).parent)


def zoo_cfgs(*architectures: str, **fields: Any) -> dict[str, PretrainedCfg]:
    """Return timm's pretrained configurations of architectures and of their zoo entries, by ``<architecture>.<tag>``.

    Without a tag, an architecture is untrained, with timm's usual 1,000 classes and 3 channels.

    Args:
        *architectures: Registered names.
        **fields: Fields of untrained ones, see :func:`default_cfg`.
    """
    untrained = PretrainedCfg(**default_cfg(**fields))
    cfgs = {
        name: EntryCfg(file=str(folder / WEIGHTS_FILE))
        for name, folder in entries().items()
        if name.partition(".")[0] in architectures
    }
    # timm makes the first tag with weights the default of its architecture, unless a starred tag comes after it.
    return cfgs | {f"{architecture}.untrained*": untrained for architecture in architectures}


def _parameters(*classes: type[nn.Module]) -> set[str]:
    """Names of the arguments that classes and those that they derive from take."""
    bases = {base for each in classes for base in each.__mro__ if issubclass(base, nn.Module) and base is not nn.Module}
    names = {name for base in bases for name in signature(base.__init__).parameters}
    return names - {"self", "mixer", "args", "kwargs"}


def _builder_arguments() -> set[str]:
    """Names of the arguments that timm's builder takes besides those of the network."""
    names = set(signature(build_model_with_cfg).parameters) - {"kwargs"}
    return names | {"features_only", "feature_cls", "out_indices"}


def is_ours(architecture: str) -> bool:
    """Whether a registered network is not one of timm's own, but of this package or of a module of the user's."""
    module: str = timm.model_entrypoint(architecture).__module__
    return module.partition(".")[0] != "timm"


def own_arguments(architecture: str) -> set[str]:
    """Return the names of the arguments in a registered network's own signature, and ``preset``.

    They do not say what is fetched from where, as those of timm's builder do, so a file may give them. The signatures
    are those of the networks in the module that registers it.

    Args:
        architecture: Registered name.
    """
    module = sys.modules[timm.model_entrypoint(architecture).__module__]
    if hasattr(module, "own_arguments"):  # of a network that is made of others
        return {*module.own_arguments, "num_classes", "in_chans"}
    classes = [each for each in vars(module).values() if isinstance(each, type) and issubclass(each, nn.Module)]
    spiking = [each for each in classes if issubclass(each, MSNN)]
    builder = {*_builder_arguments(), *signature(timm.create_model).parameters}
    return (_parameters(*(spiking or classes)) | {"num_classes", "in_chans", "preset"}) - builder


def _numbers(value: Any) -> Iterator[float]:
    """The numbers in a plain value, lists and dictionaries in it included."""
    stack = [value]
    while stack:
        match stack.pop():
            case dict() as inner:
                stack += inner.values()
            case list() | tuple() as inner:
                stack += inner
            case int() | float() as number:
                yield number


def check_arguments(
    arguments: Mapping[str, Any], allowed: Collection[str], source: object, weights: Mapping[str, Tensor] | None = None
) -> dict[str, Any]:
    """Return arguments that a file gives for a network, if a file may give them.

    Args:
        arguments: Arguments by name.
        allowed: Names of those that a file may give, see :func:`own_arguments`.
        source: The file, for the message.
        weights: Tensors of the file, if known. No number of a network that they fit is above all of their sizes, and
            each of its blocks has one of them.

    Raises:
        ConfigurationError: If another argument is among them, or a number is too large.
    """
    arguments = _without_retired(arguments)
    if refused := ", ".join(sorted(str(name) for name in arguments.keys() - set(allowed))):
        raise ConfigurationError(
            f"{source} is refused: it gives the network {refused}, and a file may give only arguments of the network's "
            "own"
        )
    if weights is not None:
        largest = max([len(weights), *(size for value in weights.values() for size in value.shape)])
        for name, value in arguments.items():
            if any(number > largest for number in _numbers(value)):
                raise ConfigurationError(f"{source} is refused: its weights are not those of {name} {value!r}")
        depths = arguments.get("depths")
        if sum(_numbers(depths)) > len(weights):
            raise ConfigurationError(f"{source} is refused: its weights are not those of depths {depths!r}")
    return dict(arguments)


def create_with(architecture: str, arguments: Mapping[str, Any], weights: Mapping[str, Tensor]) -> nn.Module:
    """Make a registered network with the weights of a file.

    Arguments of a file may ask for a network larger than the memory: it is made without any first.

    Args:
        architecture: Registered name.
        arguments: Its arguments, checked.
        weights: All its tensors by name.

    Raises:
        ValueError: If they are not those of the network by name and shape.
        Exception: Whatever the arguments make the network raise.
    """
    try:
        with torch.device("meta"):
            plan = timm.create_model(architecture, **arguments).state_dict()
    except (ConfigurationError, RuntimeError):  # which it raises again, or it computes with numbers while it is made
        plan = dict(weights)
    wrong = {n for n in plan.keys() | weights.keys() if n not in plan or n not in weights}
    wrong |= {n for n in plan.keys() & weights.keys() if plan[n].shape != weights[n].shape}
    if wrong:
        raise ValueError(f"{len(wrong)} weights are missing, too many or of another shape, such as {min(wrong)}")
    network: nn.Module = timm.create_model(architecture, **arguments)
    network.load_state_dict(weights)
    return network


_NUMBERS = {"projection": ("theta", "theta_logit"), "decay": ("tau", "logit")}


def _settle_numbers(state: dict[str, Tensor], model: nn.Module, given: Collection[str]) -> dict[str, Tensor]:
    """Let theta and tau that are given beside ``pretrained`` take the place of the entry's.

    Those that are not given are the entry's, also where they begin to be learnt, or are learnt no longer.

    Args:
        state: Weights of the entry, changed in place.
        model: The network, as its arguments have made it.
        given: Names of the arguments that are given.

    Returns:
        The weights.

    Raises:
        ConfigurationError: If the entry has learnt several where the network has one, or fixed one at 0 or 1 where the
            network learns it.
    """
    for name, mine in model.state_dict().items():
        module, _, last = name.rpartition(".")
        fixed, learnt = _NUMBERS.get(module.rpartition(".")[2], ("", ""))
        if last not in (fixed, learnt):
            continue
        numbers = {n: state.pop(key) for n in (fixed, learnt) if (key := f"{module}.{n}") in state}
        if fixed in given:
            state[name] = mine.clone()
        if fixed in given or not numbers:
            continue
        ((kept, number),) = numbers.items()
        if kept != last:
            number = torch.logit(number) if last == learnt else torch.sigmoid(number)
        if not number.isfinite().all():
            raise ConfigurationError(
                f"the entry has {fixed} {int(number.flatten()[0] > 0)} at {module!r}, from where nothing is learnt: "
                f"give {fixed} too"
            )
        if number.numel() > mine.numel():
            block = model.get_submodule(module.rsplit(".", 2)[0])
            single = getattr(block, "windows", "") == "single"  # where nothing decays
            if not (single or (number == number.flatten()[0]).all()):
                raise ConfigurationError(
                    f"the entry has learnt {number.numel()} values of {fixed} at {module!r}, and the network has one: "
                    f"give {fixed} too, or learn_{fixed}: channel"
                )
            number = number.flatten()[0]
        state[name] = number.reshape(()).expand_as(mine).clone() if number.numel() == 1 else number
    return state


def create(
    network: type[nn.Module], variant: str, pretrained: bool, defaults: Mapping[str, Any] | None = None, **kwargs: Any
) -> nn.Module:
    """Build a registered network as timm builds its own: weights, feature extraction, overrides.

    Args:
        network: Class of the network.
        variant: Its registered name.
        pretrained: Whether to load the weights of its zoo entry; if no tag names it, of that with the most classes.
        defaults: Arguments of the class by which the variant differs; those of a zoo entry or a caller override them.
        **kwargs: Arguments of the class, or of timm's builder; ``preset`` stands for those of :data:`PRESETS`, which
            other arguments override.

    Raises:
        ConfigurationError: If an argument is not known to either, or there are no weights.
    """
    allowed, kwargs = _parameters(MSNN, network), _without_retired(kwargs)
    for name in kwargs.keys() - allowed - _builder_arguments() - {"preset"}:
        raise ConfigurationError(
            f"unknown argument {name!r} of {variant}: allowed are {', '.join(sorted({*allowed, 'preset'}))}"
            f"{suggestion(name, allowed)}"
        )
    kwargs = {**choose(PRESETS, kwargs.pop("preset", "default"), "preset"), **kwargs}
    given, overlay = kwargs.pop("pretrained_cfg", None), kwargs.pop("pretrained_cfg_overlay", None)
    try:
        cfg = resolve_pretrained_cfg(variant, given, overlay)
    except RuntimeError as error:  # of a tag that timm does not know
        raise ConfigurationError(
            f"unknown network '{variant}.{given}': pretrained are {', '.join(timm.list_pretrained('msnn*')) or 'none'}"
            f"{suggestion(f'{variant}.{given}', timm.list_pretrained('msnn*'))}"
        ) from error
    if pretrained and not (cfg.has_weights or cfg.state_dict):
        tagged = [timm.get_pretrained_cfg(name) for name in timm.list_pretrained(variant)]
        if given or not tagged:  # a tag that was asked for is not replaced by another
            raise ConfigurationError(
                f"no weights for {variant}{'.' + cfg.tag if cfg.tag else ''}: "
                f"pretrained are {', '.join(timm.list_pretrained('msnn*')) or 'none'}"
            )
        cfg = max(tagged, key=lambda each: each.num_classes)
    stated = kwargs.get("pretrained_model_args") or {}
    given_numbers = {name for name in ("theta", "tau") if name in kwargs and kwargs[name] != stated.get(name)}
    cfg, kwargs, folder = of_entry(cfg, variant, pretrained, kwargs, allowed)
    kwargs = {**(defaults or {}), **kwargs}
    # All that decides what the network computes, so that later defaults leave it as it is.
    arguments = {**_defaults(MSNN), **_defaults(network), **{k: v for k, v in kwargs.items() if k in allowed}}
    indices, depths = kwargs.pop("out_indices", None), arguments["depths"]
    if kwargs.get("features_only") and isinstance(depths, Sequence):  # else the network refuses them
        indices = tuple(range(len(depths))) if indices is None else indices
        try:
            feature_take_indices(len(depths), indices)
        except (AssertionError, IndexError, TypeError, ValueError) as error:
            raise ConfigurationError(
                f"out_indices must be stages of the network, 0 to {len(depths) - 1}, or how many of the last, not "
                f"{indices!r}"
            ) from error
    try:
        model: nn.Module = build_model_with_cfg(
            network,
            variant,
            pretrained,
            pretrained_cfg=asdict(cfg),
            pretrained_filter_fn=partial(_settle_numbers, given=given_numbers),
            feature_cfg={"out_indices": indices, "feature_cls": "getter"},
            **kwargs,
        )
    except ConfigurationError:
        raise
    except Exception as error:  # whatever the values in a file make torch raise
        if folder is None and not (pretrained and "loading state_dict" in str(error)):
            raise
        reason = " ".join(str(error).split())
        raise ConfigurationError(f"{folder or cfg.file} does not fit {variant}: {reason}") from error
    if isinstance(model, MSNN):
        model.architecture = variant
        model.arguments = {**arguments, "num_classes": model.num_classes, "in_chans": model.in_chans}
        model._model_args = dict(model.arguments)  # type: ignore[assignment]  # which timm writes into a config.json
    # Else every copy of the network would carry its weights twice.
    model.pretrained_cfg.pop("state_dict", None)  # type: ignore[union-attr, operator]
    return model


def of_entry(
    cfg: PretrainedCfg, variant: str, pretrained: bool, kwargs: Mapping[str, Any], allowed: Collection[str]
) -> tuple[PretrainedCfg, dict[str, Any], Path | None]:
    """Read what the entry that a pretrained configuration is of, if it is of one, says of its network.

    Args:
        cfg: timm's configuration: of the zoo, a ``local-dir:`` or ``hf-hub:``.
        variant: Registered name of the network.
        pretrained: Whether to read the entry's weights, whose sha256 is checked.
        kwargs: What timm was given for the network; it comes before what the entry says.
        allowed: Names of the arguments that a file may give, ``preset`` aside.

    Returns:
        The configuration, with the weights in its ``state_dict``; the arguments; and the entry's folder, or None.

    Raises:
        ConfigurationError: If the entry's files are not what they should be, or of another network.
    """
    stated = kwargs.get("pretrained_model_args") or {}  # what timm has read in the config.json of a local-dir or hf-hub
    check_arguments(stated, {*allowed, "preset"}, f"the config.json of {cfg.file or cfg.hf_hub_id}")
    folder = _folder(cfg, pretrained, kwargs.get("cache_dir"))
    if folder is None:
        return cfg, dict(kwargs), None
    # An entry says how its network was made, and its weights are read here, where their hash is checked.
    if cfg.source is not None:
        cfg = entry_cfg(folder)
    config, weights = read_config(folder), cfg.state_dict or (read_weights(folder) if pretrained else None)
    if config["architecture"] != variant:
        raise ConfigurationError(f"{folder} is of {config['architecture']}, not of {variant}")
    kwargs = {**check_arguments(config["model_args"], allowed, folder / CONFIG_FILE, weights), **kwargs}
    return replace(cfg, state_dict=weights, url=None, hf_hub_id=None, custom_load=False), kwargs, folder


def _folder(cfg: PretrainedCfg, pretrained: bool, cache_dir: str | Path | None) -> Path | None:
    """The folder of the entry that a pretrained configuration is of, if it is of one; of the hub's, in its cache."""
    if cfg.source == "hf-hub":
        folder = Path(download_from_hf(cfg.hf_hub_id, CONFIG_FILE, cache_dir)).parent
        if not is_entry(folder):
            return None
        try:
            if pretrained:  # beside it
                download_from_hf(cfg.hf_hub_id, WEIGHTS_FILE, cache_dir)
        except OSError as error:  # which errors of huggingface_hub are
            reason = brief(error)
            raise ConfigurationError(f"weights of {cfg.hf_hub_id} cannot be fetched from the hub: {reason}") from error
        return folder
    if cfg.source == "local-dir":
        return Path(cfg.file) if is_entry(Path(cfg.file)) else None
    return Path(cfg.file).parent if cfg.file and Path(cfg.file).name == WEIGHTS_FILE else None


def _defaults(network: type[nn.Module]) -> dict[str, Any]:
    """Defaults that are plain values, but for those that only training knows."""
    parameters = signature(network).parameters.values()
    plain = [p for p in parameters if p.default is None or isinstance(p.default, bool | int | float | str | tuple)]
    return {p.name: p.default for p in plain if p.name not in ("drop_rate", "drop_path_rate")}
