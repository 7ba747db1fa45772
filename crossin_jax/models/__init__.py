"""One decoder for every supported family: `spec.ModelSpec` has what differs between them."""
