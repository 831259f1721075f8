"""From what `--model` names to a folder that can be loaded: found, downloaded, or compressed once and cached.

Not a loader. A folder is served as it is when it is packed, or plain with `--preset none`; any other model is
compressed into the cache under a path made of its content, so the second start finds it.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import torch

from server.config import ServerConfig
from spq.cache import packed_path
from spq.calibrate import bundled_calibration, read_text, text_hash
from spq.checkpoint import open_model
from spq.config import SPQConfig
from spq.errors import OptionError, OutputError, SpqError
from spq.hub import find_model
from spq.progress import Progress
from spq.sizes import format_bytes

logger = logging.getLogger(__name__)

Report = Callable[[Literal["downloading", "compressing"], float, str, float | None], None]


def prepare_folder(config: ServerConfig, device: torch.device, report: Report) -> Path:
    """The folder to load. Compresses where needed and not done before. Raises SpqError."""
    if not Path(config.model).expanduser().is_dir():
        report("downloading", 0.0, config.model, None)
    folder = find_model(config.model, config.revision)
    source = open_model(folder)
    packed, layers = source.manifest is not None, source.spec.num_layers
    source.close()
    if packed and config.weight_budget is not None:
        raise OptionError(f"{folder}: already packed, --weight-budget {config.weight_budget} has no use; leave it out")
    if packed or (config.preset == "none" and config.weight_budget is None):
        return folder
    if config.weight_budget is None:
        options = SPQConfig.preset(config.preset)
    else:
        options = SPQConfig.preset("budget", budget=config.weight_budget)
    text = ""
    if options.uses_text:
        text = read_text(bundled_calibration() if config.calibration is None else Path(config.calibration))
    from spq.compress import compress  # brings what a packed folder is served without

    target = packed_path(config.cache_dir.expanduser(), folder, options, text_hash(text))
    if _usable(target):
        logger.info("already compressed: %s", target)
        return target

    def show(progress: Progress) -> None:
        detail = f"{progress.stage}, layer {progress.layer + 1} of {layers}"
        report("compressing", progress.done, detail, progress.eta_s)

    report("compressing", 0.0, "", None)
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        result = compress(folder, target, options, calibration_text=text, device=device, progress=show)
    except OutputError:
        if _usable(target):  # another server with the same cache was faster
            return target
        raise
    logger.info(
        "compressed to %s, %.0f %% of float16, %d factor pairs, %d neurons pruned, peak %s resident: %s",
        format_bytes(result.bytes_packed),
        100 * result.ratio,
        result.num_low_rank,
        result.num_pruned_neurons,
        format_bytes(result.peak_rss_bytes),
        target,
    )
    return target


def _usable(folder: Path) -> bool:
    """Whether a cached folder is whole; a damaged one is made again."""
    if not folder.is_dir():
        return False
    try:
        open_model(folder).close()
    except SpqError as error:
        logger.warning("cached model is damaged and is made again: %s", error)
        shutil.rmtree(folder, ignore_errors=True)
        return False
    return True
