"""An S3 bucket on this machine, spoken to by its real client."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import boto3
import httpx

from tests.up.instances import free_port, wait_for

KEYS = {"AWS_ACCESS_KEY_ID": "someone", "AWS_SECRET_ACCESS_KEY": "secret"}
REGION = "eu-central-1"
NAME = "adapters"


class Bucket:
    """A server with one empty bucket; what is stored is gone when it ends."""

    def __init__(self) -> None:
        self.port = free_port()
        self._process = subprocess.Popen(
            [sys.executable, "-m", "moto.server", "--host", "127.0.0.1", "--port", str(self.port)],
            env=os.environ | KEYS,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        wait_for(self._is_up, 60)
        self._client: Any = boto3.client(
            "s3",
            endpoint_url=f"http://127.0.0.1:{self.port}",
            region_name=REGION,
            aws_access_key_id=KEYS["AWS_ACCESS_KEY_ID"],
            aws_secret_access_key=KEYS["AWS_SECRET_ACCESS_KEY"],
        )
        self._client.create_bucket(Bucket=NAME, CreateBucketConfiguration={"LocationConstraint": REGION})

    def close(self) -> None:
        """End the server."""
        self._client.close()
        self._process.kill()
        self._process.wait()

    def names(self, prefix: str = "") -> list[str]:
        """Return what is stored below a prefix."""
        pages = self._client.get_paginator("list_objects_v2").paginate(Bucket=NAME, Prefix=prefix)
        return [found["Key"] for page in pages for found in page.get("Contents", [])]

    def read(self, name: str) -> bytes:
        """Return the bytes stored under a name."""
        content: bytes = self._client.get_object(Bucket=NAME, Key=name)["Body"].read()
        return content

    def _is_up(self) -> bool:
        try:
            return httpx.get(f"http://127.0.0.1:{self.port}/", trust_env=False).is_success
        except httpx.TransportError:
            return False


def address(port: int, *, prefix: str) -> str:
    """Return the setting that has a product keep its files there."""
    return f"s3://{NAME}/{prefix}?endpoint=http://127.0.0.1:{port}&region={REGION}"
