"""Compression of LLaMA-family checkpoints by SVD, pruning and quantization, and the packed format.

Importing it has one effect: transformers can load packed folders from then on (`spq.registration`).
"""

from spq.registration import register_when_needed

register_when_needed()
