"""Test that the packets of wanted frames, and of frames they depend on, are chosen."""

from typing import NamedTuple

from cogvideox_sat.media.packet_window import decoding_runs


class Packet(NamedTuple):
    pts: int | None
    is_keyframe: bool = False


def packets(text: str) -> list[Packet]:
    """Return packets from times in decoding order; K marks key frames."""
    return [Packet(None if word == "?" else int(word.strip("K")), word.endswith("K")) for word in text.split()]


def runs(text: str, *wanted: int) -> list[list[int | None]]:
    return [[packet.pts for packet in run] for run in decoding_runs(packets(text), wanted)]


def test_a_group_is_decoded_up_to_the_last_wanted_frame():
    assert runs("0K 3 1 2 6 4 5", 1) == [[0, 3, 1]]
    assert runs("0K 3 1 2 6 4 5", 0, 6) == [[0, 3, 1, 2, 6]]


def test_groups_without_wanted_frames_are_left_out():
    assert runs("0K 1 2 3K 4 5 6K 7", 1, 7) == [[0, 1], [6, 7]]
    assert runs("0K 1K 2K 3K 4K", 1, 3) == [[1], [3]]


def test_neighbours_are_one_run_if_the_first_is_decoded_to_its_end():
    assert runs("0K 1 2 3K 4", 2, 4) == [[0, 1, 2, 3, 4]]
    assert runs("0K 1 2 3K 4", 1, 4) == [[0, 1], [3, 4]]


def test_frames_shown_before_their_key_frame_depend_on_the_group_before():
    assert runs("0K 1 2 5K 3 4 6", 3) == [[0, 1, 2, 5, 3]]
    assert runs("0K 1 2 5K 3 4 6", 6) == [[5, 6]]
    assert runs("0K 1 2 5K 3 4 6 9K 7 8", 1, 7) == [[0, 1], [5, 6, 9, 7]]


def test_at_the_beginning_of_a_file_they_are_decoded_if_they_are_wanted():
    assert runs("2K 0 1 3", 3) == [[2, 3]]
    assert runs("2K 0 1 3", 1, 3) == [[2, 1, 3]]


def test_packets_without_a_time_are_taken_for_earlier_ones():
    assert runs("0K ? ? 1 2", 2) == [[0, 1, 2]]
    assert runs("0K 1 2K ? 3", 0, 3) == [[0], [2, 3]]
    assert runs("0K 1 2K ? 3", 1, 3) == [[0, 1, 2, None, 3]]


def test_the_first_packet_begins_a_group_whatever_it_is_marked():
    assert runs("0 1 2", 2) == [[0, 1, 2]]
