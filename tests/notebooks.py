"""Notebooks, run by the interpreter that asks for it, whatever kernels are installed.

    python -m tests.notebooks NOTEBOOK FOLDER

runs a notebook in a folder, and writes it there with what it said. The libraries of Jupyter leave sockets open, which
is an error in a test, but not in a process that ends.
"""

import hashlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import nbformat
from ipykernel.kernelspec import write_kernel_spec
from jupyter_client.kernelspec import KernelSpecManager
from jupyter_client.manager import AsyncKernelManager
from nbclient import NotebookClient

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
RAN = "ran"  # what the metadata of a stored notebook call the digest of the code that its outputs are of
SECONDS = 3600  # that a cell may take


def read(path: Path) -> nbformat.NotebookNode:
    """A stored notebook."""
    return nbformat.read(path, as_version=4)


def code_cells(notebook: nbformat.NotebookNode) -> Iterator[nbformat.NotebookNode]:
    """Its cells with code, in order."""
    return (cell for cell in notebook.cells if cell.cell_type == "code")


def parameters(notebook: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """The one cell that is tagged `parameters`."""
    (cell,) = (cell for cell in code_cells(notebook) if "parameters" in cell.metadata.get("tags", []))
    return cell


def digest(notebook: nbformat.NotebookNode) -> str:
    """Of its code."""
    return hashlib.sha256("\0".join(cell.source for cell in code_cells(notebook)).encode()).hexdigest()[:16]


def execute(notebook: nbformat.NotebookNode, folder: Path) -> None:
    """Run all cells in a folder, and keep what they say.

    Raises:
        CellExecutionError: a cell has failed.
    """
    write_kernel_spec(str(folder / ".kernels" / "python3"))
    kernels = KernelSpecManager(kernel_dirs=[str(folder / ".kernels")])
    manager = AsyncKernelManager(kernel_name="python3", kernel_spec_manager=kernels)
    own = {
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]),
        "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
        "IPYTHONDIR": str(folder / ".ipython"),
        "PYTHONWARNINGS": "ignore:IProgress not found",  # tqdm's, where ipywidgets is not installed
    }
    options = {
        "timeout": SECONDS,
        "startup_timeout": SECONDS,
        "record_timing": False,
        "coalesce_streams": True,
        "resources": {"metadata": {"path": str(folder)}},
    }
    client = NotebookClient(notebook, km=manager, **options)
    client.execute(env=os.environ | own)


def store(notebook: nbformat.NotebookNode, path: Path) -> None:
    """Write a notebook that has run, without what only says which machine it ran on."""
    notebook.metadata = nbformat.from_dict(
        {
            "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
            "language_info": {"name": "python"},
            RAN: digest(notebook),
        }
    )
    for number, cell in enumerate(notebook.cells):
        cell.id = f"cell-{number}"
        cell.metadata = nbformat.from_dict({name: cell.metadata[name] for name in cell.metadata.keys() & {"tags"}})
    nbformat.validate(notebook)
    nbformat.write(notebook, path)


if __name__ == "__main__":
    path, folder = Path(sys.argv[1]), Path(sys.argv[2])
    notebook = read(path)
    execute(notebook, folder)
    store(notebook, folder / path.name)
