"""What is asked of Lightning's strategies."""

from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy, Strategy

from lightning_msnn.errors import ConfigurationError

__all__ = ["refuse_shards"]


def refuse_shards(strategy: Strategy, what: str) -> None:
    """Raise a ConfigurationError where each process may hold only a part of the weights, so that none can read all."""
    if isinstance(strategy, FSDPStrategy | ModelParallelStrategy) or getattr(strategy, "zero_stage_3", False):
        raise ConfigurationError(f"{what} must be left out with {type(strategy).__name__}, which shards the weights")
