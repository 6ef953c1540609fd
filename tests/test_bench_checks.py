"""Checks run as processes of their own; they may pass, crash, hang, start too late, lack something or be refused."""

import re
import time
from pathlib import Path

import pytest
from small_checks import assert_gone, leaves, results, script


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Work in an empty folder, whose modules a check can run by name."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_check_that_passes_has_figures_and_the_command_that_repeats_it(folder):
    found = results(leaves("good", {"ms": 1.5, "parts": [{"passed": True}, {"passed": None}]}))["good"]
    assert (found.status, found.reason, found.log) == ("passed", "", ())
    assert found.figures["ms"] == 1.5
    assert found.command == "python -m good"
    assert found.seconds > 0


def test_a_crash_ends_only_its_own_check(folder, monkeypatch):
    monkeypatch.delenv("PYTHONUNBUFFERED", raising=False)
    crash = "import os, signal\nprint('before')\nos.kill(os.getpid(), signal.SIGSEGV)"
    found = results(script("crash", crash), script("raises", "raise KeyError('x')"), script("after", ""))
    assert found["crash"].status == "failed" and "SIGSEGV" in found["crash"].reason
    assert found["crash"].log[0] == "before"  # although the check did not flush its output
    assert any("Segmentation fault" in line for line in found["crash"].log)
    assert found["raises"].status == "failed" and "1" in found["raises"].reason
    assert found["raises"].log[-1] == "KeyError: 'x'"
    assert not any(str(folder) in line for line in found["raises"].log)
    assert found["after"].status == "passed"


def test_a_check_that_hangs_is_ended_together_with_its_child_processes(folder):
    hang = (
        "import pathlib, subprocess, sys, time\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
        "pathlib.Path('child.part').write_text(str(child.pid)); pathlib.Path('child.part').rename('child')\n"
        "print('waiting'); time.sleep(60)"
    )
    started = time.monotonic()
    found = results(script("hang", hang, limit_s=2.0))["hang"]
    assert time.monotonic() - started < 10
    assert (found.status, found.log) == ("failed", ("waiting",))
    assert "2 s" in found.reason
    assert_gone(int(Path("child").read_text()))


def test_a_check_gets_only_the_time_that_is_left_and_a_later_one_is_skipped(folder):
    sleeps = "import time; time.sleep(30)"
    found = results(script("long", sleeps), script("late", ""), limit_s=1.0)
    assert found["long"].status == "failed" and "1 s" in found["long"].reason
    assert found["late"].status == "skipped" and "1 s" in found["late"].reason


def test_a_check_that_cannot_run_is_skipped_with_the_reason(folder):
    found = results(
        script("plain", "", packages=("json", "no_such.part", "nothing")),
        script("without", "", files=(Path("missing.onnx"),)),
        script("broken", "raise SystemExit(2)"),
        script("next", "", after=("broken",)),
        script("last", "", after=("without",)),
    )
    assert {name: result.status for name, result in found.items() if name != "broken"} == dict.fromkeys(
        ("plain", "without", "next", "last"), "skipped"
    )
    assert "no_such.part, nothing" in found["plain"].reason and "json" not in found["plain"].reason
    assert "missing.onnx" in found["without"].reason
    assert re.search("broken.*failed", found["next"].reason)
    assert re.search("without.*skipped", found["last"].reason)


def test_a_refusal_is_a_skip_only_where_it_is_expected(folder):
    refused = "raise SystemExit('error: no kernel for this GPU')"
    found = results(
        script("expected", refused, may_be_refused=True),
        script("not_expected", refused),
        script("other_status", "print('error: no kernel'); raise SystemExit(3)", may_be_refused=True),
        script("dies", "import os; print('error: no kernel'); os.abort()", may_be_refused=True),
    )
    assert [result.status for result in found.values()] == ["skipped", "failed", "failed", "failed"]
    assert found["expected"].reason == found["not_expected"].reason == "no kernel for this GPU"
    assert found["other_status"].reason == "no kernel"
    assert "SIGABRT" in found["dies"].reason


def test_figures_that_did_not_pass_fail_the_check_and_are_kept(folder):
    wrong = {"correctness": {"int8": {"passed": False, "worst": 3}}, "rows": [{"passed": True}, {"passed": False}]}
    found = results(leaves("wrong", wrong), script("nothing", "", figures=Path("nothing.json")))
    assert found["wrong"].status == "failed" and "correctness.int8, rows.1" in found["wrong"].reason
    assert found["wrong"].figures == wrong
    assert found["nothing"].status == "failed" and "nothing.json" in found["nothing"].reason
    Path("half.json").write_text("{")
    half = results(script("half", "", figures=Path("half.json")))["half"]
    assert half.status == "failed" and "half.json" in half.reason
    dead = results(script("dead", "import os; os.abort()", figures=Path("half.json")))["dead"]
    assert "SIGABRT" in dead.reason


def test_figures_of_a_check_that_fails_later_are_kept(folder):
    text = "open('some.json', 'w').write('{\"ms\": 2}')\nraise SystemExit('error: cosine too low')"
    found = results(script("some", text, figures=Path("some.json")))["some"]
    assert (found.status, found.reason, found.figures) == ("failed", "cosine too low", {"ms": 2})
