"""Lightning strategies; importing this module registers them by name."""

from lightning.pytorch.strategies import StrategyRegistry

from lightning_lrtt.strategies.ddp import LRTTDDPStrategy
from lightning_lrtt.strategies.single import LRTTStrategy

__all__ = ["LRTTDDPStrategy", "LRTTStrategy"]

for _strategy in (LRTTStrategy, LRTTDDPStrategy):
    if _strategy.strategy_name not in StrategyRegistry:
        _strategy.register_strategies(StrategyRegistry)
