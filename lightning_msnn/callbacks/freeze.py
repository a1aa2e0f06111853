"""Parts of a network that do not learn."""

from fnmatch import fnmatchcase

import lightning.pytorch as pl
from torch import nn

from lightning_msnn.errors import ConfigurationError, suggestion

__all__ = ["Freeze"]


class Freeze(pl.Callback):
    """Freeze modules of a task's network: their parameters and running statistics.

    They stay frozen in a later training of the same network, until its ``requires_grad_(True).train()``.

    Args:
        modules: Names or shell-style patterns, such as ``stem`` or ``stages.[01]``; or ``all_but_head``.

    Raises:
        ConfigurationError: When training starts, if a name is no module of the network.
    """

    def __init__(self, modules: str | list[str] = "all_but_head") -> None:
        self.modules = [modules] if isinstance(modules, str) else list(modules)
        self._frozen: list[str] = []

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Find the modules, and leave their parameters out of the training."""
        if stage != "fit":
            return
        network = pl_module.get_submodule("network")
        named = dict(network.named_modules())
        parts = ["all_but_head"] if hasattr(network, "get_classifier") else []
        parts += [name for name, _ in network.named_children()]
        found: list[str] = []
        for pattern in self.modules:
            if pattern == "all_but_head" and hasattr(network, "get_classifier"):
                head = network.get_classifier()  # type: ignore[operator]
                heads = nn.ModuleList(head if isinstance(head, tuple) else [head])
                matched = [name for name, module in named.items() if not {*heads.modules()} & {*module.modules()}]
                for parameter in {*network.parameters()} - {*heads.parameters()}:  # a class token is in no such module
                    parameter.requires_grad_(False)
            else:
                matched = [name for name in named if name and fnmatchcase(name, pattern)]
            if not matched:
                raise ConfigurationError(
                    f"Freeze: {pattern!r} is no module of {type(network).__name__}: allowed are {', '.join(parts)} "
                    f"and those in them{suggestion(pattern, [*parts, *named])}"
                )
            found += matched
        self._frozen = found
        for name in found:
            named[name].requires_grad_(False)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Keep them in evaluation mode, also where a training resumes within an epoch."""
        for name in self._frozen:  # whose modules a strategy may have replaced
            pl_module.get_submodule(f"network.{name}").eval()
