from pathlib import Path

import pytest

from evalkit.records import LayerRecord, RunDirectory, only
from evalkit.report import tables

nbformat = pytest.importorskip("nbformat", reason="nbformat reads the notebook: pip install -e .[dev]")
nbclient = pytest.importorskip("nbclient", reason="nbclient runs the notebook: pip install -e .[dev]")
pytest.importorskip("ipykernel", reason="the notebook needs a kernel: pip install -e .[dev]")

NOTEBOOK = Path(__file__).parents[2] / "notebooks" / "read_a_run.ipynb"


def test_the_notebook_reads_a_run_into_a_table(run: RunDirectory):
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    assert not any(cell.get("outputs") for cell in notebook.cells), "commit it without outputs"
    parameters = next(cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", ()))
    parameters.source = f"RUN = {str(run.path)!r}"
    nbclient.NotebookClient(notebook, timeout=60, kernel_name="python3").execute()
    shown = "".join(str(output) for cell in notebook.cells for output in cell.get("outputs", ()))
    for record in only(run.read(), LayerRecord):
        if (record.phase, record.mode, record.probe, record.rung) == (
            "decode",
            "isolated",
            "attention",
            "total",
        ):
            assert tables.number(record.relative_l2) in shown
