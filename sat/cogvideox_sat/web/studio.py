"""Models, queue, gallery, uploads and folders that the page works with."""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from cogvideox_sat.web.data_desk import DataDesk
from cogvideox_sat.web.gallery import Gallery
from cogvideox_sat.web.jobs import Job, JobQueue
from cogvideox_sat.web.making import adapters_of, request_fields
from cogvideox_sat.web.models import OfferedModel
from cogvideox_sat.web.sampler import Sampler
from cogvideox_sat.web.sampling_process import VideoTask
from cogvideox_sat.web.shelves import Shelf
from cogvideox_sat.web.training_desk import TrainingDesk
from cogvideox_sat.web.uploads import INPUTS, Uploads
from sgm.errors import UserError, shown

ADAPTER_FILES = (".safetensors", ".pt", ".bin", ".ckpt")


@dataclass(frozen=True)
class Studio:
    """Objects that the page works with.

    Args:
        models: by name.
        adapters: those that the page offers.
        training, data: what its tabs of these names work with.
    """

    models: Mapping[str, OfferedModel]
    sampler: Sampler
    queue: JobQueue
    gallery: Gallery
    uploads: Uploads
    adapters: Shelf
    training: TrainingDesk
    data: DataDesk

    def make(self, values: Mapping[str, Any]) -> Job:
        """Put a video into the queue, and return its job.

        Args:
            values: what was filled in, see `making.request_fields`.

        Raises:
            UserError: a value is none of what the model takes.
        """
        model = self.models.get(str(values.get("model")))
        if model is None:
            raise UserError(f"model: got {shown(values.get('model'))}; it can be {', '.join(self.models)}")
        self.uploads.prune()
        fields = request_fields(model, values, self.uploads)
        adapters = adapters_of(values.get("adapters"), values.get("strengths"), self.adapters)
        target = self.gallery.new_path(datetime.now())
        task = VideoTask(model.name, fields, target, adapters, self.gallery.folder / INPUTS)
        return self.queue.submit(task, fields["prompt"])

    def close(self) -> None:
        """End what runs, and remove uploads."""
        self.training.close()
        self.queue.close()
        self.data.close()
        self.uploads.close()


def is_adapter(path: Path) -> bool:
    """Return whether a file or folder may hold an adapter."""
    return path.is_dir() or path.suffix.lower() in ADAPTER_FILES
