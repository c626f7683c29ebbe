"""Prompt sets: files, unions, and the catalogue of published sets with copies of the real files."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from vmpo.errors import UserError
from vmpo.prompts import load_prompts
from vmpo.prompts.catalogue import CATALOGUE, Entry
from vmpo.prompts.download import checksum
from vmpo.prompts.published import PUBLISHED, PublishedSet

DATA = Path(__file__).resolve().parents[3] / "shared" / "data"
CONTENT = b'a mug that says "TEA"\na grey owl\na mug that says "TEA"\n'


@pytest.fixture(autouse=True)
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """An empty cache, and no network."""
    monkeypatch.setenv("VMPO_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.fixture
def owls(monkeypatch: pytest.MonkeyPatch) -> None:
    """A published set in the cache."""
    entry = Entry("owls", 2, "https://example.org/owls.txt", checksum(CONTENT, "sha256"), "MIT", quoted=True)
    monkeypatch.setitem(PUBLISHED, "owls/train", PublishedSet("owls/train", entry))
    put("owls/train", CONTENT)


def put(name: str, content: bytes) -> None:
    PUBLISHED[name].file.parent.mkdir(parents=True)
    PUBLISHED[name].file.write_bytes(content)


# --- files and unions -------------------------------------------------------------------------------------------------


def write(path: Path, content: str | bytes) -> str:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(path)


def test_text(tmp_path: Path) -> None:
    file = write(tmp_path / "own.txt", "\ufeff a cat \r\n\r\nein Käfer\na\u2028b\na cat\n")
    assert load_prompts(file).prompts == ["a cat", "ein Käfer", "a\u2028b"]
    assert load_prompts(file).metadata == [{}, {}, {}]
    assert load_prompts(write(tmp_path / "without_suffix", "a cat")).prompts == ["a cat"]


def test_json_lines_keep_their_records(tmp_path: Path) -> None:
    records = [{"prompt": "two cats", "include": [{"class": "cat", "count": 2}]}, {"prompt": "a dog", "tag": None}]
    file = write(tmp_path / "own.jsonl", "".join(json.dumps(r) + "\n\n" for r in [*records, {"prompt": "a dog"}]))
    found = load_prompts(file)
    assert found.prompts == ["two cats", "a dog"]
    assert found.metadata == records
    assert found.take([1]).metadata == records[1:]


def test_json_lists(tmp_path: Path) -> None:
    file = write(tmp_path / "own.json", json.dumps(["a cat", {"text": "a dog", "image": 3}, {"prompt": "b"}]))
    assert load_prompts(file).prompts == ["a cat", "a dog", "b"]
    assert load_prompts(file).metadata == [{}, {"text": "a dog", "image": 3}, {"prompt": "b"}]


@pytest.mark.parametrize(
    ("name", "content", "wanted"),
    [
        ("a.jsonl", '{"prompt": "x"}\n[1]\n', "line 2: not a JSON object"),
        ("a.jsonl", '{"prompt": null}\n', "line 1: not a JSON object"),
        ("a.jsonl", "{prompt}\n", "line 1: not a JSON object"),
        ("a.json", "[1]", "entry 1: neither a text nor an object"),
        ("a.json", '["x",\n]', "line 2: no valid JSON"),
        ("a.json", "{}", "holds no list"),
        ("a.json", "[]", "is empty"),
        ("a.txt", " \n", "is empty"),
        ("a.txt", b"\xff\xfe\x00", "no UTF-8 text"),
    ],
)
def test_malformed_files(tmp_path: Path, name: str, content: str | bytes, wanted: str) -> None:
    file = write(tmp_path / name, content)
    with pytest.raises(UserError) as error:
        load_prompts(file)
    assert wanted in str(error.value)
    assert file in str(error.value)
    assert "\n" not in str(error.value)


def test_unions_keep_the_first_of_two(owls: None, tmp_path: Path) -> None:
    own = write(tmp_path / "own.jsonl", '{"prompt": "a grey owl", "who": "me"}\n{"prompt": "a barn"}\n')
    found = load_prompts(f"owls/train + {own}+glyphs/test")
    glyphs = load_prompts("glyphs/test")
    assert found.prompts == ['a mug that says "TEA"', "a grey owl", "a barn", *glyphs.prompts]
    assert found.metadata[1] == {"target": ""}
    assert found.metadata[2] == {"prompt": "a barn"}
    assert load_prompts(f"{own}+owls/train").metadata[0]["who"] == "me"
    plus = write(tmp_path / "a+b.txt", "one file\n")
    assert load_prompts(plus).prompts == ["one file"]


@pytest.mark.parametrize(
    ("name", "near"),
    [("ocr/tran", "ocr/train"), ("hpdv2/paintings", "hpdv2/painting"), ("glyph/test", "glyphs/test"), ("draw", None)],
)
def test_unknown_names(name: str, near: str | None) -> None:
    with pytest.raises(UserError, match=f"no prompt set '{name}'") as error:
        load_prompts(f"glyphs/test+{name}")
    assert (f"did you mean '{near}'?" in str(error.value)) == (near is not None)
    with pytest.raises(UserError, match="no prompt set ''"):
        load_prompts("glyphs/test+")


# --- the catalogue ----------------------------------------------------------------------------------------------------


def test_every_home_is_pinned_or_known_not_to_be() -> None:
    digests = {"sha256": 64, "git": 40, "": 0}
    for name, entry in CATALOGUE.items():
        kind, _, digest = entry.checksum.partition(":")
        assert len(digest) == digests[kind], name
        assert entry.url.startswith("https://"), name
        assert entry.licence, name
        if entry.checksum:
            assert re.search(r"githubusercontent\.com/[^/]+/[^/]+/[0-9a-f]{40}/", entry.url), name
        else:
            assert name.startswith("hpdv2/"), "only these have no checksum"


TRUTH = {
    "ocr/test": "ocr_test.txt",
    "pickscore-sfw/test": "pickscore_sfw_test.txt",
    "benchmark_ir": "benchmark_ir.json",
    "alignprop/train": "hps_photo_752.txt",
    "simple_animals": "simple_animals.txt",
}


@pytest.mark.skipif(not DATA.is_dir(), reason="the published files are not here")
@pytest.mark.parametrize("name", TRUTH)
def test_the_published_files_themselves(name: str) -> None:
    """Copies of the real files pass the catalogue's checksum and give the prompts that were published."""
    source = DATA / TRUTH[name]
    put(name, source.read_bytes())
    found = load_prompts(name)
    if source.suffix == ".json":
        entries = json.loads(source.read_text())
        assert found.prompts == [entry["text"] for entry in entries]
        assert [m["image"] for m in found.metadata] == [entry["image"] for entry in entries]
    else:
        with source.open(encoding="utf-8", newline="\n") as lines:
            assert found.prompts == list(dict.fromkeys(line.strip() for line in lines if line.strip()))
    assert len(found) == CATALOGUE[name].count
    if CATALOGUE[name].quoted:
        targets = [re.findall(r'"([^"]*)"', prompt)[0] for prompt in found.prompts]
        assert [m["target"] for m in found.metadata] == targets


@pytest.mark.skipif(not DATA.is_dir(), reason="the published files are not here")
def test_repeated_prompts_are_one(tmp_path: Path) -> None:
    """DrawBench is published with every prompt five times."""
    lines = (DATA / "drawbench_unique_200.txt").read_text().splitlines()
    found = load_prompts(write(tmp_path / "five.txt", "\n".join(lines * 5)))
    assert found.prompts == [line.strip() for line in lines]
    assert len(found) == CATALOGUE["drawbench"].count


def test_a_set_may_be_the_beginning_of_a_file(monkeypatch: pytest.MonkeyPatch) -> None:
    entry = CATALOGUE["imagenet_animals"]
    content = "".join(f"class {i}\n" for i in range(1000)).encode()
    own = Entry(entry.what, entry.count, entry.url, checksum(content, "sha256"), entry.licence, first=entry.first)
    monkeypatch.setitem(PUBLISHED, "imagenet_animals", PublishedSet("imagenet_animals", own))
    put("imagenet_animals", content)
    assert load_prompts("imagenet_animals").prompts == [f"class {i}" for i in range(398)]
