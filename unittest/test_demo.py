"""The page in a real browser: photographs are classified, classes are learned, bad files get a sentence, nothing leaves."""

import os
import shutil
import signal
import subprocess
import sys

import pytest
import torch
from PIL import Image

import demo
from config import ROOT, UserError
from transfer.last_layer import TransferSettings


@pytest.fixture(scope="module")
def photographs(train_data, tmp_path_factory):
    """Five photographs of each of two classes, trousers and bags; a file that is no image; an image of 54 megapixels."""
    folder = tmp_path_factory.mktemp("photographs")
    paths = {}
    for name, label in (("trouser", 1), ("bag", 8)):
        chosen = train_data[0][torch.nonzero(train_data[1] == label).flatten()[:5]]
        paths[name] = demo.save_examples(chosen, folder, name)
    (folder / "broken.jpg").write_text("no image")
    Image.new("1", (9_000, 6_000)).save(folder / "huge.png")
    return paths | {"broken": str(folder / "broken.jpg"), "huge": str(folder / "huge.png")}


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """The script's process, the page's address, and the folder for temporary files."""
    pytest.importorskip("gradio")
    folder = tmp_path_factory.mktemp("tmp")
    environment = {**os.environ, "TMPDIR": str(folder)}
    command = [sys.executable, str(ROOT / "demo.py")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, cwd=folder, env=environment, text=True) as process:
        yield process, process.stdout.readline().split()[1], folder
        process.kill()


@pytest.fixture(scope="module")
def page(server):
    """A tab with the page, and a list of the addresses that it requests."""
    playwright = pytest.importorskip("playwright.sync_api")
    chromium = shutil.which("chromium") or pytest.skip("there is no chromium")
    with playwright.sync_playwright() as driver:
        tab = driver.chromium.launch(executable_path=chromium, args=["--no-sandbox"]).new_page()
        tab.set_default_timeout(30_000)
        tab.requested = []
        tab.on("request", lambda request: tab.requested.append(request.url))
        tab.goto(server[1])
        yield tab


def inputs(page):
    return page.get_by_role("tabpanel").filter(visible=True).get_by_test_id("file-upload")


def test_a_photograph_is_classified(page, photographs):
    inputs(page).set_input_files(photographs["trouser"][0])
    page.get_by_test_id("label-output-value").filter(has_text="Trouser").wait_for()
    page.get_by_test_id("label-output-value").filter(has_text="clothes").wait_for()
    assert page.get_by_test_id("label-output-value").count() == 2


@pytest.mark.parametrize("name, sentence", [("broken", "broken.jpg: is no readable image"), ("huge", "huge.png: 9000 x 6000")])
def test_a_bad_file_gets_a_sentence_in_place_of_an_answer(name, sentence, page, photographs):
    inputs(page).set_input_files(photographs[name])
    page.get_by_role("status").filter(has_text=sentence).wait_for()
    assert page.get_by_test_id("label-output-value").count() == 0


def test_classes_are_learned_and_tried(page, photographs):
    page.get_by_role("tab", name="Teach").click()
    for number, (name, label) in enumerate((("trousers <b>", "trouser"), ("bags", "bag"))):
        page.get_by_label(f"Name of class {number + 1}").fill(name)
        inputs(page).nth(number).set_input_files(photographs[label][:4])
        page.get_by_role("button", name="Thumbnail").nth(4 * number + 3).wait_for()
    page.get_by_role("button", name="Learn").click()
    page.get_by_role("status").filter(has_text="Learned: trousers <b> or bags").wait_for()
    inputs(page).last.set_input_files(photographs["bag"][4])
    page.get_by_test_id("label-output-value").filter(has_text="bags").wait_for()


def test_nothing_is_requested_from_other_hosts(server, page):
    own = tuple(f"{scheme}{server[1].partition('//')[2]}" for scheme in ("http://", "ws://", "blob:http://"))
    assert len(page.requested) > 20
    assert not [address for address in page.requested if not address.startswith((*own, "data:"))]


def test_pictures_are_deleted_when_the_script_ends(server, page):
    process, _, folder = server
    assert list(folder.rglob("broken.jpg"))
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 143 and not list(folder.iterdir())


@pytest.mark.parametrize(
    "names, counts, sentence",
    [
        (["a", ""], [2, 0], "two or more classes"),
        (["a", "A"], [2, 2], "a name of its own"),
        (["a", " b "], [2, 1], "^b: "),
        (["a", ""], [2, 2], "a class without a name"),
    ],
)
def test_classes_that_cannot_be_learned_are_refused(names, counts, sentence, photographs):
    files = [photographs["bag"][:count] for count in counts]
    with pytest.raises(UserError, match=sentence):
        demo.learn(None, TransferSettings(), names, files)


def test_without_gradio_the_error_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "gradio", None)
    monkeypatch.setattr(os, "environ", os.environ.copy())
    with pytest.raises(UserError, match="no package gradio; pip install -r requirements-extra"):
        demo.Page(demo.DemoSettings(), tmp_path)
