"""Build the wheel and check that it holds what it should and nothing else: `python tools/wheel_contents.py`."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path, PurePosixPath

ROOT = Path(__file__).parents[1]
PACKAGES = {"cpserve", "trainer", "export", "adapter_store"}
MODELS = "cpserve/models/"
LARGEST = 30 * 10**6  # bytes


def build(folder: Path) -> Path:
    """The wheel of the working tree."""
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    done = subprocess.run(command, cwd=ROOT, check=False, capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr)
    [wheel] = folder.glob("*.whl")
    return wheel


def faults(names: set[str], size: int) -> list[str]:
    """What is wrong with a wheel of these files."""
    info = {name for name in names if PurePosixPath(name).parts[0].endswith(".dist-info")}
    top = {PurePosixPath(name).parts[0] for name in names - info}
    code = {name for name in names - info if not name.startswith(MODELS)}
    models = {p.relative_to(ROOT).as_posix() for p in (ROOT / MODELS).rglob("*") if p.is_file()}
    found = [f"the packages are {sorted(top)}"] if top != PACKAGES else []
    found += [
        f"{licence} is missing" for licence in ("LICENSE", "NOTICE") if not any(n.endswith(f"/{licence}") for n in info)
    ]
    found += [f"{name} is missing" for name in sorted(models - names)]
    found += [f"{name} has no business there" for name in sorted(code) if not name.endswith((".py", "/py.typed"))]
    found += [f"{name} is unknown" for name in sorted(names - info - code - models)]
    return found + ([f"it is larger than {LARGEST} bytes: {size}"] if size > LARGEST else [])


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        wheel = build(Path(folder))
        size = wheel.stat().st_size
        with zipfile.ZipFile(wheel) as archive:
            wrong = faults({name for name in archive.namelist() if not name.endswith("/")}, size)
        if wrong:
            sys.exit("\n".join([wheel.name, *wrong]))
        print(f"{wheel.name}: {size / 10**6:.1f} MB, nothing missing, nothing else")


if __name__ == "__main__":
    main()
