"""The notebook, run from top to bottom with the stand-in model."""

from pathlib import Path

import pytest

NOTEBOOK = Path(__file__).parents[3] / "eval" / "colab.ipynb"


def test_the_notebook_runs_with_the_stand_in(tmp_path):
    nbformat = pytest.importorskip("nbformat", reason="nbclient is in requirements-dev.txt")
    nbclient = pytest.importorskip("nbclient", reason="nbclient is in requirements-dev.txt")
    pytest.importorskip("ipykernel", reason="ipykernel is in requirements-dev.txt")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert not any(cell.outputs or cell.execution_count for cell in code)  # none are committed
    settings = code[0]
    assert 'CHECKPOINT = "sample"' in settings.source
    settings.source = settings.source.replace("LIMIT = 4", "LIMIT = 2")
    settings.source = settings.source.replace('"pangeabench"', repr(str(tmp_path / "out")))
    client = nbclient.NotebookClient(
        notebook,
        timeout=280,
        kernel_name="python3",
        resources={"metadata": {"path": str(NOTEBOOK.parent)}},
    )
    client.execute()
    outputs = [output for cell in code for output in cell.get("outputs", ())]
    printed = "".join(o["text"] for o in outputs if o.output_type == "stream")
    assert "What is this? → cat\n" in printed
    assert "Every document has a score." in printed
    shown = [o["data"] for o in outputs if o.output_type == "display_data"]
    tables = [data["text/markdown"] for data in shown if "text/markdown" in data]
    assert len(tables) == 1 and "| sample | fixed |" in tables[0]
    assert sum("image/png" in data for data in shown) >= 2  # the drawing and a figure
    figures = list((tmp_path / "out" / "results").glob("*.png"))
    assert figures and sum("image/png" in data for data in shown) == 1 + len(figures)
