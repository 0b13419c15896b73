"""Sources read what other programs wrote (tarfile, pyarrow, csv, numpy, tensorflow-datasets), and no damaged file."""

import csv
import io
import json
import pickle
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from source_helpers import assert_is_a_good_source, png, write_files, write_tar

from ssljax.data import (
    TFDS,
    Arrays,
    Captions,
    Digits,
    Folder,
    Npz,
    Parquet,
    Scenes,
    Subset,
    Tar,
    inspect,
    pack,
    parse_source,
)


@pytest.fixture(autouse=True)
def _home(tmp_path_factory, monkeypatch):
    """Indices of read-only shards go to the home folder; keep them out of the real one."""
    monkeypatch.setenv("HOME", str(tmp_path_factory.mktemp("home")))


# Folder


def test_folder_with_classes(tmp_path):
    write_files(
        tmp_path, ["dog/1.PNG", "cat/deep/er/2.png", "cat/a.png", "dog/notes.txt", ".git/x.png", "dog/.hidden.png"]
    )
    folder = Folder(str(tmp_path))
    records = assert_is_a_good_source(folder)
    assert folder.classes == ("cat", "dog")
    assert [(r["key"], r["label"]) for r in records] == [("cat/a.png", 0), ("cat/deep/er/2.png", 0), ("dog/1.PNG", 1)]
    assert records[0]["image"] == png(2)
    np.testing.assert_array_equal(folder.labels, [0, 0, 1])


def test_folder_flat_single_class_and_mixed(tmp_path):
    flat = Folder(str(write_files(tmp_path / "flat", ["b.png", "a.jpg"])))
    assert (flat.classes, flat.labels) == ((), None)
    assert flat[0].keys() == {"image", "key"}
    assert Folder(str(write_files(tmp_path / "one", ["only/a.png"]))).classes == ("only",)
    mixed = str(write_files(tmp_path / "mixed", ["cover.png", "cat/a.png"]))
    with pytest.raises(ValueError, match="labelled=False"):
        Folder(mixed)
    assert len(Folder(mixed, labelled=False)) == 2


def test_folder_follows_links_but_no_loops(tmp_path):
    write_files(tmp_path / "store", ["x.png"])
    write_files(tmp_path / "data", ["cat/a.png"])
    (tmp_path / "data" / "dog").symlink_to(tmp_path / "store")
    (tmp_path / "data" / "cat" / "again").symlink_to(tmp_path / "data")
    (tmp_path / "data" / "cat" / "gone.png").symlink_to(tmp_path / "nowhere.png")
    assert [r["key"] for r in Folder(str(tmp_path / "data"))] == ["cat/a.png", "dog/x.png"]


def test_folder_says_what_is_wrong(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="it is empty"):
        Folder(str(tmp_path))
    (tmp_path / "a.heic").write_bytes(b"x")
    with pytest.raises(ValueError, match="heic"):
        Folder(str(tmp_path))
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        Folder(str(tmp_path / "missing"))
    with pytest.raises(ValueError, match=r"NOT_SET_HERE, which is not set"):
        Folder("$NOT_SET_HERE/x")
    monkeypatch.setenv("PICTURES", str(write_files(tmp_path / "p", ["a.png"])))
    assert len(Folder("$PICTURES")) == len(Folder("${PICTURES}")) == 1


# Npz, Arrays, Subset


def test_npz_arrays_and_encoded(tmp_path):
    images = np.random.default_rng(0).integers(0, 255, (5, 4, 4, 3), np.uint8)
    labels = np.array([0, 1, 2, 1, 0], np.uint8)
    points = np.arange(20, dtype=np.float32).reshape(5, 2, 2)
    path = str(tmp_path / "a.npz")
    np.savez(path, images=images, labels=labels, keypoints=points, class_names=np.array(["a", "b", "c"]))
    records = assert_is_a_good_source(npz := Npz(path))
    assert npz.classes == ("a", "b", "c")
    assert isinstance(records[2]["label"], int)
    np.testing.assert_array_equal(records[2]["image"], images[2])
    np.testing.assert_array_equal(records[2]["keypoints"], points[2])
    part = Npz(path, start=1, limit=2)
    assert [r["key"] for r in part] == ["a.npz[1]", "a.npz[2]"]
    np.testing.assert_array_equal(part.labels, [1, 2])

    files = [png(i, 4 + i) for i in range(5)]
    offsets = np.cumsum([0, *map(len, files)])
    np.savez(path, jpeg=np.frombuffer(b"".join(files), np.uint8), offsets=offsets, labels=labels)
    assert [r["image"] for r in assert_is_a_good_source(Npz(path))] == files
    assert [r["image"] for r in Npz(path, start=3)] == files[3:]


def test_npz_refuses(tmp_path):
    path = str(tmp_path / "a.npz")
    images = np.zeros((3, 2, 2, 3), np.uint8)
    cases = [
        ({"images": images, "labels": np.zeros(4, int)}, "3 images but 4 labels"),
        (
            {"images": images, "labels": np.array([0, 1, 7]), "class_names": np.array(["a", "b"])},
            "from 0 to 7.*2 classes",
        ),
        ({"image": images}, "it needs 'images', or 'jpeg' and 'offsets'"),
        ({"images": images, "meta": np.array([{}, {}, {}])}, "pickled objects, which are refused"),
        ({"jpeg": np.zeros(9, np.uint8), "offsets": np.array([0, 5, 12])}, "reach byte 12, but 'jpeg' has 9"),
        ({"jpeg": np.zeros(9, np.uint8), "offsets": np.array([0, 5, 2])}, "rising"),
    ]
    for members, says in cases:
        np.savez(path, **members)
        with pytest.raises(ValueError, match=says):
            Npz(path)
    np.savez(path, images=images)
    with pytest.raises(ValueError, match="leave nothing of the 3"):
        Npz(path, start=3)
    (tmp_path / "cut.npz").write_bytes((tmp_path / "a.npz").read_bytes()[:150])
    with pytest.raises(ValueError, match=r"not a complete .npz"):
        Npz(str(tmp_path / "cut.npz"))
    (tmp_path / "p.npz").write_bytes(pickle.dumps({"images": 1}))
    with pytest.raises(ValueError, match="pickled objects"):
        Npz(str(tmp_path / "p.npz"))
    with pytest.raises(FileNotFoundError, match="there is no file"):
        Npz(str(tmp_path / "b.npz"))


def test_arrays_and_subset():
    arrays: Any = Arrays(
        {"image": np.arange(12, dtype=np.uint8).reshape(6, 1, 2), "label": [0, 1, 0, 1, 0, 1]}, ("even", "odd")
    )
    assert_is_a_good_source(arrays)
    assert arrays[3]["label"] == 1
    with pytest.raises(ValueError, match="one length"):
        Arrays({"image": np.zeros(3), "label": [1]})
    for start, stop, step in [(1, None, 2), (-2, None, 1), (0, 4, 3), (5, None, -2)]:
        subset = Subset(arrays, start, stop, step)
        assert_is_a_good_source(subset)
        assert [r["key"] for r in subset] == [str(i) for i in range(6)[start:stop:step]]
        np.testing.assert_array_equal(subset.labels, arrays.labels[start:stop:step])
        assert subset.classes == ("even", "odd")
    with pytest.raises(ValueError, match="nothing of the 6"):
        Subset(arrays, 6)


# Parquet


def hf_table(n=10):
    struct = pa.array([{"bytes": png(i), "path": f"{i}.png"} for i in range(n)])
    features = {"picture": {"_type": "Image"}, "kind": {"_type": "ClassLabel", "names": ["a", "b", "c"]}}
    columns = {"picture": struct, "kind": pa.array([i % 3 for i in range(n)]), "text": [f"no {i}" for i in range(n)]}
    table = pa.table({**columns, "unused": list(range(n))})
    return table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})


def test_parquet_of_hugging_face(tmp_path):
    pq.write_table(hf_table(10), tmp_path / "train-0.parquet", row_group_size=3)
    pq.write_table(hf_table(7), tmp_path / "train-1.parquet", row_group_size=2)
    # a cache of no size still works: it keeps the last group
    for parquet in (Parquet(str(tmp_path)), Parquet(str(tmp_path / "train-*.parquet"), cache_mib=0)):
        records = assert_is_a_good_source(parquet)
        assert len(records) == 17
        assert records[14] == {"image": png(4), "label": 1, "text": "no 4", "key": "4.png"}
        assert parquet.classes == ("a", "b", "c")
        np.testing.assert_array_equal(parquet.labels, [i % 3 for i in [*range(10), *range(7)]])


def test_parquet_plain_columns_and_string_labels(tmp_path):
    captions = [["one", "two"], ["three"]]
    table = pa.table({"photo": [png(0), png(1)], "species": ["owl", "bat"], "captions": captions})
    pq.write_table(table, path := tmp_path / "a.parquet")
    parquet = Parquet(str(path), image="photo", label="species")
    records = assert_is_a_good_source(parquet)
    assert parquet.classes == ("bat", "owl")
    assert records[0] == {"image": png(0), "label": 1, "text": ("one", "two"), "key": "a.parquet[0]"}
    with pytest.raises(ValueError, match="no column 'phoot'; did you mean 'photo'"):
        Parquet(str(path), image="phoot")
    pq.write_table(pa.table({"x": [1]}), path)
    with pytest.raises(ValueError, match="cannot tell which column"):
        Parquet(str(path))
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(ValueError, match=r"a.parquet is not a complete"):
        Parquet(str(path))
    with pytest.raises(FileNotFoundError, match=r"no .parquet or .arrow"):
        Parquet(str(write_files(tmp_path / "empty", ["a.png"])))


def test_arrow_files_of_save_to_disk(tmp_path):
    table = hf_table(9)
    with pa.ipc.new_stream(str(tmp_path / "data-00000-of-00001.arrow"), table.schema) as writer:
        writer.write_table(table, max_chunksize=4)
    records = assert_is_a_good_source(Parquet(str(tmp_path)))
    assert records[5] == {"image": png(5), "label": 2, "text": "no 5", "key": "5.png"}


# Captions


ROWS = [
    {"file": "a.png", "en": "a dog, running", "de": "ein Hund", "split": "train"},
    {"file": "sub/b.png", "en": 'a "cat"', "de": "eine Katze", "split": "train"},
    {"file": "c", "en": "ein\nbreak", "de": "Umbruch", "split": "test"},
]


def write_table(path, rows=ROWS):
    with open(path, "w", newline="", encoding="utf-8") as file:
        if path.suffix == ".jsonl":
            file.writelines(json.dumps(row) + "\n" for row in rows)
        else:
            writer = csv.DictWriter(file, rows[0], delimiter="\t" if path.suffix == ".tsv" else ",")
            writer.writeheader()
            writer.writerows(rows)
    return str(path)


@pytest.mark.parametrize("kind", ["csv", "tsv", "jsonl"])
@pytest.mark.parametrize("tar", [False, True])
def test_captions(tmp_path, kind, tar):
    names = ["a.png", "sub/b.png", "sub/c.png"]
    images = tmp_path / ("images.tar" if tar else "images")
    if tar:
        write_tar(images, {name: png(i) for i, name in enumerate(names)})
    else:
        write_files(images, names)
    table = write_table(tmp_path / f"t.{kind}")
    both = Captions(table, str(images), "file", ("en", "de"))
    records = assert_is_a_good_source(both)
    assert records[2] == {"image": png(2), "text": ("ein\nbreak", "Umbruch"), "key": "sub/c.png"}
    train = Captions(table, str(images), "file", ("en",), where={"split": "train"})
    assert [r["text"] for r in train] == ["a dog, running", 'a "cat"']


def test_captions_say_what_is_wrong(tmp_path):
    images = str(write_files(tmp_path / "images", ["a.png", "x/c.png", "y/c.png"]))
    table = write_table(tmp_path / "t.csv")
    with pytest.raises(ValueError, match=r"no column 'eng'; did you mean 'en'\? Its columns are"):
        Captions(table, images, "file", ("eng",))
    with pytest.raises(
        ValueError, match=r"no row .* has \{'split': 'val'\}; there are \{'split': \['test', 'train'\]\}"
    ):
        Captions(table, images, "file", ("en",), where={"split": "val"})
    # sub/b.png is not there, and `c` could be two pictures
    with pytest.raises(ValueError, match=r"2 of 3 pictures .*\['sub/b.png', 'c'\].*missing='drop'"):
        Captions(table, images, "file", ("en",))
    assert [r["key"] for r in Captions(table, images, "file", ("en",), missing="drop")] == ["a.png"]
    with pytest.raises(FileNotFoundError, match="no folder or tar"):
        Captions(table, images + "x", "file", ("en",))
    (tmp_path / "t.jsonl").write_text('{"file": "a.png", "en": "x"}\n{oops\n')
    with pytest.raises(ValueError, match=r"t.jsonl, near line 2"):
        Captions(str(tmp_path / "t.jsonl"), images, "file", ("en",))
    (tmp_path / "t.csv").write_text("file,en\na.png\n")
    with pytest.raises(ValueError, match="near line 2: it does not have the 2 cells"):
        Captions(table, images, "file", ("en",))
    secret = tmp_path / "secret.png"
    secret.write_bytes(b"secret")
    rows = [{"file": "../secret.png", "en": "x"}, {"file": str(secret), "en": "y"}]
    with pytest.raises(ValueError, match="2 of 2 pictures"):
        Captions(write_table(tmp_path / "t.csv", rows), images, "file", ("en",))


# TFDS


def test_tfds_without_tensorflow(tmp_path):
    import tensorflow_datasets as tfds

    class Tiny(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            features = {
                "image": tfds.features.Image(shape=(None, None, 3)),
                "label": tfds.features.ClassLabel(names=["cat", "dog"]),
                "text": tfds.features.Text(),
            }
            return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

        def _split_generators(self, dl_manager):
            return {"train": self._generate_examples()}

        def _generate_examples(self):
            for i in range(6):
                yield str(i), {"image": io.BytesIO(png(i)), "label": i % 2, "text": f"nö {i}"}

    with pytest.raises(FileNotFoundError, match=r"tiny is not prepared in .*download_and_prepare"):
        TFDS("tiny", data_dir=str(tmp_path))
    Tiny(data_dir=str(tmp_path), file_format="array_record").download_and_prepare()
    source = TFDS("tiny", "train[:4]", str(tmp_path))
    records = assert_is_a_good_source(source)
    assert len(records) == 4
    assert source.classes == ("cat", "dog")
    for record in records:
        i = int(record["text"].split()[1])
        assert {**record, "key": ""} == {"image": png(i), "label": i % 2, "text": f"nö {i}", "key": ""}
    with pytest.raises(ValueError, match=r"no split 'test'; it has .'train'."):
        TFDS("tiny", "test", str(tmp_path))
    with pytest.raises(ValueError, match="no set 'no_such_set'"):
        TFDS("no_such_set", data_dir=str(tmp_path))


# Digits, one-word sources


def test_digits_are_those_of_scikit_learn():
    from sklearn.datasets import load_digits

    train, test = Digits(), Digits("test")
    assert_is_a_good_source(Subset(test, 0, 5))
    assert (len(train), len(test)) == (1297, 500)
    assert np.bincount(test.labels).tolist() == [50] * 10
    whole: Any = load_digits()
    used = {}
    for part in (Digits(size=8), Digits("test", size=8)):
        for record in part:
            i = int(record["key"].removeprefix("digits[").rstrip("]"))
            assert used.setdefault(i, record["label"]) == whole.target[i]
            np.testing.assert_allclose(record["image"][..., 1] * (16 / 255), whole.images[i], atol=0.04)
    assert len(used) == 1797
    assert train[0]["image"].shape == (16, 16, 3)


def test_parse_source(tmp_path):
    assert parse_source("digits") == Digits()
    assert parse_source("scenes:test") == Scenes(split="test")
    write_files(tmp_path / "images", ["a.png", "sub/b.png", "c.png"])
    write_table(tmp_path / "t.csv")
    assert parse_source(f"folder:{tmp_path / 'images' / 'sub'}") == Folder(str(tmp_path / "images" / "sub"))
    captions = parse_source(f"captions:{tmp_path / 't.csv'}")
    assert captions == Captions(str(tmp_path / "t.csv"), str(tmp_path / "images"), "file", ("en",))
    pack(captions, str(tmp_path / "packed"))
    assert len(parse_source(f"arrayrecord:{tmp_path / 'packed'}")) == 3
    with pytest.raises(ValueError, match=r"one of folder, tar, .*; did you mean 'digits'\?"):
        parse_source("digit:train")
    with pytest.raises(ValueError, match=f"did you mean 'folder:{tmp_path}'"):
        parse_source(str(tmp_path))
    with pytest.raises(ValueError, match=r"says nothing after the colon; write for example 'npz:train.npz'"):
        parse_source("npz:")
    with pytest.raises(ValueError, match="there is no split 'val'"):
        parse_source("digits:val")
    (tmp_path / "x").mkdir()
    (tmp_path / "images").rename(tmp_path / "y")
    with pytest.raises(ValueError, match=r"cannot tell which of \['packed', 'x', 'y'\]"):
        parse_source(f"captions:{tmp_path / 't.csv'}")


# The shared real sets


def test_real_sets(real_data):
    caltech: Any = Tar(str(real_data / "caltech101" / "train.tar"))
    with open(real_data / "caltech101" / "train.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [caltech.classes[label] for label in caltech.labels.tolist()] == [row["class"] for row in rows]
    np.testing.assert_array_equal(caltech.labels, [int(row["label"]) for row in rows])

    cifar = Npz(str(real_data / "cifar10" / "test.npz"), limit=100)
    assert len(cifar) == 100
    assert "frog" in cifar.classes
    fashion = Npz(str(real_data / "fashion_mnist" / "test.npz"))
    assert fashion[0]["image"].shape == (28, 28)

    emoji = Captions(
        file=str(real_data / "emoji" / "captions.csv"), images=str(real_data / "emoji" / "style_flat.tar"),
        image_column="id", text_columns=("en", "fr"), where={"split": "test"},
    )  # fmt: skip
    assert len(emoji) == 580
    assert all(len(emoji[i]["text"]) == 2 for i in range(0, 580, 50))

    camvid = Tar(str(real_data / "camvid" / "val.tar"), fields={"png": "mask"})
    assert len(camvid) == 101
    assert camvid[0].keys() == {"image", "mask", "key"}

    nlvr = Captions(
        str(real_data / "nlvr" / "examples.jsonl"), str(real_data / "nlvr" / "images.tar"), "file", ("sentence",)
    )
    for source in (caltech, cifar, fashion, emoji, camvid, nlvr):
        assert inspect(source, n=12)["unreadable"] == {}
