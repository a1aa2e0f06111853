"""The command line: ``lightning-msnn fit|validate|test|predict --config file.yaml``, a thin LightningCLI."""

from __future__ import annotations

import argparse
import os
import re
import signal
import sys
from itertools import count
from pathlib import Path
from typing import Any, NoReturn

from lightning.fabric.plugins import CheckpointIO
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities.exceptions import MisconfigurationException, SIGTERMException
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_only

from lightning_msnn import data
from lightning_msnn.callbacks import EnergyMonitor, PredictionWriter
from lightning_msnn.data.base import arguments_of_checkpoint
from lightning_msnn.errors import ConfigurationError, TrainingError, suggestion
from lightning_msnn.runs import (
    AtomicCheckpointIO,
    Claim,
    FiniteLoss,
    LastCheckpoint,
    LoggerGuard,
    RandomState,
    claim_version,
    newest_version,
    read_checkpoint,
    release_version,
)
from lightning_msnn.tasks import SpikingClassifier

__all__ = ["MSNNCLI", "main"]

_DEFAULT_DATA = "lightning_msnn.data.Digits"
_LOCAL_LOGGERS = ("CSVLogger", "TensorBoardLogger")


# How jsonargparse says that it does not know a key; the group is the key.
_UNKNOWN_KEY = re.compile(
    r"(?:does not accept option|[Kk]ey|[Oo]ption|[Uu]nrecognized arguments:)\s+['\"]?-*([\w.+-]+?)['\"]?"
    r"(?:$|\s|\.?$| is not (?:expected|accepted))"
)


class _Parser(LightningArgumentParser):
    """A parser whose errors are one sentence, with the nearest key where one is not known."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Raise what is wrong with the arguments as a configuration error."""
        text = _one_sentence(str(message))
        unknown = _UNKNOWN_KEY.search(text)
        keys = _keys(self)
        if unknown is not None and unknown[1] not in keys and "did you mean" not in text.lower():
            text += suggestion(unknown[1], keys)
        raise ConfigurationError(text) from ex


def _one_sentence(message: str) -> str:
    """Shorten jsonargparse's list of every type that a value failed to be."""
    text = re.sub(r"<class '(?:\w+\.)*(\w+)'>", r"\1", " ".join(message.split()))
    union = re.match(r'(?:Parser key "(.+?)": )?.*?Errors: - (.*) Given value type: \S+ Given value: (.*)$', text)
    if union is None:
        return text
    key, reasons, value = union.groups()
    said = [reason for reason in reasons.split(" - ") if reason != "Expected a NoneType"]
    given = "" if value.startswith(("Namespace", "NestedArg")) else f", not {value!r}"
    return f"{key + ': ' if key else ''}{'; '.join(said)}{given}"


def _keys(parser: argparse.ArgumentParser) -> set[str]:
    """Names of all options of a parser and its subcommands."""
    keys: set[str] = set()
    for action in parser._actions:
        if isinstance(action.choices, dict):
            keys = keys.union(*(_keys(sub) for sub in action.choices.values()))
        elif action.dest != "help":
            keys.add(action.dest)
    return keys


class _SaveConfig(SaveConfigCallback):
    """Save the parsed configuration with the run and send it to the loggers."""

    def setup(self, trainer: Trainer, pl_module: Any, stage: str) -> None:
        """Write the configuration; a folder where that is not possible would not take checkpoints either."""
        try:
            super().setup(trainer, pl_module, stage)
        except OSError as error:
            raise ConfigurationError(
                f"cannot write to the run's folder {error.filename!r}: {error.strerror}"
            ) from error

    def save_config(self, trainer: Trainer, pl_module: Any, stage: str) -> None:
        """Send the configuration to every logger."""
        text = self.parser.dump(self.config, skip_none=False)
        for logger in trainer.loggers:
            if isinstance(logger, Logger):
                logger.log_hyperparams({"config": text})


class MSNNCLI(LightningCLI):
    """LightningCLI for spiking classifiers.

    Beyond LightningCLI: runs go to ``<run.folder>/<run.name>/version_<n>`` for all local loggers alike;
    ``--ckpt_path last`` goes on in the newest run that has a last checkpoint, bit for bit where it stopped; what is
    wrong with model, data or checkpoint is said before anything is written; checkpoints are written whole or not at
    all; a loss that is not finite stops the training, and a logger that fails does not; ``fit`` ends with ``test`` of
    the best checkpoint; ``predict`` writes a CSV file.
    """

    _claimed: Claim | None = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        try:
            super().__init__(*args, **kwargs)
        finally:
            if self._claimed is not None:
                release_version(self._claimed)  # of a run that ended before it wrote anything

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the options of this command line."""
        parser.set_defaults({"data": {"class_path": _DEFAULT_DATA}})
        parser.add_argument("--run.folder", type=str, default="runs", help="Folder of all runs.")
        parser.add_argument("--run.name", type=str, default="msnn", help="Name of this experiment, a folder in it.")
        parser.add_argument(
            "--run.test", type=bool, default=True, help="Whether fit ends by testing the best checkpoint."
        )
        parser.add_argument(
            "--run.every_n_steps",
            type=int,
            default=0,
            help="Steps from one last checkpoint to the next; 0: only after each epoch and when told to stop.",
        )
        parser.add_argument("--predictions", type=str, default="predictions.csv", help="CSV file that predict writes.")

    # Before anything is built: checkpoint and folders

    def _parse_ckpt_path(self) -> None:
        config = self.config[self.config.subcommand]
        path = config.get("ckpt_path")
        if path in (None, "last", "best", "hpc"):
            if path == "best" or (path == "last" and self.config.subcommand != "fit"):
                raise ConfigurationError(
                    f"--ckpt_path {path} is not known to {self.config.subcommand}: give the path of a .ckpt file"
                )
            if path is None and self.config.subcommand != "fit" and not config.get("model.pretrained"):
                raise ConfigurationError(
                    f"{self.config.subcommand} needs trained weights: give --ckpt_path FILE, or --model.pretrained true"
                )
            return
        checkpoint = read_checkpoint(path)
        super()._parse_ckpt_path()
        self._data_of_checkpoint(checkpoint)

    def _data_of_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take the data of a checkpoint where the command line names none."""
        config = self.config[self.config.subcommand]
        name = checkpoint.get("preprocessing", {}).get("data")
        hparams = checkpoint.get("datamodule_hyper_parameters")
        if name not in data.__all__ or not isinstance(hparams, dict) or config.data is None:
            return
        if config.data.class_path != _DEFAULT_DATA:
            return
        parser = self._parser(self.config.subcommand)
        default = parser.parse_args([]).data.init_args
        given = {k: v for k, v in config.data.init_args.items() if v != default.get(k)}
        merged = {
            "class_path": f"lightning_msnn.data.{name}",
            "init_args": {**arguments_of_checkpoint(hparams), **given},
        }
        self.config = self.parser.parse_object({self.config.subcommand: {"data": merged}}, self.config)

    def before_instantiate_classes(self) -> None:
        """Give the local loggers one folder for this run."""
        config = self.config[str(self.subcommand)]
        if self.subcommand == "predict":
            config.trainer.logger, self.save_config_callback = False, None  # predictions are the output; no run begins
        loggers = config.trainer.get("logger")
        if not isinstance(loggers, list):
            loggers = [loggers]
        local = [x for x in loggers if hasattr(x, "class_path") and x.class_path.rsplit(".", 1)[-1] in _LOCAL_LOGGERS]
        base = Path(config.run.folder) / config.run.name
        _check_folder(base)
        version = None
        if config.get("ckpt_path") == "last":
            version = newest_version(base, resumable=True)
            if version is None:
                rank_zero_info(f"No last checkpoint in {base}: a new training begins")
                config.ckpt_path = None
            else:
                last = base / f"version_{version}" / "checkpoints" / "last.ckpt"
                read_checkpoint(last)  # a broken one is refused before anything starts
                config.ckpt_path = str(last)
                _keep_metrics(last.parents[1])
        if version is None and self.subcommand != "predict":
            self._claimed = claim_version(base)
            version = self._claimed.version
        for logger in local:
            if logger.init_args.get("version") is None:
                logger.init_args.save_dir, logger.init_args.name = config.run.folder, config.run.name
                logger.init_args.version = version
        if config.trainer.get("default_root_dir") is None:
            config.trainer.default_root_dir = str(base if version is None else base / f"version_{version}")

    def _instantiate_trainer(self, config: dict[str, Any], callbacks: list[Callback]) -> Trainer:
        """Add what every run has, and say in one sentence what a Trainer refuses."""
        checkpoints = (
            []
            if config.get("enable_checkpointing") is False
            else [LastCheckpoint(self._get(self.config_init, "run").every_n_steps)]
        )
        plugins = config.get("plugins") or []
        plugins = list(plugins) if isinstance(plugins, list | tuple) else [plugins]
        if not any(isinstance(plugin, CheckpointIO) for plugin in plugins):
            config["plugins"] = [*plugins, AtomicCheckpointIO()]
        try:
            return super()._instantiate_trainer(
                config, [*callbacks, LoggerGuard(), RandomState(), FiniteLoss(), *checkpoints]
            )
        except (MisconfigurationException, ValueError, TypeError) as error:
            raise ConfigurationError(f"trainer: {' '.join(str(error).split())}") from error

    def _prepare_subcommand_kwargs(self, subcommand: str) -> dict[str, Any]:
        """Load checkpoints as plain values only."""
        kwargs = super()._prepare_subcommand_kwargs(subcommand)
        return {**kwargs, "weights_only": True}

    # Before anything is written: does the model fit the data?

    def _check(self) -> None:
        if self.datamodule is not None:
            if hasattr(self.datamodule, "check"):
                self.datamodule.check(self.subcommand)
            if self.subcommand != "predict":
                self.model.check_data(self.datamodule)

    before_validate = _check

    def before_fit(self) -> None:
        """Check the data and the teacher."""
        self._check()
        self.model.load_teacher()

    def before_test(self) -> None:
        """Check the data and have operations and energy counted."""
        self._check()
        callbacks: list[Any] = self.trainer.callbacks  # type: ignore[attr-defined]
        if not any(isinstance(callback, EnergyMonitor) for callback in callbacks):
            callbacks.append(EnergyMonitor())

    def after_test(self) -> None:
        """Print what the network costs beside its twins."""
        for callback in self.trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, EnergyMonitor) and self.trainer.is_global_zero:
                sys.stdout.write(f"\n{callback.table()}")

    def before_predict(self) -> None:
        """Check the folder and have a CSV file written."""
        self._check()
        self.trainer.callbacks.append(  # type: ignore[attr-defined]
            PredictionWriter(self._get(self.config_init, "predictions"))
        )

    def after_fit(self) -> None:
        """Test the best checkpoint of the training, which validation chose."""
        if not self._get(self.config_init, "run").test or self.trainer.interrupted:
            return
        checkpoint = self.trainer.checkpoint_callback
        path = getattr(checkpoint, "best_model_path", "") if checkpoint is not None else ""
        rank_zero_info(f"Testing {path or 'the last weights'}")
        self.trainer.test(self.model, datamodule=self.datamodule, ckpt_path=path or None, weights_only=True)
        self.after_test()


def _check_folder(folder: Path) -> None:
    """Raise a ConfigurationError if a folder cannot be made or written to; make nothing."""
    place = next(place for place in (folder.absolute(), *folder.absolute().parents) if place.exists())
    if not place.is_dir():
        raise ConfigurationError(f"cannot write to {str(folder)!r}: {str(place)!r} is a file")
    if not os.access(place, os.W_OK):
        raise ConfigurationError(f"cannot write to {str(folder)!r}: {str(place)!r} is read-only")


@rank_zero_only
def _keep_metrics(folder: Path) -> None:
    """Put the metrics of the run that is resumed aside: Lightning's CSVLogger would delete them."""
    file = folder / "metrics.csv"
    if file.is_file():
        file.rename(next(f for i in count() if not (f := folder / f"metrics.{i}.csv").exists()))


def _configuration_error(error: BaseException | None) -> ConfigurationError | None:
    """Find a configuration error under what a parser or a Trainer has wrapped it in."""
    while error is not None:
        if isinstance(error, ConfigurationError):
            return error
        if isinstance(error, ValueError) and "Does not validate against any of the Union" in str(error):
            return ConfigurationError(_one_sentence(str(error)))  # jsonargparse keeps reasons as text alone
        error = error.__cause__ or error.__context__
    return None


def main(args: ArgsType = None) -> None:
    """Run the command line.

    Args:
        args: Arguments, those of the process if None.
    """
    try:
        MSNNCLI(
            SpikingClassifier,
            data.ImageDataModule,
            subclass_mode_data=True,
            save_config_callback=_SaveConfig,
            save_config_kwargs={"overwrite": True},
            seed_everything_default=0,
            parser_class=_Parser,
            trainer_defaults={
                "logger": [
                    {"class_path": f"lightning.pytorch.loggers.{name}", "init_args": {"save_dir": "runs"}}
                    for name in _LOCAL_LOGGERS
                ],
            },
            load_from_checkpoint_support=False,  # hyper-parameters are plain values already
            args=args,
        )
    except SIGTERMException as stop:
        sys.exit(128 + signal.SIGTERM if stop.code is None else stop.code)  # Lightning's own are without a code
    except Exception as error:
        cause: Exception | None = error if isinstance(error, TrainingError) else _configuration_error(error)
        if cause is None:
            raise
        sys.stderr.write(f"lightning-msnn: error: {cause}\n")
        sys.exit(1 if isinstance(cause, TrainingError) else 2)
