"""Where the seconds of a process and its forks go: `study_time` starts it as `sitecustomize`.

A timer interrupts every process 100 times a second of wall time. The CPU time and the wall time
since the last interruption count for the kind of work of the code that was interrupted: the first
of `KINDS` that matches a function on the stack. Folder and kinds are in the environment; each
process leaves a file there, written anew once a second.
"""

import json
import os
import re
import signal
import sys
import time
from types import FrameType

INTERVAL = 0.01  # seconds

folder = os.environ["SAMPLES"]
kinds = [(kind, re.compile(pattern)) for kind, pattern in json.loads(os.environ["KINDS"])]
found: dict[str, list[float]] = {}  # kind -> CPU seconds, wall seconds, and when it was first seen
known: dict[str, int] = {}  # function -> place of its kind
times = [0.0, 0.0, 0.0]  # CPU and wall time of the last sample, wall time of the last file


def kind_of(frame: FrameType | None) -> str:
    """Return the kind of work of a stack."""
    place = len(kinds)
    while frame is not None:
        name = f"{frame.f_code.co_filename}:{frame.f_code.co_name}"
        if name not in known:
            matches = (i for i, (_, pattern) in enumerate(kinds) if pattern.search(name))
            known[name] = next(matches, len(kinds))
        place, frame = min(place, known[name]), frame.f_back
    return kinds[place][0] if place < len(kinds) else "other"


def sample(number: int, frame: FrameType | None) -> None:
    """Count the time since the last sample."""
    now = time.process_time(), time.time()
    counted = found.setdefault(kind_of(frame), [0.0, 0.0, now[1]])
    for i in range(2):
        counted[i] += now[i] - times[i]
        times[i] = now[i]
    if now[1] - times[2] > 1:
        write()


def write() -> None:
    """Write what was found so far."""
    times[2] = time.time()
    name = f"{folder}/{os.getpid()}"
    with open(f"{name}.new", "w") as file:
        json.dump(found, file)
    os.replace(f"{name}.new", f"{name}.json")


def start() -> None:
    """Begin in a new process, or in one that was just forked."""
    found.clear()
    times[:] = time.process_time(), time.time(), time.time()
    signal.signal(signal.SIGALRM, sample)
    signal.siginterrupt(signal.SIGALRM, False)  # noqa: FBT003 - of C
    signal.setitimer(signal.ITIMER_REAL, INTERVAL, INTERVAL)


def stop() -> None:
    """End: Python is about to take its handlers away."""
    signal.setitimer(signal.ITIMER_REAL, 0)
    write()


if "SAMPLES" in os.environ and "sitecustomize" in sys.modules:
    import atexit

    start()
    times[0] = 0.0  # Python's own start counts
    os.register_at_fork(after_in_child=start)
    atexit.register(stop)
