"""Started by torchrun: runs `vmpo train` once for each line of arguments in a JSON file, in one set of processes."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from vmpo.cli import main


def train_in_turn(jobs: list[list[str]]) -> None:
    """Stops at the first training that ends with an error."""
    for words in jobs:
        sys.argv = ["vmpo", "train", *words]
        try:
            main()
        except SystemExit as end:
            if end.code:
                raise


if __name__ == "__main__":
    train_in_turn(json.loads(Path(sys.argv[1]).read_text()))
