"""The training loop and its extras: Criterion, EMA, HardExampleSampler, batches, one Trainer in memory."""

import pytest
import torch
import torch.nn.functional as F

from config import TrainSettings
from data_preprocessing import Split, as_task, shuffle
from model import build_model
from trainer import EMA, TEMPERATURE, Criterion, HardExampleSampler, Trainer, epoch_batches


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


# ---- batches ---------------------------------------------------------------------------------------------------------


def test_shuffling_permutes():
    indices = torch.randperm(1_000)[:600]
    order = shuffle(indices, seeded())
    assert order.sort().values.equal(indices.sort().values) and not order.equal(indices)


@pytest.mark.parametrize(("count", "sizes"), [(25, [10, 10]), (20, [10, 10]), (7, [7])])
def test_batches_have_equal_sizes_and_a_short_set_is_one_batch(count, sizes):
    assert [len(batch) for batch in epoch_batches(torch.arange(count), TrainSettings(batch_size=10), 1)] == sizes


# ---- HardExampleSampler ----------------------------------------------------------------------------------------------


@pytest.fixture
def sampler():
    """Of the even indices below 1,000, with known losses."""
    sampler = HardExampleSampler(torch.arange(0, 1_000, 2))
    sampler.record(sampler.train, torch.rand(500, generator=seeded(1)))
    return sampler


def test_a_whole_epoch_visits_every_training_image_once(sampler):
    order = sampler.order(500, seeded())
    assert order.sort().values.equal(sampler.train) and not order.equal(sampler.train)


def test_half_a_smaller_epoch_are_the_hardest_images(sampler):
    order = sampler.order(100, seeded())
    hardest = sampler.train[sampler.losses[sampler.train].topk(50).indices]
    assert torch.isin(hardest, order).all()
    rest = sampler.losses[order[~torch.isin(order, hardest)]]
    assert len(rest) == 50 and rest.min() < 0.2  # the other half is random


def test_a_smaller_epoch_visits_only_training_images_and_none_twice(sampler):
    order = sampler.order(101, seeded())
    assert len(order.unique()) == 101 and torch.isin(order, sampler.train).all()


def test_hard_and_random_images_are_shuffled(sampler):
    order = sampler.order(100, seeded())
    is_hard = sampler.losses[order] >= sampler.losses[sampler.train].topk(50).values.min()
    assert 10 < is_hard[:50].sum() < 40


def test_unseen_images_are_those_without_a_loss():
    sampler = HardExampleSampler(torch.tensor([5, 3, 9, 1]))
    sampler.record(torch.tensor([3, 9]), torch.zeros(2))
    assert sampler.unseen().tolist() == [5, 1]


def test_a_restored_sampler_draws_the_same_order(sampler):
    restored = HardExampleSampler(sampler.train)
    assert not restored.order(100, seeded()).equal(sampler.order(100, seeded()))
    restored.load_state_dict(sampler.state_dict())
    assert restored.order(100, seeded()).equal(sampler.order(100, seeded()))


# ---- EMA -------------------------------------------------------------------------------------------------------------


def models_of_training(count):
    """A model with batch normalisation after each of `count` steps."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2))
    for _ in range(count):
        model(torch.randn(8, 3))  # changes the running statistics
        with torch.no_grad():
            model[0].weight.add_(torch.randn(2, 3))
        yield model


@pytest.mark.parametrize("name", ["0.weight", "1.running_var"])
def test_ema_is_the_moving_average_of_parameters_and_running_statistics(name):
    ema = None
    for step, model in enumerate(models_of_training(30)):
        latest = model.state_dict()[name].clone()
        if ema is None:
            ema, expected = EMA(model, 0.7), latest
        decay = min(0.7, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * latest
        ema.update(step)
    assert torch.allclose(ema.state_dict()[name], expected, atol=1e-6) and not torch.allclose(expected, latest, atol=1e-3)


def test_ema_leaves_the_model_unchanged():
    (model,) = models_of_training(1)
    ema = EMA(model, 0.9)
    with torch.no_grad():
        model[0].weight.add_(1)
    before = model[0].weight.clone()
    ema.update(5)
    assert model[0].weight.equal(before)


def test_a_restored_ema_continues_bitwise():
    (model,) = models_of_training(1)
    ema = EMA(model, 0.9)
    with torch.no_grad():
        model[0].weight.add_(1)
    ema.update(5)
    restored = EMA(model, 0.9)
    restored.load_state_dict(ema.state_dict())
    for average in (ema, restored):
        average.update(6)
    assert all(tensor.equal(restored.state_dict()[name]) for name, tensor in ema.state_dict().items())


# ---- Criterion -------------------------------------------------------------------------------------------------------


@pytest.fixture
def batch(train_data):
    """Images, labels of two classes, fine labels."""
    images, fine_labels = train_data[0][:64], train_data[1][:64]
    return images, torch.isin(fine_labels, torch.tensor([5, 7, 9])).long(), fine_labels


def build_criterion(**settings):
    torch.manual_seed(0)
    return Criterion(build_model("mlp", 2), TrainSettings(architecture="mlp", **settings), 10)


def test_without_extras_the_loss_is_the_cross_entropy(batch):
    criterion = build_criterion()
    loss, _ = criterion(*batch, None)
    assert torch.allclose(loss, F.cross_entropy(criterion.model(batch[0]), batch[1]), rtol=1e-6)


def test_each_images_cross_entropy_and_correctness_are_reported(batch):
    criterion = build_criterion(label_smoothing=0.3, aux_loss_weight=1.0)  # neither is in them
    _, results = criterion(*batch, None)
    logits = criterion.model(batch[0])
    assert results[:, 0].equal(F.cross_entropy(logits, batch[1], reduction="none").detach())
    assert results[:, 1].bool().equal(logits.argmax(1) == batch[1]) and 0 < results[:, 1].mean() < 1
    assert not results.requires_grad


def test_label_smoothing_is_torchs(batch):
    criterion = build_criterion(label_smoothing=0.2)
    loss, _ = criterion(*batch, None)
    assert loss.equal(F.cross_entropy(criterion.model(batch[0]), batch[1], label_smoothing=0.2))


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_class_weights_are_torchs_without_its_division_by_their_sum(smoothing, batch):
    criterion, weights = build_criterion(label_smoothing=smoothing), torch.tensor([0.5, 3.0])
    criterion.class_weights = weights
    logits = criterion.model(batch[0])
    expected = F.cross_entropy(logits, batch[1], weights, reduction="sum", label_smoothing=smoothing) / 64
    assert torch.allclose(criterion(*batch, None)[0], expected)


@pytest.mark.parametrize("weight", [0.0, 0.7, 1.0])
def test_the_gradient_of_distillation_pulls_softened_probabilities_to_the_teachers(weight, batch):
    criterion = build_criterion(distill_weight=weight)
    teacher_logits = torch.randn(64, 2, generator=seeded())
    criterion.teacher = lambda _, indices: teacher_logits[indices]
    criterion(*batch, torch.arange(64))[0].backward()
    logits = criterion.model(batch[0]).detach()
    to_teacher = TEMPERATURE * ((logits / TEMPERATURE).softmax(1) - (teacher_logits / TEMPERATURE).softmax(1))
    to_labels = logits.softmax(1) - F.one_hot(batch[1], 2)
    expected = (weight * to_teacher + (1 - weight) * to_labels).mean(0)  # Hinton et al. 2015, section 2.1, for the biases
    assert torch.allclose(criterion.model.classifier.bias.grad, expected, atol=1e-6)


def test_the_auxiliary_head_adds_its_weighted_loss_over_the_fine_labels(batch):
    criterion = build_criterion(aux_loss_weight=0.5)
    loss, _ = criterion(*batch, None)
    aux_logits = criterion.aux_head(criterion.model.forward_features(batch[0]))
    assert aux_logits.shape == (64, 10)
    expected = F.cross_entropy(criterion.model(batch[0]), batch[1]) + 0.5 * F.cross_entropy(aux_logits, batch[2])
    assert torch.allclose(loss, expected)


def test_the_auxiliary_loss_reaches_the_features(batch):
    gradients = []
    for weight in (0.5, 1.0):
        criterion = build_criterion(aux_loss_weight=weight)
        criterion(*batch, None)[0].backward()
        gradients.append(criterion.model.features[1].weight.grad)
    assert not torch.allclose(*gradients)


def test_an_auxiliary_head_survives_the_round_trip(batch):
    criterion, restored = build_criterion(aux_loss_weight=1.0), build_criterion(aux_loss_weight=1.0)
    with torch.no_grad():
        criterion.aux_head.weight[0] += 0.1
    assert not restored(*batch, None)[0].equal(criterion(*batch, None)[0])
    restored.load_state_dict(criterion.state_dict())
    assert restored(*batch, None)[0].equal(criterion(*batch, None)[0])


# ---- Trainer ---------------------------------------------------------------------------------------------------------


def build_trainer(data, *, precision=torch.float32, **settings):
    """A trainer of two classes on the images with even numbers below 256; the others validate."""
    defaults = {"batch_size": 64, "epochs": 8}
    train, valid = torch.arange(0, 256, 2), torch.arange(1, 256, 2)
    return Trainer(TrainSettings(**defaults | settings), 0, Split(as_task(data, 2), train, valid), precision)


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_training_lowers_the_loss_and_raises_the_accuracy(precision, dataset):
    trainer = build_trainer(dataset, precision=precision)
    results = [trainer.train_epoch(epoch, []) for epoch in range(1, 6)]
    assert results[-1][0] < results[0][0] and results[-1][1] > results[0][1]


def test_the_losses_of_an_epochs_images_are_recorded(dataset):
    trainer = build_trainer(dataset, hard_fraction=0.5)
    loss, _ = trainer.train_epoch(1, [])
    assert trainer.sampler.losses[::2].isfinite().all() and trainer.sampler.losses[1::2].isinf().all()
    assert trainer.sampler.losses[::2].mean().item() == pytest.approx(loss, rel=1e-5)


@pytest.mark.parametrize("pretrained", [True, False])
def test_imagenet_weights_are_loaded_if_the_settings_say_so(pretrained, dataset, monkeypatch):
    loaded = []
    monkeypatch.setattr("trainer.load_imagenet_weights", loaded.append)
    build_trainer(dataset, architecture="resnet18", pretrained=pretrained)
    assert len(loaded) == pretrained


def test_without_extras_there_is_no_ema_sampler_or_auxiliary_head(dataset):
    trainer = build_trainer(dataset)
    assert (trainer.ema, trainer.sampler, trainer.criterion.aux_head, trainer.criterion.teacher) == (None,) * 4
    state = trainer.state_dict()
    assert (state["ema"], state["sampler"], state["aux_head"]) == (None,) * 3


def test_the_state_has_the_extras_that_are_used(dataset):
    trainer = build_trainer(dataset, ema_decay=0.9, first_epoch_fraction=0.5, aux_loss_weight=1.0)
    state = trainer.state_dict()
    assert state["ema"].keys() == state["model"].keys()
    assert (state["sampler"].keys(), state["aux_head"].keys()) == ({"losses"}, {"weight", "bias"})


def test_the_models_normalisation_is_of_its_training_images(dataset):
    pixels = dataset.images[:256:2].double() / 255
    model = build_trainer(dataset).model
    assert (model.mean.item(), model.std.item()) == pytest.approx((pixels.mean().item(), pixels.std().item()), rel=1e-4)


def test_balanced_class_weights_are_inverse_to_the_training_images_classes_and_1_on_average(dataset):
    trainer = build_trainer(dataset, class_weights="balanced")
    labels = trainer.labels[trainer.train]
    weights = trainer.criterion.class_weights
    assert (weights * labels.bincount()).tolist() == [64.0, 64.0] and weights[labels].mean().item() == pytest.approx(1)
    assert build_trainer(dataset).criterion.class_weights is None


def test_symmetric_scaling_is_to_minus_1_to_1(dataset):
    x = build_trainer(dataset, scaling="symmetric").model.normalize(dataset.images[:100])
    assert (x.min(), x.max()) == (-1, 1)


def test_the_first_epochs_have_their_fractions_of_the_images(dataset):
    trainer = build_trainer(dataset, first_epoch_fraction=0.5, hard_fraction=0.25, batch_size=16, epochs=3)
    assert (trainer.counts, trainer.steps) == ([64, 32, 32], [4, 2, 2])


def test_a_whitened_first_layer_is_not_trained(dataset):
    trainer = build_trainer(dataset, architecture="fast_cnn")
    before = {name: tensor.clone() for name, tensor in trainer.model.named_parameters()}
    trainer.train_epoch(1, [])
    same = {name for name, tensor in trainer.model.named_parameters() if tensor.equal(before[name])}
    assert same == {"features.0.weight"}


def test_a_line_of_history_has_the_learning_rate_of_the_last_step(dataset):
    line = build_trainer(dataset, schedule="linear", warmup=0.0, lr=0.5, epochs=2).run_epoch(1, [])
    assert line["lr"] == pytest.approx(0.5 * 0.75)  # the second of four steps
