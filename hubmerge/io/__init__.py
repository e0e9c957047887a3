"""Reading and writing safetensors bytes: headers, ranged sources, the shard writer."""
