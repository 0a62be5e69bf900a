"""A base model is read from a folder or a single file, never from a pickle, and says what it is."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from cpserve.base import BaseModel, _generation, load_base
from cpserve.errors import BaseModelError
from cpserve.text_encoder import PIPELINES
from tests import plain
from tests.ldm import single_file
from tests.tiny import SD15, write_pipeline


@pytest.fixture
def checkpoint(folders: dict[str, Path], tmp_path: Path) -> Path:
    """The sd15 folder's weights as one original checkpoint, its settings beside it and no other weights."""
    shutil.copytree(folders["sd15"], tmp_path / "sd", ignore=shutil.ignore_patterns("*.safetensors"))
    save_file(single_file(plain.pipeline(folders["sd15"])), tmp_path / "sd" / "model.safetensors")
    return tmp_path / "sd" / "model.safetensors"


def test_a_single_file_is_the_same_base_as_its_folder(checkpoint: Path, bases: dict[str, BaseModel]) -> None:
    """One safetensors file in the original layout, its settings beside it, gives the folder's fingerprint, offline."""
    assert load_base(str(checkpoint)).spec.entry.fingerprint == bases["sd15"].spec.entry.fingerprint


def test_what_lies_here_asks_no_hub(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An address that is none keeps nobody from a model whose every part is here."""
    monkeypatch.setenv("HF_ENDPOINT", "http://[nowhere")
    assert load_base(str(checkpoint)).spec.entry.fingerprint


def test_a_single_file_alone_says_what_is_missing(checkpoint: Path) -> None:
    """With no settings beside it and no network, the error's hint says where the settings belong."""
    (checkpoint.parent / "model_index.json").unlink()
    with pytest.raises(BaseModelError) as refused:
        load_base(str(checkpoint))
    assert "model_index.json" in refused.value.hint


def test_a_base_of_the_hub_is_pinned(folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An adapter records the commit that its base had; a folder has none, wherever it lies."""
    commit, place = "c0" * 20, tmp_path / "models--user--tiny"
    snapshot = shutil.copytree(folders["sd15"], place / "snapshots" / commit)
    (place / "refs").mkdir()
    (place / "refs" / "main").write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert load_base("user/tiny").spec.entry.commit == commit
    assert load_base(str(snapshot)).spec.entry.commit is None


@pytest.mark.parametrize(
    ("part", "change"),
    [
        ("scheduler/scheduler_config.json", {"_class_name": "EDMEulerScheduler", "beta_schedule": None}),
        ("unet/config.json", {"time_cond_proj_dim": 8}),
    ],
    ids=["no schedule of betas", "guidance as an input"],
)
def test_what_would_be_computed_wrongly_is_refused(
    folders: dict[str, Path], tmp_path: Path, part: str, change: dict[str, object]
) -> None:
    """Models of another kind of training are no bases, though they have the same shapes."""
    folder = shutil.copytree(folders["sd15"], tmp_path / "sd")
    settings = json.loads((folder / part).read_text()) | change
    (folder / part).write_text(json.dumps({k: v for k, v in settings.items() if v is not None}))
    if "_class_name" in change:
        index = json.loads((folder / "model_index.json").read_text()) | {
            "scheduler": ["diffusers", change["_class_name"]]
        }
        (folder / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(BaseModelError, match="schedule of betas, or takes the guidance"):
        load_base(str(folder))


def test_a_model_with_a_weight_too_few_is_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    """diffusers leaves what it does not find without numbers, and says so in a log."""
    weights = shutil.copytree(folders["sd15"], tmp_path / "sd") / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(weights)
    del tensors["conv_out.bias"]
    save_file(tensors, weights, metadata={"format": "pt"})
    with pytest.raises(BaseModelError, match=r"no weights for conv_out\.bias"):
        load_base(str(tmp_path / "sd"))


@pytest.mark.parametrize(("name", "kind"), [("conditioner.embedders.1.model.w", 1), ("cond_stage_model.w", 0)])
def test_a_single_file_is_of_the_generation_of_its_weights(tmp_path: Path, name: str, kind: int) -> None:
    """SDXL's holds a second text encoder."""
    save_file({name: torch.zeros(1)}, tmp_path / "model.safetensors")
    assert _generation(tmp_path / "model.safetensors") == PIPELINES[kind]


@pytest.mark.parametrize("name", ["model.ckpt", "model.pt", "model.bin"])
def test_pickles_are_refused_unread(tmp_path: Path, name: str) -> None:
    """A pickle can run code when read, so it is not read."""
    (tmp_path / name).write_bytes(b"cos\nsystem\n(S'false'\ntR.")
    with pytest.raises(BaseModelError, match="pickle"):
        load_base(str(tmp_path / name))


def test_a_folder_of_pickles_is_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    """A folder whose UNet is a pickle is no base."""
    shutil.copytree(folders["sd15"], tmp_path / "sd")
    weights = tmp_path / "sd" / "unet" / "diffusion_pytorch_model.safetensors"
    weights.unlink()
    torch.save({}, weights.with_suffix(".bin"))
    with pytest.raises(BaseModelError):
        load_base(str(tmp_path / "sd"))


def test_scaling_factor_is_read_from_the_vae(
    folders: dict[str, Path], bases: dict[str, BaseModel], tmp_path: Path
) -> None:
    """A folder with another VAE scaling factor gives latents scaled by their ratio, and the same pictures back."""
    other = load_base(str(write_pipeline(tmp_path / "sd", SD15, scaling_factor=0.5)))
    pictures = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    ours, theirs = bases["sd15"].encode_pictures(pictures), other.encode_pictures(pictures)
    torch.testing.assert_close(theirs, ours * (0.5 / 0.18215))
    torch.testing.assert_close(other.decode(theirs), bases["sd15"].decode(ours), atol=1e-5, rtol=1e-5)
    judge = plain.pipeline(folders["sd15"]).vae
    with torch.no_grad():
        torch.testing.assert_close(ours, judge.encode(pictures).latent_dist.mean * judge.config.scaling_factor)


def test_fingerprint_is_content(folders: dict[str, Path], bases: dict[str, BaseModel], tmp_path: Path) -> None:
    """The same weights in another folder have the same fingerprint; other weights share the architecture's half."""
    shutil.copytree(folders["sd15"], tmp_path / "copy")
    assert load_base(str(tmp_path / "copy")).spec.entry.fingerprint == bases["sd15"].spec.entry.fingerprint
    other = load_base(str(write_pipeline(tmp_path / "other", SD15, seed=1))).spec.entry.fingerprint
    assert other.architecture == bases["sd15"].spec.entry.fingerprint.architecture
    assert other.weights != bases["sd15"].spec.entry.fingerprint.weights
