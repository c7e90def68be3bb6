"""Operators of ``torch.library``: one file each, with its plain torch reference beside it."""

from stars_fast.ops.gather_logprobs import gather_logprobs
from stars_fast.ops.kv_append import kv_append
from stars_fast.ops.philox import Domain, Stream, philox_key
from stars_fast.ops.rotary_append import rotary_append
from stars_fast.ops.sample_step import sample_step
from stars_fast.ops.select_and_commit import EARLIER, GOES_ON, INVALID, LENGTH, NONE, STOP, select_and_commit
from stars_fast.ops.skinny_product import skinny_product
from stars_fast.ops.tree_attention import check_supported, tree_attention

__all__ = [
    "EARLIER",
    "GOES_ON",
    "INVALID",
    "LENGTH",
    "NONE",
    "STOP",
    "Domain",
    "Stream",
    "check_supported",
    "gather_logprobs",
    "kv_append",
    "philox_key",
    "rotary_append",
    "sample_step",
    "select_and_commit",
    "skinny_product",
    "tree_attention",
]
