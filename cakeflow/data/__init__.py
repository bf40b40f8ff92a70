"""Edit requests and texts: types, schemas, sources and selection."""

from cakeflow.data.builtin import builtin_facts, neutral_text, reversed_prompts
from cakeflow.data.contexts import Contexts
from cakeflow.data.files import read_text
from cakeflow.data.images import ImageEditRequest, ImageProbe, Picture
from cakeflow.data.public_files import Consequence
from cakeflow.data.request import EditRequest, Probe, contradictions
from cakeflow.data.review import check_fields, missing_fields
from cakeflow.data.schemas import parse_requests
from cakeflow.data.selection import select
from cakeflow.data.snippets import with_references
from cakeflow.data.sources import read_consequences, read_documents, read_entries, read_requests, read_texts
from cakeflow.data.subject import guess_subject
from cakeflow.data.text import join, occurrences, plain, states, until_stop

__all__ = [
    "Consequence", "Contexts", "EditRequest", "ImageEditRequest", "ImageProbe", "Picture", "Probe",
    "builtin_facts", "check_fields", "contradictions", "guess_subject", "join", "missing_fields", "neutral_text",
    "occurrences", "parse_requests", "plain", "read_consequences", "read_documents", "read_entries", "read_requests",
    "read_text", "read_texts", "reversed_prompts", "select", "states", "until_stop", "with_references",
]  # fmt: skip
