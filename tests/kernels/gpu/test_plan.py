"""What the tile tables give a decode step: launches, programs, splits that fit the kernels' assumptions."""

import pytest
import torch

from kernels.gpu import plan
from kernels.gpu.configs import DECODE_ROWS, MULTIPROCESSORS, ROW_BUCKETS, int4_block_k, kernel_name, tile_config

SMALL = {"attention over the cache"}  # a program per head and 256 tokens; not a question of tiles


@pytest.mark.parametrize("shape", [plan.LLAMA_2_7B, plan.LLAMA_3_8B], ids=lambda shape: shape.name)
@pytest.mark.parametrize("low_rank", [False, True])
@pytest.mark.parametrize("arch", MULTIPROCESSORS)
@pytest.mark.parametrize("rows", ROW_BUCKETS)
def test_every_multiprocessor_has_work_at_every_batch_size(shape, low_rank, arch, rows):
    launches = list(plan.layer_launches(shape, low_rank, rows, arch, torch.bfloat16))
    assert len(launches) == (7 if low_rank else 5)
    few = {x.name: x.programs for x in launches if x.programs < MULTIPROCESSORS[arch] and x.name not in SMALL}
    assert not few


def test_bytes_are_those_of_the_matrices():
    launches = {x.name: x for x in plan.layer_launches(plan.LLAMA_2_7B, False, 1, 90, torch.bfloat16)}
    assert launches["heads of q, k, v + cache"].weight_bytes == 3 * 4096 * (4096 + 4)
    assert launches["down + residual"].weight_bytes == 4096 * (11008 + 4)
    assert launches["gate, up, SiLU"].weight_bytes == 2 * 11008 * (4096 + 4)


@pytest.mark.parametrize("kernel", ["linear", "normed", "heads", "gate_up"])
@pytest.mark.parametrize("group", [0, 128, 16])
@pytest.mark.parametrize("arch", MULTIPROCESSORS)
def test_tiles_divide_what_they_must(kernel, group, arch):
    for rows in (*ROW_BUCKETS, DECODE_ROWS + 1):
        if rows > DECODE_ROWS and kernel in ("normed", "heads"):
            continue
        for n, k in ((4096, 128), (128, 4096), (1024, 384), (152064, 3584), (4096, 10496)):
            block_k = int4_block_k(group) if group else None
            tile = tile_config(kernel_name(kernel, group), rows, n, k, torch.float16, arch, block_k)
            assert tile.block_k == (block_k or tile.block_k)
            assert k % tile.block_k == 0  # the inner loop has no mask on padded K
            assert (tile.split_k - 1) * tile.block_k < k
            assert kernel != "gate_up" or n % tile.block_n == 0


@pytest.mark.parametrize("k", [32, 64])
@pytest.mark.parametrize("rows", [1, 64, 65])
def test_the_second_factor_of_a_small_correction_is_one_step(k, rows):
    for arch in (*MULTIPROCESSORS, 0):
        tile = tile_config("linear", rows, 4096, k, torch.float16, arch)
        assert tile.block_k == k and tile.split_k == 1


def test_a_measured_tile_replaces_the_general_one(monkeypatch):
    tile = tile_config("linear", 16, 4096, 4096, torch.float16, 80)
    monkeypatch.setitem(plan.tile_config.__globals__["MEASURED"], ("linear", 90, 4, 4096, 4096), tile)
    assert tile_config("linear", 2, 4096, 4096, torch.float16, 90) is tile
    assert tile_config("linear", 2, 4096, 4096, torch.float16, 89) is not tile
    assert tile_config("linear", 5, 4096, 4096, torch.float16, 90) is not tile


def test_the_command_prints_all_tables(capsys):
    assert plan.main(["--rows", "1,64"]) == 0
    printed = capsys.readouterr().out
    assert printed.count("launches a layer") == 4
    assert "Llama-3-8B, low rank, sm_90: 7 launches" in printed
