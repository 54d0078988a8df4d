"""Verifier-free reinforcement learning of language models: exact gradient-norm rewards and their neighbours on TRL."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vigor.config import VigorConfig
    from vigor.gradnorm import sequence_grad_norms
    from vigor.rewards import get as get_reward
    from vigor.rewards.base import Reward
    from vigor.rollouts import Rollouts
    from vigor.shaping import rank, zscore
    from vigor.signals import PolicyPass, TokenStats, token_stats
    from vigor.trainer import VigorTrainer

__version__ = "0.1.0"

# Loaded on first use: `vigor --help` and the light pieces must not wait for torch and TRL.
_PUBLIC = {
    "PolicyPass": "vigor.signals:PolicyPass",
    "Reward": "vigor.rewards.base:Reward",
    "Rollouts": "vigor.rollouts:Rollouts",
    "TokenStats": "vigor.signals:TokenStats",
    "VigorConfig": "vigor.config:VigorConfig",
    "VigorTrainer": "vigor.trainer:VigorTrainer",
    "get_reward": "vigor.rewards:get",
    "rank": "vigor.shaping:rank",
    "sequence_grad_norms": "vigor.gradnorm:sequence_grad_norms",
    "token_stats": "vigor.signals:token_stats",
    "zscore": "vigor.shaping:zscore",
}

__all__ = [
    "PolicyPass",
    "Reward",
    "Rollouts",
    "TokenStats",
    "VigorConfig",
    "VigorTrainer",
    "__version__",
    "get_reward",
    "rank",
    "sequence_grad_norms",
    "token_stats",
    "zscore",
]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'vigor' has no attribute {name!r}")
    module, attribute = _PUBLIC[name].split(":")
    return getattr(import_module(module), attribute)


def __dir__() -> list[str]:
    return __all__
