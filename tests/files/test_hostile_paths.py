"""Outputs, models and recipes at places that cannot be, or must not be, written or read."""

from __future__ import annotations

import os
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from conftest import ModelMaker, request_for
from hostile import Call, files_below, refused

from quantize.conversion.loop import convert
from quantize.errors import OutputError, UsageError
from quantize.files.transaction import require_free
from quantize.verification import verify

NOBODY = 65534


@pytest.fixture
def here(tmp_path: Path) -> Path:
    (tmp_path / "here").mkdir()
    return tmp_path / "here"


# Outputs


@pytest.mark.parametrize("name", ["x" * 225, "ü" * 120, "x" * 300, "bad\udcff"])
def test_names_that_no_file_beside_the_output_could_have(
    pq: Call, tiny: ModelMaker, here: Path, name: str
):
    refused(pq, 6, "give", tiny("llama"), here / name, "-r", "rtn")


@pytest.mark.parametrize("output", [".", "", "/", "..", "x/.."])
def test_outputs_without_a_name(
    pq: Call, tiny: ModelMaker, here: Path, monkeypatch: pytest.MonkeyPatch, output: str
):
    (here / "x").mkdir()
    monkeypatch.chdir(here)
    code, _, err = pq("convert", "-m", tiny("llama"), "-r", "rtn", "-o", output, "--device", "cpu")
    assert (code, [path.name for path in here.iterdir()]) == (6, ["x"])
    assert "has no name of its own; give the path of a new folder" in err


def test_paths_that_are_too_long(pq: Call, tiny: ModelMaker, here: Path):
    deep = here.joinpath(*["d" * 200] * 25)
    code, _, err = pq("convert", "-m", tiny("llama"), "-r", "rtn", "-o", deep, "--device", "cpu")
    assert (code, err.count("\n"), list(here.iterdir())) == (6, 1, [])
    for model in ("x" * 5000, "/" + "x" * 300, str(deep)):
        code, _, err = pq(
            "convert", "-m", model, "-r", "rtn", "-o", here / "out", "--device", "cpu"
        )
        assert (code, err.count("\n"), list(here.iterdir())) == (4, 1, [])
        assert len(err) < 400 + len(str(here))


@pytest.mark.parametrize("target", ["empty", "nowhere", "out"])
def test_an_output_that_is_a_link(pq: Call, tiny: ModelMaker, here: Path, target: str):
    """Renaming onto it would replace the link or fail, when all work is done."""
    (here / "empty").mkdir()
    (here / "out").symlink_to(here / target)
    before = files_below(here)
    code, _, err = pq(
        "convert", "-m", tiny("llama"), "-r", "rtn", "-o", here / "out", "--device", "cpu"
    )
    assert (code, files_below(here)) == (6, before)
    assert "is a link; give the folder itself" in err


@pytest.mark.parametrize("output", ["/proc/pq-out", "/dev/full", "/dev/null/out"])
def test_places_that_are_no_disk(pq: Call, tiny: ModelMaker, output: str):
    if not Path(output).parent.exists():
        pytest.skip(f"{Path(output).parent} is absent")
    code, _, err = pq("convert", "-m", tiny("llama"), "-r", "rtn", "-o", output, "--device", "cpu")
    assert (code, err.count("\n")) == (6, 1), err


@pytest.mark.parametrize("name", ["", "out", "deep/er/out"])
def test_outputs_within_the_source(pq: Call, tiny: ModelMaker, tmp_path: Path, name: str):
    model = Path(shutil.copytree(tiny("llama"), tmp_path / "model"))
    (tmp_path / "link").symlink_to(model)
    before = files_below(tmp_path)
    for parent in (model, tmp_path / "link", model / ".." / "model"):
        code, _, err = pq(
            "convert", "-m", model, "-r", "rtn", "-o", parent / name, "--device", "cpu"
        )
        assert (code, files_below(tmp_path)) == (2 if name else 6, before), err
        assert err.count("\n") == 1
    with pytest.raises(OutputError if not name else UsageError):
        convert(request_for(model, "rtn", model / name, tmp_path / "none.txt"))


@pytest.mark.parametrize(
    ("work", "says"), [("model/w", "lies in the model's folder"), ("out", "lies in --output")]
)
def test_work_folders_that_are_in_the_way(
    pq: Call, tiny: ModelMaker, tmp_path: Path, work: str, says: str
):
    model = Path(shutil.copytree(tiny("llama"), tmp_path / "model"))
    before = files_below(tmp_path)
    told = [
        "-m",
        model,
        "-r",
        "rtn",
        "-o",
        tmp_path / "out",
        "--work",
        tmp_path / work,
        "--device",
        "cpu",
    ]
    code, _, err = pq("convert", *told)
    assert (code, files_below(tmp_path)) == (2, before)
    assert says in err


def test_line_feeds_and_escapes_in_paths(pq: Call, tiny: ModelMaker, tmp_path: Path):
    model = Path(shutil.copytree(tiny("llama"), tmp_path / "a\nmodel \x1b[31m"))
    output = tmp_path / "line\nfeed" / "o\nut\t'\""
    code, _, err = pq("convert", "-m", model, "-r", "rtn", "-o", output, "--device", "cpu")
    assert code == 0, err
    assert verify(output).ok
    (model / "config.json").write_text("{")
    refused(
        pq,
        4,
        "config.json: cannot be read as JSON",
        model,
        tmp_path / "line\nfeed" / "two" / "x",
        "-r",
        "rtn",
    )
    code, _, err = pq("verify", model)
    assert (code, err.count("\n"), "\x1b" in err) == (7, 1, False)


# Without permission


@contextmanager
def nobody() -> Iterator[None]:
    """Work as a user who owns nothing: permission bits do not bind root."""
    if os.geteuid() != 0:
        yield
        return
    os.setresgid(NOBODY, NOBODY, 0)
    os.setresuid(NOBODY, NOBODY, 0)
    try:
        yield
    finally:
        os.setresuid(0, 0, 0)
        os.setresgid(0, 0, 0)


@pytest.fixture
def public(pq: Call, tiny: ModelMaker) -> Iterator[Path]:
    """A folder that everyone may enter, with a readable copy of a model."""
    folder = Path(tempfile.mkdtemp(prefix="pq-public-"))
    shutil.copytree(tiny("llama"), folder / "model")
    for path in (folder, *folder.rglob("*")):
        path.chmod(0o755)
    # What is imported on the way must be there before the user changes, who may not read the packages.
    assert (
        pq(
            "convert",
            "-m",
            folder / "model",
            "-r",
            "rtn",
            "-o",
            folder / "first",
            "--device",
            "cpu",
        )[0]
        == 0
    )
    yield folder
    for path in (folder, *folder.rglob("*")):
        path.chmod(0o755)
    shutil.rmtree(folder)


def test_a_parent_that_may_not_be_written_to(pq: Call, public: Path):
    closed = public / "closed"
    (closed / "out").mkdir(parents=True)
    for folder in (closed / "out", closed):
        folder.chmod(0o555)
    for output in (closed / "new", closed / "out", closed / "deep" / "er"):
        with nobody():
            code, _, err = pq(
                "convert", "-m", public / "model", "-r", "rtn", "-o", output, "--device", "cpu"
            )
        assert (code, err.count("\n")) == (6, 1), err
        assert "cannot be written to; give another --output" in err
    assert [path.name for path in closed.iterdir()] == ["out"]


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("config.json", "config.json: cannot be read as JSON ([Errno 13] Permission denied"),
        ("model.safetensors", "model.safetensors: not a readable safetensors file ("),
        ("LICENSE", "LICENSE: may not be read; change its permissions"),
        ("", "cannot be "),
    ],
)
def test_a_source_that_may_not_be_read(pq: Call, public: Path, name: str, says: str):
    (public / "free").mkdir()
    (public / "free").chmod(0o777)
    (public / "model" / name).chmod(0)
    told = ["-m", public / "model", "-r", "rtn", "-o", public / "free" / "out", "--device", "cpu"]
    with nobody():
        code, _, err = pq("convert", *told)
    assert (code, err.count("\n")) == (4, 1), err
    assert says in err
    assert not list((public / "free").iterdir())


# Recipes


@pytest.mark.parametrize(
    ("name", "raw", "says"),
    [
        ("folder", None, "is a folder and no shipped recipe of that name"),
        ("empty.yaml", b"", "the file is empty; begin with 'description: ...'"),
        ("binary.yaml", bytes(range(128)), "is not allowed"),
        ("latin.yaml", b"description: \xe9", "is not UTF-8; save it as UTF-8"),
        ("bomb.yaml", b"a: &a [x, x]\nb: &b [*a, *a]\nc: [*b, *b]", "anchor '&a' is refused"),
        (
            "layer.yaml",
            b"description: d\nstages: [{method: rtn, layers: ['*.9.*']}]",
            "matches no linear",
        ),
    ],
)
def test_recipes_that_are_none(
    pq: Call, tiny: ModelMaker, here: Path, name: str, raw: bytes | None, says: str
):
    path = here.parent / name
    if raw is None:
        path.mkdir()
    else:
        path.write_bytes(raw)
    code, _, err = pq(
        "convert", "-m", tiny("llama"), "-r", path, "-o", here / "out", "--device", "cpu"
    )
    assert code == (4 if name == "layer.yaml" else 3), err
    assert says in err
    assert not list(here.iterdir())


def test_a_recipe_may_come_through_a_pipe(pq: Call, tiny: ModelMaker, here: Path):
    os.mkfifo(here.parent / "pipe.yaml")
    text = "description: d\nstages: [{method: rtn}]"
    writer = threading.Thread(
        target=lambda: (here.parent / "pipe.yaml").write_text(text), daemon=True
    )
    writer.start()
    code, _, err = pq(
        "convert", "-m", tiny("llama"), "-r", here.parent / "pipe.yaml", "-o", here / "out"
    )
    assert code == 0, err
    writer.join(timeout=10)


def test_require_free_looks_at_names_first(tmp_path: Path):
    with pytest.raises(OutputError, match="too long"):
        require_free(tmp_path / ("y" * 4000))
    check: Callable[[Path], None] = require_free
    check(tmp_path / ("y" * 224))
