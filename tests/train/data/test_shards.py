"""WebDataset shards by index, and streams: what is read, in which order, and how a run goes on."""

import collections
import io
import itertools
import json
import shutil
import tarfile

import numpy as np
import PIL.Image
import pytest
from helpers.training import train_to_the_end

from d_emo.images.decode import UnreadableImageError
from d_emo.images.labels import read_class_names
from d_emo.images.shards import expand_braces, expand_shards
from d_emo.train.data.batches import Pixels, StreamPlace
from d_emo.train.data.options import DataOptions
from d_emo.train.data.sources import load_source
from d_emo.train.data.stream import StreamSampler
from d_emo.train.data.stream_loader import StreamLoader

CLASSES = ("ant", "bee", "cat")
PER_SHARD = 10


def write_shards(folder, shards=4, label="cls", broken=()):
    """Shards of one-coloured images: image n has grey level n and class n mod 3."""
    folder.mkdir(exist_ok=True)
    for shard in range(shards):
        with tarfile.open(folder / f"train-{shard:04d}.tar", "w") as archive:
            for row in range(PER_SHARD):
                number = shard * PER_SHARD + row
                picture = io.BytesIO()
                PIL.Image.fromarray(np.full((16, 16, 3), number, np.uint8)).save(picture, "PNG")
                content = picture.getvalue()[: 30 if number in broken else None]
                members = {"png": content}
                if label == "cls":
                    members["cls"] = str(number % 3).encode()
                elif label == "json":
                    members["json"] = json.dumps({"label": CLASSES[number % 3], "id": number}).encode()
                for suffix, data in members.items():
                    info = tarfile.TarInfo(f"{number:06d}.{suffix}")
                    info.size = len(data)
                    archive.addfile(info, io.BytesIO(data))
    return f"{folder}/train-{{0000..{shards - 1:04d}}}.tar"


@pytest.fixture(autouse=True)
def private_cache(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setenv("D_EMO_CACHE", str(tmp_path / "d_emo"))


@pytest.fixture
def names_file(tmp_path):
    path = tmp_path / "names.txt"
    path.write_text("\n".join(CLASSES) + "\n")
    return str(path)


def test_shards_are_read_by_index(tmp_path):
    source = load_source(DataOptions(dataset=write_shards(tmp_path / "shards")))
    assert (source.name, source.size, source.resolution) == ("train", 40, 16)
    assert source.id2label == {0: "0", 1: "1", 2: "2"}
    for index in (0, 9, 10, 39):
        assert source.read(index).getpixel((3, 3)) == (index,) * 3
        assert source.labels[index] == index % 3


def test_the_list_of_a_shard_is_kept_until_the_shard_changes(tmp_path, monkeypatch):
    pattern = write_shards(tmp_path / "shards")
    load_source(DataOptions(dataset=pattern))
    (cached,) = (tmp_path / "d_emo" / "tar-index").iterdir()
    with monkeypatch.context() as patch:
        patch.setattr(tarfile, "open", lambda *_: pytest.fail("read again"))
        assert load_source(DataOptions(dataset=pattern)).read(12).getpixel((0, 0)) == (12,) * 3
    write_shards(tmp_path / "shards", label="json")
    assert load_source(DataOptions(dataset=pattern)).id2label == dict(enumerate(CLASSES))
    assert len(list(cached.parent.iterdir())) == 2


def test_json_labels_and_names(tmp_path, names_file):
    pattern = write_shards(tmp_path / "json", label="json")
    source = load_source(DataOptions(dataset=pattern))
    assert source.id2label == dict(enumerate(CLASSES)) and source.labels[:4].tolist() == [0, 1, 2, 0]
    by_number = load_source(DataOptions(dataset=pattern, label_column="id"))
    assert by_number.labels.tolist() == list(range(40))
    named = load_source(DataOptions(dataset=write_shards(tmp_path / "cls"), class_names=names_file))
    assert named.id2label == dict(enumerate(CLASSES))


def test_shards_without_labels_train_without_classes(tmp_path):
    pattern = write_shards(tmp_path / "shards", label=None)
    with pytest.raises(ValueError, match=r"10 images have no label, first 000000.*--unconditional"):
        load_source(DataOptions(dataset=pattern))
    source = load_source(DataOptions(dataset=pattern, unconditional=True))
    assert source.id2label == {} and source.size == 40


def test_missing_damaged_and_compressed_shards_are_named(tmp_path, names_file):
    pattern = write_shards(tmp_path / "shards")
    with pytest.raises(ValueError, match=r"1 of 5 shards are missing, first .*train-0004\.tar"):
        load_source(DataOptions(dataset=pattern.replace("0003", "0004")))
    names = tmp_path / "two.json"
    names.write_text('["ant", "bee"]')
    with pytest.raises(ValueError, match=r"000002: label '2' is none of the 2 classes \(--class-names\)"):
        load_source(DataOptions(dataset=pattern, class_names=str(names)))
    shard = tmp_path / "shards" / "train-0001.tar"
    whole = shard.read_bytes()
    with tarfile.open(shard, "w:gz") as archive:
        archive.add(names_file)
    with pytest.raises(ValueError, match=r"train-0001\.tar cannot be read as a tar file"):
        load_source(DataOptions(dataset=pattern))
    shard.write_bytes(whole[: len(whole) // 2 + 100])
    with pytest.raises(ValueError, match=r"train-0001\.tar cannot be read as a tar file"):
        load_source(DataOptions(dataset=pattern))


def test_a_broken_image_in_a_shard_is_named(tmp_path):
    source = load_source(DataOptions(dataset=write_shards(tmp_path / "shards", broken=(12,))))
    with pytest.raises(UnreadableImageError, match=r"train-0001\.tar, image 12 at byte \d+ cannot be read"):
        source.read(12)


def test_patterns_expand():
    assert expand_braces("a-{08..11}.tar") == ["a-08.tar", "a-09.tar", "a-10.tar", "a-11.tar"]
    assert len(expand_braces("{0..1}/{00..09}.tar")) == 20
    with pytest.raises(ValueError, match="lower number first"):
        expand_braces("{3..1}.tar")
    with pytest.raises(ValueError, match="1 of 1 shards are missing"):
        expand_shards("/nowhere/*.tar")


def test_missing_class_names_are_named_for_any_dataset():
    for dataset in ("shards.tar", "pictures.parquet"):
        with pytest.raises(ValueError, match=r"--class-names nowhere\.json: there is no such file"):
            load_source(DataOptions(dataset=dataset, class_names="nowhere.json"))


def test_class_names_come_from_files_and_imagenet(tmp_path, names_file):
    assert read_class_names(names_file) == list(CLASSES)
    assert read_class_names("imagenet")[207] == "n02099601"
    table = tmp_path / "table.json"
    table.write_text('{"1": "b", "0": "a"}')
    assert read_class_names(str(table)) == ["a", "b"]
    for text, message in (
        ('{"1": "b"}', "table by the ids 0 to N - 1"),
        ('["a", "a"]', "repeated names"),
        ("[", "no list"),
    ):
        table.write_text(text)
        with pytest.raises(ValueError, match=message):
            read_class_names(str(table))
    with pytest.raises(ValueError, match="there is no such file"):
        read_class_names(str(tmp_path / "nowhere"))


def stream_options(tmp_path, names_file, **options):
    pattern = write_shards(tmp_path / "shards", broken=options.pop("broken", ()))
    return DataOptions(dataset=pattern, streaming=True, stream_buffer=8, class_names=names_file, **options)


def read_stream(source, batches, rank=0, world=1, place=None, first=0, threads=2):
    """Grey levels and labels of some batches of four, and the place after each."""
    sampler = StreamSampler(1, 3, global_batch_size=4 * world, micro_batch_size=4, rank=rank, world_size=world,
                            first_step=first, last_step=first + batches)  # fmt: skip
    loaded = list(StreamLoader(source, Pixels(3, 16, True, 3), 3, sampler, place or StreamPlace(), threads))
    levels = [((batch.images[:, 0, 0, 0] + 1) * 127.5).round().int().tolist() for batch in loaded]
    for batch, grey in zip(loaded, levels, strict=True):
        assert batch.bad_images or batch.labels.tolist() == [level % 3 for level in grey]
    return levels, loaded


def flat(batches):
    return list(itertools.chain(*batches))


def test_a_stream_brings_every_image_once_an_epoch(tmp_path, names_file):
    source = load_source(stream_options(tmp_path, names_file))
    assert (source.size, source.id2label, source.resolution) == (0, dict(enumerate(CLASSES)), 16)
    assert source.describe_size() == "images of unknown number in a stream of 4 files"
    levels, loaded = read_stream(source, 20)
    first, second = flat(levels[:10]), flat(levels[10:])
    assert sorted(first) == sorted(second) == list(range(40))
    assert first != second and first != sorted(first)  # shuffled, otherwise in each epoch
    assert loaded[9].place == StreamPlace(0, 40) and loaded[10].place == StreamPlace(1, 4)
    assert read_stream(source, 20, threads=1)[0] == levels


@pytest.mark.parametrize("after", [3, 10, 13])
def test_a_stream_goes_on_exactly_where_it_was(tmp_path, names_file, after):
    source = load_source(stream_options(tmp_path, names_file))
    levels, loaded = read_stream(source, 20)
    rest, again = read_stream(source, 20 - after, place=loaded[after - 1].place, first=after)
    assert rest == levels[after:]
    assert all((a.images == b.images).all() for a, b in zip(again, loaded[after:], strict=True))  # flips, too


def test_processes_share_a_stream(tmp_path, names_file):
    source = load_source(stream_options(tmp_path, names_file))
    shares = [flat(read_stream(source, 5, rank, 2)[0]) for rank in range(2)]
    assert sorted(shares[0] + shares[1]) == list(range(40))


def test_an_unreadable_image_of_a_stream_is_replaced_and_reported(tmp_path, names_file):
    source = load_source(stream_options(tmp_path, names_file, broken=(7, 23)))
    levels, loaded = read_stream(source, 10)
    counts = collections.Counter(flat(levels))
    assert counts[7] == counts[23] == 0 and sum(counts.values()) == 40
    messages = [message for batch in loaded for message in batch.bad_images]
    assert len(messages) == 2 and any("000007 cannot be read" in message for message in messages)
    unreadable = load_source(stream_options(tmp_path, names_file, broken=range(40)))
    with pytest.raises(UnreadableImageError, match="none of 4 images in a row can be read"):
        read_stream(unreadable, 1)


def test_labels_outside_the_names_stop_a_stream(tmp_path):
    names = tmp_path / "two.txt"
    names.write_text("ant\nbee")
    source = load_source(stream_options(tmp_path, str(names)))
    with pytest.raises(ValueError, match=r"label 2 is none of the 2 classes \(--class-names\)"):
        read_stream(source, 10)


def test_mistakes_about_streams_are_named(tmp_path):
    pattern = write_shards(tmp_path / "shards")
    for options, message in (
        ({"dataset": pattern, "streaming": True}, "column 'cls' has no class names.*--class-names FILE"),
        ({"dataset": "https://example.org/{0..3}.tar"}, "is a URL, which cannot be read by index; add --streaming"),
        ({"streaming": True}, "--streaming reads a --dataset, and none is named"),
        ({"dataset": f"{tmp_path}/nowhere.tar", "streaming": True}, "cannot be opened"),
        ({"dataset": pattern, "streaming": True, "stream_buffer": 0}, "--stream-buffer 0: must be positive"),
    ):
        with pytest.raises(ValueError, match=message):
            load_source(DataOptions(**options))


def test_a_parquet_file_streams_with_its_names_and_another_image_column(tmp_path):
    import datasets

    features = datasets.Features({"img": datasets.Image(), "fine": datasets.ClassLabel(names=["n02099601", "own"])})
    pictures = [PIL.Image.new("RGB", (40, 33), (index, 0, 0)) for index in range(6)]
    path = tmp_path / "pictures.parquet"
    datasets.Dataset.from_dict({"img": pictures, "fine": [0, 1] * 3}, features=features).to_parquet(path)
    for streaming in (False, True):  # columns are found by their type
        source = load_source(DataOptions(dataset=str(path), streaming=streaming))
        assert source.id2label == {0: "golden retriever", 1: "own"} and source.resolution == 32
    assert load_source(DataOptions(dataset=str(path), streaming=True, unconditional=True)).id2label == {}


SMALL = ("--model", "D-EMOv2-N-4", "--resolution", 16, "--global-batch-size", 8, "--sample-every", 0,
         "--num-workers", 1, "--log-every", 1, "--report-to", "none", "--vae", "none")  # fmt: skip


def losses(run):
    return [row.split(",")[1] for row in (run / "train_log.csv").read_text().splitlines()[1:]]


@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.slow)])
@pytest.mark.slow
def test_training_on_a_stream_resumes_exactly(tmp_path, capsys, names_file, processes):
    options = stream_options(tmp_path, names_file)
    common = [*SMALL, "--dataset", options.dataset, "--streaming", True, "--stream-buffer", 8, "--class-names",
              names_file, "--max-train-steps", 9]  # fmt: skip
    for name, more in (("straight", ["--checkpoint-every", 9]), ("resumed", ["--checkpoint-every", 4])):
        arguments = [*common, "--output-dir", tmp_path / name, *more]
        train_to_the_end(capsys, tmp_path / f"{name}.log", *arguments, processes=processes)
    straight = losses(tmp_path / "straight")
    assert losses(tmp_path / "resumed") == straight
    shutil.rmtree(tmp_path / "resumed" / "checkpoint-0000009")
    shutil.rmtree(tmp_path / "resumed" / "checkpoint-0000008")
    arguments = [*common, "--output-dir", tmp_path / "resumed", "--resume-from", "latest", "--checkpoint-every", 4]
    output = train_to_the_end(capsys, tmp_path / "again.log", *arguments, processes=processes)
    assert f"the stream goes on in epoch 0 after {32 // processes} images" in output
    assert losses(tmp_path / "resumed") == straight


@pytest.mark.slow
def test_another_number_of_processes_starts_the_next_epoch(tmp_path, names_file, capsys):
    options = stream_options(tmp_path, names_file)
    common = [*SMALL, "--dataset", options.dataset, "--streaming", True, "--stream-buffer", 8, "--class-names",
              names_file, "--output-dir", tmp_path / "run"]  # fmt: skip
    train_to_the_end(capsys, tmp_path / "log", *common, "--max-train-steps", 2, processes=2)
    output = train_to_the_end(capsys, tmp_path / "log", *common, "--max-train-steps", 4, "--resume-from", "latest")
    assert "read by 2 processes, now by 1: starting its epoch 1 afresh" in output
