"""Class names to ids."""

import numpy as np
import pytest
import torch
from helpers.pipelines import tiny_pipeline

from d_emo.images.labels import (
    LabelResolver,
    english_names,
    imagenet_wnid_to_name,
    normalize_id2label,
    read_class_names,
)


@pytest.fixture(scope="module")
def imagenet() -> LabelResolver:
    names = english_names(imagenet_wnid_to_name())
    return LabelResolver(dict(enumerate(names)), 1000)


@pytest.mark.parametrize(("name", "label_id"), [("golden retriever", 207), ("  Golden  RETRIEVER ", 207), ("tench", 0)])
def test_imagenet_names_resolve(imagenet, name, label_id):
    assert imagenet.resolve(name) == label_id


def test_imagenet_table_has_a_thousand_distinct_full_names(imagenet):
    assert len({imagenet.resolve(name) for name in imagenet.id2label.values()}) == 1000


@pytest.mark.parametrize(("name", "ids"), [("crane", (134, 517)), ("maillot", (638, 639)), ("cardigan", (264, 474))])
def test_ambiguous_names_raise_with_all_candidates(imagenet, name, ids):
    with pytest.raises(ValueError, match=f"'{name}' is ambiguous.*{ids[0]}: .*{ids[1]}: "):
        imagenet.resolve(name)


def test_the_wordnet_id_tells_ambiguous_names_apart(imagenet):
    assert imagenet.resolve("n03126707") == 517


@pytest.mark.parametrize(
    ("name", "hint"), [("golden retreiver", r"golden retriever \(207\)"), ("zzzz", "unknown among 1000")]
)
def test_unknown_names_raise_with_close_matches(imagenet, name, hint):
    with pytest.raises(ValueError, match=hint):
        imagenet.resolve(name)


def test_exact_case_tells_names_apart():
    resolver = LabelResolver({0: "Cardigan", 1: "cardigan"}, 2)
    assert [resolver.resolve("Cardigan"), resolver.resolve("cardigan")] == [0, 1]
    with pytest.raises(ValueError, match="ambiguous"):
        resolver.resolve("CARDIGAN")


def test_full_name_wins_over_a_shared_synonym():
    resolver = LabelResolver({0: "crane", 1: "crane, machine"}, 2)
    assert resolver.resolve("crane") == 0


@pytest.mark.parametrize("label", [2, np.int64(2), torch.tensor(2)])
def test_integers_of_any_kind_are_ids(imagenet, label):
    assert imagenet.resolve(label) == 2


@pytest.mark.parametrize("label", [-1, 1000])
def test_ids_out_of_range_are_refused(imagenet, label):
    with pytest.raises(ValueError, match=f"label {label} is out of range.*0 to 999"):
        imagenet.resolve(label)


@pytest.mark.parametrize("label", [True, 1.0, None, ["tench"]])
def test_other_types_are_refused(imagenet, label):
    with pytest.raises(TypeError, match="pass a class name or an integer id"):
        imagenet.resolve(label)


def test_a_name_without_a_table_is_refused():
    with pytest.raises(ValueError, match="carries no class names"):
        LabelResolver({}, 10).resolve("tench")


def test_string_keys_from_json_become_integers_in_order():
    assert list(normalize_id2label({"10": "b", "2": "a"}, 11).items()) == [(2, "a"), (10, "b")]


@pytest.mark.parametrize(("table", "message"), [({"x": "a"}, "key 'x'"), ({3: "a"}, "names class 3")])
def test_bad_tables_are_refused(table, message):
    with pytest.raises(ValueError, match=message):
        normalize_id2label(table, 3)


@pytest.mark.parametrize(
    ("labels", "ids"),
    [
        ("tench", [0]),
        (["Tinca tinca", 1], [0, 1]),
        (("machine",), [2]),
        (torch.tensor([2, 0]), [2, 0]),
        (range(3), [0, 1, 2]),
    ],
)
def test_pipeline_takes_names_ids_and_sequences(labels, ids):
    assert tiny_pipeline().get_label_ids(labels) == ids


@pytest.mark.parametrize("asked", ["Käfer", "Ka\u0308fer", "KÄFER", "  Ka\u0308fer "])
@pytest.mark.parametrize("stored", ["Käfer", "Ka\u0308fer", "Käfer, Chrysler"])
def test_names_are_found_in_any_form_of_unicode(asked, stored):
    assert LabelResolver({0: "Ahorn", 1: stored}, 2).resolve(asked) == 1


@pytest.mark.parametrize(
    ("name", "content", "names"),
    [
        ("a.txt", b"ant\r\nbee\r\n\r\n", ["ant", "bee"]),
        ("a.txt", "\ufeffant\nbee".encode(), ["ant", "bee"]),
        ("a.json", b'["Ka\\u0308fer", " bee "]', ["Käfer", "bee"]),
    ],
)
def test_files_of_class_names_are_read_as_editors_write_them(tmp_path, name, content, names):
    (tmp_path / name).write_bytes(content)
    assert read_class_names(str(tmp_path / name)) == names


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.txt", b"caf\xe9\n"),
        ("a.txt", b""),
        ("a.txt", b"ant\n\nbee"),
        ("a.txt", "Käfer\nKa\u0308fer".encode()),
        ("a.json", b"[1, 2]"),
        ("a.json", b'[["a"], ["b"]]'),
        ("a.json", b'"ant"'),
        ("a.json", b"3"),
        ("a.json", b'{"0": "a", "2": "b"}'),
        ("a.json", b"[" * 100000),
    ],
)
def test_files_that_hold_no_class_names_are_named(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=rf"--class-names .*{name}: (no list of names|empty, or with)"):
        read_class_names(str(tmp_path / name))
