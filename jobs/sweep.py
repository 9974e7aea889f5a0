"""Compares arms over seeds on Ray Tune: each trial trains, indexes and measures; one table and one report.

python -m jobs.sweep --config mine.yaml --arms strength

Arms share the prepared data and the negatives. A finished trial is kept as a file under `<artifacts>/sweep/trials` and
found again by what decides its numbers, so a sweep that was interrupted, or is given more arms or seeds, makes only
what is missing.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from jobs import cli
from jobs.pipeline import Inputs, make_inputs
from taskspec import artifacts, store
from taskspec.arms import Arms, Candidate, expand, read_arms
from taskspec.config import Config, canonical_sha256
from taskspec.errors import ConfigError, TrainingError

if TYPE_CHECKING:
    from taskspec.evaluate.comparison import Comparison, Row
    from taskspec.evaluate.trials import Trial

TRIAL_CPUS = 0.01
"""A trial only waits for the workers and actors that it starts; those reserve their own CPUs."""


class Planned(NamedTuple):
    """A trial to make or to find."""

    key: str
    """Of what decides its numbers; names its file."""
    candidate: Candidate
    seed: int | None


def build_parser() -> argparse.ArgumentParser:
    result = cli.parser(
        "Train, index and measure every arm with every seed of sweep.seeds, and compare them. "
        "After an interruption the same command makes what is missing."
    )
    result.add_argument(
        "--arms",
        default="strength",
        metavar="FILE",
        help="YAML file of arms, or a preset of jobs/arms by its name; default strength. "
        "The keys of an arm: README.md, Choosing the strength",
    )
    return result


def run(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Returns: `uri` of the report, `rows` with average, spread and difference to the baseline, and by arm the
    `recommended` strength, null where the baseline is."""
    arguments = build_parser().parse_args(argv)
    config = cli.configuration(arguments)
    arms = read_arms(arguments.arms)
    candidates = expand(arms, config, arguments.arms)

    from taskspec import cluster
    from taskspec.evaluate.comparison import STRENGTH
    from taskspec.evaluate.comparison_text import comparison_text
    from taskspec.train.launch import needed_cpus

    # Again by what preparation has found in the files, but what the configuration lacks needs no Ray.
    require_dev_queries(candidates, arms.baseline, [task.name for task in config.tasks if task.dev])
    count = len({candidate.row for candidate in candidates})
    seeds = ", ".join(map(str, config.sweep.seeds))
    print(f"sweep: {len(arms.arms)} arms, {count} rows, seeds {seeds}; connecting to Ray", flush=True)
    cluster.connect(config.cluster)
    at_once = config.sweep.concurrent
    cpus = at_once * max(needed_cpus(candidate.config) for candidate in candidates)
    cluster.require(f"{at_once} trial(s) at a time", cpus=cpus, wait_s=config.cluster.wait_s)
    with _alone(store.join(config.artifacts, "sweep")):
        comparison, failed = sweep(config, arms, candidates)
        report = _write_report(config, Path(arguments.arms).stem, arms, comparison, failed)
    print(f"\n{comparison_text(comparison)}\n", flush=True)
    recommended = {}
    for name in arms.arms:
        found = comparison.recommend(name, STRENGTH)
        if found:
            ship = arms.baseline if found.value is None else f"strength {found.value:g}"
            warning = "" if found.end is None else f"; {found.end:g} lies at an end of the range: try more"
            print(f"{name}: {ship} is recommended: {found.reason}{warning}", flush=True)
            recommended[name] = found.value
        elif comparison.curve_to_ship(name, STRENGTH):
            print(f"{name}: no strength is recommended: its rows and {arms.baseline} share fewer than 2 seeds")
    if failed:
        raise TrainingError(f"{_failures(failed)}; the table above and {report} are of the others")
    rows = [_row(comparison, row) for row in comparison.rows]
    return {"uri": report, "rows": rows, "recommended": recommended}


@contextmanager
def _alone(folder: str) -> Iterator[None]:
    """Two sweeps would train the same runs in the same folders. S3 and some file systems have no locks: there it is on
    the user.

    Raises: ConfigError if another one has the folder.
    """
    if store.is_s3(folder):
        yield
        return
    Path(folder).mkdir(parents=True, exist_ok=True)
    with open(Path(folder, "lock"), "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ConfigError(f"{folder}: another sweep is at work there; wait for it, or set artifacts") from error
        except OSError:
            print(f"{folder}: has no locks; see to it that no other sweep is at work there", flush=True)
        yield


def _row(comparison: Comparison, row: Row) -> dict[str, Any]:
    result: dict[str, Any] = {"row": row.name, "average": row.average, "std": row.std, "seeds": row.seeds}
    if row is not comparison.baseline:
        found = comparison.difference(row.name)
        result["difference"] = asdict(found) | {"verdict": found.verdict}
    return result


def sweep(config: Config, arms: Arms, candidates: Sequence[Candidate]) -> tuple[Comparison, dict[str, str]]:
    """Makes the trials that are missing. Ray must be connected.

    Returns: the comparison of all trials that stand now; of the others their labels, and why they failed.
    Raises: ConfigError for an arm that dev queries are missing for, before anything is trained; TrainingError if the
        baseline has none, once all others are finished.
    """
    from taskspec.data.prepared import PreparedData
    from taskspec.evaluate.comparison import Comparison

    wants_negatives = [c.config for c in candidates if c.config.contrastive.negatives]
    inputs = make_inputs(wants_negatives[0] if wants_negatives else config)
    require_dev_queries(candidates, arms.baseline, PreparedData.open(inputs.prepared).tasks("dev"))
    plan = planned_trials(config, candidates, inputs)
    folder = store.join(config.artifacts, "sweep", "trials")
    missing = {trial.key: trial for trial in plan if not store.exists(_file(folder, trial.key))}
    total = len({trial.key for trial in plan})
    print(f"sweep: {total} trials in {folder}, {total - len(missing)} stand already", flush=True)
    reasons = _run_trials(config, list(missing.values()), inputs, folder) if missing else {}
    failed = {_label(trial): reasons[trial.key] for trial in plan if trial.key in reasons}
    standing, left_out = comparable(plan, reasons, arms.baseline)
    failed |= dict.fromkeys(left_out, "what did not fail of it has no seed in common, or none with the baseline")
    if not standing:
        raise TrainingError(_failures(failed))
    return Comparison.of([_named(_read(folder, trial.key), trial) for trial in standing], arms.baseline), failed


def require_dev_queries(candidates: Sequence[Candidate], baseline: str, dev_tasks: Sequence[str]) -> None:
    """Args: baseline: the row of the candidates that the others are compared with.

    Raises: ConfigError naming the arm and the tasks, if it cannot be measured by the tasks that have dev queries, or
        compared with the baseline.
    """

    def measured(candidate: Candidate) -> list[str]:
        trained = [task.name for task in candidate.config.trained_tasks]
        return [task for task in dev_tasks if candidate.plan.lexical or task in trained]

    of_baseline = next(measured(candidate) for candidate in candidates if candidate.row == baseline)
    for candidate in candidates:
        trained = [task.name for task in candidate.config.trained_tasks]
        needed = [*candidate.plan.held_out, *(trained if candidate.plan.analyze else ())]
        without = [task for task in needed if task not in dev_tasks]
        if not measured(candidate):
            without = sorted(trained)
        if without:
            raise ConfigError(
                f"arm {candidate.row}: no dev queries of {', '.join(without)} to measure it with; name files under "
                f"tasks.<name>.dev"
            )
        if not set(measured(candidate)) & set(of_baseline):
            raise ConfigError(
                f"arm {candidate.row}: is measured on {', '.join(measured(candidate))}, the baseline {baseline} on "
                f"{', '.join(of_baseline) or 'nothing'}; compare rows with a task in common"
            )


def comparable(plan: Sequence[Planned], failed: Collection[str], baseline: str) -> tuple[list[Planned], list[str]]:
    """The trials that stand, without those of a candidate that failed with some seed where its row has others that did
    not: what fails now and then is not chosen. And the rows of which some stand that cannot be compared.

    Args: failed: keys. baseline: a row.    Returns: no trials if the baseline has none.
    """
    candidates = {(trial.candidate.row, trial.candidate.label) for trial in plan}
    broken = {(trial.candidate.row, trial.candidate.label) for trial in plan if trial.key in failed}
    whole_rows = {row for row, _ in candidates - broken}
    standing = [
        trial
        for trial in plan
        if trial.key not in failed
        and not (trial.candidate.row in whole_rows and (trial.candidate.row, trial.candidate.label) in broken)
    ]
    by_row: dict[str, dict[str, set[int | None]]] = {}
    for trial in standing:
        by_row.setdefault(trial.candidate.row, {}).setdefault(trial.candidate.label, set()).add(trial.seed)
    seeds = {row: set[int | None].intersection(*of_labels.values()) for row, of_labels in by_row.items()}
    theirs = seeds.get(baseline, set())
    alone = [row for row, own in seeds.items() if not own or not (None in own | theirs or own & theirs)]
    if not theirs:
        return [], alone
    return [trial for trial in standing if trial.candidate.row not in alone], alone


def _failures(failed: Mapping[str, str]) -> str:
    reasons = "; ".join(f"{label}: {reason}" for label, reason in failed.items())
    return (
        f"{len(failed)} trial(s) or row(s) failed, the others are kept: {reasons}; run the same command again to try "
        f"what is missing, or leave out of the arms what fails again"
    )


def planned_trials(config: Config, candidates: Sequence[Candidate], inputs: Inputs) -> list[Planned]:
    """Every candidate with every seed of its arm; what no seed changes once."""
    from jobs.trial import trial_key

    seeds = config.sweep.seeds
    return [
        Planned(trial_key(candidate, seed, inputs), candidate, seed)
        for candidate in candidates
        for seed in ((None,) if candidate.plan.lexical else seeds[: candidate.plan.seeds])
    ]


def _run_trials(config: Config, trials: Sequence[Planned], inputs: Inputs, folder: str) -> dict[str, str]:
    """Returns: key → reason of the trials that failed. Raises: KeyboardInterrupt if Tune was interrupted."""
    import os
    import tempfile

    os.environ["RAY_AIR_NEW_OUTPUT"] = "0"  # Tune's newer output prints a box whatever `verbose` says
    from ray import tune

    run_one = partial(_trial, trials=trials, inputs=inputs, folder=folder)
    progress = _progress(trials)
    failed: dict[str, str] = {}
    for wave in waves(trials):
        with tempfile.TemporaryDirectory() as scratch:
            tuner = tune.Tuner(
                tune.with_resources(run_one, {"CPU": TRIAL_CPUS}),
                param_space={"number": tune.grid_search(wave)},
                tune_config=tune.TuneConfig(max_concurrent_trials=config.sweep.concurrent),
                run_config=tune.RunConfig(name="sweep", storage_path=scratch, verbose=0, callbacks=[progress]),
            )
            results = tuner.fit()
        errors = {one.config["number"]: one.error for one in results if one.error}
        failed |= {trials[number].key: _last_line(error) for number, error in errors.items()}
        if not all(number in errors or store.exists(_file(folder, trials[number].key)) for number in wave):
            raise KeyboardInterrupt  # Tune takes Ctrl-C for itself and returns as if it had finished
    return failed


def waves(trials: Sequence[Planned]) -> list[list[int]]:
    """The numbers of trials that may be made at the same time: those that need the same training run, because they
    differ in what is measured, go one after the other, and the later ones find it trained."""
    from taskspec.train.checkpoint import run_identity

    result: list[list[int]] = []
    taken: list[set[str]] = []
    for number, trial in enumerate(trials):
        runs = {} if trial.seed is None else trial.candidate.runs(trial.seed)
        ids = {canonical_sha256(run_identity(run)) for run in runs.values()}
        wave = next((wave for wave, others in enumerate(taken) if not ids & others), len(taken))
        if wave == len(taken):
            result.append([])
            taken.append(set())
        result[wave].append(number)
        taken[wave] |= ids
    return result


def _last_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[-1]


def _trial(point: dict[str, Any], trials: Sequence[Planned], inputs: Inputs, folder: str) -> None:
    """Runs in a process of its own, on any node."""
    from ray import tune

    from jobs.trial import measure
    from taskspec import cluster

    trial = trials[point["number"]]
    cluster.connect(trial.candidate.config.cluster)
    parts = store.join(folder, f"{trial.key}-parts")
    measured = measure(trial.candidate, trial.seed, inputs, parts)
    store.write_bytes(_file(folder, trial.key), json.dumps(measured.to_json()).encode())
    artifacts.remove(parts)
    averages = [sum(scores) / len(scores) for scores in measured.scores.values()]
    tune.report({"average": sum(averages) / len(averages)})


def _file(folder: str, key: str) -> str:
    return store.join(folder, f"{key}.json")


def _read(folder: str, key: str) -> Trial:
    from taskspec.evaluate.trials import Trial

    return Trial.from_json(json.loads(store.read_bytes(_file(folder, key))))


def _named(trial: Trial, planned: Planned) -> Trial:
    """A kept trial under the names that the arms file now gives it."""
    candidate = planned.candidate
    return replace(
        trial, arm=candidate.arm, row=candidate.row, values=candidate.values, candidate=candidate.label,
        seed=planned.seed,
    )  # fmt: skip


def _label(trial: Planned) -> str:
    seed = "" if trial.seed is None else f"seed {trial.seed}"
    return ", ".join(filter(None, [trial.candidate.row, trial.candidate.label, seed]))


def _progress(trials: Sequence[Planned]) -> Any:
    from ray import tune

    class Progress(tune.Callback):  # type: ignore[misc]
        """One line when a trial starts and one when it is finished."""

        def __init__(self) -> None:
            self.started = time.monotonic()
            self.done = 0

        def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
            print(f"sweep: {label(trial)}: started", flush=True)

        def on_trial_result(self, iteration: int, trials: list[Any], trial: Any, result: Any, **info: Any) -> None:
            self.done += 1
            minutes = (time.monotonic() - self.started) / 60
            left = minutes / self.done * (total - self.done)
            print(
                f"sweep: {label(trial)}: R-precision {100 * result['average']:.1f} "
                f"({self.done} of {total} in {minutes:.0f} min, about {left:.0f} min left)",
                flush=True,
            )

    total = len(trials)

    def label(trial: Any) -> str:
        return _label(trials[trial.config["number"]])

    return Progress()


def _write_report(config: Config, name: str, arms: Arms, comparison: Comparison, failed: Mapping[str, str]) -> str:
    """The report's folder, `<artifacts>/sweep/reports/<name of the arms file>`. Returns: URI of the page."""
    import tempfile

    from taskspec.evaluate.comparison_report import write_comparison

    target = store.join(config.artifacts, "sweep", "reports", name)
    facts = {
        "Arms": f"{len(arms.arms)}, in {len(comparison.rows)} rows",
        "Seeds": ", ".join(map(str, config.sweep.seeds)),
        "Baseline": arms.baseline,
        "Training": f"{config.train.steps} steps of {config.mixing.queries_per_step} queries",
        "Trials made by": ", ".join(sorted({one.code for row in comparison.rows for one in row.used_trials()})),
        "Artifacts": config.artifacts,
    }
    if failed:
        facts["Failed trials"] = "; ".join(f"{label}: {reason}" for label, reason in failed.items())
    with tempfile.TemporaryDirectory() as scratch:
        page = write_comparison(
            Path(scratch),
            comparison,
            title=f"{config.name}: {name}",
            facts=facts,
            arms=arms.arms,
            config=config,
        )
        for old in store.list_files(target):  # of a sweep with more figures
            store.delete(old)
        for path in sorted(Path(scratch).iterdir()):
            store.write_bytes(store.join(target, path.name), path.read_bytes())
    return store.join(target, page.name)


if __name__ == "__main__":
    cli.main(run)
