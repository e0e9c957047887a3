"""The only package that talks to the Hugging Face Hub; its errors are ours."""

from __future__ import annotations

from hubmerge.hub.identity import JobToken
from hubmerge.hub.repos import Refs, Target
from hubmerge.hub.writing import CommitInfo, Hub, StagedFile

__all__ = ["CommitInfo", "Hub", "JobToken", "Refs", "StagedFile", "Target"]
