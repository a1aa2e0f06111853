"""What went wrong: whose fault an error is that came out of Lightning or of a parser."""

from __future__ import annotations

from lightning.pytorch.trainer.connectors import checkpoint_connector

from lightning_msnn.errors import ConfigurationError

__all__ = ["configuration_error", "is_lightnings", "is_restoring"]


def is_restoring(error: BaseException) -> bool:
    """Whether an error was raised while Lightning restored what a checkpoint holds."""
    trace = error.__traceback__
    while trace is not None:
        frame = trace.tb_frame
        restoring = frame.f_code.co_name.lstrip("_").startswith(("restore", "resume"))
        if restoring and frame.f_globals.get("__name__") == checkpoint_connector.__name__:
            return True
        trace = trace.tb_next
    return False


def is_lightnings(error: BaseException) -> bool:
    """Whether Lightning itself raised an error, as where options do not fit the data, and no user's code called it."""
    rooms, trace = [], error.__traceback__
    while trace is not None:
        rooms.append(str(trace.tb_frame.f_globals.get("__name__")).partition(".")[0])
        trace = trace.tb_next
    return rooms[-1:] == ["lightning"] and set(rooms) <= {"lightning", "lightning_msnn", "torch"}


def configuration_error(error: BaseException | None) -> ConfigurationError | None:
    """Find a configuration error under what a parser or a Trainer has wrapped it in."""
    while error is not None and not isinstance(error, ConfigurationError):
        error = error.__cause__ or error.__context__
    return error
