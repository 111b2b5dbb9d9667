"""The engine that has Cloudflare Workers AI make the pictures: docs/cloudflare.md, "As the upstream".

engine.py      one job: its calls, one after another, until there is a picture
accounts.py    who pays: ids and tokens
bodies.py      a task as the body of a call
exchange.py    one call over HTTP
called.py      how one call went
hints.py       what an answer's headers say beside it
outcomes.py    what an answer means: the one table
pictures.py    the picture in an answer
gate.py        how many calls at once, and none while the upstream is down; how many jobs that makes
"""

from worker.engines.cloudflare.accounts import Account, load_accounts
from worker.engines.cloudflare.bodies import ImageForm
from worker.engines.cloudflare.engine import CloudflareEngine, UpstreamOptions

__all__ = ["Account", "CloudflareEngine", "ImageForm", "UpstreamOptions", "load_accounts"]
