"""Fast kernels: in C for CPUs, in Triton for CUDA. :mod:`lightning_msnn.functional` says what they compute."""
