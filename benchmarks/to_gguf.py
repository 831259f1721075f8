"""`python -m benchmarks.to_gguf`: our benchmark's model as GGUF, for llama.cpp.

llama.cpp's own converter does it, from its source tree. That refuses a tokenizer whose pre-tokenizer it has not seen
before, found by a hash of what the tokenizer does to a fixed text. Ours splits text as GPT-2's does and differs in its
merges, so the name `gpt-2` is right and is put in the place of the lookup; the weights are untouched.
"""

from __future__ import annotations

import argparse
import importlib
import runpy
import sys
from pathlib import Path


def convert(llama_cpp: Path, model: Path, out: Path, outtype: str) -> None:
    """Run the converter in this process. Raises what it raises, and SystemExit."""
    sys.path[:0] = [str(llama_cpp), str(llama_cpp / "gguf-py")]
    base = importlib.import_module("conversion.base")
    base.TextModel.get_vocab_base_pre = lambda self, tokenizer: "gpt-2"
    sys.argv = ["convert_hf_to_gguf.py", str(model), "--outtype", outtype, "--outfile", str(out)]
    runpy.run_path(str(llama_cpp / "convert_hf_to_gguf.py"), run_name="__main__")


def main() -> None:
    """Convert one model once."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.to_gguf", description=__doc__.split("\n")[0])
    parser.add_argument("--llama-cpp", type=Path, required=True, help="source tree of llama.cpp")
    parser.add_argument("--model", type=Path, required=True, help="folder that benchmarks.model wrote")
    parser.add_argument("--out", type=Path, required=True, help="file to write")
    parser.add_argument("--outtype", default="q8_0", choices=("f32", "f16", "bf16", "q8_0"), help="default: q8_0")
    arguments = parser.parse_args()
    convert(arguments.llama_cpp, arguments.model, arguments.out, arguments.outtype)


if __name__ == "__main__":
    main()
