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
from halfbyte.heap import mapped, release_freed_memory, reuse_freed_memory

def resident():
    with open("/proc/self/statm") as f:
        return int(f.read().split()[1]) * 4096 / 2**20

reuse_freed_memory()
if sys.argv[1] == "mapped":
    with mapped():
        kept = [torch.ones(1 << 20) for _ in range(64)]
else:
    kept = [torch.ones(1 << 20) for _ in range(64)]
before = resident()
del kept[::2]
print(before - resident())
if sys.argv[1] == "released":
    release_freed_memory()
    print(before - resident())
"""


def freed_mib(how: str, **environment: str) -> list[float]:
    variables = {k: v for k, v in os.environ.items() if not k.startswith("MALLOC_")} | environment
    done = subprocess.run([sys.executable, "-c", CODE, how], capture_output=True, text=True, env=variables, check=True)
    return [float(line) for line in done.stdout.split()]


@pytest.mark.skipif(heap._glibc() is None, reason="the C library is not glibc")
def test_what_is_freed_stays_until_it_is_released() -> None:
    kept, released = freed_mib("released")
    assert kept < 8
    assert released > 120  # 32 tensors of 4 MiB, each between two that live


@pytest.mark.skipif(heap._glibc() is None, reason="the C library is not glibc")
def test_what_is_mapped_goes_back_when_freed() -> None:
    assert freed_mib("mapped")[0] > 120


@pytest.mark.skipif(heap._glibc() is None, reason="the C library is not glibc")
def test_thresholds_of_the_users_own_stay() -> None:
    threshold = str(32 << 20)
    assert freed_mib("mapped", MALLOC_MMAP_THRESHOLD_=threshold, MALLOC_TRIM_THRESHOLD_=threshold)[0] < 60


def test_huge_pages_are_asked_for_unless_the_user_said_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("THP_MEM_ALLOC_ENABLE", raising=False)
    heap.prefer_huge_pages()
    assert os.environ["THP_MEM_ALLOC_ENABLE"] == "1"
    monkeypatch.setenv("THP_MEM_ALLOC_ENABLE", "0")
    heap.prefer_huge_pages()
    assert os.environ["THP_MEM_ALLOC_ENABLE"] == "0"


def test_without_glibc_nothing_happens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heap, "_glibc", lambda: None)
    heap.reuse_freed_memory()
    with heap.mapped():
        heap.release_freed_memory()
