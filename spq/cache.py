"""Where a compression belongs in a cache folder: one path per content of everything that decides the result.

Not a store: nothing is created or deleted here.
"""

from __future__ import annotations

import hashlib
import json
from importlib import metadata
from pathlib import Path

from spq.config import SPQConfig
from spq.errors import ModelFileError
from spq.manifest import FORMAT_VERSION

BLOCK_BYTES = 1 << 16
NUM_BLOCKS = 8
_WEIGHT_SUFFIXES = (".safetensors",)
_TEXT_SUFFIXES = (".json", ".model", ".jinja", ".txt")


def source_hash(folder: Path) -> str:
    """Hex SHA-256 over a source folder: small files in full, weight files by samples.

    A 13 GB model takes half a minute to hash in full. Of each safetensors file the size and 8 blocks of 64 KiB are
    hashed, spread from its beginning (where the header, with every name, shape and offset, starts) to its end: enough
    to tell models and trainings apart, not to notice single changed bytes. Raises ModelFileError for an empty folder.
    """
    digest = hashlib.sha256()
    for path in _source_files(folder):
        digest.update(f"{path.name}\0{path.stat().st_size}\0".encode())
        if path.suffix in _WEIGHT_SUFFIXES:
            _update_sampled(digest, path)
        else:
            digest.update(path.read_bytes())
    return digest.hexdigest()


def packed_path(cache_dir: Path, source: Path, options: SPQConfig, calibration_hash: str) -> Path:
    """Folder in `cache_dir` for this source, options, calibration text, format and version of this program.

    The modification times of the weight files (ns) count too, so that an edit the samples miss is not served from
    the cache. Raises ModelFileError as `source_hash`.
    """
    times = [path.stat().st_mtime_ns for path in _source_files(source) if path.suffix in _WEIGHT_SUFFIXES]
    key = {
        "source": source_hash(source),
        "times": times,
        "options": options.model_dump(mode="json"),
        "calibration": calibration_hash if options.uses_text else "",
        "format": FORMAT_VERSION,
        "version": program_version(),
    }
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
    return cache_dir / f"{source.resolve().name}-spq-{digest[:20]}"


def program_version() -> str:
    """Version of the installed distribution; `clone` where it runs from a checkout without installation."""
    try:
        return metadata.version("spq-serve")
    except metadata.PackageNotFoundError:
        return "clone"


def _source_files(folder: Path) -> list[Path]:
    """Files that decide the result, by name."""
    suffixes = _WEIGHT_SUFFIXES + _TEXT_SUFFIXES
    files = sorted(path for path in folder.glob("*") if path.is_file() and path.suffix in suffixes)
    if not files:
        raise ModelFileError(f"{folder}: no model files; give a model folder in Hugging Face format")
    return files


def _update_sampled(digest: hashlib._Hash, path: Path) -> None:
    size = path.stat().st_size
    with path.open("rb") as file:
        for block in range(NUM_BLOCKS):
            file.seek(max(0, (size - BLOCK_BYTES) * block // (NUM_BLOCKS - 1)))
            digest.update(file.read(BLOCK_BYTES))
