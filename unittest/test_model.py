"""Models: architectures, normalisation, layers of our own, loading weights, freezing, summary, device and precision."""

import pytest
import torch
from torch import nn

import distributed
from config import TrainSettings, UserError
from data_preprocessing import mean_and_std
from device import capture, choose_device, choose_precision
from layers import StandardizedConv2d, WhitenedConv2d, add_batch_norm, fuse_batch_norm
from model import (
    ACTIVATIONS,
    ARCHITECTURES,
    INITS,
    build_model,
    count_parameters,
    freeze,
    load_imagenet_weights,
    summarize,
)
from trainer import infer

PARAMETERS = {
    "cnn": 28_938,
    "mlp": 235_146,
    "deep_cnn": 243_786,
    "deep_cnn_dropout": 225_034,
    "compact_cnn": 98_442,
    "resnet8": 77_754,
    "resnet14": 99_418,
    "separable14_photo": 95_146,
    "cnn_photo": 124_074,
    "separable14": 95_146,
    "separable14_thin": 19_026,
    "separable20": 270_546,
    "resnet20": 271_994,
    "resnet20_wide": 1_083_626,
    "resnet20_wider": 4_325_834,
    "resnet18": 11_175_370,
    "resnet18_56": 11_175_370,
    "fast_cnn": 29_178,
    "fast_cnn_wide": 95_034,
    "fast_cnn_deep": 279_738,
}


def test_the_standardised_convolution_sees_no_brightness_nor_contrast():
    layer, images = StandardizedConv2d(1, 4, 3), torch.randn(2, 1, 28, 28)
    assert torch.allclose(layer(5 * images), layer(5 * images + 3), atol=1e-5)
    assert torch.allclose(layer(5 * images), layer(10 * images), atol=0.01)


# ---- architectures ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_architectures_have_the_references_parameters_and_output(name):
    model = build_model(name, 10)
    images = torch.zeros(3, 1, 28, 28, dtype=torch.uint8)
    assert count_parameters(model) == PARAMETERS[name]
    assert model(images).shape == (3, 10)
    assert model.forward_features(images).shape == (3, model.classifier.in_features)


@pytest.mark.parametrize(
    ("setting", "names"),
    [("architecture", ARCHITECTURES), ("activation", ACTIVATIONS), ("init", {"default", *INITS})],
    ids=["architecture", "activation", "init"],
)
def test_settings_know_the_models_names(setting, names):
    assert set(TrainSettings.model_fields[setting].annotation.__args__) == set(names)


def test_dropout_activation_and_init_reach_every_layer():
    model = build_model("deep_cnn_dropout", 10, dropout=0.7, activation="gelu", init="orthogonal")
    kinds = [type(module).__name__ for module in model.modules()]
    assert "ReLU" not in kinds and kinds.count("GELU") == 3
    assert [module.p for module in model.modules() if isinstance(module, nn.Dropout)] == [0.7] * 3
    weight = model.classifier.weight
    assert torch.allclose(weight @ weight.T, torch.eye(10), atol=1e-5) and not model.classifier.bias.any()


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_dropout_applies_to_every_architecture(name):
    dropout = [module.p for module in build_model(name, 10, dropout=0.4).modules() if isinstance(module, nn.Dropout)]
    assert dropout and set(dropout) == {0.4}


# ---- normalisation ---------------------------------------------------------------------------------------------------


@pytest.fixture
def normalizing_model(train_data):
    model, images = build_model("cnn", 2), train_data[0][:2_000]
    model.set_statistics(*mean_and_std(images, torch.arange(2_000)), images)
    return model


def test_the_normalisation_of_uint8_images_is_by_the_training_images_mean_and_std(normalizing_model, train_data):
    pixels = train_data[0][:2_000].double() / 255
    expected = (pixels - pixels.mean()) / pixels.std()
    x = normalizing_model.normalize(train_data[0][:2_000])
    assert x.dtype == torch.float32 and torch.allclose(x.double(), expected, atol=1e-4)


def test_the_model_normalises_its_uint8_input_itself(normalizing_model, train_data):
    images, model = train_data[0][:8], normalizing_model.eval()
    assert model(images).equal(model.classifier(model.features(model.normalize(images))))


def test_normalised_images_are_channels_last(normalizing_model, train_data):
    assert normalizing_model.normalize(train_data[0][:8]).is_contiguous(memory_format=torch.channels_last)


def test_mean_and_std_are_in_the_state_dict(normalizing_model):
    state = normalizing_model.state_dict()
    assert 0.2 < state["mean"].item() < 0.4 < state["std"].item() / state["mean"].item() < 2
    loaded = build_model("cnn", 2)
    loaded.load_state_dict(state)
    assert (loaded.mean, loaded.std) == (normalizing_model.mean, normalizing_model.std)


# ---- layers ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["resnet8", "resnet18", "fast_cnn"])
def test_batch_norm_is_refused_for_a_model_that_has_it(name):
    with pytest.raises(UserError, match="batch_norm=true: this architecture has batch normalisation of its own"):
        add_batch_norm(build_model(name, 10))


def test_fused_batch_norm_gives_the_same_logits_from_the_plain_model(train_data):
    model, images = build_model("deep_cnn", 10), train_data[0][:256]
    add_batch_norm(model)
    for _ in range(3):
        model.train()(images)  # gathers statistics
    fused = fuse_batch_norm(model)
    assert fused.state_dict().keys() == build_model("deep_cnn", 10).state_dict().keys()
    assert torch.allclose(fused(images), model.eval()(images), atol=1e-4)


def test_whitened_patches_have_unit_variance():
    layer, x = WhitenedConv2d(1, 16, 3), torch.randn(50, 1, 28, 28).cumsum(-1)  # neighbours are correlated
    layer.fit(x)
    patches = torch.nn.functional.unfold(x, 3).mT.reshape(-1, 9)
    responses = patches @ layer.weight[:8].view(8, 9).T
    assert torch.allclose(responses.T @ responses / len(patches), torch.eye(8), atol=0.05)


def test_whitening_filters_are_frozen_and_have_both_signs():
    layer = WhitenedConv2d(1, 16, 3)
    layer.fit(torch.randn(50, 1, 28, 28))
    assert not layer.weight.requires_grad and layer.weight[:8].equal(-layer.weight[8:])


@pytest.mark.parametrize("device, kind", [("cuda", nn.SyncBatchNorm), ("cpu", nn.BatchNorm2d)])
def test_batch_norm_is_synchronised_between_gpus_only(device, kind, monkeypatch):
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    monkeypatch.setattr(nn.parallel, "DistributedDataParallel", lambda module, **_: nn.Sequential(module))
    model = build_model("resnet8", 10)
    states = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    wrapped = distributed.wrap_ddp(nn.Sequential(model), torch.device(device))
    norms = [module for module in wrapped.modules() if isinstance(module, nn.SyncBatchNorm | nn.BatchNorm2d)]
    assert len(norms) == 9 and all(type(norm) is kind for norm in norms)
    assert [module for module in model.modules() if isinstance(module, kind)] == norms  # the trainer's model is converted
    assert all(tensor.equal(states[name]) for name, tensor in model.state_dict().items())


def test_capturing_a_model_leaves_its_inputs_as_they_are(monkeypatch):
    def graphed(module, inputs):  # as torch's: later batches are copied into these inputs
        for tensor in inputs:
            tensor.zero_()

    monkeypatch.setattr(torch.cuda, "make_graphed_callables", graphed)
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda _: None)
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda *_: None)
    train = torch.arange(1, 10)
    capture(nn.Linear(1, 1), (train[:4],), torch.float32)
    assert train.equal(torch.arange(1, 10))


def test_a_process_alone_is_not_wrapped():
    model = build_model("resnet8", 10)
    assert distributed.wrap_ddp(model, torch.device("cuda")) is model


# ---- ImageNet, freezing, summary -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "scale"), [("resnet18", 1), ("resnet18_56", 2)])
def test_pretrained_filters_respond_to_grey_as_to_rgb(name, scale, monkeypatch):
    import torchvision

    original = torchvision.models.resnet18().eval()
    monkeypatch.setattr(torchvision.models.ResNet18_Weights, "get_state_dict", lambda *_, **__: original.state_dict())
    model = build_model(name, 10).eval()
    load_imagenet_weights(model)
    grey = torch.rand(2, 1, 28, 28)
    original.fc = nn.Identity()
    enlarged = torch.nn.functional.interpolate(grey, scale_factor=scale, mode="bilinear")
    assert torch.allclose(model.features(grey), original(enlarged.expand(-1, 3, -1, -1)), atol=1e-4)


def test_weights_that_cannot_be_downloaded_are_reported(monkeypatch):
    import torchvision

    def offline(*_, **__):
        raise OSError("no route to host")

    monkeypatch.setattr(torchvision.models.ResNet18_Weights, "get_state_dict", offline)
    with pytest.raises(UserError, match=r"pretrained=true: .*no route to host.*pretrained=false"):
        load_imagenet_weights(build_model("resnet18", 10))


def test_frozen_features_stay_bitwise_the_same_and_the_classifier_learns(train_data):
    model = build_model("resnet8", 10)
    freeze(model.features)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    optimizer = torch.optim.SGD([parameter for parameter in model.parameters() if parameter.requires_grad], lr=0.1)
    torch.nn.functional.cross_entropy(model(train_data[0][:32]), train_data[1][:32]).backward()
    optimizer.step()
    changed = {name for name, tensor in model.state_dict().items() if not tensor.equal(before[name])}
    assert changed == {"classifier.weight", "classifier.bias"}


def test_the_summary_counts_every_parameter_and_the_macs():
    model = build_model("resnet8", 10)
    rows = summarize(model)
    assert sum(row.parameters for row in rows) == count_parameters(model)
    assert rows[0].macs == 28 * 28 * 16 * 9 and rows[0].output_shape == (16, 28, 28)
    assert rows[-1].macs == 64 * 10


def test_the_summary_leaves_the_model_in_its_mode():
    model = build_model("resnet8", 10).train()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    summarize(model)
    assert model.training and all(tensor.equal(state[name]) for name, tensor in model.state_dict().items())


# ---- inference, device, precision ------------------------------------------------------------------------------------


def test_infer_does_not_depend_on_how_images_are_grouped(train_data):
    model, images = build_model("cnn", 2), train_data[0][:1_203]
    at_once = infer(model, images)
    in_parts = torch.cat([infer(model, part) for part in images.split(77)])
    assert at_once.shape == (1_203, 2) and at_once.dtype == torch.float32
    assert torch.allclose(at_once, in_parts, atol=1e-5)


@torch.inference_mode()
def test_infer_gives_the_features_that_the_classifier_takes(train_data):
    model, images = build_model("deep_cnn_dropout", 10), train_data[0][:20]
    features = infer(model, images, features=True)
    assert features.shape == (20, 128) and torch.allclose(model.classifier(features), infer(model, images), atol=1e-6)


@pytest.mark.parametrize("units", [{}, {"avx512_bf16": False}, {"avx512_bf16": True}, {"amx_bf16": True}])
def test_precision_auto_is_bfloat16_where_the_cpu_has_units_for_it(units, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: units, raising=False)  # torch 2.7 has none
    expected = torch.bfloat16 if any(units.values()) else torch.float32
    assert choose_precision("auto", torch.device("cpu")) == expected


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_an_unavailable_device_is_refused():
    with pytest.raises(UserError, match="device=cuda"):
        choose_device("cuda")
