"""Many workers on Ray: actors for Ray Data, the job behind ``stars-fast batch``, replicas for Ray Serve.

Ray is imported by what needs it (``pip install 'stars-fast[ray]'``, for replicas ``[ray-serve]``), not here.
"""

from stars_fast.scale.stars_batch import StarsBatch

__all__ = ["StarsBatch"]
