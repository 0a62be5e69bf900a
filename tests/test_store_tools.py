"""Laws of looking and tidying: diff says what changed, gc does what its plan says, and a pulled version's record is checked."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace
from safetensors.numpy import save

from adapter_store import Store
from adapter_store.diff import diff, product_norm
from adapter_store.partial import Left
from adapter_store.tensors import parse_arrays
from cpserve.errors import AdapterError, StoreError
from tests.hubserver.content import draft, files_of, learn

WEIGHTS = "pytorch_lora_weights.safetensors"


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path / "home")


def factors(seed, rank, width=6, d=5):
    noise = np.random.default_rng(seed)
    layer = "unet.down.attn2.to_k"
    a, b = noise.normal(size=(rank, d)), noise.normal(size=(width, rank))
    return {f"{layer}.lora_A.weight": a.astype(np.float32), f"{layer}.lora_B.weight": b.astype(np.float32)}


def dense(tensors):
    a, b = tensors.values()
    return b @ a


def test_diff_tells_what_changed(store):
    """Concepts, settings, scores and files as pairs, and per layer how far the weights' change moved, as computed in full."""
    one, two = factors(1, 2), factors(2, 3)
    first = replace(draft(1), settings={"steps": 4, "rank": 2}, metrics={"dc": 0.5})
    second = replace(draft(2), settings={"steps": 4, "rank": 3}, metrics={"dc": 0.75, "new": 1})
    a = store.commit("pets", {WEIGHTS: save(one), "gone": b"1", "same": b"2"}, first, expected_head=0)
    b = store.commit("pets", {WEIGHTS: save(two), "same": b"2"}, second, expected_head=1)
    found = diff(a, b)
    assert found.concepts == {"cat": (None, "<cat>")}
    assert found.settings == {"rank": (2, 3)}
    assert found.scores == {"dc": (0.5, 0.75), "new": (None, 1)}
    assert set(found.files) == {WEIGHTS, "gone"}
    [moved] = found.layers.values()
    judge = [np.linalg.norm(x) for x in (dense(two) - dense(one), dense(one), dense(two))]
    assert moved == pytest.approx(judge, rel=1e-6)
    same = diff(a, a)
    assert not any((same.concepts, same.settings, same.scores, same.files))
    assert [moved for moved, _, _ in same.layers.values()] == [0.0]


def test_diff_of_versions_without_weights_has_no_layers(store):
    """A version that holds no weights is compared all the same."""
    a = store.commit("pets", {"x": b"1"}, draft(1), expected_head=0)
    b = store.commit("pets", {WEIGHTS: save(factors(1, 2))}, draft(1), expected_head=1)
    assert len(diff(a, b).layers) == 1
    assert diff(a, a).layers == {}


def test_what_cannot_be_compared_is_refused(store):
    """Changes of bases of two shapes, and a file that is no LoRA."""
    tensors = (factors(1, 2), factors(1, 2, d=7), dict([*factors(1, 2).items()][:1]))
    one, other, half = (
        store.commit(name, {WEIGHTS: save(t)}, draft(1), expected_head=0)
        for name, t in zip("abc", tensors, strict=True)
    )
    with pytest.raises(AdapterError, match="bases of other shapes"):
        diff(one, other)
    with pytest.raises(AdapterError, match="one factor without the other"):
        diff(one, half)


@settings(max_examples=50)
@given(seed=st.integers(0, 99), ranks=st.lists(st.integers(1, 9), min_size=1, max_size=3))
def test_the_norm_of_a_sum_of_products_needs_no_sum(seed, ranks):
    """However many factors and whatever their ranks."""
    pairs = [tuple(factors(seed + i, rank).values()) for i, rank in enumerate(ranks)]
    judge = np.linalg.norm(sum(b.astype(np.float64) @ a for a, b in pairs))
    assert product_norm(pairs) == pytest.approx(judge, rel=1e-9)


def test_gc_does_exactly_its_plan(store):
    """Only what no version reaches is planned, looking changes nothing, and the plan is what is deleted."""
    learn(store, count=2)
    blobs, temporary = store.root / "blobs", store.root / "tmp"
    litter = [blobs / ("f" * 64), blobs / "not a hash", temporary / "left"]
    for path in litter:
        path.write_bytes(b"x" * 10)
    before = {path for path in store.root.rglob("*") if path.is_file()}
    plan = store.plan_gc()
    assert {path for path in store.root.rglob("*") if path.is_file()} == before
    assert {each.path for each in plan.garbage} == set(litter)
    assert sum(each.bytes for each in plan.garbage) == 30
    assert tuple(plan.execute()) == plan.garbage
    assert {path for path in store.root.rglob("*") if path.is_file()} == before - set(litter)
    assert store.verify() == []
    assert store.plan_gc().garbage == ()


def test_gc_spares_what_came_to_be_needed(store):
    """A planned file that a version refers to by now is kept, and one that is gone already is no error."""
    learn(store)
    content = b"about to be used"
    blob = store.root / "blobs" / hashlib.sha256(content).hexdigest()
    for path in (blob, blob.with_name("a"), blob.with_name("b")):
        path.write_bytes(content)
    plan = store.plan_gc()
    blob.with_name("a").unlink()
    store.commit("cats", {"x": content}, draft(1), expected_head=0)
    assert [each.path.name for each in plan.execute()] == ["b"]
    assert store.verify() == []


def test_gc_of_a_damaged_store_is_refused(store):
    """What a damaged version refers to is not known, so nothing is deleted."""
    learn(store)
    (store.root / "blobs" / ("f" * 64)).write_bytes(b"x")
    plan = store.plan_gc()
    (store.root / "adapters" / "pets" / "v1").write_text("0" * 64 + "\n")
    for act in (store.plan_gc, plan.execute):
        with pytest.raises(StoreError):
            act()
    assert (store.root / "blobs" / ("f" * 64)).exists()


@settings(max_examples=200)
@given(paths=st.lists(st.from_regex(r"[a-z/.]{1,20}", fullmatch=True), max_size=3).map(tuple), place=st.integers(0))
def test_a_record_of_what_was_left_reads_back_or_is_found_damaged(paths, place):
    """Any flipped byte of it is noticed."""
    record = Left("hf://me/pets", paths, "https://hub.example").dump()
    assert Left.parse(record) == Left("hf://me/pets", paths, "https://hub.example")
    assert Left.parse(Left("hf://me/pets", paths).dump()) == Left("hf://me/pets", paths)
    flipped = bytearray(record)
    flipped[place % len(record)] ^= 1
    with pytest.raises(ValueError, match="damaged"):
        Left.parse(bytes(flipped))


def test_a_damaged_record_of_what_was_left_is_named_by_verify(store):
    """Verify reads the records of pulls, too; without one, a missing file is damage."""
    version = learn(store)
    other = Store(store.root / "other")
    other._local.receive("pets", [version], {"README.md": files_of(1)["README.md"]}, Left("hf://me/pets", ()))
    assert other.verify() == []
    record = other.root / "adapters" / "pets" / "left" / "v1"
    whole = record.read_bytes()
    record.write_bytes(whole[:-1] + b"?")
    assert ("pets@v1", "left/v1") in {(p.ref, p.path) for p in other.verify()}
    record.unlink()
    assert {p.path for p in other.verify()} == set(version.paths()) - {"README.md"}
    record.write_bytes(whole)
    missing = store.root / "blobs" / version.manifest.files[0].sha256
    missing.unlink()
    assert [p.path for p in store.verify()] == ["README.md"]


@settings(max_examples=300)
@given(place=st.integers(0), value=st.integers(0, 255), cut=st.integers(0, 400), junk=st.binary(max_size=60))
def test_damaged_tensors_are_arrays_or_an_adapter_error(place, value, cut, junk):
    """Whatever bytes come as safetensors: float32 arrays, all finite, or one clean error."""
    data = bytearray(save(factors(1, 2)))
    data[place % len(data)] = value
    for content in (bytes(data), bytes(data[: len(data) - cut]), junk, len(junk).to_bytes(8, "little") + junk):
        try:
            arrays = parse_arrays("x", content)
        except AdapterError as error:
            arrays, hint = {}, error.hint
        else:
            hint = "none is needed"
        assert hint
        assert all(array.dtype == np.float32 and np.isfinite(array).all() for array in arrays.values())


def test_half_precision_reads_as_float32():
    """float16, bfloat16 and float64 give the numbers that they stand for; whole numbers are refused."""
    torch = pytest.importorskip("torch")
    from safetensors.torch import save as save_torch

    values = torch.tensor([[1.5, -2.25], [0.125, 3.0]])
    for kind in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        assert parse_arrays("x", save_torch({"a": values.to(kind)}))["a"].tolist() == values.tolist()
    with pytest.raises(AdapterError, match="not of floating point"):
        parse_arrays("x", save_torch({"a": values.to(torch.int32)}))
