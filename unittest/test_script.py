"""Running a script: errors, exit codes, and the end of its process."""

import os
import pstats
import re
import subprocess
import sys
from pathlib import Path

import pytest

from config import ROOT, RunSettings, UserError
from interrupts import Interrupted
from script import import_extra, load_settings, run_script

SCRIPT = f"""
import atexit, sys, threading, time
sys.path.insert(0, {str(ROOT)!r})
from script import run_script

def main(arguments):
    atexit.register(print, "atexit handler")
    if "thread" in arguments:
        threading.Thread(target=lambda: (time.sleep(0.1), print("thread"))).start()
    if "trace" in arguments:
        sys.settrace(lambda *_: None)
    if "long" in arguments:
        print("line\\n" * 100_000)
    print("main")

if __name__ == "__main__":
    run_script(main)
    print("host")
"""


@pytest.fixture(scope="module")
def script(tmp_path_factory):
    path = tmp_path_factory.mktemp("script") / "trivial.py"
    path.write_text(SCRIPT)
    return path


def output_of(*words):
    buffered = {key: value for key, value in os.environ.items() if key != "PYTHONUNBUFFERED"}
    ended = subprocess.run([sys.executable, *map(str, words)], capture_output=True, text=True, env=buffered)
    assert (ended.returncode, ended.stderr) == (0, "")
    return ended.stdout.splitlines()


def test_atexit_handlers_run_and_their_output_is_flushed(script):
    assert output_of(script) == ["main", "atexit handler"]


def test_a_thread_is_not_cut_off(script):
    assert output_of(script, "thread") == ["main", "host", "thread", "atexit handler"]


def test_a_tracer_lives_on(script):
    assert output_of(script, "trace") == ["main", "host", "atexit handler"]


def test_a_profiler_writes_its_profile(script, tmp_path):
    output_of("-m", "cProfile", "-o", tmp_path / "profile", script)
    assert any(name == "main" for _, _, name in pstats.Stats(str(tmp_path / "profile")).stats)


def test_a_caller_lives_on(script):
    code = f"import runpy; runpy.run_path({str(script)!r}, run_name='__main__'); print('caller')"
    assert output_of("-c", code) == ["main", "host", "caller", "atexit handler"]


def test_a_closed_pipe_ends_the_script_quietly_with_its_own_exit_code(script):
    command = [sys.executable, script, "long"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        process.stdout.readline()
        process.stdout.close()
        errors = process.stderr.read()
    assert (process.returncode, errors) == (141, "")


def test_a_user_error_is_one_line_on_stderr_and_exit_code_2(capsys):
    with pytest.raises(SystemExit) as ended:
        run_script(lambda words: load_settings(words, RunSettings), ["nonsense=1"])
    captured = capsys.readouterr()
    assert ended.value.code == 2 and captured.out == "" and captured.err.count("\n") == 1


def test_a_name_that_the_file_system_refuses_is_one_line_on_stderr_and_exit_code_2(capsys):
    with pytest.raises(SystemExit) as ended:
        run_script(lambda _: Path("n" * 300).stat(), [])
    assert ended.value.code == 2 and re.fullmatch(r"error: n{300}: File name too long; name another\n", capsys.readouterr().err)


@pytest.mark.parametrize(("error", "code"), [(KeyboardInterrupt(), 130), (Interrupted(2), 130), (Interrupted(15), 143)])
def test_an_interrupt_has_an_exit_code_of_its_own(error, code):
    def main(_):
        raise error

    with pytest.raises(SystemExit) as ended:
        run_script(main, [])
    assert ended.value.code == code


def test_a_users_error_ends_a_real_script_with_code_2_and_one_line(tmp_path):
    command = [sys.executable, str(ROOT / "predict.py"), f"out_dir={tmp_path}"]
    environment = {**os.environ, "DISPLAY": "", "MPLBACKEND": "none"}  # it is not installed: plots.py chooses another
    ended = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=environment)
    assert ended.returncode == 2 and ended.stderr.count("\n") == 1 and "best_model.pt" in ended.stderr


def test_a_missing_package_of_the_extras_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(UserError, match=r"no package onnxruntime; pip install -r requirements-extra\.txt"):
        import_extra("onnxruntime")
