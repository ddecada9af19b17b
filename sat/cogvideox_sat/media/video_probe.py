"""Read size and length of a video that a user names.

The file is opened in a process of its own, since a decoder may hang or crash. Nothing here imports PyTorch.
"""

import math
import multiprocessing
from multiprocessing.connection import Connection
from pathlib import Path

from cogvideox_sat.media.frame_times import ROUNDING
from cogvideox_sat.media.video_facts import UnreadableClip, VideoFacts
from cogvideox_sat.media.video_reading import load_decoder, open_video
from sgm.forking import garbage_left_alone

DEATH = 5.0  # seconds in which a killed process ends; one that waits for a dead network disk may not
LIMIT = 60.0  # seconds for opening a video; a file without an index of frames is read to its end


def facts_in_time(path: Path, limit: float = LIMIT) -> VideoFacts:
    """Return size and length of a video.

    Raises:
        UnreadableClip: the file is missing, is not a video, or takes longer than `limit` seconds.
    """
    load_decoder()  # before the fork, so that the import does not count towards the limit
    context = multiprocessing.get_context("fork")
    answers, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_look, args=(path, theirs), daemon=True)
    with garbage_left_alone():
        process.start()
    theirs.close()
    try:
        if not answers.poll(limit):
            raise UnreadableClip(f"not opened within {limit:g} s")
        answer = answers.recv()
    except EOFError as error:
        raise UnreadableClip("the process that opened it crashed") from error
    finally:
        process.kill()
        process.join(DEATH)
        answers.close()
    if isinstance(answer, str):
        raise UnreadableClip(answer)
    return answer


def _look(path: Path, answers: Connection) -> None:
    try:
        with open_video(path) as video:
            answers.send(video.facts)
    except UnreadableClip as error:
        answers.send(str(error))


def frames_at_rate(facts: VideoFacts, fps: float) -> int:
    """Return the number of frames of a video at `fps` frames per second.

    The last frame counts as long as a mean frame.
    """
    return math.floor((facts.seconds + facts.frame_duration / 2) * fps + ROUNDING) + 1
