from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from spq.cli import build_parser, main, options_of
from spq.config import SPQConfig
from spq.report import read_report


def test_end_to_end_in_a_process(make_model: Callable[..., Path], text: str, tmp_path: Path) -> None:
    (tmp_path / "text").write_text(text)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("SPQ_")}
    environment |= {"PYTHONPATH": str(Path(__file__).resolve().parents[2]), "SPQ_CALIBRATION_LEN": "16"}
    environment |= {"SPQ_MAX_PRUNE_RATIO": "0.9", "SPQ_CALIBRATION": str(tmp_path / "text")}
    command = [sys.executable, "-m", "spq.cli", str(make_model()), "-o", str(tmp_path / "out"), "--device", "cpu"]
    command += ["--calibration-windows", "4", "--max-prune-ratio", "0.2", "--evaluate", str(tmp_path / "text")]
    done = subprocess.run([*command, "--evaluate-window", "32"], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    report = read_report(tmp_path / "out")
    assert report.options.max_prune_ratio == 0.2  # the command line wins
    assert report.options.calibration_len == 16 and report.perplexity is not None
    assert f"{report.perplexity.after:.3f} (" in done.stdout and "of float16" in done.stdout


def test_existing_output_is_refused_at_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "config.json").write_text("{}")
    assert main(["nowhere", "-o", str(tmp_path / "out"), "--preset", "int8"]) == 2
    assert capsys.readouterr().err == (
        f"spq-compress: {tmp_path / 'out'}: exists already; choose another output folder, or replace it with "
        "--overwrite\n"
    )


def test_every_option_is_a_flag() -> None:
    parser = build_parser()
    for name, field in SPQConfig.model_fields.items():
        if name == "name":
            continue
        flag = "--" + name.replace("_", "-")
        arguments = parser.parse_args(["m", flag] + ([] if field.annotation is bool else ["1"]))
        assert getattr(arguments, name) is not None
    arguments = parser.parse_args(["m", "--preset", "paper", "--rank-multiple", "1", "--no-quantize"])
    assert options_of(arguments) == SPQConfig.preset("paper", quantize=False)
    assert options_of(parser.parse_args(["m", "--width-multiple", "auto"])) == SPQConfig()


@pytest.mark.parametrize(
    ("flags", "environment", "message"),
    [
        ([], {}, "no output folder; give one with -o"),
        (["-o", "x", "--preset", "tiny"], {}, "preset 'tiny' is none of"),
        (["-o", "x", "--seed", "one"], {}, "option seed: .*integer.*got 'one'"),
        (["-o", "x"], {"SPQ_SIGMA": "left"}, "option sigma: .*got 'left'"),
        (["-o", "x"], {"SPQ_QUANTIZE": "maybe"}, "SPQ_QUANTIZE='maybe' is neither true nor false"),
        (["-o", "x"], {"SPQ_EVALUATE_TOKENS": "many"}, "is not a number of tokens"),
        (["-o", "x", "--device", "tpu"], {}, "device 'tpu' is none of"),
        (["-o", "x", "--device", "cuda:99"], {}, "PyTorch sees . CUDA devices"),
        (["-o", "x", "--preset", "int8", "--calibration", "f"], {}, "nothing is calibrated"),
        (["-o", "x", "--preset", "int8", "--evaluate-window", "9"], {}, "--evaluate-window without a text"),
        (["-o", "x", "--calibration", "/no/file"], {}, "/no/file: not a readable"),
        (["-o", "x", "--preset", "int8"], {}, "nowhere: neither a folder nor a Hugging Face id"),
    ],
)
def test_mistakes_are_one_line(
    flags: list[str],
    environment: dict[str, str],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    monkeypatch.chdir(tmp_path)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert main(["nowhere", *flags]) == 2
    error = capsys.readouterr().err
    assert error.startswith("spq-compress: ") and error.count("\n") == 1
    assert re.search(message, error), error


def test_help_says_units_and_defaults(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    for part in ("(default: 0.96)", "tokens per window", "(default: auto)", "SPQ_MAX_PRUNE_RATIO", "calibration:"):
        assert part in text
