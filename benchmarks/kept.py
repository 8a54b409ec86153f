"""Results in a file of JSON, added to as they come: a run that is killed leaves those it had."""

import json
from pathlib import Path
from typing import Any


def keep(path: Path, facts: dict[str, Any]) -> None:
    """Add facts to the file, in the place of those of the same names."""
    kept = json.loads(path.read_text()) if path.exists() else {}
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(path.name + ".new")
    new.write_text(json.dumps(kept | facts, indent=1) + "\n")
    new.replace(path)
