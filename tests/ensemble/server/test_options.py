"""ServeOptions is checked when it is built, and shows no password."""

from __future__ import annotations

import pytest

from ensemble.errors import InvalidInput
from ensemble.server.options import ServeOptions


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"port": -1}, "--port -1: ports are 0 to 65535"),
        ({"metrics_port": 65536}, "--metrics-port 65536: ports are 0 to 65535"),
        (
            {"address": "shop"},
            "address 'shop' is not an IP address; use 127.0.0.1, or 0.0.0.0 for every interface",
        ),
        (
            {"require": "openvino"},
            "--require openvino: known are tensorrt, rtx, onnxruntime-gpu, onnxruntime",
        ),
        ({"index": "tpu"}, "--index tpu: is unknown; use cpu or gpu"),
        ({"redis": "host"}, "--redis: 'host' is not a Redis URL"),
        ({"start_timeout_s": 0.0}, "--start-timeout-s must be above 0, got 0.0"),
    ],
)
def test_what_cannot_be_is_refused_by_name(options, text):
    with pytest.raises(InvalidInput) as refusal:
        ServeOptions(**options)
    assert str(refusal.value).startswith(text)


def test_what_can_be_is_taken_and_the_password_is_not_shown():
    options = ServeOptions(0, None, address="::1", redis="redis://me:secret@host:1")
    assert "secret" not in repr(options)
    assert [ServeOptions(address=a).is_loopback for a in ("127.0.0.1", "localhost", "::1", "0.0.0.0")] == [
        *[True] * 3,
        False,
    ]
