"""Checks as real processes: those that pass, crash, hang, come too late, lack something or are refused."""

import time
from pathlib import Path

import pytest
from small_checks import assert_gone, leaves, results, script


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where modules can be written and run by name."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_check_that_passes_leaves_figures_and_the_command_that_repeats_it(folder):
    found = results(leaves("good", {"ms": 1.5, "parts": [{"passed": True}, {"passed": None}]}))["good"]
    assert (found.status, found.reason, found.log) == ("passed", "", ())
    assert found.figures["ms"] == 1.5
    assert found.command == "python -m good"
    assert found.seconds > 0


def test_a_crash_ends_only_its_own_check(folder, monkeypatch):
    monkeypatch.delenv("PYTHONUNBUFFERED", raising=False)
    crash = "import os, signal\nprint('before')\nos.kill(os.getpid(), signal.SIGSEGV)"
    found = results(script("crash", crash), script("raises", "raise KeyError('x')"), script("after", ""))
    assert (found["crash"].status, found["crash"].reason) == ("failed", "ended by SIGSEGV")
    assert found["crash"].log[0] == "before"  # although nobody flushed it
    assert any("Segmentation fault" in line for line in found["crash"].log)
    assert (found["raises"].status, found["raises"].reason) == ("failed", "exit status 1")
    assert found["raises"].log[-1] == "KeyError: 'x'"
    assert not any(str(folder) in line for line in found["raises"].log)
    assert found["after"].status == "passed"


def test_a_check_that_hangs_is_ended_with_all_that_it_started(folder):
    hang = (
        "import pathlib, subprocess, sys, time\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
        "pathlib.Path('child.part').write_text(str(child.pid)); pathlib.Path('child.part').rename('child')\n"
        "print('waiting'); time.sleep(60)"
    )
    started = time.monotonic()
    found = results(script("hang", hang, limit_s=2.0))["hang"]
    assert time.monotonic() - started < 10
    assert (found.status, found.reason, found.log) == ("failed", "ended after 2 s, its limit", ("waiting",))
    assert_gone(int(Path("child").read_text()))


def test_what_begins_too_late_is_skipped_and_the_last_one_gets_what_is_left(folder):
    sleeps = "import time; time.sleep(30)"
    found = results(script("long", sleeps), script("late", ""), limit_s=1.0)
    assert (found["long"].status, found["long"].reason) == ("failed", "ended after 1 s, its limit")
    assert (found["late"].status, found["late"].reason) == ("skipped", "the 1 s of all checks are used up")


def test_what_cannot_run_says_why_and_counts_as_nothing(folder):
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
    assert found["plain"].reason == "no no_such.part, nothing"
    assert found["without"].reason == "needs missing.onnx"
    assert found["next"].reason == "needs broken, which failed"
    assert found["last"].reason == "needs without, which was skipped"


def test_a_refusal_is_a_finding_only_where_it_is_expected(folder):
    refused = "raise SystemExit('error: no kernel for this GPU')"
    found = results(
        script("expected", refused, may_be_refused=True),
        script("not_expected", refused),
        script("other_status", "print('error: no kernel'); raise SystemExit(3)", may_be_refused=True),
        script("dies", "import os; print('error: no kernel'); os.abort()", may_be_refused=True),
    )
    assert [(result.status, result.reason) for result in found.values()] == [
        ("skipped", "no kernel for this GPU"),
        ("failed", "no kernel for this GPU"),
        ("failed", "no kernel"),
        ("failed", "ended by SIGABRT"),
    ]


def test_figures_that_say_no_fail_the_check_and_are_kept(folder):
    wrong = {"correctness": {"int8": {"passed": False, "worst": 3}}, "rows": [{"passed": True}, {"passed": False}]}
    found = results(leaves("wrong", wrong), script("nothing", "", figures=Path("nothing.json")))
    assert (found["wrong"].status, found["wrong"].reason) == ("failed", "not passed: correctness.int8, rows.1")
    assert found["wrong"].figures == wrong
    assert found["nothing"].status == "failed" and found["nothing"].reason.startswith("nothing.json cannot be read")
    Path("half.json").write_text("{")
    half = results(script("half", "", figures=Path("half.json")))["half"]
    assert half.status == "failed" and half.reason.startswith("half.json cannot be read")
    dead = results(script("dead", "import os; os.abort()", figures=Path("half.json")))["dead"]
    assert dead.reason == "ended by SIGABRT"


def test_figures_of_a_check_that_fails_later_are_kept(folder):
    text = "open('some.json', 'w').write('{\"ms\": 2}')\nraise SystemExit('error: cosine too low')"
    found = results(script("some", text, figures=Path("some.json")))["some"]
    assert (found.status, found.reason, found.figures) == ("failed", "cosine too low", {"ms": 2})
