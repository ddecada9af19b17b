"""Show the training data without training: report and contact sheet of `--inspect_data`.

Only the contact sheet is written, and the index of clips, which training also writes.
"""

import json
import logging
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from PIL import Image
from torch.utils.data import Dataset

from cogvideox_sat.clips.batch_order import BatchOrder, SampleKey
from cogvideox_sat.clips.latent_dataset import LatentDataset
from cogvideox_sat.clips.loader import ClipLoader
from cogvideox_sat.clips.report import SourceReport, counted
from cogvideox_sat.commands.launchers import is_first_process
from cogvideox_sat.configuration.argument_lists import TrainingArguments, VaeTrainingArguments
from cogvideox_sat.configuration.deepspeed_runtime import BatchSizes
from cogvideox_sat.configuration.settings import DataSettings
from cogvideox_sat.configuration.shared_arguments import RunArguments
from cogvideox_sat.media.contact_sheet import FRAMES, spread, write_frames
from cogvideox_sat.runs.datasets import make_dataset
from cogvideox_sat.runs.vae_data import vae_data_settings
from sgm.errors import UserError
from sgm.seeds import sample_seed

logger = logging.getLogger(__name__)

SHEET = "inspect_data.png"
SHOWN_CLIPS = 16
SHOWN_SHAPES = 12


def inspect_training_data(args: TrainingArguments, batch: BatchSizes) -> int:
    """Report and draw the data of `train_video.py`; return the exit code.

    Raises:
        UserError: training would refuse the data.
    """
    return _inspect(args, DataSettings.from_args(args), batch.micro)


def inspect_vae_data(args: VaeTrainingArguments, time_factor: int) -> int:
    """Report and draw the data of `train_vae.py`; return the exit code.

    Raises:
        UserError: training would refuse the data.
    """
    return _inspect(args, vae_data_settings(args, time_factor), args.batch_size)


def _inspect(args: RunArguments, settings: DataSettings, batch_size: int) -> int:
    if not is_first_process():
        return 0
    lenient = replace(settings, max_unreadable_share=1.0)  # so that all problems are reported
    mixing: dict[str, Any] = {"repeats": settings.train_data_repeats, "weights": settings.train_data_weights}
    dataset: Any = make_dataset(settings.train_data, lenient, **mixing)
    content: dict[str, Any] = {"train_data": _describe(dataset, args.train_data_weights)}
    problems = _problems(dataset, settings, batch_size)
    if args.valid_data:
        held_out = make_dataset(settings.valid_data, lenient, random_start=False, argument="valid_data")
        content["valid_data"] = _describe(held_out, [])
    sheet, substituted = _draw(dataset, settings, Path(args.contact_sheet or SHEET))
    problems += [f"cannot be read: {line}" for line in substituted]
    content |= {"contact_sheet": sheet, "problems": problems}
    text = json.dumps(content, indent=2, ensure_ascii=False) if args.json else "\n".join(_lines(content))
    # Names that are not valid text are written with escapes, which are also valid in JSON.
    sys.stdout.write(text.encode("utf-8", "backslashreplace").decode() + "\n")
    if problems:
        raise UserError(f"train_data: {problems[0]}" + (f" (and {len(problems) - 1} more)" if problems[1:] else ""))
    return 0


def _problems(dataset: Any, settings: DataSettings, batch_size: int) -> list[str]:
    """Return the reasons for which training would refuse the data."""
    problems = []
    total = len(dataset) + len(dataset.unreadable)
    if len(dataset.unreadable) > settings.max_unreadable_share * total:
        problems.append(
            f"{len(dataset.unreadable)} of {total} clips are unreadable, more than max_unreadable_share "
            f"{settings.max_unreadable_share:g} allows; the first: {dataset.unreadable[0]}"
        )
    try:
        buckets = [dataset.bucket(index) for index in range(len(dataset))]
        BatchOrder(buckets, batch_size, 0, 1, settings.seed, draws=getattr(dataset, "draws", None))
    except UserError as error:
        problems.append(str(error))
    return problems


# ---------------------------------------------------------------- report


def _describe(dataset: Dataset, weights: Sequence[float]) -> dict[str, Any]:
    reports = list((getattr(dataset, "reports", None) or _cache_reports(dataset)).values())
    places = [report.as_json() for report in reports]
    for place, weight in zip(places, weights, strict=False):
        place["weight"] = weight
    shapes = Counter(str(dataset.bucket(index)) for index in range(len(dataset)))
    used = all(place["captions_missing"] is not None for place in places)
    return {
        "samples": len(dataset),
        "captions_missing": dataset.missing_labels if used else None,
        "shapes": dict(shapes.most_common()),
        "unreadable": list(dict.fromkeys(dataset.unreadable)),
        "encoded": isinstance(dataset, LatentDataset),
        "places": places,
    }


def _cache_reports(dataset: Dataset) -> dict[str, SourceReport]:
    """Return the reports of latent caches; empty for a data set of another class."""
    reports: dict[str, SourceReport] = {}
    if isinstance(dataset, LatentDataset):
        for path, sample in dataset.samples:
            report = reports.setdefault(str(path.parent), SourceReport(str(path.parent)))
            report.samples += 1
            report.captions_missing = (report.captions_missing or 0) + (not sample.caption)
            report.shapes["{} frames of {}x{}".format(*sample.bucket)] += 1
        for folder, report in reports.items():
            if (listed := Path(folder, "unreadable.txt")).is_file():
                for line in listed.read_text(encoding="utf-8").splitlines():
                    report.leave_out("clips could not be read when they were encoded", line)
    return reports


def _lines(content: dict[str, Any]) -> list[str]:
    lines = []
    for name in ("train_data", "valid_data"):
        if data := content.get(name):
            missing = data["captions_missing"]
            captions = "captions are not used" if missing is None else f"{missing} without a caption"
            lines.append(f"{name}: {data['samples']} clips, {captions}")
            lines += [f"  {line}" for place in data["places"] for line in _place_lines(place)]
            lines += [f"  unreadable: {line}" for line in data["unreadable"]]
    sheet = content["contact_sheet"]
    lines.append(f"contact sheet: {sheet}" if sheet else "contact sheet: none, encoded clips cannot be shown")
    return lines


def _place_lines(place: dict[str, Any]) -> list[str]:
    lines = [place["location"]]
    if place["repeat"] > 1:
        lines[0] += f", {place['repeat']} times"
    if "weight" in place:
        lines[0] += f", weight {place['weight']:g}"
    if place["videos"] or place["pictures"]:
        lines.append(f"{place['videos']} videos and {place['pictures']} pictures give {place['samples']} clips")
    if place["captions_missing"]:
        lines.append(f"{place['captions_missing']} have no caption")
    shapes = list(place["shapes"].items())
    more = [f"{len(shapes) - SHOWN_SHAPES} more shapes"] if len(shapes) > SHOWN_SHAPES else []
    lines.append("shapes: " + ", ".join([*(f"{count} of {shape}" for shape, count in shapes[:SHOWN_SHAPES]), *more]))
    if seconds := place["seconds"]:
        lines.append("videos of {min:.3g} to {max:.3g} s, the middle one of {median:.3g} s".format(**seconds))
    if cut := place["cut_away"]:
        lines.append(f"crops cut away {cut['mean']:.0%} of the picture on average, {cut['max']:.0%} at most")
    for reason, left in place["left_out"].items():
        end = ", …" if left["count"] > len(left["examples"]) else ""
        lines.append(f"left out: {counted(left['count'], reason)}: {', '.join(left['examples'])}{end}")
    if place["unread"]:
        kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(place["unread"].items()))
        lines.append(f"not read: {kinds}")
    if place["long_labels"]:
        labels = counted(place["long_labels"], "labels have")
        lines.append(f"{labels} several lines; label_lines is {place['label_lines']}")
    lines += [f"not used: {hint}" for hint in place["hints"][:SHOWN_SHAPES]]
    return [lines[0], *(f"  {line}" for line in lines[1:])]


# ---------------------------------------------------------------- contact sheet


def _draw(dataset: Any, settings: DataSettings, path: Path) -> tuple[str | None, list[str]]:
    """Write the contact sheet of clips as in the first epoch.

    Returns:
        The file, None for latents; and the clips that could not be read, which are replaced by others.
    """
    if isinstance(dataset, LatentDataset):
        return None, []
    rows, unreadable = [], []
    keys = [[SampleKey(index, sample_seed(settings.seed, 0, index))] for index in spread(len(dataset), SHOWN_CLIPS)]
    for batch in ClipLoader(dataset, keys, settings.num_workers, settings.clip_timeout):
        sample = {name: column[0] for name, column in batch.items()}
        unreadable += sample["unreadable"]
        clip = sample["mp4"]
        frames = [Image.fromarray(clip[i].permute(1, 2, 0).contiguous().numpy()) for i in spread(len(clip), FRAMES)]
        caption = " ".join(sample["txt"].split()) or "(no caption)"
        rows.append((f"{len(clip)} frames of {clip.shape[-2]}x{clip.shape[-1]}: {caption}", frames))
    write_frames(path, rows)
    return str(path), list(dict.fromkeys(unreadable))
