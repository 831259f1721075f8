"""`python triton_module.py FOLDER`: the C module of Triton's CUDA driver, compiled where there is no GPU.

Not a kernel: kernels are made by Triton's own assembler while the server runs. Triton 3.7 asks a C compiler for exactly
one thing, the module `cuda_utils` (it starts every kernel), when it first sees a GPU. Compiled when the image is
built, it spares the image a compiler; `prebuilt_cc.sh` hands it out. It is linked against an empty libcuda.so.1, since
the real one comes with the driver of the machine that the container runs on.
"""

from __future__ import annotations

import argparse
import subprocess
import tempfile
from pathlib import Path

from triton.backends.nvidia import driver
from triton.runtime.build import _build

NAME = "cuda_utils"


def compile_module(folder: Path) -> None:
    """Write `cuda_utils.c`, as Triton will hand it to its compiler, and `cuda_utils.so` into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    source = folder / f"{NAME}.c"
    source.write_text((Path(driver.__file__).parent / "driver.c").read_text())
    with tempfile.TemporaryDirectory() as stub:
        soname = driver.libraries[0]
        command = ["gcc", "-shared", f"-Wl,-soname,{soname}", "-x", "c", "/dev/null", "-o", f"{stub}/{soname}"]
        subprocess.run(command, check=True)
        # linkers that drop libraries without a name in use would drop the empty one
        keep = ["-Wl,--no-as-needed", f"-l:{soname}"]
        built = _build(NAME, str(source), stub, [driver.libdevice_dir, stub], driver.include_dirs, [], ccflags=keep)
        (folder / f"{NAME}.so").write_bytes(Path(built).read_bytes())


def main() -> None:
    """Compile."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path)
    compile_module(parser.parse_args().folder)


if __name__ == "__main__":
    main()
