"""What can be wrong with a model folder; each message names the file or tensor, the value and the remedy."""


class SpqError(Exception):
    """Base of every error this package raises on purpose."""


class UnsupportedModelError(SpqError):
    """The folder is a model, but not one this project can run."""


class ModelFileError(SpqError):
    """A file of the model is missing, cut short or inconsistent."""


class PackedFormatError(ModelFileError):
    """A packed folder breaks its own manifest: version, tensor, shape or length."""
