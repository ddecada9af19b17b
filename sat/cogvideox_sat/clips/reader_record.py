"""Record the decoder of a run's or cache's videos, and warn if another one continues.

The record is a JSON object under the key `reader`: `video_backend`, see `video_reading.BACKENDS`, and its `version`.
"""

import logging
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import Any

logger = logging.getLogger(__name__)

KEY = "reader"
BEFORE_RECORDS = "decord"  # the decoder of all videos before records existed
PACKAGES = {"pyav": "av", "decord": "decord"}


def describe_reader(backend: str) -> dict[str, str]:
    """Return the record for a backend."""
    try:
        return {"video_backend": backend, "version": version(PACKAGES[backend])}
    except PackageNotFoundError:  # not installed as a package
        return {"video_backend": backend, "version": "unknown"}


def recorded_backend(content: Mapping[str, Any]) -> str:
    """Return the backend with which a training state or a cache was made."""
    return (content.get(KEY) or {}).get("video_backend", BEFORE_RECORDS)


def warn_of_other_reader(what: str, content: Mapping[str, Any], reader: Mapping[str, str] | None) -> None:
    """Warn if `content` was made with another backend than `reader`, if the data has a reader."""
    theirs = recorded_backend(content)
    if reader and reader["video_backend"] != theirs:
        logger.warning(
            "%s: videos were read with %s and are now read with %s, so pixels and frames may differ slightly, and with "
            "them the losses; data.params.video_backend: %s reads as before",
            what,
            theirs,
            reader["video_backend"],
            theirs,
        )


def with_backend(config: Mapping[str, Any], reader: Mapping[str, str] | None) -> dict[str, Any]:
    """Return a configuration that names the video backend, if the data has one."""
    config = dict(config)
    if reader and isinstance(config.get("data"), Mapping):
        params = {"video_backend": reader["video_backend"], **(config["data"].get("params") or {})}
        config["data"] = {**config["data"], "params": params}
    return config
