"""Sounds: reading of wav files, log-mel maps, augmentation, and the data module of recordings."""

import logging
import math
import os
import warnings
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from lightning_msnn.data.arrays import ArrayDataModule, Part
from lightning_msnn.data.reading import list_files
from lightning_msnn.errors import ConfigurationError, brief, check_integer, check_number

__all__ = ["AudioDataModule", "LogMel", "align_maps", "find_sounds", "level_maps", "read_wav", "read_waves"]

logger = logging.getLogger(__name__)

DEVIATION = 9.0
"""Deviation of a map before it is levelled, in decibels: the median over recordings of SpokenDigits."""

MARGIN = 0.05
"""Share of its length that an aligned map shows before and after a sound."""

Wave = npt.NDArray[np.float32]


def read_wav(path: str | os.PathLike[str]) -> tuple[Wave, int]:
    """Read a wav file of integers of any width or floats: its samples in [-1, 1], float32, (N,), and its rate in Hz.

    Channels are averaged. The file must have samples, all of them numbers, else a ConfigurationError names it.
    """
    from scipy.io import wavfile  # slow to import

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", wavfile.WavFileWarning)  # of chunks that hold no samples
            rate, samples = wavfile.read(path)
        if not samples.size or not np.isfinite(samples).all() or rate < 1:
            raise ValueError("it has no samples, or some that are not finite numbers")
    except Exception as error:  # a damaged header raises anything
        raise ConfigurationError(f"cannot read the recording {os.fspath(path)!r}: {brief(error)}") from error
    wave = samples.astype(np.float32)
    if samples.dtype == np.uint8:
        wave = (wave - 128) / 128
    elif samples.dtype.kind == "i":
        wave = wave / -np.float32(np.iinfo(samples.dtype).min)
    return (wave.mean(1) if wave.ndim == 2 else wave), int(rate)


def loudest(wave: Wave, samples: int) -> Wave:
    """Return the loudest stretch of this length; a shorter wave gets zeros on both sides."""
    if len(wave) <= samples:
        missing = samples - len(wave)
        return np.pad(wave, (missing // 2, missing - missing // 2))
    energy = np.concatenate(([0.0], np.cumsum(wave.astype(np.float64) ** 2)))
    start = int(np.argmax(energy[samples:] - energy[:-samples]))
    return wave[start : start + samples]


def read_waves(files: Sequence[str | os.PathLike[str]], rate: int, samples: int) -> Tensor:
    """Read wav files as waves of one rate in Hz and one length, int16, (N, samples), each at full level.

    Recordings of another rate are resampled, and a warning says how many. Offsets are removed. A longer recording is
    cut to its loudest stretch; a shorter one gets silence on both sides.
    """
    waves = np.zeros((len(files), samples), np.int16)

    def fill(index: int) -> int:
        wave, found = read_wav(files[index])
        if found != rate:
            from scipy.signal import resample_poly  # slow to import

            divisor = math.gcd(rate, found)
            wave = resample_poly(wave, rate // divisor, found // divisor).astype(np.float32)
        wave = loudest(wave - wave.mean(), samples)
        waves[index] = np.round(wave * (32767 / max(float(np.abs(wave).max()), 1e-6)))
        return found

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        rates = Counter(pool.map(fill, range(len(files)), chunksize=64))
    for found, number in rates.items():
        if found != rate:
            logger.warning("%d of %d recordings were resampled from %d to %d Hz", number, len(files), found, rate)
    return torch.from_numpy(waves)


def mel_filters(rate: int, n_fft: int, mels: int) -> Tensor:
    """Triangular filters, evenly spaced on the mel scale from 0 Hz to half the rate, (mels, n_fft // 2 + 1), at most 1.

    torchaudio, which has these, cannot be imported beside torch for CPUs. The scale is that of HTK:
    ``2595 log10(1 + f / 700)`` (O'Shaughnessy, Speech Communication: Human and Machine, 1987).
    """
    top = 2595 * math.log10(1 + rate / 2 / 700)
    edges = 700 * (10 ** (torch.linspace(0, top, mels + 2, dtype=torch.float64) / 2595) - 1)
    bins = torch.linspace(0, rate / 2, n_fft // 2 + 1, dtype=torch.float64)
    slopes = (bins - edges[:, None]) / edges.diff()[[*range(mels + 1), mels], None]
    rising, falling = slopes[:-2], 1 - slopes[1:-1]
    return torch.minimum(rising, falling).clamp(min=0).float()


class LogMel(nn.Module):
    """Waves to log-mel maps.

    Args:
        rate: Sampling rate in Hz.
        samples: Samples of a wave.
        mels: Height of a map.
        frames: Width of a map; neighbours are ``samples // frames`` samples apart.

    Raises:
        ConfigurationError: If there are too few frequencies for the filters.
    """

    window: Tensor
    filters: Tensor

    def __init__(self, rate: int, samples: int, mels: int, frames: int) -> None:
        super().__init__()
        self.n_fft = 2 ** math.ceil(math.log2(0.025 * rate))  # 25 ms or more, in which speech hardly changes
        self.hop, self.frames = samples // frames, frames
        filters = mel_filters(rate, self.n_fft, mels)
        if (filters.sum(1) == 0).any():
            raise ConfigurationError(
                f"mels must be smaller, not {mels}: at {rate} Hz some of so many filters lie between two frequencies"
            )
        self.register_buffer("window", torch.hann_window(self.n_fft), persistent=False)
        self.register_buffer("filters", filters, persistent=False)

    def forward(self, waves: Tensor) -> Tensor:
        """Map waves ``(B, samples)`` to decibels ``(B, 1, mels, frames)``, at most 40 dB below a map's loudest."""
        spectrum = torch.stft(waves, self.n_fft, self.hop, window=self.window, pad_mode="constant", return_complex=True)
        power = self.filters @ spectrum.abs().square()[..., : self.frames]
        decibels = 10 * power.clamp(min=1e-10).log10()
        return decibels.maximum(decibels.amax((1, 2), keepdim=True) - 40).unsqueeze(1)


def add_noise(waves: Tensor, noise: float) -> Tensor:
    """Add white noise to waves (B, samples), drawn from torch's global CPU generator.

    Its standard deviation is log-uniform over the two decades up to ``noise``, as a multiple of the wave's.
    """
    level = (noise * 10 ** (-2 * torch.rand(len(waves), 1))).to(waves.device) * waves.std(1, keepdim=True)
    return waves + level * torch.randn(waves.shape).to(waves.device)


def mask_maps(maps: Tensor, width: int, dim: int) -> Tensor:
    """Set a band of each map to 0, its mean (SpecAugment, arXiv 1904.08779), drawn from torch's global CPU generator.

    Args:
        maps: ``(B, 1, mels, frames)``, normalised.
        width: Largest width of the band.
        dim: Axis that is masked: 2 for frequencies, 3 for times.
    """
    size = maps.shape[dim]
    drawn = (torch.rand(len(maps), 1) * (width + 1)).floor()
    first = (torch.rand(len(maps), 1) * (size - drawn + 1)).floor()
    place = torch.arange(size)
    masked = ((place >= first) & (place < first + drawn)).to(maps.device)
    return maps.masked_fill(masked[:, None, :, None] if dim == 2 else masked[:, None, None, :], 0.0)


def find_sounds(waves: Tensor, rate: int) -> Tensor:
    """Find where sounds begin and end in waves (B, samples), as shares of the wave, (B, 2).

    A sound is what lies between the first and the last 20 ms within 35 dB of the loudest.
    """
    width = max(1, rate // 50)
    hop = max(1, width // 4)
    energy = nn.functional.avg_pool1d(waves.square().unsqueeze(1), width, hop, width // 2).squeeze(1)
    loud = energy >= energy.amax(1, keepdim=True) * 10**-3.5
    first, last = loud.int().argmax(1), loud.shape[1] - loud.flip(1).int().argmax(1)
    return (torch.stack([first - 0.5, last - 0.5], 1) * (hop / waves.shape[1])).clamp(0, 1)


def align_maps(
    maps: Tensor, sounds: Tensor, frames: int, stretch: float = 0.0, transpose: float = 0.0, margin: float = MARGIN
) -> Tensor:
    """Cut maps to their sounds, with a margin on either side, and stretch these to one length.

    In training the ends, the middle and the voice move, each by its own draw from torch's CPU generator. The mel scale
    is nearly logarithmic where voices lie, so another pitch or vocal tract moves a map along it.

    Args:
        maps: ``(B, 1, mels, fine)``, finer in time than the result; beyond a border its last value is repeated.
        sounds: Begin and end of each sound, (B, 2), as shares of the map (:func:`find_sounds`).
        frames: Width of the result.
        stretch: The middle of a sound moves by at most half of this share of its length, and at most a quarter, as if
            it were spoken faster first and then slower, or the other way round; each end moves by a quarter of it.
        transpose: Largest number of mel bands that a map moves by.
        margin: Share of its length that a map shows before and after a sound.

    Returns:
        Maps, ``(B, 1, mels, frames)``.
    """
    batch, _, mels, _ = maps.shape
    drawn = (2 * torch.rand(4, batch) - 1).to(maps.device) if stretch or transpose else maps.new_zeros(4, batch)
    length = (sounds[:, 1] - sounds[:, 0]).clamp(min=1e-3)
    begin = sounds[:, 0] - (margin + stretch / 4 * drawn[0]) * length
    end = sounds[:, 1] + (margin + stretch / 4 * drawn[1]) * length
    # Two values for each frame, whose mean is taken.
    times = (torch.arange(2 * frames, device=maps.device) + 0.5) / (2 * frames)
    times = times + min(2 * stretch, 1.0) * drawn[2, :, None] * times * (1 - times)
    times = begin[:, None] + (end - begin)[:, None] * times
    bands = (torch.arange(mels, device=maps.device) + 0.5 + transpose * drawn[3, :, None]) / mels
    size = (batch, mels, 2 * frames)
    grid = torch.stack([times[:, None, :].expand(size), bands[:, :, None].expand(size)], 3) * 2 - 1
    read = nn.functional.grid_sample(maps, grid.to(maps.dtype), padding_mode="border", align_corners=False)
    return nn.functional.avg_pool2d(read, (1, 2))


def level_maps(maps: Tensor) -> Tensor:
    """Remove level and tilt from maps ``(B, 1, mels, frames)``: they depend on the microphone.

    Subtracts the mean over time, smoothed over nine mel bands, and divides by the deviation.
    """
    mean = nn.functional.pad(maps.mean(3, keepdim=True), (0, 0, 4, 4), mode="replicate")
    maps = maps - nn.functional.avg_pool2d(mean, (9, 1), 1)
    return maps / maps.std((2, 3), keepdim=True).clamp(min=1e-3)


def colour_maps(maps: Tensor, level: float) -> Tensor:
    """Raise and lower the mel bands of maps smoothly, as another microphone does; drawn from torch's CPU generator.

    The change has standard deviation ``level`` at five bands from the lowest to the highest, and is linear between.
    """
    drawn = (level * torch.randn(len(maps), 1, 5, 1)).to(maps.device)
    return maps + nn.functional.interpolate(drawn, (maps.shape[2], 1), mode="bilinear", align_corners=True)


class AudioDataModule(ArrayDataModule):
    """Recordings in memory, made into log-mel maps ``(B, 1, mels, frames)`` a batch at a time on the device.

    A recording is cut to its sound, which is stretched to the width of the map, so that the speed of a speaker does not
    matter. Level and tilt of each map are removed, so that the microphone does not matter either.

    A data set is a subclass that states its classes and rate, and lists the files of its parts (``list_part``).

    Args:
        root: Folder of the data set.
        folder: A wav file to predict, or a folder of them, its sub-folders included.
        mels: Height of a map: filters on the mel scale.
        frames: Width of a map.
        aligned: Whether recordings are cut to their sounds; else a map shows the whole recording.
        seconds: Length of a recording; a longer one is cut to its loudest stretch, a shorter one gets silence.
        noise: Largest share of white noise in a training recording.
        stretch: How far the middle and the ends of a training recording move, in [0, 1) (:func:`align_maps`).
        transpose: Most mel bands that a training map is moved up or down, as by another voice.
        colour: Standard deviation in decibels of a smooth change of the mel bands of a training map, as by another
            microphone.
        time_mask: Most frames of a training map that are masked.
        frequency_mask: Most mel bands of a training map that are masked.
        batch_size: Recordings a batch (on each device).
        **kwargs: Arguments of :class:`~lightning_msnn.data.arrays.ArrayDataModule`.

    Raises:
        ConfigurationError: If a value is not allowed.
    """

    noun, suffixes = "recordings", (".wav",)
    #: Sampling rate in Hz; recordings of another are resampled.
    rate: ClassVar[int]
    in_chans = 1
    mean, std = (0.0,), (1.0,)  # each map is normalised by itself

    def __init__(
        self,
        root: str | None = None,
        folder: str | None = None,
        mels: int = 32,
        frames: int = 40,
        aligned: bool = True,
        seconds: float = 0.8,
        noise: float = 0.3,
        stretch: float = 0.35,
        transpose: float = 3.0,
        colour: float = 5.0,
        time_mask: int = 8,
        frequency_mask: int = 6,
        batch_size: int = 64,
        **kwargs: Any,
    ) -> None:
        super().__init__(batch_size, **kwargs)
        self.mels, self.frames = check_integer("mels", mels, 8), check_integer("frames", frames, 8)
        limits = {
            "seconds": (seconds, 60), "transpose": (transpose, mels - 1), "colour": (colour, 80),
            "time_mask": (time_mask, frames - 1), "frequency_mask": (frequency_mask, mels - 1),
        }  # fmt: skip
        for name, (value, most) in limits.items():
            if not 0 <= value <= most or (name == "seconds" and not value):
                raise ConfigurationError(f"{name} must be from 0 to {most}, not {value!r}")
        self.samples, self.aligned = round(seconds * self.rate), aligned
        # Finer in time than the map, so that a short sound has as many values as a long one.
        fine = max(frames, self.samples // max(1, self.samples // (4 * frames)))
        self.log_mel = LogMel(self.rate, self.samples, mels, fine)
        self.noise, self.stretch = check_number("noise", noise), check_number("stretch", stretch, below_one=True)
        self.transpose, self.colour = transpose, colour
        self.time_mask, self.frequency_mask = time_mask, frequency_mask

    @property
    def image_size(self) -> tuple[int, int]:
        """Mel bands and frames of a map."""
        return self.mels, self.frames

    def read(self, part: Part) -> tuple[Tensor, Tensor]:
        """Read the recordings of a part, int16, (N, samples), and their classes."""
        files, targets = self.list_part(part)
        return read_waves(files, self.rate, self.samples), torch.tensor(targets)

    def read_unknown(self) -> tuple[Tensor, list[str]]:
        """Read the recordings to predict."""
        assert self.folder is not None
        files = list_files(self.folder, self.suffixes)
        return read_waves(files, self.rate, self.samples), files

    def read_one(self, path: str | os.PathLike[str]) -> Tensor:
        """Read a wav file as the input of a network, ``(1, mels, frames)``."""
        return self.transform(read_waves([path], self.rate, self.samples), False)[0]

    def transform(self, inputs: Tensor, training: bool) -> Tensor:
        """Turn waves, int16, (B, samples), into log-mel maps, each of mean 0 and deviation 1."""
        waves = inputs.float() / 32768
        if self.aligned:  # the last few samples may not be in the map
            sounds = find_sounds(waves, self.rate) * (self.samples / (self.log_mel.hop * self.log_mel.frames))
        else:
            sounds = waves.new_tensor([0.0, 1.0]).expand(len(waves), 2)
        if training:
            waves = add_noise(waves, self.noise)
        maps: Tensor = self.log_mel.to(waves.device)(waves)
        moves = (self.stretch, self.transpose) if training else (0.0, 0.0)
        maps = level_maps(align_maps(maps, sounds, self.frames, *moves, margin=MARGIN if self.aligned else 0.0))
        if training:
            if self.colour:
                maps = colour_maps(maps, self.colour / DEVIATION)
            maps = mask_maps(mask_maps(maps, self.frequency_mask, 2), self.time_mask, 3)
        return maps
