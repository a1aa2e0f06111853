"""The modules of a task and their parameters, as a table."""

from typing import Any

from lightning.pytorch.callbacks import ModelSummary
from lightning.pytorch.utilities import rank_zero_info

__all__ = ["ParameterSummary"]


class ParameterSummary(ModelSummary):
    """Lightning's summary without its count of operations.

    That is 0 where a module gives no example of its input, and counts a spike as a number;
    :class:`lightning_msnn.callbacks.EnergyMonitor` counts what a network does.
    """

    @staticmethod
    def summarize(
        summary_data: list[tuple[str, list[str]]],
        total_parameters: int,
        trainable_parameters: int,
        model_size: float,
        total_training_modes: dict[str, int],
        total_flops: int,
        **summarize_kwargs: Any,
    ) -> None:
        """Log the table."""
        columns = [[title, *cells] for title, cells in summary_data if title.strip() and title != "FLOPs"]
        widths = [max(map(len, column)) for column in columns]
        rows = [
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True))
            for row in zip(*columns, strict=True)
        ]
        rows.insert(1, "-" * len(rows[0]))
        rows.append(f"{total_parameters:,} parameters, of which {trainable_parameters:,} learn; {model_size:,.1f} MB")
        rank_zero_info("\n%s", "\n".join(row.rstrip() for row in rows))
