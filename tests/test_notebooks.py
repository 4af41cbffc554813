"""Notebooks run with a tiny model, and those that are stored hold what they said of a real one, and of no machine."""

import os
import re
import subprocess
import sys
from importlib import util

import nbformat
import pytest

from jaxpost import save_pretrained
from tests.conftest import make_model, make_tokenizer
from tests.notebooks import NOTEBOOKS, RAN, ROOT, code_cells, digest, parameters, read

# In the place of the cell that is tagged `parameters`.
TINY = {
    "sft": """
MODEL, OUTPUT = "tiny", "out"
NUM_ROWS, MAX_STEPS, BATCH_SIZE, MAX_NEW_TOKENS = 20, 4, 2, 4
""",
    "preferences": """
MODEL, OUTPUT = "tiny", "out"
NUM_PAIRS, MAX_STEPS, BATCH_SIZE = 20, 2, 2
""",
    "grpo": """
MODEL, OUTPUT = "tiny", "out"
MAX_STEPS, NUM_GENERATIONS, PROMPTS_PER_STEP, MAX_COMPLETION_LENGTH = 2, 2, 2, 4
""",
    "gguf": """
GGUF, OUTPUT = "tiny.gguf", "out"
MAX_STEPS, BATCH_SIZE = 4, 2
""",
    "scaling": """
MODEL, OUTPUT = "tiny", "out"
LAYERS, WIDTH, MLP, HEADS, KV_HEADS, VOCAB = 2, 256, 256, 2, 1, 512
MAX_LENGTH, POD, FEW = 256, "v5e:2x4", "v5e:2x2"
""",
}
# The kernel and what it starts: one device, and programs that are kept for the next process.
ENVIRONMENT = {
    "XLA_FLAGS": "",
    "JAX_COMPILATION_CACHE_DIR": str(ROOT / ".jax_cache"),
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1",
}
MACHINE = re.compile(r"/(tmp|home|root|work|Users|usr|opt|mnt|var)/|\bjaxpost-notebook-")
by_name = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
FOR_TPUS = "scaling"  # which compiles for chips, and so is run where the other tests of that are
to_run = pytest.mark.parametrize(
    "path",
    [pytest.param(path, marks=pytest.mark.parity if path.stem == FOR_TPUS else ()) for path in NOTEBOOKS],
    ids=lambda path: path.stem,
)


@pytest.fixture
def models(tmp_path):
    """A folder with the tiny model in both formats, which reads as many tokens as a word problem has bytes."""
    save_pretrained(make_model(max_position_embeddings=2048), make_tokenizer(), tmp_path / "tiny")
    if util.find_spec("gguf") is not None:
        from tests.models.gguf_files import write_model

        write_model(tmp_path / "tiny.gguf", {"llama.context_length": 512})
    return tmp_path


def texts(cell):
    """What a cell has said, pictures aside."""
    for output in cell.get("outputs", ()):
        yield output.get("text", "")
        yield from (text for kind, text in output.get("data", {}).items() if kind.startswith("text/"))


@to_run
def test_a_notebook_runs(path, models):
    notebook = read(path)
    parameters(notebook).source = TINY[path.stem].strip()
    if path.stem == FOR_TPUS and util.find_spec("libtpu") is None:
        pytest.skip("libtpu is not installed")
    (models / "given").mkdir()
    nbformat.write(notebook, models / "given" / path.name)
    command = [sys.executable, "-m", "tests.notebooks", str(models / "given" / path.name), str(models)]
    done = subprocess.run(command, env=os.environ | ENVIRONMENT, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    notebook = read(models / path.name)
    said = [text for cell in code_cells(notebook) for text in texts(cell)]
    # What fails in a pipe does not stop a notebook.
    assert not [text for text in said if re.search(r"^jaxpost: |Traceback|Warning", text, re.MULTILINE)]
    assert (models / "out").is_dir()


@by_name
def test_what_is_stored_was_said_by_the_code_that_is_stored(path):
    notebook = read(path)
    cells = list(code_cells(notebook))
    assert notebook.metadata[RAN] == digest(notebook), f"run python tools/run_notebooks.py {path.stem}"
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert sum(bool(cell.outputs) for cell in cells) > len(cells) / 2
    assert not [output for cell in cells for output in cell.outputs if output.output_type == "error"]


@by_name
def test_what_is_stored_tells_nothing_of_a_machine(path):
    notebook = read(path)
    assert not [text for cell in notebook.cells for text in (cell.source, *texts(cell)) if MACHINE.search(text)]
    assert notebook.metadata.keys() == {"kernelspec", "language_info", RAN}
    assert notebook.metadata.kernelspec.name == "python3"
    assert all(cell.metadata.keys() <= {"tags"} for cell in notebook.cells)
    assert path.stat().st_size < 150_000
