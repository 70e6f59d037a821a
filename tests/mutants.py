"""Shows that the tests would notice: python -m tests.mutants

Applies each fault below, one line of the package changed, in a copy of the
repository and runs the tests that ought to notice. A fault is killed by a test
that fails; one that does not apply, that breaks the import or that only stops
the collection of tests counts as alive. The last line is `killed K/N`; the exit
code is 0 only if all were killed and the copy without a fault passes.

  python -m tests.mutants [NAME ...]   only the faults named: never enough for 0
"""

import argparse
from concurrent import futures
import dataclasses
import os
import pathlib
import queue
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time

_ROOT = pathlib.Path(__file__).resolve().parent.parent
_LEAST = 25
_SECONDS = 300  # for the tests of one fault
_WHOLE_SECONDS = 1200  # for all of them without a fault
_ENVIRONMENT = os.environ | {
    "JAX_PLATFORMS": "cpu",
    # What the faults leave as it is compiles once.
    "JAX_COMPILATION_CACHE_DIR": str(_ROOT / ".cache" / "jax"),
    # Two edits within a second can have one time stamp.
    "PYTHONDONTWRITEBYTECODE": "1",
}


@dataclasses.dataclass(frozen=True)
class Mutant:
  """One changed piece of source, and the tests that should see it."""

  name: str
  file: str  # below mcjepa_jax/
  old: str  # occurs there exactly once
  new: str
  tests: tuple[str, ...]  # what pytest is given, below tests/


def _mutants(file: str, tests: str, *rows: tuple[str, ...]) -> list[Mutant]:
  """One for each (name, old, new[, tests of its own])."""
  return [
      Mutant(name, file, old, new, tuple((own[0] if own else tests).split()))
      for name, old, new, *own in rows
  ]


MUTANTS = (
    *_mutants(
        "storage/checkpoint.py",
        "training/step_watcher_test.py::test_a_failure_told_once_the_next_is_written_is_not_of_a_row",
        (
            "failures_are_never_forgotten",
            "      self.failures = 0\n",
            "      pass\n",
        ),
        (
            "a_rollback_trusts_the_list_after_a_failure",
            "    self._manager.reload()\n",
            "    pass\n",
            "storage/checkpoint_test.py::test_after_a_save_that_failed_it_goes_back_to_what_that_was_to_replace",
        ),
    ),
    *_mutants(
        "storage/checkpoint.py",
        "storage/checkpoint_test.py::test_a_save_that_cannot_begin_is_told_once_and_the_next_is_made",
        (
            "a_save_that_never_began_goes_on",
            "      if self._begun.exception():",
            "      if False:",
        ),
    ),
    *_mutants(
        "errors.py",
        "data/readers/image_files_test.py::test_what_a_signal_raises_meanwhile_is_no_fault_of_the_image",
        (
            "a_stop_is_a_fault_of_the_file",
            "class Stop(BaseException):",
            "class Stop(RuntimeError):",
        ),
    ),
    *_mutants(
        "training/saving.py",
        "training/step_watcher_test.py::test_sigterm_while_a_step_compiles_loses_none_before_it",
        (
            "the_start_of_flow_is_not_saved",
            "or task_schedule.is_first_with_flow(",
            "or False and task_schedule.is_first_with_flow(",
        ),
    ),
    *_mutants(
        "train.py",
        "training/step_watcher_test.py::test_sigterm_while_a_step_compiles_loses_none_before_it",
        (
            "sigterm_waits_for_the_compiler",
            "at_once = number == kept",
            "at_once = number < kept",
        ),
    ),
    *_mutants(
        "storage/run_folder.py",
        "storage/run_folder_test.py",
        (
            "what_another_host_writes_is_read",
            "        if name == _MARKER:",
            "        if False:",
        ),
        (
            "any_folder_is_a_runs",
            "if (below or names) and not {_MARKER, CONFIG} & set(names):",
            "if False:",
        ),
    ),
    *_mutants(
        "training/batch_search.py",
        "training/batch_search_test.py",
        (
            "the_smaller_batch",
            "policy = max(POLICIES",
            "policy = min(POLICIES",
        ),
        (
            "the_third_compile_corrects_nothing",
            "foretold(first, batch, (times, report))",
            "foretold(first, batch)",
        ),
    ),
    *_mutants(
        "runtime/process_lifetimes.py",
        "runtime/process_lifetimes_test.py",
        (
            "all_of_a_life_is_lost",
            "max(began, since)",
            "began",
        ),
        (
            "every_host_writes_its_life",
            "  if not first:\n",
            "  if False:\n",
        ),
    ),
    *_mutants(
        "training/bad_steps.py",
        "training/bad_steps_test.py::test_a_workdir_has_so_many_dumps_and_no_more",
        (
            "dumps_without_end",
            "len(whole) < limit and",
            "True and",
        ),
    ),
    *_mutants(
        "storage/workdir_lock.py",
        "faults_test.py::test_of_many_hosts_a_lock_of_one_that_died_is_waited_for",
        (
            "no_lock_is_waited_for",
            "  if jax.process_count() > 1:\n    deadline",
            "  if False:\n    deadline",
        ),
    ),
    *_mutants(
        "training/validation.py",
        "training/validation_test.py",
        (
            "rollback_without_a_way_back",
            "  if reach >= lasts:\n",
            "  if reach >= 0:\n",
        ),
    ),
    *_mutants(
        "compiled/compiled_steps.py",
        "compiled/compiled_steps_test.py",
        (
            "a_step_run_again_counts_twice",
            "    if not again:\n",
            "    if True:\n",
        ),
    ),
    *_mutants(
        "compiled/flops.py",
        "compiled/flops_test.py",
        (
            "scan_runs_once",
            'times = params["length"]',
            "times = 1.0",
        ),
        (
            "padding_is_work",
            "inside & (place % spread == 0)",
            "place % spread == 0",
        ),
        (
            "smaller_branch",
            "return max(inner)",
            "return min(inner)",
        ),
    ),
    *_mutants(
        "compiled/hlo_bytes.py",
        "compiled/hlo_bytes_test.py",
        (
            "loop_moves_once",
            "runs[computation] * sum(moved(*one)",
            "min(runs[computation], 1) * sum(moved(*one)",
        ),
        (
            "near_is_far",
            "if not near and _NEAR.search(layout):",
            "if False:",
        ),
    ),
    *_mutants(
        "losses/motion_objective.py",
        "losses/motion_objective_test.py",
        (
            "cycle_stays_at_home",
            "there = flow_ops.swap_pairs(other(stride, flow))",
            "there = other(stride, flow)",
        ),
        (
            "a_frame_compared_with_itself",
            "warp(flow_ops.swap_pairs(image), flow)",
            "warp(image, flow)",
        ),
        (
            "occlusion_of_the_other_direction",
            "back = flow_ops.swap_pairs(flow)",
            "back = flow",
        ),
    ),
    *_mutants(
        "ops/cost_volume.py",
        "ops/cost_volume_test.py::test_cost_volume_equals_a_plain_loop",
        (
            "one_row_for_all",
            "dynamic_slice_in_dim(padded, dy, h, axis=1)",
            "dynamic_slice_in_dim(padded, 0 * dy, h, axis=1)",
        ),
    ),
    *_mutants(
        "storage/checkpoint.py",
        "storage/checkpoint_test.py::test_updates_in_place_do_not_reach_a_save_under_way",
        (
            "no_copy",
            "state = self._apart(state)",
            "state = jax.block_until_ready(state)",
        ),
        (
            "good_steps_are_dropped",
            "if path.name.endswith(_PARTIAL):",
            "if True:",
            "storage/checkpoint_test.py::test_the_last_and_the_best_steps_stay",
        ),
        (
            "errors_are_kept",
            "    # The manager's own check finds nothing",
            "    return  # The manager's own check finds nothing",
            "storage/checkpoint_test.py::test_a_write_that_fails_is_told_without_waiting_for_the_next",
        ),
    ),
    *_mutants(
        "training/alarms.py",
        "training/alarms_test.py::test_alarms_wait_for_their_task_and_for_the_masks",
        (
            "masks_at_once",
            "delay=config.motion.occlusion_start",
            "delay=0",
        ),
        (
            "motion_from_the_first_step",
            'starts["motion"] = starts["both"] = config.motion.start_step',
            'starts["motion"] = starts["both"] = 0',
        ),
    ),
    *_mutants(
        "distributed/rendezvous.py",
        "distributed/rendezvous_test.py::test_the_absent_are_named_to_all_that_came",
        (
            "the_first_is_absent_too",
            "if i not in present]",
            "if i not in present or not i]",
        ),
        (
            "two_of_one_number",
            "elif index in present:",
            "elif False:",
            "distributed/rendezvous_test.py::test_two_with_one_number_and_another_count_are_told",
        ),
        (
            "who_left_is_present",
            "if x[0] == index and _is_closed(x[1])]",
            "if False]",
            "distributed/rendezvous_test.py::test_one_that_left_and_was_started_again_is_no_second_one",
        ),
        (
            "no_signal_in_the_roll_call",
            "  with signals.on_sigterm(signals.stop_unsaved):\n    names",
            "  with contextlib.nullcontext():\n    names",
            "distributed/rendezvous_test.py::test_sigterm_is_heard_while_hosts_are_awaited",
        ),
    ),
    *_mutants(
        "evals/mask_metrics.py",
        "evals/mask_metrics_test.py",
        (
            "tolerance_of_a_side",
            "math.hypot(*mask.shape)",
            "max(mask.shape)",
        ),
        (
            "square_tolerance",
            "<= radius**2",
            "<= 2 * radius**2",
        ),
        (
            "recall_of_half",
            "values > 0.5",
            "values >= 0.5",
        ),
    ),
    *_mutants(
        "evals/davis.py",
        "evals/davis_test.py::test_the_nearest_cells_are_those_of_the_whole_matrix",
        (
            "near_is_shifted",
            "offset <= 2 * radius",
            "offset < 2 * radius",
        ),
        (
            "edges_wrap",
            "(y >= 0) & (y < h)",
            "(y >= -h) & (y < h)",
        ),
        (
            "last_frame_counts",
            "i < annotated[-1]",
            "i <= annotated[-1]",
            "evals/davis_test.py::test_the_first_and_the_last_frame_do_not_count",
        ),
        (
            "no_range_per_channel",
            "mask /= mask.max() or 1",
            "mask /= 1",
            "evals/davis_test.py::test_each_channel_is_weighed_by_its_own_range",
        ),
        (
            "context_is_the_first",
            "deque(maxlen=context)",
            "deque(maxlen=0)",
            "evals/davis_test.py::test_masks_are_the_votes_of_the_whole_matrix_over_all_frames",
        ),
    ),
    *_mutants(
        "ops/flow_ops.py",
        "ops/flow_ops_test.py",
        (
            "u_and_v_swapped",
            "pixel_grid(h, w) + flow, 0, last",
            "pixel_grid(h, w) + flow[..., ::-1], 0, last",
        ),
        (
            "backward_warp_made_forward",
            "pixel_grid(h, w) + flow, 0, last",
            "pixel_grid(h, w) - flow, 0, last",
        ),
        (
            "flow_not_rescaled",
            "return resize(flow, size) * scale",
            "return resize(flow, size)",
        ),
        (
            "flow_rescaled_by_the_other_axis",
            "size[1] / w, size[0] / h",
            "size[0] / h, size[1] / w",
        ),
        (
            "out_of_frame_inverted",
            "return within.astype(jnp.float32)",
            "return (~within).astype(jnp.float32)",
        ),
        (
            "features_normalised_over_the_batch",
            "axes = (1, 2, 3)\n  mean",
            "axes = (0, 1, 2, 3)\n  mean",
        ),
        (
            "pairs_not_swapped",
            "[:, ::-1].reshape(x.shape)",
            "[:, :].reshape(x.shape)",
        ),
    ),
    *_mutants(
        "ops/occlusion.py",
        "ops/occlusion_test.py",
        (
            "occlusion_mask_inverted",
            "squared(forward + backward) <= tolerance",
            "squared(forward + backward) > tolerance",
        ),
        (
            "occlusion_of_the_unwarped_flow",
            "backward = flow_ops.warp(lax.stop_gradient(flow_21), forward)",
            "backward = lax.stop_gradient(flow_21)",
        ),
        (
            "occlusion_mask_with_a_gradient",
            "target = grid + lax.stop_gradient(flow_21)",
            "target = grid + flow_21",
        ),
    ),
    *_mutants(
        "ops/cost_volume.py",
        "ops/cost_volume_test.py",
        (
            "cost_volume_transposed",
            "padded[:, dy : dy + h, dx : dx + w]",
            "padded[:, dx : dx + h, dy : dy + w]",
        ),
    ),
    *_mutants(
        "losses/vicreg.py",
        "losses/vicreg_test.py",
        (
            "n_for_n_minus_1",
            "ddof=1",
            "ddof=0",
        ),
        (
            "hinge_flipped",
            "relu(gamma - std)",
            "relu(std - gamma)",
        ),
        (
            "diagonal_kept",
            "where=~jnp.eye(d, dtype=bool)",
            "where=jnp.ones((d, d), bool)",
        ),
        (
            "diagonal_kept_in_the_gram_form",
            " - jnp.sum(jnp.square(diagonal))",
            " - 0 * jnp.sum(diagonal)",
        ),
        (
            "covariance_not_centred",
            "(z - jnp.mean(z, axis=0)) / jnp.sqrt",
            "z / jnp.sqrt",
        ),
        (
            "statistics_of_each_half_of_the_batch",
            "jnp.var(_float32(z), axis=0, ddof=1)",
            "jnp.var(_float32(z).reshape(-1, len(z) // 2 or 1,"
            " z.shape[1]), axis=1, ddof=1).mean(0)",
        ),
    ),
    *_mutants(
        "losses/flow_losses.py",
        "losses/flow_losses_test.py",
        (
            "stop_gradient_dropped_from_the_mask",
            "  mask = lax.stop_gradient(mask)\n  # Weights",
            "  # Weights",
        ),
        (
            "smoothness_across_edges",
            "jnp.exp(-edge_weight * edge)",
            "jnp.exp(edge_weight * edge)",
        ),
        (
            "cycle_does_not_come_back",
            "l2_distance(x_1, flow_ops.warp(there, flow_12))",
            "l2_distance(x_1, there)",
        ),
        (
            "windows_at_the_border_count",
            "kept = erode(mask, radius) if radius else mask",
            "kept = mask",
        ),
    ),
    *_mutants(
        "losses/weighting.py",
        "losses/weighting_test.py",
        (
            "a_weight_ignored",
            "weight = motion_weight * motion[kind][level[0]]",
            "weight = motion_weight",
        ),
        (
            "the_ramp_on_the_wrong_terms",
            "if kind not in _UNRAMPED",
            "if kind in _UNRAMPED",
        ),
    ),
    *_mutants(
        "step/task_schedule.py",
        "step/update_test.py::test_a_step_moves_its_groups_and_leaves_the_others_bit_equal[estimator-moved3]",
        (
            "frozen_encoder_moves",
            '"estimator": (("motion",), ("estimator",))',
            '"estimator": (("motion",), ("encoder", "estimator"))',
        ),
        (
            "motion_before_its_start",
            "  if step < start_step:\n    return",
            "  if step < 0:\n    return",
            "step/update_test.py::test_no_motion_term_is_computed_before_flow_start",
        ),
    ),
    *_mutants(
        "step/update.py",
        "training/step_watcher_test.py::test_an_update_that_is_not_finite_changes_nothing_but_the_step",
        (
            "update_not_skipped",
            "go = finite & ~state.skipped",
            "go = ~state.skipped",
        ),
        (
            "update_after_a_skipped_one",
            "go = finite & ~state.skipped",
            "go = finite",
        ),
    ),
    *_mutants(
        "step/gradients.py",
        "step/update_test.py::test_accumulation_of_motion_equals_the_whole_batch",
        (
            "micro_batches_summed",
            "lambda x: x / count",
            "lambda x: x",
        ),
    ),
    *_mutants(
        "step/optimizer.py",
        "step/optimizer_test.py",
        (
            "no_warm_up",
            "warm = (count + 1) / max(warmup_steps, 1)",
            "warm = 1",
        ),
        (
            "decay_of_biases",
            "p.ndim > 1",
            "p.ndim > 0",
        ),
    ),
    *_mutants(
        "models/flow_decoder.py",
        "models/flow_decoder_test.py::test_flow_stays_within_max_flow_of_the_full_image",
        (
            "flow_not_clipped",
            "flow = jnp.clip(flow + residual, -limit, limit)",
            "flow = flow + residual",
        ),
    ),
    *_mutants(
        "models/convnext.py",
        "models/convnext_test.py",
        (
            "drop_path_not_rescaled",
            "/ keep",
            "/ 1",
        ),
    ),
    *_mutants(
        "evals/metrics.py",
        "evals/metrics_test.py",
        (
            "outlier_by_either_bound",
            "inlier = (error <= 3) | (",
            "inlier = (error <= 3) & (",
        ),
        (
            "invalid_pixels_counted",
            "counts = valid[..., 0] > 0",
            "counts = valid[..., 0] > -1",
        ),
    ),
    *_mutants(
        "evals/flow.py",
        "evals/flow_test.py",
        (
            "last_batch_dropped",
            "  yield from held.values()",
            "  yield from (g for g in held.values() if len(g) == batch_size)",
        ),
        (
            "what_leaves_the_frame_is_seen",
            "return inside & (visible[..., 0] > 0)",
            "return visible[..., 0] > 0",
        ),
        (
            "compilation_is_timed",
            "    if frames.shape in self._shapes:\n",
            "    if True:\n",
        ),
    ),
    *_mutants(
        "evals/tiling.py",
        "evals/tiling_test.py",
        (
            "tiles_add_up_to_more",
            "ramp / total[",
            "ramp + 0 * total[",
        ),
    ),
    *_mutants(
        "evals/linear.py",
        "evals/linear_test.py",
        (
            "worst_rate_chosen",
            "chosen.argmax()",
            "chosen.argmin()",
        ),
        (
            "decay_is_twice_l2",
            "0.5 * weight_decay",
            "weight_decay",
        ),
    ),
    *_mutants(
        "evals/submission.py",
        "evals/submission_test.py",
        (
            "frames_named_as_the_data",
            "frame.replace('_', '')",
            "frame",
        ),
    ),
    *_mutants(
        "evals/knn.py",
        "evals/knn_test.py",
        (
            "votes_not_weighted",
            "1) / temperature)",
            "1) * 0)",
        ),
    ),
    *_mutants(
        "data/readers/flow_files.py",
        "data/readers/flow_files_test.py",
        (
            "kitti_scale_wrong",
            ".astype(np.float32) - 2**15) / 64",
            ".astype(np.float32) - 2**15) / 128",
        ),
    ),
    *_mutants(
        "data/sets/flow_pairs.py",
        "data/sets/flow_sets_test.py",
        (
            "spring_flow_scaled",
            "flow[::scale, ::scale], valid",
            "scale * flow[::scale, ::scale], valid",
        ),
    ),
    *_mutants(
        "data/sets/flow_sets.py",
        "data/sets/flow_sets_test.py",
        (
            "chairs_split_swapped",
            '{"training": b"1", "validation": b"2"}',
            '{"training": b"2", "validation": b"1"}',
        ),
    ),
    *_mutants(
        "data/pipeline/geometry.py",
        "data/pipeline/geometry_test.py",
        (
            "frames_mirrored_upside_down",
            "cv2.flip(image, 1) if",
            "cv2.flip(image, 0) if",
        ),
        (
            "resized_without_the_filter",
            "image = _filtered(image, (height / size[0], width / size[1]))",
            "image = image.copy()",
        ),
        (
            "flow_of_a_cut_not_turned_back",
            "(there - second[:, 2]) @ back.T - pixels",
            "(there - second[:, 2]) @ back - pixels",
        ),
    ),
    *_mutants(
        "data/pipeline/batches.py",
        "data/pipeline/batches_test.py",
        (
            "one_order_for_all_epochs",
            "      .repeat()\n",
            "      .repeat(reseed_each_epoch=False)\n",
        ),
    ),
    *_mutants(
        "step/augmentation.py",
        "step/augmentation_test.py",
        (
            "solarize_below_the_threshold",
            "jnp.where(images >= threshold, 1 - images, images)",
            "jnp.where(images >= threshold, images, 1 - images)",
        ),
        (
            "blend_inverted",
            "jnp.where(active[:, turn]",
            "jnp.where(~active[:, turn]",
        ),
    ),
    *_mutants(
        "train.py",
        "train_test.py::test_a_killed_and_resumed_run_equals_the_uninterrupted_bit_for_bit",
        (
            "iterator_not_restored",
            "          stream.restore(saved[task])\n",
            "          pass\n",
        ),
        (
            "evaluation_lost_by_a_run_that_goes_on",
            "      if not stopping and is_report_step(config, number):\n",
            "      if number > start and not stopping and"
            " is_report_step(config, number):\n",
            "training/step_watcher_test.py::test_sigterm_in_an_evaluation_saves_and_the_next_run_evaluates_there",
        ),
        (
            "streams_saved_as_of_the_queue",
            "save(run, state, following(), hurry=hurry)",
            "save(run, state, {k: s.state() for k, s in run.streams.items()})",
        ),
    ),
    *_mutants(
        "runtime/signals.py",
        "training/step_watcher_test.py::test_sigterm_in_an_evaluation_saves_and_the_next_run_evaluates_there",
        (
            "sigterm_waits_for_the_evaluation",
            "  with contextlib.suppress(_Interrupted), on_sigterm(interrupt):\n",
            "  with contextlib.nullcontext():\n",
        ),
    ),
    *_mutants(
        "training/recovery.py",
        "training/step_watcher_test.py::test_after_a_row_of_skips_it_goes_back_and_past_them_also_when_resumed",
        (
            "batch_met_again_after_a_rollback",
            "      stream.restore(back.streams[task])\n",
            "      pass\n",
        ),
    ),
)


def _copy(to: pathlib.Path) -> pathlib.Path:
  """A copy of what git would keep, beside a link to the shared samples."""
  root = to / "repository"
  listed = subprocess.run(
      ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
      cwd=_ROOT,
      check=True,
      capture_output=True,
  ).stdout.split(b"\0")
  for name in filter(None, map(os.fsdecode, listed)):
    if (_ROOT / name).is_file():
      (root / name).parent.mkdir(parents=True, exist_ok=True)
      shutil.copyfile(_ROOT / name, root / name)
      shutil.copymode(_ROOT / name, root / name)
  shared = _ROOT.parent / "shared"
  if shared.exists():
    (to / "shared").symlink_to(shared)
  return root


def _pytest(
    root: pathlib.Path, tests: list[str], seconds: float = _SECONDS
) -> tuple[int, str]:
  """Exit code and output of the tests, up to the first that fails."""
  command = [sys.executable, "-m", "pytest", "-x", "-q", "-n0", "-rf",
             "-p", "no:cacheprovider", "--tb=no"]  # fmt: skip
  # A session of its own, so that what the tests start ends with them.
  process = subprocess.Popen(
      command + [f"tests/{test}" for test in tests],
      cwd=root,
      env=_ENVIRONMENT,
      stdout=subprocess.PIPE,
      stderr=subprocess.STDOUT,
      text=True,
      start_new_session=True,
  )
  try:
    output, _ = process.communicate(timeout=seconds)
  except subprocess.TimeoutExpired:
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    return -1, f"more than {seconds} s"
  return process.returncode, output


def verdict(mutant: Mutant, root: pathlib.Path) -> tuple[bool, str]:
  """Whether a test fails under the fault, and its name or why not."""
  path = root / "mcjepa_jax" / mutant.file
  source = path.read_text()
  if source.count(mutant.old) != 1:
    return False, f"does not apply: found {source.count(mutant.old)} times"
  try:
    path.write_text(source.replace(mutant.old, mutant.new))
    module = "mcjepa_jax." + mutant.file.removesuffix(".py").replace("/", ".")
    loads = subprocess.run(
        [sys.executable, "-c", f"import {module}"],
        cwd=root,
        env=_ENVIRONMENT,
        capture_output=True,
        check=False,
    )
    if loads.returncode:
      return False, "breaks the import"
    code, output = _pytest(root, list(mutant.tests))
  finally:
    path.write_text(source)
  failed = re.search(r"^FAILED (\S+)", output, re.MULTILINE)
  if code == 1 and failed:
    return True, failed[1]
  last = output.strip().splitlines()[-1] if output.strip() else "no output"
  return False, f"pytest ended with {code}: {last}"


def main(argv: list[str] | None = None) -> int:
  """0 if every fault is killed and the copy without one passes."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("names", nargs="*", help="only these faults")
  parser.add_argument("--jobs", type=int, default=min(os.cpu_count() or 1, 4))
  args = parser.parse_args(argv)
  known = {mutant.name: mutant for mutant in MUTANTS}
  if unknown := set(args.names) - set(known):
    print(
        f"error: no such fault: {', '.join(sorted(unknown))}", file=sys.stderr
    )
    return 2
  chosen = [known[name] for name in args.names] or list(MUTANTS)
  start, killed = time.monotonic(), 0
  with tempfile.TemporaryDirectory() as folder:
    roots: queue.Queue[pathlib.Path] = queue.Queue()
    for job in range(args.jobs):
      roots.put(_copy(pathlib.Path(folder) / str(job)))

    def on_a_copy(function, *arguments):
      root = roots.get()
      try:
        return function(*arguments, root)
      finally:
        roots.put(root)

    with futures.ThreadPoolExecutor(args.jobs) as pool:
      every = sorted({test for mutant in chosen for test in mutant.tests})
      whole = pool.submit(
          on_a_copy,
          lambda tests, root: _pytest(root, tests, _WHOLE_SECONDS),
          every,
      )
      runs = {pool.submit(on_a_copy, verdict, m): m for m in chosen}
      for number, run in enumerate(futures.as_completed(runs), 1):
        dead, why = run.result()
        killed += dead
        left = (time.monotonic() - start) / number * (len(runs) - number)
        print(
            f"{runs[run].name}: {'killed by' if dead else 'ALIVE,'} {why}"
            f"  [{number}/{len(runs)}, {left:.0f} s to go]",
            flush=True,
        )
      code, output = whole.result()
  passes = code == 0
  print(f"without a fault: {output.strip().splitlines()[-1]}")
  print(f"killed {killed}/{len(chosen)}")
  enough = len(chosen) >= _LEAST
  return 0 if passes and enough and killed == len(chosen) else 1


if __name__ == "__main__":
  sys.exit(main())
