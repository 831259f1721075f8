"""What can be wrong with a model folder or a request to compress one; messages name the value and the remedy."""


class SpqError(Exception):
    """Base of every error this package raises on purpose; one line, whatever the names in a hostile file are."""

    def __init__(self, message: str) -> None:
        """What a terminal would act on, line breaks too, is escaped."""
        super().__init__("".join(c if c.isprintable() else ascii(c)[1:-1] for c in message))


class UnsupportedModelError(SpqError):
    """The folder is a model, but not one this project can run."""


class ModelFileError(SpqError):
    """A file of the model is missing, cut short or inconsistent."""


class PackedFormatError(ModelFileError):
    """A packed folder breaks its own manifest: version, tensor, shape or length."""


class OptionError(SpqError):
    """An option, or a combination of options, that means nothing."""


class CalibrationError(SpqError):
    """A calibration or evaluation text is missing, too short or cannot be tokenized."""


class OutputError(SpqError):
    """The output folder exists already or cannot be written."""


class RemoteError(SpqError):
    """A server cannot be reached, refuses a request, or answers something else than was asked."""
