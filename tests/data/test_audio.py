import numpy as np
import pytest
import torch
from scipy.io import wavfile

from lightning_msnn.data.audio import LogMel, align_maps, find_sounds, level_maps, mel_filters, read_wav, read_waves
from lightning_msnn.data.speech_commands import SpeechCommands
from lightning_msnn.data.spoken_digits import SpokenDigits
from lightning_msnn.errors import ConfigurationError

SPEAKERS = ("ada", "bo", "cy", "di")


def tone(hertz, rate=8000, seconds=0.5):
    return 0.5 * np.sin(2 * np.pi * hertz * np.arange(round(seconds * rate)) / rate)


def write(path, wave, rate=8000, dtype=np.int16):
    path.parent.mkdir(parents=True, exist_ok=True)
    scale = {np.int16: 32767, np.int32: 2**31 - 1, np.float32: 1}.get(dtype)
    wavfile.write(path, rate, (wave * 127 + 128).astype(np.uint8) if scale is None else (wave * scale).astype(dtype))
    return path


@pytest.fixture
def digits(tmp_path):
    """Digits that are tones, by four speakers of their own loudness."""
    for digit in range(10):
        for number, speaker in enumerate(SPEAKERS):
            for index in (0, 4, 5, 6, 7):
                wave = tone(200 + 150 * digit, seconds=0.3 + 0.05 * number) / (1 + number)
                write(tmp_path / "recordings" / f"{digit}_{speaker}_{index}.wav", wave)
    return tmp_path


def test_wav_of_any_width_is_read(tmp_path):
    for dtype in (np.uint8, np.int16, np.int32, np.float32):
        read, rate = read_wav(write(tmp_path / "a.wav", tone(440), dtype=dtype))
        assert rate == 8000
        np.testing.assert_allclose(read, tone(440), atol=0.02 if dtype == np.uint8 else 1e-4)


@pytest.mark.parametrize("content", [b"", b"ID3" + bytes(100), None, np.zeros(0), np.full(100, np.nan)])
def test_a_damaged_recording_is_named(tmp_path, content):
    path = tmp_path / "a.wav"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        write(path, content, dtype=np.float32)
    with pytest.raises(ConfigurationError, match=r"cannot read the recording '.*a\.wav': \w+"):
        read_wav(path)


def test_another_rate_is_resampled_and_said(tmp_path, caplog):
    files = [write(tmp_path / "a.wav", tone(440, 16000), 16000), write(tmp_path / "b.wav", tone(440))]
    a, b = read_waves(files, 8000, 4000).float() / 32767
    assert "1 of 2 recordings were resampled from 16000 to 8000 Hz" in caplog.text
    assert (a - b)[100:-100].abs().max() < 0.02


def test_mel_filters_are_triangles_between_neighbours_on_the_mel_scale():
    for rate, n_fft, mels in ((8000, 256, 32), (16000, 512, 40)):
        top = 1127 * np.log(1 + rate / 1400)  # the same scale by the natural logarithm
        hertz = 700 * np.expm1(np.linspace(0, top, mels + 2) / 1127)
        bins = np.arange(n_fft // 2 + 1) * rate / n_fft
        expected = [np.interp(bins, hertz[k : k + 3], [0, 1, 0]) for k in range(mels)]
        np.testing.assert_allclose(mel_filters(rate, n_fft, mels), expected, atol=2e-4)


def test_log_mel_is_a_plain_fourier_transform_of_each_frame():
    torch.manual_seed(0)
    wave = torch.randn(1, 1600)
    make = LogMel(8000, 1600, 24, 10)
    padded = np.pad(wave[0].numpy().astype(np.float64), 128)
    window = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(256) / 256)
    power = np.stack([np.abs(np.fft.rfft(padded[160 * k : 160 * k + 256] * window)) ** 2 for k in range(10)], 1)
    expected = 10 * np.log10(mel_filters(8000, 256, 24).double().numpy() @ power)
    np.testing.assert_allclose(make(wave)[0, 0], expected, atol=1e-3)


def silence(seconds):
    return np.zeros(round(8000 * seconds))


def test_sounds_are_found_where_they_are():
    noise = 0.001 * np.random.default_rng(0).standard_normal(6400)
    waves = [
        np.concatenate([silence(0.8 - s - after), tone(440, seconds=s), silence(after)])
        for s, after in ((0.3, 0.2), (0.1, 0))
    ]
    found = find_sounds(torch.from_numpy(np.stack([w + noise for w in waves])).float(), 8000) * 0.8
    torch.testing.assert_close(found, torch.tensor([[0.3, 0.6], [0.7, 0.8]]), atol=0.015, rtol=0)
    assert torch.equal(find_sounds(torch.zeros(1, 6400), 8000), torch.tensor([[0.0, 1.0]])), "silence is heard whole"


def test_aligned_recordings_do_not_depend_on_place_speed_level_and_microphone():
    """A chirp, later and slower, softer and brighter: the same map; a falling one is another."""

    def chirp(begin, seconds, level, falling=False):
        rate = 400 + 1500 * np.linspace(0, 1, round(8000 * seconds))
        wave = np.sin(2 * np.pi * np.cumsum(rate[::-1] if falling else rate) / 8000) * level
        return np.concatenate([silence(begin), wave, silence(0.8 - begin - seconds)])[:6400]

    module = SpokenDigits()
    waves = np.stack([chirp(0.1, 0.3, 1), chirp(0.25, 0.5, 0.2), chirp(0.1, 0.3, 1, falling=True)])
    first, second, other = module.transform(torch.from_numpy(waves * 32767).short(), False)
    assert first.shape == (1, 32, 40)
    likeness = torch.nn.functional.cosine_similarity
    assert likeness(first.flatten(), second.flatten(), 0) > 0.9
    assert likeness(first.flatten(), other.flatten(), 0) < 0.5
    maps = torch.randn(4, 1, 32, 20)
    tilted = 3 * maps + torch.linspace(0, 12, 32)[:, None] - 40
    torch.testing.assert_close(level_maps(tilted)[:, :, 5:-5], level_maps(maps)[:, :, 5:-5], atol=0.3, rtol=0)


def test_an_offset_of_a_microphone_does_not_hide_where_a_sound_is(tmp_path):
    wave = np.concatenate([silence(0.2), 0.8 * tone(440, seconds=0.3), silence(0.3)])
    for name, offset in (("a.wav", 0.0), ("b.wav", 0.05)):
        wavfile.write(tmp_path / name, 8000, np.round((wave + offset) * 32767 * 0.9).astype(np.int16))
    found = find_sounds(read_waves([tmp_path / "a.wav", tmp_path / "b.wav"], 8000, 6400).float(), 8000) * 0.8
    torch.testing.assert_close(found, torch.tensor([[0.2, 0.5]] * 2), atol=0.02, rtol=0)


def test_aligned_maps_are_read_where_they_should_be():
    """A map that is linear in band and time shows where it was read."""
    bands, times = torch.meshgrid(torch.arange(24.0), torch.arange(200.0), indexing="ij")
    maps = torch.stack([bands, times])[:, None].repeat(200, 1, 1, 1)
    sounds = torch.tensor([0.2, 0.6]).expand(len(maps), 2)
    band, time = (align_maps(maps, sounds, 22)[i, 0] for i in (0, 1))
    torch.testing.assert_close(band, bands[:, :22])
    # From 0.2 to 0.6 with a twentieth of 0.4 on either side: 22 frames of 0.02, whose middles these are.
    torch.testing.assert_close(time[5], 200 * (0.18 + 0.02 * (torch.arange(22) + 0.5)) - 0.5, rtol=0, atol=0.01)
    moved = align_maps(maps, sounds, 22, 0.3, 3.0)
    off = (moved[0::2, 0] - bands[:, :22])[:, 8:16]
    assert (off.flatten(1).std(1) < 1e-4).all()
    assert -3.001 < off.min() < -2
    assert 2 < off.max() < 3.001
    time = moved[1::2, 0, 5]
    assert (time.diff(dim=1) > 0).all(), "time goes on"
    length = (time[:, -1] - time[:, 0]) / (22 - 1) * 22 / 200  # of what is read
    assert 0.35 < length.min() < 0.42
    assert 0.46 < length.max() < 0.52
    speed = time.diff(dim=1)
    ratio = speed[:, 0] / speed[:, -1]
    assert ratio.min() < 0.35
    assert ratio.max() > 2.8


def test_own_split_holds_out_the_first_five_indices(digits):
    module = SpokenDigits(root=str(digits), val_fraction=0.25)
    test, train = (module.list_part(part)[0] for part in ("test", "train"))
    assert {file.stem[-1] for file in test} == {"0", "4"}
    assert len(test) == 80
    assert not set(test) & set(train)
    module.setup("fit")
    assert len(module.train_dataloader().dataset) == 90
    assert len(module.val_dataloader().dataset) == 30


def test_speakers_are_held_out(digits):
    module = SpokenDigits(root=str(digits), splits="speakers", test_speakers=("ada", "cy"), val_speaker="di")
    files, _ = module.list_part("train")
    train, val = module.split(torch.zeros(len(files)))
    assert {files[i].stem.split("_")[1] for i in train} == {"bo"}
    assert {files[i].stem.split("_")[1] for i in val} == {"di"}
    assert {file.stem.split("_")[1] for file in module.list_part("test")[0]} == {"ada", "cy"}


def test_bad_values_and_folders_are_named_before_any_work(digits, tmp_path):
    for arguments, message in (
        ({"splits": "random"}, "unknown split 'random': allowed are recordings, speakers"),
        ({"splits": "speakers", "val_speaker": "theo"}, "val_speaker must not be one of test_speakers, and 'theo' is"),
        ({"mels": 200}, "mels must be smaller, not 200"),
        ({"time_mask": 40}, "time_mask must be from 0 to 39, not 40"),
        ({}, "root is not given"),
        ({"root": str(tmp_path / "none")}, "none' is not a folder"),
        ({"splits": "speakers", "test_speakers": ("dy",)}, "unknown speaker 'dy': those in .* are ada, bo, cy, di"),
    ):
        with pytest.raises(ConfigurationError, match=message):
            SpokenDigits(**({"root": str(digits)} if "test_speakers" in arguments else {}) | arguments).check("fit")
    write(digits / "recordings" / "seven.wav", tone(300))
    with pytest.raises(ConfigurationError, match=r"seven.wav' must be named <digit>_<speaker>_<index>.wav"):
        SpokenDigits(root=str(digits)).check("fit")


@pytest.fixture
def commands(tmp_path):
    for number, word in enumerate(SpeechCommands.classes):
        for index in range(4):
            write(tmp_path / word / f"{index}_nohash_0.wav", tone(200 + 20 * number, 16000, 0.1), 16000)
    write(tmp_path / "_background_noise_" / "hum.wav", tone(50, 16000), 16000)
    (tmp_path / "testing_list.txt").write_text("".join(f"{w}/0_nohash_0.wav\n" for w in SpeechCommands.classes))
    (tmp_path / "validation_list.txt").write_text("cat/1_nohash_0.wav\nzero/3_nohash_0.wav\n")
    return tmp_path


def test_speech_commands_have_the_official_parts(commands):
    module = SpeechCommands(root=str(commands))
    module.setup()
    assert module.num_classes == 35
    assert len(module.test_dataloader().dataset) == 35
    assert module.val_dataloader().dataset.targets.tolist() == [module.classes.index(w) for w in ("cat", "zero")]
    assert len(module.train_dataloader().dataset) == 35 * 3 - 2
    waves, targets = next(iter(module.test_dataloader()))
    assert (waves.shape, targets.tolist()) == ((35, 1, *module.image_size), list(range(35)))
    with open(commands / "testing_list.txt", "a") as file:
        file.write("cat/9_nohash_0.wav\n")
    with pytest.raises(ConfigurationError, match=r"testing_list.txt' names 'cat/9_nohash_0.wav'"):
        module.check("test")
    (commands / "testing_list.txt").unlink()
    with pytest.raises(ConfigurationError, match=r"cannot read '.*testing_list.txt'"):
        module.check("fit")
