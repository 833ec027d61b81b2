"""Files: written whole or not at all, and loaded without running code."""

import copy
import pickle

import pytest
import torch

import checkpoint
from config import ROOT, UserError
from layers import add_batch_norm
from model import build_model, load_model


@pytest.fixture
def contents(untrained):
    return copy.deepcopy(untrained)


def as_checkpoint(contents, **changes):
    """The contents of checkpoint.pt, with what load_model reads."""
    rest = dict.fromkeys(("machine", "ema", "optimizer", "rng", "history", "run"))
    return {**contents, "kind": "checkpoint", "settings": {}, **rest, **changes}


def random_images(count):
    return torch.randint(256, (count, 1, 28, 28), dtype=torch.uint8)


def test_a_model_survives_the_round_trip_bitwise(contents, tmp_path):
    path = tmp_path / "new" / "best_model.pt"
    checkpoint.save(path, contents)
    state = load_model(path).state_dict()
    assert state.keys() == contents["model"].keys()
    assert all(tensor.equal(contents["model"][name]) for name, tensor in state.items())


def test_a_saved_file_is_alone_in_its_folder(contents, tmp_path):
    checkpoint.save(tmp_path / "best_model.pt", contents)
    assert [file.name for file in tmp_path.iterdir()] == ["best_model.pt"]


def test_a_loaded_model_is_in_evaluation_mode_and_has_the_metadata(contents, tmp_path):
    checkpoint.save(tmp_path / "best_model.pt", contents)
    model = load_model(tmp_path / "best_model.pt")
    assert not any(module.training for module in model.modules())
    assert model.metadata == {key: contents[key] for key in contents.keys() - {"kind", "model"}}


def test_a_checkpoint_of_a_model_with_batch_norm_is_loaded_with_it_fused(contents, tmp_path):
    model = build_model("cnn", 2)
    add_batch_norm(model)
    model.train()(random_images(20))  # gathers statistics
    saved = as_checkpoint(contents, settings={"batch_norm": True}, model=model.state_dict())
    checkpoint.save(tmp_path / "checkpoint.pt", saved)
    loaded, images = load_model(tmp_path / "checkpoint.pt"), random_images(3)
    torch.testing.assert_close(loaded(images), model.eval()(images))
    assert loaded.state_dict().keys() == contents["model"].keys()


def test_the_ema_of_a_checkpoint_is_what_is_loaded(contents, tmp_path):
    ema = {name: tensor + 1 for name, tensor in contents["model"].items()}
    checkpoint.save(tmp_path / "checkpoint.pt", as_checkpoint(contents, ema=ema))
    assert all(tensor.equal(ema[name]) for name, tensor in load_model(tmp_path / "checkpoint.pt").state_dict().items())


def test_an_additional_process_keeps_random_numbers_of_its_own(monkeypatch):
    generator = torch.Generator()
    states = checkpoint.rng_state(generator)
    monkeypatch.setattr(checkpoint.distributed, "rank", lambda: 1)
    torch.manual_seed(1)
    own = torch.get_rng_state()
    checkpoint.set_rng_state(states, generator)
    assert torch.get_rng_state().equal(own)


def test_tensors_of_another_device_are_saved_on_the_cpu(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.Tensor, "cpu", lambda tensor: torch.zeros(tensor.shape))  # "meta" can't be copied
    tensor = torch.empty(2, device="meta")
    checkpoint.save(tmp_path / "x.pt", {"alone": tensor, "in": [{"side": tensor}]})
    saved = torch.load(tmp_path / "x.pt", weights_only=True)
    assert saved["alone"].device.type == saved["in"][0]["side"].device.type == "cpu"


class Malicious:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")  # creates the file, if it is ever called


@pytest.mark.parametrize("wrap", [lambda x: x, lambda x: {"kind": "best_model", "model": x}], ids=["alone", "inside"])
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


def test_a_recipes_missing_model_is_refused_with_the_command_that_makes_it():
    with pytest.raises(UserError, match=r"no such file; python train\.py recipe=fast makes it"):
        checkpoint.load(ROOT / "runs" / "fast" / "absent.pt", "best_model")


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        checkpoint.load(tmp_path / "best_model.pt", "best_model")


def test_a_folder_in_the_place_of_a_file_is_refused(tmp_path):
    with pytest.raises(UserError, match="folder"):
        checkpoint.load(tmp_path, "best_model")


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda c: c.update(architecture="vgg"), "names no model"),
        (lambda c: c.update(activation="swish"), "names no model"),
        (lambda c: c.update(output_dim=10), "don't fit"),
        (lambda c: c.update(model=3), "don't fit"),
        (lambda c: c["model"].pop("classifier.bias"), "don't fit"),
        (lambda c: c["model"].pop("mean"), "don't fit"),
        (lambda c: c["model"].update({"classifier.bias": torch.tensor([0.0, torch.nan])}), "not finite"),
    ],
    ids=["architecture", "activation", "output_dim", "no dict", "parameter missing", "buffer missing", "nan"],
)
def test_parameters_that_do_not_fit_are_refused(change, message, contents, tmp_path):
    change(contents)
    checkpoint.save(tmp_path / "best_model.pt", contents)
    with pytest.raises(UserError, match=message):
        load_model(tmp_path / "best_model.pt")


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
