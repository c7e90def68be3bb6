"""Reward-guided decoding for ``model.generate(custom_generate=...)``; all of it is in the package stars-fast."""

from stars_fast import StarsConfig
from stars_fast import generate as guided

# Where transformers found this file. It hands on what it was told for that.
_HUB = ("token", "revision", "cache_dir", "subfolder", "force_download", "local_files_only", "trust_remote_code")


def generate(model, inputs=None, *, reward_model, stars_config=None, **kwargs):
    """What :func:`stars_fast.generate` does; ``stars_config`` may be a dictionary of its fields."""
    if isinstance(stars_config, dict):
        stars_config = StarsConfig().replace(**stars_config)
    given = {name: value for name, value in kwargs.items() if value is not None and name not in _HUB}
    return guided(model, inputs, reward_model=reward_model, stars_config=stars_config, **given)
