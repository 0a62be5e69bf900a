"""What the lines of the recognition benchmark come to, seed beside seed: intervals, ratios, tables."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from benchmarks.error_tables import calibration_error, interval
from benchmarks.markdown import markdown


def difference(truth: np.ndarray, mine: np.ndarray, theirs: np.ndarray) -> dict[str, Any]:
    """Of accuracies on the same pictures, with 95 % intervals: pictures drawn again, and whole concepts drawn again."""
    off = (mine == truth).astype(float) - (theirs == truth)
    by_concept = np.array([off[truth == c].mean() for c in np.unique(truth)])
    return {"mean": round(float(off.mean()), 4), "interval": interval(off), "interval_by_concept": interval(by_concept)}


def ratios(reference: dict[str, Any], mine: dict[str, Any], alone: dict[str, float]) -> dict[str, float]:
    """How many times what ours costs the reference does."""
    kinds = dict.fromkeys(("eager", mine["engine"]))
    made = {"evaluations": reference["evaluations"] / mine["evaluations"]}
    made |= {"seconds_alone": alone["reference eager"] / alone[f"ours {mine['engine']}"]}
    made |= {f"seconds_alone_both_{kind}": alone[f"reference {kind}"] / alone[f"ours {kind}"] for kind in kinds}
    return {k: round(v, 1) for k, v in made.items()}


def together(lines: Sequence[dict[str, Any]], alone: dict[str, float]) -> dict[str, Any]:
    """Several seeds' lines as one: means, but for what has to be taken over all pictures at once; `alone`: seconds of one."""
    whole: dict[str, Any] = average(lines) | {"seconds_alone": alone, "seeds_together": len(lines)}
    truth, theirs, mine = (np.concatenate([x["labels"][k] for x in lines]) for k in ("truth", "reference", "ours"))
    sure, was_right = (np.concatenate([x["none"][k] for x in lines]) for k in ("sure", "right"))
    whole["difference"] = difference(truth, mine, theirs)
    known = np.concatenate([np.arange(len(x["none"]["sure"])) < len(x["labels"]["truth"]) for x in lines])
    whole["none"]["calibration_error"] = calibration_error(sure, was_right)
    whole["none"]["calibration_error_of_known"] = calibration_error(sure[known], was_right[known])
    whole["ratios"] = ratios(whole["reference"], whole["ours"], whole["seconds_alone"])
    return whole


def average(values: Sequence[Any]) -> Any:
    """Of documents of one shape: the mean of every number in them; anything else is the first one's."""
    first = values[0]
    if isinstance(first, dict):
        return {k: average([v[k] for v in values if k in v]) for k in first}
    if isinstance(first, list | tuple) and all(len(v) == len(first) for v in values):
        return [average(parts) for parts in zip(*values, strict=True)]
    return round(float(np.mean(values)), 5) if isinstance(first, int | float) else first


def table(line: dict[str, Any]) -> str:
    """Markdown: who is right at what cost, what it comes to, what each lever brings, and how cost grows with labels."""
    none, found, usual = line["none"], "at_threshold", line["none"]["by_default"]
    rows = []
    for name, key in (("as published", "reference"), ("`classify`", "ours")):
        one, alone = line[key], {k.split()[1]: v for k, v in line["seconds_alone"].items() if k.startswith(key)}
        took = ", ".join(f"{s:.3g} ({kind})" for kind, s in alone.items())
        never = percent(none[found]["found"]) if key == "ours" else "–"
        twins = percent(one.get("near_twins"))
        many = f"{one['seconds_in_bulk']:.3g} ({one['engine']})" if key == "ours" else "–"  # theirs is one by one
        rows.append([name, percent(one["accuracy"]), twins, one["evaluations"], took, many, never])
    for name, one in line["encoder"].items():
        shares = [percent(s) for s in (one["accuracy"], one.get("near_twins"), one[found]["found"])]
        rows.append([name, *shares[:2], "–", "–", f"{one['seconds_in_bulk']:.3g}", shares[2]])
    head = [
        "",
        "right",
        "near-twins",
        "evaluations",
        "s, one alone",
        "s each, many (mean of all processors)",
        "never taught, found",
    ]
    times, off = line["ratios"], line["difference"]
    (low, high), (least, most) = off["interval"], off["interval_by_concept"]
    said = (
        f"Difference in accuracy {off['mean']:+.1%} (95 % interval {low:+.1%} to {high:+.1%}, by concepts {least:+.1%} to"
        f" {most:+.1%}) at 1/{times['evaluations']:g} of the evaluations and 1/{times['seconds_alone']:g} of the time"
        f" (1/{times['seconds_alone_both_eager']:g} both on eager; {line['timed']['processor']}, {line['timed']['seeds']} of the"
        f" {line['seeds_together']} seeds). The threshold has {none[found]['false_alarms']:.1%} false"
        f' alarms. With "none of these": {none["accuracy"]:.1%} of the known right, {usual["false_alarms"]:.1%} false alarms,'
        f" {usual['found']:.1%} of the others found, {none['evaluations']:g} evaluations and {none['seconds_in_bulk']:.3g} s each,"
        f" expected calibration error {none['calibration_error']:.3f} ({none['calibration_error_of_known']:.3f} of the known)."
    )
    curves = {"as published": line["reference"]["curve"], **line.get("levers", {})}
    wide = max(map(len, curves.values()))
    levers = [[k, *(f"{r:.1%} ({e:.0f})" for e, r in c), *[""] * (wide - len(c))] for k, c in curves.items()]
    keys = ("steps", "evaluations", "reference_evaluations", "seconds_in_bulk")
    scaling = [
        [
            row["labels"],
            min(row["labels"], row.get("kept") or row["labels"]),
            *(row[k] for k in keys),
            percent(row["accuracy"]),
        ]
        for row in line.get("scaling", [])
    ]
    tables = [
        markdown(head, rows),
        markdown(["right (evaluations)", *[""] * wide], levers),
        markdown(["labels", "kept", "steps", "evaluations", "as published", "s each, many", "right"], scaling),
    ]
    return "\n\n".join([tables[0], said, *tables[1:]])


def percent(share: float | None) -> str:
    return "–" if share is None else f"{share:.1%}"
