"""The command line: ``lightning-msnn fit|validate|test|predict``, a LightningCLI for any module and any data.

``export``, ``zoo`` and ``report`` are verbs with command lines of their own.
"""

from lightning_msnn.cli.command_line import MSNNCLI, main
from lightning_msnn.cli.parsing import configurations, find_configuration

__all__ = ["MSNNCLI", "configurations", "find_configuration", "main"]
