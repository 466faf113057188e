"""An output depends on what is converted, not on where it lies, what that is called or who asks."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

Call = Callable[..., tuple[int, str, str]]


def bytes_of(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


@pytest.mark.parametrize("recipe", ["rtn", "gptq"])
def test_equal_inputs_give_equal_bytes_wherever_they_lie(
    pq: Call,
    tiny: Callable[..., Path],
    text_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    recipe: str,
):
    made = []
    for place, model, output in (("one", "model", "out"), ("two words/b", "Llama-9 B", "x/y.z")):
        here = tmp_path / place
        here.mkdir(parents=True)
        shutil.copytree(tiny("llama"), here / model)
        (here / model / "additional_chat_templates").mkdir()
        (here / model / "additional_chat_templates" / "rag.jinja").write_text("{{ messages }}")
        (here / "texts").mkdir()
        shutil.copy(text_file, here / "texts" / "a.txt")
        monkeypatch.chdir(here)
        told = ["--dataset", "texts/a.txt", "--nsamples", 4, "--seqlen", 32, "--device", "cpu"]
        code, _, err = pq("convert", "-m", model, "-r", recipe, "-o", output, *told)
        assert code == 0, err
        made.append(bytes_of(here / output))
        assert pq("verify", output, "--parent", here / model)[0] == 0
    assert made[0] == made[1]
    assert made[0]["additional_chat_templates/rag.jinja"] == b"{{ messages }}"
    assert not [name for name, raw in made[0].items() if str(tmp_path).encode() in raw]
