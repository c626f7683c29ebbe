"""The gallery of a folder of scores: a row a prompt, a column a source, the first picture of each, none picked out."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from vmpo.evaluation.score_pictures import read_picture
from vmpo.reports.picture_grid import PictureGrid, save_grid_figure


def write_gallery(folder: Path, sources: Sequence[str], prompts: Sequence[str], rows: Sequence[int]) -> Path:
    """Writes `gallery.png` of the prompts numbered `rows`."""
    files = {}
    for line in (folder / "scores.jsonl").read_text().splitlines():
        record = json.loads(line)
        if record["image"] == 0:
            files[record["source"], record["prompt"]] = folder / record["file"]
    pictures = [[read_picture(files[source, row]) for source in sources] for row in rows]
    save_grid_figure(PictureGrid(pictures, list(sources), [prompts[row] for row in rows]), folder / "gallery.png")
    return folder / "gallery.png"
