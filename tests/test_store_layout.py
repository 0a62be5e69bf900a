"""Laws of layouts: whatever paths and names are asked for, nothing lies outside its folder, and nothing lies on another."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import TypeVar

from hypothesis import given, settings
from hypothesis import strategies as st

from adapter_store import Store
from adapter_store.layout import LocalLayout, check_paths, is_training_only
from cpserve.errors import CpserveError
from tests.hubserver.content import draft

T = TypeVar("T")
LAW = settings(max_examples=300)

odd = st.sampled_from(
    ["..", ".", "", "a", "A", "é", "e\u0301", "ß", "ss", "C:", "a\\b", "\x00", "training", "cpserve.json"]
)
paths = st.lists(odd | st.text(max_size=5), min_size=1, max_size=4).map("/".join)
plain = st.lists(st.from_regex(r"[a-c]{1,2}", fullmatch=True), min_size=1, max_size=3).map("/".join)


def files_in(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def tried(act: Callable[[], T]) -> T | None:
    """What `act` gives, None where it is refused in a sentence with a hint."""
    hint = "none is needed"
    try:
        return act()
    except CpserveError as refusal:
        hint = refusal.hint
    finally:
        assert hint
    return None


@settings(LAW, max_examples=100)
@given(names=st.lists(paths | plain, max_size=4, unique=True))
def test_a_version_comes_out_as_it_went_in_or_is_refused(tmp_path_factory, names):
    """Any set of paths: refused with nothing stored, or checked out as just these files, in their folder and nowhere else."""
    root = tmp_path_factory.mktemp("layout")
    store, files = Store(root / "home"), {name: b"%d" % i for i, name in enumerate(names)}
    version = tried(lambda: store.commit("pets", files, draft(1), expected_head=0))
    if version is None:
        assert not any(root.iterdir())
        return
    store.checkout("pets", root / "deep" / "out", for_training=True)
    assert files_in(root / "deep") == {f"out/{path}": data for path, data in files.items()} | {
        "out/cpserve.json": version.document
    }
    assert {path.name for path in root.iterdir()} == {"home", "deep"}


@LAW
@given(names=st.lists(paths | plain, max_size=6, unique=True))
def test_paths_that_are_accepted_stay_apart_on_any_file_system(names):
    """Plain relative ones that differ after folding, and none a folder of another."""
    if tried(lambda: check_paths(names) or True) is None:
        return
    folded = {name.casefold() for name in names}
    assert len(folded) == len(names)
    for name in names:
        path = PurePosixPath(name)
        assert path.as_posix() == name
        assert not path.is_absolute()
        assert ".." not in path.parts
        assert not {parent.as_posix().casefold() for parent in path.parents} & folded
        assert is_training_only(name) == (path.parts[0] == "training")


@LAW
@given(name=st.text(max_size=12) | st.from_regex(r"[a-z./\\-]{1,12}", fullmatch=True), number=st.integers(1, 10**9))
def test_a_name_is_a_folder_of_its_own_or_a_ref_error(name, number):
    """Every place of an adapter is below that of adapters, whatever it is called."""
    layout = LocalLayout(Path("/root"))
    places = tried(lambda: [layout.version(name, number), layout.aliases(name), layout.left(name, number)])
    if places is None:
        return
    home = layout.adapter(name)
    assert home.parent == layout.adapters
    assert home.name == name not in {".", ".."}
    assert all(home in place.parents and ".." not in place.parts for place in places)
