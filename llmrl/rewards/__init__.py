"""What says how good a response is."""
