"""The tables of kept trials: what is printed of them, and what is refused."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def tables(*words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "benchmarks/tables.py", *words]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=120)


def write(folder: Path, name: str, **fields: object) -> None:
    trial = {"arm": "mean", "row": "mean", "values": {}, "candidate": "", "seed": 0, "scores": {"nq": [1.0, 0.0]}}
    rest = {"zero_shot": {}, "cost": None, "course": {}, "ownership": None, "ablations": {}, "checkpoint": None}
    (folder / f"{name}.json").write_text(json.dumps(trial | rest | fields))


@pytest.mark.parametrize("kept", sorted(path.name for path in (ROOT / "benchmarks/trials").iterdir()))
def test_every_kept_folder_has_a_table(kept: str) -> None:
    done = tables(f"benchmarks/trials/{kept}", "--rows", "mean")
    assert done.returncode == 0, done.stderr
    assert (done.stdout.splitlines()[1].split()[0], done.stdout.splitlines()[1].split()[-1]) == ("mean", "baseline")


def test_a_table_is_of_the_rows_that_are_named(tmp_path: Path) -> None:
    write(tmp_path, "a")
    write(tmp_path, "b", row="taco", arm="taco", scores={"nq": [1.0, 1.0]})
    write(tmp_path, "c", row="other", arm="other")
    done = tables(str(tmp_path), "--rows", "taco")
    assert [line.split()[:3] for line in done.stdout.splitlines()[1:3]] == [
        ["mean", "1", "50.0"],
        ["taco", "1", "100.0"],
    ]
    assert "other" not in done.stdout


def test_what_cannot_be_told_apart_or_is_not_there_is_refused(tmp_path: Path) -> None:
    write(tmp_path, "a")
    assert "no row 'taco'" in tables(str(tmp_path), "--rows", "taco").stderr
    write(tmp_path, "of-another-configuration", scores={"nq": [0.0, 0.0]})
    done = tables(str(tmp_path))
    assert done.returncode == 2
    assert f"{tmp_path}: two trials of row 'mean' and seed 0" in done.stderr
    assert "has no trials" in tables(str(tmp_path / "empty")).stderr
