"""Bytes of collectives, read from programs written here and compiled ones."""

import jax
import jax.numpy as jnp
import pytest

from mcjepa_jax.compiled import hlo_bytes


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ("f32[3,4]{1,0:T(8,128)}", 48),
        ("bf16[5]{0}", 10),
        ("pred[]", 1),
        ("s4[3]{0}", 2),
        ("(f32[2]{0}, /*index=1*/(u8[3]{0:T(8,128)S(1)}, s32[]))", 15),
        ("f8e4m3fn[6]{0}", 6),
        ("token[]", 0),
    ],
)
def test_shape_counts_all_arrays_without_padding(shape: str, expected: int):
  assert hlo_bytes.shape_bytes(shape) == expected


_HEADER = "HloModule m, entry_computation_layout={(f32[4])->f32[4]}\n\n"


def test_counts_the_larger_of_what_goes_in_and_out():
  text = _HEADER + """
ENTRY %main (a: f32[4]) -> f32[4] {
  %a = f32[4]{0} parameter(0)
  %g = f32[16]{0} all-gather(%a), channel_id=1, dimensions={0}
  ROOT %s = f32[4]{0} reduce-scatter(%g), channel_id=2, dimensions={0}
}
"""
  assert hlo_bytes.collective_bytes(text) == {
      "all-gather": 64,
      "reduce-scatter": 64,
  }


def test_counts_a_start_and_its_done_once():
  text = _HEADER + """
ENTRY %main (a: f32[4]) -> f32[16] {
  %a = f32[4]{0} parameter(0)
  %g = (f32[4]{0}, f32[16]{0}) all-gather-start(%a), dimensions={0}
  ROOT %d = f32[16]{0} all-gather-done(%g)
}
"""
  assert hlo_bytes.collective_bytes(text) == {"all-gather": 64}


def test_counts_a_collective_that_several_fusions_carry_once():
  text = _HEADER + """
%first (p: f32[4]) -> f32[16] {
  %p = f32[4]{0} parameter(0)
  ROOT %g = f32[16]{0} all-gather(%p), channel_id=7, dimensions={0}
}

%second (q: f32[4]) -> f32[16] {
  %q = f32[4]{0} parameter(0)
  ROOT %h = f32[16]{0} all-gather(%q), channel_id=7, dimensions={0}
}

ENTRY %main (a: f32[4]) -> f32[16] {
  %a = f32[4]{0} parameter(0)
  %x = f32[16]{0} fusion(%a), kind=kCustom, calls=%first
  ROOT %y = f32[16]{0} fusion(%a), kind=kCustom, calls=%second
}
"""
  assert hlo_bytes.collective_bytes(text) == {"all-gather": 64}


@pytest.mark.parametrize(
    "annotation", ["", ', backend_config={"known_trip_count":{"n":"5"}}']
)
def test_counts_a_loop_as_often_as_it_runs(annotation: str):
  text = _HEADER + f"""
%body (p: (s32[], f32[4])) -> (s32[], f32[4]) {{
  %p = (s32[], f32[4]{{0}}) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %x = f32[4]{{0}} get-tuple-element(%p), index=1
  %r = f32[4]{{0}} all-reduce(%x), channel_id=1, to_apply=%add
  ROOT %t = (s32[], f32[4]{{0}}) tuple(%i, %r)
}}

%condition (c: (s32[], f32[4])) -> pred[] {{
  %c = (s32[], f32[4]{{0}}) parameter(0)
  %j = s32[] get-tuple-element(%c), index=0
  %n = s32[] constant(5)
  ROOT %lt = pred[] compare(%j, %n), direction=LT
}}

ENTRY %main (a: (s32[], f32[4])) -> (s32[], f32[4]) {{
  %a = (s32[], f32[4]{{0}}) parameter(0)
  ROOT %w = (s32[], f32[4]{{0}}) while(%a), condition=%condition, body=%body{annotation}
}}
"""
  assert hlo_bytes.collective_bytes(text) == {"all-reduce": 80}


def test_compiled_gradient_reduces_each_parameter_once():
  mesh = jax.make_mesh((8,), ("data",), devices=jax.devices("cpu"))
  split = jax.NamedSharding(mesh, jax.P("data"))
  whole = jax.NamedSharding(mesh, jax.P())

  def loss(w, x):
    return jnp.sum((x @ w) ** 2)

  compiled = (
      jax.jit(jax.grad(loss), in_shardings=(whole, split), out_shardings=whole)
      .lower(jnp.zeros((6, 5)), jnp.zeros((16, 6)))
      .compile()
  )
  assert hlo_bytes.collective_bytes(compiled.as_text()) == {
      "all-reduce": 6 * 5 * 4
  }


def test_compiled_loop_repeats_its_collective():
  mesh = jax.make_mesh((8,), ("data",), devices=jax.devices("cpu"))
  split = jax.NamedSharding(mesh, jax.P("data"))

  def total(x):
    def body(_, y):
      return jnp.sin(y + jnp.sum(x * y))

    return jax.lax.fori_loop(0, 3, body, jnp.float32(0.5))

  compiled = jax.jit(total, in_shardings=split).lower(jnp.zeros(16)).compile()
  assert hlo_bytes.collective_bytes(compiled.as_text()) == {"all-reduce": 3 * 4}


def test_reads_and_writes_what_runs_by_itself():
  text = _HEADER + """
%fused (p: f32[4], q: f32[4]) -> f32[4] {
  %p = f32[4]{0} parameter(0)
  %q = f32[4]{0} parameter(1)
  %m = f32[4]{0} multiply(%p, %q)
  ROOT %s = f32[4]{0} sine(%m)
}

ENTRY %main (a: f32[4]) -> f32[4] {
  %a = f32[4]{0} parameter(0)
  %b = f32[4]{0} bitcast(%a)
  ROOT %f = f32[4]{0} fusion(%a, %b), kind=kLoop, calls=%fused
}
"""
  assert hlo_bytes.hbm_bytes(text) == 3 * 16


def test_of_a_slice_and_an_update_in_place_only_the_part_moves():
  text = _HEADER + """
%cut (p: f32[9,4], i: s32[]) -> f32[1,4] {
  %p = f32[9,4]{1,0} parameter(0)
  %i = s32[] parameter(1)
  %z = s32[] constant(0)
  ROOT %d = f32[1,4]{1,0} dynamic-slice(%p, %i, %z), dynamic_slice_sizes={1,4}
}

%put (p.1: f32[9,4], x: f32[1,4], i.1: s32[]) -> f32[9,4] {
  %p.1 = f32[9,4]{1,0} parameter(0)
  %x = f32[1,4]{1,0} parameter(1)
  %i.1 = s32[] parameter(2)
  %z.1 = s32[] constant(0)
  ROOT %u = f32[9,4]{1,0} dynamic-update-slice(%p.1, %x, %i.1, %z.1)
}

ENTRY %main (a: f32[9,4], j: s32[]) -> f32[9,4] {
  %a = f32[9,4]{1,0} parameter(0)
  %j = s32[] parameter(1)
  %c = f32[1,4]{1,0} fusion(%a, %j), kind=kLoop, calls=%cut
  ROOT %f = f32[9,4]{1,0} fusion(%a, %c, %j), kind=kLoop, calls=%put
}
"""
  assert hlo_bytes.hbm_bytes(text) == (16 + 16 + 4) + (16 + 16 + 4)


def test_slices_are_seen_through_bitcasts_and_nested_fusions():
  text = _HEADER + """
%inmost (p: f32[9,4], i: s32[]) -> f32[1,4] {
  %p = f32[9,4]{1,0} parameter(0)
  %i = s32[] parameter(1)
  %z = s32[] constant(0)
  ROOT %d = f32[1,4]{1,0} dynamic-slice(%p, %i, %z), dynamic_slice_sizes={1,4}
}

%middle (q: f32[36], j: s32[]) -> f32[1,4] {
  %q = f32[36]{0} parameter(0)
  %j = s32[] parameter(1)
  %b = f32[9,4]{1,0} bitcast(%q)
  ROOT %g = f32[1,4]{1,0} fusion(%b, %j), kind=kLoop, calls=%inmost
}

ENTRY %main (a: f32[36], k: s32[]) -> f32[1,4] {
  %a = f32[36]{0} parameter(0)
  %k = s32[] parameter(1)
  ROOT %f = f32[1,4]{1,0} fusion(%a, %k), kind=kLoop, calls=%middle
}
"""
  assert hlo_bytes.hbm_bytes(text) == 16 + 16 + 4


def test_of_an_array_fetched_in_slices_each_is_read_once():
  text = _HEADER + """
ENTRY %main (a: f32[8]) -> f32[8] {
  %a = f32[8]{0} parameter(0)
  %s = ((f32[8]{0}), f32[4]{0:S(1)}, s32[]{:S(2)}) slice-start(%a), slice={[0:4]}
  %t = ((f32[8]{0}), f32[4]{0:S(1)}, s32[]{:S(2)}) slice-start(%a), slice={[4:8]}
  %u = f32[4]{0:S(1)} slice-done(%s)
  %v = f32[4]{0:S(1)} slice-done(%t)
  %w = f32[8]{0:S(1)} custom-call(%u, %v), custom_call_target="ConcatBitcast"
  %x = f32[8]{0} custom-call(), custom_call_target="AllocateBuffer"
  ROOT %y = f32[8]{0} add(%w, %w)
}
"""
  assert hlo_bytes.hbm_bytes(text) == 32 + 32


def test_what_runs_beside_counts_once():
  text = _HEADER + """
%beside (p: f32[4]) -> f32[4] {
  %p = f32[4]{0} parameter(0)
  ROOT %c = f32[4]{0} sine(%p)
}

ENTRY %main (a: f32[4]) -> f32[4] {
  %a = f32[4]{0} parameter(0)
  %s = ((f32[4]{0}), f32[4]{0}, s32[]) async-start(%a), calls=%beside
  %u = ((f32[4]{0}), f32[4]{0}, s32[]) async-update(%s), calls=%beside
  ROOT %d = f32[4]{0} async-done(%u), calls=%beside
}
"""
  assert hlo_bytes.hbm_bytes(text) == 16 + 16


def test_what_lies_in_a_cores_own_memory_does_not_move():
  text = _HEADER + """
ENTRY %main (a: f32[4]) -> f32[4] {
  %a = f32[4]{0} parameter(0)
  %s = (f32[4]{0:S(1)}, f32[4]{0}, u32[]{:S(2)}) copy-start(%a)
  %d = f32[4]{0:S(1)} copy-done(%s)
  %e = f32[4]{0:S(1)} sine(%d)
  ROOT %f = f32[4]{0} sine(%e)
}
"""
  assert hlo_bytes.hbm_bytes(text) == 16 + 16


def test_compiled_loop_moves_its_arrays_as_often_as_it_runs():
  def repeated(times):
    def total(x):
      return jax.lax.fori_loop(0, times, lambda _, y: jnp.sin(y @ y), x)

    return hlo_bytes.hbm_bytes(
        jax.jit(total).lower(jnp.zeros((64, 64))).compile().as_text()
    )

  once = repeated(8) - repeated(7)
  # The product reads one array twice; its result is written, read and written.
  assert once == pytest.approx(5 * 64 * 64 * 4, rel=0.25)
  assert repeated(15) - repeated(7) == 8 * once
