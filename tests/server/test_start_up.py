"""What a server imports on its way to ready; in a process of its own, because these tests import all of it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import torch
from models import REPOSITORY, random_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from spq.compress import compress
from spq.config import SPQConfig

PROGRAM = """
import sys
from server.config import ServerConfig
from server.startup import start_up
config = ServerConfig(model=sys.argv[1], device="cpu", threads=1, max_model_len=64, kv_memory=2**20)
engine, _ = start_up(config, lambda *report: None, on_step=lambda *times: None)
heavy = ("torch._dynamo", "torch._inductor", "triton", "sympy", "transformers.modeling_utils", "spq.compress")
print(engine.info.max_model_len, [name for name in heavy if name in sys.modules])
"""


def test_a_packed_llama_is_served_without_compilers_and_model_classes(tmp_path: Path) -> None:
    source, packed = tmp_path / "source", tmp_path / "packed"
    random_model("llama").save_pretrained(source)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=backend).save_pretrained(source)
    compress(source, packed, SPQConfig.preset("int8"), calibration_text="", device=torch.device("cpu"))
    command = [sys.executable, "-c", PROGRAM, str(packed)]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "64 []"
