"""Questions to a cluster's API, and to gcloud; only reads.

It knows paths, and not what the answers mean.
"""

from __future__ import annotations

import asyncio
import json
import shutil
import subprocess
import warnings
from typing import Any

from millrace.common.optional import require
from millrace.errors import UserError, one_line

TIMEOUT = 20.0  # seconds that one answer may take
GCLOUD_TIMEOUT = 120.0
Thing = dict[str, Any]


class NotAllowedError(Exception):
    """These credentials may not read a path."""


class Cluster:
    """A cluster, by kubectl's credentials. Close it after use.

    Raises UserError if there are no credentials, or the cluster does not answer.
    """

    def __init__(self, context: str | None = None, kubeconfig: str | None = None) -> None:
        require("kr8s", "deploy check")
        self._runner = asyncio.Runner()
        try:
            self._api = self._runner.run(_connect(context, kubeconfig))
        except Exception as error:  # whatever a credential's plugin raises
            self._runner.close()
            raise UserError(
                f"no cluster answers ({one_line(error)}); `kubectl cluster-info` shows which one "
                "is meant, `gcloud container clusters get-credentials NAME` or `aws eks "
                "update-kubeconfig --name NAME` chooses it"
            ) from None

    def close(self) -> None:
        self._runner.close()

    def get(self, path: str) -> Thing | None:
        """The object or list at an API path; None if there is none. Raises NotAllowedError."""
        return self._runner.run(self._get(path))

    def items(self, path: str) -> list[Thing]:
        """The objects of a list; [] where the cluster does not know their kind."""
        found = self.get(path)
        return [] if found is None else list(found.get("items") or [])

    async def _get(self, path: str) -> Thing | None:
        folder, _, name = path.rpartition("/")
        if not folder:  # /version: the client needs a folder, and the API takes the slash behind
            folder, name = path, ""
        try:
            async with self._api.call_api(
                "GET", version="", base=folder, url=name, raise_for_status=False
            ) as response:
                status, content = response.status_code, response.content
        except Exception as error:  # of the HTTP library, which is kr8s's own matter
            raise UserError(f"the cluster does not answer {path}: {one_line(error)}") from None
        if status == 404:
            return None
        if status in (401, 403):
            raise NotAllowedError(path)
        if status != 200:
            raise UserError(f"the cluster answers {path} with {status}")
        found: Thing = json.loads(content)
        return found


async def _connect(context: str | None, kubeconfig: str | None) -> Any:
    from kr8s.asyncio import api

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # the version is a check of its own
        found = await asyncio.wait_for(api(context=context, kubeconfig=kubeconfig), TIMEOUT)
    found.timeout = TIMEOUT
    return found


def gcloud(*words: str) -> Any:
    """What a gcloud command prints as JSON. Raises UserError if it fails."""
    program = shutil.which("gcloud")
    if program is None:
        raise UserError("gcloud is not on PATH")
    command = [program, *words, "--format", "json"]
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            timeout=GCLOUD_TIMEOUT,
            stdin=subprocess.DEVNULL,
        )
    except subprocess.TimeoutExpired:
        raise UserError(f"gcloud {words[0]} did not answer in {GCLOUD_TIMEOUT:g} s") from None
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise UserError(f"gcloud {' '.join(words[:3])}: {last}")
    try:
        return json.loads(done.stdout or "null")
    except json.JSONDecodeError:
        raise UserError(f"gcloud {' '.join(words[:3])}: its output is no JSON") from None
