"""Pairs of frames out of sequences."""

import numpy as np
import pytest

from mcjepa_jax.data.sets import sequences
from mcjepa_jax.errors import UserError
from tests.helpers import videos


def test_video_pairs_hold_two_frames_and_nothing_else(tmp_path):
  path = videos.write_video(tmp_path / "a.avi", videos.moving(5))
  pairs = sequences.SequencePairs(
      videos.open_videos(path, tmp_path), gaps=(1, 2)
  )
  assert videos.record_ids(pairs) == [
      *("a.avi/000000+1", "a.avi/000001+1", "a.avi/000002+1", "a.avi/000003+1"),
      *("a.avi/000000+2", "a.avi/000001+2", "a.avi/000002+2"),
  ]
  assert set(pairs[5]) == {"frame_1", "frame_2"}
  np.testing.assert_array_equal(
      pairs[5]["frame_1"], pairs.sequences[0].frame(1)
  )
  np.testing.assert_array_equal(
      pairs[5]["frame_2"], pairs.sequences[0].frame(3)
  )


def test_a_cut_between_two_scenes_is_not_paired_over(tmp_path):
  frames = videos.moving(8) + videos.moving(8, seed=1)
  opened = videos.open_videos(
      videos.write_video(tmp_path / "a.avi", frames), tmp_path
  )
  assert np.flatnonzero(sequences.cuts(opened[0].thumbnails())).tolist() == [7]
  pairs = sequences.SequencePairs(opened, gaps=(1, 3), skip_cuts=True)
  assert len(pairs) == 15 + 14 + 13 - (1 + 2 + 3)
  assert not {"a.avi/000007+1", "a.avi/000006+2", "a.avi/000007+3"} & set(
      videos.record_ids(pairs)
  )
  kept = sequences.SequencePairs(opened, gaps=(1, 3))
  assert len(kept) == 15 + 14 + 13


def test_fast_motion_is_no_cut_but_a_lone_step_as_large_is():
  rest = np.full((12, 32, 32, 3), 100, np.uint8)
  fast = rest + (np.arange(12) % 2 * 20)[:, None, None, None].astype(np.uint8)
  assert not sequences.cuts(fast).any()
  rest[6:] += 20
  assert np.flatnonzero(sequences.cuts(rest)).tolist() == [5]
  rest[6:] -= 9
  assert not sequences.cuts(rest).any()
  assert not sequences.cuts(rest[:1]).size


def test_pairs_that_stand_still_are_left_out_on_request(tmp_path):
  frames = videos.moving(4) + videos.moving(4)[-1:] * 3
  opened = videos.open_videos(
      videos.write_video(tmp_path / "a.avi", frames), tmp_path
  )
  assert len(sequences.SequencePairs(opened)) == 6
  pairs = sequences.SequencePairs(opened, min_change=0.5)
  assert videos.record_ids(pairs) == [
      "a.avi/000000+1",
      "a.avi/000001+1",
      "a.avi/000002+1",
  ]
  with pytest.raises(UserError, match="came none in 7 frames"):
    sequences.SequencePairs(opened, min_change=250.0)


@pytest.mark.parametrize("gaps", [(0, 1), (2, 1), (-1, -1)])
def test_gaps_that_are_no_range_are_refused(gaps):
  with pytest.raises(UserError, match="gaps: expected"):
    sequences.SequencePairs([], gaps=gaps)
