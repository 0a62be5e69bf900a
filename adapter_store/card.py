"""The model card of a version: what a visitor of its repository or folder reads first."""

from __future__ import annotations

import json
import re
from collections.abc import Collection

from adapter_store.layout import MATRIX
from cpserve.manifest import EMBEDDINGS, SAMPLES, Manifest, sample_name

_BUILTIN = "builtin:"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")

_SNIPPET = """\
```python
{imports}import torch
from diffusers import DiffusionPipeline

R = "."  # this folder; or the name of this repository on the Hub, with revision="vN" below for one version
pipe = DiffusionPipeline.from_pretrained({base}, torch_dtype=torch.float32, safety_checker=None)
pipe.load_lora_weights(R, weight_name="pytorch_lora_weights.safetensors", use_safetensors=True)
{embeddings}pipe("{prompt}").images[0]
```"""


_ENCODERS = {EMBEDDINGS[0]: "", EMBEDDINGS[1]: ", text_encoder=pipe.text_encoder_2, tokenizer=pipe.tokenizer_2"}

# SDXL's configuration names no end of a text, and transformers then takes the learned word for it.
_END = "pipe.text_encoder_2.text_model.eos_token_id = pipe.tokenizer_2.eos_token_id  # else it reads no further than a token\n"

_MATRIX = f"""\
## What is left of each concept

![a row a concept, a column a version]({MATRIX})

A column is the version after one more concept was learned. Each field says how alike a concept's pictures are to those from
when it was learned, drawn from the same seeds: 1 is nothing forgotten.
"""


def render_card(manifest: Manifest, name: str, paths: Collection[str] = ()) -> str:
    """Markdown with the Hub's front matter: triggers, a sample of every concept, the plain-diffusers snippet, scores.

    `paths` are the version's files: what is left of each concept is shown if that was drawn, and tokens of SDXL's second text
    encoder are loaded if there are some.
    """
    concepts = manifest.concepts
    base = manifest.base.id
    parts = [_front(manifest), f"# {name}", ""]
    if concepts:
        parts += [f"{len(concepts)} concepts, learned one after another on `{base}` by `{manifest.method}`.", ""]
        parts += ["<Gallery />", "", "| concept | say | pictures learned from | |", "|---|---|---|---|"]
        parts += [
            f"| {c.name} | `{c.token}` | {c.pictures} | ![{c.name}]({SAMPLES}/{sample_name(c.name, 0)}) |"
            for c in concepts
        ]
    else:
        touched = "keys and values of the cross-attention" if manifest.layers == "kv" else "other layers, too"
        parts += [f"A LoRA for `{base}`, {manifest.method}: {touched}."]
    embeddings = [
        (f"{folder}/{c.name}.safetensors", encoder) for c in concepts for folder, encoder in _ENCODERS.items()
    ]
    loads = [
        f'pipe.load_textual_inversion(R, weight_name="{path}", use_safetensors=True{encoder})\n'
        for path, encoder in embeddings
        if not encoder or path in paths
    ]
    if len(loads) > len(concepts):
        loads.append(_END)
    prompt = f"a photo of {concepts[-1].token}" if concepts else "a photo of a cat"
    imports, where = "", json.dumps(base)
    if base.startswith(_BUILTIN):
        imports, where = (
            "from importlib.resources import files\n\n",
            f'files("cpserve") / {json.dumps("models/" + base.removeprefix(_BUILTIN))}',
        )
    snippet = _SNIPPET.format(imports=imports, base=where, embeddings="".join(loads), prompt=prompt)
    parts += ["", "## Use it with diffusers", "", snippet, ""]
    if MATRIX in paths:
        parts += [_MATRIX]
    if manifest.metrics:
        parts += ["## Measured", "", *(f"- {k}: {v}" for k, v in manifest.metrics.items()), ""]
    return "\n".join(parts)


def _front(manifest: Manifest) -> str:
    """The front matter that the Hub reads; JSON strings are YAML strings."""
    lines = ["---", "library_name: diffusers"]
    if _HUB_ID.fullmatch(manifest.base.id):  # it refuses a base that is none of its own
        lines += [f"base_model: {json.dumps(manifest.base.id)}", "base_model_relation: adapter"]
    lines += ["tags: [text-to-image, lora, diffusers, 'template:sd-lora']"]
    if manifest.concepts:
        lines += [f"instance_prompt: {json.dumps(f'a photo of {manifest.concepts[-1].token}')}", "widget:"]
    for concept in manifest.concepts:
        lines += [
            f"- text: {json.dumps(f'a photo of {concept.token}')}",
            f"  output: {{url: {json.dumps(f'{SAMPLES}/{sample_name(concept.name, 0)}')}}}",
        ]
    return "\n".join([*lines, "---", ""])
