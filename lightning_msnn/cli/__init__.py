"""The command line: ``lightning-msnn fit|validate|test|predict``, a LightningCLI for any module and any data.

``lightning-msnn export`` and ``describe`` have command lines of their own: :mod:`lightning_msnn.export` and
:mod:`lightning_msnn.describe`. ``dial`` is a ``fit`` whose arguments :mod:`lightning_msnn.dial` completes.
"""

from lightning_msnn.cli.command_line import MSNNCLI, main
from lightning_msnn.cli.config_files import configurations, find_configuration

__all__ = ["MSNNCLI", "configurations", "find_configuration", "main"]
