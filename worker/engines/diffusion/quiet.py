"""Keeps torch's libraries from writing to stderr: imported before diffusers, which warns while importing.

Both would otherwise draw progress bars and report optional packages that this engine does without. What goes
wrong arrives as an exception and is reported by the service itself.
"""

from diffusers.utils import logging as diffusers_logging
from huggingface_hub.utils.tqdm import disable_progress_bars
from transformers.utils import logging as transformers_logging

for library in (transformers_logging, diffusers_logging):
    library.set_verbosity_error()
    library.disable_progress_bar()
disable_progress_bars()
