"""Run notebooks as they are and store what they say: `python tools/run_notebooks.py [--models FOLDER] [NAME ...]`.

Each runs in a new folder, in which it finds what FOLDER holds by the same names: with FOLDER/owner/name the model
owner/name is taken from there, not from the hub.
"""

import argparse
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from tests.notebooks import NOTEBOOKS, execute, read, store


def main() -> None:
    """Run those that are named, or all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", choices=[path.stem for path in NOTEBOOKS], metavar="NAME")
    parser.add_argument("--models", type=Path, help="folder with models by the names that notebooks give them")
    arguments = parser.parse_args()
    for path in NOTEBOOKS:
        if arguments.names and path.stem not in arguments.names:
            continue
        notebook, start = read(path), time.monotonic()
        with tempfile.TemporaryDirectory(prefix="jaxpost-notebook-") as folder:
            for found in arguments.models.iterdir() if arguments.models else ():
                (Path(folder) / found.name).symlink_to(found.resolve())
            execute(notebook, Path(folder))
        store(notebook, path)
        print(f"{path.name}: {time.monotonic() - start:.0f} s, {path.stat().st_size / 1e3:.0f} kB", flush=True)


if __name__ == "__main__":
    main()
