"""Published prompt sets come whole and with the right checksum or not at all; the command that fetches them."""

from __future__ import annotations

import hashlib
import json
import re
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from vmpo.errors import UserError
from vmpo.prompts import download as download_module
from vmpo.prompts import load_prompts
from vmpo.prompts.catalogue import CATALOGUE, Entry
from vmpo.prompts.download import cache_folder, checksum
from vmpo.prompts.published import PUBLISHED, PublishedSet

Vmpo = Callable[..., tuple[int, list[str], str]]
DATA = Path(__file__).resolve().parents[3] / "shared" / "data"
CONTENT = b'a mug that says "TEA"\na grey owl\na mug that says "TEA"\n'
SHA256 = "sha256:" + hashlib.sha256(CONTENT).hexdigest()


class Server:
    """A local server: /good, and ways to fail; counts the requests of each path."""

    def __init__(self) -> None:
        self.hits: Counter[str] = Counter()
        owner = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                name = self.path.split("/")[1].removesuffix(".txt")
                owner.hits[name] += 1
                owner.answer(self, name, owner.hits[name])

            def log_message(self, format: str, *args: object) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self.http.server_address[1]}"

    def answer(self, request: BaseHTTPRequestHandler, name: str, hit: int) -> None:
        status, body, length = 200, CONTENT, len(CONTENT)
        if name == "absent":
            status, body, length = 404, b"no", 2
        elif name == "busy" and hit < 3:
            status, body, length = 503, b"", 0
        elif name == "short" or (name == "short_once" and hit == 1):
            body = CONTENT[:20]
        elif name == "changed":
            body = CONTENT[::-1]
        elif name == "silent":
            time.sleep(0.5)
            return
        request.send_response(status)
        request.send_header("Content-Length", str(length))
        request.end_headers()
        request.wfile.write(body)


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server()
    thread = threading.Thread(target=server.http.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    yield server
    server.http.shutdown()
    server.http.server_close()
    thread.join()


@pytest.fixture(autouse=True)
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """An empty cache, and leave to go to the network; no test here leaves this machine."""
    monkeypatch.setenv("VMPO_CACHE", str(tmp_path / "cache"))
    for variable in ("HF_HUB_OFFLINE", "HF_ENDPOINT", "http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(download_module, "WAITS", (0.0, 0.0, 0.0))
    return tmp_path / "cache"


@pytest.fixture
def publish(monkeypatch: pytest.MonkeyPatch, server: Server) -> Callable[..., PublishedSet]:
    """Adds a set to the catalogue whose home is the local server."""

    def add(path: str, expected: str = SHA256, name: str = "owls/train", quoted: bool = False) -> PublishedSet:
        entry = Entry("owls", 2, f"{server.address}/{path}.txt", expected, "MIT", quoted=quoted)
        monkeypatch.setitem(PUBLISHED, name, PublishedSet(name, entry))
        return PUBLISHED[name]

    return add


def files(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.rglob("*") if p.is_file())


# --- downloads --------------------------------------------------------------------------------------------------------


def test_a_set_is_fetched_once_and_then_read_from_the_cache(publish, server: Server, cache: Path) -> None:
    published = publish("good", quoted=True)
    first, again = load_prompts("owls/train"), load_prompts("owls/train")
    assert first == again
    assert first.prompts == ['a mug that says "TEA"', "a grey owl"]
    assert first.metadata == [{"target": "TEA"}, {"target": ""}]
    assert server.hits == {"good": 1}
    assert published.file == cache / "prompts" / "owls" / "train.txt"
    assert published.file.read_bytes() == CONTENT


def test_the_name_that_git_gives_a_file_is_a_checksum(publish, server: Server, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(CONTENT)
    found = subprocess.run(["git", "hash-object", file], capture_output=True, text=True, check=True).stdout.strip()
    assert checksum(CONTENT, "git") == f"git:{found}"
    publish("good", f"git:{found}")
    assert len(load_prompts("owls/train")) == 2
    publish("good", "git:" + "0" * 40, name="owls/test")
    with pytest.raises(UserError, match=found):
        load_prompts("owls/test")


@pytest.mark.parametrize(
    ("path", "expected", "requests", "wanted"),
    [
        ("absent", SHA256, 1, "answered 404"),
        ("short", SHA256, 4, "broke off after 20 of 55 bytes"),
        ("good", "sha256:" + "0" * 64, 1, f"{SHA256}, not sha256:0000"),
    ],
)
def test_what_fails_leaves_nothing(
    publish, server: Server, cache: Path, path: str, expected: str, requests: int, wanted: str
) -> None:
    published = publish(path, expected)
    with pytest.raises(UserError) as error:
        load_prompts("owls/train")
    message = str(error.value)
    assert "\n" not in message
    for text in ("prompt set 'owls/train'", server.address, wanted, "vmpo prompts owls/train", str(published.file)):
        assert text in message
    assert server.hits == {path: requests}
    assert files(cache) == []


@pytest.mark.parametrize(("path", "requests"), [("short_once", 2), ("busy", 3)])
def test_what_passes_is_tried_again(publish, server: Server, path: str, requests: int) -> None:
    publish(path)
    assert len(load_prompts("owls/train")) == 2
    assert server.hits == {path: requests}


def test_a_server_that_keeps_silent(publish, monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    monkeypatch.setattr(download_module, "TIMEOUT", 0.1)
    publish("silent")
    with pytest.raises(UserError, match="timed out"):
        load_prompts("owls/train")
    assert files(cache) == []


def test_nobody_listens(publish, server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    publish("good")
    server.http.server_close()
    with pytest.raises(UserError, match="Connection refused"):
        load_prompts("owls/train")


def test_an_interrupted_download_leaves_nothing(publish, cache: Path) -> None:
    publish("good")

    def stop(done: int, total: int | None) -> None:
        assert (done, total) == (55, 55)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        load_prompts("owls/train", stop)
    assert files(cache) == []
    assert len(load_prompts("owls/train")) == 2


def test_a_folder_that_cannot_be_written(publish, cache: Path) -> None:
    publish("good")
    cache.write_text("a file in the folder's place")
    with pytest.raises(UserError, match=r"cannot write .* VMPO_CACHE"):
        load_prompts("owls/train")


def test_processes_that_fetch_at_the_same_time(publish, cache: Path) -> None:
    publish("good")
    lengths: list[int] = []
    threads = [threading.Thread(target=lambda: lengths.append(len(load_prompts("owls/train")))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert lengths == [2] * 8
    assert files(cache) == ["train.txt"]


def test_without_a_checksum_the_first_download_is_trusted_and_remembered(
    publish, server: Server, cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    published = publish("good", "")
    load_prompts("owls/train")
    assert "no checksum is known" in caplog.text
    assert published.file.with_name("train.txt.sha256").read_text().strip() == SHA256
    caplog.clear()
    load_prompts("owls/train")
    assert caplog.text == ""
    published.file.write_bytes(CONTENT + b"one more\n")
    with pytest.raises(UserError, match="delete it"):
        load_prompts("owls/train")
    published.file.unlink()
    publish("changed", "")  # what is at the home now is not what was there at first
    with pytest.raises(UserError, match=f"not {SHA256}"):
        load_prompts("owls/train")
    assert files(cache) == ["train.txt.sha256"]


def test_a_changed_file_in_the_cache_is_not_used(publish, server: Server) -> None:
    published = publish("good")
    load_prompts("owls/train")
    published.file.write_text("another prompt\n")
    with pytest.raises(UserError, match=r"changed or damaged.*delete it.*vmpo prompts owls/train"):
        load_prompts("owls/train")
    assert server.hits == {"good": 1}


def test_offline(publish, server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    published = publish("good")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UserError) as error:
        load_prompts("owls/train")
    for text in ("HF_HUB_OFFLINE", "vmpo prompts owls/train", f"{server.address}/good.txt", str(published.file)):
        assert text in str(error.value)
    assert not server.hits
    published.file.parent.mkdir(parents=True)
    published.file.write_bytes(CONTENT)  # as the message says
    assert len(load_prompts("owls/train")) == 2


def test_the_hub_may_have_a_mirror(server: Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_ENDPOINT", server.address + "/")
    download_module.download("https://huggingface.co/good.txt", tmp_path / "file", SHA256)
    assert server.hits == {"good": 1}


@pytest.mark.parametrize(
    ("variables", "folder"),
    [
        ({"VMPO_CACHE": "/a/b", "XDG_CACHE_HOME": "/x"}, "/a/b"),
        ({"XDG_CACHE_HOME": "/x"}, "/x/vmpo"),
        ({"HOME": "/home/me"}, "/home/me/.cache/vmpo"),
    ],
)
def test_where_the_cache_is(monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], folder: str) -> None:
    for name in ("VMPO_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert cache_folder() == Path(folder)


# --- the command ------------------------------------------------------------------------------------------------------


def test_list(vmpo: Vmpo, publish) -> None:
    publish("good")
    code, errors, text = vmpo("prompts")
    assert (code, errors) == (0, [])
    for name in (*CATALOGUE, "glyphs/train", "owls/train"):
        assert re.search(rf"^ {re.escape(name)} +~?[\d,]+ +(no|ships)", text, flags=re.MULTILINE), name
    assert f"{len(PUBLISHED)} of {len(PUBLISHED)} not in the cache" in text
    load_prompts("owls/train")
    assert re.search(r"^ owls/train +2 +yes", vmpo("prompts")[2], flags=re.MULTILINE)


def test_fetch_show_and_write(vmpo: Vmpo, publish, tmp_path: Path) -> None:
    publish("good", quoted=True)
    code, errors, text = vmpo("prompts", "owls/train", "glyphs/test")
    assert (code, errors) == (0, [])
    assert text.splitlines()[:3] == ["owls/train: 2 prompts", '  a mug that says "TEA"', "  a grey owl"]
    assert "glyphs/test: 288 prompts" in text
    for suffix in (".txt", ".jsonl"):
        out = tmp_path / f"copy{suffix}"
        code, errors, text = vmpo("prompts", "owls/train", "--out", out)
        assert (code, errors) == (0, [])
        assert str(out) in text.replace("\n", "")
        assert load_prompts(str(out)).prompts == load_prompts("owls/train").prompts
    assert [m["target"] for m in load_prompts(str(tmp_path / "copy.jsonl")).metadata] == ["TEA", ""]


def test_fetch_all_goes_on_after_a_failure(vmpo: Vmpo, publish, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(PUBLISHED):
        monkeypatch.delitem(PUBLISHED, name)
    publish("absent", name="a/lost")
    publish("good", name="b/found")
    code, errors, text = vmpo("prompts", "--all")
    assert code == 2
    assert errors == ["vmpo: 1 of 2 sets could not be fetched: a/lost"]
    assert "answered 404" in text
    assert "b/found: 2 prompts" in text


def test_mistakes_of_the_command(vmpo: Vmpo, publish, tmp_path: Path) -> None:
    publish("good")
    file = tmp_path / "own.json"
    file.write_text(json.dumps(["two\nlines"]))
    for words, wanted in [
        (["ocr/tran"], "did you mean 'ocr/train'?"),
        (["--out", tmp_path / "x.txt"], "--out takes the prompts of one set"),
        (["owls/train", "glyphs/test", "--out", tmp_path / "x.txt"], "--out takes the prompts of one set"),
        (["owls/train", "--out", tmp_path / "own.json" / "x.txt"], "cannot write"),
    ]:
        code, errors, _ = vmpo("prompts", *words)
        assert code == 2
        assert len(errors) == 1
        assert wanted in errors[0]
    assert "line break" in vmpo("prompts", file, "--out", tmp_path / "x.txt")[1][0]
    assert files(tmp_path) == ["own.json", "train.txt"]
