from __future__ import annotations

import builtins
import hashlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pyarrow as pa
import pyarrow.parquet as parquet
import pytest
from hub_server import point_to, serve_hub

from quantize.calibration import text_sources
from quantize.calibration.chats import Chat
from quantize.calibration.text_sources import Purpose, Text
from quantize.errors import DataError
from quantize.files.resources import data_dir


def read(
    dataset: object,
    purpose: Purpose = "calibration",
    field: str | None = None,
    limit: int | None = 128,
) -> Text:
    return text_sources.load(str(dataset), purpose, field, limit)


def refusal(
    dataset: object,
    purpose: Purpose = "calibration",
    field: str | None = None,
    limit: int | None = 128,
) -> str:
    with pytest.raises(DataError) as caught:
        read(dataset, purpose, field, limit)
    assert "\n" not in str(caught.value)
    return str(caught.value)


COMMIT = "beef" * 10


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Stand in for `datasets`: records the calls, gives the rows, or raises the error."""
    fake = SimpleNamespace(calls=[], rows=[], error=None, taken=0)

    def load_dataset(path: str, name: str | None, **options: object) -> Iterator[dict[str, object]]:
        fake.calls.append((path, name, options))
        for row in fake.rows:
            fake.taken += 1
            yield row
        # Last, so that an error in the midst of a stream counts too.
        if fake.error is not None:
            raise fake.error

    module = ModuleType("datasets")
    module.load_dataset = load_dataset  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "datasets", module)
    fake.module = module
    monkeypatch.setattr("quantize.files.hub.dataset_commit", lambda name, revision: COMMIT)
    return fake


# ---- files ----


@pytest.mark.parametrize(
    ("dataset", "name"),
    [
        ("/some/where/text.txt", "text.txt"),
        ("~/rows.JSONL", "rows.JSONL"),
        ("rows.parquet", "rows.parquet"),
        ("builtin", "builtin"),
        ("wikitext2", "wikitext2"),
        ("org/name:config:split", "org/name:config:split"),
    ],
)
def test_files_alone_lose_their_folder(dataset: str, name: str) -> None:
    assert text_sources.name_of(dataset) == name


def test_text_file_keeps_line_ends_and_drops_the_byte_order_mark(tmp_path: Path) -> None:
    file = tmp_path / "A.TXT"
    file.write_bytes("\ufeffone\r\ntwo\u2028é".encode())
    text = read(file)
    assert (text.rows, text.packing, text.source) == (["one\r\ntwo\u2028é"], "stream", "A.TXT")
    assert text.origin["text_sha256"] == hashlib.sha256(file.read_bytes()).hexdigest()


def test_jsonl_lines_end_only_at_line_feeds(tmp_path: Path) -> None:
    rows = ["one\u2028two", "", "three\u0085"]
    file = tmp_path / "a.jsonl"
    file.write_text(
        "\n".join(json.dumps({"text": row}, ensure_ascii=False) for row in rows), encoding="utf-8"
    )
    assert (read(file).rows, read(file).packing) == (rows, "packed")


def test_parquet_gives_chat_messages(tmp_path: Path) -> None:
    chat = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]
    parquet.write_table(pa.table({"messages": [chat, chat]}), tmp_path / "a.parquet")
    text = read(tmp_path / "a.parquet", field="messages")
    assert text.rows == [Chat(chat), Chat(chat)]
    assert text.origin["rows"] == 2


@pytest.mark.parametrize(
    ("name", "data", "words"),
    [
        ("a.txt", b"", ["a.txt", "empty"]),
        ("a.txt", b" \n\n", ["white space"]),
        ("a.txt", b"ab\0c", ["binary"]),
        ("a.txt", b"one\ntwo \xff", ["line 2", "UTF-8"]),
        ("a.csv", b"text\nabc", [".csv", ".parquet"]),
        ("a.jsonl", b'{"text": "a"}\n\n{"text": ', ["line 3", "not JSON"]),
        ("a.jsonl", b"[" * 100_000, ["line 1", "not JSON"]),
        ("a.jsonl", b'{"text": "a"}\n["b"]', ["line 2", "list"]),
        ("a.jsonl", b'{"body": "a", "id": 3}', ["line 1", "'text'", "body, id"]),
        ("a.jsonl", b'{"text": 3}', ["line 1", "int"]),
        ("a.jsonl", b'{"text": null}', ["every one of its 1 rows", "text"]),
        ("a.jsonl", b'{"text": []}', ["every one of its 1 rows", "text"]),
        ("a.jsonl", b'"a text"', ["line 1", "str instead of a JSON object"]),
        ("a.json", b'[{"text": "a"}', ["a.json", "not JSON"]),
        ("a.json", b"3", ["int", "array of rows"]),
        ("a.json", b'[{"text": "a"}, 3]', ["row 2", "int"]),
        ("a.jsonl.gz", b'{"text": "a"}', ["damaged"]),
        ("a.jsonl", b'{"text": "\\ud800"}', ["line 1", "surrogate"]),
        ("a.jsonl", b'{"text": [{"who": "user", "value": "a"}]}', ["line 1", "role"]),
        ("a.parquet", b"PAR1 not at all", ["a.parquet", "not a readable parquet"]),
        ("a.parquet", b"", ["empty"]),
    ],
)
def test_broken_files_are_one_line_errors(
    tmp_path: Path, name: str, data: bytes, words: list[str]
) -> None:
    (tmp_path / name).write_bytes(data)
    text = refusal(tmp_path / name)
    assert not [word for word in words if word not in text], text


def test_broken_parquet_columns(tmp_path: Path) -> None:
    file = tmp_path / "a.parquet"
    parquet.write_table(pa.table({"text": [1, 2], "body": ["a", "b"]}), file)
    assert "row 1" in refusal(file)
    assert "text, body" in refusal(file, field="txt")
    parquet.write_table(pa.table({"text": pa.array([], pa.string())}), file)
    assert "no rows" in refusal(file)


@pytest.mark.parametrize(
    ("dataset", "words"),
    [
        ("wikitxt2", ["did you mean 'wikitext2'?", "builtin, c4, pile, wikitext2"]),
        ("no such thing", ["unknown", "wikitext2"]),
        ("", ["unknown"]),
        ("a\0b", ["unknown"]),
        ("x" * 5000, ["unknown"]),
        ("data/missing.txt", ["no such file"]),
        ("/missing", ["no such file"]),
        ("~/missing/set", ["no such file"]),
    ],
)
def test_unknown_names(hub: SimpleNamespace, dataset: str, words: list[str]) -> None:
    text = refusal(dataset)
    assert not [word for word in words if word not in text], text
    assert not hub.calls


def test_folder_is_named(tmp_path: Path) -> None:
    assert "is a folder" in refusal(tmp_path)


# ---- Hub ----


def test_shipped_sets_are_valid_and_listed() -> None:
    sets = text_sources.named_sets()
    assert set(sets) == {"c4", "pile", "wikitext2"}
    readme = (data_dir("calib_data") / "README.md").read_text(encoding="utf-8")
    for name, entry in sets.items():
        assert (data_dir("calib_data") / f"{name}.yaml").is_file()
        assert entry.licence
        assert entry.url == f"https://huggingface.co/datasets/{entry.hub_id}"
        assert f"| `{name}` | [{entry.hub_id}]({entry.url})" in readme


def test_wikitext2_is_read_whole(hub: SimpleNamespace) -> None:
    hub.rows = [{"text": row} for row in ["", " = A = \n", "body\n"]]
    text = read("wikitext2", "evaluation", limit=None)
    options = {"split": "test", "data_files": None, "revision": COMMIT, "streaming": False}
    assert hub.calls == [("Salesforce/wikitext", "wikitext-2-raw-v1", options)]
    assert (text.rows, text.packing, text.joiner) == (["", " = A = \n", "body\n"], "stream", "\n\n")
    assert text.origin["text_sha256"] == hashlib.sha256(b"\0 = A = \n\0body\n").hexdigest()
    assert text.origin["licence"] == "CC-BY-SA-3.0 and GFDL"
    assert len(read("wikitext2", limit=1).rows) == 3


@pytest.mark.parametrize(
    ("purpose", "split", "file"),
    [
        ("calibration", "train", "en/c4-train.00000-of-01024.json.gz"),
        ("evaluation", "validation", "en/c4-validation.00000-of-00008.json.gz"),
    ],
)
def test_c4_asks_for_one_file_and_stops_reading(
    hub: SimpleNamespace, purpose: Purpose, split: str, file: str
) -> None:
    hub.rows = [{"text": f"{i:010d}", "url": "u"} for i in range(1000)]
    text = read("c4", purpose, limit=128)
    options = {"split": split, "data_files": {split: file}, "revision": COMMIT, "streaming": True}
    assert hub.calls == [("allenai/c4", None, options)]
    assert hub.taken == len(text.rows) == 13
    assert (text.origin["data_file"], text.origin["rows"]) == (file, 13)
    assert "limit the number of windows" in refusal("c4", purpose, limit=None)


@pytest.mark.parametrize(
    ("dataset", "config", "split"),
    [
        ("org/name", None, "train"),
        ("org/name:conf", "conf", "train"),
        ("org/name:conf:dev", "conf", "dev"),
        ("org/na.me-1::dev", None, "dev"),
    ],
)
def test_any_hub_name(hub: SimpleNamespace, dataset: str, config: str | None, split: str) -> None:
    hub.rows = [{"text": "some text"}] * 3
    text = read(dataset)
    path, name, options = hub.calls[0]
    assert (path, name, options["split"]) == (dataset.partition(":")[0], config, split)
    assert "trust_remote_code" not in options
    assert text.origin["split"] == split
    assert "no field 'body'; choose a text field among: text" in refusal(dataset, field="body")


@pytest.mark.parametrize(
    "error",
    [ConnectionError("Couldn't reach it\nlong story"), ValueError("Unknown split"), RuntimeError()],
)
def test_hub_out_of_reach_points_to_local_files(hub: SimpleNamespace, error: Exception) -> None:
    hub.rows, hub.error = [{"text": "first"}], error
    text = refusal("wikitext2")
    assert "give a local file" in text
    assert "wikitext2" in text
    assert "long story" not in text


def test_columns_of_a_hub_set_are_recognized(hub: SimpleNamespace) -> None:
    said = [{"from": "human", "value": "a question"}, {"from": "gpt", "value": "b" * 50}]
    hub.rows = [{"id": str(i) * 99, "conversations": said, "system": None} for i in range(1000)]
    text = read("org/name", limit=300)
    turns = [{"role": "user", "content": "a question"}, {"role": "assistant", "content": "b" * 50}]
    assert text.rows == [Chat(turns)] * len(text.rows)
    assert hub.taken == len(text.rows) == -(-300 // len(str(said)))
    assert (text.origin["text_field"], text.packing) == ("conversations", "packed")
    hub.rows = [{"label": 3}]
    assert "choose a text field among: label" in refusal("org/name")
    hub.rows = [{"text": None}, *[{"text": "some"}] * 3]
    assert read("org/name").rows == ["some"] * 3


@pytest.mark.parametrize(
    ("dataset", "asked", "rest"),
    [
        ("org/set", None, (None, "train")),
        ("org/set@v1", "v1", (None, "train")),
        ("org/set@refs/pr/2:conf:dev", "refs/pr/2", ("conf", "dev")),
    ],
)
def test_the_commit_of_a_set_is_found_read_and_recorded(
    hub: SimpleNamespace,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    dataset: str,
    asked: str | None,
    rest: tuple[str | None, str],
) -> None:
    monkeypatch.undo()
    monkeypatch.setitem(sys.modules, "datasets", hub.module)
    hub.rows = [{"text": "some text"}] * 3
    with serve_hub() as server:
        point_to(server, tmp_path, monkeypatch)
        main = server.put("datasets/org/set", tmp_path)
        other = server.put("datasets/org/set", tmp_path, asked or "unused")
        wanted = other if asked else main
        text = read(dataset)
        assert "no revision 'v9'" in refusal("org/set@v9")
        assert "not a data set on http://127.0.0.1" in refusal("org/other")
        server.repositories["datasets/org/set"].private = True
        assert "HF_TOKEN" in refusal("org/set")
        assert not caplog.records
        server.status = 503
        unknown = read(dataset)  # as `datasets` finds it in its own cache
    assert "cannot be asked which commit" in caplog.text
    path, config, options = hub.calls[0]
    assert (path, options["revision"]) == ("org/set", wanted)
    assert (config, options["split"]) == rest
    assert (text.origin["commit"], unknown.origin["commit"]) == (wanted, None)
    assert hub.calls[-1][2]["revision"] == asked
    assert text.source.startswith(f"org/set@{wanted[:7]}")


def test_pile_has_no_evaluation_split_and_empty_splits_are_named(hub: SimpleNamespace) -> None:
    assert "no split for evaluation" in refusal("pile", "evaluation")
    assert "has no rows" in refusal("pile")


def test_files_never_import_datasets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def guarded(name: str, *rest: object, **more: object) -> object:
        assert name.partition(".")[0] != "datasets"
        return real(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", guarded)
    (tmp_path / "a.jsonl").write_text('{"text": "some"}')
    assert read(tmp_path / "a.jsonl").rows == ["some"]
