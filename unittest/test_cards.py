"""The networks of the repository are those that SHA256SUMS and the model cards describe."""

import shutil
import subprocess

import pytest
import torch

from config import ROOT, UserError
from tools import cards

SUMS = dict(reversed(line.split("  ")) for line in (ROOT / "SHA256SUMS").read_text().splitlines())


def git(*words):
    """The lines that git prints; none without git."""
    command = ["git", *words]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout.split() if shutil.which("git") else []


REPLACED = git("diff", "--name-only", "HEAD", "--", "*.pt")  # by a training of one's own
SHIPPED = sorted(SUMS.keys() - REPLACED)


def test_every_network_has_its_checksum():
    assert all(f"{SUMS[path]}  {path}\n" == cards.checksums([path]) for path in SHIPPED)
    assert not git("ls-files", "*.pt") or cards.networks() == list(SUMS)


NETWORKS = [path for path in SHIPPED if path.endswith(("best_model.pt", "generator.pt"))]


@pytest.mark.parametrize("network", NETWORKS)
def test_torch_alone_opens_every_network_without_a_gpu(network):
    parameters = torch.load(ROOT / network, weights_only=True)["model"].values()
    assert {tensor.device.type for tensor in parameters} == {"cpu"}


@pytest.mark.parametrize("network", NETWORKS)
def test_every_card_is_that_of_its_network(network):
    assert cards.card_path(network).read_text() == cards.card(network)


def test_buffers_are_no_parameters():
    assert "95,146 parameters" in cards.card("runs/photo/best_model.pt")


def test_a_network_without_scores_is_named(tmp_path, monkeypatch):
    (tmp_path / "best_model.pt").write_bytes((ROOT / "best_model.pt").read_bytes())
    monkeypatch.setattr(cards, "ROOT", tmp_path)
    with pytest.raises(UserError, match=r"best_model\.pt: has no scores\.json"):
        cards.card("best_model.pt")
