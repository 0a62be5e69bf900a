"""The model card of a version: what a visitor of its repository or folder reads first."""

from __future__ import annotations

from cpserve.manifest import Manifest

_SNIPPET = """\
```python
from diffusers import StableDiffusionPipeline

R = "."  # this folder
pipe = StableDiffusionPipeline.from_pretrained({base!r}, safety_checker=None)
pipe.load_lora_weights(R, weight_name="pytorch_lora_weights.safetensors", use_safetensors=True)
{embeddings}
pipe("a photo of {token}").images[0]
```"""


def render_card(manifest: Manifest, name: str) -> str:
    """Markdown with the Hub's front matter: triggers, a sample of every concept, the plain-diffusers snippet, scores."""
    concepts = manifest.concepts
    newest = concepts[-1].token if concepts else ""
    front = [
        "---",
        "library_name: diffusers",
        f"base_model: {_quoted(manifest.base.id)}",
        "base_model_relation: adapter",
    ]
    front += [f"instance_prompt: {_quoted(f'a photo of {newest}')}"]
    front += ["tags: [text-to-image, lora, diffusers, 'template:sd-lora']", "widget:"]
    for concept in concepts:
        front += [
            f"- text: {_quoted(f'a photo of {concept.token}')}",
            f"  output: {{url: samples/{concept.name}-0.png}}",
        ]
    front += ["---", ""]
    loads = [
        f'pipe.load_textual_inversion(R, weight_name="embeddings/{c.name}.safetensors", use_safetensors=True)'
        for c in concepts
    ]
    snippet = _SNIPPET.format(base=manifest.base.id, embeddings="\n".join(loads), token=newest)
    body = [
        f"# {name}",
        "",
        f"{len(concepts)} concepts, learned one after another on `{manifest.base.id}` by `{manifest.method}`.",
    ]
    body += ["", "<Gallery />", "", "| concept | say | pictures learned from |", "|---|---|---|"]
    body += [f"| {c.name} | `{c.token}` | {c.pictures} |" for c in concepts]
    body += ["", "## Use it with diffusers", "", snippet, ""]
    if manifest.metrics:
        body += ["## Measured when it was learned", "", *(f"- {k}: {v}" for k, v in manifest.metrics.items()), ""]
    return "\n".join([*front, *body])


def _quoted(text: str) -> str:
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'
