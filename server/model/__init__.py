"""The LLaMA family over `kernels.ops`, and loading it."""
