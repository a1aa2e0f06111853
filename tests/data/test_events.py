import numpy as np
import pytest
import torch

from lightning_msnn.errors import ConfigurationError

pytest.importorskip("tonic", reason="tonic, of the extra events, is not installed")

from tonic.datasets import NMNIST

from lightning_msnn.data.events import EventFrames


def write_events(file, seed):
    """Write random events in the format of N-MNIST: x, y, one bit of polarity and 23 of the time in microseconds."""
    random, number = np.random.default_rng(seed), 600
    x, y, p = random.integers(34, size=number), random.integers(34, size=number), random.integers(2, size=number)
    t = np.sort(random.integers(300_000, size=number))
    x[:300], y[:300], p[:300] = 3, 4, 1  # more at one place than a byte counts
    file.parent.mkdir(parents=True, exist_ok=True)
    np.stack([x, y, p << 7 | t >> 16, t >> 8 & 255, t & 255], 1).astype(np.uint8).tofile(file)


@pytest.fixture
def root(tmp_path, monkeypatch):
    monkeypatch.setattr(NMNIST, "_check_exists", lambda self: True)
    for index in range(60):
        part = "Train" if index < 40 else "Test"
        write_events(tmp_path / "NMNIST" / part / str(index % 10) / f"{index:05}.bin", index)
    return str(tmp_path)


@pytest.mark.parametrize("frames", [1, 3])
@pytest.mark.parametrize("size", [None, 17])
def test_events_are_counted_by_pixel_polarity_and_time(root, frames, size):
    module = EventFrames("NMNIST", root, frames=frames, size=size)
    side = size or 34
    assert (module.in_chans, module.image_size, module.num_classes) == (2 * frames, (side, side), 10)
    counted, targets = module.read("test")
    data_set = NMNIST(root, train=False)
    for frame, target, (events, label) in zip(counted, targets, data_set, strict=True):
        assert target == label
        expected = np.zeros((frames, 2, side, side), int)
        begin, end = events["t"][0], events["t"][-1]
        for x, y, t, p in zip(*(events[name].astype(int) for name in "xytp"), strict=True):
            step = (t - begin) // ((end - begin) // frames)
            if step < frames:  # tonic leaves out what is behind the last whole part
                expected[step, p, y * side // 34, x * side // 34] += 1
        assert np.abs(frame.view(expected.shape).numpy() - expected.clip(max=255)).sum() <= 2 * frames
        assert frame.max() == (255 if frames == 1 else expected.max())


def test_frames_are_normalised_by_the_training_frames(root):
    module = EventFrames("NMNIST", root, frames=2, batch_size=20, shift=0)
    module.check("fit")
    module.setup("test")
    dataset = module.train_dataloader().dataset
    values = np.log1p(dataset.images[dataset.indices].numpy().astype(np.float64))
    np.testing.assert_allclose(module.mean, values.mean((0, 2, 3)), rtol=1e-6)
    np.testing.assert_allclose(module.std, values.std((0, 2, 3)), rtol=1e-6)
    counts, targets = next(iter(module.test_dataloader()))
    seen, _ = module.on_after_batch_transfer((counts, targets), 0)
    mean, std = (np.array(x)[:, None, None] for x in (module.mean, module.std))
    np.testing.assert_allclose(seen, (np.log1p(counts.double().numpy()) - mean) / std, atol=1e-5)
    assert seen.shape == (20, 4, 34, 34)


def test_a_data_set_of_one_part_is_split_always_the_same(root, monkeypatch):
    monkeypatch.setattr(NMNIST, "__init__", lambda self, save_to, _of=NMNIST.__init__: _of(self, save_to))
    parts = [EventFrames("NMNIST", root, seed=1).read(part)[0] for part in ("train", "test")]
    assert [len(part) for part in parts] == [30, 10]  # each class has one to test with
    assert torch.equal(parts[1], EventFrames("NMNIST", root, seed=2).read("test")[0])


def test_bad_names_and_sizes_are_named(root):
    with pytest.raises(ConfigurationError, match="unknown data set 'NMNST': allowed are .*DVSGesture.*mean 'NMNIST'"):
        EventFrames("NMNST")
    with pytest.raises(ConfigurationError, match="unknown data set 'SHD'"):
        EventFrames("SHD")  # sounds
    with pytest.raises(ConfigurationError, match="size must be at most 34, the camera's, not 64"):
        EventFrames(root=root, size=64)
    with pytest.raises(ConfigurationError, match="root is not given"):
        EventFrames().check("fit")
