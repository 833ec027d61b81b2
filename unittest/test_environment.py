"""Faults of the environment: file locks, standard output, pictures, paths, a replaced file in use, a read-only checkout."""

import errno
import fcntl
import hashlib
import io
import os
import re
import signal
import subprocess
import sys
import warnings

import matplotlib
import numpy as np
import pytest

import checkpoint
import distributed
import idx
import interrupts
import plots
import predict
from config import ROOT, UserError

PNG = b"\x89PNG"


def failing(error):
    def call(*_):
        raise OSError(error, os.strerror(error))

    return call


@pytest.mark.parametrize("error", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_a_warning(error, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(fcntl, "flock", failing(error))
    with interrupts.lock_folder(tmp_path):
        pass
    assert capsys.readouterr().err.count("can't be locked here") == 1


@pytest.mark.parametrize("error", [errno.EAGAIN, errno.EACCES])
def test_a_lock_that_is_held_means_another_run(error, tmp_path, monkeypatch):
    monkeypatch.setattr(fcntl, "flock", failing(error))
    with pytest.raises(UserError, match="another run is writing there"), interrupts.lock_folder(tmp_path):
        pass


def test_a_folder_whose_name_is_not_unicode_is_locked(tmp_path):
    folder = tmp_path / os.fsdecode(b"a\xff")
    with interrupts.lock_folder(folder), pytest.raises(UserError, match="another run"), interrupts.lock_folder(folder):
        pass


def test_a_users_matplotlib_settings_do_not_reach_the_pictures(tmp_path):
    drawn = []
    for name, settings in (("plain", {}), ("changed", {"text.usetex": True, "font.size": 40, "axes.facecolor": "red"})):
        with matplotlib.rc_context(settings):
            plots.draw_confusion(np.array([[5, 1], [0, 4]]), ["clothes", "shoe"], tmp_path / f"{name}.png")
        drawn.append((tmp_path / f"{name}.png").read_bytes())
    assert drawn[0] == drawn[1] and drawn[0].startswith(PNG)


def test_characters_that_the_font_lacks_print_no_warning(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plots.draw_sheet(np.zeros((1, 28, 28), np.uint8), ["鞋"], 1, "鞋", tmp_path / "sheet.png")
    assert (tmp_path / "sheet.png").read_bytes().startswith(PNG)


def test_a_file_that_is_in_use_for_a_moment_is_replaced(tmp_path, monkeypatch):
    replace, refusals = os.replace, [1, 2, 3]

    def refusing(*paths):
        if refusals:
            refusals.pop()
            raise PermissionError(errno.EACCES, "in use")
        replace(*paths)

    monkeypatch.setattr(os, "replace", refusing)
    monkeypatch.setattr(checkpoint.time, "sleep", lambda _: None)
    checkpoint.write_atomically(tmp_path / "file", b"new")
    assert (tmp_path / "file").read_bytes() == b"new" and not refusals


def test_a_file_that_stays_in_use_is_an_error_in_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "replace", failing(errno.EACCES))
    monkeypatch.setattr(checkpoint.time, "sleep", lambda _: None)
    with pytest.raises(UserError, match=r"file: can't be written \(Permission denied\)"):
        checkpoint.write_atomically(tmp_path / "file", b"new")
    assert not list(tmp_path.iterdir())


def test_a_signal_ends_only_the_run_that_it_came_to():
    with pytest.raises(interrupts.Interrupted), interrupts.deferred():
        os.kill(os.getpid(), signal.SIGINT)
        interrupts.check()
    interrupts.check()


def test_the_resume_command_is_quoted_for_the_system(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train.py"])
    words = ["out_dir=my runs"]
    assert interrupts.resume_command(words, True) == "python train.py 'out_dir=my runs' resume=true"
    with monkeypatch.context() as patch:
        patch.setattr(os, "name", "nt")
        command = interrupts.resume_command(words, True)
    assert command == 'python train.py "out_dir=my runs" resume=true'


SCRIPT = """
import pathlib, sys
sys.path.insert(0, {root!r})
from script import run_script
def main(arguments):
    print("begins", flush=True)
    print("ends")
    pathlib.Path("done").touch()
run_script(main)
"""


@pytest.mark.parametrize("redirection, lines", [(">&-", 0), (">/dev/full", 1), (">&- 2>&-", 0)])
def test_without_standard_output_the_work_is_done(redirection, lines, tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT.format(root=str(ROOT)))
    command = f"{sys.executable} script.py {redirection}"
    ended = subprocess.run(command, shell=True, cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    assert ended.returncode == 0 and (tmp_path / "done").exists()
    assert ended.stderr.count("\n") == lines


def test_other_processes_print_names_that_are_not_unicode(monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "job")
    monkeypatch.setattr(distributed.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(distributed, "rank", lambda: 1)
    monkeypatch.setattr(sys, "stdout", shown := io.StringIO())
    distributed.init(distributed.torch.device("cpu"))
    print("\udcff é")
    assert shown.getvalue() == ""


def test_a_data_file_is_written_under_a_name_of_this_process_first(tmp_path, monkeypatch):
    (tmp_path / "fetched").mkdir()
    (tmp_path / "fetched" / "file").write_bytes(b"contents")
    monkeypatch.setattr(idx, "IDX_FILES", {"file": ((100,), hashlib.sha256(b"contents").hexdigest())})
    replace, parts = os.replace, []
    monkeypatch.setattr(idx.os, "replace", lambda part, path: parts.append(part.name) or replace(part, path))
    idx._keep(tmp_path / "fetched", tmp_path)
    assert len(parts) == 1 and str(os.getpid()) in parts[0] and (tmp_path / "file").read_bytes() == b"contents"


def test_a_file_with_an_equals_sign_in_its_name_is_an_image(tmp_path, monkeypatch):
    (tmp_path / "k=v.png").touch()
    monkeypatch.chdir(tmp_path)
    assert not predict.is_setting("k=v.png") and predict.is_setting("index=3") and predict.is_setting("nonsense=3")


def test_every_script_finds_its_modules_by_itself():
    scripts = [path for pattern in ("*.py", "*/*.py") for path in ROOT.glob(pattern) if '"__main__"' in path.read_text()]
    scripts = [path for path in scripts if path.parent.name != "unittest"]
    modules = "|".join([*(path.stem for path in ROOT.glob("*.py")), "gan", "tools", "transfer"])
    assert len(scripts) > 10
    for path in scripts:
        text = path.read_text()
        first = re.search(rf"^(from|import) ({modules})\b", text, re.MULTILINE)
        assert text.index("sys.path.insert(0") < first.start(), path
