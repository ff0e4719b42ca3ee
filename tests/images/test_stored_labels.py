"""The one label rule: the same answer to the same labels in tables, shards and streams."""

import io
import json
import tarfile

import numpy as np
import PIL.Image
import pytest
from helpers.data import photo

from d_emo.images.stored_labels import class_ids
from d_emo.train.data.options import DataOptions
from d_emo.train.data.sources import load_source

datasets = pytest.importorskip("datasets")


@pytest.fixture(autouse=True)
def private_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setenv("D_EMO_CACHE", str(tmp_path / "d_emo"))
    monkeypatch.setattr(datasets.config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 0, raising=False)  # 5 s a stream otherwise


def png() -> bytes:
    target = io.BytesIO()
    photo(size=(16, 16)).save(target, "PNG")
    return target.getvalue()


def write_table(path, labels, feature=None):
    """A parquet file of a label a row."""
    features = datasets.Features({"image": datasets.Image(), "label": feature}) if feature is not None else None
    images = [{"bytes": png(), "path": None}] * len(labels)
    table = datasets.Dataset.from_dict({"image": images, "label": labels}, features=features)
    if features is None:
        table = table.cast_column("image", datasets.Image())
    table.to_parquet(path / "table.parquet")
    return str(path / "table.parquet")


def write_shard(path, labels, suffix="json"):
    """A tar file of a label a sample."""
    with tarfile.open(path / "shard.tar", "w") as archive:
        for number, label in enumerate(labels):
            text = json.dumps({"label": label}) if suffix == "json" else str(label)
            for name, content in ((f"{number:04d}.png", png()), (f"{number:04d}.{suffix}", text.encode())):
                info = tarfile.TarInfo(name)
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))
    return str(path / "shard.tar")


def opened(tmp_path, where, labels, **options):
    write = {"table": write_table, "json": write_shard, "cls": lambda *a: write_shard(*a, suffix="cls")}[where]
    return load_source(DataOptions(dataset=write(tmp_path, labels), **options))


SAME = [
    ([0, 1, 2, 1], [0, 1, 2, 1], ["0", "1", "2"]),
    ([7, 3, 7], [1, 0, 1], ["3", "7"]),  # gaps: the numbers stay as names
    ([10, 9, 2], [2, 1, 0], ["2", "9", "10"]),
    ([2_000_000_000, 1, 2**62], [1, 0, 2], ["1", "2000000000", str(2**62)]),  # no table of that length
    (["b", "a", "b"], [1, 0, 1], ["a", "b"]),
    (["10", "9", "2"], [2, 1, 0], ["2", "9", "10"]),
    ([" b", "a ", "b"], [1, 0, 1], ["a", "b"]),
    (["e\u0301", "é", "f"], [1, 1, 0], ["f", "é"]),
    (["x", "7"], [1, 0], ["7", "x"]),
]


@pytest.mark.parametrize("where", ["table", "json", "cls"])
@pytest.mark.parametrize(("labels", "ids", "names"), SAME)
def test_labels_become_the_same_classes_everywhere(tmp_path, where, labels, ids, names):
    source = opened(tmp_path, where, labels)
    assert source.labels.tolist() == ids and list(source.id2label.values()) == names


@pytest.mark.parametrize("where", ["table", "json", "cls"])
def test_what_becomes_of_numbers_with_gaps_is_said(tmp_path, where):
    line = opened(tmp_path, where, [9, 3]).describe_size()
    assert line == "2 images (the labels are numbers with gaps, 3 to 9: ids go from 0 to 1)"
    assert opened(tmp_path, where, [1, 0]).describe_size() == "2 images"


@pytest.mark.parametrize("where", ["table", "json"])
@pytest.mark.parametrize(
    ("labels", "ids", "names"),
    [([1.0, 0.0, 1.0], [1, 0, 1], ["0", "1"]), ([True, False], [1, 0], ["False", "True"])],
)
def test_whole_floats_are_numbers_and_truth_values_two_classes(tmp_path, where, labels, ids, names):
    source = opened(tmp_path, where, labels)
    assert source.labels.tolist() == ids and list(source.id2label.values()) == names


REFUSED = [
    ([0, -1, 2, -1], r"2 samples without a label.*(row 1|0001): -1 \(negative\), .*(row 3|0003): -1"),
    ([1.5, 2.0], r"(row 0|0000): 1\.5 \(no whole number\)"),
    ([[1, 2], [3]], r"2 samples.*(row 0|0000): \[1, 2\] \(a list, not one class\)"),
    ([{"a": 1}, {"a": 2}], r"(row 0|0000): \{'a': 1\} \(a dict, not one class\)"),
    (["a", ""], r"1 samples.*(row 1|0001): '' \(no label\)"),
    (["a", "  ", "b"], r"(row 1|0001): '  ' \(no label\)"),
    ([-1] * 5, r"5 samples.*and 2 more\. Repair them, choose a labelled split, or --unconditional"),
]


@pytest.mark.parametrize("where", ["table", "json"])
@pytest.mark.parametrize(("labels", "message"), REFUSED)
def test_what_is_no_class_is_refused_with_its_place(tmp_path, where, labels, message):
    with pytest.raises(ValueError, match=message):
        opened(tmp_path, where, labels)
    assert opened(tmp_path, where, labels, unconditional=True).id2label == {}


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([0, None, 2], r"row 1: None \(no label\)"),
        (["a", None], r"row 1: None \(no label\)"),
        ([0.0, float("nan")], r"row 1: nan \(no label\)"),
        ([1.0, float("inf")], r"row 1: inf \(no whole number\)"),
        ([b"a", b"b"], r"row 0: b'a' \(a bytes, not one class\)"),
    ],
)
def test_nothing_in_a_table_is_refused_with_its_row(tmp_path, labels, message):
    with pytest.raises(ValueError, match=message):
        opened(tmp_path, "table", labels)


@pytest.mark.parametrize(
    ("labels", "message"),
    [([0, True], "is a truth value"), (["a", 3], "is a number"), ([0, "a", True], "is a truth value")],
)
def test_labels_of_several_kinds_are_refused_with_a_sample_of_each(tmp_path, labels, message):
    with pytest.raises(ValueError, match=rf"labels are of several kinds \(.*shard\.tar: 000.*{message}"):
        opened(tmp_path, "json", labels)


def test_numbers_as_words_and_numbers_are_the_same_classes(tmp_path):
    source = opened(tmp_path, "json", [1, "0", "1", 2.0])
    assert source.labels.tolist() == [1, 0, 1, 2]


@pytest.mark.parametrize("content", [b"[1, 2]", b"3", b'"a"', b"null", b"{", b"\xff\xfe", b"[" * 100000])
def test_a_json_member_that_is_no_table_is_named(tmp_path, content):
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w") as archive:
        for name, data in (("0.png", png()), ("0.json", content)):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    with pytest.raises(ValueError, match=r"a\.tar cannot be read as a tar file of samples"):
        load_source(DataOptions(dataset=str(path)))


def test_class_labels_keep_their_ids_and_refuse_what_has_none(tmp_path):
    feature = datasets.ClassLabel(names=["a", "b", "never seen"])
    source = load_source(DataOptions(dataset=write_table(tmp_path, [1, 0, 1], feature)))
    assert source.labels.tolist() == [1, 0, 1] and source.id2label == {0: "a", 1: "b", 2: "never seen"}
    for labels in ([0, -1], [0, None]):
        with pytest.raises(ValueError, match=r"1 samples without a label.*row 1"):
            load_source(DataOptions(dataset=write_table(tmp_path, labels, feature)))


@pytest.fixture
def names_file(tmp_path):
    path = tmp_path / "names.txt"
    path.write_text("ant\nbee\ncafe\u0301\n\n")
    return str(path)


@pytest.mark.parametrize("where", ["table", "json", "cls"])
@pytest.mark.parametrize("labels", [[2, 0, 1], ["2", "0", "1"], ["café", "ant", "bee"], [" café ", "ant", "bee"]])
def test_class_names_give_ids_to_numbers_and_words(tmp_path, where, labels, names_file):
    source = opened(tmp_path, where, labels, class_names=names_file)
    assert source.labels.tolist() == [2, 0, 1] and source.id2label == {0: "ant", 1: "bee", 2: "café"}


@pytest.mark.parametrize("where", ["table", "json"])
@pytest.mark.parametrize("labels", [[0, 3], [0, 2_000_000_000], ["ant", "wasp"], ["0", "3"]])
def test_labels_beyond_the_class_names_are_refused_with_their_place(tmp_path, where, labels, names_file):
    with pytest.raises(ValueError, match=r"(row 1|0001): label .* is none of the 3 classes \(--class-names\)"):
        opened(tmp_path, where, labels, class_names=names_file)


@pytest.mark.parametrize("where", ["table", "json", "cls"])
@pytest.mark.parametrize("labels", [[2, 0, 1], ["café", "ant", "bee"], [2, -1], ["ant", "wasp"], [2, 3], ["ant", ""]])
def test_a_stream_answers_as_a_table_does(tmp_path, where, labels, names_file):
    options = {"class_names": names_file}
    path = write_table(tmp_path, labels) if where == "table" else write_shard(tmp_path, labels, suffix=where)
    if where == "cls" and isinstance(labels[0], str):  # `datasets` reads these as numbers
        with pytest.raises(ValueError, match=r"KEY\.cls members hold words.*KEY\.json"):
            load_source(DataOptions(dataset=path, streaming=True, **options))
        return
    stream = load_source(DataOptions(dataset=path, streaming=True, **options)).stream
    try:
        expected = load_source(DataOptions(dataset=path, **options)).labels.tolist()
    except ValueError:
        with pytest.raises(ValueError, match=r"label .* is none of the 3 classes"):
            list(stream.epoch(0, 0, 0, 1))
    else:
        assert sorted(image.label for image in stream.epoch(0, 0, 0, 1)) == sorted(expected)


@pytest.mark.parametrize(
    ("values", "ids"), [(np.array([3, 1], dtype=np.uint8), [1, 0]), (np.array([2.0, 1.0], dtype=np.float32), [1, 0])]
)
def test_numbers_of_numpy_are_numbers(values, ids):
    assert class_ids(values, None, str)[0].tolist() == ids


def test_null_and_empty_pictures_are_unreadable_and_named(tmp_path):
    table = datasets.Dataset.from_dict(
        {
            "image": [
                None,
                {"bytes": b"", "path": ""},
                {"bytes": None, "path": "nowhere.png"},
                {"bytes": png(), "path": ""},
            ],
            "label": [0, 0, 0, 0],
        }
    )
    table.to_parquet(tmp_path / "t.parquet")
    source = load_source(DataOptions(dataset=str(tmp_path / "t.parquet")))
    assert source.resolution == 16 and isinstance(source.read(3), PIL.Image.Image)
    for row, reason in ((0, "there is no picture"), (1, "no format"), (2, "no such file")):
        with pytest.raises(ValueError, match=rf"row {row}.* cannot be read \({reason}"):
            source.read(row)


@pytest.mark.parametrize("values", [[1, 2], ["a", "b"], [[1, 2], [3, 4]], [0.5, 0.1], [True, False]])
def test_a_column_that_holds_no_pictures_is_refused_by_name(tmp_path, values):
    datasets.Dataset.from_dict({"image": values, "label": [0, 1]}).to_parquet(tmp_path / "t.parquet")
    try:
        source = load_source(DataOptions(dataset=str(tmp_path / "t.parquet")))
        source.read(0)
    except ValueError as error:
        assert "set --image-column" in str(error) or "no image of the data set can be read" in str(error)
    else:
        pytest.fail("read")
