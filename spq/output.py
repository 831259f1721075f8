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
    """Delete what runs for the same `out` left whose process is gone: killed ones cannot do it.

    A model that a run had moved aside, and was killed before its own took the place, is put back. In a container a
    later run may have the number of the killed one: what carries our own number before we made it is an orphan too.
    """
    for folder in [path for kind in ("old", "tmp") for path in out.parent.glob(f".{glob.escape(out.name)}.*.{kind}")]:
        process = folder.name.split(".")[-2]
        if not process.isdecimal() or (int(process) != os.getpid() and Path(f"/proc/{process}").exists()):
            continue
        if folder.suffix == ".old" and not out.exists():
            os.replace(folder, out)
        else:
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
