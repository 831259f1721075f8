from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from spq.cache import packed_path, source_hash
from spq.config import SPQConfig
from spq.errors import ModelFileError


def test_path_depends_on_content_options_and_text(make_model: Callable[..., Path], tmp_path: Path) -> None:
    source, cache = make_model(), tmp_path / "cache"
    options = SPQConfig.preset("default")
    base = packed_path(cache, source, options, "text")
    assert base.parent == cache and base == packed_path(cache, source, options, "text")
    seen = {base, packed_path(cache, source, options, "other")}
    seen.add(packed_path(cache, source, SPQConfig.preset("default", seed=1), "text"))
    weights = source / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1  # in the last sampled block
    weights.write_bytes(data)
    seen.add(packed_path(cache, source, options, "text"))
    (source / "tokenizer_config.json").write_text("{}")
    seen.add(packed_path(cache, source, options, "text"))
    os.utime(weights, ns=(1, 1))
    seen.add(packed_path(cache, source, options, "text"))
    assert len(seen) == 6


def test_text_does_not_matter_where_nothing_is_calibrated(make_model: Callable[..., Path], tmp_path: Path) -> None:
    source, options = make_model(), SPQConfig.preset("int8")
    assert packed_path(tmp_path, source, options, "a") == packed_path(tmp_path, source, options, "b")


def test_a_copy_has_the_same_source_hash(make_model: Callable[..., Path], tmp_path: Path) -> None:
    source = make_model()
    copy = tmp_path / "copy"
    shutil.copytree(source, copy)
    os.utime(copy / "model.safetensors", ns=(5, 5))
    assert source_hash(copy) == source_hash(source)


def test_empty_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelFileError, match="no model files"):
        source_hash(tmp_path)
