"""A folder of photo zips taught in sequence by `cpserve train`, once straight and once killed again and again.

`kill -9` comes at random moments, and each time the same command goes on with `--resume`. Every file of every version must
then have the same hash as in the straight run: nothing depends on where a run was stopped. `--base sd15` writes Stable
Diffusion 1.5's configuration at reduced width, with random weights: what it draws is noise, and it shows only that
the path holds.

    python benchmarks/killed.py --photos DIR [--limit 10] [--base sd15] [--steps 60] [--kills 10] [--seed 0]
"""

from __future__ import annotations

import argparse
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from adapter_store import Store
from benchmarks.timing import keep
from tests.tiny import SD15, write_pipeline

NAME = "killed"
COMMAND = Path(sys.executable).with_name("cpserve")


def train(arguments: Sequence[str], store: Path) -> subprocess.Popen[bytes]:
    return subprocess.Popen([COMMAND, "train", "--adapter", NAME, "--store", str(store), *arguments])


def killed(arguments: Sequence[str], store: Path, kills: int, seconds: float, seed: int) -> int:
    """Teach, killed `kills` times or until it is done, spread over about `seconds`; how often it was."""
    rng, done = random.Random(seed), 0
    process = train(arguments, store)
    while done < kills:
        try:
            process.wait(rng.uniform(0, 2 * seconds / kills))
            break
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            done += 1
            print(f"killed {done} of {kills} times", flush=True)
            process = train([*arguments, "--resume"], store)
    if process.wait():
        raise SystemExit("the resumed command failed")
    return done


def hashes(store: Path) -> list[dict[str, str]]:
    """Of each version's files, by path."""
    versions = Store(store)
    manifests = (versions.version(f"{NAME}@v{n}").manifest for n in range(1, versions.head(NAME) + 1))
    return [{entry.path: entry.sha256 for entry in manifest.files} for manifest in manifests]


def run(asked: argparse.Namespace, folder: Path) -> dict[str, Any]:
    photos = sorted(asked.photos.glob("*.zip"))[: asked.limit]
    base = str(write_pipeline(folder / "sd15", SD15)) if asked.base == "sd15" else asked.base
    arguments = ["--base", base, "--steps", str(asked.steps)]
    arguments += [word for path in photos for word in ("--concept", str(path))]
    began = time.monotonic()
    if train(arguments, folder / "straight").wait():
        raise SystemExit("the command failed")
    seconds = time.monotonic() - began
    done = killed(arguments, folder / "stopped", asked.kills, seconds, asked.seed)
    straight, stopped = hashes(folder / "straight"), hashes(folder / "stopped")
    return {
        "base": asked.base,
        "concepts": [path.stem for path in photos],
        "steps": asked.steps,
        "seconds_straight": round(seconds, 1),
        "kills": done,
        "versions": len(straight),
        "files": sum(map(len, straight)),
        "equal": straight == stopped,
    }


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--photos", type=Path, required=True)
    arguments.add_argument("--limit", type=int, default=10)
    arguments.add_argument("--base", default="builtin:emoji64", help="a base model, or sd15")
    arguments.add_argument("--steps", type=int, default=60)
    arguments.add_argument("--kills", type=int, default=10)
    arguments.add_argument("--seed", type=int, default=0)
    asked = arguments.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        keep(NAME, run(asked, Path(folder)))


if __name__ == "__main__":
    main()
