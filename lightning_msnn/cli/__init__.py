"""The verbs ``fit``, ``validate``, ``test`` and ``predict``: a LightningCLI for any module and any data.

The command ``lightning-msnn`` is ``lightning_msnn_cli``, which passes these verbs on.
"""

from lightning_msnn.cli.command_line import MSNNCLI
from lightning_msnn.cli.parsing import configurations, find_configuration
from lightning_msnn_cli import main

__all__ = ["MSNNCLI", "configurations", "find_configuration", "main"]
