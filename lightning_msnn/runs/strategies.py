"""What is asked of Lightning's strategies."""

from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy, Strategy

__all__ = ["shards_weights"]


def shards_weights(strategy: Strategy) -> bool:
    """Return whether each process of a strategy may hold only a part of the weights, so that none can read them all."""
    return isinstance(strategy, FSDPStrategy | ModelParallelStrategy) or getattr(strategy, "zero_stage_3", False)
