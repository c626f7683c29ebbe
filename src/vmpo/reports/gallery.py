"""Base beside aligned at the same seeds, with what the recogniser read under each picture."""

from __future__ import annotations

import io
from collections.abc import Mapping
from html import escape
from pathlib import Path
from typing import Any

from PIL import Image
from rapidfuzz.distance import Levenshtein

from vmpo.reports.figures import data_uri
from vmpo.reports.run_record import RunRecord, finite, section

FIRST, MOST = 12, 60
"""Pairs shown at once, and in all."""
_LARGE = 100_000  # bytes above which a picture is embedded smaller


def picture_tag(path: Path | None, text: str) -> str:
    """The picture as an <img> with its content embedded, or a placeholder where it cannot be read."""
    try:
        if path is None:
            raise FileNotFoundError
        content, kind = path.read_bytes(), "image/png"
        with Image.open(io.BytesIO(content)) as picture:
            width, height = picture.size
            if len(content) > _LARGE or picture.format != "PNG":
                small = picture.convert("RGB")
                small.thumbnail((512, 512))
                buffer = io.BytesIO()
                small.save(buffer, format="JPEG", quality=88)
                content, kind = buffer.getvalue(), "image/jpeg"
    except (OSError, ValueError, Image.DecompressionBombError):
        return '<div class="gone">no picture</div>'
    sharp = ' class="pixel"' if width <= 160 else ""  # a tiny picture is looked at pixel by pixel
    return (
        f'<img{sharp} src="{data_uri(content, kind)}" alt="{escape(text)}" '
        f'width="{width}" height="{height}" loading="lazy">'
    )


def letters(text: object) -> str:
    """Upper-case letters and digits of a text, the rest left out."""
    return "".join(c for c in str(text or "") if c.isalnum()).upper()


def marked_reading(read: str, word: str) -> str:
    """What was read, as HTML: wrong and surplus letters marked, a middle dot where letters are missing."""
    if read == word:
        return escape(read)
    parts = []
    for edit in Levenshtein.opcodes(read, word):
        piece = read[edit.src_start : edit.src_end]
        if edit.tag == "equal":
            parts.append(escape(piece))
        else:
            missing = "·" * (edit.dest_end - edit.dest_start) if edit.tag == "insert" else ""
            parts.append(f'<span class="wrong">{escape(piece) or missing}</span>')
    return "".join(parts)


def _find(record: RunRecord, name: object) -> Path | None:
    """The picture of that name in the run folder or its samples/; nothing outside the folder is read."""
    if not isinstance(name, str) or not name:
        return None
    root = record.folder.resolve()
    for path in (root / name, root / "samples" / name):
        if path.resolve().is_relative_to(root) and path.is_file():
            return path
    return None


def is_right(entry: Mapping[str, Any], who: str) -> bool:
    """Whether the recogniser read the word asked for."""
    word = letters(entry.get("word"))
    return bool(word) and letters(section(entry, who).get("read")) == word


def _side(record: RunRecord, entry: Mapping[str, Any], who: str) -> str:
    side, word = section(entry, who), letters(entry.get("word"))
    read, score = letters(side.get("read")), finite(side.get("score"))
    image = picture_tag(_find(record, side.get("file")), f"{who}, asked for {word or 'a picture'}, reads {read or '-'}")
    shown = "" if score is None else f'<span class="score num">{score:.2f}</span>'
    if word:
        right = is_right(entry, who)
        text = marked_reading(read, word) + (' <span aria-label="correct">✓</span>' if right else "")
        text = text if read else '<span class="wrong">nothing read</span>'
        reading = f'<div class="read{" right" if right else ""}">{shown}{text}</div>'
    else:
        reading = f'<div class="read">{shown}&nbsp;</div>'
    return f'<div><span class="who">{who}</span>{image}{reading}</div>'


def _pair(record: RunRecord, entry: Mapping[str, Any]) -> str:
    word, prompt = letters(entry.get("word")), str(entry.get("prompt") or "")
    title = f"<b>{escape(word)}</b> &ensp;" if word else ""
    sides = _side(record, entry, "base") + _side(record, entry, "aligned")
    caption = f'<figcaption title="{escape(prompt)}">{title}{escape(prompt)}</figcaption>'
    return f'<figure class="pair">{caption}<div class="two">{sides}</div></figure>'


def gallery(record: RunRecord) -> str:
    """The section with the pictures: pairs of the evaluation, else the latest samples of training, else a note."""
    listed = record.evaluation.get("gallery")
    entries = [entry for entry in listed if isinstance(entry, Mapping)] if isinstance(listed, list) else []
    if not entries:
        return _strip(record)
    spelt = [entry for entry in entries if letters(entry.get("word"))]
    tally = ""
    if spelt:
        base, aligned = (sum(is_right(entry, who) for entry in spelt) for who in ("base", "aligned"))
        tally = f" Read right: base {base} of {len(spelt)}, aligned {aligned} of {len(spelt)}."
    pairs = [_pair(record, entry) for entry in entries[:MOST]]
    rest = (
        f"<details><summary>{len(pairs) - FIRST} more</summary>"
        f'<div class="pairs">{"".join(pairs[FIRST:])}</div></details>'
        if len(pairs) > FIRST
        else ""
    )
    return (
        "<h2>Base and aligned, from the same noise</h2>"
        f"<p>In the order of the prompts, none picked out.{tally}"
        " Under each picture is what the recogniser read; wrong letters are marked, a dot stands for a missing one.</p>"
        f'<div class="pairs">{"".join(pairs[:FIRST])}</div>{rest}'
    )


def _strip(record: RunRecord) -> str:
    title = "<h2>Pictures</h2>"
    if not record.samples:
        return title + '<p class="note">No pictures yet.</p>'
    shown = record.samples[-24:]
    figures = "".join(
        f"<figure>{picture_tag(path, path.stem)}{escape(str(path.relative_to(record.folder)))}</figure>"
        for path in shown
    )
    return (
        f"{title}<p>Not evaluated yet; these are the latest {len(shown)} of {len(record.samples)} pictures saved in "
        f'training.</p><div class="strip">{figures}</div>'
    )
