from __future__ import annotations

import pytest
from pydantic import ValidationError

from spq.config import SPQConfig
from spq.errors import OptionError
from spq.tiles import round_up, tile_multiple


def test_presets_differ_where_they_should() -> None:
    default, paper, int8 = (SPQConfig.preset(name) for name in ("default", "paper", "int8"))
    assert (default.variance_threshold, default.max_prune_ratio, default.granularity) == (0.96, 0.05, "channel")
    assert default.sigma == "down" and default.quantize_embedding and default.min_saving == 0.10
    assert paper.sigma == "up" and paper.granularity == "mix_name" and not paper.quantize_embedding
    assert (paper.calibration_windows, paper.calibration_len, paper.rank_multiple) == (8, 128, 1)
    assert not int8.uses_svd and not int8.uses_pruning and int8.quantize


def test_options_survive_json() -> None:
    paper = SPQConfig.preset("paper", seed=7)
    assert SPQConfig.model_validate_json(paper.model_dump_json()) == paper


def test_options_are_frozen_and_closed() -> None:
    with pytest.raises(ValidationError):
        SPQConfig().seed = 1  # type: ignore[misc]
    with pytest.raises(ValidationError, match="levels"):
        SPQConfig(levels=4)  # type: ignore[call-arg]


@pytest.mark.parametrize(
    ("name", "overrides", "message"),
    [
        ("best", {}, "preset 'best' is none of default, paper, int8"),
        ("default", {"max_prune_ratio": 1.0}, "option max_prune_ratio: .*less than 1.*got 1.0"),
        ("default", {"granularity": "row"}, "option granularity: .*'mix_percentile'"),
        ("default", {"min_prune_ratio": 0.2}, "0.2 is above max_prune_ratio 0.05"),
        ("paper", {"min_saving": 0.2}, "rank_rule released has its own test"),
        ("int8", {"quantize": False, "quantize_embedding": True}, "quantize_embedding without quantize"),
    ],
)
def test_bad_options_are_named(name: str, overrides: dict[str, object], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        SPQConfig.preset(name, **overrides)


def test_no_quantize_takes_the_embedding_along() -> None:
    assert not SPQConfig.preset("default", quantize=False).quantize_embedding


@pytest.mark.parametrize(("dim", "tile"), [(8, 8), (511, 8), (512, 16), (1024, 32), (2048, 64), (11008, 64)])
def test_auto_tile_is_at_most_a_32nd(dim: int, tile: int) -> None:
    assert tile_multiple(dim, None) == tile
    assert tile_multiple(dim, 5) == 5


def test_round_up_stops_at_the_limit() -> None:
    assert [round_up(value, 16, 172) for value in (1, 16, 17, 170)] == [16, 16, 32, 172]


@pytest.mark.parametrize("bits", [None, [], 3, "3", "x", 4.5])
def test_other_bits_are_no_crash(bits: object) -> None:
    assert SPQConfig.model_validate({"bits": "4"}).bits == 4
    with pytest.raises(ValidationError):
        SPQConfig.model_validate({"bits": bits})
