"""`make bench` and `make bench-check`: the CPU set of the benchmarks, as a table.

    python benchmarks/bench.py                  # runs the set, writes benchmarks/RESULTS.md and RESULTS.json
    python benchmarks/bench.py --check          # the same, and then compares with the table of the last commit
    python benchmarks/bench.py --check --as-it-is   # compares the table that is there
    python benchmarks/bench.py --trl trl/bin/python # with TRL beside the whole run: benchmarks/end_to_end.py says how to install it

A script belongs to the set if it prints rows (`benchmarks/rows.py`) and stands in SET. --check names every row whose ratio is
worse by more than --tolerance, and ends with 1 if there is one. Leave the machine alone meanwhile.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

from rows import ROOT, Outcome, outcomes_of, rows_of, run, slower, write

OUT = ROOT / "benchmarks" / "RESULTS.md"
TITLE = "Measured on CPUs: `make bench`"
SET: dict[str, float] = {
    "benchmarks/head.py": 150,
    "benchmarks/codec.py": 60,
    "benchmarks/overlap.py": 90,
    "benchmarks/overlap.py --ray": 120,
    "benchmarks/weights.py": 180,
    "benchmarks/async_speedup.py --steps 30": 180,
    "benchmarks/end_to_end.py --rounds 3 --steps 30": 300,
}
"""The commands, and the seconds that each may take: 18 minutes in all, of which they need 10 on two cores."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--as-it-is", action="store_true", help="run nothing")
    parser.add_argument(
        "--only",
        nargs="+",
        metavar="NAME",
        help="commands whose text has one of these; of the others the table keeps what it has",
    )
    parser.add_argument("--tolerance", type=float, default=0.15, help="what counts as worse: a share of the ratio")
    parser.add_argument("--trl", metavar="PYTHON", help="the Python of an environment that has TRL")
    parser.add_argument("--out", type=Path, default=OUT)
    options = parser.parse_args()
    if not options.as_it_is:
        outcomes: list[Outcome] = []
        table = options.out.with_suffix(".json")
        before = outcomes_of(table.read_text(encoding="utf-8")) if options.only and table.exists() else []
        for command, limit in SET.items():
            if options.only and not any(one in command for one in options.only):
                same = (f"python {command}", f"python {command} --trl PYTHON")
                outcomes += [one for one in before if one.command in same]
                continue
            script, *arguments = command.split()
            if options.trl and "end_to_end" in command:
                arguments, command, limit = [*arguments, "--trl", options.trl], f"{command} --trl PYTHON", 2 * limit
            print(f"--- {command}", flush=True)
            outcomes.append(run([sys.executable, script, *arguments], limit, f"python {command}"))
            write(outcomes, options.out, TITLE)  # what was measured is kept if a later one is interrupted
        write(outcomes, options.out, TITLE)  # with those at the end that were not run
        for one in outcomes:
            if one.failure:
                print(f"{one.command} FAILED: {one.failure}", flush=True)
        if not options.check:
            sys.exit(any(one.failure for one in outcomes))
    if options.check:
        sys.exit(check(options.out.with_suffix(".json"), options.tolerance))


def check(path: Path, tolerance: float) -> int:
    """Compares a table with that of the last commit. Prints what got slower, and returns 1 if something did."""
    committed = subprocess.run(
        ["git", "show", f"HEAD:{OUT.with_suffix('.json').relative_to(ROOT)}"], cwd=ROOT, capture_output=True, text=True
    )
    if committed.returncode:
        print("the last commit has no benchmarks/RESULTS.json: run `make bench`, and commit what it writes")
        return 1
    told = slower(rows_of(path.read_text(encoding="utf-8")), rows_of(committed.stdout), tolerance)
    print("\n".join(told) or f"nothing got slower by more than {tolerance:.0%}")
    return bool(told)


if __name__ == "__main__":
    main()
