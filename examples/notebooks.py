"""The examples as notebooks that have run, with what they print and the pictures that they write.

    python examples/notebooks.py digits calibrate …

Writes `notebooks/<name>.ipynb`, made from the scripts by jupytext and run by nbclient. A script's
docstring becomes the text above it.
"""

import ast
import os
import re
import sys
from pathlib import Path

import jupytext
from nbclient import NotebookClient
from nbformat.v4 import new_code_cell, new_markdown_cell

HERE = Path(__file__).parent
PLACE = HERE.parent / "notebooks"


def convert(name: str) -> Path:
    """Make the notebook of an example, and run it."""
    source = (HERE / f"{name}.py").read_text()
    notebook = jupytext.reads(source, fmt="py:light")
    notebook.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3"}
    notebook.cells[0] = new_markdown_cell(ast.get_docstring(ast.parse(source)))
    pictures = re.findall(r"\"(\w+\.png)\"", source)
    if pictures:
        shown = "".join(f'\ndisplay(Image("{picture}"))' for picture in dict.fromkeys(pictures))
        notebook.cells.append(new_code_cell(f"from IPython.display import Image, display\n{shown}"))
    PLACE.mkdir(exist_ok=True)
    client = NotebookClient(notebook, timeout=None, resources={"metadata": {"path": str(PLACE)}})
    client.execute()
    path = PLACE / f"{name}.ipynb"
    jupytext.write(notebook, path)
    return path


def main() -> None:
    # One example imports another; a bar that moves would be a line for each move.
    os.environ |= {"PYTHONPATH": str(HERE), "TQDM_DISABLE": "1"}
    for name in sys.argv[1:]:
        print(f"wrote {convert(name)}", flush=True)


if __name__ == "__main__":
    main()
