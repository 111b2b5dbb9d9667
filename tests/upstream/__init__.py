"""A stand-in for Cloudflare's API: a real HTTP server that answers as Workers AI does, well or badly.

``python -m tests.upstream --port 8787`` runs it for people, ``running.py`` for tests. How it answers a call is decided
by, in this order: what is ordered for anybody's next calls, what is ordered for the account's, and words in the prompt
(``upstream:3040=2``: the first two calls with this prompt and seed). ``behaviours.py`` has the names. Each call is
counted and taken down; ``/control/…`` (``api.py``) reads that and gives the orders.
"""
