"""Many workers on Ray: actors for Ray Data, the job behind ``stars-fast batch``, replicas for Ray Serve.

Ray is imported by what needs it, not here: the extra ``ray``, for replicas ``ray-serve``.
"""

from stars_fast.scale.stars_batch import StarsBatch

__all__ = ["StarsBatch"]
