"""RankMe of frozen features."""

from mcjepa_jax.evals import rank_me


def test_rank_tells_how_many_directions_features_have(parts):
  result = rank_me.run("set", parts[0])
  # Ten classes, one direction each, about as often.
  assert 9 < result["rankme/set/rank"] <= 10.1
  assert result["rankme/set/rank_random_init"] <= 3.01
  assert 10 < result["rankme/set/rank_pixels"] <= 260
  assert result["rankme/set/count"] == 260
