"""Dockerfiles of Millrace, for amd64 and arm64: they are built in a checkout.

The CPU image runs the gateway, downloads and benchmarks' clients, and replicas without a GPU. The
CUDA image keeps CUDA's compiler, as kernels are compiled where they run, for that very GPU; the
native CPU library is compiled in the same way, so that both images have a C++ compiler.
"""

from __future__ import annotations

from millrace.deploy.layout.layout import Layout
from millrace.deploy.manifests.parts import USER

TORCH = "2.13.0"
CUDA_BASE = "nvidia/cuda:13.0.1-devel-ubuntu24.04"
CPU_BASE = "python:3.12-slim-bookworm"
_INSTALL = """\
COPY . /src
RUN python3 -m venv /opt/millrace \\
 && /opt/millrace/bin/pip install --no-cache-dir torch=={torch}{index} \\
 && /opt/millrace/bin/pip install --no-cache-dir --no-deps --require-hashes \\
    -r /src/requirements/ship.lock \\
 && /opt/millrace/bin/pip install --no-cache-dir --no-deps /src \\
 && /opt/millrace/bin/pip install --no-cache-dir {extra} \\
 && /opt/millrace/bin/pip check
"""
_RUN = """\
COPY --from=build /opt/millrace /opt/millrace
RUN useradd --uid {user} --user-group --no-create-home millrace \\
 && install -d -o {user} -g {user} /models /cache
ENV PATH=/opt/millrace/bin:$PATH PYTHONUNBUFFERED=1 XDG_CACHE_HOME=/cache HOME=/tmp
USER {user}
ENTRYPOINT []
CMD ["millrace", "--help"]
"""


def dockerfiles(layout: Layout) -> dict[str, str]:
    """Path -> text."""
    found = {"images/Dockerfile.cpu": _cpu(layout)}
    if layout.file.engine == "millrace" and layout.file.has_gpus:
        found["images/Dockerfile.cuda"] = _cuda(layout)
    return found


def build_commands(layout: Layout) -> list[str]:
    """Run in a checkout of Millrace, beside which the files were rendered."""
    names = {"images/Dockerfile.cpu": layout.cpu_image, "images/Dockerfile.cuda": layout.image}
    return [
        f"docker buildx build --platform linux/amd64,linux/arm64 -f {path} -t {names[path]} --push "
        "PATH/TO/millrace"
        for path in dockerfiles(layout)
    ]


def _cpu(layout: Layout) -> str:
    # Its index has wheels without CUDA for both kinds of machines.
    index = " --index-url https://download.pytorch.org/whl/cpu"
    packages = "apt-get update && apt-get install -y --no-install-recommends g++"
    return (
        f"{_head(layout.cpu_image)}FROM {CPU_BASE} AS build\n"
        f"{_INSTALL.format(torch=TORCH, index=index, extra=_stores(layout))}"
        f"\nFROM {CPU_BASE}\n"
        f"RUN {packages} \\\n && rm -rf /var/lib/apt/lists/*\n"
        f"{_RUN.format(user=USER)}"
    )


def _cuda(layout: Layout) -> str:
    packages = "apt-get update && apt-get install -y --no-install-recommends python3-venv"
    more = "python3-dev g++"
    extra = "'apache-tvm-ffi==0.1.9' 'sgl-deep-gemm==0.1.3'"  # the extra `gpu`
    return (
        f"{_head(layout.image)}FROM {CUDA_BASE} AS build\n"
        f"RUN {packages}\n"
        f"{_INSTALL.format(torch=TORCH, index='', extra=extra)}"
        f"\nFROM {CUDA_BASE}\n"
        f"RUN {packages} {more} \\\n && rm -rf /var/lib/apt/lists/*\n"
        f"ENV CUDA_HOME=/usr/local/cuda\n"
        f"{_RUN.format(user=USER)}"
    )


def _stores(layout: Layout) -> str:
    """What `millrace download` needs for the model's address."""
    if layout.file.model.startswith("gs://"):
        return "gcsfs"
    if layout.file.model.startswith("s3://"):
        return "s3fs"
    return "'kr8s>=0.20'"  # for `millrace deploy status` within the cluster


def _head(image: str) -> str:
    return (
        "# Made by `millrace deploy render`. In a checkout of Millrace:\n"
        f"# docker buildx build --platform linux/amd64,linux/arm64 -f THIS -t {image} .\n"
    )
