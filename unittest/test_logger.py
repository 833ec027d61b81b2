"""TensorBoard's log of a run. Skipped where requirements-extra.txt is not installed."""

import pytest

import checkpoint
import train

pytest.importorskip("tensorboard")
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

WORDS = ["limit=300", "epochs=3", "valid_ratio=0.01", "recipe=compact_cnn"]


def read(folder):
    return EventAccumulator(str(folder)).Reload()


@pytest.fixture(scope="module")
def logged(tmp_path_factory):
    """The folder of a run that was killed while it wrote its second epoch, and resumed."""
    out = tmp_path_factory.mktemp("logged")
    save, calls = checkpoint.save, []

    def dying(path, contents):
        calls.append(path.name)
        if calls.count("checkpoint.pt") == 2:
            raise RuntimeError("as good as killed: nothing runs after it")
        save(path, contents)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(RuntimeError):
        patch.setattr(checkpoint, "save", dying)
        train.main([*WORDS, "log=tensorboard", f"out_dir={out}"])
    train.main([*WORDS, "log=tensorboard", f"out_dir={out}", "resume=true"])
    return out


def test_after_a_kill_it_has_each_epoch_once_as_the_history_has_it(logged):
    _, history = checkpoint.read_history(logged / "history.jsonl")
    for tag, key in (("loss/train", "train_loss"), ("accuracy/valid", "valid_accuracy"), ("lr", "lr")):
        points = read(logged / "tensorboard").Scalars(tag)
        assert [point.step for point in points] == [1, 2, 3]
        assert [point.value for point in points] == pytest.approx([line[key] for line in history])


def test_it_has_the_settings_and_a_picture_of_predictions(logged):
    log = read(logged / "tensorboard")
    assert b"| label_smoothing | 0.0 |" in log.Tensors("settings/text_summary")[0].tensor_proto.string_val[0]
    assert [image.step for image in log.Images("predictions")] == [1, 2, 3]


def test_it_does_not_change_the_model(logged, tmp_path):
    train.main([*WORDS, f"out_dir={tmp_path}"])
    one, other = (checkpoint.load(out / "best_model.pt", "best_model")["model"] for out in (logged, tmp_path))
    assert all(tensor.equal(other[name]) for name, tensor in one.items())


def test_without_validation_images_it_has_the_training_only(tmp_path):
    train.main([*WORDS, "log=tensorboard", "epochs=1", "valid_ratio=0", f"out_dir={tmp_path}"])
    tags = read(tmp_path / "tensorboard").Tags()
    assert tags["images"] == [] and set(tags["scalars"]) == {"loss/train", "accuracy/train", "lr", "seconds"}


def test_of_several_models_each_has_a_log_of_its_own(tmp_path):
    train.main([*WORDS, "log=tensorboard", "epochs=1", "runs=2", f"out_dir={tmp_path}"])
    assert [len(read(tmp_path / "tensorboard" / name).Scalars("loss/valid")) for name in ("run_1", "run_2")] == [1, 1]
