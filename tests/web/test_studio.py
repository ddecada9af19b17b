"""Inputs become a job for a model of the page."""

import pytest

from cogvideox_sat.web.data_desk import DataDesk
from cogvideox_sat.web.gallery import Gallery
from cogvideox_sat.web.jobs import JobQueue
from cogvideox_sat.web.models import offered_models
from cogvideox_sat.web.shelves import Shelf
from cogvideox_sat.web.studio import Studio, is_adapter
from cogvideox_sat.web.training_desk import TrainingDesk
from cogvideox_sat.web.uploads import Uploads
from sgm.errors import UserError


class Keeps:
    """A runner that keeps its tasks."""

    def __init__(self):
        self.tasks = []

    def run(self, task, update, is_cancelled):
        self.tasks.append(task)
        return task.target.name

    def close(self):
        pass


@pytest.fixture
def studio(tmp_path):
    (tmp_path / "adapters" / "style").mkdir(parents=True)
    runner = Keeps()
    shelf = Shelf(tmp_path / "adapters", "adapters", is_adapter)
    queue, gallery = JobQueue(runner), Gallery(tmp_path / "videos")
    nothing = Shelf(None, "thing")
    desks = TrainingDesk({}, nothing, nothing), DataDesk({}, nothing)
    studio = Studio(offered_models([["tiny"]], {}), runner, queue, gallery, Uploads(1000), shelf, *desks)
    yield studio
    studio.close()
    assert not studio.uploads.folder.exists()


def test_a_video_is_put_into_the_queue(studio, tmp_path):
    values = {"model": "tiny", "prompt": "a kite", "seed": "3", "adapters": ["style"], "strengths": "0.5"}
    job = studio.make(values)
    while not job.is_over:
        studio.queue.wait(job, job.version, 1)
    (task,) = studio.sampler.tasks
    assert (task.model, task.fields) == ("tiny", {"prompt": "a kite", "seed": 3})
    assert task.adapters == {str(tmp_path / "adapters" / "style"): 0.5}
    assert (task.target.parent, task.inputs) == (tmp_path / "videos", tmp_path / "videos" / "inputs")
    assert (job.title, job.result) == ("a kite", task.target.name)


@pytest.mark.parametrize("name", [None, "", "other", "../tiny", ["tiny"]])
def test_a_model_that_is_not_offered_is_refused(studio, name):
    with pytest.raises(UserError, match=r"model: got .*; it can be tiny"):
        studio.make({"model": name, "prompt": "p"})
    assert not studio.queue.live()


def test_adapters_are_folders_and_files_of_weights(tmp_path):
    for name in ("a.safetensors", "b.txt", "c.pt"):
        (tmp_path / name).touch()
    assert Shelf(tmp_path, "adapters", is_adapter).names() == ["a.safetensors", "c.pt"]
