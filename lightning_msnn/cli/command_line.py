"""The verbs ``fit``, ``validate``, ``test`` and ``predict``: LightningCLI for any module and any data."""

from __future__ import annotations

import json
import signal
import sys
import warnings
from collections.abc import Callable
from inspect import Parameter
from pathlib import Path
from typing import Any

import timm
import yaml
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities.exceptions import MisconfigurationException, SIGTERMException
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.rank_zero import rank_zero_info

import lightning_msnn_cli
from lightning_msnn import __version__, tasks
from lightning_msnn.callbacks import (
    EMA,
    BestCheckpoint,
    Convert,
    EnergyMonitor,
    PredictionWriter,
    SpikeRateMonitor,
    TrainingCurves,
)
from lightning_msnn.cli.folders import Run, begin_run, experiment_folder, newest_run, place_loggers, resume_run
from lightning_msnn.cli.parsing import IMPORTS, ConfigurationFile, Parser, leading
from lightning_msnn.cli.source import Source, compare_resumed, options_of
from lightning_msnn.data.arrays import ArrayDataModule
from lightning_msnn.entries import find
from lightning_msnn.errors import ConfigurationError, brief, in_chain, parameters_of
from lightning_msnn.imports import import_files
from lightning_msnn.models.registry import imported
from lightning_msnn.nn import Spike
from lightning_msnn.runs import FiniteLoss, LastCheckpoint, RandomState, is_checkpoint, read_checkpoint
from lightning_msnn.runs.trainer import LAST

__all__ = ["MSNNCLI", "run"]

DEFAULTS = {"model": "lightning_msnn.tasks.SpikingClassifier", "data": "lightning_msnn.data.Digits"}
"""Classes of a training that names none."""

LINKED = ("num_classes", "in_chans")
"""Arguments of the model that are attributes of the data."""

EPOCHS = 30
"""Epochs of a training whose end nothing else says."""


class _Record(Callback):
    """Save the configuration in the run's folder, send it to the loggers, and store what a resumed training needs."""

    def __init__(self, folder: Path, config: str) -> None:
        self.begun, self._folder, self._config = False, folder, config

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Write the configuration; a folder where that is not possible would not take checkpoints either."""
        if not trainer.is_global_zero:
            return
        for logger in trainer.loggers:
            if isinstance(logger, Logger):
                logger.log_hyperparams({"config": yaml.safe_load(self._config)})
        file = self._folder / "config.yaml"
        if not file.exists():  # fit ends with test
            try:
                file.write_text(f"# lightning-msnn {__version__}\n{self._config}", encoding="utf-8")
            except OSError as error:
                raise ConfigurationError(f"cannot write to the run's folder: {brief(error)}") from error

    def on_train_batch_end(self, *_: Any, **__: Any) -> None:
        """Note that a step is done."""
        self.begun = True

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Store the options that a resumed training must have too."""
        config = yaml.safe_load(self._config)
        classes = {section: (config[section] or {}).get("class_path") for section in DEFAULTS}
        checkpoint["cli"] = {**classes, "options": dict(options_of(config))}


class MSNNCLI(LightningCLI):
    """LightningCLI for any module and data; a spiking classifier of digits by default.

    Beyond LightningCLI: configurations that come with the package are found by name; the model takes the data's number
    of classes and channels; runs lie in ``<trainer.default_root_dir>/<run.name>/version_<n>``, and nothing that exists
    is overwritten; ``--ckpt_path last`` resumes the newest run; ``validate``, ``test`` and ``predict`` take model, data
    and preprocessing from the checkpoint or the zoo entry; ``fit`` ends with ``test`` of the best checkpoint;
    ``predict`` writes a CSV file.
    """

    _run: Run | None = None
    _record: _Record | None = None
    _source: Source | None = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        verbs, given = LightningCLI.subcommands(), kwargs.get("args") or sys.argv[1:]
        if given and given[0] in verbs:  # the parser of each takes a while to make
            self.subcommands = lambda: {given[0]: verbs[given[0]]}  # type: ignore[method-assign]
        ended = False
        try:
            super().__init__(*args, **kwargs)
            ended = True
        finally:
            if self._run is not None:
                self._run.close(ended or self._begun)

    @property
    def _begun(self) -> bool:
        """Whether a training step is done."""
        return self._record is not None and self._record.begun

    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        """Return a parser that finds configurations by name."""
        parser = self.parser_class(allow_abbrev=False, **kwargs)
        parser.add_argument("-c", "--config", action=ConfigurationFile, help="Configuration: a file, or a name.")
        return parser

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the options of this command line, and let the model's arguments be the data's."""
        for name, kind, default, text in (
            (IMPORTS, str | list[str], [], lightning_msnn_cli.IMPORTS),
            ("run.name", str | None, None, "Folder of this experiment, by default network and data."),
            ("run.test", bool, True, "Whether fit ends by testing the best checkpoint."),
            ("run.every_n_steps", int, 0, "Steps from one checkpoints/last.ckpt to the next; 0: after each epoch."),
            ("run.ema", float, 0.0, "Decay of the moving average of weights that is validated and kept; 0: none."),
            ("run.monitors", bool, True, "Whether energy and spike rates of tasks of this package are monitored."),
            ("out", str, "predictions.csv", "CSV file that predict writes."),
        ):  # fmt: skip
            parser.add_argument(f"--{name}", type=kind, default=default, help=text)
        for name in LINKED:
            read = self._reader(name)
            parser.link_arguments("data", f"model.init_args.{name}", compute_fn=read, apply_on="instantiate")

    def _reader(self, name: str) -> Callable[[Any], Any]:
        """Return a function that reads an argument of the model off the data, unless it is given."""

        def read(datamodule: Any) -> Any:
            model = self._get(self.config, "model")
            default = parameters_of(imported(model.class_path, LightningModule) or LightningModule).get(name)
            given = model.init_args.get(name, default)
            if self._source is not None or given != default:
                return given
            value = getattr(datamodule, name, None)
            if value is None and default is Parameter.empty:
                raise ConfigurationError(f"model.{name} must be given: {type(datamodule).__name__} does not say it")
            return default if value is None else value

        return read

    # What is parsed

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse the command line; a checkpoint or an entry gives the defaults of model and data."""
        args = list(sys.argv[1:] if args is None else args)
        verb = args[0] if args else ""
        if verb in self._subcommand_parsers:
            leads = leading(args[1:])
            self._source = self._find_source(verb, leads)
            first: dict[str, Any] = {section: {"class_path": path} for section, path in DEFAULTS.items()}
            if self._source is not None:
                first = self._source.configuration(args)
            args = [verb, *(["--config", json.dumps(first)] if first else []), *args[1:]]
        self.config = parser.parse_args(args)
        config = self.config[verb]
        if verb != "fit":  # whose checkpoint decided what was parsed; a configuration behind it may say null
            config.ckpt_path = leads.ckpt_path or config.ckpt_path
        config.run.imports = import_files(config.run.imports)  # by their full paths
        ours = imported(config.model.class_path, tasks.Task) is not None
        if self._source is None and ours:
            network = (given := config.model.init_args).network
            if not isinstance(network, str):  # class_path and init_args, as elsewhere in a configuration
                own = {key: value for key, value in dict(network.get("init_args", {})).items() if key not in LINKED}
                given.network, given.network_kwargs = network.class_path, own | (given.network_kwargs or {})
            elif "." in network and ":" not in network and not timm.is_model(network):  # the user's own class
                import_files(network.rpartition(".")[0])
        if self._source is not None:
            self._source.check(config)
            if ours and config.ckpt_path and "pretrained" in config.model.init_args:
                config.model.init_args.pretrained = False  # the checkpoint has all weights
        elif verb != "fit" and ours:
            raise ConfigurationError(f"{verb} needs trained weights: give --ckpt_path FILE, or --model.pretrained true")
        if config.get("lr_scheduler") and not config.get("optimizer"):
            raise ConfigurationError("lr_scheduler needs an optimizer beside it (--optimizer), whose rate it sets")

    def _find_source(self, verb: str, given: Any) -> Source | None:
        """The checkpoint or the entry that is evaluated."""
        if verb == "fit":
            return None
        if given.ckpt_path in ("last", "best", "hpc"):
            raise ConfigurationError(f"--ckpt_path {given.ckpt_path} is for fit: give the path of a .ckpt file")
        if given.ckpt_path is not None:
            return Source(given.ckpt_path)
        network, pretrained = vars(given)["model.network"], vars(given)["model.pretrained"]
        said = pretrained and pretrained.lower()  # YAML takes True as well
        if said not in (None, "true", "false", "null"):
            return Source(pretrained if is_checkpoint(pretrained) else find(pretrained).name)
        return Source(find(network).name) if network and said == "true" else None

    def _parse_ckpt_path(self) -> None:
        """Done before parsing."""

    # Before anything is built: folders

    def before_instantiate_classes(self) -> None:
        """Give the run its folder."""
        verb = str(self.subcommand)
        config = self.config[verb]
        trainer, checkpoint = config.trainer, config.ckpt_path
        if verb == "fit" and trainer.max_epochs is None and trainer.max_steps == -1 and trainer.max_time is None:
            trainer.max_epochs = EPOCHS
        if verb == "predict":
            trainer.logger = False  # predictions are the output; no run begins
            return
        beside = checkpoint is not None and verb != "fit" and trainer.default_root_dir is None and not config.run.name
        if not config.run.name:
            network = config.model.init_args.get("network") or config.model.class_path.rpartition(".")[2]
            kind = config.data.class_path.rpartition(".")[2] if config.data else "data"
            config.run.name = f"{network}_{kind}".lower().replace(".", "_").replace("/", "_")
        experiment = experiment_folder(trainer.default_root_dir, config.run.name)
        text = self._saved()
        if checkpoint == "last":
            folder = newest_run(experiment)
            checkpoint = config.ckpt_path = str(folder / LAST) if folder else None
            if folder is None:
                rank_zero_info(f"No last checkpoint in {experiment}: a new training begins")
            else:
                self._run = resume_run(folder)
        if checkpoint is not None and verb == "fit":
            compare_resumed(yaml.safe_load(text), read_checkpoint(checkpoint).get("cli") or {}, checkpoint)
        if beside:
            place = Path(checkpoint).absolute().parent
            self._run = begin_run(place.parent if place.name == "checkpoints" else place, verb)
        elif self._run is None:
            self._run = begin_run(experiment)
        place_loggers(trainer, self._run.folder)
        if not trainer.fast_dev_run:
            self._record = _Record(self._run.folder, text)

    def _saved(self) -> str:
        """The configuration that reproduces this run, in another folder."""
        config = self.config[str(self.subcommand)].clone()
        if config.ckpt_path == "last":
            config.ckpt_path = None
        parser, model = self._parser(self.subcommand), config.model
        content = yaml.safe_load(parser.dump(config, skip_none=False, skip_link_targets=False, skip_validation=True))
        defaults = parameters_of(imported(model.class_path, LightningModule) or LightningModule)
        for name in LINKED:  # which the data says again
            arguments = content["model"].get("init_args") or {}
            if name in arguments and arguments[name] == defaults.get(name):
                del arguments[name]
        text: str = yaml.safe_dump(content, sort_keys=False)
        return text

    # What is built

    def instantiate_classes(self) -> None:
        """Make model, data and trainer; a bad argument of ours is one sentence."""
        try:
            super().instantiate_classes()
        except Exception as error:  # whatever arguments make torch, timm or Lightning raise
            if in_chain(error, ConfigurationError) is None and self._ours():
                said = brief(error)
                raise ConfigurationError(f"model, data or trainer cannot be made as given: {said}") from error
            raise

    def _ours(self) -> bool:
        """Whether model and data are of this package; errors of other classes keep their traceback."""
        parts = [self._get(self.config, section) for section in DEFAULTS]
        return all(part is None or part.class_path.startswith("lightning_msnn.") for part in parts)

    def _instantiate_trainer(self, config: dict[str, Any], callbacks: list[Callback]) -> Trainer:
        """Add the callbacks of every run; the user's own replaces one of its kind."""
        given = config.get("callbacks") or []
        given = list(given) if isinstance(given, list) else [given]
        kinds = tuple(type(callback) for callback in given)
        made = self._callbacks(config, given)
        more = [each for each in made if isinstance(each, BestCheckpoint) or not isinstance(each, kinds)]
        config["callbacks"] = [*given, *more]
        return super()._instantiate_trainer(config, callbacks)

    def _callbacks(self, config: dict[str, Any], given: list[Callback]) -> list[Callback]:
        """Return the callbacks of every run."""
        verb, run, ours = self.subcommand, self._get(self.config_init, "run"), isinstance(self.model, tasks.Task)
        made: list[Callback] = [EMA(run.ema)] if run.ema and verb == "fit" else []
        if verb == "fit":
            made.append(TrainingCurves())
        if run.monitors and ours and verb in ("fit", "test"):
            spikes = any(isinstance(part, Spike | Convert) for part in (*self.model.modules(), *given))
            made += [*([SpikeRateMonitor()] if spikes else []), EnergyMonitor()]
        if verb == "predict" and isinstance(self.model, tasks.SpikingClassifier):
            made.append(PredictionWriter(self._get(self.config_init, "out")))
        saves = verb == "fit" and config.get("enable_checkpointing") is not False
        if saves and not any(isinstance(callback, ModelCheckpoint) and callback.monitor for callback in given):
            made.append(BestCheckpoint())
        made += [RandomState(), FiniteLoss(), *([LastCheckpoint(run.every_n_steps)] if saves else [])]
        return [*made, *([self._record] if self._record is not None else [])]

    # What is run

    def _prepare_subcommand_kwargs(self, subcommand: str) -> dict[str, Any]:
        """Load checkpoints as plain values only."""
        return {**super()._prepare_subcommand_kwargs(subcommand), "weights_only": True}

    def _run_subcommand(self, subcommand: str) -> None:
        """Run the verb; what Lightning refuses before the first step is said in one sentence."""
        try:
            super()._run_subcommand(subcommand)
        except (KeyError, MisconfigurationException, ValueError) as error:  # KeyError: a checkpoint of weights alone
            if self._begun or in_chain(error, ConfigurationError) is not None or not self._ours():
                raise
            raise ConfigurationError(f"{subcommand} cannot begin: {brief(error)}") from error

    def _check(self) -> None:
        """Compare model, data and checkpoint before anything is written."""
        if hasattr(self.datamodule, "check"):
            self.datamodule.check(self.subcommand)
        if isinstance(self.model, tasks.Task) and self.datamodule is not None and self.subcommand != "predict":
            self.model.check_data(self.datamodule)
        if self._source is not None and self._source.inputs is not None:
            inputs = self._source.inputs
            inputs.prepare(self.datamodule)
            if isinstance(self.model, tasks.Task):
                self.model.class_names = list(inputs.class_names)
            if self.subcommand != "predict":
                inputs.check(self.datamodule)
            elif isinstance(self.datamodule, ArrayDataModule) and not is_overridden("predict_step", self.model):
                raise ConfigurationError(f"{type(self.model).__name__} has no predict_step, which predict needs")

    before_validate = before_test = before_predict = _check

    def before_fit(self) -> None:
        """Check the data, also the test part that the run ends with."""
        self._check()
        if self._get(self.config_init, "run").test and hasattr(self.datamodule, "check"):
            try:
                self.datamodule.check("test")
            except ConfigurationError as error:
                raise ConfigurationError(f"{error}; --run.test false leaves out the test at the end") from error

    def after_test(self) -> None:
        """Print the network's energy beside its baselines."""
        for callback in self.trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, EnergyMonitor) and self.trainer.is_global_zero:
                sys.stdout.write(f"\n{callback.table()}")

    def after_fit(self) -> None:
        """Test the best checkpoint of the training, which validation chose."""
        if not self._get(self.config_init, "run").test or self.trainer.interrupted:
            return
        data = self.datamodule or self.model
        if not (is_overridden("test_step", self.model) and is_overridden("test_dataloader", data)):
            rank_zero_info("No test at the end: there is no test_step or no test_dataloader")
            return
        chosen: list[Any] = [each for each in self.trainer.checkpoint_callbacks if getattr(each, "monitor", None)]
        path = chosen[0].best_model_path if chosen else ""
        rank_zero_info(f"Testing {path or 'the last weights'}")
        self.trainer.test(self.model, datamodule=self.datamodule, ckpt_path=path or None, weights_only=True)
        self.after_test()


def run(args: list[str]) -> None:
    """Run a verb with its options."""
    csv = {"class_path": "lightning.pytorch.loggers.CSVLogger", "init_args": {"save_dir": "."}}
    # Logs of a resumed run have been put aside, and only a training needs the callbacks of the checkpoint.
    untrue = r"(Experiment logs|Checkpoint) directory .* exists and is not empty"
    warnings.filterwarnings("ignore", untrue if args[0] == "fit" else f"{untrue}|Be aware that when using `ckpt_path`")
    try:
        MSNNCLI(
            LightningModule,
            LightningDataModule,
            subclass_mode_model=True,
            subclass_mode_data=True,
            save_config_callback=None,  # ours is added with the other callbacks
            seed_everything_default=0,
            parser_class=Parser,
            parser_kwargs={"version": __version__},
            trainer_defaults={"logger": [csv], "devices": 1},  # more where trainer/ddp or the user asks for them
            load_from_checkpoint_support=False,  # hyper-parameters are plain values already
            args=args,
        )
    except SIGTERMException as stop:
        sys.exit(128 + signal.SIGTERM if stop.code is None else stop.code)  # Lightning's own are without a code
