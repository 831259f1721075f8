"""Finding a model by name: a folder as it is, or a download of what a model consists of and nothing else."""

from __future__ import annotations

import re
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

from spq.errors import ModelFileError, OptionError

PATTERNS = ["*.safetensors", "*.json", "tokenizer*", "*.jinja", "merges.txt", "vocab.*", "LICENSE*"]


def find_model(name: str, revision: str | None) -> Path:
    """The folder `name`, or a local copy of the Hugging Face id `org/name` at `revision`.

    Raises OptionError (a revision of a folder) or ModelFileError (neither, or the download failed).
    """
    folder = Path(name).expanduser()
    if folder.is_dir():
        if revision is not None:
            raise OptionError(f"--revision {revision}: {name} is a folder, which has no revisions")
        return folder
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        raise ModelFileError(f"{name}: neither a folder nor a Hugging Face id (org/name)")
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=PATTERNS))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ModelFileError(f"{name}: no such folder, and it cannot be downloaded: {reason}") from error
