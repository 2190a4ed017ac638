from dataclasses import replace
from pathlib import Path

import pytest

from evalkit.records import LayerRecord, RunDirectory, StageRecord, only
from evalkit.report import tables

nbformat = pytest.importorskip("nbformat", reason="nbformat reads the notebook: pip install -e .[dev]")
nbclient = pytest.importorskip("nbclient", reason="nbclient runs the notebook: pip install -e .[dev]")
pytest.importorskip("ipykernel", reason="the notebook needs a kernel: pip install -e .[dev]")

NOTEBOOK = Path(__file__).parents[2] / "notebooks" / "read_a_run.ipynb"


def shown(run: Path) -> str:
    """What the notebook's cells show of a run."""
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    assert not any(cell.get("outputs") for cell in notebook.cells), "commit it without outputs"
    parameters = next(cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", ()))
    parameters.source = f"RUN = {str(run)!r}"
    nbclient.NotebookClient(notebook, timeout=60, kernel_name="python3").execute()
    return "".join(str(output) for cell in notebook.cells for output in cell.get("outputs", ()))


def total(run: RunDirectory) -> list[LayerRecord]:
    wanted = ("decode", "isolated", "attention", "total")
    found = [r for r in only(run.read(), LayerRecord) if (r.phase, r.mode, r.probe, r.rung) == wanted]
    assert found
    return found


def test_the_notebook_reads_a_run_into_a_table(run: RunDirectory):
    table = shown(run.path)
    for record in total(run):
        assert tables.number(record.relative_l2) in table


def test_the_notebook_reads_a_run_inside_a_serving_engine(run: RunDirectory, tmp_path: Path):
    served = RunDirectory.create(tmp_path, "served", {}, "evalkit run")
    with served.stage("all") as write:
        for record in (r for r in run.read() if not isinstance(r, LayerRecord | StageRecord)):
            write.write(record)
        for record in total(run):
            write.write(replace(record, probe="values", mode="propagated", phase="prefill"))
    table = shown(served.path)
    for record in total(run):
        assert tables.number(record.relative_l2) in table
