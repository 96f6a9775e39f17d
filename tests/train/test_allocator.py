"""Memory that a step frees stays with the process, where the C library is glibc and the user has not set it up."""

import os
import subprocess
import sys

import pytest

from blaq.train import allocator
from blaq.train.allocator import keep_freed_memory

_FAULTS = """
import resource, sys, torch
from blaq.train.allocator import keep_freed_memory
if sys.argv[1] == "kept":
    print(keep_freed_memory())
def faults():
    torch.ones(2**24), torch.ones(2**22)  # 64 and 16 MiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
before = [faults() for _ in range(3)][-1]
print([faults() for _ in range(20)][-1] - before)
"""


@pytest.mark.parametrize("name", ["GLIBC_TUNABLES", "MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_"])
def test_what_the_user_has_set_stays(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "1")
    assert not keep_freed_memory()


def test_other_systems_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(allocator.sys, "platform", "darwin")
    assert not keep_freed_memory()


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="of glibc")
def test_memory_is_not_asked_for_again() -> None:
    """By the pages that the system hands out anew: all in every round (20,480 of 4 KiB, 40 of 2 MiB), or hardly any. Of many
    rounds, for in one of them the heap may still grow, as what was freed between the two has taken their place.
    """
    environment = {key: value for key, value in os.environ.items() if key not in allocator.OF_THE_USER}

    def ended(how: str) -> list[str]:
        command = [sys.executable, "-c", _FAULTS, how]
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout.split()

    kept, faults = ended("kept")
    if kept == "False":
        pytest.skip("the C library is not glibc")
    assert 10 * int(faults) < int(*ended("given back"))
