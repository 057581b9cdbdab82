"""Freed tensors leave the process: measured in a process of its own, because the setting is for good."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from halfbyte import heap

CODE = """
import sys
import torch
from halfbyte.heap import large_tensors_from_the_system

def resident():
    with open("/proc/self/statm") as f:
        return int(f.read().split()[1]) * 4096 / 2**20

if sys.argv[1] == "settled":
    large_tensors_from_the_system()
large = torch.ones(7 << 20)  # 28 MiB; once it is freed, glibc left alone takes all that is smaller from the heap
del large
kept = [torch.ones(1 << 20) for _ in range(64)]
before = resident()
del kept[::2]
print(before - resident())
"""


def freed_mib(how: str, **environment: str) -> float:
    variables = {k: v for k, v in os.environ.items() if not k.startswith("MALLOC_")} | environment
    done = subprocess.run([sys.executable, "-c", CODE, how], capture_output=True, text=True, env=variables, check=True)
    return float(done.stdout)


@pytest.mark.skipif(heap._glibc() is None, reason="the C library is not glibc")
def test_what_is_freed_between_what_is_kept_goes_back() -> None:
    assert freed_mib("settled") > 120  # 32 tensors of 4 MiB
    assert freed_mib("as it is") < 60  # or there would be nothing to settle


@pytest.mark.skipif(heap._glibc() is None, reason="the C library is not glibc")
def test_a_threshold_of_the_users_own_stays() -> None:
    assert freed_mib("settled", MALLOC_MMAP_THRESHOLD_=str(32 << 20)) < 60


def test_huge_pages_are_asked_for_unless_the_user_said_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("THP_MEM_ALLOC_ENABLE", raising=False)
    heap.prefer_huge_pages()
    assert os.environ["THP_MEM_ALLOC_ENABLE"] == "1"
    monkeypatch.setenv("THP_MEM_ALLOC_ENABLE", "0")
    heap.prefer_huge_pages()
    assert os.environ["THP_MEM_ALLOC_ENABLE"] == "0"


def test_without_glibc_nothing_happens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heap, "_glibc", lambda: None)
    heap.large_tensors_from_the_system()
    heap.release_freed_memory()
