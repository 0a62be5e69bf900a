"""How long does the store take to look, when there is a lot? 50 names of 1,000 versions each, on the disk and by the command.

Physics: `list` opens one manifest a name and finds the newest by the names in a folder; `log` opens, hashes and parses every
manifest of one name, for it checks the lineage: 1,000 x (two small reads, SHA-256 of a few kilobytes, JSON into a checked
object). Neither reads a file of weights. A pull of what is here asks the Hub where the reference points and compares hashes;
it is measured against the tests' own Hub on this machine, so its time says nothing about a network: the number of files that
travelled is what counts. The disk is warm: the files were just written.

    python benchmarks/store.py [--names 50] [--versions 1000]
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))
from adapter_store import Store
from adapter_store.layout import LocalLayout
from adapter_store.version import completed, entries_of, sha256
from cpserve.manifest import Parent
from tests.hubserver import HubServer
from tests.hubserver.app import OWNER_TOKEN
from tests.hubserver.client import ready
from tests.hubserver.content import draft, files_of, learn

RESULTS = Path(__file__).parent / "results" / "store.jsonl"
GOAL_S = 0.3
COMMAND = [sys.executable, "-c", "from cpserve.cli import main; main()", "adapters"]


def fill(root: Path, names: int, versions: int) -> None:
    """Whole stores without waiting for the disk, file by file as the store itself writes them; the same few contents in all."""
    layout = LocalLayout(root)
    layout.blobs.mkdir(parents=True)
    files, known = files_of(4), draft(4)
    for data in files.values():
        layout.blob(sha256(data)).write_bytes(data)
    entries = entries_of(files)
    for name in (f"name-{i}" for i in range(names)):
        layout.adapter(name).mkdir(parents=True)
        previous = None
        for number in range(1, versions + 1):
            document = completed(known, name, entries, previous).dump()
            layout.blob(sha256(document)).write_bytes(document)
            layout.version(name, number).write_text(f"{sha256(document)}\n")
            previous = Parent(version=number, manifest_sha256=sha256(document))


def seconds(act: Callable[[], object], times: int = 5) -> float:
    """The median of some runs."""
    took = []
    for _ in range(times):
        began = time.perf_counter()
        act()
        took.append(time.perf_counter() - began)
    return statistics.median(took)


def looks(root: Path) -> dict[str, float]:
    """Seconds of list and log, as a library and as whole processes of the command."""
    store = Store(root)
    environment = {**os.environ, "CPSERVE_HOME": str(root)}

    def command(*args: str) -> None:
        subprocess.run([*COMMAND, *args, "--json"], env=environment, check=True, stdout=subprocess.DEVNULL)

    return {
        "list": seconds(lambda: [store.version(name).manifest for name in store.names()]),
        "log": seconds(lambda: store.log("name-0")),
        "list_command": seconds(lambda: command("list")),
        "log_command": seconds(lambda: command("log", "name-0")),
        "help_command": seconds(lambda: subprocess.run([*COMMAND, "--help"], check=True, stdout=subprocess.DEVNULL), 3),
    }


def pulls(root: Path) -> dict[str, float]:
    """A pull of 20 versions, and of what is here."""
    with pytest.MonkeyPatch.context() as patch, HubServer(root / "hub") as hub:
        ready(root / "cache", patch)
        patch.setenv("HF_TOKEN", OWNER_TOKEN)
        patch.setenv("HF_ENDPOINT", hub.endpoint)
        mine, other = Store(root / "mine"), Store(root / "other")
        learn(mine, count=20)
        mine.push("pets", "hf://me/pets")
        first = seconds(lambda: other.pull("hf://me/pets@v20"), 1)
        before, asked = len(hub.downloads()), len(hub.asked)
        again = seconds(lambda: other.pull("hf://me/pets@v20"), 1)
        downloads, requests = len(hub.downloads()) - before, len(hub.asked) - asked
    return {"pull": first, "pull_again": again, "pull_again_downloads": downloads, "pull_again_requests": requests}


def _machine() -> dict[str, object]:
    """Not `timing.machine`, which is torch's."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "machine": platform.machine(),
        "cores": cores,
        "load": os.getloadavg()[0],
        "python": platform.python_version(),
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--names", type=int, default=50)
    parser.add_argument("--versions", type=int, default=1000)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        fill(root / "store", asked.names, asked.versions)
        found = looks(root / "store") | pulls(root)
    print(f"{asked.names} names x {asked.versions:,} versions")
    for what, value in found.items():
        print(f"{what:22} {value:.3f}{'' if 'downloads' in what or 'requests' in what else ' s'}")
    met = found["list_command"] < GOAL_S and found["log_command"] < GOAL_S and found["pull_again_downloads"] == 0
    print(f"goal of {GOAL_S} s a whole command and no download: {'met' if met else 'NOT met'}")
    line = {"benchmark": "store", "names": asked.names, "versions": asked.versions}
    line |= {what: round(value, 4) for what, value in found.items()}
    line |= {"goal_s": GOAL_S, "met": met, "date": datetime.now(UTC).date().isoformat(), "machine": _machine()}
    RESULTS.parent.mkdir(exist_ok=True)
    with RESULTS.open("a", encoding="utf-8") as results:
        results.write(json.dumps(line) + "\n")
    print(json.dumps(line))


if __name__ == "__main__":
    main()
