"""Whole sweeps: every kind of arm, the table and the report; one with an arm that fails, one that is killed."""

import json
import os
import re
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import yaml
from job_process import running, until

from jobs.sweep import run
from taskspec import store
from taskspec.config import Config, with_values
from taskspec.errors import TrainingError

pytestmark = [pytest.mark.acceptance, pytest.mark.timeout(1500)]
ARMS = """
baseline: mean
arms:
  bm25: {lexical: true}
  mean: {set: {specialization.method: mean}}
  mean-owned: {set: {specialization.method: mean}, analyze: true, seeds: 1}
  single: {per_task: share, seeds: 1, set: {train.steps: 1}}
  taco: {grid: {specialization.strength: [0.0, 2.0]}}
  few: {held_out: [wow], choose: {train.learning_rate: [0.001, 0.002]}, seeds: 1}
"""


def written(tiny_config: Config, folder: Path, arms: str, values: dict[str, Any]) -> list[str]:
    """A configuration of three tasks, and arms, as files. Returns: `jobs.sweep`'s words for them."""
    three = [task for task in tiny_config.model_dump(mode="json")["tasks"] if task["name"] in ("fever", "nq", "wow")]
    changes = {"artifacts": str(folder / "artifacts"), "tasks": three, "train.workers": 1, **values}
    config = with_values(tiny_config, changes)
    (folder / "config.yaml").write_text(yaml.safe_dump(config.model_dump(mode="json")))
    (folder / "arms.yaml").write_text(arms)
    return ["--config", str(folder / "config.yaml"), "--arms", str(folder / "arms.yaml")]


def test_a_sweep_compares_its_arms_and_makes_again_only_what_is_missing(tiny_config, ray_cluster, tmp_path, capfd):
    values = {"train.steps": 4, "specialization.warmup": 0, "specialization.min_warmup_steps": 0}
    words = written(tiny_config, tmp_path, ARMS, values | {"sweep.seeds": [0, 1]})
    found = run(words)
    names = ["bm25", "mean", "mean-owned", "single", "taco strength=0", "taco strength=2", "few"]
    rows = {row["row"]: row for row in found["rows"]}
    assert list(rows) == names
    # strength 0 is mean, and an analysis changes nothing: the same runs, the same scores
    assert rows["taco strength=0"]["difference"]["mean"] == rows["mean-owned"]["difference"]["mean"] == 0
    assert set(found["recommended"]) == {"taco"}
    report = Path(found["uri"])
    assert "mean-owned" in report.read_text()
    assert {"strength.png", "ablation-1.png", "rows.csv", "zero-shot.csv", "cost.csv"} <= set(os.listdir(report.parent))
    said = capfd.readouterr().out
    assert said.count("row ") == 1
    assert "zero-shot R-precision %" in said
    assert re.search(r"^taco: (mean|strength \S+) is recommended: ", said, re.MULTILINE)

    artifacts = tmp_path / "artifacts"
    assert not [path for path in (artifacts / "sweep" / "indexes").rglob("*") if path.is_file()], (
        "removed when measured"
    )
    trials = {path: json.loads(path.read_text()) for path in (artifacts / "sweep" / "trials").glob("*.json")}
    assert len(trials) == 11
    of = {(trial["row"], trial["candidate"], trial["seed"]): path for path, trial in trials.items()}
    assert trials[of["single", "", 0]]["cost"]["retrievers"] == len(trials[of["single", "", 0]]["scores"]) == 3
    assert trials[of["few", "learning_rate=0.001", 0]]["zero_shot"].keys() == {"prompt", "no prompt"}
    assert trials[of["few", "learning_rate=0.001", 0]]["scores"].keys() == {"fever", "nq"}
    zero, mean = (trials[of[row, "", 1]]["checkpoint"] for row in ("taco strength=0", "mean"))
    assert trials[of["mean-owned", "", 0]]["checkpoint"] == trials[of["mean", "", 0]]["checkpoint"]
    mine, theirs = (safetensors.torch.load_file(store.join(uri, "model.safetensors")) for uri in (zero, mean))
    assert all(torch.equal(value, theirs[name]) for name, value in mine.items()), "strength 0 is mean, bit for bit"

    lost = of["mean-owned", "", 0]
    lost.unlink()
    shutil.rmtree(Path(trials[lost]["checkpoint"]).parent)
    again = run(words)
    assert "11 trials in" in (said := capfd.readouterr().out)
    assert "10 stand already" in said
    made = json.loads(lost.read_text())
    assert {key: made[key] for key in ("scores", "ownership", "ablations")} == {
        key: trials[lost][key] for key in ("scores", "ownership", "ablations")
    }
    assert again == found


def test_a_sweep_with_a_failing_arm_compares_the_others_and_names_it(tiny_config, ray_cluster, tmp_path, capfd):
    arms = (
        "{baseline: mean, arms: {bad: {set: {contrastive.temperature: 1.0e-30}}, bm25: {lexical: true}, "
        "mean: {set: {specialization.method: mean}, choose: {contrastive.temperature: [1.0, 1.0e-30]}}}}"
    )
    values = {"train.steps": 2, "train.max_bad_steps": 0, "sweep.seeds": [0]}
    message = r"2 trial\(s\) or row\(s\) failed, the others are kept: bad, seed 0: .*not finite"
    with pytest.raises(TrainingError, match=message):
        run(written(tiny_config, tmp_path, arms, values))
    assert len(list((tmp_path / "artifacts" / "sweep" / "trials").glob("*.json"))) == 2
    table = capfd.readouterr().out.partition("\nrow ")[2]
    assert [line.split()[0] for line in table.splitlines()[1:3]] == ["bm25", "mean"]
    (report,) = (tmp_path / "artifacts" / "sweep" / "reports").rglob("report.html")
    assert "mean, temperature=1e-30, seed 0: " in report.read_text()


def test_a_killed_sweep_goes_on_with_what_is_missing_and_no_second_one_works_beside_it(tiny_config, tmp_path):
    arms = "{baseline: mean, arms: {bm25: {lexical: true}, mean: {set: {specialization.method: mean}}}}"
    words = written(tiny_config, tmp_path, arms, {"train.steps": 2, "sweep.seeds": [0]})
    command, log = [sys.executable, "-m", "jobs.sweep", *words], tmp_path / "log"
    trials = tmp_path / "artifacts" / "sweep" / "trials"
    with running(command, log) as process:
        until(lambda: trials.exists() and os.listdir(trials), process, log)
        with running(command, tmp_path / "second") as second:
            assert second.wait(120) == 2
        assert "another sweep is at work there; wait for it" in (tmp_path / "second").read_text()
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    (kept,) = trials.iterdir()
    before = kept.stat().st_mtime_ns
    with running(command, log) as process:
        assert process.wait(600) == 0, log.read_text()
    assert "2 trials in" in log.read_text()
    assert "1 stand already" in log.read_text()
    assert kept.stat().st_mtime_ns == before
    assert len(list(trials.iterdir())) == 2
