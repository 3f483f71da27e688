"""Agreement of reads through converters with IBM's aihwkit; `peers/io_agreement.py` says what is compared."""

from __future__ import annotations

import os

import pytest
from peers import io_agreement
from peers.common import assert_within, fresh_table

from lightning_lrtt import IOConfig

TABLE = io_agreement.load()


@pytest.mark.parametrize("name", TABLE["cases"])
def test_reads_agree(name):
    """Means and variances of every output of four vectors, forward and backward."""
    assert_within(io_agreement.compare(TABLE, name))


def test_defaults_agree():
    """Every field that both sides have, resolutions to float64."""
    ours = IOConfig()
    assert {key: getattr(ours, key) for key in TABLE["defaults"]} == TABLE["defaults"]


@pytest.mark.parametrize(
    ("name", "field", "value"),
    [
        ("output noise", "out_noise", 0.102),
        ("weight noise", "w_noise", 0.051),
        ("input noise", "inp_noise", 0.102),
        ("quantised", "inp_res", 1 / 16),
        ("clipping", "out_bound", 1.01),
    ],
)
def test_the_comparison_notices(name, field, value):
    """A change of a few per cent is further than the limit."""
    case = TABLE["cases"][name]
    changed = {**TABLE, "cases": {name: {**case, "io": case["io"] | {field: value}}}}
    assert max(row.distance for row in io_agreement.compare(changed, name)) > 4.0


@pytest.mark.peer
@pytest.mark.timeout(1800)
@pytest.mark.skipif(
    "LRTT_AIHWKIT_PYTHON" not in os.environ, reason="LRTT_AIHWKIT_PYTHON does not name a Python that has aihwkit"
)
def test_fresh_table_agrees(tmp_path):
    """Runs aihwkit anew. 5 standard errors: 4 would fail one in every ten runs of 2500 comparisons."""
    table = io_agreement.load(fresh_table("aihwkit_io.py", tmp_path))
    assert table["defaults"] == TABLE["defaults"]
    for name in table["cases"]:
        assert_within(io_agreement.compare(table, name, limit=5.0))
