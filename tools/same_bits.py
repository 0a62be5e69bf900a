"""Do the methods learn the same as at another commit, bit for bit? `python tools/same_bits.py REV`.

Every method learns two concepts of noise, in a few steps, with the code of REV and with that of this folder. What is to be
compared are the LoRA, the tokens and what is kept for the next concept. On a yes, and where nothing that draws, judges or learns
jointly has changed, which it does not try, the commit's sources may stand in `SAME` (benchmarks/forgetting_runs.py).
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]


def learned() -> dict[str, str]:
    """By method, a hash of all tensors, with the code that is imported."""
    import numpy as np
    from PIL import Image

    import cpserve
    from cpserve.adapter import empty_adapter
    from cpserve.concept import Concept, Picture
    from trainer import METHODS, Record, Settings, learn

    base, made = cpserve.load_base(), {}
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 255, (2, 3, 64, 64, 3), dtype=np.uint8)
    for method in METHODS:
        settings = Settings(
            method=method, steps=6, batch=2, rank=4, variants=2, fisher_draws=3, warm_up=2, dsc_steps=3, dsc_batch=1
        )
        past = [empty_adapter(base.spec.entry)]
        with tempfile.TemporaryDirectory() as folder:
            for name, pixels in zip(("one", "two"), noise, strict=True):
                shown = tuple(Picture(f"{i}.png", Image.fromarray(p)) for i, p in enumerate(pixels))
                record = Record(Path(folder) / name)
                past.append(learn(base, Concept(name, shown), past[-1], settings, record, past=past[1:]))
        groups = {"lora": past[-1].lora, "tokens": past[-1].embeddings, **past[-1].training}
        digest = hashlib.sha256()
        for group, tensors in sorted(groups.items()):
            for key, tensor in sorted(tensors.items()):
                digest.update(f"{group} {key} {tuple(tensor.shape)}".encode())
                digest.update(tensor.detach().float().contiguous().numpy().tobytes())
        made[method] = digest.hexdigest()
    return made


def learned_by(code: Path) -> dict[str, str]:
    environment = os.environ | {"PYTHONPATH": str(code), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, __file__, "--child"]
    run = subprocess.run(command, cwd=code, env=environment, stdout=subprocess.PIPE, check=True)
    found: dict[str, str] = json.loads(run.stdout.splitlines()[-1])
    return found


def main(rev: str) -> int:
    if rev == "--child":
        print(json.dumps(learned()))
        return 0
    archive = subprocess.run(["git", "archive", rev], cwd=ROOT, stdout=subprocess.PIPE, check=True).stdout
    with tempfile.TemporaryDirectory() as folder:
        with tarfile.open(fileobj=io.BytesIO(archive)) as code:
            code.extractall(folder, filter="data")
        before, now = learned_by(Path(folder)), learned_by(ROOT)
    for method, hash_now in now.items():
        print(f"{method:12} {'same' if before.get(method) == hash_now else 'another' if method in before else 'new'}")
    return int(now != before)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
