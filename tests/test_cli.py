"""Laws of the command line: the story from pictures to a bundle, words and exit codes, and what is printed where."""

from __future__ import annotations

import csv
import io
import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import click
import pytest
from filelock import FileLock
from msgspec.structs import replace
from PIL import Image

import trainer
from adapter_store import Store
from cpserve.base import BUILTIN
from cpserve.cli import VERBS, _common, _show, doctor, generate, main, train
from cpserve.cli._common import Common, base_of
from cpserve.cli._pictures import slug
from cpserve.errors import AdapterError
from cpserve.manifest import Manifest
from cpserve.sample import SAMPLERS
from cpserve.tokens import HUGGING_FACE
from tests.command import run
from tests.hubserver.content import draft
from tests.lessons import zipped
from tools.cli_reference import commands, root

COMMANDS = {context.command_path: command for command, context in commands(main, root())}
BASE, OTHER = "sd21", "sd15"  # the first has fewer levels and compiles sooner
QUICK = "batch = 2\nvariants = 2\nrank = 2\n"
HEAVY = {"torch", "diffusers", "transformers", "numpy", "PIL", "msgspec"}
IN_PROCESS = [sys.executable, "-c", "from cpserve.cli import main; main()"]


@pytest.fixture(scope="module")
def home(folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two concepts, quick settings, and a store whose adapter `pets` learned both."""
    home = tmp_path_factory.mktemp("home")
    (home / "quick.toml").write_text(QUICK)
    dog, cat = (zipped(home / f"{name}.zip", seed) for seed, name in enumerate(("dog", "cat")))
    base = ("--base", folders[BASE], "--config", home / "quick.toml", "--steps", 4)
    told = run("train", "--concept", dog, "--concept", cat, "--adapter", "pets", *base, "--store", home / "store")
    assert "pets@v1  learned dog" in told.stdout
    assert 'cpserve generate "a photo of <cat>" --adapter pets' in told.stdout
    assert "learning cat 4/4, loss" in told.stderr
    return home


def test_the_story(home: Path, folders: dict[str, Path], tmp_path: Path) -> None:
    """Train, draw, recognise, look back, go back, take out, compile, draw again: each step finds what the one before left."""
    base, store = ("--base", folders[BASE]), ("--store", home / "store")
    drawn = run(
        "generate",
        "a photo of <dog>",
        "-n",
        2,
        "--steps",
        3,
        "--adapter",
        "pets",
        "--out",
        tmp_path / "out",
        *store,  # the base is the adapter's
    )
    assert {p.name for p in (tmp_path / "out").iterdir()} == {
        "a-photo-of-dog-0.png",
        "a-photo-of-dog-1.png",
        "grid.png",
    }
    assert drawn.stdout.splitlines()[-1] == str(tmp_path / "out" / "grid.png")

    table = tmp_path / "labels.csv"
    run("classify", tmp_path / "out", "--adapter", "pets", "--draws", 2, "--out", table, *store)
    rows = list(csv.DictReader(table.open()))
    assert len(rows) == 3
    assert all(abs(sum(float(row[label]) for label in ("dog", "cat", "none of these")) - 1) < 1e-4 for row in rows)
    assert {row["adapter"] for row in rows} == {"pets@v2"}

    assert [line.split()[0] for line in run("adapters", "log", "pets", *store).stdout.splitlines()] == [
        "version",
        "v2",
        "v1",
    ]
    assert "pets@v3 now holds what pets@v1 does" in run("adapters", "rollback", "pets@v1", *store).stdout
    assert "<cat>" not in run("adapters", "show", "pets", *store).stdout
    assert "name an older one" in run("adapters", "rollback", "pets", *store, code=2).stderr
    run("adapters", "checkout", "pets@v2", tmp_path / "pets", *store)
    assert (tmp_path / "pets" / "samples" / "cat-0.png").is_file()
    assert "nothing damaged" in run("adapters", "verify", *store).stdout

    bundle = tmp_path / "bundle"
    assert "build" in run("export", "--onnx", "--out", bundle, "--dry-run", *base).stdout
    assert not bundle.exists()
    assert "away from torch" in run("export", "--onnx", "--out", bundle, *base).stdout
    again = run(
        "generate",
        "a photo of <dog>",
        "-n",
        1,
        "--steps",
        3,
        "--adapter",
        "pets",
        "--bundle",
        bundle,
        "--json",
        "--out",
        tmp_path,
        *store,
    )
    assert json.loads(again.stdout)["pictures"][0]["engine"] == "onnx"


def test_a_picture_says_what_made_it_and_is_never_lost(home: Path, folders: dict[str, Path], tmp_path: Path) -> None:
    """The same command writes the same files; other settings leave them alone and take the next free name."""
    where = ("-n", 1, "--base", folders[BASE], "--store", home / "store", "--out", tmp_path)
    prompts = ("a photo of <dog>", "a photo of <dog>", "--adapter", "pets@v1", "--adapter", "pets@v2", "--json")
    first = json.loads(run("generate", *prompts, "--steps", 2, *where).stdout)
    assert [p["adapter"] for p in first["pictures"]] == ["pets@v1", "pets@v2"]
    assert [Path(p["file"]).name for p in first["pictures"]] == ["a-photo-of-dog-0.png", "a-photo-of-dog-0-2.png"]
    inside = Image.open(first["pictures"][1]["file"]).info
    assert {key: inside[key] for key in ("prompt", "adapter", "seed", "steps", "guidance")} == {
        "prompt": "a photo of <dog>",
        "adapter": "pets@v2",
        "seed": "0",
        "steps": "2",
        "guidance": "3.0",
    }
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    assert json.loads(run("generate", *prompts, "--steps", 2, *where).stdout) == first
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before
    run("generate", *prompts, "--steps", 3, *where)
    assert before.items() < {path: path.read_bytes() for path in tmp_path.iterdir()}.items()
    assert (tmp_path / "grid-2.png").is_file()


def test_what_is_deleted_is_gone(home: Path, tmp_path: Path) -> None:
    """All versions, their contents and an unfinished run; what another adapter shares stays whole, and no answer is no."""
    place = shutil.copytree(home / "store", tmp_path / "store")
    store = Store(place)
    version, versions = store.version("pets@v1"), store.head("pets")
    store.commit("others", {path: version.read(path) for path in version.paths()}, version.manifest, expected_head=0)
    (place / "runs" / "pets").mkdir(parents=True)
    (place / "runs" / "pets" / "latents.safetensors").write_bytes(b"of pictures")
    assert "Aborted" in run("adapters", "delete", "pets", "--store", place, code=1).stderr
    assert store.verify() == []
    told = json.loads(run("adapters", "delete", "pets", "--yes", "--json", "--store", place).stdout)
    assert (told["versions"], store.names(), store.verify()) == (versions, ["others"], [])
    assert told["bytes"] > 0
    assert not (place / "runs" / "pets").exists()
    run("adapters", "delete", "hf://me/pets", "--yes", "--store", place, code=2)
    assert "adapters here: others" in run("adapters", "delete", "pets", "--yes", "--store", place, code=1).stderr
    run("adapters", "delete", "nobody", "--store", place, code=1)
    assert not (place / "runs" / ".nobody.lock").exists()
    (place / "runs" / "begun").mkdir()
    run("adapters", "delete", "begun", "--yes", "--store", place)
    assert not (place / "runs" / "begun").exists()
    with FileLock(place / "runs" / ".others.lock"):
        said = run("adapters", "delete", "others", "--yes", "--store", place, code=1).stderr
    assert "another process is teaching" in said
    assert store.verify() == []
    run("adapters", "delete", "others", "--yes", "--store", place)
    assert not any((place / "blobs").iterdir())
    assert "no adapter" in run("adapters", "list", "--store", place).stdout


def test_a_word_that_nobody_learned_is_remarked_on(home: Path, folders: dict[str, Path], tmp_path: Path) -> None:
    """A learned token that the adapter does not know is named, with those that it knows."""
    told = run(
        "generate",
        "<dgo>",
        "-n",
        1,
        "--steps",
        1,
        "--adapter",
        "pets@v2",
        "--base",
        folders[BASE],
        "--store",
        home / "store",
        "--out",
        tmp_path,
    )
    assert "note: pets@v2 has not learned <dgo>; it knows <dog>, <cat>" in told.stderr


@pytest.mark.parametrize("path", [path for path in COMMANDS if path != "cpserve"])
def test_every_command_has_help_with_an_example(path: str) -> None:
    """Help ends with at least one whole command to copy."""
    words = run(*path.split()[1:], "--help").stdout
    assert "Example" in words
    assert f"  {path} " in words or f"  {path}\n" in words


def test_every_verb_takes_the_common_options() -> None:
    """--json, --threads and --store go with everything that does something."""
    for path, command in COMMANDS.items():
        if not isinstance(command, click.Group):
            assert {"as_json", "threads", "root"} <= {parameter.name for parameter in command.params}, path


def test_words_typed_twice_are_the_same() -> None:
    """Choices and defaults spelt out for the sake of a fast --help are those of the library."""
    assert train.METHODS == trainer.METHODS
    told = {option.name: getattr(option, "help", None) or "" for option in train.train.params}
    for name in ("method", "steps", "rank", "seed"):
        assert f"[default: {getattr(trainer.Settings(), name)}]" in told[name]
    assert tuple(SAMPLERS) == generate.SAMPLERS
    assert _common.BASE == BUILTIN


REFUSED = {
    "no such adapter": ("adapters log nobody", "there is no adapter 'nobody'"),
    "no such version": ("adapters show pets@v9", "there is no pets@v9"),
    "a climbing reference": ("adapters checkout ../pets {new}", "'../pets' cannot be a name"),
    "a climbing adapter": ("train --concept {home}/dog.zip --adapter ../x --restart", "'../x' cannot be a name"),
    "a climbing concept": ("train --concept {home}/dog.zip --name ../x", "'../x' cannot be a name"),
    "no such zip": ("train --concept {home}/none.zip", "does not exist"),
    "a name too long": (f"check {'x' * 300}", "File name too long"),
    "a broken zip": ("train --concept {broken}", "neither a folder nor a zip"),
    "a name taken": ("train --concept {home}/dog.zip --adapter pets", "two concepts called 'dog'"),
    "a name given twice": ("train --concept {home}/dog.zip --concept {home}/dog.zip", "two concepts called 'dog'"),
    "an unknown setting": ("train --concept {home}/dog.zip --config {toml}", "there is no setting 'rnk'"),
    "a full folder": ("adapters checkout pets {home}", "is not an empty folder"),
    "no bundle": ("generate x --bundle {new}", "is not an engine bundle"),
    "an engine without one": ("generate x --engine onnx", "the onnx engine runs a bundle"),
    "more than any memory": ("generate x --size 100000000 --base {other}", "memory ran out"),
    "another base": ("generate x --adapter pets --base {other}", "another architecture"),
    "no base": ("generate x --base {new}", "cannot be loaded"),
    "a bundle for a whole disk": ("export --onnx --out / --base {other}", "cannot be replaced as a whole"),
    "a version for a whole disk": ("adapters checkout pets /", "cannot be replaced as a whole"),
    "a demo in a file": ("demo --out {toml}/demo", "cannot be written"),
    "another file": ("adapters convert pets --format kohya --out {toml}", "is left alone"),
    "not a bundle": ("export --onnx --out {home} --base {other}", "is left alone"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_refusal_is_a_sentence_and_a_hint(case: str, home: Path, folders: dict[str, Path], tmp_path: Path) -> None:
    """Exit code 1; two lines on stderr, none on stdout; nothing new in the store."""
    (tmp_path / "broken.zip").write_bytes((home / "dog.zip").read_bytes()[:-30])
    (tmp_path / "wrong.toml").write_text("rnk = 4\n")
    places = {
        "home": home,
        "new": tmp_path / "new",
        "broken": tmp_path / "broken.zip",
        "toml": tmp_path / "wrong.toml",
        "other": folders[OTHER],
    }
    command, words = REFUSED[case]
    before = sorted((home / "store" / "adapters").rglob("*"))
    result = run(*[part.format(**places) for part in command.split()], "--store", home / "store", code=1)
    error, hint = result.stderr.splitlines()
    assert error.startswith("error: ")
    assert words in error
    assert hint.startswith("hint: ")
    assert not result.stdout
    assert sorted((home / "store" / "adapters").rglob("*")) == before


@pytest.mark.parametrize(
    "command",
    [
        "train",
        "train --concept a.zip --concept b.zip --name dog",
        "train --concept a.zip --resume --restart",
        "train --concept {home}/dog.zip --config {home}/none.toml",
        "train --concept {home}/dog.zip --method magic",
        "train --concept {home}/dog.zip --steps 0",
        "generate",
        "generate a b c --adapter x --adapter y",
        "generate a --sampler heun",
        "generate a --guidance nan",
        "generate a --bundle b --base c",
        "generate a --bundle b --engine eager",
        "classify a.png",
        "export --out b",
        "adapters forget",
        "fly",
    ],
)
def test_a_wrong_option_exits_2(command: str, home: Path) -> None:
    """Usage errors never reach the library."""
    result = run(*[part.format(home=home) for part in command.split()], code=2)
    assert "Usage: cpserve" in result.stderr
    assert not result.stdout


def test_json_is_alone_on_stdout(home: Path, folders: dict[str, Path], tmp_path: Path) -> None:
    """Every verb's --json is one value, with progress and notes elsewhere."""
    base, store = ("--base", folders[BASE]), ("--store", home / "store")

    def told(*args: object, code: int = 0) -> object:
        return json.loads(run(*args, "--json", *store, code=code).stdout)

    assert [p["entry"] for p in told("check", home / "dog.zip")["pictures"]] == ["0.png", "1.png"]
    assert told("adapters", "list")[0]["concepts"][0]["name"] == "dog"
    assert told("adapters", "log", "pets")[-1]["version"] == 1
    assert told("adapters", "show", "pets@v1")["concepts"][0]["token"] == "<dog>"
    assert told("adapters", "verify", "pets") == []
    assert told("adapters", "checkout", "pets@v1", tmp_path / "v1")["version"] == "pets@v1"
    assert told("export", "--onnx", "--out", tmp_path / "bundle", "--dry-run", *base)["action"] == "build"
    assert told("doctor")["installed"]["torch"]
    (tmp_path / "broken").mkdir()
    told_of = told("doctor", "--bundle", tmp_path / "broken", code=1)  # and all the rest beside it
    assert told_of["bundle"]["error"]
    assert told_of["installed"]["torch"]

    (tmp_path / "mixed").mkdir()
    Image.new("RGB", (64, 64), "red").save(tmp_path / "mixed" / "red.png")
    (tmp_path / "mixed" / "\x1b[2Jbad.png").write_bytes(b"no picture")
    labels = told("classify", tmp_path / "mixed", "--adapter", "pets@v1", "--draws", 2, *base, code=1)
    assert [Path(p["picture"]).name for p in labels["pictures"]] == ["red.png"]
    assert "control characters" in labels["refused"][0]["rule"]


def test_a_dry_run_writes_nothing(home: Path, tmp_path: Path) -> None:
    """It tells concepts, settings, the version that learning would go on from, and the work; the command line wins."""
    args = (
        "train",
        "--concept",
        home / "dog.zip",
        "--config",
        home / "quick.toml",
        "--rank",
        8,
        "--dry-run",
        "--store",
        tmp_path / "s",
    )
    plan = json.loads(run(*args, "--json").stdout)
    assert (plan["settings"]["rank"], plan["settings"]["batch"]) == (8, 2)
    assert plan["rows"] == plan["settings"]["steps"] * 2
    assert plan["from"] is None
    assert "would learn, from nothing" in run(*args).stdout
    more = ("--concept", home / "cat.zip", "--name", "dog", "--name", "ox", "--adapter", "pets", "--resume")
    plan = json.loads(run(*args[:-1], home / "store", *more, "--json").stdout)
    assert [concept["name"] for concept in plan["concepts"]] == ["ox"]
    assert not (tmp_path / "s").exists()


def test_a_base_that_a_manifest_names_is_taken_only_if_it_is_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the Hub's cache or as a folder; else the user is to name it, whatever the stranger wrote."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    commit = "0" * 40
    snapshot = tmp_path / "models--user--model" / "snapshots" / commit
    snapshot.mkdir(parents=True)
    (snapshot / "model_index.json").write_text("{}")
    manifest = draft(1)

    def named(base: str) -> Manifest:
        return replace(manifest, base=replace(manifest.base, id=base, commit=commit))

    assert base_of(None, "pets@v1", named("user/model")) == ("user/model", commit)
    assert base_of(None, "pets@v1", named(str(tmp_path)))[0] == str(tmp_path)
    assert base_of("user/elsewhere", "pets@v1", named("user/elsewhere")) == ("user/elsewhere", commit)
    assert base_of("user/other", "pets@v1", named("user/model")) == ("user/other", None)
    assert base_of(None, "", None) == (BUILTIN, None)
    for elsewhere in ("stranger/model", "x" * 5000, "a/b/c", "../model", "\0"):
        with pytest.raises(AdapterError, match="only fetched when you name it"):
            base_of(None, "pets@v1", named(elsewhere))


def test_a_token_goes_to_the_hub_that_it_was_named_for(tmp_path: Path) -> None:
    """A base comes from $HF_ENDPOINT, which a token for another --endpoint is not sent to."""
    told = {"json": False, "threads": None, "root": None, "token_file": tmp_path}
    assert Common(**told).token_file_of_bases == tmp_path
    assert Common(**told, endpoint=HUGGING_FACE).token_file_of_bases == tmp_path
    assert Common(**told, endpoint="https://hub.example").token_file_of_bases is None


def test_names_and_class_words_go_with_the_concepts_in_order(home: Path, tmp_path: Path) -> None:
    """Each `--concept` has the name and the word that were given in its place."""
    given = "train --concept {0} --name rex --class-word dog --concept {0} --name tom --class-word cat --dry-run --json"
    plan = json.loads(run(*given.format(home / "dog.zip").split(), "--store", tmp_path / "s").stdout)
    assert [(c["name"], c["class_word"]) for c in plan["concepts"]] == [("rex", "dog"), ("tom", "cat")]


def test_check_shows_what_would_be_refused(tmp_path: Path) -> None:
    """A refused entry is named with its rule and the exit code is 1; a name that needs a --name is remarked on, and none can
    speak to the terminal.
    """
    folder = tmp_path / "My Cat"
    folder.mkdir()
    Image.new("RGB", (32, 32)).save(folder / "small.png")
    assert "'my cat' cannot be a name: rename the file, or train with a --name" in run("check", folder).stderr
    (folder / "\x1b[31mnotes.md").write_text("no picture")
    result = run("check", folder, code=1)
    assert "smaller than 64 px" in result.stdout
    assert "control characters" in result.stdout
    assert "\x1b" not in result.stdout


def test_damage_is_named(home: Path, tmp_path: Path) -> None:
    """`verify` names a damaged file and exits 1."""
    store = tmp_path / "store"
    subprocess.run(["cp", "-r", str(home / "store"), str(store)], check=True)
    sha = json.loads(run("adapters", "show", "pets@v1", "--json", "--store", store).stdout)["files"][0]["sha256"]
    (store / "blobs" / sha).write_bytes(b"x")
    assert "pets@v1: README.md is damaged" in run("adapters", "verify", "--store", store, code=1).stdout


def quick(home: Path, folders: dict[str, Path], store: Path, steps: int) -> list[object]:
    return [
        "train",
        "--concept",
        home / "dog.zip",
        "--base",
        folders[BASE],
        "--config",
        home / "quick.toml",
        "--steps",
        steps,
        "--store",
        store,
    ]


def test_what_a_stopped_training_keeps_is_named_and_can_be_dropped_alone(home: Path, tmp_path: Path) -> None:
    """`list` and `gc` say so; the versions stay."""
    place = shutil.copytree(home / "store", tmp_path / "store")
    (place / "runs" / "pets").mkdir(parents=True)
    for verb in ("list", "gc"):
        assert "cpserve adapters delete pets --unfinished" in run("adapters", verb, "--store", place).stderr
    with FileLock(place / "runs" / ".pets.lock"):  # it is going on
        assert "unfinished" not in run("adapters", "list", "--store", place).stderr
    run("adapters", "delete", "pets", "--unfinished", "--store", place, code=1)  # nobody said yes
    run("adapters", "delete", "pets", "--unfinished", "--yes", "--store", place)
    assert not (place / "runs" / "pets").exists()
    assert "unfinished" not in run("adapters", "list", "--store", place).stderr
    assert "no training of 'pets'" in run("adapters", "delete", "pets", "--unfinished", "--store", place, code=1).stderr
    assert Store(place).verify() == []


def test_a_killed_run_stands_in_the_way_until_told(home: Path, folders: dict[str, Path], tmp_path: Path) -> None:
    """After SIGKILL, training again is refused with the two ways out, and --restart is one."""
    args = quick(home, folders, tmp_path, 10**6)
    process = subprocess.Popen([*IN_PROCESS, *map(str, args)], stderr=subprocess.DEVNULL)
    record = tmp_path / "runs" / "default" / "run.json"
    while not record.exists():
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    for more in ([], ["--dry-run"]):
        refused = run(*quick(home, folders, tmp_path, 4), *more, code=1).stderr
        assert "error: an unfinished run of 'default' is here ('dog')" in refused
        assert "--resume" in refused
        assert "--restart" in refused
    run(*quick(home, folders, tmp_path, 4), "--restart")
    assert not record.exists()


def test_ctrl_c_says_what_is_kept(
    home: Path, folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Exit code 130 and the way on, which works."""

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("trainer.sequence.optimise", stop)
        stopped = run(*quick(home, folders, tmp_path, 4), code=130)
    assert "stopped: what was learned so far is kept; to go on, add --resume to the same command" in stopped.stderr
    assert not stopped.stdout
    assert "default@v1  learned dog" in run(*quick(home, folders, tmp_path, 4), "--resume").stdout


def test_a_bug_keeps_its_traceback(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The border lets through what it does not know."""

    def broken(_: Path) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr("cpserve.concept.inspect_concept", broken)
    with pytest.raises(ZeroDivisionError):
        run("check", tmp_path)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no disk that is always full here")
def test_a_full_disk_behind_stdout_is_a_sentence() -> None:
    """What cannot be printed is no traceback."""
    with Path("/dev/full").open("w") as full:
        ended = subprocess.run(
            [*IN_PROCESS, "doctor", "--help"], check=False, stdout=full, stderr=subprocess.PIPE, text=True
        )
    assert "Traceback" not in ended.stderr
    assert ended.returncode == 1


def test_a_closed_pipe_is_quiet(tmp_path: Path) -> None:
    """`cpserve ... | head` ends without a word."""
    command = [*IN_PROCESS, "adapters", "list", "--store", str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.close()
        assert process.stderr.read() == b""


@pytest.mark.parametrize(
    "code", ["import cpserve", "from cpserve.cli import main; main(['--help'], standalone_mode=False)"]
)
def test_starting_costs_nothing_heavy(code: str) -> None:
    """Neither `import cpserve` nor `cpserve --help` loads a numeric library, Pillow or msgspec."""
    script = f"import sys; {code}; print('loaded', *sys.modules)"
    out = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True).stdout
    assert HEAVY.isdisjoint(out.splitlines()[-1].split())


def test_help_lists_every_verb() -> None:
    """Lazy verbs are listed and resolve."""
    words = run("--help").stdout
    assert all(f"  {verb} " in words for verb in VERBS)


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(("stream", "shown"), [(_Terminal, "20/20"), (io.StringIO, "learning dog 20/20, loss 0.5")])
def test_progress_goes_to_stderr(
    stream: type[io.StringIO], shown: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A bar on a terminal; elsewhere lines, few of them."""
    stderr = stream()
    monkeypatch.setattr(sys, "stderr", stderr)
    with _show.reporting() as report:
        for step in range(21):
            report("learning dog", step, 20, "loss 0.5")
    assert shown in stderr.getvalue()
    assert "loss 0.5" in stderr.getvalue()
    assert not capsys.readouterr().out
    if stream is io.StringIO:
        assert len(stderr.getvalue().splitlines()) == 1


def test_doctor_warns_of_two_runtimes_and_of_shadows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both builds of ONNX Runtime, and another distribution with a package of our name, are told."""
    assert doctor.shadows() == []
    monkeypatch.setattr(doctor, "version", lambda _: "1.0")
    monkeypatch.setattr(doctor, "packages_distributions", lambda: {"trainer": ["cpserve", "gym-trainer"]})
    assert "overwrite each other" in doctor.two_runtimes()[0]
    assert "gym-trainer" in doctor.shadows()[0]
    monkeypatch.setattr(doctor, "HOME", Path("/elsewhere"))
    assert "Python finds the package 'export' in" in doctor.shadows()[1]


@pytest.mark.parametrize(
    ("prompt", "name"),
    [("a photo of <dog>", "a-photo-of-dog"), ("../../etc", "etc"), ("", "picture"), ("Ein Größe", "ein-größe")],
)
def test_a_prompt_cannot_lead_out_of_the_folder(prompt: str, name: str) -> None:
    """File names are made of letters, digits and hyphens."""
    assert slug(prompt) == name
