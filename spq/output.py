"""Where a made folder goes: refused if something is there, put in place by a rename, left-overs of killed runs removed.

Not what is in it (`run`, `recode`).
"""

from __future__ import annotations

import glob
import os
import shutil
from pathlib import Path

from spq.errors import OutputError

MAX_SHARD_BYTES = 1 << 30


def refuse_existing(out: Path, overwrite: bool) -> None:
    """Raises OutputError where `out` is there and may not be replaced, or is no model folder."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    if not overwrite:
        raise OutputError(f"{out}: exists already; choose another output folder, or replace it with --overwrite")
    if not (out / "config.json").is_file():
        raise OutputError(f"{out}: is no model folder (no config.json), so it is not overwritten; remove it yourself")


def remove_orphans(out: Path) -> None:
    """Delete the temporary folders of runs for the same `out` whose process is gone: killed ones cannot do it."""
    for folder in out.parent.glob(f".{glob.escape(out.name)}.*.tmp"):
        process = folder.name.split(".")[-2]
        if process.isdecimal() and not Path(f"/proc/{process}").exists():
            shutil.rmtree(folder, ignore_errors=True)


def put_in_place(temporary: Path, out: Path, overwrite: bool) -> None:
    """Put the finished folder in place. Raises OutputError where another run was faster."""
    old = out.parent / f".{out.name}.{os.getpid()}.old"
    try:
        if overwrite and out.exists():
            os.replace(out, old)
        os.replace(temporary, out)
    except OSError as error:
        raise OutputError(f"{out}: cannot be put in place ({error}); it may have appeared during the run") from error
    finally:
        shutil.rmtree(old, ignore_errors=True)
