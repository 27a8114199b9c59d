"""The notebook, executed from the top as a visitor would: without a hub, with one on this machine, and from GitHub."""

import copy
import http.server
import io
import json
import os
import re
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from pangea_jax import assets, checkpoints
from pangea_jax.checkpoints.convert import convert
from pangea_jax.generate import fit
from pangea_jax.sample import emoji
from pangea_jax.sample.sample_store import SampleStore
from tests.eval.bench import hub

nbformat = pytest.importorskip("nbformat", reason="nbclient is in requirements-dev.txt")
nbclient = pytest.importorskip("nbclient", reason="nbclient is in requirements-dev.txt")
pytest.importorskip("ipykernel", reason="ipykernel is in requirements-dev.txt")
NOTEBOOK = Path(__file__).parents[3] / "eval" / "colab.ipynb"


def _environment(folder: Path, **more: str) -> dict[str, str]:
    """Of a visitor with one CPU device: nothing is installed, and nothing leaves this machine."""
    dropped = ("XLA_FLAGS", "COLAB_JUPYTER_IP", "KMP_TARGET_PORT")
    kept = {
        k: v for k, v in os.environ.items() if k not in dropped and not k.lower().endswith("_proxy")
    }
    home = {"HF_HOME": str(folder / "hf"), "JAX_PLATFORMS": "cpu", "PIP_NO_INDEX": "1"}
    # A port at which nobody answers.
    return kept | home | {"HF_ENDPOINT": "http://127.0.0.1:9"} | more


def _execute(
    folder: Path, settings: dict[str, object], environment: dict[str, str], times: int = 1
):
    """The code cells after every cell was executed `times` times, with their outputs."""
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    notebook.cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    # None are committed.
    assert not any(cell.outputs or cell.execution_count for cell in notebook.cells)
    for name, value in {"FOLDER": str(folder / "out"), **settings}.items():
        line, cell = re.compile(rf"^{name} = .*$", re.M), notebook.cells[1]
        assert line.search(cell.source)
        cell.source = line.sub(f"{name} = {value!r}", cell.source)
    notebook.cells = [copy.deepcopy(cell) for cell in notebook.cells for _ in range(times)]
    client = nbclient.NotebookClient(
        notebook,
        timeout=550,
        kernel_name="python3",
        resources={"metadata": {"path": str(NOTEBOOK.parent)}},
    )
    client.execute(env=environment)
    return notebook.cells


def _printed(cells) -> str:
    outputs = [output for cell in cells for output in cell.outputs]
    return "".join(o["text"] for o in outputs if o.output_type == "stream")


def _shown(cells, kind: str) -> list[str]:
    outputs = [output for cell in cells for output in cell.outputs]
    shown = [o["data"] for o in outputs if o.output_type == "display_data"]
    return [data[kind] for data in shown if kind in data]


def test_without_a_hub_the_sample_answers_what_it_can(tmp_path):
    """Every cell runs twice, and the second time changes nothing."""
    cells = _execute(tmp_path, {"LIMIT": 10}, _environment(tmp_path), times=2)
    first, again = cells[::2], cells[1::2]
    for kind in ("text/markdown", "image/png"):
        assert _shown(first, kind) == _shown(again, kind)
    printed = _printed(first)
    assert (
        f"The small sample model, because there is no folder {fit.PUBLISHED}, and it could not be"
        in printed
    )
    assert "Every document has a score." in printed
    answers, report = _shown(first, "text/markdown")
    assert "| cat | cat |" in answers
    output = tmp_path / "out" / "results" / "sample"
    assert len(_shown(first, "image/png")) == 1 + len(list(output.glob("*.png"))) == 3
    # Scores that mean something: far above those of a model that does not look, and above chance.
    scores = {
        name: (found["fixed"]["en"]["score"], found["fixed"]["mul"]["score"])
        for name, found in json.loads((output / "results.json").read_text())["datasets"].items()
    }
    assert scores["sample_rank_blind"] == (10, 10)
    assert min(scores["sample_rank"]) > 70 and min(scores["sample_name"]) > 20
    assert "Rank of 10" in report


@pytest.fixture(scope="module")
def repositories(tmp_path_factory, emoji_tokenizer):
    """A published model, here a small one that knows drawings, and one of PangeaBench's data sets."""
    datasets = pytest.importorskip("datasets", reason="datasets is in requirements-eval.txt")
    datasets.disable_progress_bars()
    folder, table = tmp_path_factory.mktemp("hub") / "model", io.BytesIO()
    convert(assets.SAMPLE_MODEL, folder, emoji_tokenizer, tokenizer_files=assets.EMOJI, form="hf")
    picture = {
        "bytes": SampleStore().image(emoji.image_key(emoji.TEST_ARTIST, "1f408")),
        "path": None,
    }
    text = datasets.Value("string")
    features = {"question": text, "answer": text, "image": datasets.Image()}
    row = {"question": "What is this?", "answer": "cat", "image": picture}
    datasets.Dataset.from_list([row] * 3, features=datasets.Features(features)).to_parquet(table)
    return {
        fit.PUBLISHED: {path.name: path.read_bytes() for path in folder.iterdir()},
        "neulab/PangeaBench-xgqa": {"data/en-00000-of-00001.parquet": table.getvalue()},
    }


def test_with_a_hub_the_published_model_does_real_tasks(repositories, tmp_path):
    with hub.serve(repositories) as server:
        environment = _environment(tmp_path, HF_ENDPOINT=server.url)
        cells = _execute(tmp_path, {"LIMIT": 2, "TASKS": "xgqa_en"}, environment)
    printed = _printed(cells)
    assert f"{fit.PUBLISHED} on CPU, " in printed and "prompts of" in printed
    assert "Every document has a score." in printed
    answers, report = _shown(cells, "text/markdown")
    assert "| cat | cat |" in answers and fit.PUBLISHED in report
    results = json.loads(next((tmp_path / "out" / "results").glob("*/results.json")).read_text())
    assert results["documents"] == {"xgqa_en": 2} and results["config"]["limited"] == ["xgqa_en"]


def _first_cell(folder: Path, environment: dict[str, str]) -> subprocess.CompletedProcess:
    cells = nbformat.read(NOTEBOOK, as_version=4).cells
    source = next(cell.source for cell in cells if cell.cell_type == "code")
    command = [sys.executable, "-c", source]
    options = {"capture_output": True, "text": True, "timeout": 300}
    return subprocess.run(command, cwd=folder, env=environment, check=False, **options)


class _Sessions(http.server.BaseHTTPRequestHandler):
    """What Colab's server says of a notebook that was opened from GitHub."""

    def do_GET(self):
        assert self.path == "/api/sessions"
        path = "fileId=https%3A//github.com/someone/My.Pangea/blob/a/branch/eval/colab.ipynb"
        body = json.dumps([{"name": "colab.ipynb", "path": path}]).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args):
        pass


def test_a_notebook_from_github_clones_its_own_revision(tmp_path):
    """git reads a folder in place of https://github.com; the first cell runs twice."""
    source = tmp_path / "github" / "someone" / "My.Pangea"
    (source / "eval").mkdir(parents=True)
    for name in ("eval/run.py", "requirements.txt", "requirements-eval.txt"):
        (source / name).touch()
    git = ["git", "-C", str(source), "-c", "user.name=x", "-c", "user.email=x@example.org"]
    subprocess.run([*git, "init", "--quiet"], check=True)
    subprocess.run([*git, "checkout", "--quiet", "-b", "a/branch"], check=True)
    subprocess.run([*git, "add", "."], check=True)
    subprocess.run([*git, "commit", "--quiet", "-m", "all"], check=True)
    subprocess.run([*git, "checkout", "--quiet", "-b", "another"], check=True)
    subprocess.run([*git, "rm", "--quiet", "eval/run.py"], check=True)
    subprocess.run([*git, "commit", "--quiet", "-m", "less"], check=True)
    server = http.server.HTTPServer(("127.0.0.1", 0), _Sessions)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    colab = {"COLAB_JUPYTER_IP": "127.0.0.1", "KMP_TARGET_PORT": str(server.server_address[1])}
    mirror = {"GIT_CONFIG_KEY_0": f"url.file://{tmp_path}/github/.insteadOf"}
    mirror |= {"GIT_CONFIG_VALUE_0": "https://github.com/", "GIT_CONFIG_COUNT": "1"}
    (tmp_path / "content").mkdir()
    try:
        for _ in range(2):
            done = _first_cell(tmp_path / "content", _environment(tmp_path, **colab, **mirror))
            assert done.returncode == 0, done.stderr
            assert done.stdout.startswith(f"{tmp_path}/content/pangea_jax, JAX ")
    finally:
        server.shutdown()
        server.server_close()


def test_a_notebook_from_nowhere_says_where_to_open_it(tmp_path):
    done = _first_cell(tmp_path, _environment(tmp_path))
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert done.stderr.startswith("Open this notebook from a clone of its repository, or in Colab")


def test_the_notebook_takes_the_share_of_memory_that_is_counted_with():
    source = NOTEBOOK.read_text(encoding="utf-8")
    assert f'XLA_PYTHON_CLIENT_MEM_FRACTION\\", \\"{fit.GPU_SHARE}\\"' in source


def test_only_the_sizes_of_a_model_are_fetched_before_it_is_chosen(
    repositories, tmp_path, monkeypatch
):
    """Also if they were fetched before: a hub that is gone must not look as if it were there."""
    import huggingface_hub

    real = huggingface_hub.hf_hub_download
    with hub.serve(repositories) as server:
        options = {"endpoint": server.url, "cache_dir": str(tmp_path)}
        monkeypatch.setattr(
            huggingface_hub, "hf_hub_download", lambda *name, **more: real(*name, **options, **more)
        )
        found = checkpoints.peek(fit.PUBLISHED)
        assert found == checkpoints.config_from_folder(assets.SAMPLE_MODEL)
        assert not any(path.endswith(".safetensors") for _, path in server.asked)
    options["endpoint"] = "http://127.0.0.1:9"
    with pytest.raises(checkpoints.CheckpointError, match="could not be downloaded"):
        checkpoints.peek(fit.PUBLISHED)
