"""twotower_client."""
