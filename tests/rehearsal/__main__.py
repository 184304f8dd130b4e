"""Run the rehearsal in an empty folder, from the download to all tables and figures."""

from __future__ import annotations

import sys
import time
from pathlib import Path

from rehearsal.project import CONFIGS, Rehearsal


def main(folder: Path) -> int:
    """Run the rehearsal and return the exit status of its first command that fails, else 0."""
    start = time.monotonic()
    with Rehearsal(folder) as rehearsal:
        for command in (
            ["genseg", "plan", "--params", CONFIGS[0]],
            ["snakemake", "--cores", "all", "--resources", "gpu=8", "--configfile", *CONFIGS],
        ):
            print(f"rehearsal: {' '.join(command)}", flush=True)
            if status := rehearsal.run(command):
                return status
        print(f"rehearsal: {rehearsal.check_results()} in {time.monotonic() - start:.0f} s; {folder}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
