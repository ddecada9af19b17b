"""Record which decoder read the videos of a run or of a cache of latents, and warn when another one continues.

The record is a JSON object under the key `reader`: `video_backend`, see `video_reading.BACKENDS`, and its `version`.
"""

import logging
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import Any

logger = logging.getLogger(__name__)

KEY = "reader"
BEFORE_RECORDS = "decord"  # which read all videos before there were records
PACKAGES = {"pyav": "av", "decord": "decord"}


def describe_reader(backend: str) -> dict[str, str]:
    """Return the record for a backend."""
    try:
        return {"video_backend": backend, "version": version(PACKAGES[backend])}
    except PackageNotFoundError:  # installed in some other way
        return {"video_backend": backend, "version": "unknown"}


def recorded_backend(content: Mapping[str, Any]) -> str:
    """Return the backend that `content`, a training state or the description of a cache, was made with."""
    return (content.get(KEY) or {}).get("video_backend", BEFORE_RECORDS)


def warn_of_other_reader(what: str, content: Mapping[str, Any], reader: Mapping[str, str] | None) -> None:
    """Log a warning if `content` was made with another backend than `reader`; not for data that has no reader."""
    theirs = recorded_backend(content)
    if reader and reader["video_backend"] != theirs:
        logger.warning(
            "%s: videos were read with %s and now are with %s: pixels and frames may differ a little, so that losses "
            "are not those of one reader; data.params.video_backend: %s reads as before",
            what,
            theirs,
            reader["video_backend"],
            theirs,
        )


def with_backend(config: Mapping[str, Any], reader: Mapping[str, str] | None) -> dict[str, Any]:
    """Return a configuration that names the video backend, if its data has one."""
    config = dict(config)
    if reader and isinstance(config.get("data"), Mapping):
        params = {"video_backend": reader["video_backend"], **(config["data"].get("params") or {})}
        config["data"] = {**config["data"], "params": params}
    return config
