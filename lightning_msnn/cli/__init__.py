"""The command line: ``lightning-msnn fit|validate|test|predict``, a LightningCLI for any module and any data.

``lightning-msnn export`` has a command line of its own: :mod:`lightning_msnn.export`.
"""

from lightning_msnn.cli.command_line import MSNNCLI, main
from lightning_msnn.cli.config_files import configurations, find_configuration

__all__ = ["MSNNCLI", "configurations", "find_configuration", "main"]
