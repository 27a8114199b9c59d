"""launch/compile.py as a user runs it: a small model for four TPU chips, on a machine without TPUs."""

import importlib.util
import json
import zipfile
from pathlib import Path

import pytest

from pangea_jax.train import hlo
from tests.launch.conftest import call

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
    "--config.keep=none",
)


def run(*flags):
    return call("launch/compile.py", *flags)


needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None,
    reason="the TPU compiler is in libtpu: pip install -r requirements-tpu-aot.txt",
)


@needs_libtpu
def test_a_small_step_compiles_and_fits(tmp_path):
    file = tmp_path / "step.zip"
    done = run("--json", *SMALL, "--steps=7", f"--output={file}")
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout)
    assert (found["topology"], found["chips"], found["mesh"]["fsdp"]) == ("v5e:2x2", 4, 4)
    assert found["fits"] and 0 < found["peak_hbm_gib"] < 1 < found["hbm_gib"]
    assert found["rows_per_shard"] == 2 and found["compile_s"] > 0
    estimate = found["estimate"]
    assert estimate["step_s"] == pytest.approx(estimate["work_s"] + estimate["wait_s"])
    # A chip computes its share of the model's FLOPs, and again what is not kept.
    assert 0.9 < estimate["flops"] * 4 / found["model_flops_per_step"] < 1.5
    parts = found["model_flops"]
    total = parts.pop("total")
    assert found["model_flops_per_step"] == total == pytest.approx(sum(parts.values()))
    assert all(parts.values())
    # Every parameter is gathered in bfloat16 for the forward pass and again for the backward pass.
    assert found["collective_bytes"]["all-gather"] > 0
    with zipfile.ZipFile(file) as program:
        facts = json.loads(program.read("facts.json"))
        assert program.getinfo("program").file_size > 100_000
    assert facts["devices"]["kind"] == "TPU v5 lite" and facts["devices"]["grid"] == [1, 2, 2, 1, 1]
    assert facts["config"]["steps"] == 7 and facts["versions"].keys() == {"jax", "jaxlib", "libtpu"}


@needs_libtpu
def test_two_slices_send_gradients_over_the_data_centre_network():
    done = run("--json", *SMALL, "--slices=2", "--config.mesh.data=2")
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout)
    assert (found["slices"], found["chips"], found["mesh"]["data"]) == (2, 8, 2)
    assert found["fits"] and found["rows_per_shard"] == 1
    # Only gradients, and each chip sends its quarter. That is less than the parameters that it gathers within a slice.
    alone = json.loads(run("--json", *SMALL, "--config.pipeline.rows=4").stdout)
    assert alone["dcn_bytes"] == {} and found["dcn_bytes"].keys() == {"all-reduce"}
    assert 0 < found["dcn_bytes"]["all-reduce"] < alone["collective_bytes"]["all-gather"]


@needs_libtpu
def test_parameters_do_not_lie_over_slices():
    done = run(*SMALL, "--slices=2")
    assert done.returncode == 1
    assert "error: mesh {'data': 1, 'fsdp': 8, 'tensor': 1}: the devices are 2 TPU" in done.stderr


def test_the_programs_of_answering_are_compiled_on_the_mesh_of_a_host():
    """The model is so small that each of 8 devices gets a copy."""
    sizes = ("--rows=8", "--tokens=64", "--tiles=1", "--new_tokens=8")
    config = "--config=tests/launch/tiny.py"
    done = run("--json", "--program=generate", "--topology=cpu:8", config, *sizes)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout)
    assert found["mesh"] == {"data": 8, "fsdp": 1, "tensor": 1} and found["fits"]
    assert found["peak_hbm_gib"].keys() == {"prefill", "insert", "decode"}
    assert found["counted_gib"].keys() == {"weights", "caches", "reading"}
    done = run("--program=generate", "--topology=cpu:8", "--search", config)
    assert done.returncode == 1 and "error: --program=generate excludes --search" in done.stderr


# From two lines of docs/tpu_memory.md: the GiB that a chip sends and receives in a step.
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
    assert "error: --topology=v2:2x2: expected one of v5e, v5p, v6e" in done.stderr


SEARCH = """
import json, sys
from launch import compile
from pangea_jax.typed_config import build
from pangea_jax.experiment import Experiment
from tests.launch import tiny

def search(limit, kept, takes, sends):
    tried = []
    def measure(config, topology, slices):
        tried.append((config.pipeline.rows // 8, config.keep))
        rows, keep = tried[-1]
        needed = rows * kept[keep]
        return dict(topology=topology, rows_per_shard=rows, row_tokens=128, keep=keep,
                    peak_hbm_gib=needed, hbm_gib=limit, fits=needed <= limit, compile_s=1.0,
                    estimate=dict(step_s=sends + rows * takes[keep]))
    compile.measure = measure
    found = compile.search(build(Experiment, tiny.get_config()), "cpu:8")
    return found["rows_per_shard"], found["keep"], tried

cases = json.loads(sys.argv[1])
print(json.dumps([search(**case) for case in cases]))
"""


def test_the_search_finds_the_rows_and_the_policy_with_the_least_time_for_a_row():
    kept = dict(none=1.0, offload=1.05, attention=1.2, qkv=1.4, products=1.8)
    takes = dict(none=1.0, offload=0.97, attention=0.95, qkv=0.9, products=0.7)
    cases = {  # memory, seconds that do not depend on the rows: rows, policy
        (1.0, 1.0): [1, "none"],
        (1.3, 1.0): [1, "attention"],
        (1.9, 1.0): [1, "products"],
        (2.1, 0.1): [1, "products"],  # two rows that recompute more are slower
        (2.1, 9.0): [2, "offload"],
        (13.9, 1.0): [6, "products"],
    }
    found = [dict(limit=limit, sends=sends, kept=kept, takes=takes) for limit, sends in cases]
    done = call("-c", SEARCH, json.dumps(found), PYTHONPATH=str(ROOT))
    assert done.returncode == 0, done.stderr[-3000:]
    for (case, expected), result in zip(cases.items(), json.loads(done.stdout), strict=True):
        assert result[:2] == expected, case
        tried = [tuple(attempt) for attempt in result[2]]
        assert len(tried) == len(set(tried)) <= 14


def test_a_program_is_kept_only_for_a_known_number_of_steps(tmp_path):
    done = run("--topology=cpu:2", f"--output={tmp_path / 'step'}", "--config=configs/sample.py")
    assert done.returncode == 1 and "error: --output needs --steps=N" in done.stderr


SAMPLE = ("--topology=cpu:2", "--config=configs/sample.py", "--steps=2")


def test_an_output_that_cannot_be_written_is_an_error_before_compiling(tmp_path):
    (tmp_path / "file").write_text("")
    for output in (tmp_path / "file" / "step.zip", tmp_path):
        done = run(*SAMPLE, f"--output={output}")
        assert done.returncode == 1 and not done.stdout
        assert f"error: --output={output} cannot be written: " in done.stderr


def test_a_program_that_does_not_fit_is_not_written(tmp_path):
    """The file of an earlier program is removed, too."""
    file = tmp_path / "new" / "step.zip"
    file.parent.mkdir()
    file.write_bytes(b"of an earlier program")
    done = run("--json", *SAMPLE, "--config.pipeline.rows=40000000", f"--output={file}")
    assert done.returncode == 1 and not json.loads(done.stdout)["fits"]
    assert f"error: the program does not fit cpu:2, and {file} was not written" in done.stderr
    assert not file.exists()


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
    """A loop of 28 turns gathers 16 x 8 floats and passes 4 x 8 on. Then 64 values of 2 bytes are scattered."""
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
    """Loops that XLA makes from a product count by two."""
    text = PROGRAM.replace("%one = s32[] constant(1)", "%one = s32[] constant(2)")
    assert hlo.collective_bytes(text)["all-gather"] == 14 * 16 * 8 * 4


SENT = """\
  %sent = (f32[4,8]{1,0}, u32[], token[]) send(%x, %after), channel_id=9, is_host_transfer=true, \
frontend_attributes={_xla_host_transfer_handler_name="xla_megascale_runtime",\
_xla_megascale_transfer_type="ALL_REDUCE"}
  %done = token[] send-done(%sent), channel_id=9, is_host_transfer=true
"""


def test_what_leaves_a_slice_by_hand():
    """Each of 28 turns sends 4 x 8 floats. Collectives within the slice are counted separately."""
    assert hlo.dcn_bytes(PROGRAM) == {}
    text = PROGRAM.replace("  ROOT %out", SENT + "  ROOT %out")
    assert hlo.dcn_bytes(text) == {"all-reduce": 28 * 4 * 8 * 4}
    assert hlo.collective_bytes(text) == hlo.collective_bytes(PROGRAM)


def test_a_loop_of_unknown_length_is_an_error():
    text = PROGRAM.replace("direction=LT", "direction=NE")
    with pytest.raises(ValueError, match="loop loop communicates an unknown number of times"):
        hlo.collective_bytes(text)
