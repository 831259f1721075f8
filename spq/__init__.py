"""Compression of LLaMA-family checkpoints by SVD, pruning and quantization, and the packed format."""
