"""swan in Hugging Face transformers: an attention function, `SwanCache`, attach and detach."""

try:
    import transformers.masking_utils  # noqa: F401  # came with the versions that this works with
except ImportError as error:
    raise ImportError("swan works with transformers >= 5.10: pip install 'swan-attention[hf]'") from error

from swan.integrations.transformers.attach import attach as attach
from swan.integrations.transformers.attach import detach as detach
from swan.integrations.transformers.attachment import attachment_of as attachment_of
from swan.integrations.transformers.attachment import is_attached as is_attached
from swan.integrations.transformers.cache import SwanCache as SwanCache
from swan.integrations.transformers.keyword import cache_keyword as cache_keyword
