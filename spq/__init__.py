"""Compression of LLaMA-family checkpoints by SVD, pruning and quantization, and the packed format.

Importing it teaches transformers to load packed folders (see `spq.hf`).
"""

from spq import hf as hf
