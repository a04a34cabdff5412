"""Hopper machine code: registers that are written while the tensor cores may still read them.

`wgmma` reads an operand from registers after the instruction itself; they are free again when a
wait (WARPGROUP.DEPBAR) says that the product has ended. Compilers have been seen to forget that.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)\s*(.*?);")
NO_RESULT = ("ST", "LDGSTS", "RED", "ATOM", "SYNCS", "BAR", "UT")
WIDTHS = {".128": 4, ".64": 2, ".WIDE": 2}


def disassembled(cubin: bytes) -> list[str]:
    """Its lines, by the disassembler that Triton brings."""
    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(cubin)
        command = [knobs.nvidia.nvdisasm.path, "-c", file.name]
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    return done.stdout.splitlines()


def overwritten_operands(lines: Sequence[str]) -> list[str]:
    """Instructions that write a register which a product under way reads. Each loop goes round once
    more, with the products of the turn before."""
    labels = {line.split(":")[0]: at for at, line in enumerate(lines) if line.startswith(".L_")}
    under_way: list[set[int]] = []  # by group of products, the oldest first
    group, found, taken, at = set[int](), list[str](), set[int](), 0
    while at < len(lines):
        match, at = INSTRUCTION.search(lines[at]), at + 1
        if match is None:
            continue
        name, operands = match.groups()
        if name.startswith("HGMMA"):
            if registers := re.match(r"R\d+, R(\d+), gdesc", operands):
                group |= set(range(int(registers[1]), int(registers[1]) + 4))
            if "gsb0" in operands:
                under_way, group = [*under_way, group], set()
        elif name.startswith("WARPGROUP.DEPBAR"):
            kept = int(re.findall(r"0x(\w+)", operands)[0], 16)
            under_way = under_way[max(0, len(under_way) - kept) :]
        elif name.startswith("BRA"):
            back = labels.get((re.findall(r"\.L_\w+", operands) or [""])[0], at)
            if back < at and at not in taken:
                taken.add(at)
                at = back
        elif any(written(name, operands) & registers for registers in under_way):
            found.append(f"{name} {operands}")
    return found


def written(name: str, operands: str) -> set[int]:
    """The registers that an instruction gives values."""
    first = re.match(r"(?:P\w+, )?R(\d+)\b", operands)
    if first is None or name.startswith(NO_RESULT):
        return set()
    count = next((width for part, width in WIDTHS.items() if part in name), 1)
    return set(range(int(first[1]), int(first[1]) + count))
