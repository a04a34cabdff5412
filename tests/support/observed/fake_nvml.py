"""A libnvidia-ml.so.1 in C whose answers a test chooses, so that NVIDIA's own bindings are what
reads them.

Loaded once in a process by its path; because of its SONAME the bindings' later dlopen finds it.
"""

from __future__ import annotations

import ctypes
import functools
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

SOURCE = r"""
#include <string.h>
typedef void *dev;
enum { OK = 0, NOT_SUPPORTED = 3, NOT_FOUND = 6 };
/* What a test sets. kind: 0 a data centre's GPU, 1 GB10, 2 a GPU in two instances. */
int fake_kind = 0, fake_count = 2, fake_power = 500000, fake_utilization = 90;
unsigned long long fake_energy = 1000000;
static int id(dev d) { return (int)(long)d - 1; }
int nvmlInit_v2(void) { return OK; }
int nvmlInitWithFlags(unsigned f) { return OK; }
int nvmlShutdown(void) { return OK; }
int nvmlDeviceGetCount_v2(unsigned *n) { *n = fake_count; return OK; }
int nvmlDeviceGetHandleByIndex_v2(unsigned i, dev *d) { *d = (dev)(long)(i + 1); return OK; }
int nvmlDeviceGetName(dev d, char *s, unsigned n) {
  strncpy(s, fake_kind == 1 ? "NVIDIA GB10" : id(d) >= 100 ? "NVIDIA H200 MIG 3g.71gb"
          : "NVIDIA H200", n); return OK; }
int nvmlDeviceGetUUID(dev d, char *s, unsigned n) {
  strncpy(s, id(d) >= 100 ? "MIG-a" : "GPU-0", n); s[4] = '0' + id(d) % 10; s[5] = 0; return OK; }
int nvmlDeviceGetMigMode(dev d, unsigned *now, unsigned *next) {
  if (fake_kind == 1) return NOT_SUPPORTED;
  *now = *next = fake_kind == 2; return OK; }
int nvmlDeviceGetMaxMigDeviceCount(dev d, unsigned *n) { *n = 7; return OK; }
int nvmlDeviceGetMigDeviceHandleByIndex(dev d, unsigned i, dev *m) {
  if (i > 1) return NOT_FOUND;
  *m = (dev)(long)(101 + i); return OK; }
int nvmlDeviceGetPowerUsage(dev d, unsigned *mw) { *mw = fake_power; return OK; }
int nvmlDeviceGetEnforcedPowerLimit(dev d, unsigned *mw) { *mw = 700000; return OK; }
int nvmlDeviceGetTotalEnergyConsumption(dev d, unsigned long long *mj) {
  if (fake_kind == 1) return NOT_SUPPORTED;
  *mj = fake_energy; return OK; }
int nvmlDeviceGetCurrentClocksEventReasons(dev d, unsigned long long *r) { *r = 4; return OK; }
int nvmlDeviceGetTemperature(dev d, int s, unsigned *t) { *t = 60; return OK; }
int nvmlDeviceGetClockInfo(dev d, int t, unsigned *c) { *c = t == 1 ? 1980 : 3201; return OK; }
typedef struct { unsigned gpu, memory; } rates;
int nvmlDeviceGetUtilizationRates(dev d, rates *r) {
  if (id(d) >= 100) return NOT_SUPPORTED;
  r->gpu = fake_utilization; r->memory = 40; return OK; }
typedef struct { unsigned long long total, free, used; } memory;
int nvmlDeviceGetMemoryInfo(dev d, memory *m) {
  if (fake_kind == 1) return NOT_SUPPORTED;
  m->total = 150000000000ull; m->used = 1000000000ull * (1 + id(d) % 100);
  m->free = m->total - m->used; return OK; }
"""
KINDS = {"h200": 0, "gb10": 1, "mig": 2}


@functools.cache
def library() -> ctypes.CDLL:
    """The fake, loaded. Raises OSError without a C compiler, or where the real one is loaded."""
    folder = Path(tempfile.mkdtemp(prefix="fake-nvml-"))
    (folder / "fake.c").write_text(SOURCE)
    target = folder / "libnvidia-ml.so.1"
    command = ["cc", "-shared", "-fPIC", "-w", f"-Wl,-soname,{target.name}", "-o", str(target)]
    subprocess.run([*command, str(folder / "fake.c")], check=True, timeout=60)
    return ctypes.CDLL(str(target), mode=ctypes.RTLD_GLOBAL)


@contextmanager
def fake_nvml(kind: str = "h200", count: int = 1, **numbers: int) -> Iterator[ctypes.CDLL]:
    """A driver with so many GPUs of a kind of KINDS. numbers: power (mW), energy (mJ),
    utilization (%)."""
    fake = library()
    chosen = {"kind": KINDS[kind], "count": count, "power": 500_000, "utilization": 90, **numbers}
    energy = chosen.pop("energy", 1_000_000)
    for name, value in chosen.items():
        ctypes.c_int.in_dll(fake, f"fake_{name}").value = value
    ctypes.c_ulonglong.in_dll(fake, "fake_energy").value = energy
    yield fake
    ctypes.c_int.in_dll(fake, "fake_count").value = 0
