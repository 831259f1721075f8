"""Tensor operations of the server: one interface (`kernels.ops`), three implementations of it.

Not the Hugging Face package of the same name, which transformers looks for: this module imports nothing and
keeps its version below any that transformers would accept, so that `import transformers` is undisturbed.
"""

__version__ = "0.0.0"
