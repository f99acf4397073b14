"""Which elements of the model a rank holds: regions, digests, safetensors files."""
