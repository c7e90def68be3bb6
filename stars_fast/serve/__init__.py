"""An OpenAI-compatible server over :class:`stars_fast.AsyncStarsEngine`; needs the extra ``stars-fast[serve]``."""
