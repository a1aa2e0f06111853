"""What all token mixers share: the windows of a map, and what synapses see of them.

With *shared* context a synapse that does not depend on the window runs once over the whole map. With *isolated*
context, the published form, a synapse sees zeros beyond the border of its window, all windows pass it as one batch, and
the windows' outputs are merged; the output projection comes before the mean over overlaps, so that its input is still
spikes.
"""

from torch import Tensor, nn

from lightning_msnn.errors import choose
from lightning_msnn.functional.windows import WINDOWS
from lightning_msnn.nn.layer import Layer, cut_windows, join_windows
from lightning_msnn.nn.synapse import Synapse

__all__ = ["CONTEXTS", "Mixer"]

CONTEXTS: tuple[str, ...] = ("shared", "isolated")
"""What a synapse sees beyond the border of a window: the rest of the map, or zeros."""


class Mixer(nn.Module):
    """A token mixer: layers of spiking neurons that visit the windows of a map and merge what they saw.

    Its forward maps spikes ``(B, C, H, W)``, and the residual stream, to the stream after it.

    Args:
        windows: Kind of windows, one of :data:`lightning_msnn.functional.WINDOWS`.
        context: ``"shared"`` or ``"isolated"``.

    ``byte_spikes`` names the layers of neurons whose spikes go to synapses and nowhere else: integer inference stores
    them as bytes. A mixer that has it must read its own input by synapses alone too.

    Raises:
        ConfigurationError: If one is not known.
    """

    def __init__(self, windows: str, context: str) -> None:
        super().__init__()
        choose(WINDOWS, windows, "kind of windows")
        choose(dict.fromkeys(CONTEXTS), context, "context")
        self.windows = windows
        self.isolated = context == "isolated"
        # Where windows lie: on the map throughout, batches throughout, or a batch that leads back to the map.
        self.cut = Layer(kind=windows, windows_in=self.isolated, windows_out=self.isolated)
        self.cut_batch = self.cut._replace(windows_in=True)

    def enter(self, spikes: Tensor) -> Tensor:
        """Give the synapses the map ``(B, C, H, W)``, or its windows as one batch ``(windows B, C, h, w)``."""
        return cut_windows(spikes, self.windows) if self.isolated else spikes

    def leave(self, project: Synapse, spikes: Tensor, size: tuple[int, int], residual: Tensor | None) -> Tensor:
        """Project spikes onto the map ``(B, C, *size)``, before the mean over overlaps, and add the residual stream."""
        if not self.isolated:
            current: Tensor = project(spikes, residual)
            return current
        return join_windows(project(spikes), self.windows, size, residual)

    def extra_repr(self) -> str:
        """Show windows and context."""
        return f"windows={self.windows!r}, context={'isolated' if self.isolated else 'shared'!r}"
