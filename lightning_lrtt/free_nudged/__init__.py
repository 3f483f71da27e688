"""Free/nudged (two-phase) training of systems that relax: equilibrium propagation and its relatives."""

from lightning_lrtt.free_nudged.diagnostics import agreement, bptt, energy_trace, estimate
from lightning_lrtt.free_nudged.engine import Outcome, TwoPhase
from lightning_lrtt.free_nudged.estimator import DecayingBeta, Estimator
from lightning_lrtt.free_nudged.hopfield import HopfieldMLP
from lightning_lrtt.free_nudged.hopfield_conv import HopfieldConvNet
from lightning_lrtt.free_nudged.module import FreeNudgedModule
from lightning_lrtt.free_nudged.resistive import ResistiveLayer, ResistiveMLP
from lightning_lrtt.free_nudged.stats import PhaseStats
from lightning_lrtt.free_nudged.system import Phase, States, System
from lightning_lrtt.snapshot import Snapshot, UnregisteredStateError

__all__ = [
    "DecayingBeta",
    "Estimator",
    "FreeNudgedModule",
    "HopfieldConvNet",
    "HopfieldMLP",
    "Outcome",
    "Phase",
    "PhaseStats",
    "ResistiveLayer",
    "ResistiveMLP",
    "Snapshot",
    "States",
    "System",
    "TwoPhase",
    "UnregisteredStateError",
    "agreement",
    "bptt",
    "energy_trace",
    "estimate",
]
