"""Flags, variables and their messages; what is refused before the port opens."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from models import REPOSITORY, random_model

from server.cli import OPTIONS, main, read_config
from server.config import ServerConfig


def test_every_field_has_a_flag_and_a_variable() -> None:
    fields = {option.name for group in OPTIONS.values() for option in group}
    assert fields == set(ServerConfig.model_fields)


def test_a_flag_wins_over_its_variable() -> None:
    environment = {"SPQ_MODEL": "a", "SPQ_PORT": "9000", "SPQ_MEMORY_BUDGET": "6GiB", "SPQ_API_KEY": "x, y"}
    config = read_config(["--port", "9001", "--served-model-name", "one", "--served-model-name", "two"], environment)
    assert (config.model, config.port, config.memory_budget) == ("a", 9001, 6 * 1024**3)
    assert config.api_keys == ("x", "y")
    assert config.served_model_names == ("one", "two")


def test_an_empty_variable_is_no_choice() -> None:
    assert read_config(["--model", "m"], {"SPQ_PORT": ""}).port == 8000


@pytest.mark.parametrize(
    ("arguments", "environment", "message"),
    [
        ([], {}, "--model (or SPQ_MODEL) is missing"),
        (["--model", "m", "--port", "many"], {}, "--port: invalid literal"),
        (["--model", "m"], {"SPQ_PORT": "99999"}, "--port: Input should be less than or equal to 65535, got 99999"),
        (["--model", "m"], {"SPQ_MEMORY_BUDGET": "lots"}, "SPQ_MEMORY_BUDGET: 'lots' is not a size"),
        (["--model", "m", "--prefix-caching", "maybe"], {}, "neither on nor off"),
        (["--model", "m", "--colour", "red"], {}, "unrecognized arguments: --colour"),
        (["--model", "m"], {"SPQ_DEVICE": "tpu"}, "--device: Input should be 'auto', 'cuda' or 'cpu', got 'tpu'"),
        (["--model", "m", "--max-batch-tokens", "64"], {}, "--max-batch-tokens 64 must exceed --max-num-seqs 64"),
        (["--model", "m", "--resident-tolerance", "0.5"], {}, "--resident-tolerance is about --resident coded"),
    ],
)
def test_wrong_options_end_with_one_line(
    arguments: list[str], environment: dict[str, str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        read_config(arguments, environment)
    assert caught.value.code == 2
    assert message in capsys.readouterr().err


def test_help_names_groups_units_and_defaults(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        read_config(["--help"], {})
    text = re.sub(r"\s+", " ", capsys.readouterr().out)
    for part in (
        "device and memory:",
        "--memory-budget",
        "e.g. 6GiB",
        "(default: 8000)",
        "seconds",
        "SPQ_MAX_MODEL_LEN",
    ):
        assert part in text


def refused(folder: Path, caplog: pytest.LogCaptureFixture) -> str:
    """What the log says when the process is started on a folder that cannot be served."""
    with pytest.raises(SystemExit) as caught:
        main(["--model", str(folder), "--port", "0", "--device", "cpu"])
    assert caught.value.code == 1
    [record] = [r for r in caplog.records if r.levelname == "ERROR"]
    assert record.exc_info is None
    return record.getMessage()


def test_another_architecture_is_refused_by_name(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    message = refused(tmp_path, caplog)
    assert "GPT2LMHeadModel" in message and "LlamaForCausalLM" in message


def test_an_empty_folder_is_refused(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert "no config.json" in refused(tmp_path, caplog)


def test_a_truncated_file_is_refused_by_name(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    random_model("llama").save_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    assert "model.safetensors" in refused(tmp_path, caplog)


def test_the_command_line_starts_without_torch() -> None:
    """What has to be imported before the port opens; torch and transformers take seconds."""
    code = "import sys, server.cli; print(sorted({'torch', 'transformers', 'triton'} & set(sys.modules)))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=REPOSITORY, check=True)
    assert found.stdout.strip() == "[]"
