"""The prompts that the model is judged by, written once, before training: one for every trained concept."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from compose import COLOURS, article
from sources import STYLES

PROMPTS = Path(__file__).with_name("prompts.json")


def main() -> None:
    rng = np.random.default_rng(64)
    styles = [s.word for s in STYLES if not s.held_out]
    made = []
    for name in json.loads(Path(__file__).with_name("split.json").read_text())["train"]:
        style, colour = str(rng.choice(styles)), str(rng.choice(list(COLOURS)))
        made.append(
            {"prompt": f"a {style} emoji of {article(name)} on a {colour} background", "name": name, "colour": colour}
        )
    PROMPTS.write_text("[\n" + ",\n".join(json.dumps(m, ensure_ascii=False) for m in made) + "\n]\n")


if __name__ == "__main__":
    main()
