"""The verbs ``fit``, ``validate``, ``test`` and ``predict``: LightningCLI for any module and any data."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Sequence
from enum import Enum
from inspect import Parameter, signature
from itertools import count
from pathlib import Path
from typing import Any, get_args, get_type_hints

from jsonargparse import Namespace
from lightning.fabric.plugins import CheckpointIO
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.accelerators import CPUAccelerator
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.loggers import Logger
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.exceptions import MisconfigurationException, SIGTERMException
from lightning.pytorch.utilities.rank_zero import rank_zero_info

from lightning_msnn import __version__, tasks
from lightning_msnn.callbacks import (
    EMA,
    BestCheckpoint,
    EnergyMonitor,
    IntegerInference,
    PredictionWriter,
    SpikeRateMonitor,
    TrainingCurves,
)
from lightning_msnn.callbacks.best_checkpoint import check_logged
from lightning_msnn.cli.causes import configuration_error, is_lightnings, is_restoring
from lightning_msnn.cli.config_files import sentence
from lightning_msnn.cli.folders import LOCAL_LOGGERS, check_folder, place_logger, put_aside, run_of, with_local_first
from lightning_msnn.cli.given import BASES, DEFAULTS, IMPORTS, Given, Parser, arguments_of, path_of
from lightning_msnn.cli.known import AT_THE_START, OF_A_TRAINING, Known, plain
from lightning_msnn.entries import entries
from lightning_msnn.errors import ConfigurationError, TrainingError, suggestion
from lightning_msnn.export.__main__ import main as export
from lightning_msnn.imports import HELP, explained
from lightning_msnn.nn import Spike
from lightning_msnn.runs import (
    AtomicCheckpointIO,
    Claim,
    FiniteLoss,
    LastCheckpoint,
    RandomState,
    claim_version,
    newest_version,
    read_checkpoint,
    release_version,
)

__all__ = ["MSNNCLI", "main"]

LINKED = {"num_classes": "num_classes", "in_chans": "in_chans"}
"""Arguments of the model that are an attribute of the data by default."""

EPOCHS = 30
"""Epochs of a training whose end nothing else says."""

BEST = "val/top1"
"""Metric that chooses the best checkpoint if no other is named."""

OTHERS: dict[str, Callable[[Sequence[str]], None]] = {"export": export}
"""Verbs that are no training of LightningCLI, each with a command line of its own."""

MORE = (*OTHERS,)
"""Verbs that are not those of LightningCLI."""


def _as_text(value: Any) -> Any:
    """Return a configuration with members of enumerations, which some classes have as defaults, as their text."""
    if isinstance(value, Namespace):
        for key, part in vars(value).items():
            setattr(value, key, _as_text(part))
    elif isinstance(value, list):
        return [_as_text(part) for part in value]
    return str(value.value) if isinstance(value, Enum) and isinstance(value, str) else value


def _no(value: Any) -> bool:
    return value in (None, False, "null", "false", "False")


def _linked(name: str, parameter: Parameter) -> Callable[[Any], Any]:
    """Return a function that reads what the model takes from the data, or the model's default."""

    def read(datamodule: Any) -> Any:
        try:
            value = getattr(datamodule, LINKED[name], None)
        except ConfigurationError:
            raise
        except Exception:  # of data that knows it only once it is set up
            value = None
        if value is None and parameter.default is Parameter.empty:
            raise ConfigurationError(f"model.{name} must be given: {type(datamodule).__name__} does not say it")
        return parameter.default if value is None else value

    return read


class _Record(SaveConfigCallback):
    """Save the configuration with the run, send it to the loggers, and say in checkpoints of what classes they are."""

    def setup(self, trainer: Trainer, pl_module: Any, stage: str) -> None:
        """Write the configuration; a folder where that is not possible would not take checkpoints either."""
        try:
            super().setup(trainer, pl_module, stage)
        except OSError as error:
            raise ConfigurationError(
                f"cannot write to the run's folder {error.filename!r}: {error.strerror}"
            ) from error

    begun = False
    """Whether a training step is done."""

    def on_train_batch_end(self, *_: Any, **__: Any) -> None:
        """Note that the first step is done."""
        self.begun = True

    def on_validation_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Stop, before the first step if that is known, if a callback needs a metric that a validation does not log."""
        if trainer.state.fn != TrainerFn.FITTING or not isinstance(pl_module, tasks.Task):
            return
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            monitor = getattr(callback, "monitor", None)
            asks_itself = isinstance(callback, BestCheckpoint) or getattr(callback, "strict", True) is False
            if isinstance(monitor, str) and monitor.startswith("val/") and not asks_itself:
                check_logged(trainer, pl_module, monitor, f"which {type(callback).__name__} watches")

    def save_config(self, trainer: Trainer, pl_module: Any, stage: str) -> None:
        """Send the configuration to every logger."""
        text = self.parser.dump(self.config, skip_none=False)
        for logger in trainer.loggers:
            if isinstance(logger, Logger):
                logger.log_hyperparams({"config": text})

    def on_save_checkpoint(self, trainer: Trainer, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Store the paths of the classes, and options that a training that goes on must have too."""
        known = {section: self.config[section].class_path for section in BASES}
        more = {
            section: {name: self.config[section].get(name) for name in names}
            for section, names in OF_A_TRAINING.items()
        }
        checkpoint["cli"] = known | plain(more)


class MSNNCLI(LightningCLI):
    """LightningCLI for any module and data; a spiking classifier of digits by default.

    Beyond LightningCLI: configurations that come with the package are found by name; the model takes the data's number
    of classes, channels and image size; runs go to ``<run.folder>/<run.name>/version_<n>`` for all local loggers alike,
    and nothing that exists is overwritten; ``--ckpt_path last`` resumes the newest run that has a last checkpoint, bit
    for bit where it stopped; a checkpoint or a zoo entry says what model, data and preprocessing it needs, and what is
    given otherwise is refused; what is wrong with model, data or checkpoint is said before anything is written;
    checkpoints are written whole or not at all; a loss that is not finite stops the training, and a logger that fails
    does not; ``fit`` ends with ``test`` of the best checkpoint; ``predict`` writes a CSV file.
    """

    _claimed: Claim | None = None
    _aside: dict[Path, Path] | None = None
    """Files of a resumed run that were put aside."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        try:
            super().__init__(*args, **kwargs)
        except BaseException:
            for file, aside in () if self._aside is None or self._begun() else self._aside.items():
                aside.replace(file)  # a resumed run that was refused is as it was
            raise
        finally:
            if self._claimed is not None:
                release_version(self._claimed)  # of a run that ended before it wrote anything

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the options of this command line."""
        parser.set_defaults({section: {"class_path": path_of(kind)} for section, kind in DEFAULTS.items()})
        for name, kind, default, text in (
            (IMPORTS, str | list[str], [], HELP),
            ("run.folder", str, "runs", "Folder of all runs."),
            ("run.name", str | None, None, "Folder of this experiment in it, by default network and data."),
            ("run.test", bool, True, "Whether fit ends by testing the best checkpoint."),
            ("run.best", str | None, BEST, "Metric that chooses checkpoints/best.ckpt; null keeps none."),
            ("run.best_mode", str, "max", "Whether the highest (max) or the lowest (min) value is best."),
            ("run.every_n_steps", int, 0, "Steps from one checkpoints/last.ckpt to the next; 0: after each epoch."),
            ("run.ema", float, 0.0, "Decay of the moving average of weights that is validated and kept; 0: none."),
            ("run.monitors", bool, True, "Whether energy and spike rates of tasks of this package are monitored."),
            ("predictions", str, "predictions.csv", "CSV file that predict writes."),
            ("integer", bool, False, "Whether validate, test and predict run in integers of 8 bits, on a CPU."),
        ):  # fmt: skip
            parser.add_argument(f"--{name}", type=kind, default=default, help=text)

    # Before anything is parsed: what is given, and what a checkpoint or an entry says

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Read what is given, and complete it from a checkpoint, an entry of the zoo, or the data."""
        args = list(sys.argv[1:] if args is None else args)
        verbs = self._subcommand_parsers
        if not args or (not args[0].startswith("-") and args[0] not in verbs):
            given = f", not {args[0]!r}{suggestion(args[0], (*verbs, *MORE))}" if args else ""
            raise ConfigurationError(f"the first argument must be one of {', '.join((*verbs, *MORE))}{given}")
        self._checkpoint: str | None = None
        if args[0] not in verbs:
            self.config = parser.parse_args(args)
            raise ConfigurationError(f"the first argument must be one of {', '.join(verbs)}, not {args[0]!r}")
        verb = args[0]
        self._given = Given(verbs[verb], args[1:])
        self._known = Known(self._given)
        if self._given.help:
            parser.parse_args([verb, *self._given.help])  # which prints it, and exits
        back: dict[str, Any] = {}
        if (content := self._find_checkpoint(verb)) is not None:
            back = {"model": AT_THE_START}
            self._known.read_checkpoint(content, str(self._checkpoint), resumed=verb == "fit")
        elif verb != "fit":
            network = str(self._given.values.get("model.network"))
            if not _no(self._given.values.get("model.pretrained")) and network in entries():
                self._known.read_entry(network)
            self._name = self._name_of_run()  # after the data of the entry
        self._given.settle()
        self._link(verbs[verb])
        try:
            self.config = parser.parse_args([verb, *self._given.arguments(self._known.arguments, back)])
        except ConfigurationError:
            raise
        except Exception as error:  # whatever nested values make the parser raise
            raise ConfigurationError(f"the options cannot be read: {sentence(error)}") from error
        self._known.compare(self.config[verb], resumed=verb == "fit")
        if verb == "fit" and self.config[verb].integer:
            raise ConfigurationError("integer is for validate, test and predict: a training has no integer weights")
        if verb == "fit" and self.config[verb].get("lr_scheduler") and not self.config[verb].get("optimizer"):
            raise ConfigurationError(
                "lr_scheduler needs an optimizer beside it (--optimizer), whose rate it sets: the model's own has "
                "model.schedule"
            )
        seed = self.config[verb].seed_everything
        if not isinstance(seed, bool) and (seed is None or not 0 <= seed < 2**32):
            raise ConfigurationError(f"seed_everything must be true, false or an integer in [0, 2^32), not {seed}")
        for name, kind in get_type_hints(Trainer.__init__).items():  # null gets past the parser
            if self.config[verb].trainer.get(name, 0) is None and type(None) not in get_args(kind):
                raise ConfigurationError(f"trainer.{name} must be {getattr(kind, '__name__', kind)}, not null")
        if (batches := self.config[verb].trainer.accumulate_grad_batches) < 1:
            raise ConfigurationError(f"trainer.accumulate_grad_batches must be at least 1, not {batches}")
        if (clip := self.config[verb].trainer.gradient_clip_val) is not None and not clip >= 0:
            raise ConfigurationError(f"trainer.gradient_clip_val must be at least 0 or null, not {clip}")

    def _find_checkpoint(self, verb: str) -> dict[str, Any] | None:
        """Read the checkpoint that is given, before anything starts."""
        given = self._given.values
        path = given.get("ckpt_path")
        self._name = self._name_of_run()
        base = Path(str(given.get("run.folder", "runs"))) / self._name
        if path in ("best", "hpc") or (path == "last" and verb != "fit"):
            raise ConfigurationError(f"--ckpt_path {path} is not known to {verb}: give the path of a .ckpt file")
        if path == "last":
            if (version := newest_version(base, resumable=True)) is None:
                rank_zero_info(f"No last checkpoint in {base}: a new training begins")
                return None
            path = base / f"version_{version}" / "checkpoints" / "last.ckpt"
        elif _no(path):
            if (
                verb != "fit"
                and issubclass(self._given.classes["model"], tasks.Task)
                and _no(given.get("model.pretrained"))
                and not self._given.only_prints
            ):
                raise ConfigurationError(
                    f"{verb} needs trained weights: give --ckpt_path FILE, or --model.pretrained true"
                )
            return None
        self._checkpoint = str(path)
        return read_checkpoint(self._checkpoint)

    def _name_of_run(self) -> str:
        """The run's name: by default network and data."""
        name, kind = self._given.values.get("run.name"), self._given.classes["model"]
        if not _no(name):
            return str(name)
        network = self._given.values.get("model.network") or getattr(arguments_of(kind).get("network"), "default", None)
        name = f"{network or kind.__name__}_{self._given.classes['data'].__name__}".lower()
        return name.replace(".", "_").replace("/", "_")

    def _link(self, parser: LightningArgumentParser) -> None:
        """Let the model's arguments be the data's, where neither the user nor a checkpoint says them."""
        model = self._given.classes["model"]
        made = [vars(kind)["__init__"] for kind in reversed(model.__mro__) if "__init__" in vars(kind)]
        parameters = {name: parameter for init in made for name, parameter in signature(init).parameters.items()}
        for name in LINKED.keys() & arguments_of(model).keys() - self._known.arguments["model"].keys():
            if f"model.{name}" not in self._given.values:
                read = _linked(name, parameters[name])
                parser.link_arguments("data", f"model.init_args.{name}", compute_fn=read, apply_on="instantiate")

    def _parse_ckpt_path(self) -> None:
        """Done before parsing."""

    # Before anything is built: folders

    def before_instantiate_classes(self) -> None:
        """Give the local loggers one folder for this run."""
        verb = str(self.subcommand)
        config, given = self.config[verb], self._given.values
        config.run.name = self._name
        trainer = config.trainer
        if verb == "fit" and trainer.max_epochs is None and trainer.max_steps == -1 and trainer.max_time is None:
            trainer.max_epochs = EPOCHS
        resumed = given.get("ckpt_path") == "last"
        self._saved = _as_text(config.clone())  # what reproduces this run, in another folder
        if resumed:
            self._saved.ckpt_path, config.ckpt_path = None, self._checkpoint
        for option, folder in (
            ("run.folder", config.run.folder),
            ("trainer.default_root_dir", trainer.default_root_dir),
        ):
            if "://" in str(folder):
                raise ConfigurationError(f"{option} must be a folder of this machine, not {str(folder)!r}")
        base = Path(config.run.folder) / config.run.name
        if verb == "predict":
            trainer.logger = False  # predictions are the output; no run begins
        loggers: list[Any] = []
        if trainer.logger not in (False, []):
            loggers = trainer.logger = with_local_first(trainer.logger)
        version: int | str | None = None
        if resumed and self._checkpoint is not None:
            folder = Path(self._checkpoint).parents[1]
            version = int(folder.name.removeprefix("version_"))
            self._aside = put_aside(folder, "metrics.csv", "config.yaml")
        elif (
            verb in ("validate", "test")
            and self._checkpoint is not None
            and not {"run.folder", "run.name"} & given.keys()
        ):
            file = Path(self._checkpoint).absolute()
            base = file.parents[1] if file.parent.name == "checkpoints" else file.parent
            version = next(v for i in count() if not (base / (v := f"{verb}_{i}")).exists())
        check_folder(base)
        if version is None and verb != "predict":
            try:
                self._claimed = claim_version(base)
            except OSError as error:
                raise ConfigurationError(f"cannot write to {str(base)!r}: {error.strerror}") from error
            version = self._claimed.version
        for logger in loggers:
            place_logger(logger, base, version, config.run)
        if trainer.default_root_dir is None:
            trainer.default_root_dir = str(run_of(base, version))

    def _callbacks(self, config: dict[str, Any]) -> list[Callback]:
        """Return the callbacks that options ask for; one of the user's takes the place of one of its kind."""
        verb, run = self.subcommand, self._get(self.config_init, "run")
        given: list[Callback] = config["callbacks"]
        checkpoints = config.get("enable_checkpointing") is not False
        first: list[Callback] = [IntegerInference()] if self._get(self.config_init, "integer") else []
        # The average is made of the network that callbacks such as Convert leave.
        then: list[Callback] = [EMA(run.ema)] if run.ema and verb == "fit" else []
        then += [TrainingCurves()] if verb == "fit" else []
        if run.monitors and verb in ("fit", "test") and isinstance(self.model, tasks.Task):
            spikes = any(isinstance(module, Spike) for module in self.model.modules())
            then += [*([SpikeRateMonitor()] if spikes else []), EnergyMonitor()]
        chosen = any(isinstance(callback, ModelCheckpoint) for callback in given)
        if run.best is not None and checkpoints and verb == "fit" and not chosen:
            required = isinstance(self.model, tasks.Task) or run.best != BEST  # others log what they please
            then.append(BestCheckpoint(run.best, run.best_mode, required=required))
        kinds = tuple(type(callback) for callback in given)
        first, then = ([callback for callback in ours if not isinstance(callback, kinds)] for ours in (first, then))
        last: list[Callback] = [LastCheckpoint(run.every_n_steps)] if checkpoints else []
        return [*first, *given, *then, RandomState(), FiniteLoss(), *last]

    def instantiate_classes(self) -> None:
        """Make model, data and trainer; what ours are given and cannot be made of is said in one sentence."""
        try:
            super().instantiate_classes()
        except Exception as error:  # whatever arguments make torch, timm or Lightning raise
            if configuration_error(error) is not None or not self._ours():
                raise
            raise ConfigurationError(f"model, data or trainer cannot be made as given: {sentence(error)}") from error

    def _run_subcommand(self, subcommand: str) -> None:
        """Run the verb; what a checkpoint holds and cannot be restored is said in one sentence."""
        try:
            super()._run_subcommand(subcommand)
        except TrainingError:
            raise
        except Exception as error:  # whatever the values in a file make Lightning and torch raise
            if configuration_error(error) is not None:
                raise
            restoring, begins = self._checkpoint is not None and is_restoring(error), self._begins()
            if begins and not restoring and is_lightnings(error):
                raise ConfigurationError(f"the training cannot begin: {sentence(error)}") from error
            if self._ours() and isinstance(error, MisconfigurationException):
                raise ConfigurationError(f"the training cannot go on: {sentence(error)}") from error
            if restoring or (begins and self._checkpoint is not None):
                raise ConfigurationError(f"{self._checkpoint!r} cannot be restored: {sentence(error)}") from error
            raise

    def _ours(self) -> bool:
        """Whether model and data are of this package; errors of other classes keep their traceback."""
        return all(kind.__module__.startswith("lightning_msnn.") for kind in self._given.classes.values())

    def _begins(self) -> bool:
        """Whether a training of our classes has not done a step yet, in which it takes up what it resumes."""
        return self.subcommand == "fit" and self._ours() and not self._begun()

    def _begun(self) -> bool:
        """Whether a step of a training is done."""
        callbacks = getattr(getattr(self, "trainer", None), "callbacks", [])
        return any(callback.begun for callback in callbacks if isinstance(callback, _Record))

    def _instantiate_trainer(self, config: dict[str, Any], callbacks: list[Callback]) -> Trainer:
        """Add what every run has, and say in one sentence what a Trainer refuses."""
        given = config.get("callbacks") or []
        config["callbacks"] = list(given) if isinstance(given, list) else [given]
        config["callbacks"] = self._callbacks(config)
        if self.subcommand != "predict" and not config.get("fast_dev_run"):
            callbacks = [*callbacks, _Record(self._parser(self.subcommand), self._saved)]
        plugins = config.get("plugins") or []
        plugins = list(plugins) if isinstance(plugins, list | tuple) else [plugins]
        if not any(isinstance(plugin, CheckpointIO) for plugin in plugins):
            config["plugins"] = [*plugins, AtomicCheckpointIO()]
        try:
            trainer = super()._instantiate_trainer(config, callbacks)
        except (MisconfigurationException, ValueError, TypeError) as error:
            raise ConfigurationError(f"trainer: {' '.join(str(error).split())}") from error
        on_cpus = isinstance(trainer.accelerator, CPUAccelerator) and isinstance(trainer.strategy, DDPStrategy)
        if config.get("sync_batchnorm") and on_cpus:
            raise ConfigurationError(
                "trainer.sync_batchnorm must be false on CPUs, not true: torch has it on GPUs alone"
            )
        return trainer

    def _prepare_subcommand_kwargs(self, subcommand: str) -> dict[str, Any]:
        """Load checkpoints as plain values only."""
        kwargs = super()._prepare_subcommand_kwargs(subcommand)
        return {**kwargs, "weights_only": True}

    # Before anything is written: does the model fit the data?

    def _check(self) -> None:
        if self.datamodule is not None and hasattr(self.datamodule, "check"):
            self.datamodule.check(self.subcommand)
        if isinstance(self.model, tasks.Task) and self.datamodule is not None and self.subcommand != "predict":
            self.model.check_data(self.datamodule)
        if self.subcommand != "fit":
            self._known.apply(self.model, self.datamodule, classes_differ=self.subcommand == "predict")

    before_validate = before_test = _check

    def before_fit(self) -> None:
        """Check the data, also what the training ends by testing on, and the teacher."""
        self._check()
        if self._get(self.config_init, "run").test and hasattr(self.datamodule, "check"):
            try:
                self.datamodule.check("test")
            except ConfigurationError as error:
                raise ConfigurationError(f"{error}; --run.test false leaves out the test at the end") from error

    def after_test(self) -> None:
        """Print what the network costs beside its twins."""
        for callback in self.trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, EnergyMonitor) and self.trainer.is_global_zero:
                sys.stdout.write(f"\n{callback.table()}")

    def before_predict(self) -> None:
        """Check the folder and have a CSV file written."""
        self._check()
        if isinstance(self.model, tasks.SpikingClassifier):
            writer = PredictionWriter(self._get(self.config_init, "predictions"))
            self.trainer.callbacks.append(writer)  # type: ignore[attr-defined]
        else:
            rank_zero_info("%s writes no predictions: give it a callback that does", type(self.model).__name__)

    def after_fit(self) -> None:
        """Test the best checkpoint of the training, which validation chose."""
        if not self._get(self.config_init, "run").test or self.trainer.interrupted:
            return
        if not isinstance(self.model, tasks.Task) and type(self.model).test_step is LightningModule.test_step:
            return
        checkpoint = self.trainer.checkpoint_callback
        path = getattr(checkpoint, "best_model_path", "") if checkpoint is not None else ""
        rank_zero_info(f"Testing {path or 'the last weights'}")
        self.trainer.test(self.model, datamodule=self.datamodule, ckpt_path=path or None, weights_only=True)
        self.after_test()


def main(args: Sequence[str] | None = None) -> None:
    """Run the command line.

    Args:
        args: Arguments, those of the process if None.
    """
    args = sys.argv[1:] if args is None else args
    if args and args[0] in OTHERS:
        return OTHERS[args[0]](args[1:])
    loggers = [f"lightning.pytorch.loggers.{name}" for name in LOCAL_LOGGERS]
    try:
        MSNNCLI(
            LightningModule,
            LightningDataModule,
            subclass_mode_model=True,
            subclass_mode_data=True,
            save_config_callback=None,  # ours is added with the other callbacks
            seed_everything_default=0,
            parser_class=Parser,
            parser_kwargs={
                "version": __version__,
                "epilog": f"More, each with --help: {', '.join(f'lightning-msnn {verb}' for verb in MORE)}",
            },
            trainer_defaults={"logger": [{"class_path": p, "init_args": {"save_dir": "."}} for p in loggers]},
            load_from_checkpoint_support=False,  # hyper-parameters are plain values already
            args=args,
        )
    except SIGTERMException as stop:
        sys.exit(128 + signal.SIGTERM if stop.code is None else stop.code)  # Lightning's own are without a code
    except Exception as error:
        cause: Exception | None = error if isinstance(error, TrainingError) else configuration_error(error)
        if cause is None:
            raise
        sys.stderr.write(f"lightning-msnn: error: {explained(cause, f'--{IMPORTS}')}\n")
        sys.exit(1 if isinstance(cause, TrainingError) else 2)
