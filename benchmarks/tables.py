"""The tables of trials that were kept: `python benchmarks/tables.py benchmarks/trials/world`.

A trial is a file of `<artifacts>/sweep/trials`, which `jobs.sweep` writes; these are kept here by arm and seed. What is
printed is what `jobs.sweep` prints when it ends; seeds select some of them.
"""

import argparse
import json
from pathlib import Path

from taskspec.evaluate.comparison import STRENGTH, Comparison
from taskspec.evaluate.trials import Trial


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--baseline", default="mean", help="the row that all others are compared with")
    parser.add_argument("--rows", nargs="+", help="only these; default all")
    parser.add_argument("--seeds", nargs="+", type=int, help="only these; default all")
    arguments = parser.parse_args()
    trials = [Trial.from_json(json.loads(path.read_text())) for path in sorted(arguments.folder.glob("*.json"))]
    chosen = [
        trial
        for trial in trials
        if (arguments.rows is None or trial.row in [*arguments.rows, arguments.baseline])
        and (arguments.seeds is None or trial.seed is None or trial.seed in arguments.seeds)
    ]
    chosen.sort(key=lambda trial: (trial.row != arguments.baseline, trial.row, trial.seed or 0))
    comparison = Comparison.of(chosen, arguments.baseline)
    print(comparison.to_text(), comparison.task_table_text(), sep="\n\n")
    for arm in dict.fromkeys(trial.arm for trial in chosen):
        if found := comparison.recommend(arm, STRENGTH):
            print(f"\n{arm}: recommended strength {found.value:g}: {found.reason}")


if __name__ == "__main__":
    main()
