"""Files are whole or not there, and opening one runs nothing that is inside."""

import copy
import pickle

import pytest
import torch

import checkpoint
from config import UserError
from model import build, with_batch_norm


@pytest.fixture
def contents(untrained):
    return copy.deepcopy(untrained)


def test_a_network_survives_the_round_trip(contents, tmp_path):
    path = tmp_path / "new" / "best_model.pt"
    checkpoint.save(path, contents)
    network = checkpoint.rebuild(checkpoint.load(path, "best_model"), path)
    assert not network.training
    assert all(tensor.equal(contents["parameters"][name]) for name, tensor in network.state_dict().items())
    assert [file.name for file in path.parent.iterdir()] == ["best_model.pt"]


def test_a_network_that_trains_with_batch_normalisation_is_rebuilt_without_it(contents, tmp_path):
    network = build("cnn", 2)
    with_batch_norm(network)
    saved = {**contents, "kind": "checkpoint", "settings": {"batch_norm": True}, "parameters": network.state_dict()}
    x = torch.randn(3, 1, 28, 28)
    torch.testing.assert_close(checkpoint.rebuild(saved, tmp_path)(x), network.eval()(x))
    assert checkpoint.rebuild(saved, tmp_path).state_dict().keys() == contents["parameters"].keys()


def test_a_process_that_was_not_there_before_keeps_random_numbers_of_its_own(monkeypatch):
    generator = torch.Generator()
    states = checkpoint.random_states(generator)
    monkeypatch.setattr(checkpoint.parallel, "rank", lambda: 1)
    torch.manual_seed(1)
    own = torch.get_rng_state()
    checkpoint.set_random_states(states, generator)
    assert torch.get_rng_state().equal(own)


class Malicious:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")  # creates the file, if it is ever called


@pytest.mark.parametrize("wrap", [lambda x: x, lambda x: {"kind": "best_model", "parameters": x}], ids=["alone", "inside"])
@pytest.mark.parametrize(
    "write", [torch.save, lambda thing, path: path.write_bytes(pickle.dumps(thing))], ids=["zip", "pickle"]
)
def test_code_in_a_file_is_refused_and_never_runs(wrap, write, tmp_path):
    write(wrap(Malicious(tmp_path / "ran")), tmp_path / "evil.pt")
    with pytest.raises(UserError, match=r"evil\.pt"):
        checkpoint.load(tmp_path / "evil.pt", "best_model")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("keep", [0, 1, 100, 0.5, 0.99])
def test_a_truncated_file_is_refused(keep, contents, tmp_path):
    path = tmp_path / "best_model.pt"
    checkpoint.save(path, contents)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(keep * len(whole)) if isinstance(keep, float) else keep])
    with pytest.raises(UserError, match="damaged"):
        checkpoint.load(path, "best_model")


@pytest.mark.parametrize(
    "foreign", [[1, 2], {"state_dict": {}}, torch.zeros(3), {"kind": "checkpoint"}, {"kind": "best_model"}]
)
def test_a_foreign_file_is_refused(foreign, tmp_path):
    torch.save(foreign, tmp_path / "best_model.pt")
    with pytest.raises(UserError, match="no best_model file"):
        checkpoint.load(tmp_path / "best_model.pt", "best_model")


def test_a_missing_file_and_a_folder_are_refused(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        checkpoint.load(tmp_path / "best_model.pt", "best_model")
    with pytest.raises(UserError, match="folder"):
        checkpoint.load(tmp_path, "best_model")


@pytest.mark.parametrize(
    "change",
    [
        lambda c: c.update(architecture="vgg"),
        lambda c: c.update(output_dim=10),
        lambda c: c.update(parameters=3),
        lambda c: c["parameters"].pop("classifier.bias"),
        lambda c: c["parameters"].update({"classifier.bias": torch.tensor([0.0, torch.nan])}),
    ],
    ids=["architecture", "output_dim", "no dict", "one missing", "nan"],
)
def test_parameters_that_do_not_fit_are_refused(change, contents, tmp_path):
    change(contents)
    with pytest.raises(UserError):
        checkpoint.rebuild(contents, tmp_path)


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "best_model.pt"
    path.write_bytes(b"old")

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint.os, "fsync", full)
    with pytest.raises(UserError, match="No space left"):
        checkpoint.write_atomically(path, b"new")
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


def test_a_folder_that_can_not_be_made_is_one_clear_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="can't be written"):
        checkpoint.write_atomically(tmp_path / "file" / "best_model.pt", b"new")
