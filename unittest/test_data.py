"""The data have the right format, and only they are used."""

import gzip

import pytest
import torch

import data_preprocessing as data
from config import UserError
from data_preprocessing import IDX_FILES


@pytest.mark.parametrize("split, count", [("train", 60_000), ("t10k", 10_000)])
def test_images_are_uint8_28x28_and_garments_balanced(split, count, data_path):
    images, garments = data.load_images(split, data_path)
    assert images.shape == (count, 1, 28, 28) and images.dtype == torch.uint8
    assert images.min() == 0 and images.max() == 255
    assert garments.dtype == torch.int64
    assert torch.bincount(garments).tolist() == [count // 10] * 10


def test_sandals_sneakers_and_ankle_boots_are_shoes():
    assert data.labels_of(torch.arange(10), 2).tolist() == [0, 0, 0, 0, 0, 1, 0, 1, 0, 1]
    assert data.labels_of(torch.arange(10), 10).tolist() == list(range(10))


def test_split_is_stratified_disjoint_and_complete(train_data):
    train, valid = data.split_indices(train_data[1], 0.1, seed=0)
    assert torch.bincount(train_data[1][valid]).tolist() == [600] * 10
    assert torch.cat([train, valid]).sort().values.equal(torch.arange(60_000))


def test_split_follows_the_seed(train_data):
    first, again, other = (data.split_indices(train_data[1], 0.1, seed)[1] for seed in (0, 0, 1))
    assert first.equal(again) and not first.equal(other)


def test_split_that_leaves_a_class_without_images_is_refused(train_data):
    with pytest.raises(UserError, match="valid_ratio=1e-05"):
        data.split_indices(train_data[1], 0.00001, seed=0)


def test_mean_and_std_are_those_of_the_given_images_only(train_data):
    indices = torch.arange(100, 9_000)
    pixels = train_data[0][indices].double() / 255
    mean, std = data.mean_and_std(train_data[0], indices)
    assert mean == pytest.approx(pixels.mean().item()) and std == pytest.approx(pixels.std().item(), rel=1e-5)


def test_normalised_training_images_have_mean_0_and_std_1(train_data):
    images = train_data[0][:5_000]
    x = data.normalise(images, *data.mean_and_std(images, torch.arange(5_000)))
    assert x.dtype == torch.float32 and x.is_contiguous(memory_format=torch.channels_last)
    assert x.mean().item() == pytest.approx(0, abs=1e-4) and x.std().item() == pytest.approx(1, abs=1e-3)


def test_folds_validate_every_image_once_and_are_stratified(train_data):
    garments = train_data[1]
    folds = data.fold_indices(garments, 5, seed=0)
    assert torch.cat([valid for _, valid in folds]).sort().values.equal(torch.arange(60_000))
    for train, valid in folds:
        assert torch.cat([train, valid]).sort().values.equal(torch.arange(60_000))
        assert (torch.bincount(garments[valid]) == 1_200).all()
        assert torch.bincount(garments[train[:1_000]]).min() > 50  # shuffled: a dry run sees every class
    assert not folds[0][1].equal(data.fold_indices(garments, 5, seed=1)[0][1])


def test_a_first_epoch_visits_every_training_image_once():
    train = torch.randperm(1_000)[:600]
    order = data.epoch_order(train, 600, torch.full((1_000,), torch.inf), torch.Generator().manual_seed(0))
    assert order.sort().values.equal(train.sort().values) and not order.equal(train)


def test_a_later_epoch_visits_the_hardest_images_and_none_twice():
    train, losses = torch.arange(500), torch.rand(1_000)
    losses[500:] += 10  # harder, but not in the training part
    order = data.epoch_order(train, 100, losses, torch.Generator().manual_seed(0))
    assert len(order.unique()) == 100 and order.max() < 500
    assert torch.isin(losses[:500].topk(50).indices, order).all()


def test_batches_have_equal_sizes_and_a_short_set_is_one_batch():
    assert [len(batch) for batch in data.batches(torch.arange(25), 10)] == [10, 10]
    assert [len(batch) for batch in data.batches(torch.arange(7), 10)] == [7]


@pytest.mark.parametrize(
    "damage",
    [
        lambda whole: whole[:-1],
        lambda whole: whole + b"\0",
        lambda whole: whole[:5_000] + b"\7" + whole[5_001:],
        lambda whole: b"",
    ],
    ids=["truncated", "longer", "altered", "empty"],
)
@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_a_damaged_file_is_named_and_the_next_source_used(damage, suffix, data_path, tmp_path, capsys, monkeypatch):
    name = "t10k-labels-idx1-ubyte"
    good = data.find_idx(name, data_path)
    raw, other = tmp_path / "FashionMNIST" / "raw", tmp_path / "other"
    raw.mkdir(parents=True)
    other.mkdir()
    (raw / f"{name}{suffix}").write_bytes(gzip.compress(damage(bytes(good))) if suffix else damage(bytes(good)))
    (other / f"{name}.gz").write_bytes(gzip.compress(good))
    monkeypatch.setattr(data, "DEBIAN_FOLDER", other)
    assert data.find_idx(name, tmp_path) == good
    assert str(raw / f"{name}{suffix}") in capsys.readouterr().err


def test_a_truncated_gzip_stream_is_refused(data_path, tmp_path):
    name = "t10k-labels-idx1-ubyte"
    (tmp_path / f"{name}.gz").write_bytes(gzip.compress(data.find_idx(name, data_path))[:-500])
    assert data._read_verified(name, tmp_path, []) is None


def test_no_data_and_no_route_to_it_is_one_clear_error(tmp_path, monkeypatch):
    def no_route(folder):
        raise OSError("no network")

    monkeypatch.setattr(data, "DEBIAN_FOLDER", tmp_path)
    monkeypatch.setattr(data, "_fetch_with_torchvision", no_route)
    monkeypatch.setattr(data, "_fetch_with_apt", no_route)
    raw = tmp_path / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    (raw / "train-images-idx3-ubyte.gz").write_bytes(b"damaged")
    with pytest.raises(UserError, match=r"data_dir=FOLDER.*ubyte\.gz: can't be read.*no network"):
        data.load_images("train", tmp_path)
    assert (raw / "train-images-idx3-ubyte.gz").read_bytes() == b"damaged"


def test_fetched_files_are_verified_and_kept_unpacked(data_path, tmp_path, monkeypatch):
    def fetch(folder):
        for name in IDX_FILES:
            (folder / f"{name}.gz").write_bytes(gzip.compress(data.find_idx(name, data_path), 1))
        return folder

    monkeypatch.setattr(data, "DEBIAN_FOLDER", tmp_path)
    real_find = data.find_idx("t10k-images-idx3-ubyte", data_path)
    raw = tmp_path / "new" / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    (raw / "t10k-images-idx3-ubyte").write_bytes(b"damaged")
    with monkeypatch.context() as patch:
        patch.setattr(data, "_fetch_with_torchvision", lambda folder: (_ for _ in ()).throw(OSError("no network")))
        patch.setattr(data, "_fetch_with_apt", fetch)
        assert data.find_idx("t10k-images-idx3-ubyte", tmp_path / "new") == real_find
    assert {path.name for path in raw.iterdir()} == {*IDX_FILES, "t10k-images-idx3-ubyte.damaged"}
    assert (raw / "train-labels-idx1-ubyte").read_bytes() == data.find_idx("train-labels-idx1-ubyte", data_path)


HEADER = bytes([0, 0, 8, 1, 0, 0, 0, 5])


@pytest.mark.parametrize(
    "contents, complaint",
    [
        (b"\0\0\x08", "too few"),
        (bytes([0, 0, 8, 3]) + HEADER[4:] + b"12345", "magic number is 2051"),
        (bytes([0, 0, 9, 1]) + HEADER[4:] + b"12345", "magic number is 2305"),
        (HEADER[:7] + b"\6" + b"12345", r"says \(6,\)"),
        (HEADER + b"1234", "4 elements"),
    ],
    ids=["short", "dimensions", "type", "count", "elements"],
)
def test_a_wrong_idx_header_is_refused(contents, complaint):
    with pytest.raises(UserError, match=complaint):
        data.read_idx(bytearray(contents), (5,), "labels")


def test_an_idx_file_is_read_as_it_says():
    assert data.read_idx(bytearray(HEADER + b"\1\2\3\4\5"), (5,), "labels").tolist() == [1, 2, 3, 4, 5]
