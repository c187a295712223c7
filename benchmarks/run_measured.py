"""Run a command and write its seconds, peak memory and exit status as one line of JSON: python run_measured.py COMMAND...

A process of its own, with nothing but the standard library: Linux counts the memory of the process that starts a command
into the command's peak (the maximum is carried over exec), so the starter must be small. Peak memory is `ru_maxrss` of
wait4: that of the largest process of the command's tree that has been waited for.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time


def main(command: list[str]) -> None:
    """Run `command`; its standard output is dropped, the end of its standard error goes into the JSON."""
    start = time.perf_counter()
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    assert process.stderr is not None
    errors = process.stderr.read()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)  # or Popen would wait again, for a process that is gone
    unit = 1 if sys.platform == "darwin" else 1024
    json.dump(
        {
            "seconds": time.perf_counter() - start,
            "peak_rss_mb": usage.ru_maxrss * unit / 2**20,
            "status": process.returncode,
            "stderr": errors.decode(errors="replace")[-4000:],
        },
        sys.stdout,
    )


if __name__ == "__main__":
    main(sys.argv[1:])
