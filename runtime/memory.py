"""Memory of this process and of the machine, from the operating system alone."""

from __future__ import annotations

import sys
from pathlib import Path

if sys.platform == "win32":

    def _peak_working_set() -> int | None:
        """PeakWorkingSetSize of PROCESS_MEMORY_COUNTERS: two 32-bit numbers, then eight of pointer size, it first."""
        import ctypes

        class Counters(ctypes.Structure):
            _fields_ = (("size", ctypes.c_uint32), ("faults", ctypes.c_uint32), ("sizes", ctypes.c_size_t * 8))

        counters = Counters(size=ctypes.sizeof(Counters))
        kernel = ctypes.WinDLL("kernel32")
        kernel.GetCurrentProcess.restype = ctypes.c_void_p
        kernel.K32GetProcessMemoryInfo.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint32)
        read = kernel.K32GetProcessMemoryInfo(kernel.GetCurrentProcess(), ctypes.byref(counters), counters.size)
        return int(counters.sizes[0]) if read else None

    def _free_physical() -> int | None:
        """ullAvailPhys of MEMORYSTATUSEX: two 32-bit numbers, then seven of 64 bits, it second."""
        import ctypes

        class Status(ctypes.Structure):
            _fields_ = (("length", ctypes.c_uint32), ("load", ctypes.c_uint32), ("sizes", ctypes.c_uint64 * 7))

        status = Status(length=ctypes.sizeof(Status))
        read = ctypes.WinDLL("kernel32").GlobalMemoryStatusEx(ctypes.byref(status))
        return int(status.sizes[1]) if read else None


def available_bytes() -> int | None:
    """Memory that a new program could take without swapping; None where the system does not tell."""
    if sys.platform == "win32":
        return _free_physical()
    status = Path("/proc/meminfo")
    lines = status.read_text(encoding="utf-8").splitlines() if status.is_file() else []
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")), None)


def peak_rss_bytes() -> int | None:
    """Largest resident memory of this process so far; None where the system does not tell.

    On Linux not from getrusage: a process starts there with its parent's maximum.
    """
    if sys.platform == "win32":
        return _peak_working_set()
    status = Path("/proc/self/status")
    if status.is_file():
        lines = status.read_text(encoding="utf-8").splitlines()
        return next((1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM:")), None)
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak
