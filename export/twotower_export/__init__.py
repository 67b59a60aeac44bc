"""twotower_export."""
