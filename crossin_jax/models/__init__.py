"""One decoder for every supported family: what differs between them lies in `spec.ModelSpec`."""
