"""What is asked of Lightning's strategies."""

from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy, Strategy

__all__ = ["flattens_weights", "shards_weights"]


def flattens_weights(strategy: Strategy) -> bool:
    """Return whether the optimizer may meet parts of the weights, or vectors of several, and not each as it is."""
    return shards_weights(strategy) or isinstance(strategy, DeepSpeedStrategy)


def shards_weights(strategy: Strategy) -> bool:
    """Return whether each process of a strategy may hold only a part of the weights, so that none can read them all."""
    return isinstance(strategy, FSDPStrategy | ModelParallelStrategy) or getattr(strategy, "zero_stage_3", False)
