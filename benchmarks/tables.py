"""The tables of trials that were kept: `python benchmarks/tables.py benchmarks/trials/world`.

A trial is a file of `<artifacts>/sweep/trials`, which `jobs.sweep` writes; some behind the tables of README.md are kept
here by row and seed. What is printed is what `jobs.sweep` prints when it ends. A row is named by its arm, so trials of
two arms of one name must not lie in one folder.

    python benchmarks/tables.py artifacts/evidence/sweep/trials --keep benchmarks/trials/world
"""

import argparse
import json
import re
from dataclasses import replace
from pathlib import Path

from taskspec.errors import ConfigError
from taskspec.evaluate.comparison import STRENGTH, Comparison
from taskspec.evaluate.comparison_text import comparison_text
from taskspec.evaluate.trials import Trial

TRIALS = Path(__file__).parent / "trials"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--baseline", default="mean", help="the row that all others are compared with")
    parser.add_argument("--rows", nargs="+", help="only these; default all")
    parser.add_argument("--seeds", nargs="+", type=int, help="only these; default all")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="copy the trials there, under names for people")
    parser.add_argument("--code", default="", help="with --keep: the commit of trials that do not name what made them")
    arguments = parser.parse_args()
    if not any(arguments.folder.glob("*.json")):
        parser.error(f"{arguments.folder}: has no trials (*.json); kept ones are in {TRIALS}/*")
    trials = [Trial.from_json(json.loads(path.read_text())) for path in sorted(arguments.folder.glob("*.json"))]
    rows = sorted({trial.row for trial in trials})
    for name in [arguments.baseline, *(arguments.rows or ())]:
        if name not in rows:
            parser.error(f"no row {name!r} in {arguments.folder}; rows: {', '.join(rows)}")
    chosen = [
        trial
        for trial in trials
        if (arguments.rows is None or trial.row in [*arguments.rows, arguments.baseline])
        and (arguments.seeds is None or trial.seed is None or trial.seed in arguments.seeds)
    ]
    once: set[tuple[str, str, int | None]] = set()
    for trial in chosen:
        if (key := (trial.row, trial.candidate, trial.seed)) in once:
            parser.error(f"{arguments.folder}: two trials of row {trial.row!r} and seed {trial.seed}; name --rows")
        once.add(key)
    if arguments.keep:
        keep(chosen, arguments.keep, arguments.code)
    # Strengths by their numbers, not as text.
    chosen.sort(
        key=lambda one: (one.row != arguments.baseline, one.arm, str(one.values.keys()), [*one.values.values()])
    )
    try:
        comparison = Comparison.of(chosen, arguments.baseline)
    except ConfigError as error:  # candidates of a row without a common seed
        parser.error(str(error))
    print(comparison_text(comparison))
    for arm in dict.fromkeys(trial.arm for trial in chosen):
        if found := comparison.recommend(arm, STRENGTH):
            ship = arguments.baseline if found.value is None else f"strength {found.value:g}"
            end = "" if found.end is None else f"; {found.end:g} lies at an end of the range"
            print(f"\n{arm}: recommended: {ship}: {found.reason}{end}")


def keep(trials: list[Trial], folder: Path, code: str) -> None:
    """Writes them without the URIs of checkpoints, which only the machine that made them has."""
    folder.mkdir(parents=True, exist_ok=True)
    for trial in trials:
        parts = [trial.row, trial.candidate, "" if trial.seed is None else f"seed-{trial.seed}"]
        name = re.sub(r"[^\w.=-]+", "-", "-".join(filter(None, parts)))
        content = json.dumps(replace(trial, checkpoint=None, code=trial.code or code).to_json(), separators=(",", ":"))
        (folder / f"{name}.json").write_text(content + "\n")


if __name__ == "__main__":
    main()
