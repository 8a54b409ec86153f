"""Make the notebooks of the lesson from its scripts: `python examples/lesson/notebooks.py`.

The same scripts give the same bytes. The notebooks hold no outputs.
"""

from pathlib import Path

import jupytext

SCRIPTS = [Path(__file__).with_name(name) for name in ("lesson.py", "lesson_ko.py")]
METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}


def notebook(script: Path) -> str:
    """Return the text of the notebook of a script in jupytext's percent format."""
    content = jupytext.reads(script.read_text(encoding="utf-8"), fmt="py:percent")
    content.metadata = METADATA
    for number, cell in enumerate(content.cells, start=1):
        cell.id = f"cell-{number}"  # jupytext's own are random
        cell.metadata = {}  # it counts blank lines of the script there
    return jupytext.writes(content, fmt="ipynb") + "\n"


if __name__ == "__main__":
    for script in SCRIPTS:
        script.with_suffix(".ipynb").write_text(notebook(script), encoding="utf-8")
