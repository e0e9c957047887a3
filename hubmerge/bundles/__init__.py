"""Bundles: several fine-tunes of one base in one repository, from which each can be restored."""
