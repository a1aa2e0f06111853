"""Break the package on purpose, one place at a time, and see that tests fail: else a wrong program would pass them.

    python -m benchmarks.mutations [--only NAME ...]

Each mutation changes one text in a copy of the package, and the tests that must die of it are run against that copy. At
first they are run on a copy as it is, where all must pass. Exit status 1 if a mutation survives, if its tests cannot be
run, or if its text is not found exactly once.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]


class Mutation(NamedTuple):
    """A change that makes the package wrong.

    Args:
        file: File of the package.
        text: What occurs once in it.
        replacement: What takes its place.
        tests: Tests that must fail then, at least one of each.
    """

    file: str
    text: str
    replacement: str
    tests: tuple[str, ...]


LOOP = "tests/models/test_plain_loop.py::test_equals_a_plain_loop"
ONE_STEP = "tests/models/test_plain_loop.py::test_one_step_equals_a_plain_loop"
LARGE = "tests/models/test_plain_loop.py::test_large_maps_equal_a_plain_loop"
LIF = "tests/models/test_plain_loop.py::test_a_twin_with_lif_neurons_equals_a_plain_loop"
TRAINING = "tests/tasks/test_classification.py::"
KERNEL = "tests/kernels/test_native.py::test_every_form_and_kind"

MUTATIONS: dict[str, Mutation] = {
    # The twin with LIF neurons, from one time step to the next.
    "no reset": Mutation(
        "models/twins.py", "kept = self.tau * u * (1.0 - fired_at[-1])", "kept = self.tau * u", (LIF,)
    ),
    "membranes forgotten": Mutation(
        "models/twins.py", "u = current if kept is None else current + kept", "u = current", (LIF,)
    ),
    # What a training learns from.
    "the loss ignores mixed labels": Mutation(
        "tasks/base.py", "loss = self.loss(outputs.float(), goals)", "loss = self.loss(outputs.float(), targets)",
        (TRAINING + "test_a_step_learns_from_mixed_images_with_both_labels",),
    ),
    "labels are mixed, images are not": Mutation(
        "tasks/base.py", "outputs = self(mixed)", "outputs = self(inputs)",
        (TRAINING + "test_a_step_learns_from_mixed_images_with_both_labels",),
    ),
    "fit tests the last weights": Mutation(
        "cli/command_line.py", "ckpt_path=path or None", "ckpt_path=None",
        ("tests/test_cli.py::test_fit_ends_by_testing_the_best_weights",),
    ),
    "weight decay is 0": Mutation(
        "tasks/base.py", '"weight_decay": group["weight_decay"],', '"weight_decay": 0.0,',
        (TRAINING + "test_the_first_step_of_the_optimizer_by_its_formula",),
    ),
    "vectors decay too": Mutation(
        "tasks/base.py", '"weight_decay": group["weight_decay"],', '"weight_decay": h["weight_decay"],',
        (TRAINING + "test_the_first_step_of_the_optimizer_by_its_formula",),
    ),
    "Adam for AdamW": Mutation(
        "tasks/base.py", 'optimizer: Optimizer = create_optimizer_v2(groups, h["optimizer"],',
        'optimizer: Optimizer = create_optimizer_v2(groups, h["optimizer"].removesuffix("w"),',
        (TRAINING + "test_the_first_step_of_the_optimizer_by_its_formula",),
    ),
    "one cycle without a warm-up": Mutation(
        "tasks/optimization.py", "return OneCycleLR(optimizer, rates, total + 1, pct_start=rise,",
        "return OneCycleLR(optimizer, rates, total + 1, pct_start=1.5 / total,",
        (TRAINING + "test_one_cycle_by_its_formula",),
    ),
    "one cycle rises for a fixed share": Mutation(
        "tasks/optimization.py", "return OneCycleLR(optimizer, rates, total + 1, pct_start=rise,",
        "return OneCycleLR(optimizer, rates, total + 1, pct_start=0.3,", (TRAINING + "test_one_cycle_by_its_formula",),
    ),
    "gradient of Bernoulli outside [0, 1]": Mutation(
        "nn/blocks.py", "return spikes + (probability - probability.detach())", "return spikes + (x - x.detach())",
        ("tests/models/test_registry.py::test_bernoulli_coding",),
    ),
    "no drop path of the second branch": Mutation(
        "nn/blocks.py", "after: Tensor = self._join(partial(self.mlp, entering), x)",
        "after: Tensor = self.mlp(entering, residual=x)",
        ("tests/models/test_registry.py::test_drop_path_is_of_each_branch",),
    ),
    "no drop path of the first branch": Mutation(
        "nn/blocks.py", "x = self._join(partial(self.mixer, self.encoder1(x)), x)",
        "x = self.mixer(self.encoder1(x), residual=x)",
        ("tests/models/test_registry.py::test_drop_path_is_of_each_branch",),
    ),
    "EMA without buffers": Mutation(
        "callbacks/ema.py", "super().__init__(multi_avg_fn=self._average)",
        "super().__init__(multi_avg_fn=self._average, use_buffers=False)",
        ("tests/callbacks/test_ema.py::test_is_the_average_of_a_plain_loop",),
    ),
    "a warm start takes a fixed theta": Mutation(
        "entries.py", "if not name.endswith(fixed)}", "}",
        ("tests/test_entries.py::test_warm_start_leaves_numbers_that_are_not_learnt",),
    ),
    # What a file may do.
    "YAML is loaded without a look at it": Mutation(
        "cli/config_files.py",
        'check_yaml(text := path.read_text(encoding="utf-8"))', 'text = path.read_text(encoding="utf-8")',
        ("tests/test_fuzz.py::test_yaml_that_unfolds_without_end[laughs-fit]",),
    ),
    "a checkpoint names a file that is removed": Mutation(
        "callbacks/best_checkpoint.py",
        'if not isinstance(path, str) or (path and (Path(path).parent != folder or Path(path).name == "..")):',
        "if not isinstance(path, str):", ("tests/test_security.py::test_checkpoint_that_names_a_file_to_remove",),
    ),
    "a report fetches what a checkpoint names": Mutation(
        "report.py", "weights_only=True, pretrained=False)", "weights_only=True)",
        ("tests/test_security.py::test_report_fetches_no_weights",),
    ),
    # Energy.
    "Omega is free": Mutation(
        "energy/profiles.py", "**dict.fromkeys(_MULTIPLICATIONS, both),",
        '**dict.fromkeys(_MULTIPLICATIONS, both), "omega_operations": (0.0, ""),',
        ("tests/energy/test_profiles.py::test_horowitz",),
    ),
    "Omega costs an addition": Mutation(
        "energy/profiles.py", '"multiplications", "membrane_updates", "omega_operations")',
        '"multiplications", "membrane_updates")\n_ADDITIONS += ("omega_operations",)',
        ("tests/energy/test_profiles.py::test_horowitz",),
    ),
    "Omega is free in the model of Lemaire": Mutation(
        "energy/profiles.py", '"Omega": c["omega_operations"] * mac,', '"Omega": 0.0 * c["omega_operations"] * mac,',
        ("tests/energy/test_profiles.py::test_lemaire_arithmetic_beside_synapses",),
    ),
    "Omega is one operation": Mutation(
        "energy/rules.py", '{"omega_operations": size * (additions + multiplications)}', '{"omega_operations": size}',
        ("tests/energy/test_counting.py::test_membranes_and_omega",),
    ),
    # Twins are calibrated in three places: by `twins`, by a card's figures, and with the images that `compare` gives.
    "twins of a report are calibrated on noise": Mutation(
        "models/twins.py", "return {name: calibrate(twin, images) for",
        "return {name: calibrate(twin, torch.randn_like(images)) for",
        ("tests/models/test_twins.py::test_twins_have_the_statistics_of_the_images",),
    ),
    "the twin of a card is calibrated on noise": Mutation(
        "zoo/verification.py", "calibrate(ann_twin(network), images)",
        "calibrate(ann_twin(network), torch.randn_like(images))",
        ("tests/zoo/test_zoo.py::test_figures_see_images_of_all_classes",),
    ),
    "twins are given noise": Mutation(
        "energy/report.py", "**twins(images[:: max(1, len(images) // CALIBRATION)])}",
        "**twins(torch.randn_like(images))}",
        ("tests/energy/test_comparison.py::test_images_of_all_classes_whatever_the_batches",),
    ),
    # The equations, which are the reference of all kernels.
    "Omega of half the size": Mutation(
        "functional/projection.py", "return 2.0 * torch.sin(angle * a * torch.cos(angle * b))",
        "return torch.sin(angle * a * torch.cos(angle * b))",
        ("tests/functional/test_projection.py::test_closed_form",),
    ),
    "layer 1 without decay": Mutation(
        "functional/membrane.py", "membranes.append(current + tau * membranes[-1])",
        "membranes.append(current + membranes[-1])", ("tests/functional/test_membrane.py::test_scan_is_its_formula",),
    ),
    "layer 2 sees only itself": Mutation(
        "functional/membrane.py", "membranes.append(current + tau * omega(before, membranes[-1]))",
        "membranes.append(current + tau * omega(membranes[-1], membranes[-1]))",
        ("tests/functional/test_membrane.py::test_coupled_scan_is_its_formula",),
    ),
    "the recurrent scan takes the old map": Mutation(
        "functional/membrane.py", "membranes.append(currents[1] + tau * omega(membranes[0], before[1]))",
        "membranes.append(currents[1] + tau * omega(before[0], before[1]))", (LOOP,),
    ),
    "a membrane at its threshold does not fire": Mutation(
        "functional/spike.py", "return (membrane >= threshold).to(membrane.dtype)",
        "return (membrane > threshold).to(membrane.dtype)",
        ("tests/functional/test_spike.py::test_forward_is_the_exact_step",),
    ),
    # The kernels in C.
    "C: layer 1 skips a window": Mutation(
        "kernels/native.c", "w = fmaf(tau[c], v, X(2));", "w = fmaf(tau[c], u, X(2));",
        (KERNEL + "[first-dilated-False-False-size0-triangular]",),
    ),
    # The default networks as kernels compute them, beside a plain loop.
    "windows alternate to the end": Mutation(
        "models/msnn.py", "kinds[0 if stage == last else block % 2]", "kinds[block % 2]", (LARGE,)
    ),
    "all windows of one kind": Mutation(
        "models/msnn.py", "kinds[0 if stage == last else block % 2]", "kinds[0]", (LARGE,)
    ),
    "no norm before the read-out": Mutation(
        "models/msnn.py", "return normalise(self._stages(x, len(self.stages) - 1)[-1], self.norm)",
        "return self._stages(x, len(self.stages) - 1)[-1]", (LARGE,),
    ),
    "another threshold": Mutation(
        "models/msnn.py", "            threshold=threshold,", "            threshold=0.9 * threshold,", (ONE_STEP,)
    ),
    "no decay is learnt": Mutation(
        "nn/neuron.py", "return torch.sigmoid(self.logit).view(-1, 1, 1)",
        "return torch.full_like(self.logit, 0.5).view(-1, 1, 1)", (ONE_STEP,),
    ),
    "the second branch sees the stream before the first": Mutation(
        "nn/blocks.py",
        "x = self._join(partial(self.mixer, self.encoder1(x)), x)\n        return self._mix_channels(x)",
        "return self._join(partial(self.mixer, self.encoder1(x)), x) + self.mlp(self.encoder2(x))",
        (ONE_STEP,),
    ),
    "resnet: layer 2 gets no membrane of layer 1": Mutation(
        "models/msnn_resnet.py", "self.spike2, self.membrane2, u1, **where)",
        "self.spike2, self.membrane2, [0.0 * u for u in u1] if isinstance(u1, list) else 0.0 * u1, **where)",
        (ONE_STEP,),
    ),
    "resnet: one synapse for both layers": Mutation(
        "models/msnn_resnet.py", "fire(self.synapse2.conv(s1), self.synapse2.norm,",
        "fire(self.synapse1.conv(s1), self.synapse2.norm,", (ONE_STEP,),
    ),
    "vit: keys for queries": Mutation(
        "models/msnn_vit.py", "q, k, v = tokenwise.permute(2, 0, 3, 1, 4).unbind(0)",
        "k, q, v = tokenwise.permute(2, 0, 3, 1, 4).unbind(0)", (ONE_STEP,),
    ),
    "vit: another scale": Mutation(
        "models/msnn_vit.py", "self.scale = head_dim**-0.5", "self.scale = dim**-0.5", (ONE_STEP,)
    ),
    "vit: no positions": Mutation(
        "models/msnn_vit.py", "after: Tensor = self.synapse(self.encoder(x), x)", "after: Tensor = x", (ONE_STEP,)
    ),
    "vit: attention over the whole map": Mutation(
        "models/msnn_vit.py", "attended = self.attend(seen)\n",
        "attended = self.attend(seen) if self.isolated else cut_windows(self.attend(s1), self.windows)\n", (ONE_STEP,),
    ),
    "rnn: the membrane map does not travel": Mutation(
        "models/msnn_rnn.py", "membrane = self.membrane(membrane) if self.travels else",
        "membrane = 0.0 * self.membrane(membrane) if self.travels else", (ONE_STEP,),
    ),
    "rnn: it stays as a stage received it": Mutation(
        "models/msnn_rnn.py", "return self.leave(self.project, fired, size, residual), after",
        "return self.leave(self.project, fired, size, residual), before", (ONE_STEP,),
    ),
    "rnn: in one direction": Mutation(
        "models/msnn_rnn.py", "self.weight_ih_l0_reverse,\n            self.weight_hh_l0_reverse,",
        "self.weight_ih_l0,\n            self.weight_hh_l0,", (ONE_STEP,),
    ),
    # Integers, beside a plain loop over them.
    "integers: the sum that reaches a threshold is rounded down": Mutation(
        "nn/integer.py", ".ceil()", ".floor()",
        ("tests/nn/test_integer.py::test_sums_are_those_of_a_loop_over_integers",),
    ),
    "integers: scales of all pixels at once in the wrong order": Mutation(
        "kernels/integer.py", "scale.repeat(4)", "scale.repeat_interleave(4)",
        ("tests/nn/test_integer.py::test_sums_are_those_of_a_loop_over_integers",),
    ),
    "integers: scales follow the type of the network": Mutation(
        "nn/integer.py", "self.scale, self.bias = (numbers.to(self.weight.device) for numbers in exact)", "pass",
        ("tests/nn/test_integer.py::test_the_type_of_the_network_is_that_of_its_analogue_parts",),
    ),
    "integers: bytes of other windows": Mutation(
        "kernels/native.c", "store_bytes(o->out, s.out[k], t->u + k * n, level, n);",
        "store_bytes(o->out, s.out[k], t->u, level, n);", ("tests/kernels/test_native.py::test_bytes_are_the_spikes",),
    ),
}  # fmt: skip


def occurrences(mutation: Mutation) -> int:
    """How often a mutation's text occurs in its file of the package."""
    return (ROOT / "lightning_msnn" / mutation.file).read_text(encoding="utf-8").count(mutation.text)


def copy(folder: Path) -> None:
    """Make a checkout of the package and its tests; what no mutation changes is linked."""
    for name in ("lightning_msnn", "tests"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", "_zoo", "_configs"))
    for name in ("pyproject.toml", "configs", "zoo", "benchmarks", "docs", "README.md", "CONTRIBUTING.md"):
        if (ROOT / name).exists():
            (folder / name).symlink_to(ROOT / name)


def run(folder: Path, tests: Sequence[str], cache: Path | None) -> tuple[int, str]:
    """Run tests against the package in a folder until one fails; return pytest's exit status and its last lines.

    Args:
        folder: The checkout.
        tests: Tests.
        cache: Folder of compiled kernels, None for the user's own.
    """
    environment = os.environ | {"PYTHONPATH": str(folder), "PYTHONDONTWRITEBYTECODE": "1"}
    if cache is not None:
        environment["XDG_CACHE_HOME"] = str(cache)
    options = ("-n", "0", "-x", "-q", "-p", "no:cacheprovider", "-W", "ignore::DeprecationWarning")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *options, *tests],
        cwd=folder, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    return done.returncode, "\n".join((done.stdout + done.stderr).strip().splitlines()[-15:])


def survives(name: str) -> bool:
    """Apply a mutation to a copy of the package, run its tests one by one, and say what became of it."""
    mutation, begun = MUTATIONS[name], time.monotonic()
    survived, said = False, ""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "checkout"
        copy(folder)
        file = folder / "lightning_msnn" / mutation.file
        file.write_text(file.read_text(encoding="utf-8").replace(mutation.text, mutation.replacement), encoding="utf-8")
        for test in mutation.tests:
            status, said = run(folder, [test], Path(temporary) if file.suffix == ".c" else None)
            if survived := status != 1:
                print(f"{name}: {'SURVIVED' if status == 0 else 'cannot be tested by'} {test}\n{said}", flush=True)
                break
    if not survived:
        reason = next((line for line in said.splitlines() if line.startswith("FAILED")), said)
        print(f"{name}: killed in {time.monotonic() - begun:.0f} s, {reason}", flush=True)
    return survived


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=MUTATIONS, nargs="+", default=list(MUTATIONS), metavar="NAME")
    names = parser.parse_args().only
    for name in names:
        if (found := occurrences(MUTATIONS[name])) != 1:
            sys.exit(f"{name}: its text occurs {found} times in {MUTATIONS[name].file}, and once is needed")
    with tempfile.TemporaryDirectory() as temporary:
        copy(Path(temporary))
        status, said = run(Path(temporary), sorted({test for name in names for test in MUTATIONS[name].tests}), None)
    if status != 0:
        sys.exit(f"the tests do not pass on the package as it is:\n{said}")
    survivors = [name for name in names if survives(name)]
    print(f"{len(names) - len(survivors)} of {len(names)} mutations killed")
    sys.exit(1 if survivors else 0)


if __name__ == "__main__":
    main()
