"""Runs the parts of the GPU measurement, each in a process with a time limit of its own, and writes the table: see run.sh."""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import zipfile
from pathlib import Path

from rows import Outcome, run, write

HERE = Path(__file__).resolve().parent


LIMITS = {"ceilings": 40, "head": 80, "learner": 180, "logprobs": 60, "ipc": 60, "smollm2": 150}
"""The parts in their order, and the seconds that each may take: 570 at most."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dry-run", action="store_true", help="tiny shapes, on the CPU where there is no GPU")
    parser.add_argument("--only", nargs="+", choices=LIMITS, default=[*LIMITS], metavar="PART", help=f"of {[*LIMITS]}")
    options = parser.parse_args()
    out = Path(os.environ.get("OUT", tempfile.mkdtemp() if options.dry_run else HERE), "RESULTS.md")
    dry = ["--dry-run"] if options.dry_run else []
    outcomes: list[Outcome] = []
    with tempfile.TemporaryDirectory() as unpacked:
        for wheel in sorted((HERE / "wheels").glob("*.whl")):
            zipfile.ZipFile(wheel).extractall(unpacked)
        os.environ["R2M_GPU_WHEELS"] = unpacked
        for part in options.only:
            print(f"--- {part}", flush=True)
            command = [sys.executable, str(HERE / "parts.py"), part, *dry]
            outcomes.append(run(command, LIMITS[part], f"bash benchmarks/gpu/run.sh --only {part}"))
            if outcomes[-1].failure:
                print(f"{part} FAILED: {outcomes[-1].failure}", flush=True)
            # After every part: a machine that is taken away in the middle has left what was measured so far.
            write(outcomes, out, "Measured on a GPU" + " (dry run: these numbers mean nothing)" * options.dry_run)
    print(f"written: {out}")
    sys.exit(any(one.failure for one in outcomes))


if __name__ == "__main__":
    main()
