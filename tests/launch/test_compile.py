"""launch/compile.py as a user runs it: a small model for four TPU chips, on a machine that has none."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from pangea_jax.train import hlo

ROOT = Path(__file__).parents[2]
# The sample model with a decoder wide enough for the TPU's kernel, and a tower that trains.
SMALL = (
    "--config=configs/sample.py",
    "--topology=v5e:2x2",
    "--config.model.dtype=bfloat16",
    "--config.model.language.tied_head=False",
    "--config.model.language.head_width=128",
    "--config.augmented_views=0",
    "--config.pipeline.rows=8",
    "--config.remat=nothing",
)


def run(*flags):
    environment = os.environ | {"JAX_ENABLE_COMPILATION_CACHE": "0"}
    command = (sys.executable, "launch/compile.py", *flags)
    return subprocess.run(command, cwd=ROOT, env=environment, text=True, capture_output=True)


needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None,
    reason="the TPU compiler is in libtpu: pip install -r requirements-tpu-aot.txt",
)


@needs_libtpu
def test_a_small_step_compiles_and_fits():
    done = run("--json", *SMALL)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout)
    assert (found["topology"], found["chips"], found["mesh"]["fsdp"]) == ("v5e:2x2", 4, 4)
    assert found["fits"] and 0 < found["peak_hbm_gib"] < 1 < found["hbm_gib"]
    assert found["rows_per_shard"] == 2 and found["compile_s"] > 0
    parts = found["model_flops"]
    total = parts.pop("total")
    assert found["model_flops_per_step"] == total == pytest.approx(sum(parts.values()))
    assert all(parts.values())
    # Every parameter is gathered in bfloat16 for the forward pass and again for the backward pass.
    assert found["collective_bytes"]["all-gather"] > 0


# What docs/tpu_memory.md says of two of its lines: GiB that a chip sends and receives in a step.
COLLECTIVES_GIB = {
    ("pangea_7b_finetune", "v5e:4x4", 16): 65.4,
    ("pangea_7b_pretrain", "v5p:4x4x4", 64): 27.5,
}


@needs_libtpu
@pytest.mark.slow
@pytest.mark.parametrize(("config", "topology", "rows"), COLLECTIVES_GIB)
def test_the_7b_still_fits_and_sends_no_more(config, topology, rows):
    done = run(
        "--json",
        f"--config=configs/{config}.py",
        f"--topology={topology}",
        f"--config.pipeline.rows={rows}",
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout)
    assert found["fits"], (found["peak_hbm_gib"], found["hbm_gib"])
    sent = sum(found["collective_bytes"].values()) / 2**30
    assert sent < 1.1 * COLLECTIVES_GIB[config, topology, rows]


@needs_libtpu
def test_what_cannot_be_compiled_is_one_sentence():
    done = run("--topology=v5e:7x7x7", *SMALL[:1])
    assert done.returncode == 1 and "error: --topology=v5e:7x7x7: libtpu says" in done.stderr


def test_an_unknown_generation_is_named():
    done = run("--topology=v2:2x2")
    assert done.returncode == 1
    assert "error: --topology=v2:2x2: the generation is one of v5e, v5p, v6e" in done.stderr


@needs_libtpu
def test_what_does_not_fit_is_measured_all_the_same():
    """100,000 rows a chip: one array of activations is 3.6 GiB."""
    done = run("--json", *SMALL, "--config.pipeline.rows=400000")
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout)
    assert not found["fits"] and found["peak_hbm_gib"] > found["hbm_gib"]
    assert found["collective_bytes"] is None


PROGRAM = """\
HloModule step

%body (carry: (s32[], f32[4,8])) -> (s32[], f32[4,8]) {
  %carry = (s32[], f32[4,8]{1,0:T(8,128)}) parameter(0)
  %one = s32[] constant(1)
  %i = s32[] get-tuple-element(%carry), index=0
  %next = s32[] add(%i, %one)
  %x = f32[4,8]{1,0} get-tuple-element(%carry), index=1
  %whole = f32[16,8]{1,0} all-gather(%x), dimensions={0}
  %start = (f32[4,8]{1,0}, f32[4,8]{1,0}, u32[]) collective-permute-start(%x), channel_id=1
  %moved = f32[4,8]{1,0} collective-permute-done(%start)
  ROOT %out = (s32[], f32[4,8]{1,0}) tuple(%next, %moved)
}

%condition (carry.1: (s32[], f32[4,8])) -> pred[] {
  %carry.1 = (s32[], f32[4,8]{1,0}) parameter(0)
  %end = s32[] constant(28)
  %i.1 = s32[] get-tuple-element(%carry.1), index=0
  ROOT %less = pred[] compare(%i.1, %end), direction=LT
}

ENTRY %main (p: f32[4,8], q: bf16[64]) -> f32[4,8] {
  %p = f32[4,8]{1,0} parameter(0)
  %q = bf16[64]{0} parameter(1)
  %sums = bf16[16]{0} reduce-scatter(%q), dimensions={0}, to_apply=%add
  %start.1 = (s32[], f32[4,8]{1,0}) tuple(%zero, %p)
  %loop = (s32[], f32[4,8]{1,0}) while(%start.1), condition=%condition, body=%body
  ROOT %r = f32[4,8]{1,0} get-tuple-element(%loop), index=1
}
"""


def test_collectives_by_hand():
    """In a loop of 28 turns: 16 x 8 floats gathered and 4 x 8 passed on; 64 halves to be scattered."""
    assert hlo.collective_bytes(PROGRAM) == {
        "all-gather": 28 * 16 * 8 * 4,
        "collective-permute": 28 * 4 * 8 * 4,
        "reduce-scatter": 64 * 2,
    }


def test_a_collective_spread_over_two_instructions_counts_once():
    gather = "%whole = f32[16,8]{1,0} all-gather(%x), dimensions={0}"
    again = gather.replace("whole", "again")
    assert gather in PROGRAM
    one, two = (
        PROGRAM.replace(gather, "\n  ".join(lines))
        for lines in (
            (f"{gather}, channel_id=7", f"{again}, channel_id=7"),
            (f"{gather}, channel_id=7", f"{again}, channel_id=8"),
        )
    )
    assert hlo.collective_bytes(one) == hlo.collective_bytes(PROGRAM)
    assert hlo.collective_bytes(two)["all-gather"] == 2 * 28 * 16 * 8 * 4


def test_every_second_number_counts_once():
    """Loops that XLA makes of a product take two steps a turn."""
    text = PROGRAM.replace("%one = s32[] constant(1)", "%one = s32[] constant(2)")
    assert hlo.collective_bytes(text)["all-gather"] == 14 * 16 * 8 * 4


def test_a_loop_of_unknown_length_is_an_error():
    text = PROGRAM.replace("direction=LT", "direction=NE")
    with pytest.raises(ValueError, match="loop loop communicates an unknown number of times"):
        hlo.collective_bytes(text)
