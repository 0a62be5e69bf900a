"""`cpserve export`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from cpserve.cli._border import writing
from cpserve.cli._common import Common, base_option, common_options, examples, hub_options, open_base
from cpserve.cli._merge import MergeParam, at_hand
from cpserve.cli._show import emit, table
from export.target import DEFAULT_GPUS, GPUS

if TYPE_CHECKING:
    from export.build import Plan

MIB = 1 << 20
PRECISIONS = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


class _List(click.ParamType[Any]):
    """Several values with a sign between them: of `choices`, or numbers of one or more."""

    def __init__(self, name: str, sign: str, choices: tuple[str, ...] = ()) -> None:
        self.name = f"{name}[{sign}{name}]..."
        self.sign = sign
        self.choices = choices

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[Any, ...]:
        parts = value.split(self.sign)
        if not all(part in self.choices if self.choices else part.isdecimal() and int(part) for part in parts):
            self.fail(f"{value!r} is not {self.name}", param, ctx)
        return tuple(parts if self.choices else map(int, parts))


@click.command(
    epilog=examples(
        "cpserve export --onnx --out bundle",
        "cpserve export --openvino --out bundle --dry-run",
        "cpserve export --trt --gpu sm86,sm89 --precision fp16 --out bundle",
        "cpserve export --openvino --merge style.safetensors:0.8 --out bundle",
        "cpserve export --openvino --precision fp32 --batch 2:16 --sizes 64,96 --out bundle",
    )
)
@click.option("--onnx", is_flag=True, help="For ONNX Runtime.")
@click.option("--openvino", is_flag=True, help="For OpenVINO, on CPUs.")
@click.option("--trt", is_flag=True, help="For TensorRT, on NVIDIA's GPUs.")
@click.option(
    "--out",
    type=click.Path(file_okay=False, path_type=Path),
    required=True,
    metavar="BUNDLE",
    help="The folder to write.",
)
@base_option
@click.option(
    "--merge",
    multiple=True,
    type=MergeParam(),
    metavar="LORA[:SCALE]",
    help="Fold a LoRA of any layer into the base: a .safetensors file of diffusers or kohya, its folder, "
    "or a stored version, such as style@v1 or hf://user/style. May be repeated.",
)
@click.option(
    "--precision",
    type=click.Choice(list(PRECISIONS)),
    help="Of the UNet and the decoder.  [default: bf16 for OpenVINO where this CPU has it, else fp32]",
)
@click.option(
    "--batch",
    type=_List("N", ":"),
    help="Row counts to compile; calls of others are put together from these.  "
    "[default: OpenVINO 1:2:3:4:6:8:10:12:16, TensorRT 1:2:4:8:16:32; 2 for a large base]",
)
@click.option(
    "--sizes", type=_List("PX", ","), help="Sides of pictures in pixels to compile.  [default: the base's own]"
)
@click.option(
    "--gpu",
    type=_List("SM", ",", GPUS),
    help=f"Architectures to build plans for, of {', '.join(GPUS)}.  [default: {','.join(DEFAULT_GPUS)}]",
)
@click.option(
    "--slopes",
    is_flag=True,
    help="Also the graph by which `classify` finds the likeliest of many concepts: minutes more, and the UNet's space in float32.",
)
@click.option("--dry-run", is_flag=True, help="Say what would be written, and write nothing.")
@hub_options
@common_options
def export(
    common: Common,
    onnx: bool,
    openvino: bool,
    trt: bool,
    out: Path,
    base: str | None,
    merge: tuple[tuple[str, float], ...],
    precision: str | None,
    batch: tuple[int, ...] | None,
    sizes: tuple[int, ...] | None,
    gpu: tuple[str, ...] | None,
    slopes: bool,
    dry_run: bool,
) -> None:
    """Compile a base model, for all adapters.

    Writes an engine bundle, a folder for --bundle; one is enough for every adapter and version.
    """
    if onnx + openvino + trt != 1:
        raise click.UsageError("choose one of --onnx, --openvino and --trt")
    if gpu and not trt:
        raise click.UsageError("--gpu goes with --trt")
    model = open_base(common, base)
    from export.build import plan_export
    from export.merged import Lora
    from export.target import Target

    target = Target(
        runner="onnx" if onnx else "openvino" if openvino else "trt",
        precision=PRECISIONS[precision] if precision else None,  # type: ignore[arg-type]
        rows=batch or (),
        sizes=sizes or (),
        gpus=gpu or (),
        slopes=slopes,
    )
    plan = plan_export(model, out, target, [Lora(at_hand(common, what), scale) for what, scale in merge])
    value = _told(plan)
    if dry_run:
        files = table(("file", "about", "what"), [(f.name, f"{f.bytes / MIB:,.1f} MiB", f.what) for f in plan.files])
        head = f"{out}: {plan.action}, for {plan.recipe.runner} in {plan.recipe.precision}, about {plan.seconds} s"
        emit(value, f"{head}\n\n{files}", as_json=common.json)
        return
    with writing(out):
        bundle = plan.execute(lambda what: click.echo(what, err=True))
    parity = dict(bundle.manifest.parity)
    done = {"build": "built", "replace": "replaced"}.get(plan.action, plan.action)
    made = f"{out}: {done}, at most {max(parity.values()):.1e} away from torch"
    emit(value | {"parity": parity}, f"{made}\nnext: cpserve generate PROMPT --bundle {out}", as_json=common.json)


def _told(plan: Plan) -> dict[str, Any]:
    from msgspec import to_builtins

    recipe = plan.recipe
    return {
        "action": plan.action,
        "out": str(plan.out),
        "key": recipe.key,
        "runner": recipe.runner,
        "precision": recipe.precision,
        "merged": to_builtins(recipe.merged),
        "rows": recipe.rows,
        "gpus": recipe.gpus,
        "slopes": recipe.slopes,
        "sizes": [side * recipe.vae_factor for side in recipe.sizes],
        "bytes": plan.bytes,
        "seconds": plan.seconds,
        "files": [{"name": f.name, "bytes": f.bytes, "what": f.what} for f in plan.files],
    }
