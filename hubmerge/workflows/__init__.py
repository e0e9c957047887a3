"""Merges that start from a repository's Actions tab: what ``action.yml`` runs, and the workflows that use it."""
