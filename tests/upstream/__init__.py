"""A stand-in for Cloudflare's API: a real HTTP server that answers as Workers AI does, well or badly.

``python -m tests.upstream --port 8787`` runs it for people, ``running.py`` for tests. How it answers a call is decided
by, in this order: what was queued for the next calls, what is set for the account, and words in the prompt
(``upstream:3040=2``: the first two calls with this prompt and seed). ``behaviours.py`` has the names.
"""
