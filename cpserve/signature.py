"""The engine contract in one table: every compiled UNet takes these inputs and gives this output.

Letters: `B` rows of the batch, `h, w` latent height and width, `P` distinct prompts of the call, `S` tokens of a prompt,
`W` the packed width (see `prompt_kv`). Exporters, runners and tests read this table; nobody types a name twice.
SDXL's UNet takes one more row input, `added`: how large its picture was, where it was cropped, how large it is to be.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from cpserve.errors import EngineError


@dataclass(frozen=True)
class TensorSpec:
    """One input or output: a letter is a free axis, a number a fixed one."""

    name: str
    axes: tuple[str | int, ...]
    dtype: str


@dataclass(frozen=True)
class Signature:
    """The contract of one base model's UNet.

    `multiple` divides every latent side, since each UNet level halves it; `sizes` are the latent sides that an
    engine admits (None: any). `added` counts the numbers of a row's further input (0: there is none).
    """

    channels: int
    packed_width: int
    tokens: int
    multiple: int = 1
    sizes: tuple[int, ...] | None = None
    added: int = 0

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        further = (TensorSpec("added", ("B", self.added), "float32"),) if self.added else ()
        return (
            TensorSpec("latents", ("B", self.channels, "h", "w"), "float32"),
            TensorSpec("timestep", ("B",), "float32"),
            TensorSpec("kv_bank", ("P", self.tokens, self.packed_width), "float32"),
            TensorSpec("slot", ("B",), "int64"),
            *further,
        )

    @property
    def output(self) -> TensorSpec:
        return TensorSpec("output", ("B", self.channels, "h", "w"), "float32")

    def shapes(self, axes: Mapping[str, int]) -> dict[str, tuple[int, ...]]:
        """The inputs' shapes by name, given a size for each letter."""
        return {i.name: tuple(axes[a] if isinstance(a, str) else a for a in i.axes) for i in self.inputs}

    def check(self, latents: Tensor, timestep: Tensor, kv_bank: Tensor, slot: Tensor, *added: Tensor) -> None:
        """Refuse rows outside the contract before an engine sees them.

        Raises:
            EngineError: a rank, fixed axis, dtype, batch, size or slot is outside the table, or there is an input too many.
        """
        free: dict[str, int] = {}
        inputs = (latents, timestep, kv_bank, slot, *added)
        if len(inputs) != len(self.inputs):
            raise EngineError(
                f"{len(inputs)} inputs, the engine takes {', '.join(spec.name for spec in self.inputs)}",
                hint="only SDXL's rows have sizes of their own",
            )
        for spec, given in zip(self.inputs, inputs, strict=True):
            expected = tuple(free.get(a, a) if isinstance(a, str) else a for a in spec.axes)
            fits = given.ndim == len(expected) and all(
                isinstance(e, str) or e == g for e, g in zip(expected, given.shape, strict=True)
            )
            if not fits or str(given.dtype) != f"torch.{spec.dtype}":
                raise EngineError(
                    f"{spec.name} is {given.dtype} {list(given.shape)}, the engine takes {spec.dtype} {list(expected)}",
                    hint="rows of one call share their picture size; timesteps and slots are one number a row",
                )
            free |= {a: g for a, g in zip(spec.axes, given.shape, strict=True) if isinstance(a, str)}
        self._check_ranges(free, slot)

    def _check_ranges(self, free: dict[str, int], slot: Tensor) -> None:
        if free["B"] and not (int(slot.min()) >= 0 and int(slot.max()) < free["P"]):
            raise EngineError(
                f"a slot lies outside the bank of {free['P']} prompts", hint="slots count from 0 to P - 1"
            )
        if free["h"] % self.multiple or free["w"] % self.multiple:
            raise EngineError(
                f"latents of {free['h']}x{free['w']}, the UNet takes sides that are multiples of {self.multiple}",
                hint="round the picture size up or down to the next size that fits",
            )
        if self.sizes is not None and not {free["h"], free["w"]} <= set(self.sizes):
            raise EngineError(
                f"latents of {free['h']}x{free['w']}, the engine was compiled for {', '.join(map(str, self.sizes))}",
                hint="generate at a size that the bundle holds, or export again with the sizes you need",
            )
