"""What ranks import, once for all of them."""
# ruff: noqa: F401

import huggingface_hub
import torch.distributed

import hubmerge.api
import hubmerge.cli.merge
import hubmerge.cli.push
import hubmerge.engine
import hubmerge.hub.translate
import hubmerge.recipe.load
from hubmerge.methods import all_methods

huggingface_hub.HfApi()
all_methods()
