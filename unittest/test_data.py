"""Data: formats, splits, statistics, sources, damaged files."""

import gzip
import hashlib

import pytest
import torch

import data_preprocessing as data
import idx
from config import TrainSettings, UserError
from idx import IDX_FILES


@pytest.mark.parametrize("split, count", [("train", 60_000), ("t10k", 10_000)])
def test_images_are_uint8_28x28_and_classes_balanced(split, count, data_path):
    images, fine_labels = data.load_images(split, data_path)
    assert images.shape == (count, 1, 28, 28) and images.dtype == torch.uint8
    assert images.min() == 0 and images.max() == 255
    assert fine_labels.dtype == torch.int64
    assert torch.bincount(fine_labels).tolist() == [count // 10] * 10


def test_sandals_sneakers_and_ankle_boots_are_shoes():
    assert data.task_labels(torch.arange(10), 2).tolist() == [0, 0, 0, 0, 0, 1, 0, 1, 0, 1]


def test_ten_classes_have_the_fine_labels():
    assert data.task_labels(torch.arange(10), 10).tolist() == list(range(10))


def test_split_is_stratified_disjoint_and_complete(train_data):
    train, valid = data.split_indices(train_data[1], 0.1, seed=0)
    assert torch.bincount(train_data[1][valid]).tolist() == [600] * 10
    assert torch.cat([train, valid]).sort().values.equal(torch.arange(60_000))


def test_split_follows_the_seed(train_data):
    first, again, other = (data.split_indices(train_data[1], 0.1, seed)[1] for seed in (0, 0, 1))
    assert first.equal(again) and not first.equal(other)


@pytest.mark.parametrize("ratio, count", [(0.00001, 1), (0.99999, 5_999)])
def test_each_side_of_a_split_has_an_image_of_each_class(ratio, count, train_data):
    _, valid = data.split_indices(train_data[1], ratio, seed=0)
    assert torch.bincount(train_data[1][valid]).tolist() == [count] * 10


def test_a_ratio_of_0_leaves_every_image_to_the_training(train_data):
    train, valid = data.split_indices(train_data[1], 0, seed=0)
    assert len(valid) == 0 and train.sort().values.equal(torch.arange(len(train_data[1])))


def test_mean_and_std_are_those_of_the_given_images_only(train_data):
    indices = torch.arange(100, 9_000)
    pixels = train_data[0][indices].double() / 255
    mean, std = data.mean_and_std(train_data[0], indices)
    assert mean == pytest.approx(pixels.mean().item()) and std == pytest.approx(pixels.std().item(), rel=1e-5)


def test_folds_validate_every_image_once_and_are_stratified(train_data):
    fine_labels = train_data[1]
    folds = data.fold_indices(fine_labels, 5, seed=0)
    assert torch.cat([valid for _, valid in folds]).sort().values.equal(torch.arange(60_000))
    for train, valid in folds:
        assert torch.cat([train, valid]).sort().values.equal(torch.arange(60_000))
        assert (torch.bincount(fine_labels[valid]) == 1_200).all()
        assert torch.bincount(fine_labels[train[:1_000]]).min() > 50  # shuffled: a dry run sees every class


def test_folds_follow_the_seed(train_data):
    first, again, other = (data.fold_indices(train_data[1], 2, seed)[0][1] for seed in (0, 0, 1))
    assert first.equal(again) and not first.equal(other)


def test_limit_keeps_the_first_training_images_and_all_validation_images(data_path):
    cpu, settings = torch.device("cpu"), TrainSettings(data_dir=str(data_path))
    whole, limited = (data.load_splits(one, cpu)[0] for one in (settings, settings.model_copy(update={"limit": 100})))
    assert limited.train.equal(whole.train[:100]) and limited.valid.equal(whole.valid)


def test_runs_have_splits_of_their_own(data_path):
    splits = data.load_splits(TrainSettings(data_dir=str(data_path)), torch.device("cpu"), runs=2)
    assert splits[1].valid.equal(data.split_indices(splits[1].data.fine_labels, 0.1, seed=1)[1])
    assert not splits[0].valid.equal(splits[1].valid)


@pytest.mark.parametrize(
    "damage",
    [
        lambda whole: whole[:-1],
        lambda whole: whole + b"\0",
        lambda whole: whole[:5_000] + b"\7" + whole[5_001:],
        lambda _: b"",
    ],
    ids=["truncated", "longer", "altered", "empty"],
)
@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_a_damaged_file_is_named_and_the_next_source_used(damage, suffix, data_path, tmp_path, capsys, monkeypatch):
    name = "t10k-labels-idx1-ubyte"
    good = idx.find_idx(name, data_path)
    raw, other = tmp_path / "FashionMNIST" / "raw", tmp_path / "other"
    raw.mkdir(parents=True)
    other.mkdir()
    (raw / f"{name}{suffix}").write_bytes(gzip.compress(damage(bytes(good))) if suffix else damage(bytes(good)))
    (other / f"{name}.gz").write_bytes(gzip.compress(good))
    monkeypatch.setattr(idx, "DEBIAN_FOLDER", other)
    assert idx.find_idx(name, tmp_path) == good
    assert str(raw / f"{name}{suffix}") in capsys.readouterr().err


def test_a_truncated_gzip_stream_is_refused(data_path, tmp_path):
    name = "t10k-labels-idx1-ubyte"
    (tmp_path / f"{name}.gz").write_bytes(gzip.compress(idx.find_idx(name, data_path))[:-500])
    assert idx._read_verified(name, tmp_path, []) is None


def test_no_data_and_no_route_to_it_is_one_clear_error(tmp_path, monkeypatch):
    def no_route(folder):
        raise OSError("no network")

    monkeypatch.setattr(idx, "DEBIAN_FOLDER", tmp_path)
    monkeypatch.setattr(idx, "fetch_with_torchvision", no_route)
    monkeypatch.setattr(idx, "_fetch_with_apt", no_route)
    raw = tmp_path / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    (raw / "train-images-idx3-ubyte.gz").write_bytes(b"damaged")
    with pytest.raises(UserError, match=r"data_dir=FOLDER.*ubyte\.gz: can't be read.*no network"):
        data.load_splits(TrainSettings(data_dir=str(tmp_path)), torch.device("cpu"))
    assert (raw / "train-images-idx3-ubyte.gz").read_bytes() == b"damaged"


def test_fetched_files_are_verified_and_kept_unpacked(tmp_path, monkeypatch):
    def fetch(folder):
        for name in IDX_FILES:
            (folder / f"{name}.gz").write_bytes(gzip.compress(name.encode()))
        return folder

    contents = {name: ((100,), hashlib.sha256(name.encode()).hexdigest()) for name in IDX_FILES}  # each file has its name
    monkeypatch.setattr(idx, "IDX_FILES", contents)
    monkeypatch.setattr(idx, "DEBIAN_FOLDER", tmp_path)
    raw = tmp_path / "new" / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    (raw / "t10k-images-idx3-ubyte").write_bytes(b"damaged")
    with monkeypatch.context() as patch:
        patch.setattr(idx, "fetch_with_torchvision", lambda folder: (_ for _ in ()).throw(OSError("no network")))
        patch.setattr(idx, "_fetch_with_apt", fetch)
        assert idx.find_idx("t10k-images-idx3-ubyte", tmp_path / "new") == b"t10k-images-idx3-ubyte"
    assert {path.name for path in raw.iterdir()} == {*IDX_FILES, "t10k-images-idx3-ubyte.damaged"}
    assert (raw / "train-labels-idx1-ubyte").read_bytes() == b"train-labels-idx1-ubyte"


HEADER = bytes([0, 0, 8, 1, 0, 0, 0, 5])


@pytest.mark.parametrize(
    "contents, message",
    [
        (b"\0\0\x08", "too few"),
        (bytes([0, 0, 8, 3]) + HEADER[4:] + b"12345", "magic number is 2051"),
        (bytes([0, 0, 9, 1]) + HEADER[4:] + b"12345", "magic number is 2305"),
        (HEADER[:7] + b"\6" + b"12345", r"says \(6,\)"),
        (HEADER + b"1234", "4 elements"),
    ],
    ids=["short", "dimensions", "type", "count", "elements"],
)
def test_a_wrong_idx_header_is_refused(contents, message):
    with pytest.raises(UserError, match=message):
        idx.read_idx(bytearray(contents), (5,), "labels")


def test_an_idx_file_is_read_in_order():
    assert idx.read_idx(bytearray(HEADER + b"\1\2\3\4\5"), (5,), "labels").tolist() == [1, 2, 3, 4, 5]
