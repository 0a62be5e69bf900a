"""Prompts' ids in, text states out: the one CLIP encoder of Stable Diffusion 1 and 2, or the two of SDXL side by side.

What tells the generations apart is here and in the UNet's own configuration (`prompt_kv`); everything else sees one tensor a
prompt. Letters as in `signature.py`; `d` is the width of a state, over all encoders, `D` that of the pooled text (0: none).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from cpserve.errors import BaseModelError

PIPELINES = ("StableDiffusionPipeline", "StableDiffusionXLPipeline")  # of diffusers, with one text encoder and with two
COMPONENTS = (("text_encoder", "tokenizer"), ("text_encoder_2", "tokenizer_2"))  # of such a pipeline


def token_table(text_encoder: nn.Module) -> tuple[str, Tensor]:
    """The name and the value of the token embedding's weight, `[V,d]`."""
    return next((n, p) for n, p in text_encoder.named_parameters() if n.endswith("token_embedding.weight"))


class TextEncoder(nn.Module):
    """`(ids [P,S], extra [E,d]) -> e [P,S,d+D]`; ids past the vocabulary are rows of `extra`, the learned tokens.

    One encoder gives its last states. Two give those before their last layers, side by side, as their tokens' embeddings
    are in `extra`; and every position carries the second one's pooled text after its state. The tokenizers of two differ in
    nothing but `padding`, what the second one pads with. `blank`: the empty prompt is all zeros, as SDXL was trained.
    """

    def __init__(self, encoders: Sequence[nn.Module], *, end: int = 0, padding: int = 0, blank: bool = False) -> None:
        super().__init__()
        self.encoders = nn.ModuleList(encoders)
        pooled = {"pooled": "end"} if len(self.encoders) > 1 else {}
        self.config: dict[str, Any] = {"end": end, "padding": padding, "blank": blank, **pooled}

    @classmethod
    def of(cls, pipeline: Any) -> TextEncoder:
        """From a diffusers pipeline.

        Raises:
            BaseModelError: a tokenizer does not fit its encoder, or the two tokenizers differ in more than their padding.
        """
        parts = [(getattr(pipeline, e), getattr(pipeline, t)) for e, t in COMPONENTS if hasattr(pipeline, e)]
        if any(encoder is None or tokenizer is None for encoder, tokenizer in parts):
            raise BaseModelError(
                "the base has a text encoder or a tokenizer too few", hint="use a base model, not a refiner"
            )
        for encoder, tokenizer in parts:
            vocabulary, rows = len(tokenizer), len(token_table(encoder)[1])
            if vocabulary != rows:
                raise BaseModelError(
                    f"the base has a tokenizer of {vocabulary} words and a text encoder of {rows}",
                    hint="use a base without added tokens: learned ones belong into the adapter",
                )
            _end_at(encoder, tokenizer.eos_token_id)
        encoders, (first, *others) = [e for e, _ in parts], [t for _, t in parts]
        if not others:
            return cls(encoders)
        [second] = others
        same = first.get_vocab() == second.get_vocab() and first.model_max_length == second.model_max_length
        if not same or first.pad_token_id != first.eos_token_id:
            raise BaseModelError(
                "the base's two tokenizers differ in more than their padding", hint="use a base with SDXL's own ones"
            )
        blank = bool(pipeline.config.get("force_zeros_for_empty_prompt"))
        return cls(encoders, end=first.eos_token_id, padding=second.pad_token_id, blank=blank)

    @property
    def widths(self) -> tuple[int, ...]:
        """Each encoder's share of `d`."""
        return tuple(token_table(encoder)[1].shape[1] for encoder in self.encoders)

    @property
    def pooled(self) -> int:
        """D."""
        return self.encoders[1].config.projection_dim if len(self.encoders) > 1 else 0  # type: ignore[union-attr,return-value]

    @property
    def table(self) -> Tensor:
        """The vocabulary's embeddings `[V,d]`, side by side as in `extra`."""
        return torch.cat([token_table(encoder)[1] for encoder in self.encoders], dim=1)

    def forward(self, ids: Tensor, extra: Tensor) -> Tensor:
        """See the class. Differentiable in `extra`; the encoders themselves are left alone."""
        if len(self.encoders) == 1:
            return _run(self.encoders[0], ids, extra).last_hidden_state  # type: ignore[no-any-return]
        ends = ids == self.config["end"]
        padded = ids.masked_fill(ends & (ends.cumsum(1) > 1), self.config["padding"])
        parts = zip(self.encoders, (ids, padded), extra.split(list(self.widths), dim=1), strict=True)
        first, second = (_run(encoder, i, rows, output_hidden_states=True) for encoder, i, rows in parts)
        pooled = second.text_embeds[:, None].expand(-1, ids.shape[1], -1)
        e = torch.cat([first.hidden_states[-2], second.hidden_states[-2], pooled], dim=-1)
        return e.masked_fill(ends[:, 1, None, None], 0.0) if self.config["blank"] else e


def _end_at(encoder: nn.Module, token: int) -> None:
    """Let the pooled text be that of the end token. By the configurations of CLIP's first releases (`eos_token_id` 2)
    transformers takes the largest id for it, and a learned token's is larger.
    """
    for module in encoder.modules():
        if hasattr(module, "eos_token_id"):
            setattr(module, "eos_token_id", token)  # noqa: B010 - torch types a module's attributes as tensors


def _run(encoder: nn.Module, ids: Tensor, extra: Tensor, **options: bool) -> Any:
    name, table = token_table(encoder)
    return torch.func.functional_call(encoder, {name: torch.cat([table, extra.to(table.dtype)])}, (ids,), options)
