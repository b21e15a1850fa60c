"""Settings for all tests: one thread each, and Triton kernels in the interpreter where there is no GPU."""

import os

import torch

if not torch.cuda.is_available():
    # Read when a kernel module is imported, so before any import of one.
    os.environ.setdefault("TRITON_INTERPRET", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
torch.set_num_threads(1)
