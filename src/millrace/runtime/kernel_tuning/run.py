"""Measures the sections of a model on this GPU, and writes their table."""

from __future__ import annotations

import argparse
import time

import torch
import triton

from millrace.common.optional import probe
from millrace.errors import ConfigError
from millrace.hardware.nvml import Nvml
from millrace.kernels.gpu import tables
from millrace.kernels.gpu.gemm import clusters, prebuild
from millrace.kernels.gpu.gemm.choice import GemmBackend
from millrace.kernels.gpu.gemm.clusters import Tiling
from millrace.model_lookup import find_model
from millrace.runtime.kernel_tuning.choice import Meter, Section, lines_of
from millrace.runtime.kernel_tuning.meters import by_energy, by_time
from millrace.runtime.kernel_tuning.model import Request, sections_of
from millrace.runtime.kernel_tuning.products import TILINGS, Fp8Libraries
from millrace.version import __version__

COMPILE_LIMIT = 900.0  # seconds


def run(options: argparse.Namespace) -> None:
    """Measure section by section; each is in the file as soon as it is known."""
    device = torch.cuda.get_device_name()
    path = options.out or tables.own_path(device)
    widths = tuple(sorted({1, options.drafts + 1}))
    request = Request(options.ranks, widths, options.cached, options.page, options.tokens)
    sections = sections_of(find_model(options.model), request)
    meter = _meter(options.by)
    for section in wanted(sections, options.sections, device):
        _compile(section)
        for shape in section.shapes():
            lines = lines_of(section, shape, meter)
            tables.write(path, _facts(device, options.by), {section.name: {shape: lines}})
    print(path)


def wanted(sections: list[Section], names: list[str], device: str) -> list[Section]:
    """Those that are named, or all. Raises ConfigError if there are none."""
    known = [section.name for section in sections]
    missing = [name for name in names if name not in known]
    if missing or not known:
        raise ConfigError(
            f"--sections {','.join(missing)}: this model has on {device}: {', '.join(known)}"
            if known
            else f"this model has nothing to choose on {device}"
        )
    return [section for section in sections if not names or section.name in names]


def _meter(by: str) -> Meter:
    if by == "time":
        return by_time()
    nvml = Nvml()
    uuid = str(torch.cuda.get_device_properties().uuid)
    mine = [one for one in nvml.devices if one.gpu_uuid.endswith(uuid)]
    return by_energy(lambda: nvml.sample(mine[0]).get("energy_joules") if mine else None)


def _facts(device: str, by: str) -> dict[str, str]:
    """What a choice may depend on, and when it was made."""
    return {
        "device": device,
        "by": by,
        "millrace": __version__,
        "torch": torch.__version__,
        "triton": triton.__version__,
        "deep_gemm": probe("deep_gemm").version or "absent",
        "measured": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def _compile(section: Section) -> None:
    """Have what takes seconds a kernel compiled by many processes."""
    if not isinstance(section, Fp8Libraries) or probe("deep_gemm").module is None:
        return
    clusters.prepare(Tiling.parse(text) for text in TILINGS)
    products = [
        prebuild.Product(shape[0], shape[1], size, way.multiprocessors)
        for shape in section.shapes()
        for size in section.sizes(shape)
        for way in map(GemmBackend.parse, map(str, section.ways(shape, size)))
        if way.library == "deep_gemm" and not way.tiling
    ]
    children = prebuild.on_this_gpu(products)
    if children is not None:
        try:
            children.finish(COMPILE_LIMIT)
        finally:
            children.close()
