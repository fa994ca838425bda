"""Training: DeepSpeed's engine made equal over its stages, the loop, its policies, and what a run leaves behind."""

import os

import torch

# DeepSpeed reads this once, when it is imported; without it a CPU run warns and guesses.
os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
