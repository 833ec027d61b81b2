"""The network, its frozen part, inference, and one training step."""

import pytest
import torch

from config import Settings, UserError
from model import (
    ACTIVATIONS,
    INITS,
    Heads,
    build,
    choose_device,
    choose_precision,
    count_parameters,
    folded,
    freeze,
    infer,
    layers,
    load_imagenet,
    train_one_epoch,
    whiten,
    with_batch_norm,
)
from networks import NETWORKS
from optimizer import Optimizer

PARAMETERS = {
    "cnn": 28_938,
    "mlp": 235_146,
    "deep_cnn": 243_786,
    "deep_cnn_dropout": 225_034,
    "compact_cnn": 98_442,
    "resnet8": 77_754,
    "resnet14": 99_418,
    "resnet18": 11_175_370,
    "resnet18_56": 11_175_370,
    "wide_resnet": 653_178,
    "fast_cnn": 29_178,
}


@pytest.mark.parametrize("name", NETWORKS)
def test_networks_have_the_references_parameters_and_output(name):
    network = build(name, 10)
    assert count_parameters(network) == PARAMETERS[name]
    assert network(torch.zeros(3, 1, 28, 28)).shape == (3, 10)
    assert network.features(torch.zeros(3, 1, 28, 28)).shape == (3, network.classifier.in_features)


def test_task_1s_network_has_the_references_parameters():
    assert count_parameters(build("cnn", 2)) == 16_386


def test_compact_cnn_keeps_to_system_4s_limit():
    assert count_parameters(build("compact_cnn", 10)) <= 100_000


def test_settings_know_the_networks_by_their_names():
    kinds = Settings.model_fields
    assert set(kinds["architecture"].annotation.__args__) == set(NETWORKS)
    assert set(kinds["activation"].annotation.__args__) == set(ACTIVATIONS)
    assert set(kinds["init"].annotation.__args__) == {"default", *INITS}


@pytest.mark.parametrize("name", ["resnet8", "resnet18", "fast_cnn"])
def test_batch_normalisation_is_added_to_no_network_that_has_it(name):
    with pytest.raises(UserError, match="batch_norm=true: this architecture has batch normalisation of its own"):
        with_batch_norm(build(name, 10))


def test_the_summary_counts_every_parameter_and_the_multiply_adds():
    network = build("resnet8", 10).train()
    rows = layers(network)
    assert network.training
    assert sum(row.parameters for row in rows) == count_parameters(network)
    assert rows[0].multiply_adds == 28 * 28 * 16 * 9 and rows[0].output_shape == (16, 28, 28)
    assert rows[-1].multiply_adds == 64 * 10


def test_dropout_activation_and_init_reach_every_layer():
    network = build("deep_cnn_dropout", 10, dropout=0.7, activation="gelu", init="orthogonal")
    kinds = [type(module).__name__ for module in network.modules()]
    assert "ReLU" not in kinds and kinds.count("GELU") == 3
    assert [module.p for module in network.modules() if isinstance(module, torch.nn.Dropout)] == [0.7] * 3
    weight = network.classifier.weight
    assert torch.allclose(weight @ weight.T, torch.eye(10), atol=1e-5) and not network.classifier.bias.any()


def test_folded_batch_normalisation_gives_the_same_logits_from_the_plain_network(train_data):
    network, x = build("deep_cnn", 10), train_data[0][:256] / 255
    with_batch_norm(network)
    for _ in range(3):
        network.train()(x)  # gathers statistics
    plain = folded(network)
    assert plain.state_dict().keys() == build("deep_cnn", 10).state_dict().keys()
    assert torch.allclose(plain(x), network.eval()(x), atol=1e-4)


def test_whitened_patches_have_unit_variance_in_frozen_patterns_and_their_opposites():
    network = build("fast_cnn", 10)
    x = torch.randn(50, 1, 28, 28).cumsum(-1)  # neighbours that resemble each other
    whiten(network, x)
    first = network.features[0]
    assert not first.weight.requires_grad and torch.equal(first.weight[:8], -first.weight[8:])
    patches = torch.nn.functional.unfold(x, 3).mT.reshape(-1, 9)
    responses = patches @ first.weight[:8].view(8, 9).T
    assert torch.allclose(responses.T @ responses / len(patches), torch.eye(8), atol=0.05)


def test_whiten_wants_a_convolution_first():
    with pytest.raises(UserError, match="whiten=true"):
        whiten(build("mlp", 10), torch.zeros(2, 1, 28, 28))


@pytest.mark.parametrize(("name", "scale"), [("resnet18", 1), ("resnet18_56", 2)])
def test_pretrained_filters_say_of_grey_what_they_said_of_rgb(name, scale, monkeypatch):
    import torchvision

    theirs = torchvision.models.resnet18().eval()
    monkeypatch.setattr(torchvision.models.ResNet18_Weights, "get_state_dict", lambda *_, **__: theirs.state_dict())
    network = build(name, 10).eval()
    load_imagenet(network)
    grey = torch.rand(2, 1, 28, 28)
    theirs.fc = torch.nn.Identity()
    enlarged = torch.nn.functional.interpolate(grey, scale_factor=scale, mode="bilinear")
    assert torch.allclose(network.features(grey), theirs(enlarged.expand(-1, 3, -1, -1)), atol=1e-4)


def test_weights_that_cannot_be_fetched_are_told(monkeypatch):
    import torchvision

    def offline(*_, **__):
        raise OSError("no route to host")

    monkeypatch.setattr(torchvision.models.ResNet18_Weights, "get_state_dict", offline)
    with pytest.raises(UserError, match=r"pretrained=true: .*no route to host.*pretrained=false"):
        load_imagenet(build("resnet18", 10))


def test_an_unknown_network_is_refused():
    with pytest.raises(UserError, match="known: cnn, mlp"):
        build("vgg", 2)


def test_infer_does_not_depend_on_how_images_are_grouped(train_data):
    network, images = build("cnn", 2), train_data[0][:1_203]
    together = infer(network, images, 0.3, 0.35)
    apart = torch.cat([infer(network, part, 0.3, 0.35) for part in images.split(77)])
    assert together.shape == (1_203, 2) and together.dtype == torch.float32
    assert torch.allclose(together, apart, atol=1e-5)


def step(network, data, *, precision=torch.float32, repeats=1):
    images, garments = data[0][:128], data[1][:128]
    labels = (garments == 9).long()
    auxiliary = torch.nn.Linear(1568, 10)
    parameters = [p for p in (*network.parameters(), *auxiliary.parameters()) if p.requires_grad]
    image_losses = torch.full((200,), torch.inf)
    optimizer = Optimizer("adam", parameters, lr=0.001)

    def move():
        optimizer.step()
        optimizer.zero_grad()

    results = []
    for _ in range(repeats):
        sums = torch.zeros(3, dtype=torch.float64)
        train_one_epoch(
            Heads(network, auxiliary),
            [torch.arange(128)],
            images,
            labels,
            garments,
            Settings(auxiliary=0.5),
            mean=0.286,
            std=0.353,
            precision=precision,
            generator=torch.Generator(),
            image_losses=image_losses,
            sums=sums,
            step=move,
        )
        seen, loss, correct = sums.tolist()
        results.append((loss / seen, correct / seen))
    return results, image_losses


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_training_steps_lower_the_loss_and_record_each_images(precision, train_data):
    torch.manual_seed(0)
    results, image_losses = step(build("cnn", 2), train_data, precision=precision, repeats=8)
    assert results[-1][0] < results[0][0] and results[-1][1] > results[0][1]
    assert image_losses[:128].isfinite().all() and image_losses[128:].isinf().all()
    assert image_losses[:128].mean().item() == pytest.approx(results[-1][0], rel=1e-5)


def test_frozen_convolutions_stay_as_they_are_and_the_rest_learns(train_data):
    network = build("cnn", 2)
    freeze(network.features)
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    step(network, train_data, repeats=3)
    same = {name: torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items()}
    assert same == {name: name.startswith("features.") for name in same}


def test_a_loss_that_is_not_finite_stops_before_the_parameters_change(train_data):
    network = build("cnn", 2)
    with torch.no_grad():
        network.classifier.bias[0] = torch.nan
    before = network.features[0].weight.clone()
    with pytest.raises(UserError, match="nan in batch 1"):
        step(network, train_data)
    assert network.features[0].weight.equal(before)


@pytest.mark.parametrize("units", [{}, {"avx512_bf16": False}, {"avx512_bf16": True}, {"amx_bf16": True}])
def test_precision_auto_is_bfloat16_where_the_cpu_has_units_for_it(units, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: units, raising=False)  # torch 2.7 has none
    expected = torch.bfloat16 if any(units.values()) else torch.float32
    assert choose_precision("auto", torch.device("cpu")) == expected


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_device_that_is_not_there_is_refused():
    with pytest.raises(UserError, match="device=cuda"):
        choose_device("cuda")


@pytest.mark.parametrize("name", ["sgd", "adam", "adamw"])
def test_optimizers_are_torchs_bit_for_bit(name):
    torch.manual_seed(0)
    ours, theirs = torch.nn.Linear(30, 20), torch.nn.Linear(30, 20)
    theirs.load_state_dict(ours.state_dict())
    reference = {
        "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.01, fused=True),
        "adam": lambda p: torch.optim.Adam(p, lr=0.1, weight_decay=0.01, fused=True),
        "adamw": lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.01, fused=True),
    }[name](theirs.parameters())
    optimizer = Optimizer(name, ours.parameters(), lr=0.1, weight_decay=0.01)
    for _ in range(5):
        x = torch.randn(7, 30)
        for network, stepper in ((ours, optimizer), (theirs, reference)):
            stepper.zero_grad()
            network(x).square().sum().backward()
            stepper.step()
    assert ours.weight.equal(theirs.weight) and ours.bias.equal(theirs.bias)
