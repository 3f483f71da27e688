"""Agreement with IBM's aihwkit: the table of its statistics, and a fresh one where aihwkit is at hand.

What is compared, and where the limits come from, stands in `peers/agreement.py`; the results in `docs/agreement.md`.
"""

from __future__ import annotations

import os

import pytest
from peers import agreement
from peers.common import assert_within, fresh_table

from lightning_lrtt import PulseConfig, devices, presets

TABLE = agreement.load()
# Numbers of aihwkit's models that have no counterpart here; docs/agreement.md says what they are.
NOT_COVERED = {
    "ConstantStep": set(),
    "ExpStep": {"dw_min_std_add", "dw_min_std_slope"},
    "LinearStep": {"reverse_up", "reverse_down", "reverse_offset"},
    "OneSided": {"unit_cell_devices", "units_in_mbatch", "copy_inverted"},
    "PiecewiseStep": set(),
    "PowStep": set(),
    "PowStepReference": {"subtract_symmetry_point", "n_estimation_steps"},
    "SoftBounds": {"reverse_up", "reverse_down", "reverse_offset"},
    "SoftBoundsPmax": {"reverse_up", "reverse_down", "reverse_offset"},
    "SoftBoundsReference": set(),
}
EVERYWHERE = {"perfect_bias", "count_pulses"}
KIND_OF_PRESET = {
    "capacitor": "LinearStep",
    "ecram": "LinearStep",
    "ecram_mo": "LinearStep",
    "idealized": "ConstantStep",
    "gokmen_vlasov": "ConstantStep",
    "reram_es": "ExpStep",
    "reram_sb": "SoftBoundsReference",
    "reram_array_om": "SoftBoundsReference",
    "reram_array_hfo2": "SoftBoundsReference",
}


@pytest.mark.parametrize("name", TABLE["cases"])
def test_device_agrees(name):
    """Change by one pulse at five weights, drawn cells, weights after 1000 pulses, granularity."""
    assert_within(agreement.compare_case(TABLE, name))


@pytest.mark.parametrize("name", TABLE["trains"])
def test_pulse_train_agrees(name):
    """Pulse counts and dW of an outer product; our counts also with the binomial."""
    assert_within(agreement.compare_trains(TABLE, name))


@pytest.mark.parametrize("name", TABLE["updates"])
def test_other_train_agrees(name):
    """Pulse types, trains without fixed_bl or beyond 31 slots, grids, stochastic rounding, um_grad_scale."""
    assert_within(agreement.compare_updates(TABLE, name))


@pytest.mark.parametrize("name", TABLE["exact"])
def test_floating_point_update_on_a_device_agrees(name):
    assert_within(agreement.compare_exact(TABLE, name))


def test_update_defaults_agree():
    """PulseConfig and UpdateParameters start from the same numbers; d_sparsity (a statistic) is theirs alone."""
    theirs, ours = dict(TABLE["update_defaults"]), PulseConfig()
    assert theirs.pop("d_sparsity") is False
    assert agreement.PULSE_TYPES[theirs.pop("pulse_type")] == ours.pulse_type
    assert theirs.pop("res") == theirs.pop("x_res_implicit") == ours.x_res
    assert theirs.pop("d_res_implicit") == ours.d_res
    assert theirs == {name: getattr(ours, name) for name in theirs}


def test_relaxation_agrees():
    assert_within(agreement.compare_relaxation(TABLE))


def test_reset_agrees():
    assert_within(agreement.compare_reset(TABLE))


@pytest.mark.parametrize("kind", NOT_COVERED)
def test_defaults_agree(kind):
    """Every number that both sides have has the same default, and what we lack is what the docs say."""
    differ, missing = agreement.compare_defaults(TABLE["defaults"][kind], getattr(devices, kind)())
    assert not differ
    assert missing == NOT_COVERED[kind] | (set() if kind == "OneSided" else EVERYWHERE)


@pytest.mark.parametrize("name", KIND_OF_PRESET)
def test_preset_numbers_agree(name):
    differ, missing = agreement.compare_defaults(TABLE["cases"][name]["numbers"], presets.device(name))
    assert not differ
    assert missing == NOT_COVERED[KIND_OF_PRESET[name]] | EVERYWHERE


@pytest.mark.peer
@pytest.mark.timeout(1800)
@pytest.mark.skipif(
    "LRTT_AIHWKIT_PYTHON" not in os.environ, reason="LRTT_AIHWKIT_PYTHON does not name a Python that has aihwkit"
)
def test_fresh_table_agrees(tmp_path):
    """Runs aihwkit anew. 5 standard errors: of 1000 comparisons of fresh draws 4 would fail one in every 20 runs."""
    table = agreement.load(fresh_table("aihwkit_statistics.py", tmp_path))
    assert table["defaults"] == TABLE["defaults"]
    for name in table["cases"]:
        assert_within(agreement.compare_case(table, name, limit=5.0))
    for name in table["trains"]:
        assert_within(agreement.compare_trains(table, name, limit=5.0))
    for name in table["updates"]:
        assert_within(agreement.compare_updates(table, name, limit=5.0))
    for name in table["exact"]:
        assert_within(agreement.compare_exact(table, name))
    assert_within(agreement.compare_relaxation(table))
    assert_within(agreement.compare_reset(table))
