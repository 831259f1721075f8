"""`python -m spq.recode IN OUT --codec zstd`: the same packed model with its integers coded, or raw again, bit for bit.

Not a compression (`compress`): no number of the model changes. A matrix whose integers coding would not shrink by
`entropy.MIN_SAVING` stays raw. The folder is made under a temporary name and renamed when it is whole.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

import torch
from torch import Tensor
from tqdm import tqdm

from spq.checkpoint import Checkpoint, open_model, read_config
from spq.entropy import MIN_SAVING, encode
from spq.errors import OutputError, SpqError, UnsupportedModelError
from spq.layout import model_vectors, module_has_bias
from spq.manifest import REPORT_NAME, Codec, ModulePlan
from spq.output import MAX_SHARD_BYTES, put_in_place, refuse_existing, remove_orphans
from spq.report import read_report
from spq.writer import TensorWriter, copy_companions


@dataclass(slots=True)
class Recoded:
    """What became of a folder."""

    bytes_raw: int = 0  # integers without a codec
    bytes_stored: int = 0  # the same as they are written, tables of blocks included
    matrices: int = 0
    coded: int = 0  # matrices that are coded


def recode(
    source: Path,
    out: Path,
    codec: Codec,
    *,
    overwrite: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Recoded:
    """Write the packed folder `source` to `out` with its integers in `codec`; one matrix is held at a time.

    `progress(matrices done, matrices)` is called after each. Works on as many threads as torch has. Raises SpqError:
    a folder that is not packed or is damaged, an `out` that exists (unless `overwrite`) or cannot be written.
    """
    refuse_existing(out, overwrite)
    checkpoint = open_model(source)
    if checkpoint.manifest is None:
        raise UnsupportedModelError(f"{source}: not packed; compress it first")
    remove_orphans(out)
    temporary = out.parent / f".{out.name}.{os.getpid()}.tmp"
    try:
        temporary.mkdir(parents=True)
        writer = TensorWriter(temporary, MAX_SHARD_BYTES)
        done = Recoded()
        plans: dict[str, ModulePlan] = {}
        for number, (module, plan) in enumerate(checkpoint.manifest.modules.items(), start=1):
            plans[module] = _recode_matrix(checkpoint, writer, module, plan, codec, done)
            if progress is not None:
                progress(number, len(checkpoint.manifest.modules))
        for name in model_vectors(checkpoint.spec):
            writer.add(name, checkpoint.vector(name))
        bytes_files = writer.finish()
        copy_companions(source, temporary)
        if (source / REPORT_NAME).is_file():
            sizes = {"bytes_packed": writer.tensor_bytes, "bytes_files": bytes_files}
            read_report(source).model_copy(update=sizes).save(temporary)
        manifest = checkpoint.manifest.model_copy(update={"format_version": 2, "modules": plans})
        config = read_config(source) | {"quantization_config": manifest.dump()}
        (temporary / "config.json").write_text(json.dumps(config, indent=1) + "\n", "utf-8")
        put_in_place(temporary, out, overwrite)
    except OSError as error:
        raise OutputError(f"{out}: cannot be written ({error})") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return done


def _recode_matrix(
    checkpoint: Checkpoint, writer: TensorWriter, module: str, plan: ModulePlan, codec: Codec, done: Recoded
) -> ModulePlan:
    """Write the tensors of one matrix and return how it is stored now."""
    raw = plan.model_copy(update={"codec": "raw"})
    integers = {name: checkpoint.vector(name) for name in raw.integers(module)}
    size = sum(tensor.nbytes for tensor in integers.values())
    stored: dict[str, Tensor] = dict(integers)
    if codec == "zstd" and integers:
        coded = {name: encode(tensor, torch.get_num_threads()) for name, tensor in integers.items()}
        if sum(tensor.nbytes for tensor in coded.values()) <= (1 - MIN_SAVING) * size:
            stored = {f"{name}.zstd": tensor.data for name, tensor in coded.items()}
            stored |= {f"{name}.blocks": tensor.offsets for name, tensor in coded.items()}
    others = raw.tensors(module, module_has_bias(checkpoint.spec, module)).keys() - integers.keys()
    for name, tensor in sorted(stored.items()):
        writer.add(name, tensor)
    for name in sorted(others):
        writer.add(name, checkpoint.vector(name))
    is_coded = stored.keys() != integers.keys()
    done.matrices += 1
    done.coded += is_coded
    done.bytes_raw += size
    done.bytes_stored += sum(tensor.nbytes for tensor in stored.values())
    return raw.model_copy(update={"codec": "zstd"}) if is_coded else raw


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point. Ends with 2 and one line where the folder cannot be recoded."""
    parser = argparse.ArgumentParser(prog="python -m spq.recode", description=__doc__.split("\n")[0])
    parser.add_argument("source", type=Path, help="packed folder")
    parser.add_argument("out", type=Path, help="folder to write")
    parser.add_argument("--codec", choices=get_args(Codec), default="zstd", help="how integers are stored")
    parser.add_argument("--overwrite", action="store_true", help="replace the model in OUT")
    options = parser.parse_args(arguments)
    with tqdm(total=1, unit="matrix", disable=not sys.stderr.isatty()) as bar:

        def show(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        try:
            result = recode(options.source, options.out, options.codec, overwrite=options.overwrite, progress=show)
        except SpqError as error:
            bar.close()
            print(f"spq.recode: {error}", file=sys.stderr)
            sys.exit(2)
    share = result.bytes_stored / max(1, result.bytes_raw)
    print(
        f"{options.out}: {result.coded} of {result.matrices} matrices coded, integers {result.bytes_raw} -> "
        f"{result.bytes_stored} bytes ({100 * share:.1f} %)"
    )


if __name__ == "__main__":
    main()
