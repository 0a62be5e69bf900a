"""Run another project's training script, unchanged, and say when its training loop began and ended.

The script's progress bar tells: it is made when everything is loaded, and moves after each step.

    python benchmarks/rivals/marked.py PACKAGES SCRIPT [ARGUMENT ...]

PACKAGES is a folder of packages for the script alone. The last line is JSON: seconds since the epoch, and
seconds of CPU spent before and after, and the peak of memory until then in MiB.
"""

from __future__ import annotations

import json
import math
import re
import runpy
import sys
import time
from pathlib import Path
from typing import Any

BAR = "Steps"

marks: dict[str, float] = {}


def watch_bar() -> None:
    """Have the bar called `BAR` note when it is made and when it last moved."""
    import tqdm.auto

    class Marking(tqdm.auto.tqdm):
        def __init__(self, *arguments: Any, **named: Any) -> None:
            super().__init__(*arguments, **named)
            self.is_ours = named.get("desc") == BAR
            if self.is_ours:
                marks["ready"], marks["cpu_before"] = time.time(), time.process_time()

        def update(self, n: float | None = 1) -> bool | None:
            shown = super().update(n)
            if self.is_ours:
                marks["trained"], marks["cpu_after"] = time.time(), time.process_time()
                marks["peak_mb"] = peak_mb()
            return shown

    tqdm.auto.tqdm = Marking


def import_torchvision() -> None:
    """Also where its compiled operators were built for another torch and do not load.

    The script uses its transforms, which need none; its import only asks that two of them be declared.
    """
    try:
        import torchvision
    except RuntimeError:
        import torch

        for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
            del sys.modules[name]
        declared = torch.library.Library("torchvision", "FRAGMENT")
        for name in ("nms", "qnms"):
            declared.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        import torchvision  # noqa: F401


def peak_mb() -> float:
    """The most memory that this process has had, in MiB; `getrusage` counts what its parent had before it began, too."""
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return int(found[1]) / 1024 if found else math.nan


def main() -> None:
    packages, script, *arguments = sys.argv[1:]
    sys.path.insert(0, packages)
    import_torchvision()
    watch_bar()
    sys.argv = [script, *arguments]
    runpy.run_path(script, run_name="__main__")
    print(json.dumps(marks))


if __name__ == "__main__":
    main()
