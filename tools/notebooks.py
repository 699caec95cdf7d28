"""Makes examples/*.ipynb from the scripts of the same name, and runs them.

python tools/notebooks.py write   writes the notebooks anew, without outputs
python tools/notebooks.py check   fails if one is not what its script makes
python tools/notebooks.py run     runs them, with few epochs; with their outputs they go to examples-output/
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import jupytext
import nbformat
from nbclient import NotebookClient
from rich.progress import track

EXAMPLES = Path(__file__).parents[1] / "examples"
OUTPUT = Path(__file__).parents[1] / "examples-output"
# What a run takes in the place of a command line.
NOTEBOOKS = {"demo": "--epochs 3 --rounds 20 --steps 60", "tutorial_l1_l2": "--epochs 5", "linear_models": ""}
KERNEL = {"display_name": "Python 3", "language": "python", "name": "python3"}


def convert(name: str) -> nbformat.NotebookNode:
    notebook = jupytext.read(EXAMPLES / f"{name}.py", fmt="py:percent")
    notebook.metadata = nbformat.from_dict({"kernelspec": KERNEL, "jupytext": {"formats": "ipynb,py:percent"}})
    for i, cell in enumerate(notebook.cells):
        cell["id"] = f"cell-{i}"  # jupytext's are random
        cell.source = cell.source.strip("\n")
    return notebook


def to_text(notebook: nbformat.NotebookNode) -> str:
    return nbformat.writes(notebook, indent=1) + "\n"


def run(name: str) -> None:
    os.environ["EXAMPLE_ARGUMENTS"] = f"{NOTEBOOKS[name]} --output {OUTPUT / 'notebooks'}"
    notebook = nbformat.read(EXAMPLES / f"{name}.ipynb", as_version=4)
    resources = {"metadata": {"path": EXAMPLES}}
    NotebookClient(notebook, timeout=300, kernel_name="python3", resources=resources).execute()
    pictures = sum("image/png" in out.get("data", {}) for cell in notebook.cells for out in cell.get("outputs", ()))
    if not pictures:
        raise SystemExit(f"{name}.ipynb shows no picture")
    (OUTPUT / "notebooks" / f"{name}.ipynb").write_text(nbformat.writes(notebook))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("actions", nargs="+", choices=("write", "check", "run"))
    actions = parser.parse_args().actions
    for name in track(NOTEBOOKS, description="notebooks"):
        text, path = to_text(convert(name)), EXAMPLES / f"{name}.ipynb"
        if "write" in actions:
            path.write_text(text)
        if "check" in actions and (not path.exists() or path.read_text() != text):
            raise SystemExit(f"{path.name} is not what {name}.py makes: run `make notebooks`")
        if "run" in actions:
            run(name)


if __name__ == "__main__":
    main()
