"""Laws of `cpserve adapters` on the Hub: each verb says what it did, in words or JSON; each refusal is one sentence, exit 1."""

# ruff: noqa: F811, ARG001 - fixtures are named by arguments

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import partial

import numpy as np
import pytest
from safetensors.numpy import load, save

from adapter_store import Store
from tests import command
from tests.hubserver.app import OTHER_TOKEN, OWNER_TOKEN
from tests.hubserver.client import environment, hub  # noqa: F401
from tests.hubserver.content import draft, files_of, learn

PETS = "hf://me/pets"
WEIGHTS = "pytorch_lora_weights.safetensors"
KEY = "unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_k"


run = partial(command.run, "adapters")


def told(*args):
    return json.loads(run(*args, "--json").stdout)


@pytest.fixture
def home(tmp_path, monkeypatch):
    """Where the commands find their store."""
    monkeypatch.setenv("CPSERVE_HOME", str(tmp_path / "home"))
    return Store(tmp_path / "home")


def test_the_story_of_a_repository(home, hub, tmp_path, monkeypatch):
    """Push, look, point, go back, repair, pull elsewhere: each verb finds what the one before left, and says so."""
    learn(home, count=2)
    assert run("push", "pets", PETS).stdout == f"pushed v1, v2 to {PETS}\n"
    assert run("push", "pets", PETS).stdout == f"{PETS}@v2 is there already\n"
    assert told("push", "pets", PETS) == {"version": f"{PETS}@v2", "pushed": []}
    assert run("alias", "set", PETS, "prod", "v1").stdout == f"{PETS}@prod is now v1\n"
    assert told("alias", "list", PETS) == {"prod": 1}
    assert f"{PETS}@v3 now holds what {PETS}@v1 does" in run("rollback", f"{PETS}@prod").stdout
    assert [each["version"] for each in told("log", PETS)] == [3, 2, 1]
    [listed] = told("list", PETS)
    assert (listed["name"], listed["version"], listed["aliases"]) == (PETS, 3, {"prod": 1})
    assert told("alias", "remove", PETS, "prod") == {"name": PETS, "removed": "prod"}
    assert f"{PETS} has no alias 'prod'" in run("alias", "remove", PETS, "prod", code=1).stderr
    assert told("alias", "list", PETS) == {}
    assert told("show", f"{PETS}@v2")["version"] == 2
    run("checkout", f"{PETS}@v2", tmp_path / "out")
    assert (tmp_path / "out" / "README.md").read_bytes() == files_of(2)["README.md"]
    hub.repos["me/pets"].untag("v2")
    assert "the tag v2 is missing" in run("verify", PETS, code=1).stdout
    repaired = run("verify", PETS, "--repair")
    assert "nothing damaged" in repaired.stdout
    assert "set v2 again" in repaired.stderr
    monkeypatch.setenv("CPSERVE_HOME", str(tmp_path / "elsewhere"))
    assert told("pull", f"{PETS}@v2", "--as", "dogs")["versions"] == [1, 2]
    assert run("pull", f"{PETS}@v2", "--as", "dogs").stdout == "dogs@v2 was here already\n"
    assert "pets@v3 is here" in run("pull", PETS).stdout
    assert {each["name"] for each in told("list")} == {"dogs", "pets"}
    assert run("verify").stdout == "2 adapters, nothing damaged\n"


def test_a_damaged_manifest_hides_one_adapter_until_it_is_pulled_again(home, hub):
    """Every other one is listed, the sentence names the way out, and that mends it."""
    learn(home, count=2)
    learn(home, "cats")
    home.push("pets", PETS)
    (home.root / "blobs" / home.version("pets").pin.manifest_sha256).write_bytes(b"half")
    listed = run("list", code=1)
    assert "cats" in listed.stdout
    assert "pets" not in listed.stdout
    assert "pull hf://USER/REPO@v2 --as pets" in listed.stderr
    run("pull", f"{PETS}@v2", "--as", "pets")
    assert run("verify").stdout == "2 adapters, nothing damaged\n"


def test_whoever_comes_second_is_told_and_can_fork(home, hub, tmp_path, monkeypatch):
    """The refusal names the commands that go on, and they work as they are printed."""
    learn(home)
    run("push", "pets", PETS)
    monkeypatch.setenv("CPSERVE_HOME", str(tmp_path / "second"))
    run("pull", PETS, "--for-training")
    learn(home)
    home.push("pets", PETS)
    second = Store(tmp_path / "second")
    second.commit("pets", files_of(7), draft(2), expected_head=1)
    refused = run("push", "pets", PETS, code=1)
    assert (
        "has moved on: its head is v2 (dog, cat), which pets@v2 does not follow; nothing of yours is lost"
        in refused.stderr
    )
    assert f"cpserve adapters push pets {PETS} --fork OTHER" in refused.stderr
    assert "v1, v2 to hf://me/pets-mine" in run("push", "pets", PETS, "--fork", "pets-mine").stdout
    assert home.verify("hf://me/pets-mine") == []


REFUSALS = {
    "a local name for a pull": ("pull pets", "is no reference to the Hub"),
    "a local name to push to": ("push pets mypets --fork other", "is no reference to the Hub"),
    "a version for a push": ("push pets hf://me/pets@v1", "names a version"),
    "nothing to push": ("push cats hf://me/cats", "there is no adapter 'cats'"),
    "nothing there": ("log hf://me/nothing", "does not exist, is private, or the token is wrong"),
    "a malformed repository": ("show hf://me", "is not a repository on the Hub"),
    "a version in a name": ("log hf://me/pets@v1", "names a version, not an adapter"),
    "a repair of what is here": ("verify pets --repair", "only tags on the Hub can be repaired"),
    "a reserved alias": ("alias set pets latest v1", "cannot be an alias"),
    "no such version": ("alias set pets prod v9", "there is no pets@v9"),
    "no such alias": ("alias remove pets prod", "pets has no alias 'prod'"),
    "aliases of nobody": ("alias list cats", "there is no adapter 'cats'"),
    "no file": ("import nothing.safetensors x", "cannot be read"),
    "weights that are none": ("convert pets --format kohya --out x.safetensors", "is not a safetensors file"),
    "weights that cannot be compared": ("diff pets pets", "is not a safetensors file"),
    "no address": ("log hf://me/pets --endpoint huggingface.co", "is no address of a Hub"),
}


@pytest.mark.parametrize(("line", "words"), REFUSALS.values(), ids=REFUSALS)
def test_refusals_are_one_sentence_and_a_hint(home, hub, line, words):
    """Exit 1, nothing on stdout, no traceback."""
    learn(home)
    refused = run(*line.split(), code=1)
    assert words in refused.stderr
    assert "hint: " in refused.stderr
    assert refused.stdout == ""
    assert len(refused.stderr.splitlines()) == 2


@pytest.mark.parametrize(
    "line",
    ["push pets", "pull", "alias set pets prod 3", "verify --repair", "convert pets --out x", "diff pets", "gc x"],
)
def test_wrong_options_exit_2(home, hub, line):
    """click's own words."""
    run(*line.split(), code=2)


def test_the_hub_and_the_token_can_be_named(home, hub, tmp_path, monkeypatch):
    """`--endpoint` and `--token-file` win over the environment."""
    learn(home)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("HF_TOKEN", OTHER_TOKEN)
    (tmp_path / "token").write_text(OWNER_TOKEN)
    where = ("--endpoint", hub.endpoint, "--token-file", tmp_path / "token")
    run("push", "pets", PETS, "--public", *where)
    assert not hub.repos["me/pets"].private
    assert told("log", PETS, "--endpoint", hub.endpoint)[0]["version"] == 1
    assert "cannot be reached" in run("log", PETS, code=1).stderr


COMMAND = (sys.executable, "-c", "from cpserve.cli import main; main()", "adapters")


def test_a_fresh_process_honours_the_environment(home, hub, tmp_path):
    """HF_ENDPOINT, HF_TOKEN, HF_HOME and HF_HUB_OFFLINE mean what they mean to every tool of the Hub."""
    learn(home, count=2)
    home.push("pets", PETS)
    env = {**os.environ, **environment(hub, tmp_path / "hf"), "CPSERVE_HOME": str(tmp_path / "fresh")}

    def fresh(*args, **changed):
        return subprocess.run([*COMMAND, *args], env={**env, **changed}, capture_output=True, text=True, check=False)

    assert "does not exist, is private, or the token is wrong" in fresh("pull", PETS, HF_TOKEN="").stderr
    assert fresh("pull", f"{PETS}@v2").returncode == 0
    assert list((tmp_path / "hf" / "hub").glob("models--me--pets/snapshots/*/cpserve.json"))
    asked = len(hub.asked)
    assert fresh("pull", f"{PETS}@v2", HF_HUB_OFFLINE="1").stdout == "pets@v2 was here already\n"
    assert json.loads(fresh("show", f"{PETS}@v2", "--json", HF_HUB_OFFLINE="1").stdout)["version"] == 2
    assert "HF_HUB_OFFLINE forbids" in fresh("show", f"{PETS}@v1", HF_HUB_OFFLINE="1", HF_HOME=str(tmp_path)).stderr
    assert len(hub.asked) == asked


def test_whoever_watches_sees_files_go_and_come(home, hub, tmp_path):
    """At a terminal there are bars, on stderr: what a program reads on stdout stays alone there."""
    pty, termios = pytest.importorskip("pty"), pytest.importorskip("termios")
    home.commit("pets", {WEIGHTS: bytes(1 << 20)}, draft(1), expected_head=0)
    env = {**os.environ, **environment(hub, tmp_path / "hf"), "HF_HUB_DISABLE_PROGRESS_BARS": ""}
    for args in (("push", "pets", PETS), ("pull", PETS, "--store", tmp_path / "mine")):
        ours, theirs = pty.openpty()
        termios.tcsetwinsize(theirs, (40, 120))
        process = subprocess.Popen([*COMMAND, *args, "--json"], env=env, stdout=subprocess.PIPE, stderr=theirs)
        os.close(theirs)
        shown = b""
        try:
            while part := os.read(ours, 1 << 16):
                shown += part
        except OSError:  # how Linux says that nobody writes there any more
            pass
        assert json.loads(process.communicate()[0])["version"].endswith("@v1")
        assert b"100%" in shown
        assert b"1.05M" in shown
        os.close(ours)


def test_gc_shows_its_plan_and_does_it(home):
    """What `--dry-run` prints is what is deleted."""
    learn(home)
    assert run("gc").stdout == "nothing to delete\n"
    (home.root / "blobs" / ("f" * 64)).write_bytes(b"x")
    planned = told("gc", "--dry-run")
    assert planned["files"] == [{"path": f"blobs/{'f' * 64}", "bytes": 1, "what": "content of no version"}]
    assert "would delete 1 files" in run("gc", "--dry-run").stdout
    assert told("gc")["files"] == planned["files"]
    assert run("gc").stdout == "nothing to delete\n"


def test_diff_and_convert(home, tmp_path):
    """The layers that moved are listed; the weights come out under the names asked for."""
    for number, scale in enumerate((1.0, 3.0)):
        factors = {f"{KEY}.lora_A.weight": np.eye(2, 3), f"{KEY}.lora_B.weight": scale * np.eye(4, 2)}
        files = {WEIGHTS: save({k: v.astype(np.float32) for k, v in factors.items()})}
        home.commit("pets", files, draft(number + 1), expected_head=number)
    found = told("diff", "pets@v1", "pets@v2")
    assert found["layers"][KEY]["moved"] == pytest.approx(2 * 2**0.5)
    assert found["concepts"] == {"cat": [None, "<cat>"]}
    assert KEY in run("diff", "pets@v1", "pets@v2").stdout
    assert "no layer moved" in run("diff", "pets", "pets").stdout
    run("convert", "pets", "--format", "kohya", "--out", tmp_path / "sub" / "k.safetensors")
    kohya = load((tmp_path / "sub" / "k.safetensors").read_bytes())
    flat = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_k"
    assert set(kohya) == {f"{flat}.{part}" for part in ("alpha", "lora_down.weight", "lora_up.weight")}
    assert float(kohya[f"{flat}.alpha"]) == 2
