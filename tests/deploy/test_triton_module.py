"""The cuda image's stand-in for a C compiler: Triton finds its one module, made without a GPU; all else is refused.

Not the module's work on a GPU: here its libcuda.so.1 is an empty one with the right names.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.deploy.recipe import ROOT

FIND = """
from triton.backends.nvidia.driver import CudaUtils
utils = CudaUtils()
print(callable(utils.launch), callable(utils.load_binary))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """/opt/triton of the image."""
    if shutil.which("gcc") is None or shutil.which("nm") is None:
        pytest.skip("no gcc, which the build stage installs")
    pytest.importorskip("triton")
    made: Path = tmp_path_factory.mktemp("image") / "triton"
    done = subprocess.run(
        [sys.executable, ROOT / "deploy" / "triton_module.py", made], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    shutil.copy(ROOT / "deploy" / "prebuilt_cc.sh", made / "cc")
    return made


def driver_of_names(module: Path, folder: Path) -> Path:
    """A libcuda.so.1 with an empty function for every name that `module` lacks."""
    listed = subprocess.run(["nm", "-D", "--undefined-only", module], capture_output=True, text=True, check=True).stdout
    names = re.findall(r" U (cu[A-Z]\w*)", listed)
    assert names
    source = folder / "libcuda.c"
    source.write_text("".join(f"int {name}(void) {{ return 0; }}\n" for name in names))
    command = ["gcc", "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", source, "-o", folder / "libcuda.so.1"]
    subprocess.run(command, check=True)
    return folder


def without_compiler(folder: Path, tmp_path: Path) -> dict[str, str]:
    """The image's variables, and a PATH with nothing but what its base has."""
    tools = tmp_path / "bin"
    tools.mkdir()
    for name in ("sh", "cmp", "cp", "dirname"):
        found = shutil.which(name)
        assert found, name
        (tools / name).symlink_to(found)
    return {
        "PATH": str(tools),
        "CC": str(folder / "cc"),
        "TRITON_LIBCUDA_PATH": "/usr/lib/x86_64-linux-gnu",
        "TRITON_CACHE_DIR": str(tmp_path / "cache"),
    }


def test_triton_gets_its_module_without_a_compiler(folder: Path, tmp_path: Path) -> None:
    environment = without_compiler(folder, tmp_path)
    environment["LD_LIBRARY_PATH"] = str(driver_of_names(folder / "cuda_utils.so", tmp_path))
    done = subprocess.run([sys.executable, "-c", FIND], env=environment, capture_output=True, text=True, check=False)
    assert done.stdout == "True True\n", done.stderr
    kept = list((tmp_path / "cache").rglob("cuda_utils*.so"))
    assert [path.read_bytes() for path in kept] == [(folder / "cuda_utils.so").read_bytes()]


def test_without_it_triton_asks_for_a_compiler(folder: Path, tmp_path: Path) -> None:
    # so that the test above shows something
    environment = without_compiler(folder, tmp_path)
    del environment["CC"]
    done = subprocess.run([sys.executable, "-c", FIND], env=environment, capture_output=True, text=True, check=False)
    assert "Failed to find C compiler" in done.stderr


def test_other_sources_are_refused(folder: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.c"
    other.write_text("int main(void) { return 0; }\n")
    command = [folder / "cc", other, "-O3", "-shared", "-o", tmp_path / "other.so"]
    done = subprocess.run(command, capture_output=True, text=True, env={"PATH": os.environ["PATH"]}, check=False)
    assert done.returncode == 1
    assert "no C compiler" in done.stderr
    assert not (tmp_path / "other.so").exists()
