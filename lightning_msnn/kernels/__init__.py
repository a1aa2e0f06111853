"""Fast kernels: C for CPUs, torch.compile for CUDA. :mod:`lightning_msnn.functional` says what they compute."""

__all__: list[str] = []  # all that is public about them is what they compute
