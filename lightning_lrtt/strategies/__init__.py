"""Lightning strategies; importing this module registers them by name."""

from lightning.pytorch.strategies import StrategyRegistry

from lightning_lrtt.strategies.single import LRTTStrategy

__all__ = ["LRTTStrategy"]

if LRTTStrategy.strategy_name not in StrategyRegistry:
    LRTTStrategy.register_strategies(StrategyRegistry)
