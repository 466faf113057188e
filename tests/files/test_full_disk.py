"""A disk that is really full, at every stage of a conversion: one line, and after space is freed the same bytes.

The disk is a small tmpfs, which only root may mount (a container's root will do).
"""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import ModelMaker
from resumed import files_of, model_of

Call = Callable[..., tuple[int, str, str]]


class Disk:
    """A tmpfs of a given size."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def resize(self, kib: int) -> None:
        subprocess.run(
            ["mount", "-o", f"remount,size={kib}k", self.folder], check=True, capture_output=True
        )

    def names(self) -> set[str]:
        return {path.name for path in self.folder.iterdir()}


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    folder = tmp_path / "disk"
    folder.mkdir()
    try:
        subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=4k", "tmpfs", folder],
            check=True,
            capture_output=True,
        )
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("no file system can be mounted here; run as root")
    yield Disk(folder)
    subprocess.run(["umount", folder], check=True)


@pytest.fixture
def told(tiny: ModelMaker, text_file: Path) -> list[object]:
    """A conversion whose output takes about 530 KiB, its state less than 100."""
    model = ["--model", model_of(tiny, "gptq"), "--recipe", "gptq", "--device", "cpu"]
    return ["convert", *model, "--dataset", text_file, "--nsamples", 4, "--seqlen", 32]


@pytest.fixture
def whole(pq: Call, told: list[object], tmp_path: Path) -> dict[str, bytes]:
    assert pq(*told, "-o", tmp_path / "whole", "--resume", "never")[0] == 0
    return files_of(tmp_path / "whole")


def test_a_full_disk_at_every_stage(
    pq: Call, told: list[object], whole: dict[str, bytes], disk: Disk
):
    """The log takes the first page; each size ends the next attempt at another file."""
    met, output = [], disk.folder / "out"
    for kib in (4, 16, 128, 216, 272, 380, 464, 492, 540, 596):
        disk.resize(kib)
        code, out, err = pq(*told, "-o", output)
        assert (code, out) == (6, ""), err
        line = err.splitlines()[-1]
        assert line.startswith(f"pq: error: {output}.work")
        assert line.endswith("no space left on the disk; free some or give another --output")
        assert disk.names() <= {"out.log", "out.work"}
        kept = (disk.folder / "out.work" / "state.json").exists()
        assert kept == ("out.work" in disk.names())
        assert kept or not any(met)
        met.append(kept)
    assert met[0] is False
    assert met[-1] is True
    disk.resize(8192)
    code, _, err = pq(*told, "-o", output, "--resume", "required")
    assert code == 0, err
    assert "goes on after block 3" in err
    assert files_of(output) == whole
    assert disk.names() == {"out", "out.log", "out.report.html", "out.report.json"}


@pytest.mark.parametrize("kib", [4, 64, 300, 500, 560])
def test_a_full_disk_without_state_leaves_nothing(
    pq: Call, told: list[object], disk: Disk, kib: int
):
    disk.resize(kib)
    code, _, err = pq(*told, "-o", disk.folder / "out", "--resume", "never")
    # The log begins with the first block.
    assert (code, disk.names()) == (6, {"out.log"} if kib > 64 else set()), err
    assert "no space left on the disk" in err


def test_a_full_disk_at_the_commit(
    pq: Call, told: list[object], whole: dict[str, bytes], disk: Disk, tmp_path: Path
):
    """The state lies on another disk, so that the commit must copy what was collected there."""
    disk.resize(256)
    apart = ["-o", disk.folder / "out", "--work", tmp_path / "work"]
    code, _, err = pq(*told, *apart)
    assert (code, disk.names()) == (6, {"out.log"}), err
    assert "no space left on the disk" in err
    disk.resize(8192)
    code, _, err = pq(*told, *apart, "--resume", "required")
    assert code == 0, err
    assert files_of(disk.folder / "out") == whole
    assert not (tmp_path / "work").exists()


def test_a_report_that_does_not_fit_costs_no_conversion(
    pq: Call, told: list[object], whole: dict[str, bytes], disk: Disk
):
    disk.resize(660)
    code, _, err = pq(*told, "-o", disk.folder / "out")
    assert code == 0, err
    assert "warning: the report was not written" in err
    assert files_of(disk.folder / "out") == whole


def test_results_of_eval_that_do_not_fit(pq: Call, tiny: ModelMaker, text_file: Path, disk: Disk):
    told = [
        "eval",
        tiny("llama"),
        "--dataset",
        text_file,
        "--seqlen",
        32,
        "--max-windows",
        2,
        "--device",
        "cpu",
    ]
    code, _, err = pq(*told, "--output-path", disk.folder / "results")
    assert code == 6, err
    assert "no space left on the disk" in err
    assert {path.suffix for path in disk.folder.rglob("*") if path.is_file()} <= {".parquet"}


def test_a_disk_mounted_read_only(pq: Call, told: list[object], disk: Disk):
    (disk.folder / "out").mkdir()
    subprocess.run(["mount", "-o", "remount,ro", disk.folder], check=True)
    for output in (disk.folder / "out", disk.folder / "new", disk.folder / "deep" / "er"):
        code, _, err = pq(*told, "-o", output)
        assert (code, err.count("\n"), disk.names()) == (6, 1, {"out"}), err
        assert "cannot be written to; give another --output" in err
