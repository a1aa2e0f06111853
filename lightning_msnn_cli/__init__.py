"""The command ``lightning-msnn``: it answers ``--help`` before torch is imported, which takes seconds."""

import argparse
import os
import sys
from collections.abc import Sequence
from difflib import get_close_matches
from importlib import import_module
from typing import NoReturn

__all__ = ["main", "make_parser"]

TRAINER = {
    "fit": "train a network, then test its best checkpoint",
    "validate": "measure a checkpoint or an entry of the zoo on validation data",
    "test": "measure a checkpoint or an entry of the zoo on test data",
    "predict": "classify images with a checkpoint or an entry of the zoo, and write a CSV file",
}
"""Verbs of LightningCLI."""

OTHERS = {
    "export": ("export.exporting", "write a trained network as ONNX, torch.export or NIR"),
    "zoo": ("zoo.__main__", "list, verify and measure entries, trained networks that come with the package"),
    "report": ("report", "what a network does and costs, as one HTML page"),
}
"""Verbs with options of their own, and the modules that run them."""

SOURCE = "checkpoint (.ckpt) of lightning-msnn fit, or name of a zoo entry"
ROOT = "folder of the network's data set; some need none"
IMPORTS = "Python file of your own, or module, that defines what is named here; it is imported first"

_OPTIONS = (
    ("--config NAME", "a file, or quickstart, data/cifar100, recipe/baseline, ...; several add up", "fit"),
    ("--ckpt_path FILE", "checkpoint; for fit, last continues the newest run of this name", ""),
    ("--model.network NAME", "network of this package, a zoo entry, or another of timm's", ""),
    ("--model.pretrained true", "take the trained weights of that name", ""),
    ("--model.lr X", "learning rate", "fit"),
    ("--model.optimizer NAME", "adamw, sgd, muon or another of timm's", "fit"),
    ("--data NAME", "Digits, CIFAR100, ImageFolder, ..., or the class path of a LightningDataModule", ""),
    ("--data.root FOLDER", "folder of the data set", ""),
    ("--data.folder FOLDER", "images to classify", "predict"),
    ("--data.image_size N", "height and width in pixels to which images are scaled", ""),
    ("--data.batch_size N", "images in a batch", ""),
    ("--trainer.max_epochs N", "length of the training", "fit"),
    ("--trainer.accelerator NAME", "cpu, gpu or auto", ""),
    ("--trainer.devices N", "number of processes", ""),
    ("--trainer.precision NAME", "32-true, bf16-mixed, 16-mixed", ""),
    ("--trainer.callbacks+ NAME", "SpikeAnnealing, Teacher, Mixing, EarlyStopping, ...", "fit"),
    ("--trainer.logger NAME", "WandbLogger, TensorBoardLogger, ...", "fit"),
    ("--trainer.default_root_dir FOLDER", "where runs lie, by default runs", ""),
    ("--run.name NAME", "folder of this experiment, by default network and data", "fit"),
    ("--run.test false", "leaves out the test at the end", "fit"),
    ("--run.imports FILE", IMPORTS, ""),
    ("--out FILE", "CSV file of predictions, by default predictions.csv", "predict"),
    ("--seed_everything N", "seed of all random numbers, by default 0", "fit"),
)
"""Options that matter most: how they are given, what they mean, and the verb that alone has them."""


class _Parser(argparse.ArgumentParser):
    """A parser that says what is wrong in one sentence."""

    def error(self, message: str) -> NoReturn:
        _fail(f"{self.prog.removeprefix('lightning-msnn ')}: {message}; see {self.prog} --help")


def _fail(message: str, status: int = 2) -> NoReturn:
    sys.stderr.write(f"lightning-msnn: error: {message}\n")
    sys.exit(status)


def _sentence(text: str) -> str:
    return f"{text[0].upper()}{text[1:]}."


def _help(verb: str) -> str:
    """Help for a verb of LightningCLI, or for all verbs."""
    if verb not in TRAINER:
        verbs = {**TRAINER, **{name: text for name, (_, text) in OTHERS.items()}}
        lines = [f"  {name:10s}{text}" for name, text in verbs.items()]
        end = "lightning-msnn VERB --help says more."
        return "\n".join(["usage: lightning-msnn VERB [options]", "", *lines, "", end])
    lines = [f"  {given:35s}{text}" for given, text, only in _OPTIONS if only in ("", verb)]
    return "\n".join([
        f"usage: lightning-msnn {verb} [options]", "", _sentence(TRAINER[verb]), "", *lines, "",
        f"lightning-msnn {verb} --help all has every option, --model.help NAME, --data.help NAME and",
        "--trainer.callbacks.help NAME those of a class; --print_config prints the configuration.",
    ])  # fmt: skip


def make_parser(verb: str) -> argparse.ArgumentParser:
    """Return the parser of one of :data:`OTHERS`; wrong arguments end the process with one sentence."""
    parser = _Parser(prog=f"lightning-msnn {verb}", allow_abbrev=False, description=_sentence(OTHERS[verb][1]))
    parsers: list[argparse.ArgumentParser] = [parser]
    if verb == "export":
        parser.description = (
            "Write a trained network in another format, once the other runtime has run the file. If it finds other "
            "classes than rounding explains, nothing is written."
        )
        parser.add_argument("source", help=SOURCE)
        parser.add_argument("--to", required=True, metavar="FORMAT", help="onnx (.onnx), torch (.pt2), nir (.nir)")
        parser.add_argument("--out", required=True, metavar="PATH", help="the file; it must not exist")
        parser.add_argument("--root", dest="data", metavar="FOLDER", help=f"{ROOT}; its test images are run")
        parser.add_argument("--images", metavar="FOLDER", help="images to run instead; without either, random ones")
        parser.add_argument("--image_size", type=int, metavar="N", help="for checkpoints that do not say it")
    elif verb == "report":
        parser.add_argument("name", help=SOURCE)
        parser.add_argument("--out", help="the page, by default in the folder of the run, or here")
        parser.add_argument("--root", help=ROOT)
        parser.add_argument("--samples", type=int, default=512, help="test samples to count, by default 512")
        parser.add_argument("--batch_size", type=int, default=64, help="samples in a batch, by default 64")
        parser.add_argument("--profile", default="cmos_45nm", help="energy profile, by name or as a YAML file")
    else:
        parsers = _add_commands(parser)
    for each in parsers:
        each.add_argument("--imports", action="append", default=[], metavar="FILE", help=IMPORTS)
    return parser


def _add_commands(parser: argparse.ArgumentParser) -> list[argparse.ArgumentParser]:
    """Add the commands of the zoo to its parser."""
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    made = {
        name: commands.add_parser(name, help=text, description=_sentence(text), allow_abbrev=False)
        for name, text in (
            ("list", "entries and their accuracy"),
            ("table", "accuracy, spike rate and energy of all entries, in Markdown, or as a CSV file"),
            ("info", "config.json of an entry"),
            ("verify", "measure an entry on its test set, and fail if any figure of its card is wrong"),
            ("measure", "measure an entry on its test set, and write figures, picture and card anew"),
            ("card", "write the model card of an entry anew from its config.json"),
            ("export", "make an entry of a checkpoint, measure it and write its card"),
        )
    }
    made["list"].add_argument("filter", nargs="?", default="*", help="pattern of shell wildcards")
    made["table"].add_argument("--out", help="CSV file, such as zoo/results.csv, that is written instead")
    made["export"].add_argument("checkpoint", help="checkpoint of lightning-msnn fit")
    for name in ("info", "verify", "measure", "card", "export"):
        made[name].add_argument("name", help="name of the entry, <architecture>.<tag>")
    for name in ("verify", "measure", "export"):
        made[name].add_argument("--root", metavar="FOLDER", help=ROOT)
        made[name].add_argument("--device", help="device to evaluate on")
    made["verify"].add_argument("--batch_size", type=int, default=250, help="samples in a batch, by default 250")
    made["export"].add_argument("--out", default="zoo", help="folder of entries to put it into, by default zoo")
    dtypes = ("float32", "float16", "int8")
    made["export"].add_argument("--dtype", choices=dtypes, default="float32", help="type of the weights in the file")
    made["export"].add_argument("--fields", help="JSON file of further fields: command, recipe, hardware, ...")
    return list(made.values())


def main(args: Sequence[str] | None = None) -> None:
    """Run the command line.

    Args:
        args: Arguments, those of the process if None.
    """
    given = list(sys.argv[1:] if args is None else args)
    verb = given[0] if given else ""
    options = make_parser(verb).parse_args(given[1:]) if verb in OTHERS else None
    if options is None and not verb.startswith("-") and verb not in TRAINER:
        known = [*TRAINER, *OTHERS]
        near = "".join(f"; did you mean {name!r}?" for name in get_close_matches(verb, known, n=1))
        _fail(f"the first argument must be one of {', '.join(known)}{f', not {verb!r}' if verb else ''}{near}")
    if options is None and given[-1] in ("-h", "--help"):
        sys.stdout.write(f"{_help(verb)}\n")
        sys.exit(0)
    if given[-2:] == ["--help", "all"]:
        given.pop()
    # OpenMP's threads spin while they wait: beside another busy process small networks are many times slower.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # read when torch is imported
    from lightning_msnn.errors import ConfigurationError, TrainingError, in_chain
    from lightning_msnn.imports import explained, import_files

    try:
        if options is None:
            import_module("lightning_msnn.cli.command_line").run(given)
        else:
            import_files(options.imports)
            sys.stdout.write(f"{import_module(f'lightning_msnn.{OTHERS[verb][0]}').run(options)}\n")
    except Exception as error:
        cause = in_chain(error, TrainingError) or in_chain(error, ConfigurationError)
        if cause is None:
            raise
        option = "--run.imports" if options is None else "--imports"
        _fail(explained(cause, option), 1 if isinstance(cause, TrainingError) else 2)
