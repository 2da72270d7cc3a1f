"""The walls of the sandbox, each tried by a program that wants through; and HumanEval, which wants nothing bad."""

import gzip
import json
import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest

from selfimprove import sandbox
from selfimprove.errors import UserError
from selfimprove.sandbox import Job, Limits, Outcome, syscalls
from tests.paths import ROOT, SHARED

HUMANEVAL = SHARED / "data" / "humaneval" / "HumanEval.jsonl.gz"
SYSTEM_PYTHON = Path("/usr/bin/python3")

try:
    sandbox.check()
except UserError as refused:
    pytestmark = pytest.mark.skip(reason=f"{refused.message}: {refused.hint}")


def _run(code: str, tests: str = "assert True", **limits: float) -> Outcome:
    return sandbox.run(Job(code, tests), Limits(**{"seconds": 20.0, **limits}))


def _alive(mark: str) -> list[int]:
    """Processes of the host that bear this name."""
    found = []
    for process in psutil.process_iter(["name", "status"]):
        if process.info["name"] == mark and process.info["status"] != psutil.STATUS_ZOMBIE:
            found.append(process.pid)
    return found


def _named(mark: str) -> str:
    return f"import ctypes, os, time; ctypes.CDLL(None).prctl(15, b'{mark}')\n"


def _gone(mark: str) -> bool:
    deadline = time.monotonic() + 5
    while _alive(mark) and time.monotonic() < deadline:
        time.sleep(0.02)
    return not _alive(mark)


# what passes and what does not


@pytest.mark.parametrize(
    ("code", "tests", "passed", "reason"),
    [
        ("def f(x): return x + 1", "assert f(1) == 2", True, "ok"),
        ("def f(x): return x", "assert f(1) == 2", False, "assertion failed: assert f(1) == 2"),
        ("def f(x): return x", "assert f(1) == 2, 'one more'", False, "assertion failed: one more"),
        ("def f(x: return x", "assert f(1) == 2", False, "SyntaxError"),
        ("def f(x): return g(x)", "assert f(1) == 2", False, "NameError: name 'g' is not defined"),
        ("def f(x): return f(x)", "f(1)", False, "RecursionError"),
        ("x = '\ud800'", "assert x", False, "UnicodeEncodeError"),
        ("print('\\ud800')", "assert True", False, "UnicodeEncodeError"),
        ("import sys; sys.stdout.buffer.write(b'\\xff\\x00')", "assert True", True, "ok"),
        ("f = 'café 日本 🎉'", "assert len(f) == 9", True, "ok"),
        ("x = 1", "assert (", None, "the tests cannot be run: '(' was never closed"),
        ("x = 1", "def helper(): assert False", None, "the tests cannot be run: they call nothing"),
        ("x = 1", "def test_x(capsys): assert False", None, "the tests cannot be run: nobody gives test_x"),
        (
            "def f(): return 1",
            "def test_f(): assert f() == 2",
            False,
            "assertion failed: def test_f(): assert f() == 2",
        ),
        ("def f(): return 1", "async def test_f(): assert f() == 2", False, "assertion failed"),
        ("def test_f(): pass", "def test_f(): assert 0, 'mine'", False, "assertion failed: mine"),
        (
            "def f(): return 1",
            "import unittest\nclass T(unittest.TestCase):\n  def test(self): self.assertEqual(f(), 2)",
            False,
            "assertion failed: 1 != 2",
        ),
        (
            "def f(): return 1",
            "from unittest import TestCase\nclass T(TestCase):\n  def test(self): self.assertEqual(f(), 1)",
            True,
            "ok",
        ),
        ("class P:\n  pass", "import pickle; from solution import P\npickle.loads(pickle.dumps(P()))", True, "ok"),
        ("import numpy", "assert numpy.arange(3).sum() == 3", True, "ok"),
    ],
)
def test_code_is_judged_by_its_tests(code, tests, passed, reason):
    found = _run(code, tests)
    assert (found.passed, found.reason[: len(reason)]) == (passed, reason), found


@pytest.mark.parametrize(
    "code",
    [
        "raise SystemExit(0)",
        "import os; os._exit(0)",
        "import sys; sys.exit()",
        "import os\nif os.fork(): os._exit(0)",  # the child goes on, and passes
        "import os\nif os.fork(): os.wait(); os._exit(0)",
        "def f(): raise SystemExit(0)",
        "def f():\n  import os; os._exit(0)",
        "import os, signal; os.kill(os.getpid(), signal.SIGKILL)",
        "import builtins; builtins.all = lambda x: True; builtins.len = lambda x: 1\ndef f(): return []",
        "import builtins; builtins.AssertionError = type('Never', (Exception,), {})\ndef f(): return 0",
        "import sys; sys.excepthook = lambda *a: None\ndef f(): return 0",
        "import os\nos.write = lambda *a: 0\nos._exit = lambda *a: None\ndef f(): return 0",
        "import atexit, os; atexit.register(os._exit, 0)\ndef f(): return 0",
        "import sys; print('ok', 'passed', file=sys.stderr)\ndef f(): return 0",
        "def f(): raise KeyboardInterrupt",
        "class E(Exception):\n  def __str__(self): raise self\ndef f(): raise E",
        "import threading, os; threading.Timer(0.01, os._exit, (0,)).start()\ndef f():\n  import time; time.sleep(9)",
    ],
)
def test_an_early_end_or_a_monkeypatch_is_no_pass(code):
    found = _run(code, "value = f()\nassert len([0, 0]) == 2 and all([value])\nassert value == 1")
    assert found.passed is False
    assert found.reason


def test_pouring_every_pipe_into_every_other_does_not_pass_either():
    pour = """
import os
found = []
for end in range(3, 64):
    try: found.append(os.read(end, 64))
    except OSError: pass
for end in range(3, 64):
    for word in found:
        try: os.write(end, word)
        except OSError: pass
print(len(found), flush=True)
os._exit(0)
"""
    found = _run(pour)
    assert found.passed is False
    assert found.output == "1\n"  # it did come upon the word


# the walls

KILL_INIT = """
import os, time
try: os.kill(1, 9)
except PermissionError: pass
time.sleep(0.2)
if os.getppid() == 1: raise ValueError("it still has its parent")
"""


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ("import os\nwhile True: os.fork()", "too many processes"),
        ("import threading, time\nwhile True: threading.Thread(target=time.sleep, args=(99,)).start()", "too many"),
        ("x = bytearray(10 ** 10)", "out of memory"),
        ("x = [0]\nwhile True: x += x", "out of memory"),
        ("import mmap; x = [mmap.mmap(-1, 2 ** 27) for _ in range(9)]", "out of memory"),
        ("open('big', 'wb').write(bytes(100 * 2 ** 20))", "wrote too large a file"),
        ("for i in range(99): open(f'{i}', 'wb').write(bytes(2 ** 20))", "wrote too much to disk"),
        ("for i in range(9999): open(f'{i}', 'w').close()", "wrote too much to disk"),
        ("open('/probe', 'w')", "tried to write outside its directory"),
        ("open('/usr/probe', 'w')", "tried to write outside its directory"),
        ("import os, sys; os.remove(os.__file__)", "tried to write outside its directory"),
        ("import socket; socket.create_connection(('192.0.2.1', 80), 5)", "tried to use the network"),
        ("import urllib.request as u; u.urlopen('http://example.org')", "URLError"),
        ("import socket; socket.socket(40, 1)", "tried to use the network"),  # AF_VSOCK: no namespace holds it
        ("open('/etc/passwd')", "FileNotFoundError"),
        ("open('/proc/self/environ')", "FileNotFoundError"),
        (KILL_INIT, "ValueError: it still has its parent"),
        ("import os; os.setuid(0)", "PermissionError"),
        ("import os; os.chroot('/box')", "PermissionError"),
        ("import os; os.memfd_create('x')", "PermissionError"),
        (
            "import ctypes, os; assert ctypes.CDLL(None).unshare(0x10000000) == 0, 'refused'",
            "assertion failed: refused",
        ),
        (
            "import ctypes; assert ctypes.CDLL(None).shmget(0, 4096, 0o1600) >= 0, 'refused'",
            "assertion failed: refused",
        ),
        ("import ctypes; assert ctypes.CDLL(None).ptrace(16, 1, 0, 0) == 0, 'refused'", "assertion failed: refused"),
        ("import ctypes; ctypes.string_at(0)", "ended early with exit status 139"),
    ],
)
def test_each_wall_holds_and_says_so(code, reason):
    found = _run(code, "assert False, 'it went through'")
    assert found.passed is False
    assert reason in found.reason, found


@pytest.mark.parametrize(
    "code",
    [
        "while True: pass",
        "import time; time.sleep(1000)",
        "import signal, time\nfor s in range(1, 32):\n  try: signal.signal(s, signal.SIG_IGN)\n  except OSError: pass\n"
        "while True: time.sleep(1)",
        "import os\nwhile True:\n  try: os.fork()\n  except OSError: pass",
        "def f(): 9 ** 9 ** 9 ** 9\nf()",
        "while True: print('x' * 1000)",
    ],
)
def test_what_does_not_end_is_ended(code):
    start = time.monotonic()
    assert _run(code, seconds=1.5).reason == "timeout after 1.5 s"
    assert time.monotonic() - start < 8


def test_the_memory_of_all_processes_counts():
    eight = "import os\nfor _ in range(3): os.fork()\nx = bytearray(200 * 2 ** 20)\nimport time; time.sleep(30)"
    assert _run(eight, memory_mib=512).reason == "out of memory"


def test_a_gigabyte_of_output_is_read_and_forgotten():
    found = _run("for _ in range(1024): print('x' * (2 ** 20 - 1))")
    assert found.passed
    assert found.output == "x" * 65536


@pytest.mark.parametrize(
    "leave",
    [
        "if not os.fork(): time.sleep(1000)",
        "if not os.fork():\n  os.setsid()\n  if not os.fork(): time.sleep(1000)\n  os._exit(0)",  # a daemon
        "if not os.fork(): os._exit(0)",  # a zombie
        "import signal\nif not os.fork():\n  for s in range(1, 32):\n    try: signal.signal(s, signal.SIG_IGN)\n"
        "    except OSError: pass\n  time.sleep(1000)",
    ],
)
def test_no_process_outlives_the_program(leave):
    mark = f"left{os.getpid()}"
    found = _run(_named(mark) + leave + "\ntime.sleep(0.1)")
    assert found.passed, found
    assert not _alive(mark)


def test_no_process_outlives_a_driver_that_is_killed(tmp_path):
    mark = f"orphan{os.getpid()}"
    program = _named(mark) + "os.fork(); time.sleep(1000)"
    driver = f"from selfimprove import sandbox as s; s._run(s.Job({program!r}, 'assert 1'), s.Limits(seconds=60.0))"
    process = subprocess.Popen([sys.executable, "-c", driver], cwd=ROOT)
    deadline = time.monotonic() + 30
    while len(_alive(mark)) < 2 and time.monotonic() < deadline:
        time.sleep(0.02)
    assert len(_alive(mark)) == 2  # so that what is looked for can be seen
    process.kill()
    process.wait()
    assert _gone(mark)


def test_a_server_on_this_machine_is_out_of_reach():
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.2)
        host, port = server.getsockname()
        with socket.create_connection((host, port)):  # from here it can be reached
            server.accept()[0].close()
        found = _run(f"import socket; socket.create_connection(('{host}', {port}), 5)")
        assert found.reason.startswith("tried to use the network")
        with pytest.raises(TimeoutError):
            server.accept()


def test_a_socket_of_the_host_is_out_of_reach_by_its_abstract_name():
    name = f"\0walls{os.getpid()}"
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(name)
        server.listen()
        found = _run(f"import socket; s = socket.socket(socket.AF_UNIX); s.connect({name!r})")
    assert found.reason.startswith("ConnectionRefusedError")


def test_nothing_of_ours_is_seen(monkeypatch, tmp_path):
    monkeypatch.setenv("WALLS_API_KEY", "swordfish")
    (tmp_path / "secret").write_text("swordfish", encoding="utf-8")
    with open(tmp_path / "secret") as ours:
        os.set_inheritable(ours.fileno(), True)
        look = f"""
import os
print(dict(os.environ), os.getppid(), os.listdir('/'), os.listdir('.'), os.getcwd(), os.getuid())
for end in range(3, 256):
    try: print(end, os.read(end, 100))
    except OSError: pass
for path in ({str(tmp_path)!r}, '/home', '/root/.ssh', '/sys', '/var', '/proc', {str(ROOT)!r} + '/tests', '/dev/shm'):
    if os.path.exists(path): print('SEES', path)
"""
        found = _run(look)
    assert "swordfish" not in found.output
    assert "SEES" not in found.output
    assert " 1 [" in found.output  # its parent is the first process
    assert " [] /box 1000" in found.output


def test_what_is_written_is_gone_the_next_time(tmp_path):
    written = "import tempfile; open('a', 'w').write('b'); open(tempfile.mktemp(), 'w').write('d')"
    assert _run(f"{written}; assert tempfile.gettempdir() == '/box'").passed
    assert _run("import os; assert os.listdir('.') == []").passed
    assert not Path("/box").exists()


def test_many_run_at_once_in_order():
    jobs = [Job(f"x = {i}", f"assert x == {i} and x % 3") for i in range(12)]
    assert [found.passed for found in sandbox.run_all(jobs)] == [i % 3 != 0 for i in range(12)]
    assert sandbox.run_all([]) == []


def test_it_runs_from_any_thread():
    found: list[Outcome] = []
    thread = threading.Thread(target=lambda: found.append(_run("x = 1")))
    thread.start()
    thread.join()
    assert found[0].passed


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become an ordinary user")
@pytest.mark.skipif(not SYSTEM_PYTHON.exists(), reason="an ordinary user cannot read this interpreter")
def test_an_ordinary_user_has_the_same_walls():
    script = f"""
import sys; sys.path.insert(0, {str(ROOT)!r}); sys.dont_write_bytecode = True
from selfimprove import sandbox
sandbox.check()
for code in ("x = 1", "import os\\nwhile True: os.fork()", "x = bytearray(10 ** 10)", "open('/usr/x', 'w')"):
    print(sandbox.run(sandbox.Job(code, "assert True")).reason)
"""
    user = {"user": 65533, "group": 65533, "extra_groups": []}
    done = subprocess.run([SYSTEM_PYTHON, "-c", script], cwd="/", capture_output=True, text=True, **user)
    reasons = [line.split(":")[0] for line in done.stdout.splitlines()]
    assert reasons == ["ok", "too many processes", "out of memory", "tried to write outside its directory"], done


# refusals


def test_without_walls_nothing_runs(monkeypatch, tmp_path):
    """A jail whose new namespaces are refused, as in a container, runs no line of the program."""
    broken = (sandbox.HERE / "jail.py").read_text(encoding="utf-8").replace("libc.unshare(", "libc.unshare(1 | ")
    (tmp_path / "jail.py").write_text(broken, encoding="utf-8")
    (tmp_path / "harness.py").write_text("raise SystemExit('it ran')", encoding="utf-8")
    monkeypatch.setattr(sandbox, "HERE", tmp_path)
    with pytest.raises(UserError, match="the code sandbox does not work here") as caught:
        sandbox.check.__wrapped__()
    assert "unshare" in caught.value.message
    assert "it ran" not in caught.value.message
    assert "user.max_user_namespaces" in caught.value.hint
    assert sandbox._run(Job("", ""), Limits()).passed is None


@pytest.mark.parametrize(("wall", "without"), [("0x40000000", "0"), ('"NPROC": limits["processes"]', '"NPROC": 999')])
def test_a_missing_wall_is_found_before_anything_runs(monkeypatch, tmp_path, wall, without):
    text = (sandbox.HERE / "jail.py").read_text(encoding="utf-8")
    assert wall in text
    (tmp_path / "jail.py").write_text(text.replace(wall, without), encoding="utf-8")
    (tmp_path / "harness.py").write_text((sandbox.HERE / "harness.py").read_text(encoding="utf-8"), encoding="utf-8")
    monkeypatch.setattr(sandbox, "HERE", tmp_path)
    with pytest.raises(UserError, match=r"it has a network|it can make too many processes"):
        sandbox.check.__wrapped__()


def test_other_systems_are_refused(monkeypatch):
    monkeypatch.setattr(sandbox.platform, "system", lambda: "Darwin")
    with pytest.raises(UserError, match="does not run on Darwin"):
        sandbox.check.__wrapped__()


@pytest.mark.parametrize("machine", syscalls.MACHINES)
def test_every_jump_of_the_filter_lands_inside_it(machine):
    rules = syscalls.bpf(machine)
    steps = [(rules[at + 2], rules[at + 3], rules[at]) for at in range(0, len(rules), 8)]
    assert all(i + 1 + max(yes, no) < len(steps) for i, (yes, no, code) in enumerate(steps) if code != 0x06)
    assert steps[-1][2] == 0x06


# HumanEval


def _problems() -> list[dict[str, str]]:
    with gzip.open(HUMANEVAL, "rt", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def _jobs(problems: list[dict[str, str]], body: str | None = None) -> list[Job]:
    return [
        Job(p["prompt"] + (body or p["canonical_solution"]), f"{p['test']}\ncheck({p['entry_point']})")
        for p in problems
    ]


@pytest.mark.skipif(not HUMANEVAL.exists(), reason="../shared/data/humaneval is not here")
def test_the_canonical_solutions_of_humaneval_pass_and_mutated_ones_fail():
    problems = _problems()
    assert len(problems) == 164
    found = sandbox.run_all(_jobs(problems), Limits(seconds=30.0))
    assert {p["task_id"]: f.reason for p, f in zip(problems, found, strict=True) if not f.passed} == {}
    wrong = sandbox.run_all(_jobs(problems, "    return 'mutated'\n"), Limits(seconds=30.0))
    assert {p["task_id"]: f.reason for p, f in zip(problems, wrong, strict=True) if f.passed is not False} == {}
