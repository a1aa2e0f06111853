import numpy as np
import pytest
import torch
from lightning.pytorch import Trainer

from lightning_msnn.errors import ConfigurationError
from lightning_msnn.tasks import SpikingClassifier

pytest.importorskip("tonic", reason="tonic, of the extra events, is not installed")

from sklearn.datasets import load_digits
from tonic.datasets import NMNIST
from tonic.io import read_mnist_file
from tonic.transforms import ToFrame

from lightning_msnn.data.events import EventFrames
from lightning_msnn.data.saccades import saccade, write_events


class FewDigits(NMNIST):
    """N-MNIST of the files that are there."""

    def _check_exists(self):
        return True


class OnePart(NMNIST):
    """N-MNIST without a test part."""

    def __init__(self, save_to):
        super().__init__(save_to, train=True)

    def _check_exists(self):
        return True


@pytest.fixture(scope="module")
def recordings(tmp_path_factory):
    """Scanned digits before a moving camera, in the format of N-MNIST."""
    root, digits = tmp_path_factory.mktemp("events"), load_digits()
    for name in ("FewDigits", "OnePart"):
        for index in range(60):
            part = "Train" if index < 40 else "Test"
            file = root / name / part / str(digits.target[index]) / f"{index:05}.bin"
            write_events(file, saccade(digits.images[index] / 16, index))
    return root


def make(recordings, tmp_path, name="FewDigits", **arguments):
    return EventFrames(f"{__name__}.{name}", str(recordings), cache_dir=str(tmp_path / "cache"), **arguments)


def test_saccades_are_events_that_tonic_reads_back(tmp_path):
    events = saccade(load_digits().images[3] / 16, 0)
    assert 500 < len(events) < 20_000
    assert (np.diff(events["t"]) >= 0).all()
    assert 0.4 < events["p"].mean() < 0.6  # what comes into view leaves it again
    write_events(tmp_path / "a.bin", events)
    read = read_mnist_file(str(tmp_path / "a.bin"), NMNIST.dtype)
    for field in "xytp":
        np.testing.assert_array_equal(read[field], events[field])


@pytest.mark.parametrize("time_steps", [1, 4])
def test_frames_are_tonics(recordings, tmp_path, time_steps):
    module = make(recordings, tmp_path, time_steps=time_steps, shift=0)
    module.setup()
    frames, targets = module.read("test")
    data_set = FewDigits(str(recordings), train=False)
    for index, (frame, target) in enumerate(zip(frames, targets, strict=True)):
        events, label = data_set[index]
        assert target == label
        assert frame.sum() == len(events)
        edges = np.linspace(events["t"].min(), events["t"].max() + 1e-9, time_steps + 1)
        for step, seen in enumerate(frame.view(time_steps, 2, 34, 34)):
            last = step == time_steps - 1
            inside = (events["t"] >= edges[step]) & ((events["t"] < edges[step + 1]) | last)
            plain = ToFrame(FewDigits.sensor_size, event_count=int(inside.sum()))(events[inside])[0]
            np.testing.assert_array_equal(seen, plain)
    batch, _ = module.on_after_batch_transfer(next(iter(module.test_dataloader())), 0)
    assert batch.shape == ((20, 2, 34, 34) if time_steps == 1 else (20, 4, 2, 34, 34))


def test_frames_are_normalised_by_the_training_frames(recordings, tmp_path):
    module = make(recordings, tmp_path)
    module.setup("fit")
    dataset = module.train_dataloader().dataset
    values = np.log1p(dataset.images[dataset.indices].numpy().astype(np.float64))
    np.testing.assert_allclose(module.mean, values.mean((0, 2, 3)), rtol=1e-6)
    np.testing.assert_allclose(module.std, values.std((0, 2, 3)), rtol=1e-6)


def test_smaller_frames_add_up_neighbours(recordings, tmp_path):
    frames, _ = make(recordings, tmp_path).read("test")
    small, _ = make(recordings, tmp_path, size=17).read("test")
    assert torch.equal(small.long(), frames.long().view(20, 2, 17, 2, 17, 2).sum((3, 5)).clamp(max=255))


def test_frames_are_counted_once(recordings, tmp_path, monkeypatch):
    first = make(recordings, tmp_path).read("test")
    monkeypatch.setattr(FewDigits, "__getitem__", lambda *_: pytest.fail("the events are read again"))
    again = make(recordings, tmp_path).read("test")
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    (kept,) = (tmp_path / "cache").iterdir()
    monkeypatch.undo()
    kept.write_bytes(b"damaged")
    assert torch.equal(make(recordings, tmp_path).read("test")[0], first[0])


def test_a_data_set_of_one_part_is_split_always_the_same(recordings, tmp_path):
    module = make(recordings, tmp_path, "OnePart", seed=1)
    parts = [module.read(part)[0] for part in ("train", "test")]
    assert [len(part) for part in parts] == [30, 10]  # each class has one to test with
    other = make(recordings, tmp_path, "OnePart", seed=2).read("test")[0]
    assert torch.equal(parts[1], other)


def test_bad_names_and_recordings_are_named(recordings, tmp_path):
    with pytest.raises(ConfigurationError, match="unknown data set 'NMNST': allowed are .*DVSGesture.*mean 'NMNIST'"):
        EventFrames("NMNST")
    with pytest.raises(ConfigurationError, match="cannot import the data set 'no.where'"):
        EventFrames("no.where")
    with pytest.raises(ConfigurationError, match="unknown data set 'SHD'"):
        EventFrames("SHD")  # sounds
    with pytest.raises(ConfigurationError, match="size must be at most 34, the camera's, not 64"):
        make(recordings, tmp_path, size=64)
    with pytest.raises(ConfigurationError, match="root is not given"):
        EventFrames().check("fit")
    file = tmp_path / "FewDigits" / "Test" / "3" / "00001.bin"
    file.parent.mkdir(parents=True)
    file.write_bytes(b"")
    with pytest.raises(ConfigurationError, match=r"cannot read the recording '.*00001.bin': it has no events"):
        make(tmp_path, tmp_path).read("test")
    with pytest.raises(ConfigurationError, match="FewDigits has no recording in"):
        make(tmp_path, tmp_path).read("train")


def test_a_network_trains_on_frames(recordings, tmp_path):
    module = make(recordings, tmp_path, batch_size=18)
    task = SpikingClassifier("msnn_resnet12_tiny", num_classes=10, in_chans=2)
    trainer = Trainer(
        accelerator="cpu", max_epochs=1, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(task, datamodule=module)
    assert trainer.test(task, datamodule=module, verbose=False)[0]["test/loss"] > 0


def test_events_that_were_not_all_written_are_written_again(tmp_path, monkeypatch):
    """As after an interruption; and what is there is left as it is."""
    from lightning_msnn.data import saccades

    few = load_digits()
    few.data, few.target, few.images = few.data[:60], few.target[:60], few.images[:60]
    monkeypatch.setattr(saccades, "load_digits", lambda: few)
    first = saccades.SaccadedDigits(str(tmp_path), train=True)
    files = sorted((tmp_path / "SaccadedDigits" / "Train").rglob("*"))
    kept = next(file for file in files if file.is_file())
    for file in files:
        if file.is_file() and file != kept:
            file.unlink()
    before = kept.stat().st_mtime_ns
    again = saccades.SaccadedDigits(str(tmp_path), train=True)
    assert len(again) == len(first) > 30
    assert kept.stat().st_mtime_ns == before


def test_frames_of_another_shape_in_the_cache_are_counted_again(recordings, tmp_path):
    module = make(recordings, tmp_path)
    module.setup("test")
    expected = module.test_dataloader().dataset.images.clone()
    for file in (tmp_path / "cache").iterdir():
        held = torch.load(file, weights_only=True)
        torch.save({"frames": held["frames"][:, :1], "targets": held["targets"]}, file)
    module = make(recordings, tmp_path)
    module.setup("test")
    assert torch.equal(module.test_dataloader().dataset.images, expected)
