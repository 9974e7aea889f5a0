"""The tables of trials that were kept: `python benchmarks/tables.py benchmarks/trials/world`.

A trial is a file of `<artifacts>/sweep/trials`, which `jobs.sweep` writes; some behind the tables of README.md are kept
here by row and seed. What is printed is what `jobs.sweep` prints when it ends.

    python benchmarks/tables.py artifacts/evidence/sweep/trials --keep benchmarks/trials/world
"""

import argparse
import json
from dataclasses import replace
from pathlib import Path

from taskspec.evaluate.comparison import STRENGTH, Comparison
from taskspec.evaluate.trials import Trial


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--baseline", default="mean", help="the row that all others are compared with")
    parser.add_argument("--rows", nargs="+", help="only these; default all")
    parser.add_argument("--seeds", nargs="+", type=int, help="only these; default all")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="copy the trials there, under names for people")
    arguments = parser.parse_args()
    trials = [Trial.from_json(json.loads(path.read_text())) for path in sorted(arguments.folder.glob("*.json"))]
    chosen = [
        trial
        for trial in trials
        if (arguments.rows is None or trial.row in [*arguments.rows, arguments.baseline])
        and (arguments.seeds is None or trial.seed is None or trial.seed in arguments.seeds)
    ]
    if arguments.keep:
        keep(chosen, arguments.keep)
    chosen.sort(key=lambda trial: (trial.row != arguments.baseline, trial.row, trial.seed or 0))
    comparison = Comparison.of(chosen, arguments.baseline)
    print(comparison.to_text(), comparison.task_table_text(), sep="\n\n")
    for arm in dict.fromkeys(trial.arm for trial in chosen):
        if found := comparison.recommend(arm, STRENGTH):
            print(f"\n{arm}: recommended strength {found.value:g}: {found.reason}")


def keep(trials: list[Trial], folder: Path) -> None:
    """Writes them without the URIs of checkpoints, which only the machine that made them has."""
    folder.mkdir(parents=True, exist_ok=True)
    for trial in trials:
        name = trial.row.replace(" ", "-") + ("" if trial.seed is None else f"-seed-{trial.seed}")
        content = json.dumps(replace(trial, checkpoint=None).to_json(), separators=(",", ":"))
        (folder / f"{name}.json").write_text(content + "\n")


if __name__ == "__main__":
    main()
