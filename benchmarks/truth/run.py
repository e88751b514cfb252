"""Estimate learning coefficients that are known, and write the page that compares them.

make truth          # all problems, in benchmarks/results/truth.jsonl; then docs/truth.md
make truth-quick    # a few of each group, in 4 minutes at most

Each problem's result is one line of JSON, appended when it is there. A run that was killed goes on
with what is missing; a line made with other settings counts as missing.
"""

import argparse
import json
import multiprocessing
import warnings
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import page
import torch
from estimates import estimate
from known import GROUPS
from published import LRS, published_estimate
from values import value_at

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"
# Of each group, which problems the quick mode takes.
QUICK = {
    "monomials": (0, 1),
    "separable": (2,),
    "reduced rank": (0, 3, 8),
    "small": (2, 8, 13, 22),
    "small, minibatches": (41,),
}
Line = dict[str, Any]


@dataclass(frozen=True)
class Job:
    """A problem and what to find of it.

    Attributes:
        kind: `estimate`, `value` (the coefficient at the run's nβ) or `published`.
        group: A name of `GROUPS`.
        index: Of the problem in its group.
    """

    kind: str
    group: str
    index: int


def run_job(job: Job) -> Line:
    """The line of a job: the problem, its settings, and what was found."""
    torch.set_num_threads(1)
    problem = GROUPS[job.group].make(job.index)
    if job.kind == "estimate":
        found = estimate(problem, job.index)
    elif job.kind == "value":
        found = value_at(problem, job.index)
    else:
        found = published_estimate(problem, job.index)
    return heading(job) | found


def heading(job: Job) -> Line:
    """What tells a job's line from others, the settings included."""
    problem = GROUPS[job.group].make(job.index)
    settings = asdict(problem.settings)
    if job.kind == "published":
        settings |= {"steps of SGLD": LRS}
    return {
        **asdict(job),
        "name": problem.name,
        "truth": problem.truth.coefficient,
        "multiplicity": problem.truth.multiplicity,
        "rank": problem.rank,
        "settings": settings,
    }


def jobs_of(quick: bool) -> Iterator[Job]:
    """All jobs: small groups first; then a run that is stopped has the same share of each."""
    places = [
        (made.size > 12, (index + 0.5) / made.size, group, index)
        for group, made in GROUPS.items()
        for index in (QUICK.get(group, ()) if quick else range(made.size))
    ]
    for *_, group, index in sorted(places):
        yield Job("estimate", group, index)
        if group == "compared":  # its values are those of the same networks in another group
            yield Job("published", group, index)
        else:
            yield Job("value", group, index)


def read(path: Path) -> list[Line]:
    """The lines of a file. What a killed run has left half written is cut off."""
    text = path.read_text() if path.exists() else ""
    whole = text[: text.rfind("\n") + 1]
    if whole != text:
        path.write_text(whole)
    return [json.loads(line) for line in whole.splitlines()]


def line_of(job: Job, lines: list[Line]) -> Line | None:
    """The last line of a job with its settings, if there is one."""
    head = json.loads(json.dumps(heading(job)))  # as JSON has it
    return next((line for line in reversed(lines) if head.items() <= line.items()), None)


def run(jobs: list[Job], path: Path, workers: int) -> list[Line]:
    """Do what is missing, each result appended to the file when it is there; the lines of all.

    Raises:
        ExceptionGroup: Of jobs that failed, when all others are done.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = read(path)
    missing = [job for job in jobs if line_of(job, lines) is None]
    print(f"{len(jobs)} jobs, {len(missing)} to do", flush=True)
    # New processes: threads of torch do not survive a fork.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context) as pool, path.open("a") as file:
        futures = {pool.submit(run_job, job): job for job in missing}
        failures = []
        for number, future in enumerate(as_completed(futures), 1):
            if (error := future.exception()) is not None:
                error.add_note(str(futures[future]))
                failures.append(error)
                print(f"{number}/{len(missing)} {futures[future]} failed: {error!r}", flush=True)
                continue
            text = json.dumps(future.result())
            file.write(text + "\n")
            file.flush()
            lines.append(json.loads(text))
            print(f"{number}/{len(missing)} {_said(lines[-1])}", flush=True)
    if failures:
        raise BaseExceptionGroup("jobs failed, and were left out; all others are done", failures)
    return [line for job in jobs if (line := line_of(job, lines)) is not None]


def _said(line: Line) -> str:
    found = line["mean"] if "mean" in line else line["value"]
    shown = "not known" if found is None else f"{found:.4g}"
    return f"{line['kind']}, {line['group']}: {line['name']}: {shown}, λ = {line['truth']:.4g}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="a few problems of each group")
    parser.add_argument("--workers", type=int, default=2, help="processes, of one thread each")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the lines")
    parser.add_argument("--report", action="store_true", help="write what is there, run nothing")
    options = parser.parse_args()
    jobs = list(jobs_of(options.quick))
    path = options.results / ("truth-quick.jsonl" if options.quick else "truth.jsonl")
    if options.report:
        lines = read(path)
        lines = [line for job in jobs if (line := line_of(job, lines)) is not None]
    else:
        lines = run(jobs, path, options.workers)
    print(page.summary(lines))
    if not options.quick:
        page.write(lines, len(jobs), ROOT / "docs")


if __name__ == "__main__":
    warnings.filterwarnings("ignore", category=DeprecationWarning, module="devinterp")
    main()
