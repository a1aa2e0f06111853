"""``python -m lightning_msnn``: the command line."""

from lightning_msnn_cli import main

__all__ = ["main"]

if __name__ == "__main__":
    main()
